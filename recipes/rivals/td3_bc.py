"""TD3+BC (https://arxiv.org/abs/2106.06860): as TorchRL's TD3BCLoss."""

from __future__ import annotations

from functools import partial
from typing import Any

from rivals.base import Problem, Rival
from rivals.td3 import BehaviorRegularizedLoss, alternate


def build(problem: Problem, *, critics: dict[str, Any], alpha: float, **options: Any) -> Rival:
    """
    Args:
        alpha: weight of the normalised value beside the cloning error.
        problem, critics, **options: see `alternate`.
    """
    make_loss = partial(
        BehaviorRegularizedLoss, actor_penalty=1 / problem.data.action_spec.shape[-1], critic_penalty=0.0,
        value_weight=alpha, first_critic=critics["bound"] == "min", bound=critics["bound"], kappa=critics["kappa"],
    )  # fmt: skip
    return alternate(make_loss, problem, problem.data, critics=critics, **options)
