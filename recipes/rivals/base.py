"""What every rival is made of: a problem to solve, steps of gradient descent, and a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from harness.run import Run
from omegaconf import DictConfig
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchrl.objectives.common import LossModule

from rivals.models import Networks
from torchrl_spar import InputError, OfflineReplayBuffer
from torchrl_spar.training.optimization import adam, cosine, descent, set_lr
from torchrl_spar.training.sampling import batch_size_of, uniform_batches

Term = Callable[[TensorDictBase], tuple[Tensor, Any]]


@dataclass
class Problem:
    """What all methods are given.

    Args:
        data: the data set.
        cfg: the whole configuration; sizes, batch, number of updates and compilation are SPAR's.
        device: where everything lives.
    """

    data: OfflineReplayBuffer
    cfg: DictConfig
    device: torch.device

    def networks(self, *, layers: int | None = None, standardised: bool = True, small_start: bool = False) -> Networks:
        """
        Args:
            layers: hidden layers, each of the main job's first width; None: the main job's.
            standardised: whether networks standardise the observation by the data's statistics.
            small_start: ReBRAC's initialisation, see `Networks`.
        """
        if layers is not None and layers < 1:
            raise InputError(f"layers={layers}: the method's hidden layers must be at least 1, or null")
        hidden = list(self.cfg.spar.loss.hidden)
        hidden = hidden if layers is None else hidden[:1] * layers
        loc, scale = self.data.observation_loc, self.data.observation_scale
        stats = (loc, scale) if standardised else (torch.zeros_like(loc), torch.ones_like(scale))
        networks = Networks.of(self.data, stats=stats, hidden=hidden, device=self.device)
        networks.small_start = small_start
        return networks

    @property
    def updates(self) -> int:
        return self.cfg.spar.updates

    def step(
        self,
        name: str,
        term: Term,
        params: Iterable[Tensor],
        lr: float,
        *,
        interval: int = 1,
        decay: bool = False,
        metrics: tuple[str, ...] = (),
    ) -> Step:
        """A step with Adam; with `decay` its rate falls to zero along a cosine until the last update."""
        decay_steps = max(1, self.updates // interval) if decay else None
        return Step(name, term, adam(params, lr), interval, decay_steps, metrics, self.cfg.spar.compile)


@dataclass
class Step:
    """One term and the optimiser that minimises it, every `interval` updates.

    Args:
        name: of the loss in the logs.
        term: batch -> loss and metadata.
        optimizer: of the parameters that the term is to move.
        interval: updates between two of this step.
        decay_steps: of this step, until its learning rate is zero; None: it is constant.
        metrics: what to log of the metadata, as means.
        compile: whether loss and gradients go through ``torch.compile``.
    """

    name: str
    term: Term
    optimizer: torch.optim.Optimizer
    interval: int = 1
    decay_steps: int | None = None
    metrics: tuple[str, ...] = ()
    compile: bool = False
    made: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.descend = descent({self.name: self._logged_term}, self.optimizer, compile=self.compile)

    def _logged_term(self, batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        value, metadata = self.term(batch)
        return value, {name: metadata[name].detach().mean() for name in self.metrics}

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        metrics = self.descend(batch)
        self.made += 1
        if self.decay_steps is not None:
            set_lr(self.optimizer, self.lr * cosine(self.made, self.decay_steps))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The parameters that it moves, its optimiser, and the number of steps made."""
        params = [param.detach() for param in self.params]
        return {"params": params, "optimizer": self.optimizer.state_dict(), "made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for param, saved in zip(self.params, state["params"], strict=True):
            param.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.made = state["made"]

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
        loss: whose targets follow its networks after the steps, if it has any.
        target_rate: Polyak rate of the targets.
        target_interval: updates between two moves of the targets.
    """

    data: OfflineReplayBuffer
    policy: TensorDictModuleBase
    steps: list[Step]
    loss: LossModule | None = None
    target_rate: float = 0.0
    target_interval: int = 1
    updates: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        pairs = [] if self.loss is None else followed(self.loss)
        if self.loss is not None:  # else TorchRL warns that nobody moves the targets
            self.loss._has_update_associated = dict.fromkeys(self.loss._has_update_associated, True)
        self.targets, self.sources = [target for _, target in pairs], [source for source, _ in pairs]
        self.follow = get_ema_multi_avg_fn(1 - self.target_rate)

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

    def batches(self, seed: int) -> Iterator[TensorDictBase]:
        """Uniform batches from the next update on, drawn in blocks."""
        # Neighbouring seeds would have blocks in common.
        seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))
        rows = self.data[:].exclude("episode", "return_to_go", "done", "terminated", "truncated")
        return uniform_batches(rows, batch_size_of(self.data), self.updates, seed)

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        self.updates += 1
        metrics: dict[str, Tensor] = {}
        for step in self.steps:
            if self.updates % step.interval == 0:
                metrics |= step(batch)
        if self.targets and self.updates % self.target_interval == 0:
            self.follow(self.targets, self.sources, 0)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        steps = [step.state_dict() for step in self.steps]
        return {"updates": self.updates, "steps": steps, "targets": self.targets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for step, saved in zip(self.steps, state["steps"], strict=True):
            step.load_state_dict(saved)
        for target, saved in zip(self.targets, state["targets"], strict=True):
            target.copy_(saved)


def followed(loss: LossModule) -> list[tuple[Tensor, Tensor]]:
    """Every trained parameter of a TorchRL loss that has a target, and the target."""
    networks: dict[str, Any] = dict(loss.named_children())
    return [
        (param, networks[f"target_{name}"].get(key).data)
        for name, params in networks.items()
        if f"target_{name}" in networks
        for key, param in params.items(True, True)
        if param.requires_grad
    ]
