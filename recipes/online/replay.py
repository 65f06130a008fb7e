"""TorchRL's buffer of offline and online transitions, and the share of each in a batch."""

from __future__ import annotations

import torch
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyTensorStorage,
    OfflineToOnlineReplayBuffer,
    ReplayBuffer,
    TensorStorage,
)

from torchrl_spar import OfflineReplayBuffer


def make_replay_buffer(
    data: OfflineReplayBuffer, *, start: float, capacity: int, batch_size: int, device: torch.device
) -> OfflineToOnlineReplayBuffer:
    """The data set, shared, and room for `capacity` transitions beside it.

    Args:
        data: the data set.
        start: share of a batch that comes from the data set, until `anneal`.
        capacity: of the online part.
        batch_size: rows of a sample.
        device: of the online part.
    """
    # Not `data` itself: it adds "index" and "episode" to its batches, which online transitions lack.
    rows = TensorStorage(data[:].exclude("episode", "index"), device=device)
    return OfflineToOnlineReplayBuffer(
        ReplayBuffer(storage=rows, writer=ImmutableDatasetWriter()),
        online_storage=LazyTensorStorage(capacity, device=device),
        offline_fraction=start,
        batch_size=batch_size,
    )


def anneal(buffer: OfflineToOnlineReplayBuffer, step: int, steps: int, *, start: float, end: float) -> None:
    """Moves the offline share along a line from `start` at step 0 to `end` at the last of `steps`."""
    if end < start:
        # TorchRL's line ends at zero, so it is given the step at which ours would.
        buffer.anneal(step, steps * start / (start - end))
