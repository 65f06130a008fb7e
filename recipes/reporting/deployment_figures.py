"""The figures of the report before a deployment, as data URIs: the page needs no other file."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from harness.plots import ANCHOR, BLACK, DATA, GREY, SPAR, plt
from matplotlib.figure import Figure


def figures(facts: dict[str, Any]) -> dict[str, str]:
    drawn = {
        "residual": draw_residuals(facts["residual"]),
        "support": draw_support(facts["support"]),
        "value": draw_value(facts["estimates"]),
        "calibration": draw_calibration(facts["estimates"]["calibration"]),
    }
    return {name: as_uri(figure) for name, figure in drawn.items()}


def draw_residuals(residual: dict[str, Any]) -> Figure:
    """A histogram a component."""
    columns = min(3, len(residual))
    rows = -(-len(residual) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.0 * rows + 0.3), squeeze=False)
    for axes, (name, row) in zip(panels.flat, residual.items()):
        bound, counts = row["histogram_bound"], np.array(row["histogram"])
        edges = np.linspace(-bound, bound, len(counts) + 1)
        axes.stairs(counts / max(1, counts.sum()), edges, fill=True, color=SPAR)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_title(f"action {name}".replace("$", r"\$"), fontsize=9)  # else mathematics
    for axes in panels.flat[len(residual) :]:
        axes.remove()
    figure.supxlabel("policy less anchor, action units", fontsize=9)
    figure.supylabel("share of states", fontsize=9)
    return figure


def draw_support(support: dict[str, Any]) -> Figure:
    """Quantiles of the distances, a bar each."""
    figure, axes = plt.subplots(figsize=(6.2, 2.0))
    rows = {"policy": SPAR, "anchor": ANCHOR, "data": DATA}
    for height, (name, color) in enumerate(rows.items()):
        row = support[name]
        axes.hlines(height, row["5%"], row["95%"], color=color, linewidth=7, alpha=0.35)
        axes.hlines(height, row["25%"], row["75%"], color=color, linewidth=7, alpha=0.6)
        axes.plot(row["median"], height, "o", color=color)
    axes.axvline(support["limit"], color=BLACK, linestyle="--", linewidth=1)
    axes.set_yticks(range(3), ["policy", "anchor", "held-out data"])
    axes.set_ylim(-0.6, 2.6)
    axes.set_xlabel("distance; bars: 5 to 95 % and 25 to 75 % of the states; dashed: the data's 95 %", fontsize=9)
    axes.grid(False, axis="y")
    return figure


def draw_value(estimates: dict[str, Any]) -> Figure:
    """Estimates with intervals, and each critic's own."""
    names = list(dict.fromkeys([estimates["of"], "anchor", "data"]))
    figure, axes = plt.subplots(figsize=(6.2, 0.5 * len(names) + 0.8))
    for height, name in enumerate(names):
        value, color = estimates[name], {"anchor": ANCHOR, "data": DATA}.get(name, SPAR)
        axes.hlines(height, value["low"], value["high"], color=color, linewidth=7, alpha=0.35)
        axes.plot(value["mean"], height, "o", color=color)
        axes.plot(value.get("critics", []), [height] * len(value.get("critics", [])), "|", color="black")
    labels = {"anchor": "anchor", "data": "held-out data"}
    axes.set_yticks(range(len(names)), [labels.get(name, f"policy ({name})") for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(f"return discounted by {estimates['gamma']:g} a step; ticks: each critic", fontsize=9)
    axes.grid(False, axis="y")
    return figure


def draw_calibration(calibration: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(3.6, 3.2))
    both = [*calibration["predicted"], *calibration["true"]]
    axes.plot([min(both), max(both)], [min(both), max(both)], color=GREY, linestyle=":")
    axes.plot(calibration["predicted"], calibration["true"], "o", color=SPAR)
    axes.set(xlabel="predicted return-to-go", ylabel="true, held-out")
    return figure


def as_uri(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    plt.close(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
