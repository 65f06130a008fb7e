"""Evaluates a saved policy from raw observations.

python recipes/evaluate.py policy=outputs/.../policy.pt episodes=20
python recipes/evaluate.py policy=policy.pt env=Hopper-v5 episodes=1 video=hopper.gif
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from common import best_device, run_recipe, summarize
from omegaconf import DictConfig

from torchrl_spar import InputError, SPARActor, environment_sizes, evaluate, load_policy


def film(policy: SPARActor, env: str, seed: int, path: Path) -> None:
    """One episode as a video; the file appears whole or not at all."""
    frames: list[np.ndarray] = []

    def keep(envs: list[Any]) -> None:
        frames.append(envs[0].render())

    try:
        evaluate(policy, env, 1, seed, on_step=keep, render_mode="rgb_array")
        partial = path.with_name(f"partial-{path.name}")
        imageio.imwrite(partial, np.stack(frames), loop=0) if path.suffix == ".gif" else imageio.imwrite(
            partial, np.stack(frames), fps=30
        )
        partial.replace(path)
    except Exception as err:  # rendering fails in as many ways as there are drivers
        raise InputError(f"video={path}: cannot be rendered here: {err} (on a server, try MUJOCO_GL=egl)") from err


def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    policy, facts = load_policy(cfg.policy, device=best_device(cfg.device))
    env = cfg.env or facts.get("env")
    if env is None:
        raise InputError(f"env: {cfg.policy} does not name its environment; give one, e.g. env=Hopper-v5")
    if cfg.video and Path(cfg.video).exists():
        raise InputError(f"video={cfg.video}: exists already")
    environment_sizes(env)
    returns = evaluate(policy, env, cfg.episodes, cfg.seed)
    row = summarize(env, returns)
    score = "" if row["normalized"] is None else f", normalised score {row['normalized']:.1f}"
    print(f"{env}: return {row['return_mean']:.1f} +- {row['return_std']:.1f} over {cfg.episodes} episodes{score}")
    if cfg.video:
        film(policy, env, cfg.seed, Path(cfg.video))
        print(f"filmed into {cfg.video}")


if __name__ == "__main__":
    run_recipe(main, "evaluate")
