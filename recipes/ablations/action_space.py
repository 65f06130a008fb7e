"""Candidates in action space: the latent space of the residuals is left out."""

from __future__ import annotations

import torch
from harness.spar_run import SPARRun
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_spar import SPARLoss


class ActionSpaceLoss(SPARLoss):
    """Candidates in the space of residuals: a latent that is the residual itself. There is nothing to fit."""

    def _encode(self, state: TensorDictBase, residual: Tensor) -> tuple[Tensor, Tensor]:
        return residual, torch.zeros_like(residual)

    def _decode(
        self, state: TensorDictBase, latent: Tensor, params: TensorDictBase | None = None, *, frozen: bool = False
    ) -> Tensor:
        return latent


class ActionSpaceRun(SPARRun):
    loss_class = ActionSpaceLoss
