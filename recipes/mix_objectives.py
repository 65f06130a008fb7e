"""SPAR mixed with other objectives of TorchRL, on one batch and by one optimiser, on the embedded data.

none: SPAR alone. iql: IQLLoss trains SPAR's critics and state value with it. cql: CQLLoss trains SPAR's critics with
it. encoder: head and critics share an encoder, which the critics train. aux: the same, and BCLoss trains it, too.

python recipes/mix_objectives.py                          # all of them, one seed
python recipes/mix_objectives.py mix=[none,iql] seeds=[0,1,2]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from harness.environment import EMBEDDED
from harness.launch import RECIPES, run_recipe
from harness.options import option, recipe_options
from harness.output import new_directory, write_json
from harness.run import versions
from harness.spar_options import Loss, Phase
from mixing import joint_loss as mixes
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.table import Table
from rivals.models import Networks
from tensordict.nn import TensorDictModuleBase
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchrl.data import ReplayBuffer, TensorDictReplayBuffer, TensorStorage
from torchrl.objectives import SoftUpdate

from torchrl_spar import (
    BatchSampler,
    InputError,
    OfflineReplayBuffer,
    SPARLoss,
    evaluate,
    fit_critics,
    load_offline_dataset,
    normalized_score,
    pretrain,
)

ENV = "Hopper-v5"
# Batches that are drawn at once.
BLOCK = 100


@dataclass
class IQL:
    temperature: float = option(
        3.0, "Factor on the advantage, in SPAR's scaled rewards, in the weights of IQL's own actor (IQL's paper: 3)."
    )


@dataclass
class CQL:
    min_q_weight: float = option(
        0.1, "Weight of the conservative penalty: CORL's 10 on Hopper's rewards is about this on scaled ones.", least=0
    )
    num_random: int = option(
        3, "Actions of each kind that are sampled for it (TorchRL: 10; it is most of the cost).", least=1
    )


@dataclass
class Spar:
    updates: int = option(4_000, "Updates of everything, the head included.", least=1)
    qvalue_lr: float = option(5e-4, "Learning rate (cosine to zero) of all that is trained but the head.", least=0)
    actor_lr: float = option(1e-3, "Learning rate (cosine to zero) of the head.", least=0)
    target_rate: float = option(0.01, "Polyak rate of all targets, the deployed head included.", least=0, most=1)
    # As many critics as TorchRL's CQLLoss has.
    loss: Loss = option(Loss(num_qvalue_nets=2), "Options of the loss.")


@dataclass
class Eval:
    interval: int = option(500, "Updates between two evaluations.", least=1)
    episodes: int = option(5, "Episodes of each.", least=1)
    final_episodes: int = option(20, "Episodes of the last one, and of the anchor's.", least=1)


@recipe_options("mix_objectives")
@dataclass
class Options:
    """Steps of the phases are fewer than in spar_d4rl.py."""

    out: str = option("outputs/mix_objectives/${now:%Y-%m-%d_%H-%M-%S}", "Output directory; a used one is refused.")
    mix: Any = option(
        ["none", "iql", "cql", "encoder", "aux"],
        "What is trained, one after the other from the same anchor and VAE: none, iql, cql, encoder, aux.",
    )
    seeds: list[int] = option([0], "Independent runs, each with its own anchor and VAE.")
    threads: int = option(1, "Torch threads (one is fastest for small networks).", least=1)
    batch_size: int = option(128, "Transitions in a batch, in every phase.", least=1)
    features: int = option(64, "Size of the shared encoder's output, for encoder and aux.", least=1)
    iql: IQL = option(IQL(), "For iql.")
    cql: CQL = option(CQL(), "For cql.")
    anchor: Phase = option(Phase(5_000), "The behaviour policy.")
    vae: Phase = option(Phase(5_000), "The residuals' VAE.")
    critics: Phase = option(Phase(1_000), "The critics' warm start.")
    spar: Spar = option(Spar(), "The main phase.")
    eval: Eval = option(Eval(), "Evaluations.")


def adders(cfg: DictConfig) -> dict[str, Callable[[mixes.Mix, Networks], None] | None]:
    """What each mix adds to SPAR."""
    of_the_networks = ("hidden", "head", "latent_dim", "gamma")
    options = {name: value for name, value in cfg.spar.loss.items() if name not in of_the_networks}
    return {
        "none": None,
        "iql": partial(mixes.add_iql, **cfg.iql),
        "cql": partial(mixes.add_cql, **cfg.cql),
        "encoder": partial(mixes.add_encoder, features=cfg.features, **options),
        "aux": partial(mixes.add_aux, features=cfg.features, **options),
    }


def names_of(cfg: DictConfig) -> list[str]:
    """The mixes that are asked for; refuses options that they do not read, before anything is trained."""
    names = [cfg.mix] if isinstance(cfg.mix, str) else cfg.mix
    known, loss = list(adders(cfg)), cfg.spar.loss
    if not isinstance(names, ListConfig | list) or not names or len({*names}) < len(names) or {*names} - {*known}:
        raise InputError(f"mix={cfg.mix}: must be some of {', '.join(known)}, each once")
    if changed := [name for name in ("lmbda", "cut_margin", "cut_temperature") if loss[name] != getattr(Loss(), name)]:
        raise InputError(f"spar.loss.{changed[0]}={loss[changed[0]]}: without effect, targets are one-step here")
    for name in {"encoder", "aux"} & {*names}:
        for key in ("head", "value_mix", "joint_vae"):
            if loss[key] != getattr(Loss(), key):
                raise InputError(f"spar.loss.{key}={loss[key]}: mix={name} has networks and terms of its own")
    if "cql" in names and loss.num_qvalue_nets != 2:
        raise InputError(f"spar.loss.num_qvalue_nets={loss.num_qvalue_nets}: mix=cql needs 2, as TorchRL's CQLLoss has")
    return [*names]


def main(cfg: DictConfig) -> None:
    names = names_of(cfg)
    torch.set_num_threads(cfg.threads)
    out = Path(cfg.out)
    new_directory(out)
    data = load_offline_dataset(RECIPES / "data" / EMBEDDED, batch_size=cfg.batch_size)
    networks = Networks.of(data, hidden=cfg.spar.loss.hidden)
    runs: list[dict[str, Any]] = []
    for seed in cfg.seeds:
        torch.manual_seed(seed)
        start, rows = prepare(cfg, data)
        for name in names:
            torch.manual_seed(seed)
            runs.append({"mix": name, "seed": seed, **train(cfg, name, deepcopy(start), networks, rows)})
            facts = {"env": ENV, "episodes": cfg.eval.final_episodes, "updates": cfg.spar.updates}
            write_json(out / "results.json", {**facts, "versions": versions(), "runs": runs})
    show(runs, out)


def prepare(cfg: DictConfig, data: OfflineReplayBuffer) -> tuple[SPARLoss, ReplayBuffer]:
    """What all mixes of a seed start from: the anchor, its actions, and the fitted residuals."""
    # IQL shares the state value.
    return pretrain(data, anchor=cfg.anchor, vae=cfg.vae, critics=None, with_value=True, **cfg.spar.loss)


def train(cfg: DictConfig, name: str, start: SPARLoss, networks: Networks, rows: ReplayBuffer) -> dict[str, Any]:
    """Trains one mix with one seed and returns its scores."""
    mix = mixes.Mix(start)
    if (add := adders(cfg)[name]) is not None:
        add(mix, networks)
    begin = time.process_time()
    start_critics(cfg, mix, rows)
    head = {id(param) for param in mix.spar.network_params("actor_network").parameters()}
    groups = [
        {"params": [param for param in mix.parameters() if (id(param) in head) == is_head], "lr": lr}
        for is_head, lr in ((True, cfg.spar.actor_lr), (False, cfg.spar.qvalue_lr))
    ]
    optimizer = torch.optim.Adam(groups, fused=True)
    schedule = CosineAnnealingLR(optimizer, cfg.spar.updates)
    updater = SoftUpdate(mix.spar, tau=cfg.spar.target_rate)
    # One-step targets: the features that SPAR reads are made of a batch at a time.
    sampler = BatchSampler(mix.spar, rows, length=BLOCK, seed=torch.initial_seed(), target_interval=None)
    scores = {"anchor": score(mix.spar.anchor, cfg.eval.final_episodes)}
    curve = []
    for step in range(1, cfg.spar.updates + 1):
        if step % BLOCK == 1:
            block = iter(next(sampler).unbind(0))
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(mix(next(block)).values())).sum().backward()
        optimizer.step()
        schedule.step()
        updater.step()
        if step % cfg.eval.interval == 0:
            curve.append({"step": step, "score": score(mix.policy, cfg.eval.episodes)})
    scores["policy"] = score(mix.policy, cfg.eval.final_episodes)
    return {**scores, "curve": curve, "cpu_seconds": round(time.process_time() - begin, 1)}


def start_critics(cfg: DictConfig, mix: mixes.Mix, rows: ReplayBuffer) -> None:
    """Warm-starts the critics, on the encoder's features where they read those."""
    data = rows[:]
    if mix.encoder is not None:
        with torch.no_grad():
            data = mix.encoder(data.clone(False))
    fit_critics(
        mix.spar, TensorDictReplayBuffer(storage=TensorStorage(data), batch_size=rows.batch_size), **cfg.critics
    )


def score(policy: TensorDictModuleBase, episodes: int) -> float:
    return round(normalized_score(ENV, evaluate(policy, ENV, episodes, seed=20_000)).mean().item(), 2)


def show(runs: list[dict[str, Any]], out: Path) -> None:
    """Prints each seed's score, their mean and, less noisy, the mean over the last half of the learning curves."""
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    table = Table("mix", "anchor", *(f"seed {seed}" for seed in seeds), "mean", "last half", "CPU s", title=ENV)
    for name in dict.fromkeys(run["mix"] for run in runs):
        own = [run for run in runs if run["mix"] == name]
        late = [row["score"] for run in own for row in run["curve"][len(run["curve"]) // 2 :]]
        numbers = [mean(run["anchor"] for run in own), *(run["policy"] for run in own)]
        numbers += [mean(run["policy"] for run in own), mean(late) if late else float("nan")]
        table.add_row(name, *(f"{x:.1f}" for x in numbers), f"{mean(run['cpu_seconds'] for run in own):.0f}")
    console = Console()
    console.print(table)
    console.print(f"files in {out}")


if __name__ == "__main__":
    run_recipe(main, "mix_objectives")
