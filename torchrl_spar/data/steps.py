"""The steps of any source as clean arrays: types, shapes and finite numbers checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from torchrl_spar.errors import InputError

# Beyond it the squares and sums of training overflow float32; no unit of measurement needs it.
LARGEST = 1e15
# A column stays in float64 where float32's spacing is over this share of its range.
PRECISION = 1e-4


@dataclass
class Steps:
    """A source's ``n`` steps, checked, its episodes one after the other.

    ``known`` says where the next observation is known; elsewhere ``next_observation`` is a
    placeholder. Rewards keep the source's precision, for the returns.
    """

    observation: np.ndarray  # float32 [n, observation_dim], float64 where float32 would lose a column
    action: np.ndarray  # float32 [n, action_dim]
    reward: np.ndarray  # float64 [n]
    terminated: np.ndarray  # bool [n]
    truncated: np.ndarray  # bool [n]
    next_observation: np.ndarray  # as observation
    known: np.ndarray  # bool [n]
    episode: np.ndarray  # int64 [n], from 0
    action_bounds: tuple[np.ndarray, np.ndarray]  # low and high [action_dim]
    bounds_are_guessed: bool = False  # from the actions themselves
    env_id: str | None = None
    env_kwargs: Mapping[str, Any] | None = None  # of gymnasium.make
    success: np.ndarray | None = None  # bool [n], where the source records it and was asked for it
    notes: tuple[str, ...] = ()  # what the user is warned of
    row: np.ndarray | None = None  # int64 [n], in the source; None: as they are here
    ordered: bool = True  # else ``episode`` means nothing


def clean(raw: dict[str, tuple[str, np.ndarray]]) -> dict[str, Any]:
    """Checks ``field -> (its name in the source, array)`` and casts to the types of :class:`Steps`.

    Empties ``raw``, so that a large set is not in memory twice.
    """
    labels = {field: label for field, (label, _) in raw.items()}
    for label, array in raw.values():
        if not array.ndim:
            raise InputError(f"{label}: a single value of type {array.dtype}, expected an array with a row a step")
    lengths = {label: len(array) for label, array in raw.values()}
    if len(set(lengths.values())) > 1:
        raise InputError("arrays of different lengths: " + ", ".join(f"{key} {n}" for key, n in lengths.items()))
    if not all(lengths.values()):
        raise InputError("the data set holds no step")
    wide = any(needs_float64(raw[field][1]) for field in ("observation", "next_observation") if field in raw)
    observations = partial(_vectors, dtype=np.float64) if wide else _vectors
    casts = _CASTS | {"observation": observations, "next_observation": observations}
    fields = {field: casts[field](*raw.pop(field)) for field in labels}
    width, next_width = (fields.get(key, fields["observation"]).shape[1] for key in ("observation", "next_observation"))
    if width != next_width:
        raise InputError(f"{labels['observation']}: {width} dimensions, {labels['next_observation']}: {next_width}")
    for field in ("observation", "action"):
        if not fields[field].any():
            raise InputError(
                f"{labels[field]}: all {len(fields[field])} rows are exactly zero. TorchRL's MinariExperienceReplay "
                "returns such zeros silently; if this data passed through it, load the source itself with "
                "load_offline_dataset"
            )
    fields.setdefault("truncated", np.zeros_like(fields["terminated"]))
    # What is done but not terminated is a time limit.
    fields["truncated"] = fields["truncated"] | (fields.pop("done", False) & ~fields["terminated"])
    return fields


def needs_float64(array: np.ndarray) -> bool:
    """Whether float32 would lose the variation of a column of observations ``[n, d]``, such as 1e5 +- 0.05.

    Examples:
        >>> needs_float64(1e5 + np.array([[0.01], [0.02]])), needs_float64(np.array([[0.1], [0.2]]))
        (True, False)
    """
    if array.ndim != 2 or not array.size or array.dtype.kind not in "fiu" or np.can_cast(array.dtype, np.float32):
        return False
    columns = columns_in_need(array.min(axis=0), array.max(axis=0))
    return any((array[:, column].astype(np.float32) != array[:, column]).any() for column in np.flatnonzero(columns))


def columns_in_need(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Columns whose ranges need more than float32, bool ``[d]``; constant columns do not.

    Examples:
        >>> columns_in_need(np.array([1e5, 0.0, 0.1]), np.array([1e5 + 0.2, 1.0, 0.1]))
        array([ True, False, False])
    """
    low, high = low.astype(np.float64), high.astype(np.float64)
    size, span = np.maximum(np.abs(low), np.abs(high)), high - low
    with np.errstate(over="ignore", invalid="ignore"):
        spacing = np.spacing(size.astype(np.float32))
    return (spacing > PRECISION * span) & (span > np.maximum(1e-6, 1e-12 * size))


