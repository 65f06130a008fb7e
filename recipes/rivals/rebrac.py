"""ReBRAC (https://arxiv.org/abs/2305.09836): TD3+BC with decoupled penalties and LayerNorm critics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rivals.base import Problem, Rival
from rivals.batches import add_next_actions, transform_rewards
from rivals.td3 import BehaviorRegularizedLoss, alternate


def build(
    problem: Problem,
    *,
    critics: dict[str, Any],
    actor_penalty: float,
    critic_penalty: float,
    policy_noise: float,
    noise_clip: float,
    reward: dict[str, Any],
    **options: Any,
) -> Rival:
    """
    Args:
        problem: data, sizes, number of updates.
        critics: their `num`, `layer_norm`, `bound` and `kappa`.
        actor_penalty: beta_1.
        critic_penalty: beta_2.
        policy_noise: standard deviation of the noise on the bootstrapped action.
        noise_clip: bound of that noise.
        reward: see `transform_rewards`.
        **options: learning rates, intervals, rates and start, see `alternate`.
    """
    actor = problem.networks.actor()
    loss = BehaviorRegularizedLoss(
        actor,
        problem.networks.critics(critics["num"], layer_norm=critics["layer_norm"]),
        actor_penalty=actor_penalty,
        critic_penalty=critic_penalty,
        bound=critics["bound"],
        kappa=critics["kappa"],
        policy_noise=policy_noise,
        noise_clip=noise_clip,
        action_spec=problem.data.action_spec,
    )
    data = add_next_actions(transform_rewards(problem.data, **reward))
    return alternate(loss, actor, replace(problem, data=data), **options)
