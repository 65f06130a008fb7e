"""No anchor: the residual is the whole action."""

from __future__ import annotations

from typing import Any

from harness.spar_run import SPARRun
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn

from torchrl_spar import FrozenAnchor
from torchrl_spar.evaluation.policy_file import rebuild_policy


class MidRange(nn.Module):
    """The constant action in the middle of the range."""

    action: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("action", (low + high) / 2)

    def forward(self, observation: Tensor) -> Tensor:
        return self.action.expand(*observation.shape[:-1], -1)


def mid_range(low: Tensor, high: Tensor) -> TensorDictModule:
    return TensorDictModule(MidRange(low, high), ["observation"], ["action"])


def rebuild(**architecture: Any) -> TensorDictSequential:
    """The policy of the ablation from the sizes in its file, untrained."""
    actor = rebuild_policy(architecture)
    actor.anchor = FrozenAnchor(mid_range(actor.low, actor.high))
    return TensorDictSequential(actor)


class UnanchoredRun(SPARRun):
    """The whole action is the residual. There is no figure."""

    @property
    def anchor(self) -> TensorDictModuleBase:
        space = self.data.action_spec.space
        return mid_range(space.low, space.high)

    @property
    def network(self) -> dict[str, Any]:
        sizes = self.policy.architecture
        assert sizes is not None  # its other networks are the default ones
        return {"kind": "no_anchor", **sizes}

    def as_saved(self, policy: TensorDictModuleBase) -> TensorDictModuleBase:
        # Wrapped: nobody is to take it for a policy with an anchor to compare with or to fall back to.
        return TensorDictSequential(policy)

    def draw(self, results: dict[str, Any]) -> None:
        pass
