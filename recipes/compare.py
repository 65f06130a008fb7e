"""SPAR beside its rivals, all in one harness: data sets x methods x seeds, each combination one run in one process.

python recipes/compare.py                                              # everything on the embedded data, one run a core
python recipes/compare.py dataset=minari:spar/hopper/medium-v0 method=spar,iql,rebrac seed=0,1,2,3,4
python recipes/compare.py hydra/launcher=ray                           # or submitit_slurm: pip install '.[sweep]'
python recipes/report.py outputs/compare

The same command goes on after it was killed: finished runs are not repeated.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

# For the processes of the sweep, which inherit it: their bars would overwrite each other.
os.environ.setdefault("TQDM_DISABLE", "1")

import spar_d4rl
import torch
from common import RECIPES, best_device, run_recipe, summarize
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rivals import BUILDERS
from rivals.base import Problem
from run_output import MetricLog, save_config, write_json
from spar_d4rl import RESULT_SEED, SCORE_COLUMNS
from sweep import claim, is_finished, run_directory

from torchrl_spar import InputError, evaluate


def main(cfg: DictConfig) -> None:
    # A worker of Ray or Slurm may start elsewhere.
    os.chdir(HydraConfig.get().runtime.cwd)
    out = run_directory(Path(cfg.runs), spar_d4rl.dataset_name(cfg), cfg.method.name, cfg.seed)
    cfg.out = str(out)
    with claim(out):
        if is_finished(out, cfg):
            print(f"{out}: finished before", flush=True)
            return
        try:
            results = spar_d4rl.train(cfg) if cfg.method.algorithm == "spar" else train(cfg)
        except InputError:
            shutil.rmtree(out, ignore_errors=True)
            raise
    score = results["spar"] if "spar" in results else results["policy"]
    shown = score["return_mean"] if score["normalized"] is None else score["normalized"]
    print(f"{out}: score {shown:.1f}, {results['wall_seconds']:.0f} s", flush=True)


def train(cfg: DictConfig) -> dict[str, Any]:
    """One run of a rival; the files are those of spar_d4rl.py, "policy" in place of "anchor" and "spar"."""
    start = time.perf_counter()
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    out, device = Path(cfg.out), best_device(cfg.device)
    data, env = spar_d4rl.load(cfg, device)
    options = method_options(cfg.method, spar_d4rl.dataset_name(cfg))
    rival = BUILDERS[cfg.method.algorithm](Problem(data, cfg, device), **options)
    log = MetricLog(out, cfg.logger.backend, [*rival.columns, *SCORE_COLUMNS])
    save_config(out, cfg)
    rival.pretrain(log)

    def score(policy: Any, episodes: int, seed: int) -> dict[str, float | None]:
        return summarize(env, evaluate(policy, env, episodes, seed + 100_000 * cfg.seed))

    curve, rate = spar_d4rl.improve(cfg, rival, rival.policy, rival.data, log, score, cfg.method.name)
    results = {
        **spar_d4rl.run_facts(cfg, env, data),
        "policy": score(rival.policy, cfg.eval.final_episodes, RESULT_SEED),
        "updates_per_second": rate, "wall_seconds": time.perf_counter() - start, "curve": curve,
    }  # fmt: skip
    log.close()
    write_json(out / "results.json", results)
    return results


def method_options(method: DictConfig, dataset: str) -> dict[str, Any]:
    """A method's options on a data set: its own, then those of every task that the data set's name contains."""
    words = "-".join(re.findall(r"[a-z0-9]+", dataset.lower()))
    tasks = [task for task in method.tasks or {} if f"-{task}-" in f"-{words}-"]
    merged = OmegaConf.merge(method, *(method.tasks[task] for task in sorted(tasks, key=len)))
    options: Any = OmegaConf.to_container(merged, resolve=True)
    return {name: value for name, value in options.items() if name not in ("name", "algorithm", "tasks")}


if __name__ == "__main__":
    # Slurm's processes start with Python's own path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(RECIPES), os.environ.get("PYTHONPATH"))))
    run_recipe(main, "compare")
