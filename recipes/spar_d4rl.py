"""SPAR on an offline data set, from the raw data to a table: clone the anchor, fit the residuals, improve.

python recipes/spar_d4rl.py                                    # the embedded Hopper data
python recipes/spar_d4rl.py seeds=[0,1,2]                      # several seeds at once
python recipes/spar_d4rl.py dataset=minari:D4RL/pen/human-v2 preset=d4rl seed=1
python recipes/spar_d4rl.py out=mine resume=true               # goes on after a kill, a full disk, a Ctrl-C
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
from harness.recipe import best_device, run_recipe
from harness.run import block_length, improve, of_one_run
from harness.run_directory import started
from harness.spar_run import SPARRun, make_update
from harness.stopping import stop
from omegaconf import DictConfig
from tqdm import tqdm

from torchrl_spar import BatchSampler, StackedSPARLoss
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
    """In a process of the pool: bars that share a terminal, and no life after a parent that was killed."""
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
    """Independent runs of all seeds, the main phase as one program; with `wait` after whoever is at them."""
    torch.set_num_threads(cfg.threads)
    cfgs = [of_one_run(cfg, seed, out) for seed, out in zip(seeds, outs)]
    runs: list[SPARRun] = []
    with started(cfgs, wait=wait) as checkpoints:
        if checkpoints is None:
            return
        try:
            with stop.at_once(False):
                for cfg in cfgs:
                    runs.append(run_class(cfg, checkpoints, line))
                    runs[-1].pretrain()
                rate = update_together(runs)
                for run in runs:
                    run.finish(updates_per_second=rate)
        finally:
            for run in runs:
                run.close()


def update_together(runs: Sequence[SPARRun]) -> float:
    """The main phase; returns the updates per second of each run."""
    cfg, losses = runs[0].cfg, [run.loss for run in runs]
    samplers = [
        run.keep("sampler", BatchSampler(run.loss, run.anchored_data, length=block_length(cfg), seed=run.seed))
        for run in runs
    ]
    stack = StackedSPARLoss(losses) if len(runs) > 1 else None
    update = make_update(cfg, losses[0] if stack is None else stack, cudagraph=runs[0].device.type == "cuda")
    runs[0].checkpoints.add("update", update)

    def make_block() -> dict[str, torch.Tensor]:
        blocks = [next(sampler) for sampler in samplers]
        return update.run(blocks[0] if stack is None else torch.stack(blocks, 1))

    return improve(runs, "spar", make_block) if stack is None else improve(runs, "spar", make_block, stack.copy_back)


if __name__ == "__main__":
    run_recipe(main, "spar_d4rl")
