"""The files of one run: its directory, metrics.csv, results.json, all written whole or not at all."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.checkpoints import named_error
from harness.loggers import RunLogger
from torchrl_spar import InputError


def check_unused(out: Path) -> None:
    """Refuses a directory that holds anything. Runs, which may resume, have `check_new`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out={out}: exists and is not empty; give another directory or remove it")


def new_directory(out: Path) -> None:
    """Makes a directory; refuses one that holds anything, or a place where none can be."""
    check_unused(out)
    with named_error(out, "cannot be made"):
        out.mkdir(parents=True, exist_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with named_error(path, "cannot be written"):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def rounded(value: Any, digits: int) -> Any:
    """Rounds every number in nested dictionaries and lists to significant digits, for files that people read."""
    if isinstance(value, dict):
        return {key: rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part, digits) for part in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def data_score(runs: list[dict[str, Any]]) -> str:
    """The normalised score of the data; a dash where it has none, as for Minari's kitchen sets."""
    scores = [run["data"]["normalized"] for run in runs]
    return "-" if None in scores else f"{mean(scores):.1f}"


class MetricLog:
    """One row a call in metrics.csv, and the same numbers to a logger if there is one.

    Its state is the length of the file, which is cut to it when a run resumes.
    """

    def __init__(self, out: Path, logger: RunLogger | None, columns: Iterable[str], *, go_on: bool = False) -> None:
        self.logger = logger
        self.path = out / "metrics.csv"
        with named_error(self.path, "the run cannot go on without it" if go_on else "cannot be written"):
            self.file = self.path.open("r+" if go_on else "w", newline="")
        self.writer = csv.DictWriter(self.file, ["phase", "step", *columns], restval="")
        if not go_on:
            self.writer.writeheader()

    def write(self, phase: str, step: int, metrics: dict[str, Any]) -> None:
        numbers = {name: float(value) for name, value in metrics.items()}
        with named_error(self.path, "cannot be written"):
            self.writer.writerow({"phase": phase, "step": step, **{name: f"{x:.6g}" for name, x in numbers.items()}})
            self.file.flush()
        self.show(phase, step, numbers)

    def show(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        """Writes to the logger alone."""
        if self.logger is not None:
            self.logger.write({f"{phase}/{name}": number for name, number in numbers.items()}, step)

    def state_dict(self) -> dict[str, int]:
        self.file.flush()
        return {"bytes": os.fstat(self.file.fileno()).st_size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        size = os.fstat(self.file.fileno()).st_size
        if size < state["bytes"]:
            raise InputError(f"{self.path}: {size} bytes, fewer than at the checkpoint; put the whole file back")
        self.file.truncate(state["bytes"])
        self.file.seek(0, os.SEEK_END)

    def close(self) -> None:
        with suppress(OSError):  # of a row that could not be written: that error was raised
            self.file.close()
        if self.logger is not None:
            self.logger.close()


def save_config(out: Path, cfg: DictConfig) -> None:
    with named_error(out, "cannot be used as a run's directory"):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
