"""Claim 2, gradient conflict: does improving pull the head against fitting the data?

On the embedded data, along two runs from one start (anchor, VAE, critics): SPAR, and the same loss with a value
gradient (dQ/da through the head) in the place of Latent Self-Imitation. At every measurement the cosine of each improve
gradient with each fit gradient, by the head's parameters, on the same rows. Where a sum of two terms is stationary
their gradients are opposite whatever the terms are, so a cosine near -1 late in a run is no surprise.

python recipes/claim.py gradient_conflict
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from harness.options import option, recipe_options
from harness.plots import GREY, SPAR, VALUE_GRADIENT, plt
from matplotlib.figure import Figure
from omegaconf import DictConfig
from tensordict import TensorDictBase
from torch import Tensor

from claims.claim_tools import finding, grade
from claims.small_spar import (
    SmallOptions,
    clone_behaviour,
    fit_manifold,
    fixed_rows,
    head_parameters,
    improve,
    load_embedded,
    make_update,
    mean_value,
    rectified,
)  # fmt: skip
from torchrl_spar import OfflineReplayBuffer, SPARLoss, gradient_cosine

IMPROVE = {"lsi": "Latent Self-Imitation", "value": "value gradient"}
FIT = {"plain": "plain regression on the data's residuals", "trust": "advantage-weighted regression (the trust term)"}


def terms(loss: SPARLoss, batch: TensorDictBase) -> dict[str, Tensor]:
    """The four losses of the head: two that fit, two that improve."""
    state, residual, action = rectified(loss, batch)
    data_residual = (batch["action"] - state["anchor_action"]) / loss.residual_scale
    return {
        "plain": (residual - data_residual).pow(2).mean(),
        "trust": part_of_actor_loss(loss, batch, lsi=0.0, trust=1.0),
        "lsi": part_of_actor_loss(loss, batch, lsi=1.0, trust=0.0),
        "value": -mean_value(loss, state, action).mean(),
    }


def part_of_actor_loss(loss: SPARLoss, batch: TensorDictBase, *, lsi: float, trust: float) -> Tensor:
    """`SPARLoss.actor_loss` with other weights of its two parts."""
    before = loss.lsi_coeff.clone(), loss.trust_coeff.clone()
    loss.lsi_coeff.fill_(lsi)
    loss.trust_coeff.fill_(trust)
    value = loss.actor_loss(batch)[0]
    # Products with the coefficients are kept for the backward pass, so new tensors replace them.
    loss.lsi_coeff, loss.trust_coeff = before
    return value


def cosines(loss: SPARLoss, batch: TensorDictBase) -> dict[str, float]:
    values, params = terms(loss, batch), head_parameters(loss)
    return {f"{a}/{b}": gradient_cosine(values[a], values[b], params).item() for a in IMPROVE for b in FIT}


@recipe_options("claims/gradient_conflict")
@dataclass
class Options(SmallOptions):
    out: str = option("outputs/claims/gradient_conflict", "Output directory; a used one is refused.")
    seeds: list[int] = option([0, 1, 2], "Independent runs, each with its own anchor, VAE and critics.")
    interval: int = option(100, "Updates between two measurements.", least=1)
    rows: int = option(4_096, "Rows of the batch the gradients are taken on, the same throughout a run.", least=1)
    alpha: float = option(2.5, "Weight of the value gradient beside the fit, as TD3+BC's: alpha Q / mean |Q|.", least=0)


def follow(cfg: DictConfig, loss: SPARLoss, data: OfflineReplayBuffer, rows: TensorDictBase, kind: str) -> dict:
    """One run; the cosines over it."""
    if kind == "value":

        def value_gradient(tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
            state, _, action = rectified(loss, tensordict)
            value = mean_value(loss, state, action)
            fit = part_of_actor_loss(loss, tensordict, lsi=0.0, trust=1.0)
            return fit - cfg.alpha * (value / value.abs().mean().detach()).mean(), {}

        loss.actor_loss = value_gradient  # type: ignore[method-assign]
    update = make_update(cfg, loss)
    loss.__dict__.pop("actor_loss", None)  # the update has it; what is measured is SPAR's own again
    curve: dict[str, list[float]] = {"step": []}

    def record(step: int) -> None:
        if step % cfg.interval == 0:
            curve["step"].append(step)
            for name, value in cosines(loss, rows).items():
                curve.setdefault(name, []).append(value)

    improve(cfg, update, data, record)
    return curve


def measure(cfg: DictConfig) -> dict[str, Any]:
    data = load_embedded(cfg)
    runs: dict[str, list[dict]] = {kind: [] for kind in IMPROVE}
    for seed in cfg.seeds:
        torch.manual_seed(seed)
        start = fit_manifold(cfg, data, clone_behaviour(cfg, data), cfg.critics)
        rows = fixed_rows(data, cfg.rows)
        for kind in IMPROVE:
            torch.manual_seed(seed)
            runs[kind].append(follow(cfg, deepcopy(start), data, rows, kind))
    manifold = slope_at_the_vae(start, rows)
    return {"findings": verdict(runs, manifold), "runs": runs}


def slope_at_the_vae(loss: SPARLoss, batch: TensorDictBase) -> float:
    """The largest derivative of the head's loss by a parameter of the residual manifold."""
    params = [p for p in loss.residual_vae_params.values(True, True) if p.requires_grad]
    gradients = torch.autograd.grad(loss.actor_loss(batch)[0], params, materialize_grads=True)
    return max(gradient.abs().max().item() for gradient in gradients)


