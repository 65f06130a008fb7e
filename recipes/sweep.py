"""Many runs in one directory: which are finished, which are to be done, and that no two processes do the same."""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf

from torchrl_spar import InputError

# What makes it no other run: where it and the data's cache lie, the threads, evaluation beside training.
FREE = ("runs", "out", "cache", "threads", "eval.background")


def run_directory(runs: Path, dataset: str, method: str, seed: int) -> Path:
    return runs / re.sub(r"[^\w.-]+", "-", dataset).strip("-.") / method / f"seed{seed}"


@contextmanager
def claim(out: Path) -> Iterator[None]:
    """Holds a run's directory; waits while another process does. A killed process holds nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f".{out.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{out}: another process is at it, waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_finished(out: Path, cfg: DictConfig) -> bool:
    """Whether a run with these options lies there; what a killed one left is removed.

    Raises:
        InputError: if the finished run there had other options, or the directory is something else.
    """
    if not out.exists():
        return False
    if (out / "results.json").is_file():
        different = sorted(differences(OmegaConf.load(out / "config.yaml"), cfg))
        if different:
            raise InputError(
                f"{out}: finished with other options ({', '.join(different)}); give another runs=, or remove it"
            )
        return True
    if any(out.iterdir()) and not (out / "metrics.csv").is_file():
        raise InputError(f"{out}: exists and is not a run's directory; give another runs=, or remove it")
    shutil.rmtree(out)
    return False


def differences(one: Container, other: Container) -> set[str]:
    """The options, dotted, that two configurations do not have in common."""
    left, right = (flatten(OmegaConf.to_container(cfg, resolve=True)) for cfg in (one, other))
    names = (left.keys() | right.keys()) - set(FREE)
    return {name for name in names if (name in left, left.get(name)) != (name in right, right.get(name))}


def flatten(options: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(options, dict) or not options:
        return {prefix.removesuffix("."): options}
    parts = (flatten(value, f"{prefix}{name}.") for name, value in options.items())
    return {name: value for part in parts for name, value in part.items()}
