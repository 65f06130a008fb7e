"""CQL (https://arxiv.org/abs/2006.04779): TorchRL's CQLLoss.

TorchRL's penalty is a mean of ten log-sum-exps over three actions each (a random one and one of the policy at either
end of the transition), where the paper's is one log-sum-exp over all thirty.
"""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives import CQLLoss, SoftUpdate

from rivals.base import Problem, Rival, Step, adam
from rivals.batches import transform_rewards
from torchrl_spar import InputError


def build(
    problem: Problem,
    *,
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
        qvalue_lr: learning rate of the critics.
        actor_lr: learning rate of the actor and of the entropy's weight.
        min_q_weight: weight of the conservative penalty.
        num_random: actions sampled of each kind for it.
        max_q_backup: whether to bootstrap from the best of `num_random` sampled actions.
        target_rate: Polyak rate of the target critics.
        reward: see `transform_rewards`.
        gamma: discount.
    """
    networks = problem.networks
    if not (networks.low == -1).all() or not (networks.high == 1).all():
        raise InputError("method=cql: TorchRL's loss draws its random actions from -1 to 1, this data has other bounds")
    actor = networks.squashed_actor()
    loss = CQLLoss(
        actor,
        networks.critics(2, layer_norm=False),
        loss_function="l2",
        action_spec=problem.data.action_spec,
        min_q_weight=min_q_weight,
        num_random=num_random,
        max_q_backup=max_q_backup,
        deactivate_vmap=True,
    )
    loss.make_value_estimator(gamma=gamma)

    def actor_loss(batch: TensorDictBase) -> tuple[Tensor, Any]:
        value, metadata = loss.actor_loss(batch)
        # The entropy's weight is detached in the one, the entropy in the other: the sum moves each by its own.
        alpha_loss, _ = loss.alpha_loss(metadata, mask_tensordict=batch)
        return value + alpha_loss, {"entropy": -metadata["_log_prob"]}

    def qvalue_loss(batch: TensorDictBase) -> tuple[Tensor, Any]:
        batch = batch.clone(False)  # TorchRL leaves predictions with their graph in it
        value, _ = loss.q_loss(batch)
        penalty, _ = loss.cql_loss(batch)
        return value + penalty, {"loss_cql": penalty, "pred_value": batch["pred_q1"]}

    actor_params = [*loss.actor_network_params.parameters(), loss.log_alpha]
    qvalue_optimizer = adam(loss.qvalue_network_params.parameters(), qvalue_lr)
    steps = [
        Step("loss_actor", actor_loss, adam(actor_params, actor_lr), metrics=("entropy",)),
        Step("loss_qvalue", qvalue_loss, qvalue_optimizer, metrics=("loss_cql", "pred_value")),
    ]
    return Rival(transform_rewards(problem.data, **reward), actor, steps, SoftUpdate(loss, tau=target_rate))
