"""The default network body: standardised observation, MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrl.modules import MLP


class ObservationNorm(nn.Module):
    """``(observation - loc) / scale`` with fixed statistics, saved with the network.

    Args:
        loc: mean of the data's observations, ``[observation_dim]``.
        scale: their standard deviation, ``[observation_dim]``, positive.

    Examples:
        >>> import torch
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
        return (observation - self.loc) / self.scale


class StateMLP(nn.Module):
    """An MLP on the standardised observation and any further inputs, ReLU between layers.

    Args:
        norm: standardises the first input.
        in_features: total size of all inputs.
        out_features: size of the output.
        hidden: widths of the hidden layers.
        layer_norm: LayerNorm before each activation (critics).
        device: where the weights live.

    Examples:
        >>> import torch
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
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm
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
        return self.mlp(torch.cat((self.norm(observation), *inputs), -1))
