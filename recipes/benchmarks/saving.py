"""What a checkpoint of a run costs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from harness.checkpoints import Checkpoints
from harness.spar_options import CheckpointOptions

from torchrl_spar import BatchSampler, OfflineReplayBuffer, SPARLoss, SPARUpdate


def measure_saving(loss: SPARLoss, data: OfflineReplayBuffer, *, rounds: int) -> dict[str, Any]:
    """Saves a run's networks, optimisers and sampler in a temporary directory.

    Returns:
        ``seconds`` (wall, median) of one checkpoint, its ``bytes``, the default ``interval`` of the main job
        in seconds, and ``share_of_run``: the part of a run's time that goes into checkpoints.
    """
    interval = CheckpointOptions().seconds
    update = SPARUpdate(loss)
    update(data.sample())  # Adam's state is not there before
    parts: dict[str, Any] = {"loss": loss, "update": update, "sampler": BatchSampler(loss, data, length=1, seed=0)}
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(Path(directory), interval, {})
        for name, part in parts.items():
            checkpoints.add(name, part)
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            checkpoints.save()
            seconds.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in checkpoints.latest.rglob("*") if path.is_file())
    middle = median(seconds[1:])
    return {"seconds": middle, "bytes": size, "interval": interval, "share_of_run": middle / (interval + middle)}
