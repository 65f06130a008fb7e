"""SPAR's critic with IQL's policy: SPAR trains as it does, and an actor is drawn from its critic by weighted cloning.

What it answers: whether SPAR's policy is better because of its critic, or because of how it is drawn from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from harness.run import Run
from harness.spar_run import COLUMNS, check_options, make_update, pretrain_spar
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from rivals.base import Problem, Rival
from rivals.batches import return_scale
from rivals.iql import MAX_WEIGHT, log_likelihood
from torchrl_spar import SPARLoss, SPARUpdate, with_anchor_actions
from torchrl_spar.ensemble import lower_bound
from torchrl_spar.functional import call, call_ensemble


def build(problem: Problem, *, lr: float, temperature: float, by_return_range: bool) -> Rival:
    """
    Args:
        problem: data, sizes, number of updates; SPAR's options are the main job's, the expectile among them.
        lr: learning rate of the actor, falling to zero along a cosine, and of the state value.
        temperature: factor on the advantage in the actor's weights.
        by_return_range: whether advantages are in IQL's units, 1000 over the range of the returns.
    """
    check_options(problem.cfg, problem.device)
    actor = problem.networks().gaussian_actor()
    unit = return_scale(problem.data) if by_return_range else 1.0
    return ExtractedPolicy(problem.data, actor, [], problem=problem, lr=lr, temperature=temperature * unit)


@dataclass
class ExtractedPolicy(Rival):
    """The policy that IQL's last step draws from SPAR's critic while SPAR trains it."""

    problem: Problem = field(kw_only=True)
    lr: float = field(kw_only=True)
    temperature: float = field(kw_only=True)
    spar: SPARUpdate = field(init=False)

    @property
    def columns(self) -> list[str]:
        return [name for name in COLUMNS if name != "coherent_shift"]  # HealthCheck is SPAR's

    def pretrain(self, run: Run) -> None:
        actor = self.policy
        loss, _ = pretrain_spar(run, run.cfg.anchor, with_value=True)
        self.data = with_anchor_actions(loss, run.data)  # without targets: they are one-step ones
        self.spar = make_update(self.problem.cfg, loss)
        params = TensorDict.from_module(actor)

        def actor_loss(batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
            # SPAR's values are in scaled rewards.
            weight = (self.temperature / loss.reward_scale * advantage(loss, batch)).exp().clamp(max=MAX_WEIGHT)
            return -(weight * log_likelihood(actor, params, batch)).mean(), {}

        self.steps = [
            self.problem.step("loss_actor", actor_loss, actor.parameters(), self.lr, decay=True),
        ]
        if loss.value_mix == 0:  # else SPAR trains it itself
            value = self.problem.step("loss_value", loss.value_loss, loss.value_network_params.parameters(), self.lr)
            self.steps.insert(0, value)

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        return self.spar(batch) | super().__call__(batch)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "spar": self.spar.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.spar.load_state_dict(state["spar"])


@torch.no_grad()
def advantage(loss: SPARLoss, batch: TensorDictBase) -> Tensor:
    """The target critics' lower bound at the data's action over the state value, ``[*B]``."""
    keys, params = loss.tensor_keys, loss.target_qvalue_network_params
    qvalue = call_ensemble(loss.qvalue_network, params, batch, {}, out_key=keys.state_action_value)
    value = call(loss.value_network, loss.value_network_params, batch, {})[keys.value]
    return (lower_bound(qvalue, bound=loss.bound, kappa=loss.kappa) - value).squeeze(-1)
