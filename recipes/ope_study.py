"""How well off-policy evaluation ranks policies: the figures of DOPE, on the policies of finished runs.

python recipes/ope_study.py 'runs=[outputs/a,outputs/b]' 'scales=[0.5,1]' episodes=20

All runs are of one data set, which has an environment; they are of any methods, one at least has an anchor, as SPAR and
most of its ablations do. The truth is the mean over episodes played there: scores (or returns) for ranks and regrets,
discounted returns for errors and intervals.
DOPE: Fu et al. 2021 (https://arxiv.org/abs/2103.16596).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from harness.actors import read_actor
from harness.checkpoints import sha256
from harness.environment import load
from harness.finished import finished_runs, read_agreeing
from harness.launch import best_device, run_recipe, summarize
from harness.log_values import fqe_options, plain, slice_length
from harness.options import option, recipe_options
from harness.output import check_unused, rounded, whole_file, write_json
from harness.run import commit, on_cpu, versions
from harness.scores import RESULT_SEED
from harness.spar_options import OPE
from omegaconf import DictConfig, OmegaConf
from reporting.ope_figures import figures, peers_figures, safe_choice
from rich.console import Console
from rich.table import Table
from tensordict.nn import TensorDictModuleBase

from torchrl_spar import InputError, SPARActor, evaluate, residual_family
from torchrl_spar.mean_actor import same_weights
from torchrl_spar.ope.estimate import EpisodeTerms
from torchrl_spar.ope.select import choose, evaluate_each

DRAWS = 2_000  # of the bootstrap
PARTS = "parts"  # of a study that is not finished
GROUP = 10  # policies of a part, fitted side by side


@recipe_options("ope_study")
@dataclass
class Options:
    runs: list[str] = option(
        "???",
        "Directories of finished runs on one data set, or folders that hold some; one at least with an anchor. Earlier "
        "policies that a run kept (keep_policies) are studied, too.",
    )
    scales: list[float] = option(
        [0.5, 1.0],
        "Of runs with an anchor, c in anchor + c * residual, beside the anchor; others have one policy a run.",
        above=0, most=1,
    )  # fmt: skip
    out: str = option(
        "outputs/ope_study/${now:%Y-%m-%d_%H-%M-%S}",
        "Directory of ope.json; a used one is refused. The same options and `out` resume a study.",
    )
    episodes: int = option(20, "Episodes that each policy plays.", least=2)
    seed: int = option(0, "Of evaluation and of Fitted Q Evaluation.", least=0)
    ope: OPE = option(OPE(), "Off-policy evaluation.")
    d3rlpy_steps: int = option(
        0,
        "Gradient steps of d3rlpy's FQE of each policy, to compare with; 0: none. They can be added to a finished "
        "study that has none.",
        least=0,
    )
    device: str | None = option(None, "cpu, cuda, ...; null: cuda if there is one, else cpu.")
    threads: int = option(1, "Torch threads.", least=1)


class Studied(NamedTuple):
    """A policy of a run.

    Attributes:
        policy: observation -> action.
        method: of the run.
        updates: before it was saved.
        c: of ``anchor + c * residual``.
        critics_value: by the critics that the run has trained; of its policies and anchor, where it noted them.
    """

    policy: TensorDictModuleBase
    method: str
    updates: int
    c: float | None = None
    critics_value: float | None = None


def policies_of(
    runs: Mapping[str, Mapping[str, Any]], scales: Sequence[float], device: torch.device
) -> tuple[dict[str, Studied], dict[str, list[str]]]:
    """Policies by name, the first anchor first; for each run with an anchor its anchor's name and its family's.

    Args:
        runs: results by directory.
        scales: of the families.
        device: of the policies.
    """
    found: dict[str, Studied] = {}
    families: dict[str, list[str]] = {}
    anchors: dict[str, TensorDictModuleBase] = {}
    for run, results in runs.items():
        values = results.get("critics_values", {})
        for name, file in saved_policies(Path(run)).items():
            policy, facts = read_actor(file, device)
            if "choice" in facts:
                raise InputError(f"runs: {run} was saved with select=ope, as FQE chose it; study runs with select=null")
            step = name.removeprefix(run)[1:]
            updates = int(step) if step else results["updates"]
            whole = Studied(policy, results["method"], updates, None, values.get(step or "deployed"))
            if not isinstance(policy, SPARActor):
                found[name] = whole
                continue
            # Runs of one seed may share their anchor.
            same = [each for each, other in anchors.items() if same_weights(policy.anchor, other)]
            own = same[0] if same else f"{run} c=0" if anchors else "anchor"
            if not same:
                anchors[own] = policy.anchor
                first = Studied(policy.anchor, "anchor", 0, None, values.get("anchor"))
                of_run = first._replace(method=whole.method, updates=updates, c=0.0)
                found[own] = first if own == "anchor" else of_run
            family = {f"{name} c={c:g}": scaled(whole, policy, c) for c in scales}
            families.setdefault(run, [own]).extend(family)
            found |= family
    if not families:
        raise InputError(f"runs={list(runs)}: none has an anchor to compare with, as runs of method=spar have")
    return {"anchor": found["anchor"], **found}, families


def saved_policies(run: Path) -> dict[str, Path]:
    """Files by name: the run's own policy, and as RUN@UPDATES the earlier ones that it kept."""
    kept = {file.stem.removeprefix("policy_"): file for file in run.glob("policy_*.pt")}
    steps = sorted((step for step in kept if step.isdigit()), key=int)
    return {str(run): run / "policy.pt", **{f"{run}@{step}": kept[step] for step in steps}}


