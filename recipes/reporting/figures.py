"""Figures of a comparison: intervals, performance profiles, learning curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from harness.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION

from reporting.statistics import REFERENCE, Comparison, Interval, label

# One of Okabe and Ito's colours a family, dashes for its variants: also told apart by colour-blind readers.
STYLES = {
    "bc": (GREY, "-"), "bc10": (GREY, "--"), "td3_bc": (ORANGE, "-"), "td3_bc_critics": (ORANGE, "--"),
    "iql": (GREEN, "-"), "cql": (PURPLE, "-"), "rebrac": (VERMILION, "-"), "rebrac_critics": (VERMILION, "--"),
    "spar_iql": (BLUE, ":"), "spar": (BLUE, "-"), "spar_latent": (BLUE, "--"),
}  # fmt: skip
# Of other methods, such as ablations: all colours, then again with the next dashes.
OTHER_COLORS, OTHER_DASHES = (ORANGE, GREEN, PURPLE, VERMILION, GREY, "#000000"), ("-", "--", ":", "-.")
# Bands of more methods hide each other: then only the reference has one.
MOST_BANDS = 5


def plot_all(comparison: Comparison, folder: Path) -> list[str]:
    """Writes the figures; returns their file names."""
    figures = {"learning_curves.png": _curves(comparison)}
    if scores := comparison.scores():
        figures["interquartile_means.png"] = _intervals(comparison.interquartile_means(), "IQM of the normalised score")
        every = np.concatenate([values.ravel() for values in scores.values()])
        figures["performance_profiles.png"] = _profiles(comparison, np.linspace(every.min(), every.max(), 101))
    if improvements := comparison.improvements():
        figures["improvement.png"] = _intervals(improvements, "probability that SPAR (head A) is better", middle=0.5)
    for name, figure in figures.items():
        partial = folder / f".{name}.partial"
        figure.savefig(partial, format="png", dpi=150)
        partial.replace(folder / name)
        plt.close(figure)
    return list(figures)


def styles(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and dashes of each method."""
    others = [method for method in methods if method not in STYLES]
    looks = [(color, dashes) for dashes in OTHER_DASHES for color in OTHER_COLORS]
    return STYLES | dict(zip(others, itertools.cycle(looks)))


def has_band(method: str, methods: int) -> bool:
    return methods <= MOST_BANDS or method == REFERENCE


def _intervals(intervals: dict[str, Interval], title: str, middle: float | None = None) -> plt.Figure:
    """One line a method, its point and its 95 % interval."""
    figure, axes = plt.subplots(figsize=(7.0, 1.0 + 0.36 * len(intervals)), layout="constrained")
    names, style = list(intervals)[::-1], styles(intervals)
    for height, name in enumerate(names):
        interval, color = intervals[name], style[name][0]
        axes.hlines(height, interval.low, interval.high, color=color, linewidth=7, alpha=0.35)
        axes.plot(interval.point, height, "o", color=color, markersize=7)
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(f"{title}, 95 % interval")
    if middle is not None:
        axes.axvline(middle, color=GREY, linestyle=":")
        axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x", alpha=0.3)
    return figure


def _profiles(comparison: Comparison, thresholds: np.ndarray) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8.4, 4.2), layout="constrained")
    shares, intervals = comparison.profiles(thresholds)
    style = styles(comparison.methods)
    for name, share in shares.items():
        color, dashes = style[name]
        axes.plot(thresholds, share, dashes, color=color, label=label(name), drawstyle="steps-post")
        if has_band(name, len(shares)):
            low, high = intervals[name]
            axes.fill_between(thresholds, low, high, color=color, alpha=0.15, step="post", linewidth=0)
    axes.set_xlabel("normalised score")
    axes.set_ylabel("share of runs above it")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9)
    return figure


def _curves(comparison: Comparison) -> plt.Figure:
    """A panel a data set: mean over seeds and one standard deviation."""
    columns = min(3, math.ceil(math.sqrt(len(comparison.datasets))))
    rows = -(-len(comparison.datasets) // columns)
    size = (2.4 + 4.6 * columns, 3.6 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    handles, style = {}, styles(comparison.methods)
    for axes, dataset in zip(panels.flat, comparison.datasets):
        for name, (steps, scores) in comparison.curves(dataset).items():
            color, dashes = style[name]
            center, spread = scores.mean(0), scores.std(0, ddof=min(1, len(scores) - 1))
            (handles[label(name)],) = axes.plot(steps, center, dashes, color=color)
            if has_band(name, len(comparison.methods)):
                axes.fill_between(steps, center - spread, center + spread, color=color, alpha=0.15, linewidth=0)
        axes.set_title(dataset, fontsize=10)
        axes.set_xlabel("updates")
        axes.set_ylabel("normalised score")
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(comparison.datasets) :]:
        axes.remove()
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=9)
    return figure
