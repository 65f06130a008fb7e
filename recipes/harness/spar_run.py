"""A run of SPAR: pre-training of anchor, VAE and critics, and the update of the main phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from harness.checkpoints import Checkpoints
from harness.earlier import EarlierPolicies
from harness.log_values import estimate_spar, fqe_options
from harness.plots import plot_learning_curve, plot_log_curve
from harness.run import Run, block_length, on_cpu
from torchrl_spar import (
    BatchSampler,
    HealthCheck,
    InputError,
    Progress,
    SPARActor,
    SPARLoss,
    SPARUpdate,
    StackedSPARLoss,
    make_member,
    pretrain,
)  # fmt: skip
from torchrl_spar.functional import call_ensemble, dtype_of
from torchrl_spar.mean_actor import policy_of
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
    """SPAR of one seed, up to its main phase and after it. Its policy is the mean of its members."""

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
    def policy(self) -> SPARActor:  # type: ignore[override]
        return policy_of(self.losses)

    @property
    def anchor(self) -> Mapping[str, Any] | TensorDictModuleBase:
        """Options of the cloning, or a behaviour policy that needs no cloning."""
        return self.cfg.anchor

    def pretrain(self) -> None:
        first = pretrain_spar(self, self.anchor, loss_class=self.loss_class)
        members, options = [first], critics_options(self.cfg)
        for i, seed in enumerate(seeds_of_members(self.cfg)[1:], start=1):
            progress = self.keep(f"progress {i}", Progress(self.checkpoints.step))
            report, keep = self.phase("critics", logged=False), partial(self.keep, f"loss {i}")
            members.append(make_member(*first, seed=seed, report=report, progress=progress, keep=keep, **options))
        self.losses, self.rows_of_each = [loss for loss, _ in members], [rows for _, rows in members]
        self.health = HealthCheck(self.losses, self.data)
        candidates = EarlierPolicies(self.cfg, self.cfg.select_from if self.cfg.select else 1)
        self.earlier = self.keep("earlier policies", candidates)

    def make_samplers(self) -> list[BatchSampler]:
        """For each member blocks of batches for the main phase, each with the noise of its updates."""
        length, interval = block_length(self.cfg), self.cfg.spar.target_interval
        return [
            self.keep(f"sampler {i}", BatchSampler(loss, rows, length=length, seed=seed, target_interval=interval))
            for i, (loss, rows, seed) in enumerate(zip(self.losses, self.rows_of_each, seeds_of_members(self.cfg)))
        ]

    def record(self, phase: str, step: int, metrics: dict[str, Tensor]) -> None:
        if phase == "spar":
            metrics = {**metrics, **self.health(step, metrics)}
        super().record(phase, step, {name: values.mean() for name, values in metrics.items()})  # of all members

    @torch.no_grad()
    def critics_values(self, policy: TensorDictModuleBase) -> Tensor:
        rows = self.data[:]
        starts = rows["episode"].diff(prepend=rows["episode"].new_full((1,), -1)) != 0
        state = policy(rows[starts].select(*policy.in_keys))
        values = []
        for loss in self.losses:
            out_key = loss.tensor_keys.state_action_value
            found = call_ensemble(loss.qvalue_network, loss.qvalue_network_params, state, {}, out_key=out_key)
            values.append(found.squeeze(-1).mean(-1) / loss.reward_scale)
        return torch.cat(values)

    def evaluate(self, step: int) -> None:
        self.earlier.add(step, self.policy)
        super().evaluate(step)

    def estimate(self) -> tuple[dict[str, Any], TensorDictModuleBase]:
        actor, select = self.policy, self.cfg.select is not None
        checkpoints = {f"step {step}": policy for step, policy in self.earlier.policies(actor).items()}
        return estimate_spar(actor, self.data, fqe_options(self.cfg), select=select, checkpoints=checkpoints)

    def go_on(self, results: dict[str, Any]) -> None:
        results["members"] = len(self.losses)
        policies: dict[Any, Any] = {"anchor": self.policy.anchor, "deployed": self.deployed}
        policies |= self.kept.policies(self.policy)
        results["critics_values"] = {name: self.critics_values(x).mean().item() for name, x in policies.items()}

    def draw(self, results: dict[str, Any]) -> None:
        plot = plot_learning_curve if self.env else plot_log_curve
        plot(self.out / "learning_curve.png", results["curve"], results)


def check_options(cfg: DictConfig, device: torch.device) -> None:
    """Refuses at once what would fail only after pre-training."""
    dtype_of(cfg.spar.loss.candidate_dtype)
    if cfg.spar.compile:
        check_compiler(device)
    if cfg.spar.loss.lsi_coeff == cfg.spar.loss.trust_coeff == 0:
        raise InputError("spar.loss.trust_coeff=0: must be positive where spar.loss.lsi_coeff is 0")
    if cfg.select_from > 1 and not cfg.select:
        raise InputError(f"select_from={cfg.select_from}: needs select=ope, which chooses among them")


def seeds_of_members(cfg: DictConfig) -> list[int]:
    """The first member's is the run's own: alone, it is what the others join."""
    return [cfg.seed, *(2**32 + 1_000 * cfg.seed + i for i in range(1, cfg.spar.members))]


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
        run.data, anchor=anchor, vae=run.cfg.vae, report=run.phase, progress=run.progress, keep=keep,
        **critics_options(run.cfg), **run.cfg.spar.loss, **options,
    )  # fmt: skip


def critics_options(cfg: DictConfig) -> dict[str, Any]:
    return {"critics": cfg.critics, "episode_share": cfg.episode_share, "compile": cfg.spar.compile}


class Updates:
    """A block of updates of each member of all runs: as one stack on a GPU, else one after the other."""

    def __init__(self, runs: Sequence[SPARRun]) -> None:
        run, self.members = runs[0], len(runs[0].losses)
        losses: list[Any] = [loss for run in runs for loss in run.losses]
        self.samplers = [sampler for run in runs for sampler in run.make_samplers()]
        on_gpu = run.device.type == "cuda"
        is_tied = losses[0].joint_vae and losses[0].actor_network.is_latent  # of the decoder, which a stack would untie
        is_many = len(losses) > 1 and (on_gpu or len(runs) > 1)
        self.stack = StackedSPARLoss(losses) if is_many and not is_tied else None
        trained = [self.stack] if self.stack else losses
        self.updates = [make_update(run.cfg, loss, cudagraph=on_gpu) for loss in trained]
        for i, update in enumerate(self.updates):
            run.checkpoints.add(f"update {i}", update)

    def run(self) -> dict[str, Tensor]:
        """Metrics of each run's members, ``[R, M]``."""
        blocks = [next(sampler) for sampler in self.samplers]
        if self.stack:
            metrics = self.updates[0].run(torch.stack(blocks, 1))
            self.stack.copy_back()  # samplers, health checks, evaluations and checkpoints read the losses
        else:
            of_each = [update.run(block) for update, block in zip(self.updates, blocks)]
            metrics = {name: torch.stack([each[name] for each in of_each]) for name in of_each[0]}
        return {name: values.unflatten(0, (-1, self.members)) for name, values in metrics.items()}


def make_update(cfg: DictConfig, loss: SPARLoss | StackedSPARLoss, *, cudagraph: bool = False) -> SPARUpdate:
    names = ("qvalue_lr", "actor_lr", "target_rate", "policy_interval", "critic_share", "compile")
    options = {name: cfg.spar[name] for name in names}
    return SPARUpdate(loss, decay_steps=cfg.spar.updates if cfg.spar.decay else None, cudagraph=cudagraph, **options)
