"""SPAR on an offline data set, from the raw data to a table: clone the anchor, fit the residuals, improve.

python recipes/spar_d4rl.py                                    # the embedded Hopper data
python recipes/spar_d4rl.py dataset=minari:D4RL/pen/human-v2 preset=d4rl seed=1
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import RECIPES, best_device, run_recipe, summarize
from omegaconf import DictConfig
from plots import plot_learning_curve
from rich.console import Console
from rich.table import Table
from run_output import MetricLog, check_unused, save_config, write_json
from scores import Scores
from tqdm import tqdm

from torchrl_spar import (
    InputError,
    OfflineReplayBuffer,
    SPARUpdate,
    environment_sizes,
    fit_anchor,
    fit_residual,
    fit_value,
    load_offline_dataset,
    make_anchor,
    make_spar_loss,
    save_policy,
)  # fmt: skip

EMBEDDED = "torchrl-spar/hopper/medium-v0"
VERSIONED = ("torchrl-spar", "torch", "torchrl", "tensordict", "gymnasium", "mujoco")


def load(cfg: DictConfig, device: torch.device) -> tuple[OfflineReplayBuffer, str]:
    """The data and the environment, checked against each other."""
    source = RECIPES / "data" / EMBEDDED if cfg.dataset == "embedded" else cfg.dataset
    data = load_offline_dataset(source, batch_size=cfg.batch_size, device=device, cache=cfg.cache)
    env = cfg.env or data.env_id
    if env is None:
        raise InputError(f"env: {cfg.dataset} does not name its environment; give one, e.g. env=Hopper-v5")
    observation_dim, action_spec = environment_sizes(env)
    for name, found, expected in (
        ("observations", data.observation_loc.numel(), observation_dim),
        ("actions", data.action_spec.shape[-1], action_spec.shape[-1]),
    ):
        if found != expected:
            raise InputError(f"dataset={cfg.dataset}: {name} have size {found}, env={env} has {expected}")
    return data, env


class Phase:
    """A progress bar over one phase that logs a row every `interval` steps."""

    def __init__(self, name: str, steps: int, log: MetricLog, interval: int) -> None:
        self.name, self.log, self.interval, self.steps = name, log, interval, steps
        self.bar = tqdm(total=steps, desc=f"{name:>6}", unit="step", dynamic_ncols=True, mininterval=1.0)

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        self.bar.update()
        if step % self.interval == 0 or step == self.steps:
            self.log.write(self.name, step, metrics)
        if step == self.steps:
            self.bar.close()

    def show(self, curve: list[dict[str, Any]]) -> None:
        """The last score beside the bar."""
        for row in curve[-1:]:
            score = row["return_mean"] if row["normalized"] is None else row["normalized"]
            self.bar.set_postfix(score=f"{score:.1f} at {row['step']}", refresh=False)


def main(cfg: DictConfig) -> None:
    start = time.perf_counter()
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    out = Path(cfg.out)
    check_unused(out)
    device = best_device(cfg.device)
    data, env = load(cfg, device)
    name = EMBEDDED if cfg.dataset == "embedded" else str(cfg.dataset)
    stats = (data.observation_loc, data.observation_scale)
    sizes = (data.observation_loc.numel(), data.action_spec)
    hidden = list(cfg.spar.loss.hidden)
    actor = make_anchor(*sizes, observation_stats=stats, hidden=hidden, device=device)
    # Built before anything is written: a wrong option ends here.
    options = dict(device=device, observation_stats=stats, **cfg.spar.loss)
    columns = ["loss_bc", "loss_fit", "reconstruction_error", "kl", *make_spar_loss(*sizes, **options).out_keys]
    log = MetricLog(out, cfg.logger.backend, [*dict.fromkeys(columns), "return_mean", "return_std", "normalized"])
    save_config(out, cfg)

    with Scores(env, cfg.seed, log, background=cfg.eval.background) as scores:
        fit_anchor(actor, data, **cfg.anchor, report=Phase("anchor", cfg.anchor.steps, log, cfg.logger.interval))
        loss = make_spar_loss(*sizes, anchor=actor, **options)
        scores.add_result("anchor", loss.anchor, cfg.eval.final_episodes)
        if cfg.fit.steps:
            fit_residual(loss, data, **cfg.fit, report=Phase("fit", cfg.fit.steps, log, cfg.logger.interval))
        if cfg.value.steps:
            fit_value(loss, data, **cfg.value, report=Phase("value", cfg.value.steps, log, cfg.logger.interval))
        rate = improve(cfg, loss, data, log, scores)
        scores.add_result("spar", loss.actor, cfg.eval.final_episodes)
        scores.collect(wait=True)
    log.close()
    results = {
        "dataset": name, "env": env, "seed": cfg.seed, "updates": cfg.spar.updates,
        **scores.results, "data": summarize(env, data.episode_returns),
        "episodes": cfg.eval.final_episodes, "updates_per_second": rate,
        "wall_seconds": time.perf_counter() - start,
        "versions": {name: version(name) for name in VERSIONED},
        "curve": scores.curve,
    }  # fmt: skip
    save_policy(loss, out / "policy.pt", env=env, dataset=name, seed=cfg.seed)
    plot_learning_curve(out / "learning_curve.png", scores.curve, results)
    write_json(out / "results.json", results)
    show(results, out)


def improve(cfg: DictConfig, loss: Any, data: OfflineReplayBuffer, log: MetricLog, scores: Scores) -> float:
    """The main phase; returns the learner's updates per second, evaluation left out."""
    options = {key: cfg.spar[key] for key in ("qvalue_lr", "actor_lr", "target_rate", "policy_interval")}
    update = SPARUpdate(loss, **options)
    phase = Phase("spar", cfg.spar.updates, log, cfg.logger.interval)
    learning = 0.0
    metrics: dict[str, Any] = {}
    scores.add_to_curve(0, loss.actor, cfg.eval.episodes)
    for step in range(1, cfg.spar.updates + 1):
        start = time.perf_counter()
        metrics |= update(data.sample())
        learning += time.perf_counter() - start
        if step % cfg.eval.interval == 0 or step == cfg.spar.updates:
            scores.add_to_curve(step, loss.actor, cfg.eval.episodes)
        if step % cfg.logger.interval == 0:
            scores.collect()
            phase.show(scores.curve)
        phase(step, metrics)
    return cfg.spar.updates / learning


def show(results: dict[str, Any], out: Path) -> None:
    table = Table(title=f"{results['env']}, {results['dataset']}, {results['episodes']} episodes")
    table.add_column("")
    for name in ("return", "+-", "score"):
        table.add_column(name, justify="right")
    for name in ("data", "anchor", "spar"):
        row = results[name]
        normalized = "-" if row["normalized"] is None else f"{row['normalized']:.1f}"
        table.add_row(name, f"{row['return_mean']:.1f}", f"{row['return_std']:.1f}", normalized)
    console = Console()
    console.print(table)
    console.print(
        f"{results['updates_per_second']:.1f} updates/s, {results['wall_seconds']:.0f} s in all; files in {out}"
    )


if __name__ == "__main__":
    run_recipe(main, "spar_d4rl")
