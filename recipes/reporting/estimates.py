"""Runs by their values as estimated from the log: a table where there are no scores, and the method to choose."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean, stdev

from reporting.names import in_order, label, method_of, row
from reporting.runs import Run
from torchrl_spar import InputError


def are_of_logs(runs: list[Run]) -> bool:
    """Whether no run has an environment.

    Raises:
        InputError: if some have one and some have none.
    """
    logs = [run for run in runs if run.get("env", "") is None]
    if logs and len(logs) < len(runs):
        raise InputError(
            f"{len(logs)} of {len(runs)} runs have no environment: their estimated values do not compare with the "
            "others' scores; report them apart"
        )
    return bool(logs)


def deployed(run: Run) -> str:
    """What policy.pt is, by its name in the results and in the estimates."""
    return "policy" if "policy" in run else "selected" if "selected" in run else "spar"


def estimate_of(run: Run) -> dict[str, float]:
    name, estimates = deployed(run), run["estimates"]
    return estimates[estimates["choice"] if name == "selected" else name]


def table(runs: list[Run]) -> str:
    """A row a data set and method: value and lower bound, both in the mean over seeds, and distance to the data."""
    lines = [row("data set", "method", "value", "lower bound", "distance to the data"), row(*["---"] * 5)]
    for dataset, methods in sorted(by_method(runs).items()):
        of_data = [[run["estimates"]["data"][name] for run in next(iter(methods.values()))] for name in ("mean", "low")]
        lines.append(row(dataset, "the data", *map(_spread, of_data), "1.00"))
        anchored = [run["estimates"] for group in methods.values() for run in group if "anchor" in run["estimates"]]
        if anchored:
            values = [[run["anchor"][name] for run in anchored] for name in ("mean", "low")]
            lines.append(row(dataset, "SPAR's anchor", *map(_spread, values), ""))
        for method, group in methods.items():
            values = [[estimate_of(run)[name] for run in group] for name in ("mean", "low")]
            distance = mean(run[deployed(run)]["support_distance"] for run in group)
            lines.append(row(dataset, label(method), *map(_spread, values), f"{distance:.2f}"))
    gamma = runs[0]["estimates"]["gamma"]
    note = f"Values: returns discounted by {gamma:g} a step, estimated from the log by FQE (number of seeds)."
    return "\n".join([*lines, "", note])


def choices(runs: list[Run]) -> list[str]:
    """The method with the highest lower bound (mean over seeds) on each data set; its regret, if there are scores."""
    lines = []
    for dataset, methods in sorted(by_method(runs).items()):
        bounds = {method: mean(estimate_of(run)["low"] for run in group) for method, group in methods.items()}
        chosen = max(bounds, key=lambda method: bounds[method])
        line = f"{dataset}: by its log alone, {label(chosen)} would be chosen of {len(methods)}"
        every = [run for group in methods.values() for run in group]
        if all(run["env"] and run[deployed(run)]["normalized"] is not None for run in every):
            scores = {
                method: mean(run[deployed(run)]["normalized"] for run in group) for method, group in methods.items()
            }
            best = max(scores, key=lambda method: scores[method])
            regret = scores[best] - scores[chosen]
            line += f" ({scores[chosen]:.1f} points, regret {regret:.1f} to {label(best)})"
        lines.append(line + ".")
    return lines


def by_method(runs: list[Run]) -> dict[str, dict[str, list[Run]]]:
    """Runs by data set and method.

    Raises:
        InputError: for values of different discounts.
    """
    discounts = sorted({run["estimates"]["gamma"] for run in runs})
    if len(discounts) > 1:
        raise InputError(
            f"values discounted by {discounts[0]:g} and {discounts[-1]:g} do not compare; report them apart"
        )
    found: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for method in in_order({method_of(run) for run in runs}):
        for run in (run for run in runs if method_of(run) == method):
            found[run["dataset"]][method].append(run)
    return found


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4g}" + (f" +- {stdev(values):.2g} ({len(values)})" if len(values) > 1 else " (1)")
