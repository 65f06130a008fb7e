"""The figure of claim 1."""

from __future__ import annotations

from typing import Any

from harness.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, YELLOW, plt
from matplotlib.figure import Figure

from claims.drift_methods import AWR, DPG, IN_ACTIONS, LSI_A, LSI_B, SHIPPED, TD3BC, THROUGH

STYLE = {
    LSI_A: (BLUE, "o"), LSI_B: (SKY, "s"), SHIPPED: (GREEN, "D"), AWR: (BLACK, "v"),
    THROUGH: (PURPLE, "P"), IN_ACTIONS: (ORANGE, "^"), TD3BC: (YELLOW, "X"), DPG: (VERMILION, "*"),
}  # fmt: skip


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


def draw_training(axes: Any, result: dict[str, Any]) -> None:
    manifold = list(result["first_update_normal_share"])[-1]
    for name, curve in result["training"][manifold].items():
        colour, marker = STYLE[name]
        distance = [max(value, 1e-6) for value in curve["distance"]]
        axes.plot(
            curve["step"], distance, "-", marker=marker, markevery=4, color=colour, markersize=6,
            markeredgecolor=BLACK, markeredgewidth=0.4,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set(xlabel="gradient steps", ylabel="distance to the manifold\n(mean, action units; floor 1e-6)")
    axes.set_title(
        f"Training on the {manifold}: action-space updates leave it;\nlatent ones stay, averages up to curvature"
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
    for temperature, colour, marker in zip(
        dict.fromkeys(row["temperature"] for row in rows), (VERMILION, BLUE, GREEN), "osD"
    ):
        mine = [row for row in rows if row["temperature"] == temperature]
        axes.plot(
            [row["candidates"] for row in mine], [row["ratio"] for row in mine], "-", marker=marker, color=colour,
            label=rf"$\tau$ = {temperature:g}",
        )  # fmt: skip
    axes.axhline(1, color=GREY, linestyle="--", label="closed form")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.1)
    axes.set(xlabel="candidates K", ylabel=r"move / ($\sigma^2/(\tau S)\; W W^\top \nabla Q$)")
    axes.set_title("Affine, linear Q: the closed form holds for\nmany candidates and soft weights")
    axes.legend()


def draw_curvature(axes: Any, result: dict[str, Any]) -> None:
    floor = 3e-4
    for (manifold, rows), colour, marker in zip(result["curvature_bias"].items(), (GREY, BLUE, ORANGE, GREEN), "vosD"):
        sigma = [row["latent_std"] for row in rows]
        style = {"marker": marker, "color": colour, "markeredgecolor": BLACK, "markeredgewidth": 0.4}
        axes.plot(sigma, [max(row["head_a_flat"], floor) for row in rows], "-", label=f"{manifold}, head A", **style)
    latents = [max(row["head_b_flat"], floor) for row in rows]
    axes.plot(sigma, latents, ":s", color=SKY, label="all manifolds, head B", markersize=9, fillstyle="none")
    axes.plot(sigma, [row["expected"] for row in rows], "--", color=BLACK, label=r"$\sigma^2/2$")
    axes.text(sigma[0], floor * 1.25, "drawn at the floor: round-off, below 1e-14", fontsize=8.5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor / 1.3)
    axes.set_xlabel(r"spread of the candidates $\sigma$ (latent units)")
    axes.set_ylabel("distance of the target (action units)")
    axes.set_title("Averaging residuals (A) costs a curvature bias\nof sigma^2/2; averaging latents (B) does not")
    axes.legend(fontsize=8, loc="upper left")
