"""TD3+BC (https://arxiv.org/abs/2106.06860): TorchRL's TD3BCLoss."""

from __future__ import annotations

from typing import Any

from torchrl.objectives import TD3BCLoss

from rivals.base import Problem, Rival
from rivals.td3 import BehaviorRegularizedLoss, alternate


def build(
    problem: Problem, *, critics: dict[str, Any], alpha: float, policy_noise: float, noise_clip: float, **options: Any
) -> Rival:
    """
    Args:
        problem: data, sizes, number of updates.
        critics: their `num`, `layer_norm`, `bound` and `kappa`.
        alpha: weight of the normalised value beside the cloning error.
        policy_noise: standard deviation of the noise on the bootstrapped action.
        noise_clip: bound of that noise.
        **options: learning rates, intervals, rates and start, see `alternate`.
    """
    actor = problem.networks.actor()
    qvalue = problem.networks.critics(critics["num"], layer_norm=critics["layer_norm"])
    common: dict[str, Any] = dict(
        action_spec=problem.data.action_spec, policy_noise=policy_noise, noise_clip=noise_clip, loss_function="l2"
    )
    loss: TD3BCLoss
    if critics["bound"] == "min":
        loss = TD3BCLoss(actor, qvalue, alpha=alpha, num_qvalue_nets=critics["num"], deactivate_vmap=True, **common)
    else:
        # TorchRL's has the minimum built in; this is the same with another bound, its actor's loss divided by alpha.
        penalty = 1 / (alpha * problem.networks.action_dim)
        bound = {name: critics[name] for name in ("bound", "kappa")}
        loss = BehaviorRegularizedLoss(actor, qvalue, actor_penalty=penalty, critic_penalty=0.0, **bound, **common)
    return alternate(loss, actor, problem, **options)
