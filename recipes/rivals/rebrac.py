"""ReBRAC (https://arxiv.org/abs/2305.09836): TD3+BC with decoupled penalties and LayerNorm critics."""

from __future__ import annotations

from functools import partial
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
    batch_size: int | None,
    reward: dict[str, Any],
    **options: Any,
) -> Rival:
    """
    Args:
        actor_penalty: beta_1.
        critic_penalty: beta_2.
        batch_size: of a batch; None: the main job's.
        reward: see `transform_rewards`.
        problem, critics, **options: see `alternate`.
    """
    make_loss = partial(
        BehaviorRegularizedLoss, actor_penalty=actor_penalty, critic_penalty=critic_penalty,
        bound=critics["bound"], kappa=critics["kappa"],
    )  # fmt: skip
    data = add_next_actions(transform_rewards(problem.data, **reward), batch_size=batch_size)
    return alternate(make_loss, problem, data, critics=critics, **options)
