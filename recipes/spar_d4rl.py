"""SPAR on an offline data set, from the raw data to a table: clone the anchor, fit the residuals, improve.

python recipes/spar_d4rl.py                                    # the embedded Hopper data
python recipes/spar_d4rl.py seeds=[0,1,2]                      # several seeds at once
python recipes/spar_d4rl.py dataset=minari:D4RL/pen/human-v2 preset=d4rl seed=1
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from common import best_device, run_recipe
from omegaconf import DictConfig
from run import Phase, Run
from run_output import check_unused
from tqdm import tqdm

from torchrl_spar import BatchSampler, InputError, SPARUpdate, StackedSPARLoss

# Updates that one call of SPARUpdate.run takes at most.
LONGEST_BLOCK = 100


def main(cfg: DictConfig) -> None:
    for option, value in {
        "spar.updates": cfg.spar.updates,
        "spar.policy_interval": cfg.spar.policy_interval,
        "eval.interval": cfg.eval.interval,
        "logger.interval": cfg.logger.interval,
    }.items():
        if value < 1:
            raise InputError(f"{option}={value}: at least 1")
    if cfg.seeds is None:
        train(cfg, [cfg.seed], [Path(cfg.out)])
        return
    seeds = list(cfg.seeds)
    if len(set(seeds)) != len(seeds) or not seeds:
        raise InputError(f"seeds={seeds}: give at least one seed, and each once")
    outs = [Path(cfg.out) / f"seed_{seed}" for seed in seeds]
    if best_device(cfg.device).type == "cuda":
        train(cfg, seeds, outs)  # as one stack: a single small run leaves a GPU idle
        return
    # A single run fills a CPU core, so a stack would gain nothing (recipes/benchmark.py measures both).
    context = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    bars = {"initializer": tqdm.set_lock, "initargs": (context.RLock(),)}
    with ProcessPoolExecutor(min(len(seeds), cores), context, **bars) as pool:
        jobs = [pool.submit(train, cfg, [seed], [out], line) for line, (seed, out) in enumerate(zip(seeds, outs))]
        for job in jobs:
            job.result()


def train(cfg: DictConfig, seeds: Sequence[int], outs: Sequence[Path], line: int = 0) -> None:
    """Independent runs of all seeds, the main phase as one program."""
    start = time.perf_counter()
    torch.set_num_threads(cfg.threads)
    for out in outs:
        check_unused(out)
    runs: list[Run] = []
    try:
        for seed, out in zip(seeds, outs):
            runs.append(Run(cfg, seed, out, line))
            runs[-1].pretrain()
        rate = improve(cfg, runs, line)
        for run in runs:
            run.finish(updates_per_second=rate, start=start)
    finally:
        for run in runs:
            run.close()


def improve(cfg: DictConfig, runs: Sequence[Run], line: int) -> float:
    """The main phase; returns the updates per second of each run."""
    interval, total = cfg.eval.interval, cfg.spar.updates
    # Blocks end wherever something is due.
    common = math.gcd(interval, cfg.logger.interval, total)
    length = max(n for n in range(1, min(common, LONGEST_BLOCK) + 1) if common % n == 0)
    samplers = [BatchSampler(run.loss, run.data, length=length, seed=run.seed) for run in runs]
    losses = [run.loss for run in runs]
    stack = StackedSPARLoss(losses) if len(runs) > 1 else None
    options = {key: cfg.spar[key] for key in ("qvalue_lr", "actor_lr", "target_rate", "policy_interval", "compile")}
    is_cuda = losses[0].residual_scale.is_cuda
    decay = total if cfg.spar.decay else None
    update = SPARUpdate(losses[0] if stack is None else stack, decay_steps=decay, cudagraph=is_cuda, **options)
    phase = Phase("spar", total, [run.log for run in runs], cfg.logger.interval, line)
    start = time.perf_counter()
    for run in runs:
        run.evaluate(0)
    for step in range(length, total + 1, length):
        blocks = [next(sampler) for sampler in samplers]
        metrics = update.run(blocks[0] if stack is None else torch.stack(blocks, 1))
        if step % interval == 0 or step == total:
            if stack is not None:
                stack.copy_back()
            for run in runs:
                run.evaluate(step)
        phase(step, metrics)
        if step % cfg.logger.interval == 0:
            for run in runs:
                run.scores.collect()
            phase.show(runs[0].scores.curve)
    return total / (time.perf_counter() - start)


if __name__ == "__main__":
    run_recipe(main, "spar_d4rl")
