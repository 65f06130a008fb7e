"""Makes a Minari data set: trains SAC to a chosen level, then records its stochastic policy.

python recipes/make_dataset.py                               # the embedded Hopper set
python recipes/make_dataset.py env=HalfCheetah-v5 dataset=mine/halfcheetah/medium-v0 level=40 root=data
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections import deque
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import torch
from common import ARGUMENTS, best_device, run_recipe
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, DoubleToFloat, GymEnv, RewardSum, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate
from tqdm import tqdm

from torchrl_spar import InputError, make_env, normalized_score, reference_returns


def make_sac(env: TransformedEnv, cfg: DictConfig, device: torch.device) -> SACLoss:
    """SAC with the usual two-layer networks."""
    observation_dim = env.observation_spec["observation"].shape[-1]
    action_spec = env.action_spec_unbatched
    cells = dict(num_cells=list(cfg.hidden), activation_class=nn.ReLU, device=device)
    trunk = nn.Sequential(MLP(observation_dim, 2 * action_spec.shape[-1], **cells), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(trunk, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=action_spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": action_spec.space.low, "high": action_spec.space.high},
    )
    qvalue = ValueOperator(MLP(observation_dim + action_spec.shape[-1], 1, **cells), in_keys=["observation", "action"])
    loss = SACLoss(actor, qvalue, num_qvalue_nets=2, loss_function="l2", action_spec=action_spec)
    loss.make_value_estimator(gamma=cfg.gamma)
    return loss


def train_behaviour(cfg: DictConfig, device: torch.device) -> tuple[TensorDictSequential, int]:
    """Trains until the latest episodes reach the level; returns the actor and the steps it took."""
    env = TransformedEnv(GymEnv(cfg.env, device="cpu"), Compose(DoubleToFloat(), RewardSum()))
    env.set_seed(cfg.seed)
    loss = make_sac(env, cfg.train, device)
    updater = SoftUpdate(loss, tau=cfg.train.target_rate)
    optimizer = torch.optim.Adam(loss.parameters(), lr=cfg.train.lr)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(cfg.train.max_steps, device=device), batch_size=cfg.train.batch_size
    )
    collector = Collector(
        env,
        loss.actor_network,
        frames_per_batch=cfg.train.frames_per_batch,
        total_frames=cfg.train.max_steps,
        init_random_frames=cfg.train.init_random_frames,
        policy_device=device,
        storing_device="cpu",
        auto_register_policy_transforms=False,
    )
    episodes: deque[float] = deque(maxlen=cfg.level_episodes)
    frames = 0
    try:
        with tqdm(total=cfg.train.max_steps, desc="behaviour policy", unit="step") as bar:
            for data in collector:
                frames += data.numel()
                episodes.extend(data["next", "episode_reward"][data["next", "done"]].tolist())
                buffer.extend(data.reshape(-1).exclude("collector"))
                if frames > cfg.train.init_random_frames:
                    for _ in range(round(data.numel() * cfg.train.updates_per_step)):
                        losses = loss(buffer.sample())
                        sum(losses[key] for key in ("loss_actor", "loss_qvalue", "loss_alpha")).backward()
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                        updater.step()
                score = normalized_score(cfg.env, float(np.mean(episodes))) if episodes else float("nan")
                bar.update(data.numel())
                bar.set_postfix(score=f"{score:.1f}")
                if len(episodes) == cfg.level_episodes and score >= cfg.level:
                    return loss.actor_network, frames
    finally:
        collector.shutdown()
    raise InputError(
        f"level={cfg.level}: not reached in train.max_steps={cfg.train.max_steps} (last score {score:.1f}); "
        "lower the level or raise train.max_steps"
    )


@torch.no_grad()
def record(cfg: DictConfig, actor: TensorDictSequential, device: torch.device) -> list:
    """Whole episodes of the stochastic policy, at least `steps` steps, observations as float32."""
    from minari.data_collector import EpisodeBuffer

    env = make_env(cfg.env)
    episodes: list[EpisodeBuffer] = []
    total = 0
    with tqdm(total=cfg.steps, desc="recording", unit="step") as bar, set_exploration_type(ExplorationType.RANDOM):
        while total < cfg.steps:
            seed = cfg.seed + 10_000 + len(episodes)
            observations = [env.reset(seed=seed)[0].astype(np.float32)]
            actions, rewards, terminations, truncations = [], [], [], []
            done = False
            while not done:
                state = torch.from_numpy(observations[-1]).to(device)
                action = actor(TensorDict({"observation": state}))["action"].cpu().numpy()
                observation, reward, terminated, truncated, _ = env.step(action)
                observations.append(observation.astype(np.float32))
                actions.append(action)
                rewards.append(np.float32(reward))
                terminations.append(terminated)
                truncations.append(truncated)
                done = terminated or truncated
            episodes.append(
                EpisodeBuffer(
                    id=len(episodes), seed=seed, observations=np.stack(observations), actions=np.stack(actions),
                    rewards=np.stack(rewards), terminations=np.array(terminations), truncations=np.array(truncations),
                )
            )  # fmt: skip
            total += len(rewards)
            bar.update(len(rewards))
    env.close()
    return episodes


def write(cfg: DictConfig, episodes: list, training_steps: int) -> Path:
    """The Minari set, its arrays compressed (Minari itself writes them plain)."""
    import gymnasium
    import minari

    env = make_env(cfg.env)
    returns = np.array([episode.rewards.sum(dtype=np.float64) for episode in episodes])
    low, high = reference_returns(cfg.env)
    facts = {
        "policy": "TorchRL SACLoss, stochastic",
        "training_steps": training_steps,
        "seed": cfg.seed,
        "command": " ".join(["python", "recipes/make_dataset.py", *ARGUMENTS]),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "normalized": float(normalized_score(cfg.env, float(returns.mean()))),
        "versions": {name: version(name) for name in ("torch", "torchrl", "gymnasium", "mujoco", "minari")},
        "options": OmegaConf.to_container(cfg.train),
    }
    with warnings.catch_warnings():
        # Minari asks for fields that need a published repository.
        warnings.filterwarnings("ignore", module="minari")
        dataset = minari.create_dataset_from_buffers(
            cfg.dataset,
            episodes,
            env=env,
            observation_space=gymnasium.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32),
            algorithm_name="SAC",
            author="torchrl_spar",
            description=json.dumps(facts),
            ref_min_score=low,
            ref_max_score=high,
            requirements=["gymnasium[mujoco]"],
            data_format="hdf5",
        )
    env.close()
    path = Path(dataset.storage.data_path) / "main_data.hdf5"
    compress(path)
    return path


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


def main(cfg: DictConfig) -> None:
    # TorchRL reports the replay buffer's size in the middle of the progress bar.
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    os.environ["MINARI_DATASETS_PATH"] = str(Path(cfg.root).resolve())
    target = Path(cfg.root) / cfg.dataset
    if target.exists():
        raise InputError(f"dataset={cfg.dataset}: {target} exists already; choose another name or remove it")
    Path(cfg.root).mkdir(parents=True, exist_ok=True)
    device = best_device(cfg.device)
    actor, steps = train_behaviour(cfg, device)
    episodes = record(cfg, actor, device)
    path = write(cfg, episodes, steps)
    print(f"{path}: {len(episodes)} episodes, {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    run_recipe(main, "make_dataset")
