"""The figure of claim 1."""

from __future__ import annotations

from typing import Any

import numpy as np
from harness.plots import BLACK, GREY, HEAD_B, OLIVE, SPAR, TD3_BC, TRUST_ALONE, VALUE_GRADIENT, plt
from matplotlib.figure import Figure

from claims.drift_methods import AWR, DPG, IN_ACTIONS, LSI_A, LSI_B, SHIPPED, TD3BC, THROUGH

STYLE = {
    LSI_A: (SPAR, "o"), LSI_B: (HEAD_B, "s"), SHIPPED: (SPAR, "D"), AWR: (TRUST_ALONE, "v"),
    THROUGH: (VALUE_GRADIENT, "P"), IN_ACTIONS: (OLIVE, "^"), TD3BC: (TD3_BC, "X"), DPG: (VALUE_GRADIENT, "*"),
}  # fmt: skip
# The methods whose training is drawn, and the manifolds that are curved.
TRAINED, CURVED = (LSI_B, SHIPPED, TD3BC, DPG), ("circle", "parabola", "helix")


def draw(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(2, 3, figsize=(15, 9))
    draw_first_update(axes[0, 0], result)
    draw_training(axes[0, 1], result)
    draw_noise(axes[0, 2], result)
    draw_closed_form(axes[1, 0], result)
    draw_curvature(axes[1, 1], result)
    axes[1, 2].axis("off")
    handles = [
        plt.Line2D([], [], color=colour, marker=marker, markersize=8, markeredgecolor=BLACK, label=name)
        for name, (colour, marker) in STYLE.items()
    ]
    axes[1, 2].legend(handles=handles, title="methods of the top row", loc="center", fontsize=11, frameon=False)
    return figure


def draw_first_update(axes: Any, result: dict[str, Any]) -> None:
    shares = result["first_update_normal_share"]
    for row, (name, (colour, marker)) in enumerate(reversed(STYLE.items())):
        for offset, values in enumerate(shares.values()):
            y = row + 0.2 * (1.5 - offset)
            axes.plot(values[name], y, marker, color=colour, markersize=7, markeredgecolor=BLACK, markeredgewidth=0.5)
        axes.axhline(row - 0.5, color=GREY, linewidth=0.4)
    axes.set_xlim(-0.04, 1.04)
    axes.set_yticks(range(len(STYLE)), list(reversed(STYLE)), fontsize=9)
    axes.set_xlabel(f"normal share of the first update\n(in each row, from the top: {', '.join(shares)})")
    axes.set_title("Latent updates are tangent up to curvature;\nupdates made in action space point off")
    axes.grid(False)


def draw_range(axes: Any, x: list[float], values: Any, **style: Any) -> None:
    """Geometric mean and range over the rows of ``[n, len(x)]``."""
    values = np.array(values)
    axes.plot(x, np.exp(np.log(values).mean(0)), markersize=6, markeredgecolor=BLACK, markeredgewidth=0.4, **style)
    axes.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)


def draw_training(axes: Any, result: dict[str, Any]) -> None:
    for name in TRAINED:
        colour, marker = STYLE[name]
        curves = [result["training"][manifold][name] for manifold in CURVED]
        distance = [[max(value, 1e-6) for value in curve["distance"]] for curve in curves]
        draw_range(axes, curves[0]["step"], distance, color=colour, marker=marker, markevery=4)
    axes.set_yscale("log")
    axes.set(xlabel="gradient steps", ylabel="distance to the manifold\n(mean, action units; floor 1e-6)")
    axes.set_title(
        "Training on the three curves (mean, range): gradients in\naction space leave them, head B stays, A nearly so"
    )


def draw_noise(axes: Any, result: dict[str, Any]) -> None:
    for place, curves in enumerate(result["noisy"].values()):
        for shift, (name, final) in zip((-0.22, 0, 0.22), curves.items()):
            colour, marker = STYLE[name]
            style = {"color": colour, "markersize": 7, "markeredgecolor": BLACK, "markeredgewidth": 0.4}
            axes.plot([place + shift] * len(final["regret"]), final["regret"], marker, **style)
    axes.set_xticks(range(len(result["noisy"])), list(result["noisy"]))
    axes.set_yscale("log")
    axes.set_ylabel("final regret (value units)")
    axes.set_title(
        "Noisy critics (a point a draw of the noise): a gradient\nthrough the decoder follows it, candidates less so"
    )


def draw_closed_form(axes: Any, result: dict[str, Any]) -> None:
    rows = result["closed_form"]["rows"]
    for temperature, alpha, marker in zip(dict.fromkeys(row["temperature"] for row in rows), (1, 0.7, 0.4), "osD"):
        mine = [row for row in rows if row["temperature"] == temperature]
        axes.plot(
            [row["candidates"] for row in mine], [row["ratio"] for row in mine], "-", marker=marker, color=SPAR,
            alpha=alpha, label=rf"$\tau$ = {temperature:g}",
        )  # fmt: skip
    axes.axhline(1, color=GREY, linestyle="--", label="closed form")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.1)
    axes.set(xlabel="candidates K", ylabel=r"move / ($\sigma^2/(\tau S)\; W W^\top \nabla Q$)")
    axes.set_title("Affine, linear Q: the closed form holds for\nmany candidates and soft weights")
    axes.legend()


def draw_curvature(axes: Any, result: dict[str, Any]) -> None:
    floor = 3e-4
    bias = result["curvature_bias"]
    sigma = [row["latent_std"] for row in bias["affine"]]
    head_a = [[max(row["head_a_flat"], floor) for row in bias[manifold]] for manifold in CURVED]
    draw_range(axes, sigma, head_a, color=SPAR, marker="o", label="head A on the three curves (mean, range)")
    exact = [[row["head_b_flat"] for row in rows] for rows in bias.values()]
    exact.append([row["head_a_flat"] for row in bias["affine"]])
    axes.plot(
        sigma, np.maximum(floor, np.max(exact, 0)), "-s", color=HEAD_B, label="head B everywhere, head A on the plane"
    )
    axes.plot(sigma, [row["expected"] for row in bias["affine"]], "--", color=BLACK, label=r"$\sigma^2/2$")
    axes.text(sigma[0], floor * 1.25, "drawn at the floor: round-off, below 1e-14", fontsize=8.5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor / 1.3)
    axes.set_xlabel(r"spread of the candidates $\sigma$ (latent units)")
    axes.set_ylabel("distance of the target (action units)")
    axes.set_title("Averaging residuals (A) costs a curvature bias\nof sigma^2/2; averaging latents (B) does not")
    axes.legend(fontsize=8, loc="upper left")
