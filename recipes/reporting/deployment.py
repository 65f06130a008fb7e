"""What the report before a deployment says: numbers of a finished run, its policy and its log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness.checkpoints import sha256
from harness.log_values import Support, actions_of, fqe_options
from harness.printing import agreement
from harness.same_rows import digest_of
from omegaconf import DictConfig
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_spar import OfflineReplayBuffer, SPARActor

# Rows, in whole episodes from the first on, on which actions are compared.
ROWS = 100_000
QUANTILES = {"least": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "most": 1.0}
BINS = 61
# Beyond these a check asks for a look. Held-out data itself has 5 % of its states beyond its 95 % quantile.
FAR_SHARE, RATE_RATIO, BIAS_SHARE = 0.10, 1.0, 0.25


def report_facts(
    cfg: DictConfig, data: OfflineReplayBuffer, actor: SPARActor, estimates: dict[str, Any], rows: int
) -> dict[str, Any]:
    """All sections but the run's own numbers.

    Args:
        cfg: of the run.
        data: its log.
        actor: the policy to deploy.
        estimates: see `harness.log_values`.
        rows: number of rows listed where the policy is farthest from the data.
    """
    log = data[:].cpu()
    log = log[log["episode"] <= log["episode"][min(ROWS, len(log)) - 1]]
    action, anchor = actions_of(actor, log), actions_of(actor.anchor, log)
    names = column_names(cfg, data)
    support = Support(data, cfg.ope.held_out, cfg.seed)
    facts = {
        "data": data_section(data, names["observation"]),
        "residual": residual_section(action - anchor, data, names["action"]),
        "support": support_section(support, actor, rows),
        "estimates": estimates | {"of": deployed_name(cfg, estimates)},
        "evaluation": fqe_options(cfg),
        "limits": limit_section(log, action, data, names["action"]),
    }
    return {"checks": checks(facts), **facts}


def deployed_name(cfg: DictConfig, estimates: dict[str, Any]) -> str:
    """Under which name the estimates have the policy that was saved."""
    return estimates["choice"] if cfg.get("select") else "spar"


def column_names(cfg: DictConfig, data: OfflineReplayBuffer) -> dict[str, list[str]]:
    """A table's own names where there is one for each column, else numbers."""
    sizes = {"observation": data.observation_loc.numel(), "action": data.action_spec.shape[-1]}
    given = cfg.columns or {}
    found = {}
    for name, size in sizes.items():
        own = given.get(name)
        own = [own] if isinstance(own, str) else list(own or [])
        found[name] = own if len(own) == size else [str(i) for i in range(size)]
    return found


def data_section(data: OfflineReplayBuffer, names: Sequence[str]) -> dict[str, Any]:
    rows = data[:].cpu()
    observation = rows["observation"].double()
    return {
        "rows": len(rows),
        "episodes": len(data.episode_returns),
        "length": quantiles(rows["episode"].bincount().double()),
        "return": quantiles(data.episode_returns.double()) | {"mean": data.episode_returns.double().mean().item()},
        "reward": quantiles(rows["next", "reward"].double().flatten()),
        "terminated": int(rows["next", "terminated"].sum()),
        "observation": {
            name: {
                "least": column.min().item(), "most": column.max().item(), "mean": column.mean().item(),
                "spread": column.std(correction=0).item(),
            }
            for name, column in zip(names, observation.T)
        },
    }  # fmt: skip


def residual_section(residual: Tensor, data: OfflineReplayBuffer, names: Sequence[str]) -> dict[str, Any]:
    """What the policy adds to each component of the anchor's action, in its units and as a share of its range."""
    width = (data.action_spec.space.high - data.action_spec.space.low).cpu()
    found = {}
    for name, column, whole in zip(names, residual.T.double(), width.tolist()):
        bound = max(column.abs().max().item(), 1e-9 * whole)
        found[name] = {
            "quantiles": quantiles(column),
            "rms_share_of_range": column.pow(2).mean().sqrt().item() / whole,
            "histogram": torch.histc(column.float(), BINS, -bound, bound).long().tolist(),
            "histogram_bound": bound,
        }
    return found


