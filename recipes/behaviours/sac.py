"""SAC, trained until its episodes reach a chosen level; it acts stochastically."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
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

from behaviours import Behaviour
from torchrl_spar import InputError, normalized_score


def make(cfg: DictConfig, device: torch.device) -> Behaviour:
    """Trains the policy; `cfg` are the options of recipes/make_dataset.py."""
    actor, steps = train_behaviour(cfg, device)

    @torch.no_grad()
    def act(observation: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(observation).to(device)
        with set_exploration_type(ExplorationType.RANDOM):
            return actor(TensorDict({"observation": state}))["action"].cpu().numpy()

    options: Any = OmegaConf.to_container(cfg.train)
    return Behaviour(act, "SAC", "TorchRL SACLoss, stochastic", options, steps)


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
