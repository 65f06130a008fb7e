"""Behaviour cloning of all episodes or the best (10%BC, https://arxiv.org/abs/2106.01345): as TorchRL's BCLoss."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.functional import mse_loss

from rivals.base import Problem, Rival
from rivals.batches import keep_best_episodes
from rivals.models import squash


def build(problem: Problem, *, lr: float, share: float) -> Rival:
    """
    Args:
        lr: learning rate.
        share: of the episodes, the best by return, that are cloned.
    """
    networks = problem.networks()
    actor = networks.deterministic_actor()

    def loss(batch: TensorDictBase) -> tuple[Tensor, dict[str, Any]]:
        action = squash(actor[0].module(batch["observation"]), networks.low, networks.high)
        return mse_loss(action, batch["action"]), {}

    data = problem.data if share == 1 else keep_best_episodes(problem.data, share)
    return Rival(data, actor, [problem.step("loss_bc", loss, actor.parameters(), lr)])
