"""SPAR beside its rivals, all in one harness: data sets x methods x seeds, each combination one run in one process.

python recipes/compare.py                                              # everything on the embedded data, one run a core
python recipes/compare.py dataset=minari:spar/hopper/medium-v0 method=spar,iql,rebrac seed=0,1,2,3,4
python recipes/compare.py method=spar,iql,rebrac select=ope            # report.py says whom the log alone would choose
python recipes/compare.py hydra/launcher=ray                           # or submitit_slurm: pip install '.[sweep]'
python recipes/report.py outputs/compare

It first estimates the hours left, from finished runs. The same command resumes after a kill: finished runs are not
repeated, others resume from their checkpoints.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# For the processes of the sweep, which inherit it: their bars would overwrite each other.
os.environ.setdefault("TQDM_DISABLE", "1")

import ablations
import spar_d4rl
import torch
from harness import spar_options
from harness.checkpoints import Checkpoints
from harness.directory import run_directory, started
from harness.environment import dataset_name
from harness.launch import RECIPES, run_recipe
from harness.method_options import method_options
from harness.options import option, recipe_options, unknown_option
from harness.run import MainPhase, block_length, closing_all, of_one_run
from harness.spar_options import Eval, Spar
from harness.spar_run import SPARRun
from harness.stopping import stop, stop_with_parent
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from reporting.remaining import Timed
from rivals import BUILDERS
from rivals.base import Problem

from torchrl_spar import InputError, check_finite
from torchrl_spar.training.compiling import check_compiler

# Options that may be swept: each combination has a directory of its own.
SWEEPS = ("dataset", "method", "seed", "runs")
SPAR_RUNS: dict[str, type[SPARRun]] = {"spar": SPARRun, **ablations.RUNS}


@recipe_options("compare", stored_as="compare_options")
@dataclass
class Options(spar_options.Options):
    """All methods share SPAR's options but those of its loss, of which they read `hidden` and `gamma`."""

    method: dict[str, Any] = option({}, "A method's own options; the methods are the files of config/method/.")
    runs: str = option(
        "outputs/compare",
        "Directory of all runs, <runs>/<data set>/<method>/seed<seed>. A finished run in it is not repeated.",
    )
    out: str | None = option(None, "Set by the recipe.")
    resume: bool = option(True, "The same command resumes.")
    # One member: the rivals have one policy, too.
    spar: Spar = option(Spar(members=1), "The main phase.")
    # Not in the background: the runs take all cores, and joblib's processes cannot start another.
    eval: Eval = option(Eval(background=False), "Evaluations.")
    defaults: list[Any] = field(default_factory=list)  # those of config/compare.yaml


def main(cfg: DictConfig) -> None:
    prepare(cfg)
    start(cfg, cfg.seed, directory_of(cfg))


def prepare(cfg: DictConfig) -> None:
    """What a process of a sweep needs."""
    if HydraConfig.initialized():  # a worker of Ray or Slurm may start elsewhere
        os.chdir(HydraConfig.get().runtime.cwd)
    check(cfg)
    if multiprocessing.get_start_method(allow_none=True) == "loky":
        if cfg.eval.background:
            raise InputError("eval.background=true: joblib's processes cannot start another; evaluate in line")
        stop_with_parent()


def check(cfg: DictConfig) -> None:
    """Refuses what no run of a sweep can have."""
    if cfg.seeds is not None:
        raise InputError(f"seeds={cfg.seeds}: an option of spar_d4rl.py; here it is seed=0,1,2")
    if cfg.out is not None:
        raise InputError(f"out={cfg.out}: an option of spar_d4rl.py; here it is runs=..., a directory for all runs")
    if cfg.method.algorithm in SPAR_RUNS and (unknown := method_options(cfg.method, "")):
        raise InputError(f"method.{next(iter(unknown))}: {cfg.method.name} has no options of its own, but spar.*")
    if cfg.method.name == "spar" and cfg.spar.loss.head != "residual":
        raise InputError(f"spar.loss.head={cfg.spar.loss.head}: that is method=spar_latent, a row of its own")


def directory_of(cfg: DictConfig) -> Path:
    return run_directory(Path(cfg.runs), dataset_name(cfg), cfg.method.name, cfg.seed)


def start(cfg: DictConfig, seed: int, out: Path) -> None:
    """One run of any method."""
    if run_class := SPAR_RUNS.get(cfg.method.algorithm):
        timed = type(run_class.__name__, (Timed, run_class), {})
        spar_d4rl.train(cfg, [seed], [out], run_class=timed, wait=True)
    else:
        train(cfg, seed, out)


class RivalRun(Timed):
    """A rival of one seed; its files are SPAR's but for the figure."""

    def __init__(self, cfg: DictConfig, checkpoints: Checkpoints) -> None:
        super().__init__(cfg, checkpoints)
        torch.manual_seed(self.seed)
        build, self.options = BUILDERS[cfg.method.algorithm], method_options(cfg.method, dataset_name(cfg))
        if cfg.spar.compile:
            check_compiler(self.device)
        self.problem = Problem(self.data, self.cfg, self.device)
        try:
            self.rival = build(self.problem, **self.options)
        except TypeError as err:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(err))
            if unknown is None or unknown[1] not in self.options:
                raise
            known = [f"method.{name}" for name in self.options.keys() - {unknown[1]}]
            raise InputError(unknown_option(f"method.{unknown[1]}", known)) from None
        self.policy = self.rival.policy
        self.open(self.rival.columns)

    @property
    def network(self) -> dict[str, Any]:
        return vars(self.deployed)["network"]


def train(cfg: DictConfig, seed: int, out: Path, run_class: type[RivalRun] = RivalRun) -> None:
    """Trains a rival."""
    torch.set_num_threads(cfg.threads)
    cfg = of_one_run(cfg, seed, out)
    runs: list[RivalRun] = []
    with started([cfg], wait=True) as checkpoints, closing_all(runs):
        if checkpoints is None:
            return
        with stop.at_once(False):
            run = run_class(cfg, checkpoints)
            runs.append(run)
            rival = run.rival
            rival.pretrain(run)
            run.keep("rival", rival)
            phase, batches = MainPhase([run], run.method), rival.batches(seed)
            for step in phase.steps():
                metrics: dict[str, torch.Tensor] = {}
                for _ in range(block_length(cfg)):
                    metrics |= rival(next(batches))
                check_finite(step, {name: metrics[name] for name in metrics.keys() & rival.trained}, rival.trained)
                phase.after(step, metrics)
            run.finish(updates_per_second=phase.updates_per_second)


if __name__ == "__main__":
    # Slurm's processes start with Python's own path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(RECIPES), os.environ.get("PYTHONPATH"))))
    run_recipe(main, "compare", sweeps=SWEEPS)
