"""Markdown tables of finished runs, and of several methods their statistics and figures.

python recipes/report.py recipes/results/development/default    # SPAR alone: prints one row a data set
python recipes/report.py outputs/compare      # several methods: prints report.md and writes it there with figures
python recipes/report.py outputs/ablations outputs/compare/*/spar    # runs of several folders; written into the first
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from harness.output import data_score, write_text

from torchrl_spar import InputError

Run = dict[str, Any]


def read_runs(folder: Path) -> list[Run]:
    """Every results file of spar_d4rl.py and compare.py below a folder."""
    runs = []
    for path in sorted(folder.rglob("*.json")):
        try:
            result = json.loads(path.read_text())
            if "claim" in result or "matmul_gflops" in result:  # of recipes/claims and benchmark.py: no scores
                continue
            names = ("policy",) if "policy" in result else ("anchor", "spar")
            scores = [result[name]["normalized"] for name in names]
            result["dataset"], result["seed"], result["data"]["normalized"]
        except (ValueError, KeyError, TypeError) as err:
            raise InputError(
                f"{path}: not a results file of spar_d4rl.py or compare.py ({err!r}); move it elsewhere"
            ) from None
        if None in scores:
            raise InputError(f"{path}: {result['env']} has no normalised score; move it elsewhere")
        runs.append(result)
    if not runs:
        raise InputError(f"{folder}: holds no results file (*.json)")
    return runs


def table(runs: list[Run]) -> str:
    """Normalised scores of SPAR; of several seeds mean and sample standard deviation, each seed's score in brackets."""

    def cell(results: list[Run], name: str) -> str:
        scores = [result[name]["normalized"] for result in results]
        if len(scores) == 1:
            return f"{scores[0]:.1f}"
        each = " / ".join(f"{score:.1f}" for score in scores)
        return f"{mean(scores):.1f} +- {stdev(scores):.1f} ({each})"

    by_dataset = defaultdict(list)
    for run in runs:
        by_dataset[run["dataset"]].append(run)
    lines = ["| data set | seeds | data | anchor | SPAR |", "|---|---|---|---|---|"]
    for name, results in sorted(by_dataset.items()):
        seeds = ", ".join(str(result["seed"]) for result in results)
        lines.append(
            f"| {name} | {seeds} | {data_score(results)} | {cell(results, 'anchor')} | {cell(results, 'spar')} |"
        )
    return "\n".join(lines)


def compare(runs: list[Run], folder: Path) -> str:
    """The report of several methods; written into the folder with its figures."""
    # Only here: the table above needs neither rliable nor matplotlib.
    from reporting.figures import plot_all
    from reporting.statistics import REPETITIONS, Comparison

    comparison = Comparison(runs)
    episodes = "/".join(sorted({str(run["episodes"]) for run in runs}))
    report = "\n\n".join(
        [
            f"Normalised scores (D4RL's formula) of the last checkpoint, {episodes} episodes: mean +- sample standard\n"
            "deviation over seeds (number of seeds). IQM: interquartile mean over all runs, with 95 % stratified\n"
            f"bootstrap intervals ({REPETITIONS} repetitions, rliable). Bands (with many methods only SPAR's): one\n"
            "standard deviation of the learning curves, the 95 % interval of the performance profiles.",
            comparison.markdown(),
            *(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in plot_all(comparison, folder)),
        ]
    )
    write_text(folder / "report.md", report + "\n")
    return report


def main(*folders: Path) -> None:
    runs = [run for folder in folders for run in read_runs(folder)]
    counts = Counter((run.get("method", "spar"), run["dataset"], run["seed"]) for run in runs)
    if twice := [f"{method} on {dataset} with seed {seed}" for (method, dataset, seed), n in counts.items() if n > 1]:
        raise InputError(f"there twice: {'; '.join(twice)}; remove one of them")
    alone = all("spar" in run and run.get("method", "spar") == "spar" for run in runs)
    print(table(runs) if alone else compare(runs, folders[0]))


if __name__ == "__main__":
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders or not all(folder.is_dir() for folder in folders):
        sys.exit("error: usage: python recipes/report.py FOLDER..., folders with results.json files")
    try:
        main(*folders)
    except InputError as err:
        sys.exit(f"error: {err}")