def verdict(runs: dict[str, list[dict]], slope_at_vae: float) -> list[dict[str, Any]]:
    def means(run: str, pair: str, part: slice = slice(None)) -> list[float]:
        """One mean over (a part of) a run for each seed."""
        return [float(torch.tensor(curve[pair][part]).mean()) for curve in runs[run]]

    half = len(runs["lsi"][0]["step"]) // 2
    late, first = slice(half, None), slice(0, 1)
    lines = [
        finding(
            "fitting the manifold (the VAE, a network of its own) and improving the head share no parameter",
            grade(slope_at_vae, 0.0), largest_derivative=slope_at_vae,
        ),
    ]  # fmt: skip
    for fit, label in FIT.items():
        lsi, value = means("lsi", f"lsi/{fit}", late), means("lsi", f"value/{fit}", late)
        own, start = means("value", f"value/{fit}", late), means("lsi", f"lsi/{fit}", first)
        lines += [
            finding(f"at the anchor, LSI does not pull against the {label}", min(start) >= 0, cosine=start),
            finding(f"second half: LSI does not pull against the {label}", min(lsi) >= 0, cosine=lsi),
            finding(f"second half, same head and critics: a value gradient pulls harder against the {label} than LSI",
                    all(v < a for v, a in zip(value, lsi)), cosine_value=value, cosine_lsi=lsi),
            finding(f"second half, each in its own run: the same, against the {label}",
                    all(v < a for v, a in zip(own, lsi)), cosine_value=own, cosine_lsi=lsi),
        ]  # fmt: skip
    return lines


def draw(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.6), sharey=True)
    for ax, (fit, label) in zip(axes, FIT.items()):
        for run, kind, colour, line in (
            ("lsi", "lsi", SPAR, "-"), ("lsi", "value", VALUE_GRADIENT, "-"), ("value", "value", VALUE_GRADIENT, "--"),
        ):  # fmt: skip
            curves = torch.tensor([curve[f"{kind}/{fit}"] for curve in result["runs"][run]])
            steps = result["runs"][run][0]["step"]
            name = f"{IMPROVE[kind]}, along {'SPAR' if run == 'lsi' else 'its own run'}"
            ax.plot(steps, curves.mean(0), line, color=colour, label=name, linewidth=2)
            ax.fill_between(steps, curves.amin(0), curves.amax(0), color=colour, alpha=0.15, linewidth=0)
        ax.axhline(0, color=GREY, linewidth=1)
        ax.set(xlabel="updates", title=f"against {label}")
    axes[0].set_ylabel("cosine of improve and fit gradient")
    axes[0].legend()
    seeds = len(result["runs"]["lsi"])
    figure.suptitle(f"{title(result)} (Hopper, mean and range of {seeds} seeds)", fontsize=11.5)
    return figure


def title(result: dict[str, Any]) -> str:
    """The comparison of the second halves, as measured."""
    harder = [row["holds"] == "yes" for row in result["findings"] if "pulls harder" in row["statement"]]
    if all(harder):
        return "A value gradient pulls harder against the fit than Latent Self-Imitation"
    return "Not so: a value gradient does not pull harder against the fit than Latent Self-Imitation"
