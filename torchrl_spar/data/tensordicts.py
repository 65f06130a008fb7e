"""Reader of TensorDicts in TED form, of lists and stacks of them, and of TorchRL's replay buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase, is_tensor_collection

from torchrl_spar.data.arrange import arrange
from torchrl_spar.data.order import equal_rows
from torchrl_spar.data.rows import ID_KEYS, parts_of, valid_mask
from torchrl_spar.data.sources import missing_array, readable
from torchrl_spar.data.steps import Steps, clean, unit_bounds
from torchrl_spar.errors import InputError

_KEYS: dict[str, tuple[NestedKey, ...]] = {
    "observation": ("observation",),
    "action": ("action",),
    "reward": (("next", "reward"),),
    "terminated": (("next", "terminated"),),
    "truncated": (("next", "truncated"),),
    "done": (("next", "done"),),
    "next_observation": (("next", "observation"),),
    "episode": ID_KEYS,
}
_OPTIONAL = ("truncated", "done", "episode")


def read_tensordict(source: Any) -> Steps:
    """A TensorDict ``[n]`` or, with time last, ``[..., T]``; a list, a lazy stack or a replay buffer of such ones."""
    found: dict[str, list[np.ndarray]] = {}
    labels: dict[str, str] = {}
    sequences, start = [], 0
    parts = list(parts_of(source))
    if not parts:
        raise InputError("the data set holds no step")
    for part in parts:
        columns, rows = _read_part(part)
        for name, (label, array) in columns.items():
            found.setdefault(name, []).append(array)
            labels[name] = label
        sequences.append(start + rows)
        start += 1 + int(rows[-1]) if len(rows) else 0
    raw = {}
    for name, arrays in found.items():
        if len(arrays) < len(parts):
            raise InputError(f"{labels[name]} is in some of the TensorDicts alone")
        shapes = {array.shape[1:] for array in arrays}
        if len(shapes) > 1:
            raise InputError(f"{labels[name]}: shapes {sorted(shapes)} a row, expected one")
        raw[name] = (labels[name], arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
    # A collector's ids are of whole trajectories, wherever its batches were cut.
    sequence = None if "traj_ids" in labels.get("episode", "") else np.concatenate(sequences)
    fields = arrange(clean(raw), sequence=sequence)
    return Steps(**fields, action_bounds=unit_bounds(fields))


def _read_part(part: TensorDictBase) -> tuple[dict[str, tuple[str, np.ndarray]], np.ndarray]:
    """Names and rows of the fields, and each row's sequence; padding is left out."""
    if not part.ndim:
        raise InputError("the batch size is empty; it must be [n] or [B, T]")
    with readable():
        part = _time_last(part)
    steps = part.get("steps_to_next_obs", None)
    if steps is not None and (steps != 1).any():
        raise InputError(
            "its rewards are sums of several steps ('steps_to_next_obs'), as of MultiStep or chunk_actions: load the "
            "single steps, and put these together from what is loaded"
        )
    valid = valid_mask(part)
    keep = None if valid is None else valid.cpu().numpy()
    raw = {}
    for field, keys in _KEYS.items():
        for key in keys:
            with readable(f"{key!r} "):
                value = part.get(key, None)
            if value is not None:
                break
        if value is None:
            if field in _OPTIONAL:
                continue
            raise missing_array(repr(keys[0]), sorted(map(str, part.keys(True, True))))
        if is_tensor_collection(value):
            names = ", ".join(map(str, value.keys()))
            raise InputError(
                f"{key!r} is a TensorDict, not a tensor: join its entries ({names}) into one vector. A LeRobot set is "
                "read by 'lerobot:<id or path>'"
            )
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{key!r} is a {type(value).__name__}, not a tensor")
        with readable(f"{key!r} "):
            rows = value.detach().cpu().flatten(0, part.ndim - 1)
            rows = rows.float() if rows.dtype == torch.bfloat16 else rows  # which numpy does not have
            array = rows.numpy()
            # A copy: the source's memory stays its own.
            raw[field] = (repr(key), array.copy() if keep is None else array[keep])
    sequence = np.arange(part.numel()) // max(1, part.shape[-1])
    if keep is None:
        return raw, sequence
    gaps = np.cumsum(~keep)  # what padding separates does not follow on
    return raw, (sequence + gaps)[keep]


def _time_last(part: TensorDictBase) -> TensorDictBase:
    """Moves time to the last dimension: the one named so, else the only one along which next observations continue."""
    if part.ndim < 2:
        return part
    names = part.names
    if "time" in names:
        return part.movedim(names.index("time"), -1) if names[-1] != "time" else part
    observation, following = part.get("observation", None), part.get(("next", "observation"), None)
    if not (isinstance(observation, torch.Tensor) and isinstance(following, torch.Tensor)):
        return part

    def goes_on(dim: int) -> bool:
        size = part.shape[dim]
        if size < 2 or observation.shape != following.shape or observation.ndim <= part.ndim:
            return False
        left, right = following.narrow(dim, 0, size - 1), observation.narrow(dim, 1, size - 1)
        return bool(equal_rows(left.flatten(0, -2), right.flatten(0, -2)).float().mean() > 0.5)

    last = part.ndim - 1
    if not goes_on(last):
        for dim in reversed(range(last)):
            if goes_on(dim):
                return part.movedim(dim, -1)
    return part
