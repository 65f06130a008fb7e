"""What estimated values of policies are worth, their scores being known: DOPE's figures and safe choices.

DOPE: Fu et al. 2021 (https://arxiv.org/abs/2103.16596).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """From 0 on; of equal values the mean of their places."""
    below, equal = (values > values[:, None]).sum(0), (values == values[:, None]).sum(0)
    return below.double() + (equal - 1) / 2


def spearman(one: Tensor, other: Tensor) -> float | None:
    """Rank correlation; None where all of one side are equal."""
    places = torch.stack([ranks(one), ranks(other)])
    return torch.corrcoef(places)[0, 1].item() if (places != places[:, :1]).any(1).all() else None


def columns(rows: Sequence[Mapping[str, Any]], *names: str) -> Iterator[Tensor]:
    return (torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names)


def agreement(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """How a column of values agrees with what was played."""
    value, score, true = columns(rows, name, "score", "true_value")
    return {
        "spearman": spearman(value, score),
        "spearman_of_discounted": spearman(value, true),
        "mean_absolute_error": (value - true).abs().mean().item(),
        "regret": {"highest value": (score.max() - score[value.argmax()]).item()},
    }


def figures(rows: Sequence[Mapping[str, Any]], chosen: str) -> dict[str, Any]:
    """What `ope.json` says of all policies; `chosen` is the surest one's name, perhaps "anchor".

    `spearman_of_truth` is the rank correlation of the true discounted values with the scores: what a perfect estimate
    would reach, less than 1 where the discount ends before a policy falls. "critics' own value" chooses among the
    policies that have a `critics_value`, and is left out where none has.
    """
    score, true, low, high = columns(rows, "score", "true_value", "low", "high")

    def regret(index: int) -> float:
        return (score.max() - score[index]).item()

    found = agreement(rows, "value")
    last = max(row["updates"] for row in rows)
    naive = [i for i, row in enumerate(rows) if row["updates"] == last and row["c"] in (None, 1.0)]
    judged = {row["critics_value"]: i for i, row in enumerate(rows) if row.get("critics_value") is not None}
    surest = [i for i, row in enumerate(rows) if row["name"] == chosen]
    return {
        "policies": len(rows),
        **found,
        "spearman_of_truth": spearman(true, score),
        "coverage": ((low <= true) & (true <= high)).double().mean().item(),
        "regret": {
            **found["regret"],
            "highest lower bound": regret(int(low.argmax())),
            "surest gain, else the anchor": regret(surest[0]),
            "longest training": sum(map(regret, naive)) / len(naive) if naive else None,
            **({"critics' own value": regret(judged[max(judged)])} if judged else {}),
            "any": sum(map(regret, range(len(rows)))) / len(rows),
        },
    }


def safe_choice(
    rows: Sequence[Mapping[str, Any]], families: Mapping[str, Sequence[str]], choices: Mapping[str, str]
) -> dict[str, Any]:
    """What choosing by the surest gain did in each run: its family has the run's anchor first.

    `worse_than_anchor` counts the choices more than 3 points (or returns) below the run's anchor; `gain_kept` is the
    share of the families' possible gains that the choices have, summed over runs.
    """
    score = {row["name"]: row["score"] for row in rows}
    gains = [score[choices[run]] - score[names[0]] for run, names in families.items()]
    possible = sum(max(score[name] for name in names) - score[names[0]] for names in families.values())
    return {
        "runs": {run: {"anchor": names[0], "choice": choices[run]} for run, names in families.items()},
        "worse_than_anchor": sum(gain < -3 for gain in gains),
        "gain_kept": sum(gains) / possible if possible else None,
    }


def peers_figures(rows: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """What d3rlpy's values are worth, and ours of the same policies."""
    asked = [row for row in rows if "d3rlpy_value" in row]
    seconds = sum(row["d3rlpy_cpu_seconds"] for row in asked) / len(asked)
    own = {f"ours_{name}": value for name, value in agreement(asked, "value").items() if name != "regret"}
    theirs = {**agreement(asked, "d3rlpy_value"), "cpu_seconds_per_policy": seconds}
    return {"policies": len(asked), "steps": steps, **theirs, **own}
