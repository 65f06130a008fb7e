"""The usual warm start: TorchRL's TD3Loss goes on with the networks and targets that TD3+BC trained."""

from __future__ import annotations

from typing import Any

from rivals.base import Problem, Rival
from rivals.td3 import alternate
from torchrl.objectives import TD3Loss

from torchrl_spar import InputError


class WarmTD3Loss(TD3Loss):
    """TorchRL's, whose term of the critics goes by TD3BCLoss's name too."""

    qvalue_loss = TD3Loss.value_loss


def warm_start(
    pretrained: Rival,
    problem: Problem,
    *,
    critics: dict[str, Any],
    alpha: float,
    policy_noise: float,
    noise_clip: float,
    **options: Any,
) -> Rival:
    """
    Args:
        pretrained: TD3+BC, trained offline.
        problem: what it was given.
        critics, policy_noise, noise_clip: TD3+BC's own.
        alpha: TD3+BC's own; without a cloning error it has no use here.
        **options: learning rates, intervals, rates and start, see `alternate`.
    """
    if critics["bound"] != "min":
        raise InputError(f"method.critics.bound={critics['bound']}: TorchRL's TD3Loss has the minimum alone")
    actor = problem.networks.actor()
    loss = WarmTD3Loss(
        actor,
        problem.networks.critics(critics["num"], layer_norm=critics["layer_norm"]),
        num_qvalue_nets=critics["num"],
        action_spec=problem.data.action_spec,
        policy_noise=policy_noise,
        noise_clip=noise_clip,
        loss_function="l2",
        deactivate_vmap=True,
    )
    rival = alternate(loss, actor, problem, actor_metrics=(), **options)
    assert pretrained.targets is not None
    # Last, for TorchRL's updater of targets begins with copies of the networks.
    loss.load_state_dict(pretrained.targets.loss_module.state_dict())
    return rival
