"""Where the CPU seconds of a default run of the main job go."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from harness.environment import load
from harness.spar_options import Options
from harness.spar_run import make_update
from omegaconf import OmegaConf

from torchrl_spar import (
    BatchSampler,
    fit_anchor,
    fit_critics,
    fit_vae,
    make_anchor,
    make_spar_loss,
    with_anchor_actions,
    with_value_targets,
)  # fmt: skip

# Batches in a block of the main job.
BLOCK = 100


def measure_stages(steps: int, steps_per_second: float, *, compile: bool = False) -> dict[str, float]:
    """CPU seconds of each stage at the main job's defaults: the first `steps` steps of each, times all of them.

    What torch.compile takes to start is left out.

    Args:
        steps: that are measured of each phase, after as many that are not.
        steps_per_second: of an evaluation; its episodes are taken to be as long as the data's.
        compile: whether fits and updates go through torch.compile.
    """
    cfg: Any = OmegaConf.structured(Options())
    cfg.spar.compile = compile
    seconds = {}

    def measure(name: str, work: Callable[[], Any], times: float = 1) -> Any:
        start = time.process_time()
        result = work()
        seconds[name] = times * (time.process_time() - start)
        return result

    def measure_fit(name: str, fit: Callable[..., Any], *args: Any) -> None:
        starts = [0.0]

        def report(step: int, metrics: Any) -> None:
            if step == steps:
                starts.append(time.process_time())

        fit(*args, steps=2 * steps, compile=compile, report=report)
        seconds[name] = cfg[name].steps / steps * (time.process_time() - starts[-1])

    data, _, _ = measure("loading", lambda: load(cfg, torch.device("cpu")))
    anchor = make_anchor(data, hidden=cfg.spar.loss.hidden)
    measure_fit("anchor", fit_anchor, anchor, data)
    loss = make_spar_loss(data, anchor=anchor, **cfg.spar.loss)
    rows = measure("anchor's actions", lambda: with_anchor_actions(loss, data))
    measure_fit("vae", fit_vae, loss, rows)
    measure_fit("critics", fit_critics, loss, rows)
    members = cfg.spar.members  # each with critics, targets and updates of its own
    seconds["critics"] *= members
    renewals = members * cfg.spar.updates / cfg.spar.target_interval
    measure("targets", lambda: with_value_targets(loss, rows), renewals)
    update, sampler = make_update(cfg, loss), BatchSampler(loss, rows, length=BLOCK, seed=0, target_interval=None)
    blocks = -(-steps // BLOCK)
    settled = round(cfg.spar.critic_share * cfg.spar.updates)
    for name, first, last in (("updates", 0, settled), ("updates of the head alone", settled, cfg.spar.updates)):
        for measured in ("start", name):
            update.steps = first
            times = members * (last - first) / (blocks * BLOCK)
            measure(measured, lambda: [update.run(next(sampler)) for _ in range(blocks)], times)
    del seconds["start"]
    episodes = (cfg.spar.updates // cfg.eval.interval + 1) * cfg.eval.episodes + 2 * cfg.eval.final_episodes
    seconds["evaluation"] = episodes * len(data) / len(data.episode_returns) / steps_per_second
    return seconds
