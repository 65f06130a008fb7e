"""Finished runs on one data set, for scripts that read several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.directory import read_run
from harness.environment import LOG_OPTIONS
from torchrl_spar import InputError

NEEDED = ("config.yaml", "policy.pt", "results.json")
# The options and results that must agree: runs with other ones are of other data, or another task.
SAME_OPTIONS = ("action_scale", *LOG_OPTIONS, "spar.loss.gamma")
SAME_RESULTS = ("env", "env_kwargs", "rows_sha256")


def finished_runs(folders: Sequence[str]) -> list[Path]:
    """Directories with a policy, options and results, each once; says which are left out as they are not finished.

    Raises:
        InputError: for a folder without any.
    """
    runs: dict[Path, Path] = {}
    for folder in folders:
        begun = {path.parent for path in Path(folder).rglob("config.yaml")}  # loggers write such files, too
        found = {run for run in begun if all((run / name).is_file() for name in NEEDED)}
        if not found:
            raise InputError(f"runs: no finished run with {', '.join(NEEDED)} in {folder}")
        for run in sorted(begun - found):
            if (run / "metrics.csv").is_file():
                print(f"{run}: not finished, left out")
        runs |= {run.resolve(): run for run in found}
    return sorted(runs.values())


def read_agreeing(runs: Sequence[Path]) -> list[tuple[DictConfig, dict[str, Any]]]:
    """The options and results of runs, which must be of the same rows, environment and discount."""
    read = [read_run(run) for run in runs]
    first, first_results = read[0]
    for run, (options, results) in zip(runs, read):
        differing = [name for name in SAME_OPTIONS if OmegaConf.select(options, name) != OmegaConf.select(first, name)]
        differing += [name for name in SAME_RESULTS if results.get(name) != first_results.get(name)]
        if differing:
            raise InputError(f"runs: {run} has another {', '.join(differing)} than {runs[0]}; leave it out")
    return read
