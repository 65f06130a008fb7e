"""SPAR with one part replaced, for `compare.py method=ablation/...`. The ablations that are options need no code."""

from __future__ import annotations

from typing import Any

import torch
from plots import plot_learning_curve
from spar_run import SPARRun
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn

from torchrl_spar import SPARLoss

# TD3+BC's weight of the value (https://arxiv.org/abs/2106.06860).
ALPHA = 2.5
# Diagnostics of candidates, of which a value gradient has none.
CANDIDATE_KEYS = ("effective_sample_size", "candidate_diversity", "lsi_advantage", "candidate_value_std")


class ValueGradientLoss(SPARLoss):
    """The normalised value gradient of TD3+BC in the place of Latent Self-Imitation, by the same critics."""

    def self_imitation(
        self,
        state: TensorDictBase,
        residual: Tensor,
        latent: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        action = self._compose(state.get(self.tensor_keys.anchor_action), residual)
        value = self._qvalue(state, action, self.qvalue_network_params.data).mean(0)
        return -ALPHA * value / value.detach().abs().mean(), {}

    def _list_out_keys(self) -> list[str]:
        return [key for key in super()._list_out_keys() if key not in CANDIDATE_KEYS]


class ActionSpaceLoss(SPARLoss):
    """Candidates in the space of residuals: a latent that is the residual itself. There is nothing to fit."""

    def _encode(self, state: TensorDictBase, residual: Tensor) -> tuple[Tensor, Tensor]:
        return residual, torch.zeros_like(residual)

    def _decode(
        self, state: TensorDictBase, latent: Tensor, params: TensorDictBase | None = None, *, frozen: bool = False
    ) -> Tensor:
        return latent


class MidRange(nn.Module):
    """The constant action in the middle of the range."""

    action: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("action", (low + high) / 2)

    def forward(self, observation: Tensor) -> Tensor:
        return self.action.expand(*observation.shape[:-1], -1)


class ValueGradientRun(SPARRun):
    loss_class = ValueGradientLoss


class ActionSpaceRun(SPARRun):
    loss_class = ActionSpaceLoss


class UnanchoredRun(SPARRun):
    """The whole action is the residual."""

    def make_anchor(self) -> TensorDictModuleBase:
        space = self.data.action_spec.space
        return TensorDictModule(MidRange(space.low, space.high), ["observation"], ["action"])

    def save(self, results: dict[str, Any]) -> None:
        # No policy.pt: it holds default networks alone.
        plot_learning_curve(self.out / "learning_curve.png", results["curve"], results)


RUNS: dict[str, type[SPARRun]] = {
    "spar": SPARRun,
    "spar_value_gradient": ValueGradientRun,
    "spar_action_space": ActionSpaceRun,
    "spar_unanchored": UnanchoredRun,
}
