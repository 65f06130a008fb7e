"""Finished runs: read from their directories or from a table, and collected into a table.

A table, runs.jsonl, has one JSON line a run, its numbers to six digits. What all runs share, their common options among
it, stands once in the first line, under "common".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.directory import flatten
from harness.method_options import method_options
from harness.output import named_error, rounded, write_text
from omegaconf import DictConfig, OmegaConf

from torchrl_spar import InputError

Run = dict[str, Any]
# Options of a run that its results repeat, or that change no number.
ELSEWHERE = ("seed", "seeds", "out", "runs", "dataset", "threads", "resume", "device")


def read_runs(source: Path) -> list[Run]:
    """Every run of spar_d4rl.py and compare.py in a table, or in the tables and results files below a folder.

    ``FOLDER@METHOD`` takes the runs of one method.

    Raises:
        InputError: for a file that is something else.
    """
    path, _, method = str(source).partition("@")
    folder = Path(path)
    found = [folder]
    if not folder.is_file():
        found = [*sorted(folder.rglob("results.json")), *sorted(folder.rglob("*.jsonl"))]
    runs = [run for file in found for run in (read_table(file) if file.suffix == ".jsonl" else _read_result(file))]
    runs = [run for run in runs if method in ("", run.get("method", "spar"))]
    if not runs:
        raise InputError(
            f"{source}: holds no results.json and no table (*.jsonl)" + (f" of {method}" if method else "")
        )
    return runs


def read_table(path: Path) -> list[Run]:
    """The runs of a table, as their results files were."""
    try:
        first, *rows = map(json.loads, path.read_text().splitlines())
        common = first["common"]
        return [
            _checked({**run, "options": common["options"] | run["options"], "curve": _rows(run["curve"])})
            for run in ({**common, "options": {}, **row} for row in rows)
        ]
    except (ValueError, KeyError, TypeError) as err:
        raise InputError(f"{path}: not a table of report.py ({err!r})") from None


def write_table(path: Path, sources: Sequence[Path]) -> int:
    """Collects finished runs below folders (of one method: ``FOLDER@METHOD``) into a table; returns their number."""
    runs: dict[Path, Run] = {}
    for source in sources:
        folder, _, method = str(source).partition("@")
        files = {file: run for file in Path(folder).rglob("results.json") for run in _read_result(file)}
        found = {file: run for file, run in files.items() if method in ("", run.get("method", "spar"))}
        if not found:
            raise InputError(f"{source}: no finished run")
        runs |= found
    for file, run in runs.items():
        run["options"] = _options(file.with_name("config.yaml"), run["dataset"])
        run["curve"] = _columns(run["curve"])
    write_text(path, table_text([rounded(runs[file], 6) for file in sorted(runs)]))
    return len(runs)


def table_text(runs: Sequence[Run]) -> str:
    common = _shared([{key: x for key, x in run.items() if key != "options"} for run in runs])
    common["options"] = _shared([run["options"] for run in runs])
    rows = [
        {key: x for key, x in run.items() if key not in common}
        | {"options": {key: x for key, x in run["options"].items() if key not in common["options"]}}
        for run in runs
    ]
    return "".join(json.dumps(row) + "\n" for row in ({"common": common}, *rows))


def _read_result(path: Path) -> list[Run]:
    try:
        result = json.loads(path.read_text())
        return [] if "runs" in result else [_checked(result)]  # of mix_objectives.py
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise InputError(
            f"{path}: not a results file of spar_d4rl.py or compare.py ({err!r}); move it elsewhere"
        ) from None


def _checked(run: Run) -> Run:
    if run.get("env", "") is None:
        run["estimates"]["policy" if "policy" in run else "spar"]["low"]
    else:
        for name in ("data", *(("policy",) if "policy" in run else ("anchor", "spar"))):
            run[name]["normalized"]
    for name in ("dataset", "seed", "updates", "episodes"):
        run[name]
    run["curve"][0]["step"]
    return run


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuses runs of one data set that differ in what their scores are of.

    Tables of before ``rows_sha256`` was noted are taken to be of the same rows.
    """
    protocols: dict[str, Run] = {}
    for run in runs:
        protocol = {
            "updates": run["updates"], "episodes": run["episodes"],
            "evaluations at": [row["step"] for row in run["curve"]],
            "env": run["env"], "env_kwargs": run.get("env_kwargs", {}), "rows_sha256": run.get("rows_sha256"),
        }  # fmt: skip
        first = protocols.setdefault(run["dataset"], protocol)
        first["rows_sha256"] = first["rows_sha256"] or protocol["rows_sha256"]
        protocol["rows_sha256"] = protocol["rows_sha256"] or first["rows_sha256"]
        if different := [name for name in protocol if protocol[name] != first[name]]:
            name = different[0]
            raise InputError(
                f"{run['dataset']}: runs of {name} {first[name]} and {protocol[name]} are not comparable; "
                "put them into directories of their own"
            )


def _options(path: Path, dataset: str) -> dict[str, Any]:
    """A run's options, dotted; a method's own as they were on this data set."""
    with named_error(path, "is needed beside the results"):
        cfg = OmegaConf.load(path)
    assert isinstance(cfg, DictConfig)
    if "method" in cfg:
        cfg.method = {"algorithm": cfg.method.algorithm, **method_options(cfg.method, dataset)}
    return {name: x for name, x in flatten(OmegaConf.to_container(cfg)).items() if name not in ELSEWHERE}


def _shared(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all dictionaries have alike."""
    return {key: x for key, x in parts[0].items() if all(key in part and part[key] == x for part in parts)}


def _columns(curve: list[Run]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in curve] for key in curve[0]}


def _rows(curve: dict[str, list[Any]]) -> list[Run]:
    return [dict(zip(curve, values)) for values in zip(*curve.values())]
