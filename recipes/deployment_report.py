"""The report to sign before a policy is deployed: one HTML page that needs no other file, and the JSON behind it.

python recipes/deployment_report.py run=outputs/.../    # writes deployment.html and deployment.json into it
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from harness.actors import read_actor
from harness.checkpoints import sha256
from harness.directory import read_run
from harness.environment import load_any, source_of
from harness.launch import best_device, run_recipe
from harness.log_values import estimate_spar, fqe_options
from harness.options import option, recipe_options
from harness.output import write_json, write_text
from harness.printing import values_in
from harness.same_rows import check_same, digest_of
from harness.spar_options import OPE
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from omegaconf import DictConfig, OmegaConf
from reporting.deployment import checksums, report_facts
from reporting.deployment_figures import figures

from torchrl_spar import InputError, SPARActor

NEEDED = ("config.yaml", "results.json", "policy.pt")


@recipe_options("deployment_report")
@dataclass
class Options:
    run: str = option("???", "Directory of a finished run of SPAR, by spar_d4rl.py or compare.py.")
    rows: int = option(20, "Rows listed where the policy leaves the data most.", least=0)
    ope: OPE = option(OPE(), "Off-policy evaluation, of a run whose results have none.")
    device: str | None = option(None, "cpu, cuda, ...; null: cuda if there is one, else cpu.")
    threads: int = option(1, "Torch threads.", least=1)


def page(facts: dict[str, Any]) -> str:
    """The HTML of the facts."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "reporting"), autoescape=True, undefined=StrictUndefined
    )
    templates.filters["number"] = lambda value: f"{value:.4g}"
    return templates.get_template("deployment.html").render(
        **facts, figures=figures(facts), value_names=values_in(facts["estimates"])
    )


def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    run = Path(cfg.run)
    if missing := [name for name in NEEDED if not (run / name).is_file()]:
        raise InputError(f"run={run}: has no {missing[0]}; give the directory of a finished run of SPAR")
    options, results = read_run(run)
    estimates = results.get("estimates")
    if estimates is not None and cfg.ope != OmegaConf.structured(OPE()):
        raise InputError(f"ope: {run / 'results.json'} has estimates, with the run's own options; leave ope out")
    own = {"ope": cfg.ope} if estimates is None else {}
    options = cast(DictConfig, OmegaConf.merge({"select": None}, options, own))
    device = best_device(cfg.device)
    data, _, _ = load_any(options, device)
    check_same(options.dataset, digest_of(data), results.get("rows_sha256"))
    policy, _ = read_actor(run / "policy.pt", device)
    if not isinstance(policy, SPARActor):
        raise InputError(f"run={run}: {results['method']}'s policy has no anchor to be compared with")
    if estimates is None:
        print(f"the run has no estimates: {cfg.ope.steps} steps of Fitted Q Evaluation each for anchor and policy")
        estimates, _ = estimate_spar(policy, data, fqe_options(options))
    source = Path(source_of(options))
    files = [run / name for name in NEEDED] + ([source] if source.is_file() else [])
    facts = {
        "run": {key: results[key] for key in ("dataset", "env", "method", "seed", "updates")}
        | {"members": results.get("members", 1)},
        **report_facts(options, data, policy, estimates, cfg.rows),
        "versions": {**results["versions"], "commit": results["commit"]},
        "checksums": checksums(files, data),
    }
    write_json(run / "deployment.json", facts)
    digest = sha256(run / "deployment.json")
    shown = {**facts, "checksums": {**facts["checksums"], "deployment.json": digest}}
    write_text(run / "deployment.html", page(shown))
    for row in facts["checks"]:
        print(f"{'yes ' if row['holds'] else 'look'}  {row['what']}: {row['numbers']}")
    print(f"{run / 'deployment.html'} and deployment.json")


if __name__ == "__main__":
    run_recipe(main, "deployment_report")
