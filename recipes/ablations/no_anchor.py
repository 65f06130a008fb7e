"""No anchor: the residual is the whole action."""

from __future__ import annotations

from typing import Any

from harness.spar_run import SPARRun
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn


class MidRange(nn.Module):
    """The constant action in the middle of the range."""

    action: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("action", (low + high) / 2)

    def forward(self, observation: Tensor) -> Tensor:
        return self.action.expand(*observation.shape[:-1], -1)


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
