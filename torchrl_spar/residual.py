"""The residual on the anchor: the data's residuals (a VAE), the head that learns them, the actor that adds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import (
    AddStateIndependentNormalScale,
    NormalParamExtractor,
    TensorDictModule,
    TensorDictModuleBase,
    dispatch,
)
from torch import nn
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded

from torchrl_spar.anchor import FrozenAnchor
from torchrl_spar.errors import InputError, check_bounds, check_built, check_module
from torchrl_spar.networks import functional_of

LOG_STD_RANGE = (-4.0, 4.0)
# TorchRL's modules that write a mean and a standard deviation.
SCALES = (NormalParamExtractor, AddStateIndependentNormalScale)


class GaussianEncoder(nn.Module):
    """Splits a network's output into a mean and a clamped log standard deviation.

    Args:
        network: maps its inputs to ``[*B, 2 * latent_dim]``.

    Source: ours; the clamp keeps the KL finite.

    Examples:
        >>> import torch
        >>> from torchrl_spar import GaussianEncoder
        >>> loc, log_std = GaussianEncoder(torch.nn.Linear(3, 8))(torch.zeros(5, 3))
        >>> loc.shape, log_std.shape
        (torch.Size([5, 4]), torch.Size([5, 4]))
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation, both ``[*B, latent_dim]``."""
        return self._split(self.network(*inputs))

    @property
    def functional(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
        """``functional(params, *inputs)`` where the network has it, see ``StateMLP.functional``; else None."""
        network = functional_of(self.network)
        return network and (lambda params, *inputs: self._split(network(params["network"], *inputs)))

    @staticmethod
    def _split(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loc, log_std = output.chunk(2, -1)
        return loc, log_std.clamp(*LOG_STD_RANGE)


class ResidualVAE(TensorDictModuleBase):
    """A conditional VAE over scaled residuals: the data's manifold of corrections to the anchor.

    Args:
        encoder: ``q(z | s, a_b, r)``: writes the mean and the log standard deviation of the
            latent, by default ``(observation, anchor_action, residual) -> (latent_loc, latent_log_std)``.
        decoder: ``g(s, a_b, z)``: by default ``(observation, anchor_action, latent) -> residual``.
        latent_key: where the latent ``[*B, latent_dim]`` lies.

    Raises:
        InputError: if the encoder does not write two entries, or a standard deviation instead of its logarithm, as far
            as its key or TorchRL's modules tell.

    Source: that residuals are sampled in a latent space is the paper's; the VAE is ours.

    Examples:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import make_spar_loss
        >>> vae = make_spar_loss(3, Bounded(-1, 1, (2,))).residual_vae
        >>> action = torch.zeros(5, 2)
        >>> vae(observation=torch.zeros(5, 3), anchor_action=action, residual=action)[2].shape  # mean, log std, latent
        torch.Size([5, 4])
    """

    def __init__(
        self, encoder: TensorDictModuleBase, decoder: TensorDictModuleBase, *, latent_key: NestedKey = "latent"
    ) -> None:
        super().__init__()
        check_module("encoder", encoder)
        check_module("decoder", decoder)
        if len(encoder.out_keys) < 2:
            raise InputError(f"the encoder must write a mean and a log standard deviation, not {encoder.out_keys}")
        name = encoder.out_keys[1] if isinstance(encoder.out_keys[1], str) else encoder.out_keys[1][-1]
        is_log = "log" in name or "ln" in name or any(isinstance(part, GaussianEncoder) for part in encoder.modules())
        if ("scale" in name or "std" in name) and not is_log:
            raise InputError(
                f"the encoder writes {encoder.out_keys[1]!r}, where the logarithm of a standard deviation belongs: put "
                "GaussianEncoder around the network; if it is the logarithm, name it so, as 'latent_log_std'"
            )
        if scales := [type(part).__name__ for part in encoder.modules() if isinstance(part, SCALES)]:
            raise InputError(
                f"the encoder ends in {scales[0]}, which gives a standard deviation; its logarithm belongs there: "
                "put GaussianEncoder around the network instead"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.latent_key = latent_key
        self.in_keys = list(encoder.in_keys)
        self.out_keys = [*encoder.out_keys, latent_key, *decoder.out_keys]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Encodes, samples the latent, and overwrites the residual with its reconstruction."""
        tensordict = self.encoder(tensordict)
        loc, log_std = (tensordict.get(key) for key in self.encoder.out_keys[:2])
        tensordict.set(self.latent_key, loc + log_std.exp() * torch.randn_like(loc))
        return self.decoder(tensordict)


