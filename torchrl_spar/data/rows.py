"""The rows of a replay buffer or of nested TensorDicts: without padding, one sequence after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase, is_tensor_collection
from torch import Tensor
from torchrl.data import LazyStackStorage, ReplayBuffer, ReplayBufferEnsemble

from torchrl_spar.errors import InputError, first_line

# Where TorchRL keeps the mask of padded sequences (split_trajectories, collectors), and the ids of trajectories.
MASK_KEYS: tuple[NestedKey, ...] = ("mask", ("collector", "mask"))
ID_KEYS: tuple[NestedKey, ...] = ("episode", ("collector", "traj_ids"), "traj_ids")


def check_buffer(data: Any, kind: type[ReplayBuffer] = ReplayBuffer) -> None:
    """Refuses anything but a replay buffer of this kind.

    Examples:
        >>> check_buffer("log.npz")
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: a str; give the replay buffer that load_offline_dataset returns: call that first
    """
    if not isinstance(data, kind):
        raise InputError(
            f"a {type(data).__name__}; give the replay buffer that load_offline_dataset returns: call that first"
        )


def under_next(key: NestedKey) -> NestedKey:
    """The key of the following state.

    Examples:
        >>> under_next("reward"), under_next(("robot", "reward"))
        (('next', 'reward'), ('next', 'robot', 'reward'))
    """
    return ("next", *key) if isinstance(key, tuple) else ("next", key)


def parts_of(source: Any) -> Iterator[TensorDictBase]:
    """The TensorDicts ``[n]`` or ``[..., T]`` that a source is made of.

    Args:
        source: a TensorDict, a lazy stack of sequences of any lengths, a list of either, a replay buffer with any
            storage that holds them, or an ensemble of buffers.

    Raises:
        InputError: if there is something else in it.

    Examples:
        >>> from tensordict import TensorDict, lazy_stack
        >>> episodes = [TensorDict({"reward": torch.zeros(n, 1)}, [n]) for n in (2, 3)]
        >>> [len(part) for part in parts_of(lazy_stack(episodes))]
        [2, 3]
    """
    if isinstance(source, ReplayBufferEnsemble):
        for index in range(len(source)):  # iteration would sample without end
            yield from parts_of(source[index])
    elif isinstance(source, ReplayBuffer):
        if not len(source):
            raise InputError("it is empty")
        # TorchRL hands its own rows, no copy, to the transforms of whole reads, which would change them each time.
        transformed = bool(len(source.transform))
        if transformed and isinstance(source.storage, LazyStackStorage):
            raise InputError(
                "transforms change the rows of a LazyStackStorage whenever they are read: use another storage"
            )
        try:
            # A storage of several dimensions hands out a transposed copy of the structure.
            in_place = transformed and source.storage.ndim == 1
            content = source[torch.arange(len(source))] if in_place else source[:]
        except Exception as err:  # its collate function's or its transforms'
            raise InputError(
                f"its rows cannot be stacked ({type(err).__name__}: {first_line(err)}); "
                "give them as a list of TensorDicts [T], one an episode"
            ) from None
        yield from parts_of(content)
    elif isinstance(source, (list, tuple)):
        steps = [part for part in source if is_tensor_collection(part) and not part.ndim]
        if steps and len(steps) == len(source):  # one step each
            yield torch.stack(steps)
        else:
            for part in source:
                yield from parts_of(part)
    elif is_tensor_collection(source):
        if -1 not in source.batch_size:
            yield source
        elif isinstance(source, LazyStackedTensorDict):
            for part in source.tensordicts:
                yield from parts_of(part)
        elif any(leaf.is_nested for leaf in source.values(True, True) if isinstance(leaf, Tensor)):
            raise InputError(
                "its sequences are nested tensors: give a list of TensorDicts [T], or padded sequences with a 'mask' "
                "(split_trajectories with as_nested=False)"
            )
        else:  # tensordict's unflatten(0, (-1, T)) leaves -1 in the batch size
            shape = next(iter(source.values(True, True))).shape[: source.ndim]
            yield source.apply(lambda leaf: leaf, batch_size=shape)
    else:
        raise InputError(
            f"it holds a {type(source).__name__}; expected TensorDicts [n] or [B, T], a list or a lazy stack of them, "
            "or a replay buffer"
        )


def valid_mask(part: TensorDictBase, mask_keys: Sequence[NestedKey] = MASK_KEYS) -> Tensor | None:
    """Which of ``[..., T]`` positions are not padding, flat ``[n]``; None without a mask."""
    valid = None
    for key in mask_keys:
        mask = part.get(key, None)
        if mask is None:
            continue
        if mask.numel() != part.numel():
            raise InputError(f"{key!r}: shape {tuple(mask.shape)}, expected one value for each of {tuple(part.shape)}")
        valid = mask.bool().flatten() if valid is None else valid & mask.bool().flatten()
    return valid


def rows_of(replay_buffer: ReplayBuffer, mask_keys: Sequence[NestedKey] = MASK_KEYS) -> TensorDictBase:
    """All valid rows ``[N]`` of a buffer; ``"episode"`` tells sequences apart where there are any.

    Args:
        replay_buffer: with any storage that :func:`parts_of` takes.
        mask_keys: of the masks that tell padding.

    Raises:
        InputError: likewise, for what is no buffer, or if nothing is left.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage
        >>> padded = TensorDict({"x": torch.arange(6).view(2, 3), "mask": torch.arange(6).view(2, 3) != 2}, [2, 3])
        >>> buffer = ReplayBuffer(storage=LazyTensorStorage(2))
        >>> _ = buffer.extend(padded)
        >>> rows = rows_of(buffer)
        >>> rows["x"], rows["episode"]
        (tensor([0, 1, 3, 4, 5]), tensor([0, 0, 1, 1, 1]))
    """
    check_buffer(replay_buffer)
    parts = [_on_its_device(part) for part in parts_of(replay_buffer)]
    if len(parts) == 1 and parts[0].ndim == 1 and valid_mask(parts[0], mask_keys) is None:
        return parts[0]
    found, start = [], 0
    for part in parts:
        if not part.ndim:
            raise InputError(
                "the replay buffer holds single steps without a batch size; give TensorDicts [n] or [B, T]"
            )
        if part.ndim > 2 and not part.is_contiguous():
            part = part.contiguous()
        rows = part.reshape(-1)
        last = torch.arange(len(rows), device=rows.device) % part.shape[-1] == part.shape[-1] - 1
        valid = valid_mask(part, mask_keys)
        if valid is not None:
            last |= ~valid
        episode = start + last.cumsum(0) - last.long()
        for key in ID_KEYS:
            ids = rows.get(key, None)
            if ids is not None:
                ids = ids.reshape(len(rows), -1)[:, 0]
                changes = torch.zeros_like(episode)
                changes[1:] = ids[1:] != ids[:-1]
                episode = episode + changes.cumsum(0)
        rows = rows.copy().set("episode", episode)
        found.append(rows if valid is None else rows[valid])
        start = int(episode[-1]) + 1 if len(episode) else start
    rows = torch.cat(found)
    if not len(rows):
        raise InputError("the replay buffer holds no valid row: its mask leaves nothing")
    return rows


def whole_of(replay_buffer: ReplayBuffer) -> TensorDictBase:
    """All of a buffer in its own shape ``[n]`` or ``[B, T]``, or as rows if it has no single shape.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import ListStorage
        >>> buffer = ReplayBuffer(storage=ListStorage(2))
        >>> _ = buffer.extend([TensorDict({"x": torch.zeros(n)}, [n]) for n in (2, 3)])
        >>> whole_of(buffer).shape
        torch.Size([5])
    """
    check_buffer(replay_buffer)
    parts = list(parts_of(replay_buffer))
    if len(parts) > 1:
        return rows_of(replay_buffer)
    whole = parts[0]
    if isinstance(whole, LazyStackedTensorDict):
        # Rows drawn of a lazy stack are the stack's own: what is set in one draw would be in all.
        with suppress(RuntimeError):  # entries of several shapes, which are not read, do not stack
            whole = whole.contiguous()
    return _on_its_device(whole)


def _on_its_device(part: TensorDictBase) -> TensorDictBase:
    """The TensorDict with a device, which a list's TensorDicts may lack."""
    return part if part.device is not None else part.to(next(iter(part.values(True, True))).device)
