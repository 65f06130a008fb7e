"""Makes a Minari data set: SAC trained to a chosen level, in PointMaze a controller; then records the policy.

python recipes/make_dataset.py                               # the embedded Hopper set
python recipes/make_dataset.py env=HalfCheetah-v5 dataset=mine/halfcheetah/medium-v0 level=40 root=data
python recipes/make_dataset.py env=PointMaze_UMaze-v3 dataset=mine/pointmaze/umaze-v0 steps=50_000 root=data
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import torch
from behaviours import Behaviour, sac, waypoints
from harness.launch import ARGUMENTS, RECIPES, best_device, run_recipe
from harness.options import option, recipe_options
from harness.output import named_error
from minari.dataset.minari_dataset import parse_dataset_id
from omegaconf import DictConfig
from tqdm import tqdm

from torchrl_spar import InputError, make_env, normalized_score, reference_returns


def on_leaves(function: Callable[..., Any], *observations: Any) -> Any:
    """Applies a function to arrays, or to each array of dictionaries."""
    if isinstance(observations[0], dict):
        return {key: on_leaves(function, *(item[key] for item in observations)) for key in observations[0]}
    return function(*observations)


def float32(observation: Any) -> Any:
    return on_leaves(lambda array: array.astype(np.float32), observation)


def record(cfg: DictConfig, act: Callable[[Any], np.ndarray]) -> list:
    """Whole episodes of the policy, at least `steps` steps, observations as float32."""
    from minari.data_collector import EpisodeBuffer

    env = make_env(cfg.env)
    episodes: list[EpisodeBuffer] = []
    total = 0
    with tqdm(total=cfg.steps, desc="recording", unit="step") as bar:
        while total < cfg.steps:
            seed = cfg.seed + 10_000 + len(episodes)
            observation, info = env.reset(seed=seed)
            observations, infos = [float32(observation)], [info]
            actions, rewards, terminations, truncations = [], [], [], []
            done = False
            while not done:
                action = act(observations[-1])
                observation, reward, terminated, truncated, info = env.step(action)
                observations.append(float32(observation))
                infos.append(info)
                actions.append(action)
                rewards.append(np.float32(reward))
                terminations.append(terminated)
                truncations.append(truncated)
                done = terminated or truncated
            episodes.append(
                EpisodeBuffer(
                    id=len(episodes), seed=seed, observations=on_leaves(lambda *rows: np.stack(rows), *observations),
                    actions=np.stack(actions), rewards=np.stack(rewards), terminations=np.array(terminations),
                    truncations=np.array(truncations), infos=successes(infos),
                )
            )  # fmt: skip
            total += len(rewards)
            bar.update(len(rewards))
    env.close()
    return episodes


def successes(infos: Sequence[dict[str, Any]]) -> dict[str, np.ndarray] | None:
    """The record of successes that the loader's `end_at_success` reads, if the environment reports them."""
    return {"success": np.array([info["success"] for info in infos])} if "success" in infos[0] else None


def write(cfg: DictConfig, episodes: list, behaviour: Behaviour) -> Path:
    """The Minari set, its arrays compressed (Minari itself writes them plain)."""
    import minari

    env = make_env(cfg.env)
    returns = np.array([episode.rewards.sum(dtype=np.float64) for episode in episodes])
    try:
        low, high = reference_returns(cfg.env)
        score = {"normalized": float(normalized_score(cfg.env, float(returns.mean())))}
    except InputError:
        low, high, score = None, None, {}
    facts = {
        "policy": behaviour.policy,
        "training_steps": behaviour.training_steps,
        "seed": cfg.seed,
        "command": " ".join(["python", "recipes/make_dataset.py", *ARGUMENTS]),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        **score,
        "versions": {name: version(name) for name in ("torch", "torchrl", "gymnasium", "mujoco", "minari")},
        "options": behaviour.options,
    }
    with warnings.catch_warnings():
        # Minari asks for fields that need a published repository.
        warnings.filterwarnings("ignore", module="minari")
        dataset = minari.create_dataset_from_buffers(
            cfg.dataset,
            episodes,
            env=env,
            observation_space=float32_space(env.observation_space),
            algorithm_name=behaviour.algorithm,
            author="torchrl_spar",
            description=json.dumps(facts),
            ref_min_score=low,
            ref_max_score=high,
            requirements=requirements(env),
            data_format="hdf5",
        )
    env.close()
    path = Path(dataset.storage.data_path) / "main_data.hdf5"
    compress(path)
    return path


def float32_space(space: Any) -> Any:
    from gymnasium.spaces import Box, Dict

    if isinstance(space, Dict):
        return Dict({key: float32_space(part) for key, part in space.items()})
    return Box(-np.inf, np.inf, space.shape, np.float32)


def requirements(env: Any) -> list[str]:
    robotics = ["gymnasium-robotics"] if str(env.spec.entry_point).startswith("gymnasium_robotics") else []
    return ["gymnasium[mujoco]", *robotics]


