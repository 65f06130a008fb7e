"""TD3+BC's value gradient in the place of Latent Self-Imitation."""

from __future__ import annotations

from harness.spar_run import SPARRun
from tensordict import TensorDictBase
from torch import Tensor

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
        advantage_std: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        action = self._compose(state.get(self.tensor_keys.anchor_action), residual)
        value = self._qvalue(state, action, self.qvalue_network_params.data).mean(0)
        size = value.detach().abs()
        size = size.mean() if mask is None else size[mask].mean()
        # The trust term beside it counts squares of residuals, not of actions.
        alpha = ALPHA / self.residual_scale.pow(2).mean()
        return -alpha * value / size, {}


class ValueGradientRun(SPARRun):
    loss_class = ValueGradientLoss
