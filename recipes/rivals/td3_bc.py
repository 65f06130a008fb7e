"""TD3+BC (https://arxiv.org/abs/2106.06860): TorchRL's TD3BCLoss."""

from __future__ import annotations

from functools import partial
from typing import Any

from torchrl.objectives import TD3BCLoss

from rivals.base import Problem, Rival
from rivals.td3 import TORCHRL, BehaviorRegularizedLoss, alternate


def build(problem: Problem, *, critics: dict[str, Any], alpha: float, **options: Any) -> Rival:
    """
    Args:
        alpha: weight of the normalised value beside the cloning error.
        problem, critics, **options: see `alternate`.
    """
    if critics["bound"] == "min":
        make_loss: Any = partial(TD3BCLoss, alpha=alpha, num_qvalue_nets=critics["num"], **TORCHRL)
    else:
        # TorchRL's has the minimum built in; this is the same with another bound, its actor's loss divided by alpha.
        penalty = 1 / (alpha * problem.networks.action_dim)
        bound = {name: critics[name] for name in ("bound", "kappa")}
        make_loss = partial(BehaviorRegularizedLoss, actor_penalty=penalty, critic_penalty=0.0, **bound)
    return alternate(make_loss, problem, problem.data, critics=critics, **options)
