"""One run: a seed on a data set, with its directory, its losses and its scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from common import RECIPES, best_device, summarize
from omegaconf import DictConfig, OmegaConf
from plots import plot_learning_curve
from rich.console import Console
from rich.table import Table
from run_output import MetricLog, save_config, write_json
from scores import Scores
from torchrl.data import ReplayBuffer
from tqdm import tqdm

from torchrl_spar import (
    InputError,
    OfflineReplayBuffer,
    environment_sizes,
    fit_anchor,
    fit_residual,
    fit_value,
    load_offline_dataset,
    make_anchor,
    make_spar_loss,
    save_policy,
    with_anchor_actions,
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
    """A progress bar over one phase that logs a row every `interval` steps, for each of several runs."""

    def __init__(self, name: str, steps: int, logs: Sequence[MetricLog], interval: int, line: int) -> None:
        self.name, self.logs, self.interval, self.steps = name, logs, interval, steps
        self.bar = tqdm(total=steps, desc=f"{name:>6}", unit="step", dynamic_ncols=True, mininterval=1.0, position=line)

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        self.bar.update(step - self.bar.n)
        if step % self.interval == 0 or step == self.steps:
            for index, log in enumerate(self.logs):
                log.write(self.name, step, {key: x[index] if x.ndim else x for key, x in metrics.items()})
        if step == self.steps:
            self.bar.close()

    def show(self, curve: list[dict[str, Any]]) -> None:
        """The last score beside the bar."""
        for row in curve[-1:]:
            score = row["return_mean"] if row["normalized"] is None else row["normalized"]
            self.bar.set_postfix(score=f"{score:.1f} at {row['step']}", refresh=False)


class Run:
    """Everything of one seed. All options are checked before anything is written or trained."""

    def __init__(self, cfg: DictConfig, seed: int, out: Path, line: int = 0) -> None:
        # The saved config gives this run alone.
        self.cfg = cfg = cast(DictConfig, OmegaConf.merge(cfg, {"seed": seed, "seeds": None, "out": str(out)}))
        self.seed, self.out, self.line = seed, out, line
        torch.manual_seed(seed)
        device = best_device(cfg.device)
        self.data: ReplayBuffer
        self.data, self.env = data, _ = load(cfg, device)
        self.data_scores = summarize(self.env, data.episode_returns)
        stats = (data.observation_loc, data.observation_scale)
        sizes = (data.observation_loc.numel(), data.action_spec)
        options = dict(device=device, observation_stats=stats, **cfg.spar.loss)
        options["candidate_dtype"] = dtype_of(cfg.spar.loss.candidate_dtype)
        hidden = list(cfg.spar.loss.hidden)
        self.actor = make_anchor(*sizes, observation_stats=stats, hidden=hidden, device=device)
        self.make_loss = partial(make_spar_loss, *sizes, **options)
        columns = ["loss_bc", "loss_fit", "reconstruction_error", "kl", *self.make_loss().out_keys]
        columns = [*dict.fromkeys(columns), "return_mean", "return_std", "normalized"]
        self.log = MetricLog(out, cfg.logger.backend, columns)
        save_config(out, cfg)
        self.scores = Scores(self.env, seed, self.log, background=cfg.eval.background)

    def pretrain(self) -> None:
        """The anchor, the residuals' manifold, the critics' start."""
        cfg = self.cfg
        fit_anchor(self.actor, self.data, **cfg.anchor, report=self._phase("anchor"))
        self.loss = self.make_loss(anchor=self.actor)
        self.data = with_anchor_actions(self.loss, self.data)
        self.scores.add_result("anchor", self.loss.anchor.cpu(), cfg.eval.final_episodes)
        if cfg.fit.steps:
            fit_residual(self.loss, self.data, **cfg.fit, report=self._phase("fit"))
        if cfg.value.steps:
            fit_value(self.loss, self.data, **cfg.value, report=self._phase("value"))

    def evaluate(self, step: int) -> None:
        """Adds a point to the learning curve, from the CPU: one state a step is too little for a GPU."""
        self.scores.add_to_curve(step, self.loss.actor.cpu(), self.cfg.eval.episodes)

    def finish(self, *, updates_per_second: float, start: float) -> None:
        """The final evaluation, and all files."""
        cfg = self.cfg
        self.scores.add_result("spar", self.loss.actor.cpu(), cfg.eval.final_episodes)
        self.scores.collect(wait=True)
        name = EMBEDDED if cfg.dataset == "embedded" else str(cfg.dataset)
        results = {
            "dataset": name, "env": self.env, "seed": self.seed, "updates": cfg.spar.updates,
            **self.scores.results, "data": self.data_scores,
            "episodes": cfg.eval.final_episodes, "updates_per_second": updates_per_second,
            "wall_seconds": time.perf_counter() - start,
            "versions": {name: version(name) for name in VERSIONED},
            "curve": self.scores.curve,
        }  # fmt: skip
        save_policy(self.loss, self.out / "policy.pt", env=self.env, dataset=name, seed=self.seed)
        plot_learning_curve(self.out / "learning_curve.png", self.scores.curve, results)
        write_json(self.out / "results.json", results)
        show(results, self.out)

    def close(self) -> None:
        """Ends what runs beside."""
        self.scores.close()
        self.log.close()

    def _phase(self, name: str) -> Phase:
        return Phase(name, self.cfg[name].steps, [self.log], self.cfg.logger.interval, self.line)


def dtype_of(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"candidate_dtype={name}: not a type of torch, such as bfloat16")
    return dtype


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
