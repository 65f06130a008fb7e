"""A run of SPAR: the anchor, the residuals' manifold, the critics' start, and what the main phase updates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from harness.checkpoints import Checkpoints
from harness.figures import plot_learning_curve
from harness.run import Run, on_cpu
from torchrl_spar import (
    HealthCheck,
    OfflineReplayBuffer,
    SPARLoss,
    SPARUpdate,
    StackedSPARLoss,
    fit_anchor,
    fit_critics,
    fit_vae,
    make_anchor,
    make_spar_loss,
    save_policy,
    with_anchor_actions,
)  # fmt: skip
from torchrl_spar.configs import dtype_of

# The method's name without compare.py, which gives one.
NAMES = {"residual": "spar", "latent": "spar_latent"}


class SPARRun(Run):
    """SPAR of one seed, up to its main phase and after it."""

    policy_name = "spar"
    loss_class: type[SPARLoss] = SPARLoss

    def __init__(self, cfg: DictConfig, checkpoints: Checkpoints, line: int = 0) -> None:
        super().__init__(cfg, checkpoints, line)
        self.open(log_columns(self.cfg, self.data, self.loss_class))

    @property
    def method(self) -> str:
        return super().method if "method" in self.cfg else NAMES[self.cfg.spar.loss.head]

    @property
    def policy(self) -> TensorDictModuleBase:  # type: ignore[override]
        return self.loss.actor

    def make_anchor(self) -> TensorDictModuleBase:
        """The behaviour policy, trained."""
        return clone_behaviour(self)

    def pretrain(self) -> None:
        self.loss, self.anchored_data = pretrain(self, self.make_anchor, self.loss_class)
        self.health = HealthCheck(self.loss, self.data)

    def record(self, phase: str, step: int, metrics: dict[str, Tensor]) -> None:
        super().record(phase, step, metrics)
        if phase == "spar":
            self.health(step, metrics)

    def save(self, results: dict[str, Any]) -> None:
        facts = {key: results[key] for key in ("env", "env_kwargs", "dataset", "seed")}
        save_policy(self.loss, self.out / "policy.pt", **facts)

    def draw(self, results: dict[str, Any]) -> None:
        plot_learning_curve(self.out / "learning_curve.png", results["curve"], results)


def log_columns(cfg: DictConfig, data: OfflineReplayBuffer, loss_class: type[SPARLoss] = SPARLoss) -> list[str]:
    """What SPAR's phases log; a wrong option ends here."""
    loss = loss_maker(cfg, data, loss_class)()
    make_update(cfg, loss)
    return ["loss_bc", "loss_vae", "reconstruction_error", "kl", *loss.out_keys]


def loss_maker(cfg: DictConfig, data: OfflineReplayBuffer, loss_class: type[SPARLoss] = SPARLoss) -> partial[SPARLoss]:
    """`make_spar_loss` with everything but the anchor."""
    options = {**cfg.spar.loss, "candidate_dtype": dtype_of(cfg.spar.loss.candidate_dtype)}
    return partial(make_spar_loss, **sizes_of(data), loss_class=loss_class, **options)


def sizes_of(data: OfflineReplayBuffer) -> dict[str, Any]:
    return {
        "observation_dim": data.observation_loc.numel(), "action_spec": data.action_spec,
        "observation_stats": (data.observation_loc, data.observation_scale), "device": data.observation_loc.device,
    }  # fmt: skip


def clone_behaviour(run: Run) -> TensorDictModuleBase:
    anchor = run.keep("anchor", make_anchor(**sizes_of(run.data), hidden=list(run.cfg.spar.loss.hidden)))
    return fit_anchor(anchor, run.data, **run.cfg.anchor, report=run.phase("anchor"), progress=run.progress)


def pretrain(
    run: Run, make_anchor: Callable[[], TensorDictModuleBase], loss_class: type[SPARLoss] = SPARLoss
) -> tuple[SPARLoss, ReplayBuffer]:
    """The anchor, evaluated too, the residuals' manifold, the critics' start; the data with the anchor's actions."""
    cfg, data = run.cfg, run.data
    # Here, not earlier: all methods with an anchor have the same one for a seed.
    torch.manual_seed(run.seed)
    loss = run.keep("loss", loss_maker(cfg, data, loss_class)(anchor=make_anchor()))
    run.scores.add_result("anchor", on_cpu(loss.anchor), cfg.eval.final_episodes)
    rows = with_anchor_actions(loss, data)
    # With no steps they still measure the scales of residuals and rewards.
    fit_vae(loss, rows, **cfg.vae, report=run.phase("vae"), progress=run.progress)
    fit_critics(loss, rows, **cfg.critics, report=run.phase("critics"), progress=run.progress)
    return loss, rows


def make_update(cfg: DictConfig, loss: SPARLoss | StackedSPARLoss, *, cudagraph: bool = False) -> SPARUpdate:
    options = {key: cfg.spar[key] for key in ("qvalue_lr", "actor_lr", "target_rate", "policy_interval", "compile")}
    return SPARUpdate(loss, decay_steps=cfg.spar.updates if cfg.spar.decay else None, cudagraph=cudagraph, **options)
