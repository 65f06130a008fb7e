"""One policy of several finished runs of SPAR: the mean of their actions.

python recipes/spar_d4rl.py 'seeds=[0,1,2]' out=outputs/mine
python recipes/average.py 'runs=[outputs/mine]' out=outputs/mine_mean

Writes policy.pt, which evaluate.py and export.py take like a run's own, and average.json: scores of the mean, of the
mean of the anchors and of each run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from harness.actors import read_actor
from harness.checkpoints import sha256
from harness.finished import finished_runs, read_agreeing
from harness.launch import run_recipe, summarize
from harness.options import option, recipe_options
from harness.output import new_directory, rounded, write_json
from harness.printing import numeric_table
from harness.run import VERSIONED, commit
from harness.scores import RESULT_SEED
from omegaconf import DictConfig
from rich.console import Console

from torchrl_spar import InputError, SPARActor, evaluate, mean_actor, save_policy


@recipe_options("average")
@dataclass
class Options:
    runs: list[str] = option(
        "???", "Directories of finished runs of SPAR on one data set, or folders that hold some; two at least."
    )
    out: str = option("outputs/average/${now:%Y-%m-%d_%H-%M-%S}", "Directory of the files; a used one is refused.")
    episodes: int = option(20, "Episodes that the mean and the mean of the anchors play.", least=2)
    seed: int = option(0, "Of the evaluation.", least=0)
    threads: int = option(1, "Torch threads.", least=1)


def read_policies(runs: Sequence[Path]) -> tuple[list[SPARActor], dict[str, Any]]:
    """The policies of runs, and what the first one's file says of them."""
    policies: list[SPARActor] = []
    facts: list[dict[str, Any]] = []
    sums: dict[str, Path] = {}
    for run in runs:
        policy, said = read_actor(run / "policy.pt")
        if not isinstance(policy, SPARActor):
            raise InputError(f"runs: the policy of {run} has no residual on an anchor")
        if (other := sums.setdefault(sha256(run / "policy.pt"), run)) != run:
            raise InputError(f"runs: {run} and {other} hold the same policy, which would count twice")
        policies.append(policy)
        facts.append(said)
    return policies, facts[0]


def read_results(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of offline runs of one method."""
    results = [each for _, each in read_agreeing(runs)]
    for run, each in zip(runs, results):
        if "online" in each:
            raise InputError(f"runs: {run} went on online; a mean is of offline runs")
        if not all(isinstance(each.get(name), dict) for name in ("anchor", "spar")):
            raise InputError(f"runs: {run} has no scores of an anchor and of SPAR in its results.json")
    if len(methods := {each["method"] for each in results}) > 1:
        raise InputError(f"runs: of several methods, {', '.join(sorted(methods))}; average them separately")
    return results


def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    out, runs = Path(cfg.out), finished_runs(cfg.runs)
    if len(runs) < 2:
        raise InputError(f"runs={list(cfg.runs)}: only one finished run; a mean needs at least two")
    results = read_results(runs)
    policies, facts = read_policies(runs)
    mean, env, env_kwargs = mean_actor(policies), results[0]["env"], results[0]["env_kwargs"]
    new_directory(out)
    found: dict[str, Any] = {name: results[0][name] for name in ("dataset", "env", "env_kwargs", "method")}
    of_each = ("seed", "updates", "episodes", "anchor", "spar", "selected")
    found["runs"] = [
        {"run": str(run), **{name: each[name] for name in of_each if name in each}} for run, each in zip(runs, results)
    ]
    if env is not None:
        for name, policy in {"anchor": mean.anchor, "mean": mean}.items():
            returns = evaluate(policy, env, cfg.episodes, RESULT_SEED + 100_000 * cfg.seed, **env_kwargs)
            found[name] = summarize(env, returns, env_kwargs)
        found["episodes"] = cfg.episodes
    found |= {"versions": {name: version(name) for name in VERSIONED}, "commit": commit()}
    shared = {name: facts[name] for name in ("env", "env_kwargs", "dataset", "rows_sha256", "log") if name in facts}
    save_policy(mean, out / "policy.pt", **shared, seeds=[each["seed"] for each in results])
    write_json(out / "average.json", rounded(found, 6))
    if env is not None:
        show(found)
    print(f"files in {out}")


def show(found: Mapping[str, Any]) -> None:
    runs, title = found["runs"], f"{found['method']}, {found['env']}, {found['dataset']}"
    table = numeric_table(title, "anchor", "policy")
    for row in runs:
        table.add_row(f"seed {row['seed']}", score(row["anchor"]), score(row.get("selected", row["spar"])))
    table.add_row(
        f"mean of the {len(runs)}, {found['episodes']} episodes", score(found["anchor"]), score(found["mean"])
    )
    Console().print(table)


def score(row: Mapping[str, float | None]) -> str:
    """Normalised where there is one."""
    return f"{row['return_mean'] if row['normalized'] is None else row['normalized']:.1f}"


if __name__ == "__main__":
    run_recipe(main, "average")