class ResidualHead(TensorDictModule):
    """The learned rectification ``Delta(s, a_b)``, starting at (almost) zero.

    Head A, the default, writes the scaled residual itself. Head B writes a latent that the
    VAE's decoder turns into the residual, so that the policy stays on the decoder's image.

    Args:
        network: maps (observation, anchor action) to ``[*B, action_dim]`` (A) or ``[*B, latent_dim]`` (B).
        in_keys: what the network reads, in order.
        out_keys: one key: ``["residual"]`` (A) or ``["latent"]`` (B).
        init_scale: factor on the last linear layer, at construction and at every reset.

    Raises:
        InputError: for lazy parameters.

    Source: the residual on the anchor is the paper's; heads A and B and the small start are ours.

    Examples:
        >>> import torch
        >>> from torchrl_spar import ResidualHead
        >>> net = torch.nn.Sequential(torch.nn.Linear(5, 2))
        >>> head = ResidualHead(net, in_keys=["state_and_anchor"], out_keys=["residual"])
        >>> bool(head(state_and_anchor=torch.ones(1, 5)).abs().max() < 0.1)
        True
    """

    def __init__(
        self,
        network: nn.Module,
        in_keys: list[NestedKey] | None = None,
        out_keys: list[NestedKey] | None = None,
        *,
        init_scale: float = 0.01,
    ) -> None:
        super().__init__(network, in_keys or ["observation", "anchor_action"], out_keys or ["residual"])
        check_built("the head", network)
        self.init_scale = init_scale
        self._shrink()

    def _shrink(self) -> None:
        last = [layer for layer in self.module.modules() if isinstance(layer, nn.Linear)][-1:]
        with torch.no_grad():
            for layer in last:
                layer.weight.mul_(self.init_scale)
                if layer.bias is not None:
                    layer.bias.mul_(self.init_scale)

    def reset_parameters(self) -> None:
        """Draws new weights and shrinks the last layer again."""
        super().reset_parameters_recursive()
        self._shrink()

    def reset_parameters_recursive(self, parameters: TensorDictBase | None = None) -> TensorDictBase | None:
        """See :meth:`reset_parameters`; an :class:`~torchrl_spar.InputError` with ``parameters``."""
        if parameters is not None:
            raise InputError("ResidualHead resets its own parameters: call it without 'parameters'")
        self.reset_parameters()
        return None


