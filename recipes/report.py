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


def read_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every results file below a folder, by data set."""
    runs = defaultdict(list)
    for path in sorted(folder.rglob("*.json")):
        result = json.loads(path.read_text())
        runs[result["dataset"]].append(result)
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
    print(table(read_runs(Path(sys.argv[1]))))
