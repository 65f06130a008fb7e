"""Markdown tables of finished runs, and of several methods their statistics and figures.

python recipes/report.py recipes/results/development@spar    # SPAR alone: prints one row a data set
python recipes/report.py outputs/compare      # several methods: prints report.md and writes it there with figures, of
                                              # runs without an environment with their values
python recipes/report.py outputs/ablations outputs/compare@spar    # and one method's runs on the same data sets
python recipes/report.py outputs/compare table=runs.jsonl    # collects the finished runs into a table, one line each

Folders hold results of fresh runs, or tables.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean, stdev

from harness.output import data_score, write_text
from reporting import estimates
from reporting.estimates import are_of_logs
from reporting.names import method_of, parts_of
from reporting.runs import Run, check_comparable, read_runs, write_table

from torchrl_spar import InputError
from torchrl_spar.paths import user_path


def table(runs: list[Run], name: str) -> str:
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
    lines = [f"| data set | seeds | data | anchor | {name} |", "|---|---|---|---|---|"]
    for dataset, results in sorted(by_dataset.items()):
        seeds = ", ".join(str(result["seed"]) for result in results)
        lines.append(
            f"| {dataset} | {seeds} | {data_score(results)} | {cell(results, 'anchor')} | {cell(results, 'spar')} |"
        )
    return "\n".join(lines)


def compare(runs: list[Run], folder: Path) -> str:
    """The report of several methods; its figures are written into the folder."""
    # Only here: the table above does not need matplotlib.
    from reporting.figures import plot_all
    from reporting.statistics import REPETITIONS, Comparison

    comparison = Comparison(runs)
    episodes = "/".join(sorted({str(run["episodes"]) for run in runs}))
    text = (
        f"Normalised scores (D4RL's formula) of the last checkpoint, {episodes} episodes: mean +- sample standard\n"
        "deviation over seeds (number of seeds)."
    )
    if len(comparison.datasets) > 1:
        text += (
            " IQM: interquartile mean over all runs, with 95 % stratified\n"
            f"bootstrap intervals ({REPETITIONS} repetitions). Second table: differences of runs with the\n"
            "same seed; the interval of their mean draws data sets and seeds anew. p: how often such a mean or a\n"
            "higher one comes about where neither method is better (paired permutation test)."
        )
    text += "\n" if len(comparison.datasets) > 1 else " "
    text += "Bands: one standard deviation of the learning\ncurves, the 95 % interval of the performance profiles."
    figures = [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in plot_all(comparison, folder)]
    return "\n\n".join([text, comparison.markdown(), *figures])


def main(*sources: Path) -> None:
    runs = read_runs(sources[0])
    datasets = {run["dataset"] for run in runs}
    for source in sources[1:]:
        if not (more := [run for run in read_runs(source) if run["dataset"] in datasets]):
            raise InputError(f"{source}: has no run on a data set of {sources[0]}; report it apart")
        runs += more
    logs = are_of_logs(runs)
    if not logs and (unscored := [run for run in runs if None in _scores(run)]):
        raise InputError(f"{sources[0]}: {unscored[0]['env']} has no normalised score; move its runs elsewhere")
    counts = Counter((method_of(run), run["dataset"], run["seed"]) for run in runs)
    if twice := [f"{method} on {dataset} with seed {seed}" for (method, dataset, seed), n in counts.items() if n > 1]:
        raise InputError(f"there twice: {'; '.join(twice)}; remove one of them")
    if len(budgets := {int(run.get("updates", 0)) for run in runs}) > 1:
        raise InputError(
            f"runs of {' and '.join(map(str, sorted(budgets)))} updates are not comparable; report them apart"
        )
    check_comparable(runs)
    methods = {method_of(run) for run in runs}
    name, members = parts_of(next(iter(methods)))
    alone = len(methods) == 1 and name == "spar" and all("spar" in run for run in runs)
    title = "SPAR" if members == 1 else f"SPAR, mean of {members}"
    if alone:
        print(estimates.table(runs) if logs else table(runs, title))
        return
    folder = Path(str(sources[0]).partition("@")[0])
    folder = folder if folder.is_dir() else folder.parent
    report = estimates.report(runs) if logs else compare(runs, folder)
    write_text(folder / "report.md", report + "\n")
    print(report)
    if not logs and all("estimates" in run for run in runs):
        print("", *estimates.choices(runs), sep="\n")


def _scores(run: Run) -> list[float | None]:
    return [run[name]["normalized"] for name in ("policy", "anchor", "spar") if name in run]


if __name__ == "__main__":
    if {"--help", "-h"} & {*sys.argv}:
        sys.exit(print(__doc__))
    given = [argument for argument in sys.argv[1:] if not argument.startswith("table=")]
    given = [str(user_path(name)) for name in given]
    tables = [user_path(argument.removeprefix("table=")) for argument in sys.argv[1:] if argument.startswith("table=")]
    if missing := [name for name in given if not Path(name.partition("@")[0]).exists()]:
        sys.exit(f"error: {missing[0]}: no such folder or table")
    if not given or len(tables) > 1:
        sys.exit("error: usage: python recipes/report.py FOLDER[@METHOD]... [table=FILE]: folders with runs or tables")
    try:
        if tables:
            print(f"{write_table(tables[0], [*map(Path, given)])} runs in {tables[0]}")
        else:
            main(*map(Path, given))
    except InputError as err:
        sys.exit(f"error: {err}")
