"""Networks of one size for every rival: SPAR's default bodies, standardised by the data's statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import (
    AddStateIndependentNormalScale,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torchrl.modules import (
    IndependentNormal,
    NormalParamExtractor,
    ProbabilisticActor,
    TanhModule,
    TanhNormal,
    ValueOperator,
)

from torchrl_spar import OfflineReplayBuffer, make_anchor
from torchrl_spar.networks import ObservationNorm, StateMLP


class Networks:
    """Makes networks for one data set.

    Args:
        data: gives the sizes, the action bounds and the observation statistics.
        hidden: widths of every network's hidden layers.
        device: where the weights live.
    """

    def __init__(self, data: OfflineReplayBuffer, hidden: Sequence[int], device: torch.device) -> None:
        self.stats = (data.observation_loc, data.observation_scale)
        self.action_spec = data.action_spec
        self.low, self.high = data.action_spec.space.low, data.action_spec.space.high
        self.observation_dim, self.action_dim = data.observation_loc.numel(), data.action_spec.shape[-1]
        self.hidden, self.device = list(hidden), device

    def actor(self) -> TensorDictSequential:
        """Deterministic, a tanh to the action bounds: the same as SPAR's anchor."""
        return make_anchor(
            self.observation_dim, self.action_spec, observation_stats=self.stats, hidden=self.hidden, device=self.device
        )

    def gaussian_actor(self) -> TensorDictModuleBase:
        """IQL's: the mean through a tanh to the bounds, one learned scale a dimension."""
        scale = AddStateIndependentNormalScale(self.action_dim, device=self.device)
        body = TensorDictSequential(
            TensorDictModule(self.body(self.observation_dim, self.action_dim), ["observation"], ["loc"]),
            TanhModule(in_keys=["loc"], low=self.low, high=self.high),
            TensorDictModule(scale, ["loc"], ["loc", "scale"]),
        )
        return ProbabilisticActor(body, in_keys=["loc", "scale"], distribution_class=IndependentNormal)

    def squashed_actor(self) -> TensorDictModuleBase:
        """SAC's: a Gaussian through a tanh, mean and scale from the observation."""
        body = TensorDictSequential(
            TensorDictModule(self.body(self.observation_dim, 2 * self.action_dim), ["observation"], ["params"]),
            TensorDictModule(NormalParamExtractor(), ["params"], ["loc", "scale"]),
        )
        bounds = {"low": self.low, "high": self.high}
        return ProbabilisticActor(
            body, in_keys=["loc", "scale"], distribution_class=TanhNormal, distribution_kwargs=bounds
        )

    def critics(self, num: int, *, layer_norm: bool) -> list[ValueOperator]:
        """A list, so that TorchRL keeps each one's initialisation instead of drawing all anew."""
        size = self.observation_dim + self.action_dim
        bodies = (self.body(size, 1, layer_norm) for _ in range(num))
        return [ValueOperator(body, in_keys=["observation", "action"]) for body in bodies]

    def value(self) -> ValueOperator:
        return ValueOperator(self.body(self.observation_dim, 1), in_keys=["observation"])

    def body(self, in_features: int, out_features: int, layer_norm: bool = False) -> StateMLP:
        """An MLP on the standardised observation; further inputs are joined to it."""
        norm = ObservationNorm(*self.stats)
        return StateMLP(norm, in_features, out_features, hidden=self.hidden, layer_norm=layer_norm, device=self.device)
