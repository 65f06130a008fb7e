"""The usual warm start: TorchRL's TD3Loss continues with the networks and targets of TD3+BC."""

from __future__ import annotations

from functools import partial
from typing import Any

from rivals.base import Problem, Rival
from rivals.td3 import ActorCritic, alternate
from torchrl.objectives import TD3Loss

from torchrl_spar import InputError


class WarmTD3Loss(TD3Loss):
    """TorchRL's TD3Loss, whose critics' term also has TD3BCLoss's name."""

    qvalue_loss = TD3Loss.value_loss


def check_warm_start(*, critics: dict[str, Any], start: bool = False, **_: Any) -> None:
    """Refuses options of TD3+BC that its online phase cannot go on with."""
    if critics["bound"] != "min":
        raise InputError(f"method.critics.bound={critics['bound']}: TorchRL's TD3Loss has the minimum alone")
    if start:
        raise InputError("method.start=true: TorchRL's TD3Loss has no scaled rewards; give method.start=false")


def warm_start(
    pretrained: Rival, problem: Problem, *, critics: dict[str, Any], alpha: float, **options: Any
) -> ActorCritic:
    """
    Args:
        pretrained: TD3+BC, trained offline.
        problem: what it was given.
        alpha: TD3+BC's own; without a cloning error it has no use here.
        critics, **options: TD3+BC's own, see `alternate`.
    """
    make_loss = partial(WarmTD3Loss, num_qvalue_nets=critics["num"], loss_function="l2", deactivate_vmap=True)
    rival = alternate(make_loss, problem, problem.data, critics=critics, actor_metrics=(), **options)
    assert pretrained.loss is not None and rival.loss is not None
    state = pretrained.loss.state_dict()
    del state["reward_scale"]  # 1, since the critics did not start from the returns
    rival.loss.load_state_dict(state)
    return rival
