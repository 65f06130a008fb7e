"""How well off-policy evaluation ranks policies: the figures of DOPE, on the policies of finished runs.

python recipes/ope_study.py 'runs=[outputs/a,outputs/b]' 'scales=[0.5,1]' episodes=20

All runs are of one data set, which has an environment; they are of any methods, one at least of SPAR. The truth is the
mean over episodes played there: scores (or returns) for ranks and regrets, discounted returns for errors and intervals.
DOPE: Fu et al. 2021 (https://arxiv.org/abs/2103.16596).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import process_time
from types import ModuleType
from typing import Any, cast

import torch
from harness.actors import read_actor
from harness.environment import LOG_OPTIONS, load
from harness.launch import best_device, run_recipe, summarize
from harness.log_values import plain, slice_length
from harness.options import option, recipe_options
from harness.output import check_unused, rounded, write_json
from harness.run import VERSIONED, commit, on_cpu
from harness.scores import RESULT_SEED
from harness.spar_options import OPE
from harness.spar_run import NAMES
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_spar import InputError, SPARActor, evaluate, residual_family
from torchrl_spar.ope.select import choose, evaluate_each

NEEDED = ("config.yaml", "policy.pt", "results.json")
DRAWS = 2_000  # of the bootstrap


@recipe_options("ope_study")
@dataclass
class Options:
    runs: list[str] = option(
        "???", "Directories of finished runs on one data set, or folders that hold some; one at least of SPAR."
    )
    scales: list[float] = option(
        [0.5, 1.0],
        "Of SPAR's runs, c in anchor + c * residual, beside the anchor; rivals and ablations have one policy a run.",
        above=0, most=1,
    )  # fmt: skip
    out: str = option("outputs/ope_study/${now:%Y-%m-%d_%H-%M-%S}", "Directory of ope.json; a used one is refused.")
    episodes: int = option(20, "Episodes that each policy plays.", least=2)
    seed: int = option(0, "Of evaluation and of Fitted Q Evaluation.", least=0)
    ope: OPE = option(OPE(), "Off-policy evaluation.")
    d3rlpy_steps: int = option(0, "Gradient steps of d3rlpy's FQE of each policy, to compare with; 0: none.", least=0)
    device: str | None = option(None, "cpu, cuda, ...; null: cuda if there is one, else cpu.")
    threads: int = option(1, "Torch threads.", least=1)


def finished_runs(folders: Sequence[str]) -> list[Path]:
    """Directories with a policy, options and results."""
    found = sorted({path.parent for folder in folders for path in Path(folder).rglob("policy.pt")})
    if not (found := [run for run in found if all((run / name).is_file() for name in NEEDED)]):
        raise InputError(f"runs={list(folders)}: no finished run with {', '.join(NEEDED)} in them")
    return found


def policies_of(
    methods: Mapping[str, str], scales: Sequence[float], device: torch.device
) -> tuple[dict[str, TensorDictModuleBase], dict[str, list[str]]]:
    """Policies by name, the anchor of SPAR's first run first; for each run of SPAR its anchor's name and its family's.

    Args:
        methods: of each run.
        scales: of the families.
        device: of the policies.
    """
    policies: dict[str, TensorDictModuleBase] = {}
    families: dict[str, list[str]] = {}
    anchors: dict[str, TensorDictModuleBase] = {}
    for run, method in methods.items():
        policy, facts = read_actor(Path(run, "policy.pt"), device)
        if "choice" in facts:
            raise InputError(f"runs: {run} was saved with select=ope, as FQE chose it; study runs with select=null")
        if isinstance(policy, SPARActor) and method in NAMES.values():
            family = {f"{run} {name}": each for name, each in residual_family(policy, scales).items()}
            # Runs of one seed may share their anchor.
            same = [name for name, other in anchors.items() if has_weights_of(policy.anchor, other)]
            own = same[0] if same else f"{run} c=0" if anchors else "anchor"
            anchors.setdefault(own, policy.anchor)
            families[run] = [own, *family]
            policies |= {own: anchors[own], **family}
        else:
            policies[run] = policy
    if not families:
        raise InputError(
            f"runs={list(methods)}: none is of {' or '.join(NAMES.values())}, with an anchor to compare with"
        )
    return {"anchor": anchors["anchor"], **policies}, families


def has_weights_of(one: TensorDictModuleBase, other: TensorDictModuleBase) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def ranks(values: Tensor) -> Tensor:
    """From 0 on; of equal values the mean of their places."""
    below, equal = (values > values[:, None]).sum(0), (values == values[:, None]).sum(0)
    return below.double() + (equal - 1) / 2


def spearman(one: Tensor, other: Tensor) -> float | None:
    """Rank correlation; None where all of one side are equal."""
    places = torch.stack([ranks(one), ranks(other)])
    return torch.corrcoef(places)[0, 1].item() if (places.std(1) > 0).all() else None


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
    would reach, less than 1 where the discount ends before a policy falls.
    """
    score, true, low, high = columns(rows, "score", "true_value", "low", "high")

    def regret(index: int) -> float:
        return (score.max() - score[index]).item()

    found = agreement(rows, "value")
    last = max(row["updates"] for row in rows)
    naive = [i for i, row in enumerate(rows) if row["updates"] == last and row["c"] in (None, 1.0)]
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


