"""The online phase of any method: collect, mix with the data, update, send the weights back, evaluate."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from harness.launch import summarize
from harness.run import Run, on_cpu
from harness.scores import CURVE_SEED
from harness.stopping import stop
from omegaconf import DictConfig
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.trainers.algorithms.offline_to_online import OfflineToOnlineReplayBufferHook

from online.collecting import check_collector, make_collector, with_noise
from online.replay import anneal, make_replay_buffer
from torchrl_spar import InputError, evaluate

Update = Callable[[TensorDictBase], dict[str, Tensor]]


def check(cfg: DictConfig) -> None:
    """Refuses wrong options before the offline phase is spent on them."""
    online, share, frames = cfg.online, cfg.online.offline_share, cfg.collector.frames_per_batch
    check_collector(cfg.collector)
    if not 0 <= share.end <= share.start < 1 or share.start == 0:
        raise InputError(
            f"online.offline_share: start={share.start}, end={share.end}: must be 0 <= end <= start, 0 < start < 1"
        )
    for name in ("steps", "eval_interval"):
        if not online[name] or online[name] % frames:
            raise InputError(f"online.{name}={online[name]}: must be a multiple of collector.frames_per_batch={frames}")
    if not math.isclose(rate := frames * online.updates_per_step, round(rate)):
        raise InputError(
            f"online.updates_per_step={online.updates_per_step}: times collector.frames_per_batch={frames} it must be "
            "a whole number, the updates of a round"
        )
    if online.first_update >= online.steps:
        raise InputError(f"online.first_update={online.first_update}: must be below online.steps={online.steps}")
    if cfg.spar.members > 1:
        raise InputError(f"spar.members={cfg.spar.members}: one policy goes on online; give 1")
    if cfg.select:
        raise InputError("select=ope: chooses among offline policies; here the online one is saved")
    if cfg.keep_policies > 1:
        raise InputError(f"keep_policies={cfg.keep_policies}: keeps offline policies; here the online one is saved")
    if cfg.end_at_success:
        raise InputError("end_at_success=true: the environment does not relabel its rewards and ends; offline only")


def count_updates(cfg: DictConfig) -> int:
    """Number of updates in `go_online`: none before `first_update`, then one round for each batch of the collector."""
    frames = cfg.collector.frames_per_batch
    rounds = max(0, cfg.online.steps // frames - cfg.online.first_update // frames)
    return rounds * updates_per_round(cfg)


def updates_per_round(cfg: DictConfig) -> int:
    return round(cfg.collector.frames_per_batch * cfg.online.updates_per_step)


def go_online(run: Run, policy: TensorDictModuleBase, update: Update) -> dict[str, Any]:
    """Trains online; returns the curve (a row for each evaluation, at step 0 the offline policy's) and its episodes.

    Args:
        run: a finished offline run, for its data, environment, options and log.
        policy: what is deployed, observation -> action; follows `update`.
        update: makes one update on a batch.
    """
    env = run.env
    assert env is not None
    cfg, online, share = run.cfg, run.cfg.online, run.cfg.online.offline_share
    # TorchRL reports the replay buffer's size.
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    torch.manual_seed(run.seed)
    buffer = make_replay_buffer(
        run.data, start=share.start, capacity=online.steps, batch_size=cfg.batch_size, device=run.device
    )
    keep = OfflineToOnlineReplayBufferHook(buffer)  # knows the data's keys
    explorer = with_noise(policy, run.data.action_spec, online.exploration_noise)
    curve: list[dict[str, Any]] = []

    def add_to_curve(step: int) -> None:
        # Every point from the same states, other than those of the offline results.
        returns = evaluate(on_cpu(policy), env, online.eval_episodes, CURVE_SEED + 100_000 * run.seed, **run.env_kwargs)
        curve.append({"step": step, **summarize(env, returns, run.env_kwargs)})
        mean, spread = curve[-1]["return_mean"], curve[-1]["return_std"]
        print(f"{run.method}, seed {run.seed}, {step} environment steps: return {mean:.1f} +- {spread:.1f}", flush=True)

    add_to_curve(0)
    collector = make_collector(
        cfg.collector, explorer, env, run.env_kwargs,
        total_frames=online.steps, seed=run.seed, device=run.device,
    )  # fmt: skip
    weights = TensorDict.from_module(explorer).data
    step = 0
    try:
        collector.update_policy_weights_(weights)
        for batch in collector:
            stop.check()
            step += batch.numel()
            keep.extend(batch)
            anneal(buffer, step, online.steps, start=share.start, end=share.end)
            if step > online.first_update:
                metrics: dict[str, Tensor] = {}
                for _ in range(updates_per_round(cfg)):
                    metrics |= update(buffer.sample())
                collector.update_policy_weights_(weights)
                run.log.write("online", step, metrics)
            if step % online.eval_interval == 0 or step == online.steps:
                add_to_curve(step)
    finally:
        collector.shutdown()
    return {"curve": curve, "episodes": online.eval_episodes}
