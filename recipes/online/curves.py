"""Return over environment steps of all finished runs on one data set: a JSON file, a figure, one line for each run."""

from __future__ import annotations

import json
from math import hypot, sqrt
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from harness.output import write_json
from harness.plots import DATA, SPAR, TD3_BC, plt, save_figure

NAMES = {"spar": "SPAR", "td3_bc": "TD3, from TD3+BC"}
COLORS = {"spar": SPAR, "td3_bc": TD3_BC}


def report(out: Path) -> None:
    """Writes online.json and online.png into the data set's folder, from a finished run and the others like it there.

    Those on other rows, in another environment or with other evaluations are named and left out.
    """
    folder = out.parents[1]
    found = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*/seed*/results.json"))}
    own = protocol(found[out / "results.json"])
    runs = []
    for path, run in found.items():
        if "online" not in run:
            continue
        if different := [name for name, value in protocol(run).items() if value != own[name]]:
            print(f"{path.parent}: left out of online.json, for other {', '.join(different)}")
        else:
            runs.append(run)
            print(describe(run))
    write_json(folder / "online.json", gather(runs))
    draw(folder / "online.png", runs)


def protocol(run: dict[str, Any]) -> dict[str, Any]:
    """What runs must have in common to stand in one figure."""
    steps = [row["step"] for row in run["online"]["curve"]]
    same = {name: run.get(name) for name in ("env", "env_kwargs", "rows_sha256")}
    return {**same, "evaluations": steps, "episodes": run["online"]["episodes"]}


def gather(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The curves by method and seed, and how each run starts."""
    methods: dict[str, Any] = {}
    for run in runs:
        rows = run["online"]["curve"]
        curve = {key: [row[key] for row in rows] for key in rows[0]}
        methods.setdefault(run["method"], {})[f"seed {run['seed']}"] = {**curve, "start": start_of(run["online"])}
    return {key: runs[0][key] for key in ("dataset", "env", "versions")} | {"methods": methods}


def start_of(online: dict[str, Any]) -> dict[str, float]:
    """The offline policy's return, the lowest of the curve's first half, and the noise of their difference.

    The noise is twice the standard error of the difference of two means over episodes: what it would be, nineteen times
    in twenty, for one policy. That policies of an undisturbed training differ is not in it.
    """
    before, *after = online["curve"]
    early = [row for row in after if row["step"] <= after[-1]["step"] / 2] or after[:1]
    lowest = min(early, key=lambda row: row["return_mean"])
    noise = 2 * hypot(before["return_std"], lowest["return_std"]) / sqrt(online["episodes"])
    return {"offline": before["return_mean"], "lowest_of_first_half": lowest["return_mean"], "noise": noise}


def describe(run: dict[str, Any]) -> str:
    start, last = start_of(run["online"]), run["online"]["curve"][-1]
    offline, lowest, noise = start.values()
    verdict = "below by more than noise" if lowest < offline - noise else "not below"
    return (
        f"{run['method']}, seed {run['seed']}: offline {offline:.0f}, lowest of the first half {lowest:.0f} "
        f"({verdict}, noise {noise:.0f}), after {last['step']} steps {last['return_mean']:.0f}"
    )


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """The mean over seeds, and their range."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for method in dict.fromkeys(run["method"] for run in runs):
        curves = [run["online"]["curve"] for run in runs if run["method"] == method]
        color = COLORS.get(method)
        steps = [row["step"] for row in curves[0]]
        returns = np.array([[row["return_mean"] for row in curve] for curve in curves])
        (line,) = axes.plot(steps, returns.mean(0), color=color, linewidth=2.2, label=NAMES.get(method, method))
        axes.fill_between(steps, returns.min(0), returns.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        axes.plot(0, returns[:, 0].mean(), "o", color=line.get_color(), markersize=5)
    data = mean(run["data"]["return_mean"] for run in runs)
    axes.axhline(data, color=DATA, linestyle=":", label="the data")
    axes.set(xlabel="environment steps (0: the offline policy)", ylabel="return")
    axes.set_title(
        f"{runs[0]['env']}, {runs[0]['dataset']}; mean and range of {len({run['seed'] for run in runs})} seeds"
    )
    axes.set_ylim(bottom=min(0, *axes.get_ylim()))
    axes.legend()
    save_figure(figure, path)
