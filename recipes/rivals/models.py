"""Networks of one size for every rival: SPAR's default ones, and those of actors that draw their actions."""

from __future__ import annotations

from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torchrl.modules import (
    IndependentNormal,
    NormalParamExtractor,
    ProbabilisticActor,
    TanhModule,
    TanhNormal,
    ValueOperator,
)

from torchrl_spar.build import DefaultNetworks


class Networks(DefaultNetworks):
    """SPAR's networks for a data set, and those that the rivals have instead or besides."""

    def deterministic_actor(self) -> TensorDictSequential:
        """The same as SPAR's anchor."""
        return self.anchor()

    def gaussian_actor(self) -> TensorDictModuleBase:
        """IQL's: the mean through a tanh to the bounds, one learned scale a dimension."""
        scale = AddStateIndependentNormalScale(self.action_dim, device=self.device)
        body = TensorDictSequential(
            TensorDictModule(self.body(0, self.action_dim), ["observation"], ["loc"]),
            TanhModule(in_keys=["loc"], low=self.low, high=self.high),
            TensorDictModule(scale, ["loc"], ["loc", "scale"]),
        )
        return ProbabilisticActor(body, in_keys=["loc", "scale"], distribution_class=IndependentNormal)

    def squashed_actor(self) -> TensorDictModuleBase:
        """SAC's: a Gaussian through a tanh, mean and scale from the observation."""
        body = TensorDictSequential(
            TensorDictModule(self.body(0, 2 * self.action_dim), ["observation"], ["params"]),
            TensorDictModule(NormalParamExtractor(), ["params"], ["loc", "scale"]),
        )
        bounds = {"low": self.low, "high": self.high}
        return ProbabilisticActor(
            body, in_keys=["loc", "scale"], distribution_class=TanhNormal, distribution_kwargs=bounds
        )

    def critics(self, num: int, *, layer_norm: bool) -> list[ValueOperator]:
        """A list, so that TorchRL keeps each one's initialisation instead of drawing all anew."""
        bodies = (self.body(self.action_dim, 1, layer_norm=layer_norm) for _ in range(num))
        return [ValueOperator(body, in_keys=["observation", "action"]) for body in bodies]

    def value(self) -> ValueOperator:
        """Without SPAR's LayerNorm."""
        return ValueOperator(self.body(0, 1), in_keys=["observation"])
