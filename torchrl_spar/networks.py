"""The default network body: standardised observation and action, MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchrl.modules import MLP


def functional_of(network: Any) -> Callable[..., Any] | None:
    """``network.functional``, its call with other parameters, if it equals a call of the network; else None.

    It does not where a subclass overrides ``forward`` alone, or where a hook is registered.

    Examples:
        >>> functional_of(nn.Linear(3, 2)) is None
        True
    """
    return network.functional if _is_its_forward(type(network)) and not _is_hooked(network) else None


def _is_its_forward(kind: type) -> bool:
    """Whether the class that defines ``forward`` defines ``functional``, too."""
    first = next((cls for cls in kind.__mro__ if "forward" in vars(cls) or "functional" in vars(cls)), kind)
    return "functional" in vars(first)


def _is_hooked(module: nn.Module) -> bool:
    own = module.__dict__
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


class ObservationNorm(nn.Module):
    """``(observation - loc) / scale`` with fixed statistics, saved with the network.

    Args:
        loc: mean of the data's observations, ``[observation_dim]``; in float64 where float32 is too coarse for them.
        scale: their standard deviation, ``[observation_dim]``, positive, in the type of the output.

    Source: the field's habit.

    Examples:
        >>> ObservationNorm(torch.tensor([1.0]), torch.tensor([2.0]))(torch.tensor([[5.0]]))
        tensor([[2.]])
    """

    loc: torch.Tensor
    scale: torch.Tensor

    def __init__(self, loc: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """The standardised observation ``[*B, observation_dim]``."""
        return _standardised(observation, self.loc, self.scale)


def _standardised(observation: torch.Tensor, loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if observation.shape[-1] != loc.shape[-1]:  # a single column would be repeated in silence
        raise RuntimeError(f"observations have size {observation.shape[-1]}, the network reads {loc.shape[-1]}")
    return ((observation - loc) / scale).to(scale.dtype)


class ActionNorm(nn.Module):
    """An action in half ranges from the middle of its bounds, so that networks read it in whatever unit it is.

    Args:
        low: least action, ``[action_dim]``.
        high: greatest action, ``[action_dim]``.

    Source: ours.

    Examples:
        >>> ActionNorm(torch.tensor([0.0]), torch.tensor([40.0]))(torch.tensor([[10.0]]))
        tensor([[-0.5000]])
    """

    loc: torch.Tensor
    scale: torch.Tensor

    def __init__(self, low: torch.Tensor, high: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("loc", low / 2 + high / 2)
        self.register_buffer("scale", high / 2 - low / 2)

    def forward(self, action: torch.Tensor) -> torch.Tensor:
        """The same action ``[*B, action_dim]``, between -1 and 1 within the bounds."""
        return (action - self.loc) / self.scale


KNOWN = {ObservationNorm, ActionNorm, MLP, nn.Linear, nn.LayerNorm, nn.ReLU}


class StateMLP(nn.Module):
    """An MLP on the standardised observation and any further inputs, an action first, ReLU between layers.

    Args:
        norm: standardises the first input.
        in_features: total size of all inputs.
        out_features: size of the output.
        hidden: widths of the hidden layers.
        layer_norm: LayerNorm before each activation (critics).
        action_norm: scales the second input; None leaves it as it is.
        device: where the weights live.

    Examples:
        >>> net = StateMLP(ObservationNorm(torch.zeros(3), torch.ones(3)), 3 + 2, 1, hidden=[8])
        >>> net(torch.zeros(5, 3), torch.zeros(5, 2)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        norm: ObservationNorm,
        in_features: int,
        out_features: int,
        *,
        hidden: Sequence[int],
        layer_norm: bool = False,
        action_norm: ActionNorm | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.action_norm = action_norm
        self.mlp = MLP(
            in_features,
            out_features,
            num_cells=list(hidden),
            activation_class=nn.ReLU,
            norm_class=nn.LayerNorm if layer_norm else None,
            norm_kwargs=[{"normalized_shape": width} for width in hidden] if layer_norm else None,
            device=device,
        )

    def forward(self, observation: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """``[*B, out_features]`` of the raw observation ``[*B, observation_dim]`` and ``[*B, features]`` each."""
        if self.action_norm is not None:
            inputs = self.action_norm(inputs[0]), *inputs[1:]
        return self.mlp(torch.cat((self.norm(observation), *inputs), -1))

    @property
    def functional(self) -> Callable[..., torch.Tensor] | None:
        """:meth:`call_with`, if norm and layers are of the types it knows; None if one was replaced."""
        parts = self.norm, *([] if self.action_norm is None else [self.action_norm]), self.mlp, *self.mlp
        known = all(type(part) in KNOWN and not _is_hooked(part) for part in parts)
        return self.call_with if known else None

    def call_with(
        self,
        params: Mapping[str, Any],
        observation: torch.Tensor,
        *inputs: torch.Tensor,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The same with other parameters, for inputs that may repeat the observation along leading dimensions.

        Args:
            params: this module's parameters and buffers as a nested dict.
            observation: ``[*B, observation_dim]``.
            *inputs: ``[*B, features]`` and, after those, ``[*L, *B, features]``, all with the same leading ``L``.
            dtype: what the hidden layers are computed in, without gradient; by default the parameters' own type.

        Examples:
            >>> from tensordict import TensorDict
            >>> net = StateMLP(ObservationNorm(torch.zeros(3), torch.ones(3)), 3 + 2, 1, hidden=[8])
            >>> params = TensorDict.from_module(net).to_dict()
            >>> net.call_with(params, torch.zeros(5, 3), torch.zeros(7, 5, 2)).shape
            torch.Size([7, 5, 1])
        """
        norm, layers = params["norm"], params["mlp"]
        out = _standardised(observation, norm["loc"], norm["scale"])
        if self.action_norm is not None:
            unit = params["action_norm"]
            inputs = (inputs[0] - unit["loc"]) / unit["scale"], *inputs[1:]
        last = len(self.mlp) - 1
        for index, layer in enumerate(self.mlp):
            own = layers.get(str(index))
            if own is not None and dtype is not None and index < last:
                own = {name: value.to(dtype) for name, value in own.items()}
            if index == 0:
                parts = [part if dtype is None else part.to(dtype) for part in (out, *inputs)]
                out = _linear_of_parts(parts, own["weight"], own["bias"])
            elif isinstance(layer, nn.Linear):
                # Small differences of outputs matter, so the last layer keeps the precision of the weights.
                out = F.linear(out.to(own["weight"].dtype), own["weight"], own["bias"])
            elif isinstance(layer, nn.LayerNorm):
                out = F.layer_norm(out, layer.normalized_shape, own["weight"], own["bias"], layer.eps)
            else:
                # In place: neither a linear layer nor a LayerNorm needs its output for its gradient.
                out = F.relu_(out)
        return out


def _linear_of_parts(parts: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``linear(cat(parts))``. The share of first parts with fewer dims is computed once and repeated."""
    rank = max(part.ndim for part in parts)
    first = next(index for index, part in enumerate(parts) if part.ndim == rank)
    if first == 0:
        return F.linear(_cat(parts), weight, bias)
    columns = sum(part.shape[-1] for part in parts[:first])
    once = F.linear(_cat(parts[:first]), weight[:, :columns], bias)
    return F.linear(_cat(parts[first:]), weight[:, columns:]).add_(once)


def _cat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), -1)
