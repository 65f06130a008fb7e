"""A run of very many small updates, with evaluations, logs and checkpoints: its memory and its files stay as they were.

python tests/stress/soak_test.py --updates 200_000
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import pytest
from kill_test import start_run

PROC = Path("/proc")


@dataclass
class Sample:
    """What a process, and those that it started, hold at an update."""

    update: int
    resident_bytes: int
    files: int


def holdings(pid: int) -> tuple[int, int]:
    """Resident bytes and open files of a process and of its children."""
    pages = int((PROC / f"{pid}/statm").read_text().split()[1])
    size, files = pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(PROC / f"{pid}/fd"))
    for child in (PROC / f"{pid}/task/{pid}/children").read_text().split():
        more, others = holdings(int(child))
        size, files = size + more, files + others
    return size, files


def last_update(metrics: Path) -> int:
    """Of the main phase, from the log's last whole row."""
    rows = metrics.read_text().rsplit("\n", 2) if metrics.is_file() else []
    phase, step, *_ = rows[-2].split(",") if len(rows) == 3 else ("", "0")
    return int(step) if phase == "spar" else 0


def soak(updates: int, scratch: Path, *, background: bool) -> Iterator[Sample]:
    """Samples of a run while it goes on; with `background` its evaluations are made by a second process."""
    out = scratch / "run"
    options = (f"spar.updates={updates}", f"eval.interval={updates // 50}", "eval.episodes=1", "checkpoint.seconds=1")
    options += (f"eval.background={str(background).lower()}", f"logger.interval={updates // 200}", "spar.members=1")
    # A fresh process: a fork would begin with the memory of whatever ran here before.
    run = get_context("spawn").Process(target=start_run, args=("spar", out, *options))
    run.start()
    while run.is_alive():
        try:
            found = holdings(run.pid)
        except FileNotFoundError:  # it, or a child, has just ended
            continue
        if update := last_update(out / "metrics.csv"):
            yield Sample(update, *found)
        time.sleep(0.1)
    assert run.exitcode == 0


def growth(samples: list[Sample], updates: int) -> tuple[float, float, float]:
    """From the second tenth of a run to its last, by medians: of the memory, as a share, and of the files; the memory.

    Medians, as a checkpoint that is being written holds a file and a buffer.
    """
    early = [sample for sample in samples if 0.1 * updates <= sample.update < 0.2 * updates]
    late = [sample for sample in samples if 0.9 * updates <= sample.update < updates]
    before, after = (median(sample.resident_bytes for sample in part) for part in (early, late))
    files = median(sample.files for sample in late) - median(sample.files for sample in early)
    return after / before - 1, files, after


@pytest.mark.skipif(not (PROC / "self/task").is_dir(), reason="memory and files are read from /proc")
def test_a_long_run_holds_what_a_short_one_does(tmp_path):
    # In line: the second process would still be loading its libraries.
    share, files, _ = growth(list(soak(600, tmp_path, background=False)), 600)
    assert share < 0.01
    assert files == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        samples = list(soak(args.updates, Path(scratch), background=True))
    share, files, size = growth(samples, args.updates)
    print(
        f"{args.updates} updates, {len(samples)} looks: memory {100 * share:+.2f} % from the second tenth to the last "
        f"({size / 2**20:.0f} MiB), files {files:+g}"
    )


if __name__ == "__main__":
    main()
