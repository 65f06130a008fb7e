"""Claim 5, suboptimal anchors: what does SPAR make of an anchor that was trained too little, or on too little data?

On the embedded data: the anchor has a share of the gradient steps, or a share of the episodes; everything after it has
all of the data. The critics start from one common fit to the data's returns, which does not depend on the anchor.

python recipes/claim.py suboptimal_anchors
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from harness.launch import summarize
from harness.options import option, recipe_options
from harness.plots import ANCHOR, DATA, SPAR, plt
from harness.spar_options import Phase
from matplotlib.figure import Figure
from omegaconf import DictConfig

from claims.claim_tools import finding
from claims.small_spar import (
    SmallOptions,
    SmallSpar,
    clone_behaviour,
    fit_manifold,
    improve,
    load_embedded,
    make_update,
    take_critics,
)
from torchrl_spar import OfflineReplayBuffer, evaluate, fit_critics, load_offline_dataset

WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}


def some_episodes(data: OfflineReplayBuffer, share: float) -> OfflineReplayBuffer:
    """A random share of the episodes, at least one."""
    rows = data[:]
    count = int(rows["episode"].max()) + 1
    chosen = torch.randperm(count)[: max(1, round(share * count))]
    kept = rows[torch.isin(rows["episode"], chosen)]
    return load_offline_dataset(kept, batch_size=data.batch_size, action_spec=data.action_spec)


@recipe_options("claims/suboptimal_anchors")
@dataclass
class Options(SmallOptions):
    """Longer than the other claims: at 3,000 updates and a VAE of 1,000 steps weak anchors are not left yet."""

    out: str = option("outputs/claims/suboptimal_anchors", "Output directory; a used one is refused.")
    seed: int = option(0, "Seed of everything but the evaluation's episodes.", least=0)
    shares: list[float] = option(
        [0.01, 0.1],
        "Shares of the anchor's steps and, apart from that, of its episodes; the full anchor comes in anyway.",
        above=0,
        most=1,
    )
    env: str = option("Hopper-v5", "Environment of the evaluations.")
    episodes: int = option(10, "Episodes of an evaluation.", least=1)
    eval_seed: int = option(20_000, "Seed of their first episode.", least=0)
    vae: Phase = option(Phase(3_000), "The residuals' VAE.")
    spar: SmallSpar = option(SmallSpar(updates=4_500), "The main phase.")


def measure(cfg: DictConfig) -> dict[str, Any]:
    torch.manual_seed(cfg.seed)
    data = load_embedded(cfg)
    variants = [("all steps and data", 1.0, 1.0)]
    variants += [(f"{share:.0%} of the steps", share, 1.0) for share in cfg.shares]
    variants += [(f"{share:.0%} of the episodes", 1.0, share) for share in cfg.shares]
    critics, rows = None, []
    for name, steps, episodes in variants:
        torch.manual_seed(cfg.seed)
        subset = data if episodes == 1 else some_episodes(data, episodes)
        stats = (data.observation_loc, data.observation_scale)
        subset.observation_loc, subset.observation_scale = stats  # the same inputs for every network
        anchor = clone_behaviour(cfg, subset, steps=max(1, round(steps * cfg.anchor.steps)))
        loss = fit_manifold(cfg, data, anchor)
        # The first loss fits the critics' start; the others take it.
        critics = critics or deepcopy(fit_critics(loss, data, **cfg.critics))
        take_critics(loss, critics)
        before = summarize(cfg.env, evaluate(loss.anchor, cfg.env, cfg.episodes, cfg.eval_seed), {})
        improve(cfg, make_update(cfg, loss), data)
        after = summarize(cfg.env, evaluate(loss.actor, cfg.env, cfg.episodes, cfg.eval_seed), {})
        rows.append({"anchor_trained_on": name, "rows": len(subset), "anchor": before, "spar": after})
    return {"findings": verdict(rows), "data": summarize(cfg.env, data.episode_returns, {}), "anchors": rows}


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    anchor = {row["anchor_trained_on"]: row["anchor"]["normalized"] for row in rows}
    spar = {row["anchor_trained_on"]: row["spar"]["normalized"] for row in rows}
    gain = {name: spar[name] - anchor[name] for name in anchor}
    full = rows[0]["anchor_trained_on"]
    worst = min(spar.values())
    return [
        finding("SPAR ends above every anchor", min(gain.values()) > 0, gain=gain),
        finding(
            "on every weak anchor it ends above the fully trained anchor",
            worst > anchor[full],
            worst_spar=worst,
            full_anchor=anchor[full],
        ),
        finding(
            "its scores on the weak anchors lie within 20 % of that on the full one",
            all(abs(spar[name] - spar[full]) <= 0.2 * spar[full] for name in spar),
            spar=spar,
            anchor=anchor,
        ),
    ]


def draw(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(figsize=(9, 4.8))
    rows = result["anchors"]
    for place, row in enumerate(rows):
        for shift, (kind, colour) in zip((-0.19, 0.19), (("anchor", ANCHOR), ("spar", SPAR))):
            score = row[kind]["normalized"]
            label = {"anchor": "anchor", "spar": "SPAR on it"}[kind] if place == 0 else None
            axes.bar(place + shift, score, width=0.36, color=colour, label=label)
            axes.text(place + shift, score + 0.6, f"{score:.0f}", ha="center", fontsize=9, bbox=WHITE)
    axes.axhline(result["data"]["normalized"], color=DATA, linestyle="--", label="data (mean return)")
    axes.set_xticks(range(len(rows)), [row["anchor_trained_on"].replace(" of", "\nof") for row in rows], fontsize=9)
    axes.set(xlabel="what the anchor was trained on", ylabel="D4RL-normalised score (Hopper-v5)")
    lifted = sum(row["spar"]["normalized"] > row["anchor"]["normalized"] for row in rows)
    axes.set_title(
        f"SPAR ends above {lifted} of {len(rows)} anchors (one seed, {result['options']['episodes']} episodes)"
    )
    axes.legend()
    axes.grid(False, axis="x")
    return figure
