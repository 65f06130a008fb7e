"""Finished runs on one data set, for what reads several of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from harness.directory import read_run
from harness.environment import LOG_OPTIONS
from torchrl_spar import InputError

NEEDED = ("config.yaml", "policy.pt", "results.json")


def finished_runs(folders: Sequence[str]) -> list[Path]:
    """Directories with a policy, options and results."""
    found = sorted({path.parent for folder in folders for path in Path(folder).rglob("policy.pt")})
    if not (found := [run for run in found if all((run / name).is_file() for name in NEEDED)]):
        raise InputError(f"runs={list(folders)}: no finished run with {', '.join(NEEDED)} in them")
    return found


def options_of(runs: Sequence[Path]) -> list[DictConfig]:
    """The options of runs, which must be of the same rows, environment and discount."""
    read = [read_run(run) for run in runs]
    options = [each for each, _ in read]
    first = options[0]
    for run, (other, results) in zip(runs, read):
        differing = [key for key in ("env", "env_kwargs", *LOG_OPTIONS) if other.get(key) != first.get(key)]
        differing += ["spar.loss.gamma"] * (other.spar.loss.gamma != first.spar.loss.gamma)
        differing += ["rows_sha256"] * (results.get("rows_sha256") != read[0][1].get("rows_sha256"))
        if differing:
            raise InputError(f"runs: {run} has another {', '.join(differing)} than {runs[0]}; take them apart")
    return options
