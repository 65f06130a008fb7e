"""Figures of a comparison: intervals, performance profiles, learning curves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from harness.plots import ANCHOR, GREY, OTHERS, SPAR, TD3_BC, TRUST_ALONE, VALUE_GRADIENT, plt, printable, save_figure

from reporting.names import label
from reporting.statistics import Comparison, Interval

COLORS = {"no_lsi": TRUST_ALONE, "td3_bc": TD3_BC, "value_gradient": VALUE_GRADIENT}


def plot_all(comparison: Comparison, folder: Path) -> list[str]:
    """Writes the figures; returns their file names."""
    figures = {"learning_curves.png": _curves(comparison)}
    if scores := comparison.scores():
        title = "IQM of the normalised score"
        figures["interquartile_means.png"] = _intervals(comparison.interquartile_means(), comparison.reference, title)
        every = np.concatenate([values.ravel() for values in scores.values()])
        figures["performance_profiles.png"] = _profiles(comparison, np.linspace(every.min(), every.max(), 101))
    if len(comparison.datasets) > 1 and (improvements := comparison.improvements()):
        title = f"probability that {label(comparison.reference)} is better"
        figures["improvement.png"] = _intervals(improvements, comparison.reference, title, middle=0.5)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    return list(figures)


def colors(comparison: Comparison) -> dict[str, str]:
    """The methods whose curves are shown, SPAR and the best two others, with their colours."""
    shown = {comparison.reference: SPAR} if comparison.of_spar else {}
    free = iter(OTHERS)
    return shown | {name: COLORS.get(name) or next(free) for name in comparison.best(2)}


def _intervals(intervals: dict[str, Interval], reference: str, title: str, middle: float | None = None) -> plt.Figure:
    """One line a method, its point and its 95 % interval."""
    figure, axes = plt.subplots(figsize=(7.0, 1.0 + 0.36 * len(intervals)))
    names = list(intervals)[::-1]
    for height, name in enumerate(names):
        interval, color = intervals[name], SPAR if name == reference else GREY
        axes.hlines(height, interval.low, interval.high, color=color, linewidth=7, alpha=0.35)
        axes.plot(interval.point, height, "o", color=color, markersize=7)
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(f"{title}, 95 % interval")
    if middle is not None:
        axes.axvline(middle, color=GREY, linestyle=":")
        axes.set_xlim(-0.02, 1.02)
    axes.grid(False, axis="y")
    return figure


def _profiles(comparison: Comparison, thresholds: np.ndarray) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    shares, intervals = comparison.profiles(thresholds)
    for name, color in colors(comparison).items():
        if name in shares:
            low, high = intervals[name]
            axes.plot(thresholds, shares[name], color=color, label=label(name), drawstyle="steps-post")
            axes.fill_between(thresholds, low, high, color=color, alpha=0.15, step="post", linewidth=0)
    axes.set(xlabel="normalised score", ylabel="share of runs above it")
    axes.legend()
    return figure


def _curves(comparison: Comparison) -> plt.Figure:
    """A panel a data set: mean over seeds and one standard deviation; SPAR's anchor as a line."""
    columns = min(3, math.ceil(math.sqrt(len(comparison.datasets))))
    rows = -(-len(comparison.datasets) // columns)
    size = (4.6 * columns, 3.4 * rows + 0.4)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False)
    handles = {}
    for axes, dataset in zip(panels.flat, comparison.datasets):
        curves = comparison.curves(dataset)
        for name, color in colors(comparison).items():
            if name in curves:
                steps, scores = curves[name]
                center, spread = scores.mean(0), scores.std(0, ddof=min(1, len(scores) - 1))
                (handles[label(name)],) = axes.plot(steps / 1000, center, color=color, linewidth=1.8)
                axes.fill_between(steps / 1000, center - spread, center + spread, color=color, alpha=0.15, linewidth=0)
        if anchors := comparison.anchors(dataset):
            handles["SPAR's anchor"] = axes.axhline(float(np.mean(anchors)), color=ANCHOR, linestyle="--")
        axes.set(title=printable(dataset.removeprefix("minari:")), xlabel="thousand updates", ylabel="normalised score")
    for axes in panels.flat[len(comparison.datasets) :]:
        axes.remove()
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(4, 2 * columns),
        fontsize=10,
        frameon=False,
    )
    return figure
