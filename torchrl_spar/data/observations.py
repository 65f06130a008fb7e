"""One order for dictionary observations, the same in the data and at evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchrl_spar.errors import InputError


def flatten_observation(observation: Any, *, dtype: Any = np.float32) -> np.ndarray:
    """Joins a (nested) dictionary of arrays along the last axis.

    The order is the entry ``"observation"`` first, then the other keys in
    alphabetical order, nested dictionaries by the same rule. AntMaze gives
    ``observation`` (27), ``achieved_goal`` (2), ``desired_goal`` (2).

    Args:
        observation: an array ``[..., n]``, or a dictionary of such arrays.
        dtype: the result's type, float32 by default; None: the arrays' own.

    Returns:
        One array ``[..., sum of n]``.

    Raises:
        InputError: if a leaf is not numeric, or the leaves differ in their leading axes.

    Source: the order is ours.

    Examples:
        >>> flatten_observation({"goal": np.ones(1), "observation": np.zeros(2)})
        array([0., 0., 1.], dtype=float32)
    """
    if isinstance(observation, dict):
        keys = sorted(observation, key=lambda key: (key != "observation", key))
        parts = [flatten_observation(observation[key], dtype=dtype) for key in keys]
        try:
            return np.concatenate(parts, axis=-1)
        except ValueError as err:
            raise InputError(f"observation keys {keys} do not join into one vector: {err}") from None
    if isinstance(observation, tuple):  # which numpy would stack into an array of another meaning
        raise InputError("observations must be numeric arrays or dictionaries of them, not a tuple")
    array = np.asarray(observation)
    if array.dtype.kind not in "fiub":
        raise InputError(f"observations must be numeric arrays or dictionaries of them, not {array.dtype}")
    return array if dtype is None else array.astype(dtype, copy=False)