def compress(path: Path) -> None:
    """Rewrites an HDF5 file with shuffled gzip chunks, one chunk an array."""
    packed = path.with_suffix(".packed")
    with h5py.File(path, "r") as source, h5py.File(packed, "w", libver="latest") as target:

        def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Dataset):
                new = target.create_dataset(
                    name, data=item[()], chunks=item.shape, maxshape=item.maxshape, compression="gzip",
                    compression_opts=9, shuffle=True,
                )  # fmt: skip
            else:
                new = target.require_group(name)
            new.attrs.update(item.attrs)

        source.visititems(copy)
        target.attrs.update(source.attrs)
    os.replace(packed, path)


def check_learnable(cfg: DictConfig) -> None:
    """Refuses at once what SAC cannot learn from here."""
    with closing(make_env(cfg.env)) as env:
        if len(env.observation_space.shape or ()) != 1 or not isinstance(env.action_space, gymnasium.spaces.Box):
            raise InputError(f"env={cfg.env}: SAC learns here from plain vectors, with continuous actions")
    try:
        reference_returns(cfg.env)
    except InputError:
        raise InputError(f"env={cfg.env}: D4RL has no score for it, by which SAC would know its level") from None
    frames, rate = cfg.train.frames_per_batch, cfg.train.updates_per_step
    if not math.isclose(frames * rate, round(frames * rate)):
        raise InputError(f"train.updates_per_step={rate}: times train.frames_per_batch={frames} it must be whole")


@dataclass
class Train:
    """SAC. Its paper (https://arxiv.org/abs/1812.05905) gives batch size, discount and target rate; smaller networks
    and the higher learning rate are ours, for speed on a CPU.
    """

    max_steps: int = option(400_000, "Give up after so many environment steps.", least=1)
    frames_per_batch: int = option(200, "Environment steps between two rounds of updates.", least=1)
    init_random_frames: int = option(5_000, "Uniformly random actions at the start.", least=0)
    updates_per_step: float = option(1.0, "Gradient updates for each environment step.", least=0)
    batch_size: int = option(256, "Transitions in a batch.", least=1)
    hidden: list[int] = option([128, 128], "Widths of the hidden layers.", least=1)
    lr: float = option(1e-3, "Learning rate.", least=0)
    gamma: float = option(0.99, "Discount.", least=0, most=1)
    target_rate: float = option(0.005, "Polyak rate of the target critics.", least=0, most=1)


@dataclass
class Waypoints:
    """The controller of PointMaze. D4RL's has gains of 10 and 1 and noise of 0.5; ours is slower, so that something is
    left to improve.
    """

    position_gain: float = option(2.0, "Force for each metre to the next waypoint.")
    velocity_gain: float = option(1.0, "Force against each metre a second.")
    noise: float = option(0.5, "Standard deviation of the noise on the force, which is clipped to -1 to 1.", least=0)


@recipe_options("make_dataset")
@dataclass
class Options:
    env: str = option(
        "Hopper-v5",
        "Gymnasium environment to learn and record. In PointMaze a controller (waypoints) is recorded, elsewhere SAC "
        "(train, level).",
    )
    dataset: str = option("torchrl-spar/hopper/medium-v0", "Minari id of the data set that is written.")
    root: str = option(str(RECIPES / "data"), "Minari root that it is written under; a set there is never overwritten.")
    steps: int = option(92_000, "Steps to record; the last episode is finished, so a few more are written.", least=1)
    level: float = option(
        25.0, "D4RL-normalised score at which the behaviour policy stops learning (its own stochastic episodes)."
    )
    level_episodes: int = option(20, "Number of latest episodes the score is averaged over.", least=1)
    seed: int = option(0, "Seed of the networks, the environment and the recording.", least=0)
    device: str | None = option(None, "Device of policy and learner; null: cuda if there is one, else cpu.")
    threads: int = option(1, "Torch threads (one is fastest for small networks).", least=1)
    train: Train = option(Train(), "The behaviour policy.")
    waypoints: Waypoints = option(Waypoints(), "The controller of PointMaze.")


def main(cfg: DictConfig) -> None:
    # TorchRL reports the replay buffer's size in the middle of the progress bar.
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    os.environ["MINARI_DATASETS_PATH"] = str(Path(cfg.root).resolve())
    target = Path(cfg.root) / cfg.dataset
    try:
        parse_dataset_id(cfg.dataset)
    except (ValueError, TypeError):  # the latter without a version
        raise InputError(f"dataset={cfg.dataset}: must be as maker/task/name-v0, Minari's form of an id") from None
    if target.exists():
        raise InputError(f"dataset={cfg.dataset}: {target} exists already; choose another name or remove it")
    with named_error(target.parent, "cannot be made"):
        target.parent.mkdir(parents=True, exist_ok=True)
    in_maze = str(cfg.env).startswith("PointMaze")
    if not in_maze:
        check_learnable(cfg)
    behaviour = waypoints.make(cfg) if in_maze else sac.make(cfg, best_device(cfg.device))
    episodes = record(cfg, behaviour.act)
    path = write(cfg, episodes, behaviour)
    print(f"{path}: {len(episodes)} episodes, {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    run_recipe(main, "make_dataset")
