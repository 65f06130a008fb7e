"""Runs by their values as estimated from the log: a table where there are no scores, and the method to choose."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean, stdev
from typing import Any

from harness.printing import agreement, of_all

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


def estimated_as(run: Run) -> str:
    """Under which name the estimates have it."""
    name = deployed(run)
    return run["estimates"]["choice"] if name == "selected" else name


def estimate_of(run: Run) -> dict[str, Any]:
    return run["estimates"][estimated_as(run)]


def report(runs: list[Run]) -> str:
    """The table, and what the logs alone would choose."""
    return "\n".join([table(runs), "", *choices(runs)])


def table(runs: list[Run]) -> str:
    """A row a data set and method: values and distances in the mean over seeds, and how many critics agree."""
    names = ("data set", "method", "value", "lower bound", "upper bound", "distance to the data", "critics agree")
    lines = [row(*names), row(*["---"] * len(names))]
    for dataset, methods in sorted(by_method(runs).items()):
        of_data = [run["estimates"]["data"] for run in next(iter(methods.values()))]
        lines.append(row(dataset, "the data", *_values(of_data), "1.00", ""))
        anchored = anchored_runs(methods)
        if anchored:
            values = _values([run["estimates"]["anchor"] for run in anchored])
            distance = _distance([run["anchor"] for run in anchored])
            lines.append(row(dataset, "SPAR's anchor", *values, distance, ""))
        for method, group in methods.items():
            values = _values([estimate_of(run) for run in group])
            distance = _distance([run[deployed(run)] for run in group])
            lines.append(row(dataset, label(method), *values, distance, _agreement(group, anchored)))
    gamma = runs[0]["estimates"]["gamma"]
    note = f"Values: returns discounted by {gamma:g} a step, estimated from the log by FQE (number of seeds)."
    note += " Critics agree: by how many of FQE's critics, of all seeds, the policy is better than SPAR's anchor."
    return "\n".join([*lines, "", note])


def anchored_runs(methods: dict[str, list[Run]]) -> list[Run]:
    """One run a seed that has an anchor; all methods with one have the same."""
    groups = [group for method, group in methods.items() if method != "no_anchor"]
    return [*{run["seed"]: run for group in groups for run in group if "anchor" in run["estimates"]}.values()]


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


def _values(estimates: list[dict[str, Any]]) -> list[str]:
    """The cells of value and bounds."""
    return [_spread([estimate[name] for estimate in estimates]) for name in ("mean", "low", "high")]


def _distance(results: list[dict[str, Any]]) -> str:
    known = [result["support_distance"] for result in results if "support_distance" in result]
    return f"{mean(known):.2f}" if known else ""


def _agreement(runs: list[Run], anchored: list[Run]) -> str:
    """Over all runs whose policy is no anchor. A rival is compared with the anchor of SPAR's run with its seed."""
    anchors = {run["seed"]: run["estimates"]["anchor"] for run in anchored}
    counts = [
        agreement(estimate_of(run), run["estimates"].get("anchor", anchors.get(run["seed"], {})))
        for run in runs
        if estimated_as(run) != "anchor"
    ]
    return of_all((sum(ahead for ahead, _ in counts), sum(critics for _, critics in counts)))


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4g}" + (f" +- {stdev(values):.2g} ({len(values)})" if len(values) > 1 else " (1)")
