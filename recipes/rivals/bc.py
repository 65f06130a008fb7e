"""Behaviour cloning of all episodes or the best (10%BC, https://arxiv.org/abs/2106.01345): TorchRL's BCLoss."""

from __future__ import annotations

import warnings

from tensordict.nn import TensorDictModuleBase
from torchrl.objectives import BCLoss

from rivals.base import Problem, Rival, Step, adam
from rivals.batches import keep_best_episodes


def cloning_loss(actor: TensorDictModuleBase) -> BCLoss:
    with warnings.catch_warnings():
        # BCLoss has no target; TorchRL warns that it is not annotated.
        warnings.filterwarnings("ignore", message="The name target_actor_network_params")
        return BCLoss(actor)


def build(problem: Problem, *, lr: float, share: float) -> Rival:
    """
    Args:
        lr: learning rate.
        share: of the episodes, the best by return, that are cloned.
    """
    actor = problem.networks.deterministic_actor()
    loss = cloning_loss(actor)
    data = problem.data if share == 1 else keep_best_episodes(problem.data, share)
    step = Step("loss_bc", lambda batch: (loss(batch)["loss_bc"], {}), adam(loss.parameters(), lr))
    return Rival(data, actor, [step])
