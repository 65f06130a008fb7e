"""Measures of where a policy update points and how far its actions are from the data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torchrl_spar.errors import InputError

# Distances held at once: a block of 2**24 takes 64 MB in float32.
DISTANCES_PER_BLOCK = 2**24


def tangent_normal_split(vector: Tensor, tangent_basis: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of a vector along a manifold and off it (orthogonal projection).

    Args:
        vector: e.g. an update of the action, ``[*B, d]``.
        tangent_basis: columns that span the tangent space, ``[d, m]`` or ``[*B, d, m]``; they need be neither
            orthogonal nor of unit length, and may be dependent.

    Returns:
        The tangent and the normal part, both ``[*B, d]``; their sum is ``vector``.

    Raises:
        InputError: if the basis is not of shape ``[..., d, m]``.

    Source: ours, to measure the paper's manifold-normal drift.

    Examples:
        >>> import torch
        >>> tangent_normal_split(torch.tensor([3.0, 4.0]), torch.tensor([[2.0], [0.0]]))
        (tensor([3., 0.]), tensor([0., 4.]))
    """
    if tangent_basis.ndim < 2 or tangent_basis.shape[-2] != vector.shape[-1]:
        raise InputError(
            f"tangent_basis has shape {tuple(tangent_basis.shape)}; vectors of size {vector.shape[-1]} need "
            f"[..., {vector.shape[-1]}, m], one column a tangent"
        )
    # The pseudo-inverse, not QR: it takes dependent columns.
    coordinates = torch.linalg.pinv(tangent_basis) @ vector.unsqueeze(-1)
    tangent = (tangent_basis @ coordinates).squeeze(-1)
    return tangent, vector - tangent


def normal_share(vector: Tensor, tangent_basis: Tensor) -> Tensor:
    """How much of some updates points off a manifold: rms length of the normal parts over that of the whole.

    Args:
        vector: updates, ``[*B, d]``.
        tangent_basis: see :func:`tangent_normal_split`.

    Returns:
        A number between 0 (along the manifold) and 1 (straight off it); 0 where all vectors are zero.

    Raises:
        InputError: if the basis is not of shape ``[..., d, m]``.

    Source: ours.

    Examples:
        >>> import torch
        >>> normal_share(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[1.0], [0.0]]))
        tensor(0.8000)
    """
    _, normal = tangent_normal_split(vector, tangent_basis)
    return normal.norm() / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)


def support_distance(samples: Tensor, reference: Tensor, *, k: int = 1) -> Tensor:
    """Mean Euclidean distance of each sample to its k nearest rows of a data set.

    Args:
        samples: ``[N, d]``, e.g. standardised states and the policy's actions side by side.
        reference: the data in the same units, ``[M, d]``, M at least k.
        k: neighbours.

    Returns:
        Distances ``[N]``, in the units of the inputs.

    Raises:
        InputError: if the sizes do not fit, or there are fewer than k rows.

    Source: ours.

    Examples:
        >>> import torch
        >>> data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
        >>> support_distance(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), data, k=2)
        tensor([0.5000, 2.5000])
    """
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise InputError(
            f"samples {tuple(samples.shape)} and reference {tuple(reference.shape)} must be [N, d] and [M, d]"
        )
    if not 1 <= k <= len(reference):
        raise InputError(f"k={k}: must be between 1 and the {len(reference)} rows of reference")
    rows = max(1, DISTANCES_PER_BLOCK // len(reference))
    # The exact mode: by matrix products, small distances are lost to cancellation.
    exact = "donot_use_mm_for_euclid_dist"
    blocks = [torch.cdist(block, reference, compute_mode=exact) for block in samples.split(rows)]
    return torch.cat([block.topk(k, largest=False).values.mean(1) for block in blocks])


def gradient_cosine(first: Tensor, second: Tensor, params: Iterable[Tensor]) -> Tensor:
    """Cosine between the gradients of two losses: negative where a step on one raises the other.

    Args:
        first: a scalar loss.
        second: another; their graphs are kept.
        params: what both are differentiated by, all in one vector; one that a loss does not reach counts as zero.

    Returns:
        A scalar; 0 where a gradient vanishes.

    Source: ours, to measure the paper's conflict between fitting and improving.

    Examples:
        >>> import torch
        >>> x = torch.tensor([1.0, 0.0], requires_grad=True)
        >>> gradient_cosine((x - 2).pow(2).sum(), x.pow(2).sum(), [x])
        tensor(-0.4472)
    """
    params = list(params)
    one, other = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)])
        for loss in (first, second)
    )
    return torch.cosine_similarity(one, other, dim=0)
