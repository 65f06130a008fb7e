"""IQL (https://arxiv.org/abs/2110.06169): TorchRL's IQLLoss."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import CosineAnnealingLR
from torchrl.objectives import IQLLoss, SoftUpdate

from rivals.base import Problem, Rival, Step, adam
from rivals.batches import transform_rewards


def build(
    problem: Problem,
    *,
    lr: float,
    expectile: float,
    temperature: float,
    target_rate: float,
    reward: dict[str, Any],
    gamma: float,
) -> Rival:
    """
    Args:
        problem: data, sizes, number of updates.
        lr: learning rate; the actor's falls to zero along a cosine.
        expectile: of the state value.
        temperature: factor on the advantage in the actor's weights.
        target_rate: Polyak rate of the target critics.
        reward: see `transform_rewards`.
        gamma: discount.
    """
    networks = problem.networks
    actor = networks.gaussian_actor()
    loss = IQLLoss(
        actor,
        networks.critics(2, layer_norm=False),
        networks.value(),
        num_qvalue_nets=2,
        loss_function="l2",
        temperature=temperature,
        expectile=expectile,
        deactivate_vmap=True,
    )
    loss.make_value_estimator(gamma=gamma)
    actor_optimizer = adam(loss.actor_network_params.parameters(), lr)
    schedule = CosineAnnealingLR(actor_optimizer, problem.updates)
    steps = [
        Step("loss_value", loss.value_loss, adam(loss.value_network_params.parameters(), lr)),
        Step("loss_actor", loss.actor_loss, actor_optimizer, schedule=schedule),
        Step("loss_qvalue", loss.qvalue_loss, adam(loss.qvalue_network_params.parameters(), lr)),
    ]
    return Rival(transform_rewards(problem.data, **reward), actor, steps, SoftUpdate(loss, tau=target_rate))
