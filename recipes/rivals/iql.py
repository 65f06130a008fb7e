"""IQL (https://arxiv.org/abs/2110.06169): TorchRL's IQLLoss, its terms computed without tensordicts."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives import IQLLoss

from rivals.base import Problem, Rival
from rivals.batches import transform_rewards
from rivals.models import output_of_body, squash
from rivals.terms import normal_log_prob, td_target
from torchrl_spar.functional import call, call_ensemble

# The bound of the actor's weights.
MAX_WEIGHT = 100.0


class InSampleLoss(IQLLoss):
    """The numbers of TorchRL's IQLLoss (squared errors of the critics) for an actor of `Networks.gaussian_actor`."""

    def value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Any]]:
        error = self._target_qvalue(tensordict) - self._value(tensordict)
        return ((self.expectile - (error < 0).float()).abs() * error.pow(2)).mean(), {}

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Any]]:
        with torch.no_grad():
            advantage = self._target_qvalue(tensordict) - self._value(tensordict)
            weight = (self.temperature * advantage).exp().clamp(max=MAX_WEIGHT)
        return -(weight * log_likelihood(self.actor_network, self.actor_network_params, tensordict)).mean(), {}

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Any]]:
        with torch.no_grad():
            target = td_target(self, tensordict, self._value(tensordict["next"]))
        values = call_ensemble(
            self.qvalue_network, self.qvalue_network_params, tensordict, {}, out_key="state_action_value"
        )
        return (values.squeeze(-1) - target).pow(2).mean(1).sum(), {}

    def _value(self, state: TensorDictBase) -> Tensor:
        return call(self.value_network, self.value_network_params, state, {})["state_value"].squeeze(-1)

    @torch.no_grad()
    def _target_qvalue(self, batch: TensorDictBase) -> Tensor:
        """The minimum of the target critics at the data's actions, ``[B]``."""
        params = self.target_qvalue_network_params
        return call_ensemble(self.qvalue_network, params, batch, {}, out_key="state_action_value").amin(0).squeeze(-1)


def log_likelihood(actor: Any, params: Any, batch: TensorDictBase) -> Tensor:
    """Log likelihood of the data's actions, ``[B]``, under `Networks.gaussian_actor` with these parameters."""
    tanh, parts = actor[0][1], params.get(("module", "0", "module"))
    loc = squash(output_of_body(actor, params, batch), tanh.loc_low, tanh.loc_high)
    log_scale = parts.get(("2", "module", "state_independent_scale"))
    return normal_log_prob((batch["action"] - loc) / log_scale.exp(), log_scale)


def build(
    problem: Problem,
    *,
    lr: float,
    expectile: float,
    temperature: float,
    target_rate: float,
    reward: dict[str, Any],
    gamma: float,
) -> Rival:
    """
    Args:
        problem: data, sizes, number of updates.
        lr: learning rate; the actor's falls to zero along a cosine.
        expectile: of the state value.
        temperature: factor on the advantage in the actor's weights.
        target_rate: Polyak rate of the target critics.
        reward: see `transform_rewards`.
        gamma: discount.
    """
    networks = problem.networks()
    actor = networks.gaussian_actor()
    loss = InSampleLoss(
        actor,
        networks.critics(2, layer_norm=None),
        networks.value(),
        num_qvalue_nets=2,
        temperature=temperature,
        expectile=expectile,
    )
    loss.make_value_estimator(gamma=gamma)
    steps = [
        problem.step("loss_value", loss.value_loss, loss.value_network_params.parameters(), lr),
        problem.step("loss_actor", loss.actor_loss, loss.actor_network_params.parameters(), lr, decay=True),
        problem.step("loss_qvalue", loss.qvalue_loss, loss.qvalue_network_params.parameters(), lr),
    ]
    return Rival(transform_rewards(problem.data, **reward), actor, steps, loss, target_rate)