def d3rlpy_peer() -> ModuleType:
    try:
        from benchmarks import d3rlpy_peer as peer
    except ImportError as error:
        raise InputError(f"d3rlpy_steps: d3rlpy cannot be imported ({error}): install it, or give 0") from error
    return peer


def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    out = Path(cfg.out)
    check_unused(out)
    peer = d3rlpy_peer() if cfg.d3rlpy_steps else None  # missing: said before the work, not after it
    runs, device = finished_runs(cfg.runs), best_device(cfg.device)
    options = [cast(DictConfig, OmegaConf.load(run / "config.yaml")) for run in runs]
    for run, other in zip(runs, options):
        differing = [key for key in ("env", "env_kwargs", *LOG_OPTIONS) if other.get(key) != options[0].get(key)]
        if differing or other.spar.loss.gamma != options[0].spar.loss.gamma:
            what = ", ".join(differing) or "spar.loss.gamma"
            raise InputError(f"runs: {run} has another {what} than {runs[0]}; study them apart")
    first = options[0]
    methods = {str(run): json.loads((run / "results.json").read_text())["method"] for run in runs}
    policies, families = policies_of(methods, cfg.scales, device)
    data, env, env_kwargs = load(first, device)
    gamma = first.spar.loss.gamma if cfg.ope.gamma is None else cfg.ope.gamma
    ope = {"hidden": list(first.spar.loss.hidden), "seed": cfg.seed, **cfg.ope, "gamma": gamma}
    bounds = {"confidence": ope.pop("confidence"), "draws": DRAWS, "seed": cfg.seed}
    print(f"{len(policies)} policies: {cfg.ope.steps} steps of Fitted Q Evaluation, {cfg.episodes} episodes each")
    began = process_time()
    terms, start = evaluate_each(policies, data, behaviour=None, slice_len=slice_length(data), **ope)
    seconds = (process_time() - began) / len(policies)
    choice = choose(policies, terms, start, **bounds)
    updates = {str(run): options[i].spar.updates for i, run in enumerate(runs)}
    rows: list[dict[str, Any]] = []
    for name, policy in policies.items():
        origin, _, scale = name.rpartition(" c=")
        play = (on_cpu(policy), env, cfg.episodes, RESULT_SEED + 100_000 * cfg.seed)
        played = summarize(env, evaluate(*play, **env_kwargs), env_kwargs)
        score = played["return_mean"] if played["normalized"] is None else played["normalized"]
        estimate = plain(choice.values[name])
        rows.append(
            {
                "name": name, "method": methods.get(origin or name, "anchor"),
                "updates": updates.get(origin or name, 0), "c": float(scale) if origin else None,
                "score": score, "true_value": evaluate(*play, gamma=gamma, **env_kwargs).mean().item(),
                "value": estimate["mean"], "low": estimate["low"], "high": estimate["high"],
            }
        )  # fmt: skip
    # Each bound holds with the confidence.
    found = {**figures(rows, choice.name), "nominal_coverage": 2 * cfg.ope.confidence - 1}
    found["cpu_seconds_per_policy"] = seconds
    choices = {}
    for which, names in families.items():
        renamed = {"anchor" if name == names[0] else name: name for name in names}
        own = {new: policies[old] for new, old in renamed.items()}
        made = choose(own, {new: terms[old] for new, old in renamed.items()}, start, **bounds)
        choices[which] = renamed[made.name]
    found["safe_choice"] = safe_choice(rows, families, choices)
    if peer:
        options_of_peer = {"steps": cfg.d3rlpy_steps, "gamma": gamma, "seed": cfg.seed}
        asked = {name: on_cpu(policy) for name, policy in policies.items()}
        began = process_time()
        values = peer.fqe_values(asked, data, **options_of_peer)
        seconds = (process_time() - began) / len(values)
        for row in rows:
            row["d3rlpy_value"] = values[row["name"]]
        found["d3rlpy"] = {**agreement(rows, "d3rlpy_value"), "cpu_seconds_per_policy": seconds}
    facts = {
        "dataset": first.dataset, "env": env, "gamma": gamma, **found, "chosen": choice.name, "rows": rows,
        "options": {name: value for name, value in OmegaConf.to_container(cfg).items() if name != "out"},  # type: ignore[union-attr]
        "versions": {name: version(name) for name in VERSIONED}, "commit": commit(),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "ope.json", rounded(facts, 6))
    show(rows, found)
    print(f"files in {out}")


def show(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    table = Table("policy", "score", "value", "low", "high", "discounted return")
    for row in sorted(rows, key=lambda row: -row["value"]):
        numbers = (row[name] for name in ("score", "value", "low", "high", "true_value"))
        table.add_row(row["name"], *(f"{number:.4g}" for number in numbers))
    console = Console()
    console.print(table)
    for whose, those in {"": found, "d3rlpy's ": found.get("d3rlpy", {})}.items():
        regrets = {f"regret of choosing by {whose}{name}": value for name, value in those.get("regret", {}).items()}
        others = {f"{whose}{name}": value for name, value in those.items() if not isinstance(value, dict)}
        for name, value in {**others, **regrets}.items():
            console.print(f"{name}: {said(value)}")
    safe = found["safe_choice"]
    console.print(
        f"the surest gain, or the anchor, in each of {len(safe['runs'])} runs: worse than its anchor by more than 3 in "
        f"{safe['worse_than_anchor']}, of the possible gain {said(safe['gain_kept'])}"
    )


def said(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    run_recipe(main, "ope_study")