def scaled(whole: Studied, actor: SPARActor, c: float) -> Studied:
    """The same with the residual times c; its critics' value is that of the whole residual."""
    [policy] = residual_family(actor, [c]).values()
    return whole._replace(policy=policy, c=c, critics_value=whole.critics_value if c == 1 else None)


def d3rlpy_peer() -> ModuleType:
    try:
        from benchmarks import d3rlpy_peer as peer
    except ImportError as error:
        raise InputError(f"d3rlpy_steps: d3rlpy cannot be imported ({error}): install it, or give 0") from error
    return peer


def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    file = Path(cfg.out, "ope.json")
    peer = d3rlpy_peer() if cfg.d3rlpy_steps else None  # missing: said before the work, not after it
    runs, device = finished_runs(cfg.runs), best_device(cfg.device)
    asked = asked_for(cfg, runs)
    facts = finished_study(cfg, asked, file)
    read = read_agreeing(runs)
    options = [each for each, _ in read]
    studied, families = policies_of({str(run): results for run, (_, results) in zip(runs, read)}, cfg.scales, device)
    policies = {name: each.policy for name, each in studied.items()}
    data, env, env_kwargs = load(options[0], device)
    if facts is None:
        ope = fqe_options(cast(DictConfig, OmegaConf.merge(options[0], {"ope": cfg.ope, "seed": cfg.seed})))
        fit = {name: value for name, value in ope.items() if name != "confidence"}

        def evaluate_group(group: Mapping[str, TensorDictModuleBase]) -> dict[str, EpisodeTerms]:
            return evaluate_each(group, data, behaviour=None, slice_len=slice_length(data), **fit)[0]

        def play(policy: TensorDictModuleBase) -> dict[str, Any]:
            how = (on_cpu(policy), env, cfg.episodes, RESULT_SEED + 100_000 * cfg.seed)
            played = summarize(env, evaluate(*how, **env_kwargs), env_kwargs)
            score = played["return_mean"] if played["normalized"] is None else played["normalized"]
            true_value = evaluate(*how, gamma=ope["gamma"], **env_kwargs).mean().item()
            return {"score": score, "true_value": true_value}

        print(f"{len(policies)} policies: {cfg.ope.steps} steps of Fitted Q Evaluation, {cfg.episodes} episodes each")
        terms: dict[str, EpisodeTerms] = {}
        played: dict[str, dict[str, Any]] = {}
        seconds = 0.0
        for part in parts(file.parent / PARTS, asked, policies, evaluate_group, play):
            terms |= {name: EpisodeTerms(*those) for name, those in part["terms"].items()}
            played |= part["played"]
            seconds += part["cpu_seconds"]
        found, values = judge(terms, families, confidence=ope["confidence"], draws=DRAWS, seed=ope["seed"])
        rows = [
            {
                "name": name, "method": each.method, "updates": each.updates, "c": each.c, **played[name],
                "value": values[name]["mean"], "low": values[name]["low"], "high": values[name]["high"],
                "critics_value": each.critics_value,
            }
            for name, each in studied.items()
        ]  # fmt: skip
        facts = {
            "dataset": options[0].dataset, "env": env, "gamma": ope["gamma"],
            "nominal_coverage": 2 * cfg.ope.confidence - 1,  # each bound holds with the confidence
            **figures(rows, found["chosen"]), **found, "cpu_seconds_per_policy": seconds / len(policies),
            "safe_choice": safe_choice(rows, families, found["safe_choice"]), "rows": rows, "options": asked,
            "versions": versions(), "commit": commit(),
        }  # fmt: skip
        write_json(file, rounded(facts, 6))
        shutil.rmtree(file.parent / PARTS)
    if peer:
        for row in facts["rows"]:
            if "d3rlpy_value" not in row:
                began, policy = process_time(), {row["name"]: on_cpu(policies[row["name"]])}
                value = peer.fqe_values(policy, data, steps=cfg.d3rlpy_steps, gamma=facts["gamma"], seed=cfg.seed)
                row |= {"d3rlpy_value": value[row["name"]], "d3rlpy_cpu_seconds": process_time() - began}
                facts["d3rlpy"] = peers_figures(facts["rows"], cfg.d3rlpy_steps)
                write_json(file, rounded(facts, 6))  # a study resumes from here
    show(facts)
    print(f"files in {file.parent}")


