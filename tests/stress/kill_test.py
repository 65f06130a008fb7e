"""Kills runs at random moments, has them go on until they end, and compares them with one that nobody disturbed.

python tests/stress/kill_test.py                              # 5 kills
python tests/stress/kill_test.py --kills 100 --method stack   # both seeds of a stack; or a method of recipes/compare.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "recipes"))
sys.path.append(str(Path(__file__).resolve().parents[1]))

import compare
import spar_d4rl
from helpers import compose_recipe

SCRATCH = tempfile.TemporaryDirectory()
DATA = Path(SCRATCH.name) / "data.npz"


def write_data() -> None:
    """Thirty episodes of Hopper's sizes, that a run loads in no time."""
    draw = np.random.default_rng(0).uniform
    ends = np.arange(300) % 10 == 9
    arrays = {"observations": draw(-1, 1, (300, 11)), "actions": draw(-1, 1, (300, 3)), "rewards": draw(0, 1, 300)}
    np.savez(DATA, **arrays, terminals=ends, timeouts=np.zeros(300, bool))


write_data()
# All phases, each of more than a step; blocks of 2 updates.
TINY = ["preset=smoke", "anchor.steps=12", "vae.steps=12", "critics.steps=6", "spar.updates=16", "logger.interval=2"]
TINY += ["eval.interval=8", "eval.background=false", "spar.loss.hidden=[8]", "batch_size=16"]
TINY += [f"dataset={DATA}", "env=Hopper-v5", "spar.members=1"]


def start_run(method: str, out: Path, *options: str, seed: int = 3) -> None:
    """The job of a method in this process, without its figure; it goes on if it was begun."""
    cfg = composed(method, options)
    with patch("harness.spar_run.plot_learning_curve"), patch("harness.spar_run.plot_log_curve"):
        if method == "spar":
            spar_d4rl.train(cfg, [seed], [out])
        elif method == "stack":
            spar_d4rl.train(cfg, [3, 4], [out / "seed_3", out / "seed_4"])
        else:
            compare.start(cfg, seed, out)


@cache  # a quarter of a second each
def composed(method: str, options: tuple[str, ...]) -> Any:
    own = method in ("spar", "stack")
    method_option = [] if own else [f"method={method}"]
    return compose_recipe("spar_d4rl" if own else "compare", *TINY, "resume=true", *method_option, *options)


def outcome(out: Path) -> dict[str, Any]:
    """All that runs below a directory left, but for the time it took."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.match("policy*.pt"):
            found[name] = {k: v.numpy().tobytes() for k, v in torch.load(path)["state_dict"].items()}
        elif path.name == "results.json":
            results = json.loads(path.read_text())
            found[name] = {k: v for k, v in results.items() if k not in ("updates_per_second", "wall_seconds")}
        elif path.suffix == ".csv":
            found[name] = path.read_text()
        elif path.suffix not in (".yaml", ".png"):
            found[name] = None
    return found


def fork(job: Callable[[], None], log: Path) -> int:
    """The job in a process of its own, all of whose output goes to a file."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        job()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def kill_and_go_on(method: str, kills: int, scratch: Path, seed: int = 0) -> tuple[int, int]:
    """
    Returns:
        The kills that were survived, and how many of them came while a checkpoint was written.

    Raises:
        AssertionError: if a run failed, or ended otherwise than the undisturbed one.
    """
    rng, log = random.Random(seed), scratch / "log"

    def run(out: Path, *options: str) -> int:
        return fork(lambda: start_run(method, out, *options), log)

    def end(pid: int) -> None:
        assert os.waitpid(pid, 0)[1] == 0, log.read_text()[-5000:]

    begun = time.monotonic()
    end(run(scratch / "undisturbed"))
    length = time.monotonic() - begun
    expected = outcome(scratch / "undisturbed")
    survived = inside = 0
    while survived < kills:
        out = scratch / "killed"
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(rng.randint(1, min(8, kills - survived))):
            # Almost always inside a write, or rarely.
            pid = run(out, f"checkpoint.seconds={rng.choice([0, 0, 0.1])}")
            time.sleep(rng.uniform(0.1, 1.5) * length)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                assert status == 0, log.read_text()[-5000:]
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            survived += 1
            inside += any(out.glob("checkpoints/.checkpoint-*"))
        end(run(out))
        found = outcome(out)
        assert [name for name in found.keys() | expected.keys() if found.get(name, 0) != expected.get(name, 0)] == []
    return survived, inside


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    assert kill_and_go_on("spar", 4, tmp_path)[0] == 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--method", default="spar")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        survived, inside = kill_and_go_on(args.method, args.kills, Path(scratch), args.seed)
    print(f"{args.method}: {survived} kills survived, {inside} of them while a checkpoint was written; same bits")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
