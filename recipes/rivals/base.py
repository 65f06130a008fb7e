"""What every rival is made of: a problem to solve, steps of gradient descent, and a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from harness.run import Run
from omegaconf import DictConfig
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.objectives import SoftUpdate

from rivals.models import Networks
from torchrl_spar import OfflineReplayBuffer

Term = Callable[[TensorDictBase], tuple[Tensor, Any]]


@dataclass
class Problem:
    """What all methods are given.

    Args:
        data: the data set.
        cfg: the whole configuration; sizes, batch and number of updates are SPAR's.
        device: where everything lives.
    """

    data: OfflineReplayBuffer
    cfg: DictConfig
    device: torch.device

    @cached_property
    def networks(self) -> Networks:
        return Networks.of(self.data, hidden=self.cfg.spar.loss.hidden, device=self.device)

    @property
    def updates(self) -> int:
        return self.cfg.spar.updates


@dataclass
class Step:
    """One term and the optimiser that minimises it, every `interval` updates.

    Args:
        name: of the loss in the logs.
        term: batch -> loss and metadata.
        optimizer: of the parameters that the term is to move.
        interval: updates between two of this step.
        schedule: of the learning rate, advanced with every step.
        metrics: what to log of the metadata, as means.
    """

    name: str
    term: Term
    optimizer: torch.optim.Optimizer
    interval: int = 1
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    metrics: tuple[str, ...] = ()

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        value, metadata = self.term(batch)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        return {self.name: value.detach(), **{name: metadata[name].detach().mean() for name in self.metrics}}

    def state_dict(self) -> dict[str, Any]:
        """The parameters that it moves, and how far its optimiser and schedule are."""
        schedule = {} if self.schedule is None else {"schedule": self.schedule.state_dict()}
        params = [param.detach() for param in self.params]
        return {"params": params, "optimizer": self.optimizer.state_dict(), **schedule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for param, saved in zip(self.params, state["params"], strict=True):
            param.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])

    @property
    def params(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]


@dataclass
class Rival:
    """A method: called with a batch it makes one update and returns what is to be logged.

    Args:
        data: what it samples from; the problem's own data, or what the method makes of it.
        policy: observation -> action, in raw units; follows the training.
        steps: in this order, on the same batch.
        targets: moved after the steps.
        target_interval: updates between two moves of the targets.
    """

    data: ReplayBuffer
    policy: TensorDictModuleBase
    steps: list[Step]
    targets: SoftUpdate | None = None
    target_interval: int = 1
    updates: int = field(default=0, init=False)

    @property
    def columns(self) -> list[str]:
        """The names of all that the updates return."""
        return [name for step in self.steps for name in (step.name, *step.metrics)]

    @property
    def trained(self) -> dict[str, list[Tensor]]:
        """The parameters that each of the losses moves."""
        return {step.name: step.params for step in self.steps}

    def pretrain(self, run: Run) -> None:
        """What comes before the updates; nothing, but for SPAR's critics."""

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        self.updates += 1
        metrics: dict[str, Tensor] = {}
        for step in self.steps:
            if self.updates % step.interval == 0:
                metrics |= step(batch)
        if self.targets is not None and self.updates % self.target_interval == 0:
            self.targets.step()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {
            "updates": self.updates, "steps": [step.state_dict() for step in self.steps],
            "targets": [params.state_dict() for params in self._target_params()],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for step, saved in zip(self.steps, state["steps"], strict=True):
            step.load_state_dict(saved)
        for params, saved in zip(self._target_params(), state["targets"], strict=True):
            params.load_state_dict(saved)

    def _target_params(self) -> list[torch.nn.Module]:
        children: Any = () if self.targets is None else self.targets.loss_module.named_children()
        return [params for name, params in children if name.startswith("target_")]


def adam(params: Iterable[Tensor], lr: float) -> torch.optim.Adam:
    return torch.optim.Adam([param for param in params if param.requires_grad], lr=lr, fused=True)