def _vectors(label: str, array: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    if array.ndim != 2 or not array.shape[1]:
        raise InputError(f"{label}: shape {array.shape}, expected [n, dimensions]")
    _check_finite(label, array)
    return array.astype(dtype, copy=False)


def _actions(label: str, array: np.ndarray) -> np.ndarray:
    check_continuous(label, array)
    return _vectors(label, array)


def _scalars(label: str, array: np.ndarray) -> np.ndarray:
    _check_scalars(label, array)
    return array.reshape(-1).astype(np.float64, copy=False)


def _counts(label: str, array: np.ndarray) -> np.ndarray:
    """Steps or times; nanoseconds since 1970, which float64 would round, less the least of them."""
    _check_column(label, array)
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:  # smaller ones need it not, and could overflow
        return (array.reshape(-1) - array.min()).astype(np.float64)
    return _scalars(label, array)


def _flags(label: str, array: np.ndarray) -> np.ndarray:
    _check_scalars(label, array)
    values = array.reshape(-1)
    strange = (values != 0) & (values != 1)
    if strange.any():
        raise InputError(f"{label}: {strange.sum()} values are neither 0 nor 1, the first in row {strange.argmax()}")
    return values.astype(bool)


def _labels(label: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":
        return _scalars(label, array)
    _check_column(label, array)
    if array.dtype.kind in "OS":  # texts of HDF5
        try:
            array = np.array([text.decode() if isinstance(text, bytes) else str(text) for text in array.reshape(-1)])
        except UnicodeDecodeError as err:
            raise InputError(f"{label}: a text is not in UTF-8: {err}") from None
    if array.dtype.kind not in "iubU":
        raise InputError(f"{label}: type {array.dtype}, expected numbers or texts")
    return array.reshape(-1)  # as they are: floats would merge large ids


def _check_scalars(label: str, array: np.ndarray) -> None:
    _check_column(label, array)
    _check_finite(label, array)


def _check_column(label: str, array: np.ndarray) -> None:
    if array.shape not in ((len(array),), (len(array), 1)):
        raise InputError(f"{label}: shape {array.shape}, expected [n] or [n, 1]")


def check_numbers(label: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "fiub":
        raise InputError(f"{label}: type {array.dtype}, expected numbers")


def check_continuous(label: str, array: np.ndarray) -> None:
    if array.dtype.kind in "iub":
        raise InputError(f"{label}: type {array.dtype}; SPAR needs continuous actions, as floats")
    check_numbers(label, array)


def _check_finite(label: str, array: np.ndarray) -> None:
    check_numbers(label, array)
    if float(array.min()) >= -LARGEST and float(array.max()) <= LARGEST:
        return  # NaN passes through both: the rest only finds where it is
    bad = ~(np.abs(array.astype(np.float64, copy=False)) <= LARGEST)
    row = np.argwhere(bad)[0, 0]
    raise InputError(f"{label}: {bad.sum()} values are NaN or infinite or beyond +-{LARGEST:g}, the first in row {row}")


_CASTS: dict[str, Callable[[str, np.ndarray], np.ndarray]] = {
    "action": _actions,
    "reward": _scalars,
    "terminated": _flags,
    "truncated": _flags,
    "done": _flags,
    "success": _flags,
    "episode": _labels,
    "step": _counts,
}


def unit_bounds(fields: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    bound = np.ones(fields["action"].shape[1], dtype=np.float32)
    return -bound, bound
