"""SPAR on an offline data set, from the raw data to a table: clone the anchor, fit the residuals, improve.

python recipes/spar_d4rl.py                                    # the embedded Hopper data
python recipes/spar_d4rl.py seeds=[0,1,2]                      # several seeds at once
python recipes/spar_d4rl.py dataset=minari:D4RL/pen/human-v2 preset=d4rl seed=1
python recipes/spar_d4rl.py out=mine resume=true               # resumes after a kill, a full disk, a Ctrl-C
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import RLock
from pathlib import Path
from typing import Any

import torch
from harness import spar_options  # noqa: F401 - registers the options
from harness.directory import started
from harness.launch import best_device, run_recipe
from harness.run import MainPhase, closing_all, of_one_run
from harness.spar_run import SPARRun, Updates
from harness.stopping import stop
from omegaconf import DictConfig
from tqdm import tqdm

from torchrl_spar.evaluation.background import end_with_parent, without_ctrl_c


def main(cfg: DictConfig) -> None:
    if cfg.seeds is None:
        train(cfg, [cfg.seed], [Path(cfg.out)])
        return
    seeds = list(cfg.seeds)
    outs = [Path(cfg.out) / f"seed_{seed}" for seed in seeds]
    if best_device(cfg.device).type == "cuda":
        train(cfg, seeds, outs)  # as one stack: a single small run leaves a GPU idle
        return
    # A single run fills a CPU core, so a stack would gain nothing (recipes/benchmark.py measures both).
    context = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    begin: Any = {"initializer": begin_process, "initargs": (context.RLock(),)}
    with stop.handled(forward=True), ProcessPoolExecutor(min(len(seeds), cores), context, **begin) as pool:
        with without_ctrl_c():
            jobs = [pool.submit(train, cfg, [seed], [out], line) for line, (seed, out) in enumerate(zip(seeds, outs))]
        for job in jobs:
            job.result()


def begin_process(lock: RLock) -> None:
    """Prepares a process of the pool: progress bars share the terminal, and the process ends with its parent."""
    tqdm.set_lock(lock)
    threading.Thread(target=end_with_parent, daemon=True).start()


def train(
    cfg: DictConfig,
    seeds: Sequence[int],
    outs: Sequence[Path],
    line: int = 0,
    run_class: type[SPARRun] = SPARRun,
    wait: bool = False,
) -> None:
    """Trains all seeds; `wait` blocks until another process releases their directories."""
    torch.set_num_threads(cfg.threads)
    cfgs = [of_one_run(cfg, seed, out) for seed, out in zip(seeds, outs)]
    runs: list[SPARRun] = []
    with started(cfgs, wait=wait) as checkpoints, closing_all(runs):
        if checkpoints is None:
            return
        with stop.at_once(False):
            for cfg in cfgs:
                runs.append(run_class(cfg, checkpoints, line))
                runs[-1].pretrain()
            updates, phase = Updates(runs), MainPhase(runs, "spar")
            for step in phase.steps():
                phase.after(step, updates.run())
            for run in runs:
                run.finish(updates_per_second=phase.updates_per_second)


if __name__ == "__main__":
    run_recipe(main, "spar_d4rl")
