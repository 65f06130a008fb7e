"""What bootstrapping does: the same SPAR with three kinds of targets for its critics.

- one step: `r + gamma Q(s', pi(s'))`, the critics' own value of the next state.
- along the data: the data's rewards as long as its actions are as good as the policy's, then the critics' value (ours).
- returns alone: the data's rewards to the end of the episode, so the value of the behaviour, never of the policy.

All start from one anchor, one VAE and one set of critics, fitted to the data's returns.

python recipes/claim.py bootstrapping       # dataset=minari:spar/hopper/medium-v0 or a file, and its env
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from harness.environment import EMBEDDED
from harness.launch import RECIPES, summarize
from harness.options import option, recipe_options
from harness.plots import DATA, OTHERS, SPAR, plt
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from claims.claim_tools import finding
from claims.small_spar import SmallOptions, SmallSpar, clone_behaviour, fit_manifold, improve, make_update, mean_value
from torchrl_spar import OfflineReplayBuffer, SPARLoss, evaluate, load_offline_dataset, returns_to_go

NEVER_CUT = 1e9
ONE_STEP, ALONG, RETURNS = "one step", "along the data", "returns alone"
KINDS: dict[str, dict[str, Any]] = {
    ONE_STEP: {"target_interval": None},
    ALONG: {},
    RETURNS: {"loss": {"cut_margin": NEVER_CUT}},
}
COLOURS = {ALONG: SPAR, **dict(zip((ONE_STEP, RETURNS), OTHERS))}


@recipe_options("claims/bootstrapping")
@dataclass
class Options(SmallOptions):
    out: str = option("outputs/claims/bootstrapping", "Output directory; a used one is refused.")
    seeds: list[int] = option([0, 1, 2], "Independent runs.")
    dataset: str = option("embedded", "As in spar_d4rl.py.")
    env: str = option("Hopper-v5", "Environment of the evaluations.")
    episodes: int = option(10, "Episodes of an evaluation.", least=2)
    eval_seed: int = option(20_000, "Seed of their first episode.", least=0)
    interval: int = option(500, "Updates between two evaluations.", least=1)
    rows: int = option(8_192, "Rows of the data on which values are compared with returns.", least=1)
    spar: SmallSpar = option(SmallSpar(updates=4_000, target_interval=500), "The main phase.")


def score(played: dict[str, float | None]) -> float:
    """The normalised score; where D4RL has no reference, the mean return."""
    return cast(float, played["return_mean"] if played["normalized"] is None else played["normalized"])


def run(cfg: DictConfig, start: SPARLoss, data: OfflineReplayBuffer, kind: str) -> dict[str, list[float]]:
    """One run from a copy of the loss: the policy's score, and the critics' mean value of the data less its returns."""
    cfg = cast(DictConfig, OmegaConf.merge(cfg, {"spar": KINDS[kind]}))
    loss = deepcopy(start)
    loss.cut_margin = cfg.spar.loss.cut_margin
    everything = data[:]
    returns = returns_to_go(everything, float(loss.value_estimator.gamma)).squeeze(-1)
    chosen = torch.linspace(0, len(everything) - 1, min(cfg.rows, len(everything))).long()
    rows, returns = everything[chosen], returns[chosen]
    curve: dict[str, list[float]] = {"step": [], "score": [], "value_less_returns": []}

    def record(step: int) -> None:
        if step % cfg.interval == 0:
            played = summarize(cfg.env, evaluate(loss.actor, cfg.env, cfg.episodes, cfg.eval_seed), {})
            with torch.no_grad():
                value = mean_value(loss, rows, rows["action"]) / loss.reward_scale
            curve["step"].append(step)
            curve["score"].append(score(played))
            curve["value_less_returns"].append((value - returns).mean().item())

    # The critics learn until the end, for it is what they learn that is shown.
    improve(cfg, make_update(cfg, loss, decay_steps=cfg.spar.updates, critic_share=1.0), data, record)
    return curve


def measure(cfg: DictConfig) -> dict[str, Any]:
    source = RECIPES / "data" / EMBEDDED if cfg.dataset == "embedded" else cfg.dataset
    data = load_offline_dataset(source, batch_size=cfg.batch_size)
    runs: dict[str, list[dict[str, list[float]]]] = {kind: [] for kind in KINDS}
    for seed in cfg.seeds:
        torch.manual_seed(seed)
        start = fit_manifold(cfg, data, clone_behaviour(cfg, data), cfg.critics)
        for kind in KINDS:
            torch.manual_seed(seed)
            runs[kind].append(run(cfg, start, data, kind))
    return {"findings": verdict(runs), "data": summarize(cfg.env, data.episode_returns, {}), "runs": runs}


def verdict(runs: dict[str, list[dict[str, list[float]]]]) -> list[dict[str, Any]]:
    final = {kind: [curve["score"][-1] for curve in curves] for kind, curves in runs.items()}
    fall = {kind: [max(curve["score"]) - curve["score"][-1] for curve in curves] for kind, curves in runs.items()}
    bias = {kind: [curve["value_less_returns"][-1] for curve in curves] for kind, curves in runs.items()}
    one, along, returns = (final[kind] for kind in KINDS)
    size = {kind: sum(map(abs, of)) / len(of) for kind, of in bias.items()}
    return [
        finding(
            "along the data the policy ends above that of one-step targets, for every seed",
            all(a > b for a, b in zip(along, one)),
            final=final,
        ),
        finding("and above that of returns alone", all(a > b for a, b in zip(along, returns))),
        finding(
            "one-step targets fall furthest from their best score",
            max(fall, key=lambda kind: max(fall[kind])) == ONE_STEP,
            fall=fall,
        ),
        finding(
            "their values leave the data's returns furthest",
            max(size, key=size.__getitem__) == ONE_STEP,
            value_less_returns=bias,
        ),
    ]


def draw(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.6))
    for panel, key, label in (
        (axes[0], "score", f"score ({result['options']['env']})"),
        (axes[1], "value_less_returns", "critics' value of the data's actions, less its returns"),
    ):
        for kind, curves in result["runs"].items():
            values = torch.tensor([curve[key] for curve in curves])
            steps = curves[0]["step"]
            panel.plot(steps, values.mean(0), color=COLOURS[kind], linewidth=2, label=kind)
            panel.fill_between(steps, values.amin(0), values.amax(0), color=COLOURS[kind], alpha=0.15, linewidth=0)
        panel.set(xlabel="updates", ylabel=label)
    axes[0].axhline(score(result["data"]), color=DATA, linestyle="--", label="data (mean return)")
    axes[1].axhline(0, color=DATA, linestyle="--")
    axes[0].legend()
    data, count = result["options"]["dataset"], len(result["options"]["seeds"])
    figure.suptitle(f"SPAR with three kinds of targets ({data}; mean and range of {count} seeds)")
    return figure
