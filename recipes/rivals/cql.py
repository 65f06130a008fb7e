"""CQL(H) as published (https://arxiv.org/abs/2006.04779, appendix F, and its D4RL code)."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives import CQLLoss

from rivals.base import Problem, Rival
from rivals.batches import transform_rewards
from rivals.models import LOG_SCALE, output_of_body, squash
from rivals.terms import normal_log_prob, tanh_log_slope, td_target
from torchrl_spar.functional import call_ensemble


class ConservativeLoss(CQLLoss):
    """TorchRL's CQLLoss with the published penalty: one log-sum-exp over all sampled actions, all scored at ``s``.

    TorchRL's is the mean of `num_random` log-sum-exps over three actions, and scores ``pi(s')`` at ``s'``.

    Args:
        actor_network: of `Networks.squashed_actor`.
        low, high: bounds of the action.
        options: CQLLoss's; backups are without entropy.
    """

    def __init__(self, actor_network: Any, qvalue_network: Any, *, low: Tensor, high: Tensor, **options: Any) -> None:
        super().__init__(actor_network, qvalue_network, **options)
        self.low, self.high = low, high

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Any]]:
        """SAC's for the actor, and for the entropy's weight; each reaches its own parameters alone."""
        action, log_prob = self._draw(tensordict)
        value = self._values(tensordict, action, self.qvalue_network_params.data).amin(0)
        loss = (self.log_alpha.detach().exp() * log_prob - value).mean()
        alpha_loss = -self.log_alpha * (log_prob.detach() + self.target_entropy).mean()
        return loss + alpha_loss, {"entropy": -log_prob}

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Any]]:
        """Squared errors to the bootstrapped value, and the penalty; both summed over the critics."""
        count, following = self.num_random, tensordict["next"]
        with torch.no_grad():
            lead = (count,) if self.max_q_backup else ()
            next_values = self._values(following, self._draw(following, *lead)[0], self.target_qvalue_network_params)
            if self.max_q_backup:
                next_values = next_values.amax(1)
            target = td_target(self, tensordict, next_values.amin(0))
            here, here_log_prob = self._draw(tensordict, count)
            there, there_log_prob = self._draw(following, count)
            span = self.high - self.low
            uniform = self.low + span * torch.rand_like(here)
            log_prob = torch.cat([-span.log().sum().expand_as(here_log_prob), here_log_prob, there_log_prob])
        values = self._values(tensordict, tensordict["action"], self.qvalue_network_params)
        sampled = self._values(tensordict, torch.cat([uniform, here, there]), self.qvalue_network_params)
        penalty = self.min_q_weight * ((sampled - log_prob).logsumexp(1) - values).mean(1).sum()
        metadata = {"loss_cql": penalty, "pred_value": values}
        return (values - target).pow(2).mean(1).sum() + penalty, metadata

    def _draw(self, state: TensorDictBase, *lead: int) -> tuple[Tensor, Tensor]:
        """Actions of the actor ``[*lead, B, a]`` and their log densities."""
        loc, log_scale = output_of_body(self.actor_network, self.actor_network_params, state).chunk(2, -1)
        log_scale = log_scale.clamp(*LOG_SCALE)
        noise = torch.randn(*lead, *loc.shape, dtype=loc.dtype, device=loc.device)
        raw = loc + log_scale.exp() * noise
        log_prob = normal_log_prob(noise, log_scale) - tanh_log_slope(raw, self.low, self.high)
        return squash(raw, self.low, self.high), log_prob

    def _values(self, state: TensorDictBase, action: Tensor, params: Any) -> Tensor:
        """The values of every critic, ``[E, *lead, B]``."""
        out_key = self.tensor_keys.state_action_value
        return call_ensemble(self.qvalue_network, params, state, {"action": action}, out_key=out_key).squeeze(-1)


def build(
    problem: Problem,
    *,
    layers: int | None,
    qvalue_lr: float,
    actor_lr: float,
    min_q_weight: float,
    num_random: int,
    max_q_backup: bool,
    target_rate: float,
    reward: dict[str, Any],
    gamma: float,
) -> Rival:
    """
    Args:
        problem: data, sizes, number of updates.
        layers: hidden layers of every network; None: the main job's.
        qvalue_lr: learning rate of the critics.
        actor_lr: learning rate of the actor and of the entropy's weight.
        min_q_weight: weight of the conservative penalty.
        num_random: actions sampled of each kind for it.
        max_q_backup: whether to bootstrap from the best of `num_random` sampled actions.
        target_rate: Polyak rate of the target critics.
        reward: see `transform_rewards`.
        gamma: discount.
    """
    networks = problem.networks(layers=layers)
    actor = networks.squashed_actor()
    loss = ConservativeLoss(
        actor,
        networks.critics(2, layer_norm=None),
        low=networks.low,
        high=networks.high,
        action_spec=problem.data.action_spec,
        min_q_weight=min_q_weight,
        num_random=num_random,
        max_q_backup=max_q_backup,
    )
    loss.make_value_estimator(gamma=gamma)
    actor_params = [*loss.actor_network_params.parameters(), loss.log_alpha]
    qvalue_params, logged = loss.qvalue_network_params.parameters(), ("loss_cql", "pred_value")
    steps = [
        problem.step("loss_actor", loss.actor_loss, actor_params, actor_lr, metrics=("entropy",)),
        problem.step("loss_qvalue", loss.qvalue_loss, qvalue_params, qvalue_lr, metrics=logged),
    ]
    return Rival(transform_rewards(problem.data, **reward), actor, steps, loss, target_rate)