def parts(
    home: Path, asked: Mapping[str, Any], policies: Mapping[str, TensorDictModuleBase],
    evaluate_group: Callable[[Mapping[str, TensorDictModuleBase]], Mapping[str, EpisodeTerms]],
    play: Callable[[TensorDictModuleBase], Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """What is estimated of a group of policies and what they earn; read where a study that was cut has it already."""
    names = list(policies)
    for first in range(0, len(names), GROUP):
        group = {name: policies[name] for name in names[first : first + GROUP]}
        file = home / f"{first}-{first + len(group)}.pt"
        part = torch.load(file, weights_only=True) if file.is_file() else None
        if part is not None:
            check_same(home.parent, asked, part["options"])
        if part is None or part["terms"].keys() != group.keys():  # an earlier version's, with fewer families
            began = process_time()
            terms = {name: tuple(each) for name, each in evaluate_group(group).items()}
            seconds = process_time() - began
            played = {name: dict(play(policy)) for name, policy in group.items()}
            part = {"options": dict(asked), "terms": terms, "played": played, "cpu_seconds": seconds}
            home.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as partial:
                torch.save(part, partial)
        yield part


def asked_for(cfg: DictConfig, runs: Sequence[Path]) -> dict[str, Any]:
    """The options that decide what the package's own part of a study is, and checksums of what is studied."""
    others = ("out", "device", "threads", "d3rlpy_steps")
    options = cast(dict[str, Any], OmegaConf.to_container(cfg))
    kept = {name: value for name, value in options.items() if name not in others}
    return kept | {"policy.pt": {name: sha256(file) for run in runs for name, file in saved_policies(run).items()}}


def finished_study(cfg: DictConfig, asked: dict[str, Any], file: Path) -> dict[str, Any] | None:
    """The study with these options that `out` has, to add d3rlpy's values to; None where it is new or was cut."""
    if not (cfg.d3rlpy_steps and file.is_file()):
        if [*file.parent.glob("*")] != [file.parent / PARTS]:
            check_unused(file.parent)
        return None
    facts: dict[str, Any] = json.loads(file.read_text())
    done = dict(facts["options"])
    if "d3rlpy" in facts:
        asked, done["d3rlpy_steps"] = asked | {"d3rlpy_steps": cfg.d3rlpy_steps}, facts["d3rlpy"]["steps"]
    check_same(file.parent, asked, done)
    return facts


def check_same(out: Path, asked: Mapping[str, Any], done: Mapping[str, Any]) -> None:
    if differing := [name for name in asked if asked[name] != done.get(name)]:
        raise InputError(f"out={out}: has a study with another {', '.join(differing)}; give another directory")


def judge(
    terms: Mapping[str, EpisodeTerms], families: Mapping[str, Sequence[str]], **bounds: Any
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The surest policy of all and of each family, and the values of all."""
    choices = {}
    for run, names in families.items():
        renamed = {"anchor" if name == names[0] else name: name for name in names}
        choices[run] = renamed[choose({new: terms[old] for new, old in renamed.items()}, **bounds)[0]]
    chosen, _, values = choose(terms, **bounds)
    return {"chosen": chosen, "safe_choice": choices}, {name: plain(value) for name, value in values.items()}


def show(found: Mapping[str, Any]) -> None:
    table = Table("policy", "score", "value", "low", "high", "discounted return")
    for row in sorted(found["rows"], key=lambda row: -row["value"]):
        numbers = (row[name] for name in ("score", "value", "low", "high", "true_value"))
        table.add_row(row["name"], *(f"{number:.4g}" for number in numbers))
    console = Console()
    console.print(table)
    for whose, those in {"": found, "d3rlpy's ": found.get("d3rlpy", {})}.items():
        regrets = {f"regret of choosing by {whose}{name}": value for name, value in those.get("regret", {}).items()}
        others = {f"{whose}{name}": value for name, value in those.items() if not isinstance(value, (dict, list, str))}
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