class SPARActor(TensorDictModuleBase):
    """The policy ``pi(s) = clamp(a_b + rho * Delta(s, a_b), low, high)`` with ``a_b = pi_b(s)``.

    Reads the observation, writes the action alone (a recurrent anchor's state beside it), so it serves as the
    ``policy`` of any TorchRL collector. The residual is in units of ``rho``, the data's residual scale.

    Args:
        anchor: the frozen behaviour policy; any other actor is wrapped in :class:`FrozenAnchor`.
        head: writes ``residual_key`` (head A), or the decoder's latent (head B).
        action_spec: the action bounds, ``[action_dim]``; a Composite is read at the anchor's action key.
        decoder: the VAE's decoder, with head B only.
        residual_scale: ``rho`` ``[action_dim]`` in action units; ones by default, set by
            :func:`~torchrl_spar.fit_vae`.
        anchor_action_key: where the head reads ``a_b``.
        residual_key: where the head (A) or the decoder (B) writes ``Delta``.

    Raises:
        InputError: if the spec is not bounded, or the head does not write what it must.

    Source: the policy's form is the paper's; scale and clamp are ours.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import MLP
        >>> from torchrl_spar import ResidualHead, SPARActor
        >>> behaviour = TensorDictModule(torch.nn.Linear(3, 2), ["observation"], ["action"])
        >>> head = ResidualHead(MLP(5, 2))  # an MLP joins its inputs
        >>> actor = SPARActor(behaviour, head, action_spec=Bounded(-1, 1, (2,)))
        >>> actor(observation=torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """

    low: torch.Tensor
    high: torch.Tensor
    residual_scale: torch.Tensor
    # Sizes of the default networks, from which save_policy's file is read again; None for others.
    architecture: dict[str, Any] | None = None

    def __init__(
        self,
        anchor: TensorDictModuleBase,
        head: TensorDictModuleBase,
        *,
        action_spec: TensorSpec,
        decoder: TensorDictModuleBase | None = None,
        residual_scale: torch.Tensor | None = None,
        anchor_action_key: NestedKey = "anchor_action",
        residual_key: NestedKey = "residual",
    ) -> None:
        super().__init__()
        self.anchor = anchor if isinstance(anchor, FrozenAnchor) else FrozenAnchor(anchor)
        self.action_key = self.anchor.action_key
        self.head = head
        self.decoder = decoder
        self.anchor_action_key = anchor_action_key
        self.residual_key = residual_key
        last = head if decoder is None else decoder
        check_module("head", head)
        check_module("decoder", last)
        if residual_key not in last.out_keys:
            raise InputError(f"the residual head must write {residual_key!r}; out_keys are {last.out_keys}")
        low, high = action_bounds(action_spec, self.action_key)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        scale = torch.ones_like(low) if residual_scale is None else residual_scale.detach().to(low).clone()
        self.register_buffer("residual_scale", scale)
        internal = {anchor_action_key, residual_key, *head.out_keys}
        read = [*self.anchor.in_keys, *head.in_keys, *(decoder.in_keys if decoder is not None else [])]
        self.in_keys = [key for key in dict.fromkeys(read) if key not in internal]
        self.out_keys = list(self.anchor.out_keys)

    @property
    def is_latent(self) -> bool:
        """Whether the head works in the latent space (head B)."""
        return self.decoder is not None

    def compose(self, anchor_action: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The executed action for ``a_b`` and a scaled residual, all ``[*B, action_dim]``."""
        return (anchor_action + self.residual_scale * residual).clamp(self.low, self.high)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action ``[*B, action_dim]`` (and a recurrent anchor's next state)."""
        scratch = tensordict.select(*self.in_keys)
        anchored = self.anchor(scratch.select(*self.anchor.in_keys))
        anchor_action = anchored.get(self.action_key)
        for key in self.anchor.state_keys:
            tensordict.set(key, anchored.get(key))
        scratch = self.head(scratch.set(self.anchor_action_key, anchor_action))
        if self.decoder is not None:
            scratch = self.decoder(scratch)
        return tensordict.set(self.action_key, self.compose(anchor_action, scratch.get(self.residual_key)))


def action_bounds(action_spec: TensorSpec, action_key: NestedKey = "action") -> tuple[torch.Tensor, torch.Tensor]:
    """The finite bounds of an action spec, as floating-point tensors ``[action_dim]``.

    Args:
        action_spec: ``[..., action_dim]``, or a Composite that holds it.
        action_key: where it lies in a Composite.

    Raises:
        InputError: if the spec is not a continuous spec with finite bounds; it says why one is needed.

    Examples:
        >>> action_bounds(Bounded(-1, 2, (2,)))
        (tensor([-1., -1.]), tensor([2., 2.]))
    """
    if isinstance(action_spec, Composite):
        if action_key not in action_spec.keys(True, True):
            raise InputError(f"action_spec has no {action_key!r}; its keys are {list(action_spec.keys(True, True))}")
        action_spec = action_spec[action_key]
    kind = type(action_spec).__name__
    if isinstance(action_spec, TensorSpec) and not action_spec.dtype.is_floating_point:
        raise InputError(
            f"action_spec: {kind} of {action_spec.dtype}: SPAR adds a residual to the anchor's action, "
            "which discrete actions cannot carry; it needs a continuous torchrl.data.Bounded"
        )
    if isinstance(action_spec, Unbounded):
        raise InputError(
            "action_spec: Unbounded: SPAR clamps its actions, and measures noise and residuals in the actions' range; "
            "give a torchrl.data.Bounded with the least and the largest action of the data"
        )
    if not isinstance(action_spec, Bounded) or action_spec.ndim < 1:
        shape = f" of shape {tuple(action_spec.shape)}" if isinstance(action_spec, Bounded) else ""
        raise InputError(f"action_spec must be a torchrl.data.Bounded of shape [action_dim], not a {kind}{shape}")
    # Batched environments repeat the bounds along leading dimensions.
    bounds = [bound.flatten(0, -2) if bound.ndim > 1 else bound[None] for bound in action_spec.space]
    if not all((bound == bound[0]).all() for bound in bounds):
        raise InputError(f"action_spec: bounds differ along its leading dimensions, {tuple(action_spec.shape[:-1])}")
    # The networks' type, which Gymnasium's float64 spaces do not have.
    low, high = (bound[0].to(torch.get_default_dtype(), copy=True) for bound in bounds)
    check_bounds("action_spec", low, high)
    return low, high
