"""How fast and in how much memory a Minari set of a given size is loaded and sampled."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrl_spar import load_offline_dataset
from torchrl_spar.data.sources import environment_variable


def _load(source: str) -> dict[str, float]:
    torch.set_num_threads(1)
    before = _peak()
    start = time.perf_counter()
    buffer = load_offline_dataset(source)
    seconds = time.perf_counter() - start
    after = _peak()
    size = sum(tensor.numel() * tensor.element_size() for tensor in buffer[:].values(True, True))
    for _ in range(200):
        buffer.sample()
    start = time.perf_counter()
    for _ in range(2000):
        buffer.sample()
    rate = 2000 / (time.perf_counter() - start)
    return {"seconds": seconds, "peak_memory_over_size": (after - before) / size, "samples_per_second": rate}


def _peak() -> int:
    """Peak memory of this process, in bytes (Linux; ru_maxrss would start at that of the process it comes from)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_loading(steps: int, episode_length: int = 1000) -> dict[str, Any]:
    """Loads a temporary Minari set (random numbers in Hopper's sizes) and returns seconds, memory and sampling rate.

    Args:
        steps: of the whole set, a multiple of ``episode_length``.
        episode_length: many short episodes take longer than few long ones.

    Returns:
        ``rows_per_second``, ``steps``, ``episodes`` and, as ``"load"``, the ``seconds`` of ``load_offline_dataset`` in
        a fresh process (imports done, page cache warm), its ``peak_memory_over_size`` (what the process's peak grew
        by, over the rows' bytes) and ``samples_per_second`` (batches of 256).
    """
    with tempfile.TemporaryDirectory() as directory:
        source = write_random_minari(Path(directory) / "datasets", steps // episode_length, episode_length)
        # In a process of its own: the peak memory of a process never falls.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["h5py", "minari", "torchrl_spar"])
        with ProcessPoolExecutor(1, context) as pool:
            load = pool.submit(_load, str(source)).result()
    rate = steps / load["seconds"]
    return {"rows_per_second": rate, "steps": steps, "episodes": steps // episode_length, "load": load}


def write_random_minari(root: Path, episodes: int, length: int, observation_dim: int = 11, action_dim: int = 3) -> Path:
    """A Minari set of random numbers, in the types that Minari records of MuJoCo."""
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    rng = np.random.default_rng(0)
    buffers = []
    for number in range(episodes):
        flags = np.zeros((2, length), dtype=bool)
        flags[number % 2, -1] = True
        buffers.append(
            EpisodeBuffer(
                observations=rng.normal(size=(length + 1, observation_dim)),
                actions=rng.uniform(-1, 1, size=(length, action_dim)).astype(np.float32),
                rewards=rng.normal(size=length),
                terminations=flags[0],
                truncations=flags[1],
            )
        )
    root.mkdir(parents=True)
    with environment_variable("MINARI_DATASETS_PATH", str(root)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".* is set to None|env_spec is None", UserWarning)  # facts about the set
        minari.create_dataset_from_buffers(
            "benchmark/random-v0",
            buffers,
            observation_space=Box(-np.inf, np.inf, (observation_dim,), np.float64),
            action_space=Box(-1, 1, (action_dim,), np.float32),
        )
    return root / "benchmark/random-v0"
