"""The look of all figures, and those of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from harness.output import whole_file
from torchrl_spar import InputError

plt.rcParams.update({
    "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 10,
    "legend.fontsize": 9,
})  # fmt: skip
# Okabe and Ito's colours, which colour-blind readers tell apart, with Tol's olive for their yellow.
BLACK, ORANGE, SKY, GREEN, OLIVE, BLUE, VERMILION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#999933", "#0072B2", "#D55E00", "#CC79A7", "#666666"
)  # fmt: skip
# What a colour means in every figure. Other methods take those in OTHERS.
SPAR, ANCHOR, DATA, HEAD_B, TRUST_ALONE, TD3_BC, VALUE_GRADIENT = BLUE, ORANGE, GREY, SKY, GREEN, VERMILION, PURPLE
OTHERS = (BLACK, OLIVE)


def save_figure(figure: Figure, path: Path, *, dpi: int = 150) -> None:
    """Writes a figure, whole or not at all, and closes it."""
    with whole_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=dpi)
    plt.close(figure)


def printable(text: str) -> str:
    """Without the bytes of a file's name that are no UTF-8, which Matplotlib refuses."""
    return text.encode(errors="backslashreplace").decode()


def check_figure(path: Path) -> None:
    """Refuses a name that tells no kind of figure."""
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:] not in kinds:
        raise InputError(f"figure={path}: must end in one of .{', .'.join(sorted(kinds))}")


def plot_learning_curve(path: Path, curve: list[dict[str, float]], results: dict[str, Any]) -> None:
    """Score over updates, beside the anchor's and the data's."""
    rows = [*curve, results["spar"], results["anchor"]]
    name = "return_mean" if None in [row["normalized"] for row in rows] else "normalized"
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    steps = [row["step"] for row in curve]
    axes.plot(steps, [row[name] for row in curve], "-o", color=SPAR, markersize=4, label="SPAR (during training)")
    axes.plot(steps[-1:], [results["spar"][name]], "*", color=SPAR, markersize=14, label="SPAR (final evaluation)")
    axes.axhline(results["anchor"][name], color=ANCHOR, linestyle="--", label="anchor (behaviour cloning)")
    if results["data"][name] is not None:  # Minari's kitchen sets have no score
        axes.axhline(results["data"][name], color=DATA, linestyle=":", label="data")
    axes.set(xlabel="updates", ylabel="D4RL-normalised score" if name == "normalized" else "return")
    axes.set_title(printable(f"{results['env']}, {results['dataset']}, seed {results['seed']}"))
    axes.set_ylim(bottom=min(0, *axes.get_ylim()))
    axes.legend(loc="lower right")
    save_figure(figure, path)


def plot_log_curve(path: Path, curve: list[dict[str, float]], results: dict[str, Any]) -> None:
    """Without an environment: the critics' value and the distance to the data, over updates; FQE's estimates."""
    figure, (axes, below) = plt.subplots(2, 1, figsize=(6.4, 5.6), height_ratios=(2, 1), sharex=True)
    steps, value, spread = ([row[name] for row in curve] for name in ("step", "value", "value_std"))
    axes.errorbar(steps, value, spread, color=SPAR, marker="o", markersize=4, label="SPAR's own critics, +- one std")
    estimates = results["estimates"]
    lines = {"spar": (SPAR, "SPAR, FQE"), "anchor": (ANCHOR, "anchor, FQE"), "data": (DATA, "data")}
    for name, (color, label) in lines.items():
        mean, low, high = (estimates[name][key] for key in ("mean", "low", "high"))
        axes.axhline(mean, color=color, linestyle="--", label=f"{label}: {mean:.4g} [{low:.4g}, {high:.4g}]")
    axes.set_ylabel(f"return discounted by {estimates['gamma']:g}")
    axes.set_title(printable(f"no environment, {results['dataset']}, seed {results['seed']}"))
    axes.legend()
    below.plot(steps, [row["support_distance"] for row in curve], "-o", color=SPAR, markersize=4)
    below.axhline(1, color=DATA, linestyle=":")
    below.set(xlabel="updates", ylabel="distance to the data\n(held-out data: 1)")
    save_figure(figure, path)
