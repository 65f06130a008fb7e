"""Conservative value: the lower bound of an ensemble of critics."""

from __future__ import annotations

from typing import Literal

import torch

Bound = Literal["lcb", "min"]


def lower_bound(values: torch.Tensor, *, bound: Bound = "lcb", kappa: float = 1.0) -> torch.Tensor:
    """A pessimistic estimate from an ensemble.

    ``"lcb"`` is ``mean_e - kappa * std_e`` (population standard deviation), ``"min"`` the
    ensemble's minimum (twin minimum with two critics).

    Args:
        values: one estimate a critic, ``[E, *B]``.
        bound: which lower bound.
        kappa: standard deviations below the mean (``"lcb"`` only); 0 gives the mean.

    Returns:
        The estimate, ``[*B]``.

    Source: that the value is conservative is the paper's; this bound is ours.

    Examples:
        >>> lower_bound(torch.tensor([[1.0], [3.0]])), lower_bound(torch.tensor([[1.0], [3.0]]), bound="min")
        (tensor([1.]), tensor([1.]))
    """
    if bound == "min":
        return values.amin(0)
    return values.mean(0) - kappa * spread(values)


def spread(values: torch.Tensor) -> torch.Tensor:
    """Population standard deviation of ``values`` over the first dimension, ``[E, *B]`` to ``[*B]``.

    Examples:
        >>> spread(torch.tensor([[1.0], [3.0]]))
        tensor([1.])
    """
    # values.std(0) is slow here: it walks a short first dimension one element at a time.
    return (values - values.mean(0)).pow(2).mean(0).sqrt()
