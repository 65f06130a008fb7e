"""The tables that a run prints at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(results: dict[str, Any], out: Path) -> None:
    console = Console()
    names = ("data", "anchor", "spar", "policy", "selected")
    rows: dict[str, Any] = {name: results[name] for name in names if name in results}
    members = results.get("members", 1)
    mean = f", mean of {members}" if members > 1 else ""
    what = f"{results['method']}{mean}, {results['env'] or 'no environment'}, {results['dataset']}"
    if results["env"] is not None:
        table = numeric_table(f"{what}, {results['episodes']} episodes", "return", "+-", "score", "steps up to")
        for name, row in rows.items():
            normalized = "-" if row["normalized"] is None else f"{row['normalized']:.1f}"
            steps = results["steps"]["data" if name == "data" else "evaluation"]
            table.add_row(name, f"{row['return_mean']:.1f}", f"{row['return_std']:.1f}", normalized, str(steps))
        console.print(table)
        if results["steps"]["data"] > results["steps"]["evaluation"]:
            console.print("The data's episodes go on for longer than an evaluation: their returns do not compare.")
    if "estimates" in results:
        show_estimates(console, what, results["estimates"], rows)
    console.print(
        f"{results['updates_per_second']:.1f} updates/s, {results['wall_seconds']:.0f} s in all; files in {out}"
    )


def show_estimates(
    console: Console, what: str, estimates: dict[str, Any], rows: dict[str, dict[str, Any]] | None = None
) -> None:
    """Prints values by FQE and, where `rows` holds them, distances to the data."""
    rows = rows or {}
    is_measured = any("support_distance" in row for row in rows.values())
    low = f"low {estimates['confidence']:.0%}"
    names = ["value", low, "high", *["critics agree"] * ("anchor" in estimates), *["distance"] * is_measured]
    table = numeric_table(f"{what}: values from the log", *names)
    for name in values_in(estimates):
        numbers = [f"{estimates[name][key]:.4g}" for key in ("mean", "low", "high")]
        if "anchor" in estimates:
            own = {} if name == "anchor" else estimates[name]
            numbers.append(of_all(agreement(own, estimates["anchor"])))
        distance = rows.get(name, {}).get("support_distance")
        if is_measured:
            numbers.append("" if distance is None else f"{distance:.2f}")
        table.add_row(name, *numbers)
    console.print(table)
    console.print(f"Values are returns discounted by {estimates['gamma']:g} a step, from the data's initial states.")
    if "anchor" in estimates:
        console.print("Critics agree: by how many of the evaluation's critics the policy is better than the anchor.")
    if is_measured:
        console.print("Distances of state and action to the data are relative to those of held-out data.")
    for name, gain in estimates.get("gains", {}).items():
        console.print(f"gain of {name} over the anchor: {gain['mean']:.4g}, at least {gain['low']:.4g}")
    if "choice" in estimates:
        console.print(f"surest choice: {estimates['choice']}")


def values_in(estimates: dict[str, Any]) -> list[str]:
    """Names of the policies whose values were estimated, the data's first."""
    return [name for name, value in estimates.items() if isinstance(value, dict) and "mean" in value]


def agreement(own: dict[str, Any], anchor: dict[str, Any]) -> tuple[int, int]:
    """By how many critics a policy is better than the anchor, and of how many; none where the estimates have none."""
    values, base = own.get("critics", []), anchor.get("critics", [])
    if len(values) != len(base):
        return 0, 0
    return sum(one > other for one, other in zip(values, base)), len(values)


def of_all(counts: tuple[int, int]) -> str:
    """The cell of an `agreement`."""
    return f"{counts[0]} of {counts[1]}" if counts[1] else ""


def numeric_table(title: str, *names: str) -> Table:
    table = Table("", title=title)
    for name in names:
        table.add_column(name, justify="right")
    return table
