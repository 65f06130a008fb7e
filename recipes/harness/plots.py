"""Figures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours: told apart by colour-blind readers, too.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#666666"
)  # fmt: skip


def plot_learning_curve(path: Path, curve: list[dict[str, float]], results: dict[str, Any]) -> None:
    """Score over updates, beside the anchor's and the data's."""
    rows = [*curve, results["spar"], results["anchor"]]
    name = "return_mean" if None in [row["normalized"] for row in rows] else "normalized"
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    steps = [row["step"] for row in curve]
    axes.plot(steps, [row[name] for row in curve], "-o", color=BLUE, markersize=4, label="SPAR (during training)")
    axes.plot(steps[-1:], [results["spar"][name]], "*", color=BLUE, markersize=14, label="SPAR (final evaluation)")
    axes.axhline(results["anchor"][name], color=VERMILION, linestyle="--", label="anchor (behaviour cloning)")
    if results["data"][name] is not None:  # Minari's kitchen sets have no score
        axes.axhline(results["data"][name], color=GREY, linestyle=":", label="data")
    axes.set_xlabel("updates")
    axes.set_ylabel("D4RL-normalised score" if name == "normalized" else "return")
    axes.set_title(f"{results['env']}, {results['dataset']}, seed {results['seed']}", fontsize=10)
    axes.set_ylim(bottom=min(0, *axes.get_ylim()))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
