"""The FQE losses of several policies as one: their critics stacked, on the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.func import vmap

from torchrl_spar.ope.fqe_loss import FQELoss

PARAMS, TARGETS = "qvalue_network_params", "target_qvalue_network_params"


class StackedFQELoss:
    """P losses that differ in their policies and critics alone.

    Adam, Polyak averages and the loss itself work on each policy's critics by themselves, so they become what they
    are alone, up to rounding.

    Args:
        losses: not changed until :meth:`copy_back`.
        target_rate: of the Polyak averages.
    """

    def __init__(self, losses: Sequence[FQELoss], target_rate: float) -> None:
        self.losses, self.target_rate = losses, target_rate
        self.template = deepcopy(losses[0])  # runs with each loss's critics in turn; its own are not used
        self.template.critics_at_once = True
        critics = torch.stack([loss.qvalue_network_params.data for loss in losses])
        # Targets begin as copies, as TorchRL's SoftUpdate has them.
        self.stack = TensorDict({PARAMS: critics, TARGETS: critics.clone()}, [len(losses)])
        trained = [key for key, tensor in losses[0].qvalue_network_params.items(True, True) if tensor.requires_grad]
        self.qvalue_network_params = nn.ParameterList([self.stack[PARAMS][key] for key in trained])
        for key, param in zip(trained, self.qvalue_network_params):
            self.stack[PARAMS].set(key, param)

    def qvalue_loss(self, batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`FQELoss.qvalue_loss` summed over the policies; metadata ``[P]``.

        Args:
            batch: with ``policy_action`` ``[*B, P, action_dim]`` of its states and, under ``"next"``, the next ones.
        """

        def one(params: TensorDictBase, now: Tensor, following: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            own = batch.copy().set("policy_action", now).set(("next", "policy_action"), following)
            with params.to_module(self.template):
                return self.template.qvalue_loss(own)

        actions = batch["policy_action"], batch["next", "policy_action"]
        loss, metadata = vmap(one, in_dims=(0, -2, -2))(self.stack, *actions)
        return loss.sum(), metadata

    @torch.no_grad()
    def update_targets(self) -> None:
        """One Polyak step."""
        self.stack[TARGETS].data.lerp_(self.stack[PARAMS].data, self.target_rate)

    @torch.no_grad()
    def copy_back(self) -> None:
        """Copies critics and targets to the losses."""
        for name in (PARAMS, TARGETS):
            for loss, own in zip(self.losses, self.stack[name].data.unbind(0)):
                loss._modules[name].data.copy_(own)
