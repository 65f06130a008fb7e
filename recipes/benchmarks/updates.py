"""Gradient updates, each as its users write it: SPAR's callable, plain loops, compare.py's IQL and TD3+BC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
from harness.launch import RECIPES
from harness.method_options import method_options
from omegaconf import OmegaConf
from rivals import BUILDERS
from rivals.base import Problem
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, ReplayBuffer
from torchrl.modules import MLP, ProbabilisticActor, TanhModule, TanhNormal, ValueOperator
from torchrl.objectives import IQLLoss, SoftUpdate, TD3BCLoss

from torchrl_spar import (
    BatchSampler,
    OfflineReplayBuffer,
    SPARLoss,
    SPARUpdate,
    StackedSPARLoss,
    load_offline_dataset,
    make_spar_loss,
    with_anchor_actions,
)

# Hopper's sizes, D4RL's most used task.
OBSERVATION_DIM, ACTION_DIM, ROWS = 11, 3, 100_000
# Batches that one call of SPARUpdate.run takes.
BLOCK = 50


def make_data(batch_size: int, device: torch.device) -> OfflineReplayBuffer:
    """Random rows of Hopper's sizes: the time of an update does not depend on their values."""
    end = (torch.arange(ROWS) % 1_000 == 999).unsqueeze(-1)
    data = TensorDict(
        {
            "observation": torch.randn(ROWS, OBSERVATION_DIM),
            "action": torch.rand(ROWS, ACTION_DIM) * 2 - 1,
            "next": {
                "observation": torch.randn(ROWS, OBSERVATION_DIM),
                "reward": torch.randn(ROWS, 1),
                "done": end,
                "terminated": end,
            },
        },
        [ROWS],
    )
    return load_offline_dataset(data, batch_size=batch_size, device=device)


def make_losses(seeds: Sequence[int], hidden: Sequence[int], device: torch.device, **options: Any) -> list[SPARLoss]:
    losses = []
    for seed in seeds:
        torch.manual_seed(seed)
        spec = Bounded(-1, 1, (ACTION_DIM,))
        losses.append(make_spar_loss(OBSERVATION_DIM, spec, hidden=hidden, joint_vae=False, device=device, **options))
    return losses


def spar(
    losses: Sequence[SPARLoss], data: ReplayBuffer, *, block: int = BLOCK, **switches: bool
) -> Callable[[], object]:
    """`block` updates of :class:`SPARUpdate` on one-step targets, as the rivals'; several losses are stacked."""
    samplers = [
        BatchSampler(loss, data, length=block, seed=seed, target_interval=None) for seed, loss in enumerate(losses)
    ]
    if len(losses) == 1:
        update = SPARUpdate(losses[0], **switches)
        return lambda: update.run(next(samplers[0]))
    update = SPARUpdate(StackedSPARLoss(losses), **switches)
    return lambda: update.run(torch.stack([next(sampler) for sampler in samplers], 1))


def spar_plain_loop(loss: SPARLoss, data: ReplayBuffer, *, policy_interval: int = 1) -> Callable[[], None]:
    """A plain loop like the README's, on one-step targets: sum of the losses, Adam, TorchRL's SoftUpdate and sampler.

    With a ``policy_interval`` the head's term is left out in between, which is the work of :class:`SPARUpdate`.
    """
    optimizer = torch.optim.Adam(loss.parameters(), lr=5e-4)
    updater = SoftUpdate(loss, tau=0.005)
    data = with_anchor_actions(loss, data)
    due = cycle([False] * (policy_interval - 1) + [True])

    def update() -> None:
        batch = data.sample()
        if policy_interval == 1:
            losses = loss(batch)
            total = sum(value for key, value in losses.items() if key.startswith("loss_"))
        else:
            total = loss.qvalue_loss(batch)[0]
            if next(due):
                total = total + loss.actor_loss(batch)[0]
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()

    return update


def torchrl_iql(data: ReplayBuffer, hidden: Sequence[int], device: torch.device) -> Callable[[], None]:
    """TorchRL's IQLLoss as in its own offline script: one Adam over all terms, twin critics, SoftUpdate."""
    net = MLP(OBSERVATION_DIM, 2 * ACTION_DIM, num_cells=list(hidden), activation_class=nn.ReLU, device=device)
    actor = ProbabilisticActor(
        TensorDictModule(nn.Sequential(net, NormalParamExtractor()), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
    )
    value = ValueOperator(_mlp(OBSERVATION_DIM, 1, hidden, device), in_keys=["observation"])
    loss = IQLLoss(actor, _qvalue(hidden, device), value_network=value, temperature=3.0, expectile=0.7)
    loss.make_value_estimator(gamma=0.99)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
    updater = SoftUpdate(loss, tau=0.005)

    def update() -> None:
        losses = loss(data.sample())
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        optimizer.step()
        updater.step()

    return update


def torchrl_td3bc(data: ReplayBuffer, hidden: Sequence[int], device: torch.device) -> Callable[[], None]:
    """TorchRL's TD3BCLoss as in its own script: critics every time, actor and targets every other time."""
    spec = Bounded(-1, 1, (ACTION_DIM,), device=device)
    body = TensorDictModule(_mlp(OBSERVATION_DIM, ACTION_DIM, hidden, device), ["observation"], ["action"])
    actor = TensorDictSequential(body, TanhModule(in_keys=["action"], spec=spec))
    loss = TD3BCLoss(actor, _qvalue(hidden, device), action_spec=spec, alpha=2.5, policy_noise=0.2)
    loss.make_value_estimator(gamma=0.99)
    critics = torch.optim.Adam(list(loss.qvalue_network_params.flatten_keys().values()), lr=3e-4)
    actors = torch.optim.Adam(list(loss.actor_network_params.flatten_keys().values()), lr=3e-4)
    updater = SoftUpdate(loss, tau=0.005)
    due = cycle([False, True])

    def update() -> None:
        batch = data.sample()
        critic_loss, _ = loss.qvalue_loss(batch)
        critics.zero_grad()
        critic_loss.backward()
        critics.step()
        if next(due):
            actor_loss, _ = loss.actor_loss(batch)
            actors.zero_grad()
            actor_loss.backward()
            actors.step()
            updater.step()

    return update


def rival(
    name: str, data: OfflineReplayBuffer, hidden: Sequence[int], device: torch.device, *, compile: bool = False
) -> Callable[[], object]:
    """`BLOCK` updates of a method of compare.py, with its published options."""
    spar = {"updates": 10**9, "compile": compile, "loss": {"hidden": list(hidden), "gamma": 0.99}}
    method = OmegaConf.load(RECIPES / "config" / "method" / f"{name}.yaml")
    cfg: Any = OmegaConf.create({"spar": spar, "method": method})
    one = BUILDERS[cfg.method.algorithm](Problem(data, cfg, device), **method_options(cfg.method, ""))
    batches = one.batches(0)
    return lambda: [one(next(batches)) for _ in range(BLOCK)]


def _mlp(in_features: int, out_features: int, hidden: Sequence[int], device: torch.device) -> MLP:
    return MLP(in_features, out_features, num_cells=list(hidden), activation_class=nn.ReLU, device=device)


def _qvalue(hidden: Sequence[int], device: torch.device) -> ValueOperator:
    net = _mlp(OBSERVATION_DIM + ACTION_DIM, 1, hidden, device)
    return ValueOperator(net, in_keys=["observation", "action"])
