"""SPAR with one part replaced, for `compare.py method=ablation/...`. The ablations that are options need no code."""

from __future__ import annotations

from typing import Any

import torch
from harness.spar_run import SPARRun
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn

from torchrl_spar import SPARLoss

# TD3+BC's weight of the value beside squared distances of actions (https://arxiv.org/abs/2106.06860).
ALPHA = 2.5


class ValueGradientLoss(SPARLoss):
    """The normalised value gradient of TD3+BC in the place of Latent Self-Imitation, by the same critics."""

    lsi_metrics = ()

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
        size = value.detach().abs()
        size = size.mean() if mask is None else size[mask].mean()
        # The trust term beside it counts squares of residuals, not of actions.
        alpha = ALPHA / self.residual_scale.pow(2).mean()
        return -alpha * value / size, {}


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
    """The whole action is the residual. There is no policy.pt, which holds default networks alone, and no figure."""

    @property
    def anchor(self) -> TensorDictModuleBase:
        space = self.data.action_spec.space
        return TensorDictModule(MidRange(space.low, space.high), ["observation"], ["action"])

    def save(self, results: dict[str, Any]) -> None:
        pass

    def draw(self, results: dict[str, Any]) -> None:
        pass


RUNS: dict[str, type[SPARRun]] = {
    "spar_value_gradient": ValueGradientRun,
    "spar_action_space": ActionSpaceRun,
    "spar_unanchored": UnanchoredRun,
}
