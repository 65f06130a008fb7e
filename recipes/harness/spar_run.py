"""A run of SPAR: pre-training of anchor, VAE and critics, and the update of the main phase."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from harness.checkpoints import Checkpoints
from harness.log_values import estimate_spar, fqe_options
from harness.plots import plot_learning_curve, plot_log_curve
from harness.run import Run, block_length, on_cpu
from torchrl_spar import (
    BatchSampler,
    HealthCheck,
    InputError,
    SPARLoss,
    SPARUpdate,
    StackedSPARLoss,
    pretrain,
)  # fmt: skip
from torchrl_spar.configs import dtype_of
from torchrl_spar.functional import call_ensemble
from torchrl_spar.training.compiling import check_compiler

# The metrics of SPAR's phases.
COLUMNS = (
    "loss_bc", "loss_vae", "reconstruction_error", "kl", "loss_value", "loss_qvalue", "pred_value", "target_value",
    "loss_actor", "candidate_spread", "effective_sample_size", "candidate_diversity", "lsi_advantage",
    "candidate_value_std", "trust_advantage", "data_value_std", "residual_ratio", "coherent_shift",
)  # fmt: skip
# The method's name without compare.py, which gives one.
NAMES = {"residual": "spar", "latent": "spar_latent"}


class SPARRun(Run):
    """SPAR of one seed, up to its main phase and after it."""

    policy_name = "spar"
    loss_class: type[SPARLoss] = SPARLoss

    def __init__(self, cfg: DictConfig, checkpoints: Checkpoints, line: int = 0) -> None:
        super().__init__(cfg, checkpoints, line)
        check_options(cfg, self.device)
        self.open(COLUMNS)

    @property
    def method(self) -> str:
        return super().method if "method" in self.cfg else NAMES[self.cfg.spar.loss.head]

    @property
    def policy(self) -> TensorDictModuleBase:  # type: ignore[override]
        return self.loss.actor

    @property
    def anchor(self) -> Mapping[str, Any] | TensorDictModuleBase:
        """Options of the cloning, or a behaviour policy that needs no cloning."""
        return self.cfg.anchor

    def pretrain(self) -> None:
        self.loss, self.anchored_data = pretrain_spar(self, self.anchor, loss_class=self.loss_class)
        self.health = HealthCheck(self.loss, self.data)
        self.earlier = self.keep("earlier policies", EarlierPolicies(self.cfg))

    def make_sampler(self) -> BatchSampler:
        """Blocks of batches for the main phase, each with the noise of its updates."""
        length, interval = block_length(self.cfg), self.cfg.spar.target_interval
        sampler = BatchSampler(self.loss, self.anchored_data, length=length, seed=self.seed, target_interval=interval)
        return self.keep("sampler", sampler)

    def record(self, phase: str, step: int, metrics: dict[str, Tensor]) -> None:
        if phase == "spar":
            metrics = {**metrics, **self.health(step, metrics)}
        super().record(phase, step, metrics)

    @torch.no_grad()
    def critics_values(self) -> Tensor:
        loss, rows = self.loss, self.data[:]
        starts = rows["episode"].diff(prepend=rows["episode"].new_full((1,), -1)) != 0
        state = loss.actor(rows[starts].select(*loss.actor.in_keys))
        out_key = loss.tensor_keys.state_action_value
        values = call_ensemble(loss.qvalue_network, loss.qvalue_network_params, state, {}, out_key=out_key)
        return values.squeeze(-1).mean(-1) / loss.reward_scale

    def evaluate(self, step: int) -> None:
        self.earlier.add(step, self.loss.actor)
        super().evaluate(step)

    def estimate(self) -> tuple[dict[str, Any], TensorDictModuleBase]:
        actor, select = self.loss.actor, self.cfg.select is not None
        checkpoints = self.earlier.policies(actor)
        return estimate_spar(actor, self.data, fqe_options(self.cfg), select=select, checkpoints=checkpoints)

    def draw(self, results: dict[str, Any]) -> None:
        plot = plot_learning_curve if self.env else plot_log_curve
        plot(self.out / "learning_curve.png", results["curve"], results)


class EarlierPolicies:
    """What `select=ope` chooses from beside the last policy: what training has changed, at a few evaluations."""

    def __init__(self, cfg: DictConfig) -> None:
        self.steps: list[int] = []
        self.states: dict[int, dict[str, Tensor]] = {}
        if cfg.select:
            points = [*range(cfg.eval.interval, cfg.spar.updates, cfg.eval.interval), cfg.spar.updates]
            count = min(cfg.select_from, len(points))
            self.steps = [points[(i + 1) * len(points) // count - 1] for i in range(count - 1)]

    def add(self, step: int, actor: TensorDictModuleBase) -> None:
        if step in self.steps:
            state = {name: tensor for name, tensor in actor.state_dict().items() if not name.startswith("anchor.")}
            self.states[step] = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def policies(self, actor: TensorDictModuleBase) -> dict[str, Any]:
        """By name, on the anchor of this one."""
        found: dict[str, Any] = {}
        for step, state in self.states.items():
            found[f"step {step}"] = deepcopy(actor)
            found[f"step {step}"].load_state_dict(state, strict=False)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"states": self.states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.states = state["states"]


def check_options(cfg: DictConfig, device: torch.device) -> None:
    """Refuses at once what would fail only after pre-training."""
    dtype_of(cfg.spar.loss.candidate_dtype)
    if cfg.spar.compile:
        check_compiler(device)
    if cfg.spar.loss.lsi_coeff == cfg.spar.loss.trust_coeff == 0:
        raise InputError("spar.loss.trust_coeff=0: must be positive where spar.loss.lsi_coeff is 0")
    if cfg.select_from > 1 and not cfg.select:
        raise InputError(f"select_from={cfg.select_from}: needs select=ope, which chooses among them")


def loss_options(cfg: DictConfig) -> dict[str, Any]:
    return {**cfg.spar.loss, "candidate_dtype": dtype_of(cfg.spar.loss.candidate_dtype)}


def pretrain_spar(
    run: Run, anchor: Mapping[str, Any] | TensorDictModuleBase, **options: Any
) -> tuple[SPARLoss, ReplayBuffer]:
    """`pretrain` with checkpoints, logs and the anchor's score; `options` are those of the loss."""

    def keep(name: str, part: Any) -> Any:
        part = run.keep(name, part)
        if name == "loss":
            run.scores.add_result("anchor", on_cpu(part.anchor), run.cfg.eval.final_episodes)
        return part

    # Here, not earlier: all methods with an anchor have the same one for a seed.
    torch.manual_seed(run.seed)
    return pretrain(
        run.data, anchor=anchor, vae=run.cfg.vae, critics=run.cfg.critics, episode_share=run.cfg.episode_share,
        report=run.phase, progress=run.progress, keep=keep, compile=run.cfg.spar.compile, **loss_options(run.cfg),
        **options,
    )  # fmt: skip


def make_update(cfg: DictConfig, loss: SPARLoss | StackedSPARLoss, *, cudagraph: bool = False) -> SPARUpdate:
    names = ("qvalue_lr", "actor_lr", "target_rate", "policy_interval", "critic_share", "compile")
    options = {name: cfg.spar[name] for name in names}
    return SPARUpdate(loss, decay_steps=cfg.spar.updates if cfg.spar.decay else None, cudagraph=cudagraph, **options)