def support_section(support: Support, actor: SPARActor, rows: int) -> dict[str, Any]:
    """Distances of held-out states with the data's, the anchor's and the policy's actions; where they are largest."""
    action, anchor = (actions_of(policy, support.probes) for policy in (actor, actor.anchor))
    distances = {"data": support.of_data, "anchor": support.distance(anchor), "policy": support.distance(action)}
    limit = support.of_data.quantile(0.95)
    excess = distances["policy"] - support.of_data
    probes = support.probes
    farthest = [
        {
            "row": int(probes["row"][i]), "episode": int(probes["number"][i]), "step": int(probes["step"][i]),
            "distance": distances["policy"][i].item(), "of_data": support.of_data[i].item(),
            "observation": probes["observation"][i].tolist(),
            "action_of_data": probes["action"][i].tolist(), "anchor": anchor[i].tolist(), "policy": action[i].tolist(),
        }
        for i in excess.argsort(descending=True)[:rows].tolist()
    ]  # fmt: skip
    return {
        "states": len(probes),
        **{name: quantiles(distance) | {"mean": distance.mean().item()} for name, distance in distances.items()},
        "limit": limit.item(),
        "share_beyond": {name: (x > limit).double().mean().item() for name, x in distances.items()},
        "farthest": farthest,
    }


def limit_section(
    log: TensorDictBase, action: Tensor, data: OfflineReplayBuffer, names: Sequence[str]
) -> dict[str, Any]:
    """Sizes of actions, and their changes from one row of an episode to the next, on the log's states."""
    low, high = (bound.cpu() for bound in (data.action_spec.space.low, data.action_spec.space.high))
    follows = log["episode"][1:] == log["episode"][:-1]
    found: dict[str, Any] = {name: {"low": low[i].item(), "high": high[i].item()} for i, name in enumerate(names)}
    tolerance = 1e-6 * (high - low)
    for whose, actions in (("data", log["action"]), ("policy", action)):
        change = (actions[1:] - actions[:-1])[follows].abs()
        at_bound = ((actions <= low + tolerance) | (actions >= high - tolerance)).double().mean(0)
        for i, name in enumerate(names):
            found[name][whose] = {
                "size": quantiles(actions[:, i]),
                "at_bound": at_bound[i].item(),
                "rate": {"median": quantile(change[:, i], 0.5), "99%": quantile(change[:, i], 0.99),
                         "most": change[:, i].max().item() if len(change) else 0.0},
            }  # fmt: skip
    return found


def checks(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What a signatory looks at first: a sentence, its numbers, and whether it holds."""
    estimates, support = facts["estimates"], facts["support"]
    gain = estimates["gains"].get(estimates["of"], {"mean": 0.0, "low": 0.0})
    ahead, critics = agreement(estimates[estimates["of"]], estimates["anchor"])
    far = support["share_beyond"]["policy"]
    rates = {name: (row["policy"]["rate"]["99%"], row["data"]["rate"]["99%"]) for name, row in facts["limits"].items()}
    fast = [name for name, (policy, data) in rates.items() if policy > RATE_RATIO * data]
    calibration = estimates["calibration"]
    spread = max(calibration["spread_of_returns"], 1e-12)
    bias, rmse = abs(calibration["bias"]) / spread, calibration["rmse"] / spread
    return [
        check(
            "the policy is surely better than the anchor",
            gain["low"] > 0,
            f"estimated gain {gain['mean']:.4g}, at least {gain['low']:.4g} ({estimates['confidence']:.0%} confidence)",
        ),
        check("all critics of the evaluation agree on that", 0 < ahead == critics, f"{ahead} of {critics} critics do"),
        check(
            "the policy stays where the log has data",
            far <= FAR_SHARE,
            f"{far:.1%} of held-out states are beyond the 95 % quantile of the data's own distances "
            f"(the data: 5 %; limit {FAR_SHARE:.0%})",
        ),
        check(
            "actions change no faster than in the log (99 % quantile)",
            not fast,
            f"faster in {', '.join(fast)}" if fast else "in every component",
        ),
        check(
            "the evaluation's critics predict held-out returns",
            bias <= BIAS_SHARE and rmse < 1,
            f"bias {bias:.0%} of the returns' spread (limit {BIAS_SHARE:.0%}), root mean square error {rmse:.0%} of it "
            "(a constant would have 100 %)",
        ),
    ]


def check(what: str, holds: bool, numbers: str) -> dict[str, Any]:
    return {"what": what, "holds": bool(holds), "numbers": numbers}


def quantiles(values: Tensor) -> dict[str, float]:
    return {name: quantile(values, q) for name, q in QUANTILES.items()}


def quantile(values: Tensor, q: float) -> float:
    """A quantile of any number of values; torch's own takes at most 16 million."""
    if not len(values):
        return 0.0
    return values.double().kthvalue(1 + round(q * (len(values) - 1))).values.item()


def checksums(paths: Sequence[Path], data: OfflineReplayBuffer) -> dict[str, str]:
    """SHA-256 of files, and of the rows as they were read."""
    return {path.name: sha256(path) for path in paths} | {"rows of the log": digest_of(data)}
