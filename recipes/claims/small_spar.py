"""A small SPAR on the embedded data, for the claims on real data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from harness.environment import EMBEDDED
from harness.launch import RECIPES
from harness.options import option
from harness.spar_options import Loss, Phase
from omegaconf import DictConfig
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_spar import (
    OfflineReplayBuffer,
    SPARLoss,
    SPARUpdate,
    fit_anchor,
    load_offline_dataset,
    make_anchor,
    pretrain,
    with_anchor_actions,
    with_member_weights,
    with_value_targets,
)  # fmt: skip
from torchrl_spar.functional import call_ensemble


@dataclass
class SmallSpar:
    updates: int = option(1_500, "Updates of the critics.", least=1)
    qvalue_lr: float = option(5e-4, "Learning rate of the critics.", least=0)
    actor_lr: float = option(1e-3, "Learning rate of the head.", least=0)
    target_rate: float = option(0.01, "Polyak rate of all targets.", least=0, most=1)
    policy_interval: int = option(2, "Updates of the critics for one of the head.", least=1)
    target_interval: int | None = option(
        250, "Updates after which the targets along the data's trajectories are computed anew; null: one-step targets.",
        least=1,
    )  # fmt: skip
    loss: Loss = option(Loss(hidden=[64, 64]), "Options of the loss.")


@dataclass
class SmallOptions:
    """What the claims on real data share: the embedded Hopper data and a small SPAR, minutes on one CPU core."""

    threads: int = option(1, "Torch threads (one is fastest for small networks).", least=1)
    batch_size: int = option(128, "Transitions in a batch, in every phase.", least=1)
    anchor: Phase = option(Phase(1_000), "The behaviour policy.")
    vae: Phase = option(Phase(1_000), "The residuals' VAE.")
    critics: Phase = option(Phase(1_000), "The critics' warm start.")
    spar: SmallSpar = option(SmallSpar(), "The main phase.")


def load_embedded(cfg: DictConfig) -> OfflineReplayBuffer:
    return load_offline_dataset(RECIPES / "data" / EMBEDDED, batch_size=cfg.batch_size)


def clone_behaviour(cfg: DictConfig, data: OfflineReplayBuffer, **changes: Any) -> TensorDictModuleBase:
    """A cloned behaviour policy with the data's observation statistics; `changes` replace options of the phase."""
    return fit_anchor(make_anchor(data, hidden=cfg.spar.loss.hidden), data, **{**cfg.anchor, **changes})


def fit_manifold(
    cfg: DictConfig, data: OfflineReplayBuffer, anchor: TensorDictModuleBase, critics: DictConfig | None = None
) -> SPARLoss:
    """The loss after the residual fit; its critics are untrained without `critics`, the options of their start."""
    return pretrain(data, anchor=anchor, vae=cfg.vae, critics=critics, **cfg.spar.loss)[0]


def take_critics(loss: SPARLoss, other: SPARLoss) -> SPARLoss:
    """Copies the critics of another loss, and the scale of their rewards."""
    loss.qvalue_network_params.data.copy_(other.qvalue_network_params.data)
    loss.reward_scale.copy_(other.reward_scale)
    loss.sync_targets()
    return loss


def make_update(cfg: DictConfig, loss: SPARLoss, **changes: float) -> SPARUpdate:
    """The update with the options of `cfg.spar`; `changes` replace some."""
    names = ("qvalue_lr", "actor_lr", "target_rate", "policy_interval")
    return SPARUpdate(loss, **{**{name: cfg.spar[name] for name in names}, **changes})


def improve(
    cfg: DictConfig, update: SPARUpdate, data: OfflineReplayBuffer, on_step: Callable[[int], None] = lambda step: None
) -> None:
    """The improvement, each critic on half of the episodes; `on_step` comes before the first update and after each."""
    loss = cast(SPARLoss, update.loss)
    rows = with_member_weights(loss, with_anchor_actions(loss, data), seed=torch.initial_seed())
    on_step(0)
    for step in range(cfg.spar.updates):
        if cfg.spar.target_interval and step % cfg.spar.target_interval == 0:
            rows = with_value_targets(loss, rows)
        update(rows.sample())
        on_step(step + 1)


def rectified(loss: SPARLoss, batch: TensorDictBase) -> tuple[TensorDictBase, Tensor, Tensor]:
    """The state with the anchor's action, the current head's (A) residual and action, with gradient to the head."""
    with loss.actor_network_params.to_module(loss.actor_network):
        actor = loss.actor_network
        state = batch.select(*actor.anchor.in_keys)
        anchor_action = actor.anchor(state.copy())["action"]
        state["anchor_action"] = anchor_action
        residual = actor.head(state.copy())["residual"]
        return state, residual, actor.compose(anchor_action, residual)


def mean_value(loss: SPARLoss, state: TensorDictBase, action: Tensor) -> Tensor:
    """The mean of the critics, ``[*B]``, with gradient to the action."""
    params = loss.qvalue_network_params.data
    values = call_ensemble(loss.qvalue_network, params, state, {"action": action}, out_key="state_action_value")
    return values.squeeze(-1).mean(0)


def head_parameters(loss: SPARLoss) -> list[Tensor]:
    """What the head learns."""
    return [p for p in loss.actor_network_params.get("head").values(True, True) if p.requires_grad]


def fixed_rows(data: OfflineReplayBuffer, count: int) -> TensorDictBase:
    """Random rows, without repetition."""
    everything = data[:]
    return everything[torch.randperm(len(everything))[:count]]
