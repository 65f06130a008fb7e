"""The frozen behaviour-cloning policy that SPAR rectifies."""

from __future__ import annotations

from copy import deepcopy

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams, dispatch
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_spar.errors import InputError, check_built, check_policy


class FrozenAnchor(TensorDictModuleBase):
    """Any actor, never trained again: the anchor ``pi_b(s)``.

    The actor is copied, then its parameters become buffers: they carry no gradient, no
    optimiser or target updater finds them, and they are saved in the state dict under the
    actor's own names. Resets leave them alone and the module stays in eval mode.

    The actor runs under ``ExplorationType.DETERMINISTIC``: a probabilistic one gives its mode, and TorchRL's
    ``DiffusionActor`` denoises from a zero latent without noise (repeatable, but no sample of its prior). An actor
    that still draws noise cannot be an anchor, because the residual of an action would change in every update.
    :func:`~torchrl_spar.with_anchor_actions` refuses it; have it denoise from a fixed latent.

    A recurrent actor (TorchRL's ``LSTMModule``) writes its next state under ``"next"``, so collectors run it like
    any other. For training, a batch must hold the recurrent state at the root and under ``"next"``, as TorchRL's
    collectors record it, or the anchor's actions: run the actor along each episode ``[1, T + 1]`` and store
    ``"anchor_action"`` and ``("next", "anchor_action")``.

    Args:
        actor: reads its ``in_keys``, writes ``action_key``; the caller's actor is not touched.
        action_key: where the actor writes its action ``[*B, action_dim]``.
        exploration_type: how the actor is asked; ``ExplorationType.RANDOM`` draws its actions, for
            :class:`~torchrl_spar.FQELoss`.

    Raises:
        InputError: if ``actor`` is not a TensorDictModule, does not write ``action_key`` or has lazy parameters.

    Source: the frozen pure behaviour-cloning policy is the paper's; buffers are ours.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl_spar import FrozenAnchor
        >>> anchor = FrozenAnchor(TensorDictModule(torch.nn.Linear(3, 2), ["observation"], ["action"]))
        >>> anchor(TensorDict({"observation": torch.zeros(5, 3)}, [5]))["action"].shape
        torch.Size([5, 2])
        >>> list(anchor.parameters()), anchor.train().training
        ([], False)
    """

    def __init__(
        self,
        actor: TensorDictModuleBase,
        *,
        action_key: NestedKey = "action",
        exploration_type: ExplorationType = ExplorationType.DETERMINISTIC,
    ) -> None:
        super().__init__()
        check_policy("the anchor", actor, action_key)
        check_built("the anchor", actor)
        self.in_keys = list(actor.in_keys)
        # Recurrent state, read again at the next step.
        self.state_keys = [("next", *_path(key)) for key in actor.in_keys if ("next", *_path(key)) in actor.out_keys]
        self.out_keys = [action_key, *self.state_keys]
        self.action_key = action_key
        self.exploration_type = exploration_type
        self.actor = _freeze(deepcopy(actor))
        self.train(False)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the anchor's action ``[*B, action_dim]`` (and a recurrent anchor's next state), without gradient."""
        scratch = tensordict.select(*self.in_keys)
        with torch.no_grad(), set_exploration_type(self.exploration_type):
            scratch = self.actor(scratch)
        for key in self.out_keys:
            tensordict.set(key, scratch.get(key))
        return tensordict

    def train(self, mode: bool = True) -> FrozenAnchor:
        """Does nothing: the anchor stays in eval mode."""
        return super().train(False)

    def reset_parameters_recursive(self, parameters: TensorDictBase | None = None) -> TensorDictBase | None:
        """Does nothing: the anchor keeps its weights."""
        return parameters


def _path(key: NestedKey) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)


def _keep_parameters() -> None:
    """Replaces ``reset_parameters`` of every frozen layer."""


def _freeze(module: nn.Module) -> nn.Module:
    """Turns the parameters of a module into buffers, in place, tied ones kept tied."""
    frozen: dict[int, torch.Tensor] = {}
    for layer in module.modules():
        if isinstance(layer, TensorDictParams):
            raise InputError(
                "the anchor keeps weights of several networks in a TensorDictParams, as TorchRL's multi-agent networks "
                "do, and these cannot be frozen: give an actor of plain layers"
            )
        for name, parameter in list(layer._parameters.items()):
            if parameter is None:
                continue
            del layer._parameters[name]
            layer.register_buffer(name, frozen.setdefault(id(parameter), parameter.detach().clone()))
        if hasattr(layer, "reset_parameters"):
            # Parents reset their children one by one; only the layer itself can refuse.
            layer.__dict__["reset_parameters"] = _keep_parameters
    return module
