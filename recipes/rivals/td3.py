"""What TD3+BC and ReBRAC share: TD3's order of updates, and TorchRL's TD3BCLoss with decoupled penalties."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives import SoftUpdate, TD3BCLoss

from rivals.base import Rival, Step, adam
from torchrl_spar import OfflineReplayBuffer
from torchrl_spar.functional import call, call_ensemble
from torchrl_spar.value import Bound, lower_bound


class BehaviorRegularizedLoss(TD3BCLoss):
    """ReBRAC (https://arxiv.org/abs/2305.09836): TD3+BC with a penalty of its own for the actor and for the critics.

    Networks, targets, noise, bounds and value estimator are TorchRL's TD3BCLoss; both penalties are squared
    distances, summed over the action's dimensions. The lower bound of the critics is SPAR's, its ``"min"`` the paper's.

    Args:
        actor_network: deterministic, observation -> action.
        qvalue_network: a list of critics.
        actor_penalty: weight of ``|pi(s) - a|^2`` in the actor's loss, beside the value over its mean size (beta_1).
        critic_penalty: weight of ``|a' - a'_data|^2`` that is taken off the bootstrapped value (beta_2).
        bound: of the critics, ``"min"`` or ``"lcb"``.
        kappa: standard deviations of the latter.
        **options: TD3BCLoss's.
    """

    def __init__(
        self,
        actor_network: Any,
        qvalue_network: list[Any],
        *,
        actor_penalty: float,
        critic_penalty: float,
        bound: Bound = "min",
        kappa: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(actor_network, qvalue_network, num_qvalue_nets=len(qvalue_network), **options)
        self.actor_penalty, self.critic_penalty = actor_penalty, critic_penalty
        self.bound: Bound = bound
        self.kappa = kappa

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``beta_1 |pi(s) - a|^2 - Q(s, pi(s)) / mean |Q|``; reaches the actor alone."""
        key = self.tensor_keys.action
        action = call(self.actor_network, self.actor_network_params, tensordict, {})[key]
        value = self._value(tensordict, action, self.qvalue_network_params.data)
        penalty = (action - tensordict[key]).pow(2).sum(-1)
        loss = self.actor_penalty * penalty - value / value.abs().mean().detach()
        return loss.mean(), {"bc_loss": penalty.detach().mean() / action.shape[-1]}

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """The critics regress on ``r + gamma (1 - terminated) (Q(s', a') - beta_2 |a' - a'_data|^2)``; summed."""
        keys, following = self.tensor_keys, tensordict["next"]
        noise = torch.randn_like(tensordict[keys.action]) * self.policy_noise
        with torch.no_grad():
            action = call(self.actor_network, self.target_actor_network_params, following, {})[keys.action]
            action = (action + noise.clamp(-self.noise_clip, self.noise_clip)).clamp(self.min_action, self.max_action)
            next_value = self._value(following, action, self.target_qvalue_network_params)
            if self.critic_penalty:
                next_value -= self.critic_penalty * (action - following[keys.action]).pow(2).sum(-1)
            outcome = tensordict.select(*(("next", key) for key in (keys.reward, keys.done, keys.terminated)))
            outcome.set(("next", keys.state_action_value), next_value.unsqueeze(-1))
            target = self.value_estimator.value_estimate(outcome).squeeze(-1)
        value = self._values(tensordict, tensordict[keys.action], self.qvalue_network_params)
        error = (value - target).pow(2)
        metadata = {"td_error": error.detach(), "pred_value": value.detach(), "target_value": target}
        return error.mean(1).sum(0), metadata

    def _values(self, state: TensorDictBase, action: Tensor, params: TensorDictBase) -> Tensor:
        keys = self.tensor_keys
        out_key = keys.state_action_value
        return call_ensemble(self.qvalue_network, params, state, {keys.action: action}, out_key=out_key).squeeze(-1)

    def _value(self, state: TensorDictBase, action: Tensor, params: TensorDictBase) -> Tensor:
        return lower_bound(self._values(state, action, params), bound=self.bound, kappa=self.kappa)


def alternate(
    loss: Any,
    policy: Any,
    data: OfflineReplayBuffer,
    *,
    actor_lr: float,
    qvalue_lr: float,
    policy_interval: int,
    target_rate: float,
    gamma: float,
    actor_metrics: tuple[str, ...] = ("bc_loss",),
) -> Rival:
    """The critics every time, the actor and all targets every `policy_interval` times."""
    loss.make_value_estimator(gamma=gamma)
    # TorchRL's loss would bootstrap from the current observation, silently, were the next one missing.
    data[:1].select(*loss.in_keys)
    qvalue = adam(loss.qvalue_network_params.parameters(), qvalue_lr)
    actor = adam(loss.actor_network_params.parameters(), actor_lr)
    steps = [
        Step("loss_qvalue", loss.qvalue_loss, qvalue, metrics=("pred_value", "target_value")),
        Step("loss_actor", loss.actor_loss, actor, interval=policy_interval, metrics=actor_metrics),
    ]
    return Rival(data, policy, steps, SoftUpdate(loss, tau=target_rate), policy_interval)
