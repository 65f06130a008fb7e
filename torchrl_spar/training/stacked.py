"""Independent runs as one: the losses of several seeds with stacked parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.func import vmap

from torchrl_spar.conventions import check_spar_loss
from torchrl_spar.errors import InputError
from torchrl_spar.objective import SPARLoss


class StackedSPARLoss:
    """S losses of one architecture as one, for :class:`~torchrl_spar.SPARUpdate`.

    Every parameter and buffer gains a first dimension S and ``torch.func.vmap`` runs the terms, so that a GPU that one
    small run leaves idle trains all of them in the same time. Adam and the target updates work element by
    element, so each run stays what it is alone. On a CPU, where one run fills a core, one process a run is faster.

    Args:
        losses: the losses; not changed until :meth:`copy_back`.

    Raises:
        InputError: if there are none, one is no SPARLoss, or they differ in their options, or train head B's decoder
            jointly.

    Source: ours.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import SPARUpdate, make_spar_loss
        >>> losses = [make_spar_loss(3, Bounded(-1, 1, (2,)), joint_vae=False) for _ in range(5)]
        >>> flag = torch.zeros(5, 8, 1, dtype=torch.bool)
        >>> batch = TensorDict({
        ...     "observation": torch.randn(5, 8, 3), "action": torch.rand(5, 8, 2),
        ...     "action_noise": torch.randn(5, 8, 2), "candidate_noise": torch.randn(5, 8, 7, 4),
        ...     "next": {"observation": torch.randn(5, 8, 3), "reward": torch.randn(5, 8, 1),
        ...              "done": flag, "terminated": flag}}, [5, 8])
        >>> stack = StackedSPARLoss(losses)
        >>> SPARUpdate(stack, policy_interval=1)(batch)["loss_actor"].shape
        torch.Size([5])
        >>> stack.copy_back()
    """

    def __init__(self, losses: Sequence[SPARLoss]) -> None:
        if not isinstance(losses, Iterable):
            raise InputError(f"losses: one {type(losses).__name__}; give a list of SPARLosses")
        if not losses:
            raise InputError("losses: give at least one to stack")
        check_spar_loss("losses", *losses)
        if len({repr(sorted(_options(loss).items())) for loss in losses}) != 1:
            raise InputError("the losses to stack differ in their options")
        first = losses[0]
        if first.joint_vae and first.actor_network.is_latent:
            raise InputError("joint_vae=True with head='latent' ties parameters, which a stack would untie")
        self.losses = list(losses)
        self.template = deepcopy(first)  # runs with each run's parameters in turn; its own are not used
        self.params = TensorDict.from_modules(*losses, lazy_stack=False).detach().clone()
        for name, tensor in TensorDict.from_module(first).items(True, True):
            self.params[name].requires_grad_(tensor.requires_grad)
        self.value_mix, self.joint_vae = first.value_mix, first.joint_vae

    def vae_loss(self, batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`SPARLoss.vae_loss` of each run on its batch: ``[S, B]`` to ``[S]``. Noise must be given."""
        return self._each("vae_loss", batch)

    def value_loss(self, batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`SPARLoss.value_loss`, likewise."""
        return self._each("value_loss", batch)

    def qvalue_loss(self, batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`SPARLoss.qvalue_loss`, likewise."""
        return self._each("qvalue_loss", batch)

    def actor_loss(self, batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`SPARLoss.actor_loss`, likewise."""
        return self._each("actor_loss", batch)

    def network_params(self, name: str) -> TensorDictBase:
        """:meth:`SPARLoss.network_params`, stacked."""
        return self.params.get(f"{name}_params")

    def target_params(self, name: str) -> TensorDictBase:
        """:meth:`SPARLoss.target_params`, stacked."""
        return self.params.get(f"target_{name}_params")

    def explain(self, batch: TensorDictBase) -> None:
        """After a failure: :meth:`SPARLoss.explain` for the first run; an error, too, where noise is not given."""
        loss, own = self.losses[0], batch[0]
        loss.explain(own)
        if missing := [key for key in loss.noise_shapes(own) if own.get(key, None) is None]:
            raise InputError(f"the batch lacks {missing}: a stack draws no noise, BatchSampler does")

    @torch.no_grad()
    def copy_back(self) -> None:
        """Copies all parameters to the losses the stack was made of."""
        for loss, params in zip(self.losses, self.params.detach().unbind(0)):
            TensorDict.from_module(loss).data.update_(params)

    def _each(self, name: str, batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        def one(params: TensorDictBase, batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
            with params.to_module(self.template):
                return getattr(self.template, name)(batch)

        return vmap(one)(self.params, batch)


def _options(loss: SPARLoss) -> dict[str, object]:
    plain = {name: value for name, value in vars(loss).items() if isinstance(value, (int, float, str, torch.dtype))}
    return {**plain, "keys": loss.tensor_keys, "value_type": loss.value_type}
