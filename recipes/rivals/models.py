"""Networks of every rival: SPAR's default ones, and those of actors that draw their actions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import IndependentNormal, ProbabilisticActor, TanhModule, TanhNormal, ValueOperator

from torchrl_spar import InputError
from torchrl_spar.build import DefaultNetworks
from torchrl_spar.functional import call
from torchrl_spar.networks import StateMLP

# As in SAC's and CQL's code.
LOG_SCALE = (-20.0, 2.0)

A = TypeVar("A", bound=TensorDictModuleBase)


class LocAndScale(nn.Module):
    """Halves an actor's output into mean and scale, the latter from its bounded logarithm."""

    def forward(self, params: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = params.chunk(2, -1)
        return loc, log_scale.clamp(*LOG_SCALE).exp()


@dataclass
class Networks(DefaultNetworks):
    """SPAR's networks for a data set, and those that the rivals have instead or besides.

    Args:
        small_start: hidden biases of 0.1, and last layers drawn from +-0.001 (deterministic actors) and +-0.003
            (critics), as in EDAC (https://arxiv.org/abs/2110.01548) and ReBRAC.
    """

    small_start: bool = False

    def deterministic_actor(self) -> TensorDictSequential:
        """The same as SPAR's anchor."""
        actor = self.anchor()
        if self.small_start:
            start_small(actor[0].module, 1e-3)
        return self.described("deterministic", actor)

    def gaussian_actor(self) -> TensorDictModuleBase:
        """IQL's: the mean through a tanh to the bounds, one learned scale a dimension."""
        scale = AddStateIndependentNormalScale(self.action_dim, device=self.device)
        body = TensorDictSequential(
            TensorDictModule(self.body(0, self.action_dim), ["observation"], ["loc"]),
            TanhModule(in_keys=["loc"], low=self.low, high=self.high),
            TensorDictModule(scale, ["loc"], ["loc", "scale"]),
        )
        actor = ProbabilisticActor(body, in_keys=["loc", "scale"], distribution_class=IndependentNormal)
        return self.described("gaussian", actor)

    def squashed_actor(self) -> TensorDictModuleBase:
        """SAC's: a Gaussian through a tanh, mean and scale from the observation."""
        body = TensorDictSequential(
            TensorDictModule(self.body(0, 2 * self.action_dim), ["observation"], ["params"]),
            TensorDictModule(LocAndScale(), ["params"], ["loc", "scale"]),
        )
        bounds = {"low": self.low, "high": self.high}
        actor = ProbabilisticActor(
            body, in_keys=["loc", "scale"], distribution_class=TanhNormal, distribution_kwargs=bounds
        )
        return self.described("squashed", actor)

    def described(self, kind: str, actor: A) -> A:
        """The actor with its `network`, from which `rebuild` makes it again."""
        bounds = {"low": self.low.tolist(), "high": self.high.tolist()}
        sizes = {"observation_dim": self.observation_dim, "hidden": list(self.hidden)}
        vars(actor)["network"] = {"kind": kind, **bounds, **sizes}
        return actor

    def critics(self, num: int, *, layer_norm: str | None) -> list[ValueOperator]:
        """A list, so that TorchRL keeps each one's initialisation instead of drawing all anew.

        Args:
            num: of critics.
            layer_norm: ``"before"`` each activation, as SPAR's, ``"after"`` it, or None.
        """
        if layer_norm not in (None, "before", "after"):
            raise InputError(f"method.critics.layer_norm={layer_norm}: must be before, after or null")
        bodies = [self.body(self.action_dim, 1, layer_norm=layer_norm == "before") for _ in range(num)]
        for body in bodies:
            if layer_norm == "after":
                for index in range(2 * len(self.hidden) - 1, 0, -2):  # behind the last activation first
                    body.mlp.insert(index + 1, nn.LayerNorm(body.mlp[index - 1].out_features, device=self.device))
            if self.small_start:
                start_small(body, 3e-3)
        return [ValueOperator(body, in_keys=["observation", "action"]) for body in bodies]

    def value(self) -> ValueOperator:
        """Without SPAR's LayerNorm."""
        return ValueOperator(self.body(0, 1), in_keys=["observation"])


# Actors by the kind in their `network`.
ACTORS: dict[str, Callable[[Networks], TensorDictModuleBase]] = {
    "deterministic": Networks.deterministic_actor,
    "gaussian": Networks.gaussian_actor,
    "squashed": Networks.squashed_actor,
}


def rebuild(
    kind: str, *, observation_dim: int, low: list[float], high: list[float], hidden: list[int]
) -> TensorDictModuleBase:
    """An actor from its `network`, untrained; it writes the action alone."""
    bounds = torch.tensor(low), torch.tensor(high)
    spec = Bounded(*bounds, bounds[0].shape, dtype=bounds[0].dtype)
    actor = ACTORS[kind](Networks.of(observation_dim, spec, hidden=hidden))
    return actor if actor.out_keys == ["action"] else actor.select_out_keys("action")


def squash(raw: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """As TorchRL's TanhModule."""
    return low + (high - low) * (raw.tanh() + 1) / 2


def start_small(body: StateMLP, bound: float) -> None:
    *hidden, last = (layer for layer in body.mlp if isinstance(layer, nn.Linear))
    for layer in hidden:
        nn.init.constant_(layer.bias, 0.1)
    nn.init.uniform_(last.weight, -bound, bound)
    nn.init.uniform_(last.bias, -bound, bound)


def output_of_body(actor: TensorDictModuleBase, params: Any, state: TensorDictBase) -> Tensor:
    """What the first network of an actor of `Networks` writes with `params` for a batch ``[B]``."""
    while isinstance(actor, TensorDictSequential):
        actor, params = actor[0], params.get(("module", "0"))
    return call(actor, params, state, {})[actor.out_keys[0]]
