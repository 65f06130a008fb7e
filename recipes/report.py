"""A Markdown table of finished runs: one row a data set, mean and spread over seeds.

python recipes/report.py recipes/results
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from torchrl_spar import InputError


def read_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every results file of spar_d4rl.py below a folder, by data set."""
    runs = defaultdict(list)
    for path in sorted(folder.rglob("*.json")):
        try:
            result = json.loads(path.read_text())
            if "claim" in result or "matmul_gflops" in result:  # of recipes/claims and benchmark.py: no scores
                continue
            scores = [result[name]["normalized"] for name in ("data", "anchor", "spar")]
            runs[result["dataset"]].append(result)
        except (ValueError, KeyError, TypeError) as err:
            raise InputError(f"{path}: not a results file of spar_d4rl.py ({err!r}); move it elsewhere") from None
        if None in scores:
            raise InputError(f"{path}: {result['env']} has no normalised score; move it elsewhere")
    if not runs:
        raise InputError(f"{folder}: holds no results file (*.json)")
    return runs


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Normalised scores; of several seeds mean and standard deviation, each seed's score in brackets."""

    def cell(results: list[dict[str, Any]], name: str) -> str:
        scores = [result[name]["normalized"] for result in results]
        if len(scores) == 1:
            return f"{scores[0]:.1f}"
        each = " / ".join(f"{score:.1f}" for score in scores)
        return f"{mean(scores):.1f} +- {pstdev(scores):.1f} ({each})"

    lines = ["| data set | seeds | data | anchor | SPAR |", "|---|---|---|---|---|"]
    for name, results in sorted(runs.items()):
        data = mean(result["data"]["normalized"] for result in results)
        seeds = ", ".join(str(result["seed"]) for result in results)
        lines.append(f"| {name} | {seeds} | {data:.1f} | {cell(results, 'anchor')} | {cell(results, 'spar')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("error: usage: python recipes/report.py FOLDER, a folder with results.json files")
    try:
        print(table(read_runs(Path(sys.argv[1]))))
    except InputError as err:
        sys.exit(f"error: {err}")
