"""Claim 3, contracted search space: how far from its start does the head have to go, with the anchor and without?

On the embedded data: SPAR is trained, its critics are kept, and two new heads are trained on them: one on the anchor,
one on the constant action in the middle of the range, with a residual manifold of its own (then the whole action is
the residual). Distances are Euclidean, in action units.

python recipes/claim.py search_space
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from harness.options import option, recipe_options
from harness.plots import DATA, SPAR, plt
from matplotlib.figure import Figure
from omegaconf import DictConfig
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor

from claims.claim_tools import finding, grade
from claims.small_spar import (
    SmallOptions,
    clone_behaviour,
    fit_manifold,
    fixed_rows,
    improve,
    load_embedded,
    make_update,
    mean_value,
    rectified,
    take_critics,
)
from torchrl_spar import OfflineReplayBuffer, SPARLoss

STYLE = {
    "data, from the anchor": (DATA, "-"),
    "SPAR, from the anchor": (SPAR, "-"),
    "data, from mid-range": (DATA, "--"),
    "unanchored, from mid-range": (SPAR, "--"),
}


@recipe_options("claims/search_space")
@dataclass
class Options(SmallOptions):
    out: str = option("outputs/claims/search_space", "Output directory; a used one is refused.")
    seeds: list[int] = option([0, 1, 2], "Independent runs.")
    rows: int = option(8_192, "States on which actions are compared.", least=1)
    bins: int = option(40, "Bins of the histograms.", least=1)


def train_head(cfg: DictConfig, data: OfflineReplayBuffer, anchor: TensorDictModuleBase, critics: SPARLoss) -> SPARLoss:
    """A head on `anchor`, by the critics of another loss, which stay as they are."""
    loss = take_critics(fit_manifold(cfg, data, anchor), critics)
    improve(cfg, make_update(cfg, loss, qvalue_lr=0.0), data)
    return loss


def log_volume(points: Tensor) -> float:
    """log10 of the square root of the covariance's determinant: the size of a cloud of points."""
    return (torch.logdet(torch.cov(points.T.double())) / 2 / torch.log(torch.tensor(10.0))).item()


def compare(cfg: DictConfig, data: OfflineReplayBuffer, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    trained = fit_manifold(cfg, data, clone_behaviour(cfg, data), cfg.critics)
    improve(cfg, make_update(cfg, trained), data)
    space = data.action_spec.space
    middle = (space.low + space.high) / 2
    constant = TensorDictModule(lambda s: middle.expand(*s.shape[:-1], -1), ["observation"], ["action"])
    rows = fixed_rows(data, cfg.rows)
    moves: dict[str, Tensor] = {}
    value, at_bound = {}, {}
    for name, origin, anchor in (("SPAR", "the anchor", trained.anchor), ("unanchored", "mid-range", constant)):
        loss = train_head(cfg, data, anchor, trained)
        with torch.no_grad():
            state, _, action = rectified(loss, rows)
            value[name] = mean_value(trained, state, action).mean().item()
        moves[f"data, from {origin}"] = rows["action"] - state["anchor_action"]
        moves[f"{name}, from {origin}"] = action - state["anchor_action"]
        at_bound[name] = ((action <= space.low) | (action >= space.high)).float().mean().item()
    length = {name: move.norm(dim=-1) for name, move in moves.items()}
    edges = torch.linspace(0, (space.high - space.low).norm().item() / 2, cfg.bins + 1)
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    return {
        "bin_edges": edges.tolist(),
        "share": {
            name: (torch.histc(x, cfg.bins, 0, edges[-1].item()) / len(x)).tolist() for name, x in length.items()
        },
        "quantiles_10_50_90": {name: x.quantile(quantiles).tolist() for name, x in length.items()},
        "rms": {name: x.pow(2).mean().sqrt().item() for name, x in length.items()},
        "log10_volume": {name: log_volume(move) for name, move in moves.items()},
        "mean_value": value,
        "components_at_a_bound": at_bound,
    }


def measure(cfg: DictConfig) -> dict[str, Any]:
    data = load_embedded(cfg)
    runs = [compare(cfg, data, seed) for seed in cfg.seeds]
    return {"findings": verdict(runs), "runs": runs}


def verdict(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def ratio(quantity: str, one: str, other: str) -> list[float]:
        return [run[quantity][one] / run[quantity][other] for run in runs]

    before, after, wide, free = STYLE
    shorter = [run["quantiles_10_50_90"][after][1] / run["quantiles_10_50_90"][free][1] for run in runs]
    volume = [10 ** (run["log10_volume"][before] - run["log10_volume"][wide]) for run in runs]
    data_ratio = ratio("rms", before, wide)
    policy_ratio = ratio("rms", after, before)
    lost = [1 - run["mean_value"]["SPAR"] / run["mean_value"]["unanchored"] for run in runs]
    return [
        finding("with the anchor the head's median move is shorter than without", max(shorter) < 1, ratio=shorter),
        finding("the data's residuals are smaller than its actions (rms)", max(data_ratio) < 1, ratio=data_ratio),
        finding("they fill a smaller volume", max(volume) < 1, volume_ratio=volume),
        finding("the trained residual is smaller than the data's (rms)", max(policy_ratio) < 1, ratio=policy_ratio),
        finding(
            "by the same critics, the anchored policy is worth as much as the unanchored one",
            grade(max(map(abs, lost)), 0.01),
            relative_loss_of_value=lost,
        ),
    ]


def draw(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.6))
    runs = result["runs"]
    edges = torch.tensor(runs[0]["bin_edges"])
    centres = (edges[1:] + edges[:-1]) / 2
    for name, (colour, line) in STYLE.items():
        shares = torch.tensor([run["share"][name] for run in runs])
        axes[0].plot(centres, shares.mean(0), line, color=colour, linewidth=2, label=name)
        axes[0].fill_between(centres, shares.amin(0), shares.amax(0), color=colour, alpha=0.15, linewidth=0)
    axes[0].set(xlabel="distance from the start (Euclidean, action units)", ylabel="share of states in a bin")
    axes[0].set_title("Where data and policies lie")
    axes[0].legend()
    for place, (name, (colour, _)) in enumerate(STYLE.items()):
        values = [run["quantiles_10_50_90"][name][1] for run in runs]
        axes[1].bar(place, sum(values) / len(values), color=colour, alpha=0.6, width=0.6)
        axes[1].plot([place] * len(values), values, "o", color="black", markersize=5)
    axes[1].set_xticks(range(len(STYLE)), [name.replace(", ", ",\n") for name in STYLE], fontsize=9)
    axes[1].set(ylabel="median distance (action units)", title=f"Medians: mean and {len(runs)} seeds")
    first = result["findings"][0]
    share = 100 * sum(first["ratio"]) / len(first["ratio"])
    figure.suptitle(f"On the anchor the head moves {share:.0f} % of the way it goes without one (Hopper, same critics)")
    return figure
