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
from tqdm import tqdm

from torchrl_spar import (
    InputError,
    OfflineReplayBuffer,
    SPARLoss,
    SPARUpdate,
    environment_sizes,
    evaluate,
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
# Evaluations of the curve and of the results start from states of their own.
CURVE_SEED, RESULT_SEED = 10_000, 20_000
HEADS = {"residual": "spar", "latent": "spar_latent"}
SCORE_COLUMNS = ("return_mean", "return_std", "normalized")


def load(cfg: DictConfig, device: torch.device) -> tuple[OfflineReplayBuffer, str]:
    """The data and the environment, checked against each other."""
    source = RECIPES / "data" / EMBEDDED if cfg.dataset == "embedded" else cfg.dataset
    data = load_offline_dataset(source, batch_size=cfg.batch_size, device=device)
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


def main(cfg: DictConfig) -> None:
    show(train(cfg), Path(cfg.out))


def train(cfg: DictConfig) -> dict[str, Any]:
    """One run, from data to files; returns its results."""
    start = time.perf_counter()
    torch.set_num_threads(cfg.threads)
    out = Path(cfg.out)
    check_unused(out)
    device = best_device(cfg.device)
    data, env = load(cfg, device)
    # Asked for before anything is written: a wrong option ends here.
    log = MetricLog(out, cfg.logger.backend, [*log_columns(cfg, data), *SCORE_COLUMNS])
    save_config(out, cfg)
    loss = pretrain(cfg, data, log)

    def score(policy: Any, episodes: int, seed: int) -> dict[str, float | None]:
        return summarize(env, evaluate(policy, env, episodes, seed + 100_000 * cfg.seed))

    anchor = score(loss.anchor, cfg.eval.final_episodes, RESULT_SEED)
    curve, rate = improve(cfg, make_update(cfg, loss), loss.actor, data, log, score)
    spar = score(loss.actor, cfg.eval.final_episodes, RESULT_SEED)
    log.close()
    results = {
        **run_facts(cfg, env, data),
        "anchor": anchor, "spar": spar,
        "updates_per_second": rate, "wall_seconds": time.perf_counter() - start, "curve": curve,
    }  # fmt: skip
    save_policy(loss, out / "policy.pt", env=env, dataset=results["dataset"], seed=cfg.seed)
    plot_learning_curve(out / "learning_curve.png", curve, results)
    write_json(out / "results.json", results)
    return results


def run_facts(cfg: DictConfig, env: str, data: OfflineReplayBuffer) -> dict[str, Any]:
    """What results.json says of a run of any method; compare.py names it, else it is SPAR with its head."""
    method = cfg.method.name if "method" in cfg else HEADS[cfg.spar.loss.head]
    return {
        "dataset": dataset_name(cfg), "env": env, "seed": cfg.seed, "method": method, "updates": cfg.spar.updates,
        "data": summarize(env, data.episode_returns), "episodes": cfg.eval.final_episodes,
        "versions": {name: version(name) for name in VERSIONED},
    }  # fmt: skip


def dataset_name(cfg: DictConfig) -> str:
    return EMBEDDED if cfg.dataset == "embedded" else str(cfg.dataset)


def loss_options(cfg: DictConfig, data: OfflineReplayBuffer) -> dict[str, Any]:
    """The arguments of make_spar_loss, the anchor left out."""
    stats = (data.observation_loc, data.observation_scale)
    sizes = dict(observation_dim=data.observation_loc.numel(), action_spec=data.action_spec)
    return dict(**sizes, observation_stats=stats, device=data.observation_loc.device, **cfg.spar.loss)


def log_columns(cfg: DictConfig, data: OfflineReplayBuffer) -> list[str]:
    """What the phases of SPAR log."""
    out_keys = make_spar_loss(**loss_options(cfg, data)).out_keys
    return list(dict.fromkeys(["loss_bc", "loss_fit", "reconstruction_error", "kl", *out_keys]))


def pretrain(cfg: DictConfig, data: OfflineReplayBuffer, log: MetricLog) -> SPARLoss:
    """Clones the anchor, fits the residuals, starts the critics."""
    # Here, not earlier: all methods with an anchor have the same one for a seed.
    torch.manual_seed(cfg.seed)
    options, interval = loss_options(cfg, data), cfg.logger.interval
    shared = ("observation_dim", "action_spec", "observation_stats", "device", "hidden")
    actor = make_anchor(**{name: options[name] for name in shared})
    fit_anchor(actor, data, **cfg.anchor, report=Phase("anchor", cfg.anchor.steps, log, interval))
    loss = make_spar_loss(anchor=actor, **options)
    if cfg.fit.steps:
        fit_residual(loss, data, **cfg.fit, report=Phase("fit", cfg.fit.steps, log, interval))
    if cfg.value.steps:
        fit_value(loss, data, **cfg.value, report=Phase("value", cfg.value.steps, log, interval))
    return loss


def make_update(cfg: DictConfig, loss: SPARLoss) -> SPARUpdate:
    return SPARUpdate(
        loss, **{key: cfg.spar[key] for key in ("qvalue_lr", "actor_lr", "target_rate", "policy_interval")}
    )


def improve(
    cfg: DictConfig, update: Any, policy: Any, data: OfflineReplayBuffer, log: MetricLog, score: Any, name: str = "spar"
) -> tuple[list, float]:
    """The main phase; returns the evaluation curve and the learner's updates per second, evaluation left out."""
    phase = Phase(name, cfg.spar.updates, log, cfg.logger.interval)
    curve: list[dict[str, Any]] = []
    learning = 0.0
    metrics: dict[str, Any] = {}

    def evaluate_now(step: int) -> dict[str, Any]:
        row = score(policy, cfg.eval.episodes, CURVE_SEED)
        curve.append({"step": step, **row})
        phase.bar.set_postfix(score=f"{row['return_mean'] if row['normalized'] is None else row['normalized']:.1f}")
        return {name: value for name, value in row.items() if value is not None}

    evaluate_now(0)
    for step in range(1, cfg.spar.updates + 1):
        start = time.perf_counter()
        metrics |= update(data.sample())
        learning += time.perf_counter() - start
        due = step % cfg.eval.interval == 0 or step == cfg.spar.updates
        phase(step, metrics | evaluate_now(step) if due else metrics)
    return curve, cfg.spar.updates / learning


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
