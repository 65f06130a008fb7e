"""The policies that a run had at a few of its evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from omegaconf import DictConfig
from tensordict.nn import TensorDictModuleBase
from torch import Tensor


class EarlierPolicies:
    """What training has changed, at all but the last of `count` evenly spaced evaluations of the curve."""

    def __init__(self, cfg: DictConfig, count: int) -> None:
        points = [*range(cfg.eval.interval, cfg.spar.updates, cfg.eval.interval), cfg.spar.updates]
        count = min(count, len(points))
        self.steps = [points[(i + 1) * len(points) // count - 1] for i in range(count - 1)]
        self.states: dict[int, dict[str, Tensor]] = {}

    def add(self, step: int, policy: TensorDictModuleBase) -> None:
        if step in self.steps:
            state = {name: tensor for name, tensor in policy.state_dict().items() if not name.startswith("anchor.")}
            self.states[step] = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def policies(self, policy: TensorDictModuleBase) -> dict[int, Any]:
        """By step, on the anchor of this one."""
        found: dict[int, Any] = {}
        for step, state in self.states.items():
            found[step] = deepcopy(policy)
            found[step].load_state_dict(state, strict=False)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"states": self.states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.states = state["states"]
