"""SPARLoss in TorchRL's own Trainer: replay buffer, hooks, csv logger, checkpoints and progress bar are TorchRL's.

python recipes/drop_in_trainer.py                              # the embedded Hopper data
python recipes/drop_in_trainer.py out=mine resume=true         # resumes from the last checkpoint

One optimiser for all losses, and the head in every update: less than spar_d4rl.py does, with nothing but SPARLoss in
the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.directory import check_options, claim
from harness.environment import dataset_name, load, log_options, step_limit_of
from harness.launch import best_device, describe, run_recipe, summarize
from harness.options import option, recipe_options
from harness.output import check_unused, save_config, write_text
from harness.run import Phase
from harness.same_rows import SameRows
from harness.scores import RESULT_SEED
from harness.spar_options import Loss, SharedOptions
from omegaconf import DictConfig
from tensordict import TensorDict, TensorDictBase
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation, GlobalRNGState
from torchrl.collectors import BaseCollector
from torchrl.data import ReplayBuffer
from torchrl.objectives import SoftUpdate
from torchrl.record.loggers import CSVLogger
from torchrl.trainers import (
    DefaultOptimizationStepper,
    LRSchedulerHook,
    ReplayBufferTrainer,
    TargetNetUpdaterHook,
    Trainer,
)

from torchrl_spar import (
    InputError,
    SPARLoss,
    evaluate,
    make_spar_loss,
    pretrain,
    save_policy,
    with_anchor_actions,
    with_member_weights,
    with_value_targets,
)
from torchrl_spar.training.sampling import has_trajectories


@dataclass
class TrainerOptions:
    updates: int = option(24_000, "Updates of everything in all.", least=1)
    round: int = option(
        2_000,
        "Updates in a round of the Trainer, which renews the critics' targets, logs means and moves its bar.",
        least=1,
    )
    lr: float = option(5e-4, "Initial learning rate of Adam, of all networks (cosine to zero).", least=0)
    target_rate: float = option(0.01, "Polyak rate of all targets, the deployed head included.", least=0, most=1)
    log_interval: int = option(999, "A number is logged when more than this many updates have passed.", least=0)
    save_interval: int = option(
        1_999,
        "A checkpoint is written when more than this many updates have passed, and at the end; two are kept.",
        least=0,
    )


@recipe_options("drop_in_trainer")
@dataclass
class Options(SharedOptions):
    out: str = option(
        "outputs/drop_in_trainer/${now:%Y-%m-%d_%H-%M-%S}",
        "Output directory: csv logs and checkpoints; a used one is refused without resume=true.",
    )
    loss: Loss = option(Loss(), "Options of the loss.")
    trainer: TrainerOptions = option(TrainerOptions(), "TorchRL's Trainer.")
    episodes: int = option(20, "Episodes of the evaluation of anchor and policy.", least=1)


class NothingCollected(BaseCollector):
    """Takes the place of the Trainer's collector with empty batches, so that one frame is one update.

    Args:
        updates: frames in a batch.
    """

    init_random_frames = 0

    def __init__(self, updates: int) -> None:
        super().__init__()
        self.batch = TensorDict(batch_size=[updates])

    def iterator(self) -> Iterator[TensorDictBase]:
        while True:
            yield self.batch

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        return seed

    def shutdown(self, *args: Any, **kwargs: Any) -> None: ...

    def update_policy_weights_(self, *args: Any, **kwargs: Any) -> None: ...

    def state_dict(self) -> Any:
        return {}

    def load_state_dict(self, state_dict: Any) -> None: ...


class DetachedStepper(DefaultOptimizationStepper):
    """TorchRL's Trainer without its leak: it keeps the graph of every logged loss (49 MB in 1,000 tiny updates)."""

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        return super().step(trainer, sub_batch).detach()


class TargetRenewal:
    """Renews the critics' targets in the data: a hook of the Trainer before each round."""

    def __init__(self, loss: SPARLoss, replay_buffer: ReplayBuffer) -> None:
        self.loss, self.replay_buffer = loss, replay_buffer

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        with_value_targets(self.loss, self.replay_buffer)
        return batch


def rotation(out: Path) -> CheckpointRotation:
    return CheckpointRotation(out / "checkpoints", keep_last=2)


def make_trainer(
    loss: SPARLoss,
    replay_buffer: ReplayBuffer,
    cfg: DictConfig,
    out: Path,
    saved: Path | None = None,
    rows: SameRows | None = None,
    episode_share: float = 0.5,
) -> Trainer:
    """TorchRL's Trainer on a data set; its csv logs and checkpoints lie in `out`.

    Args:
        loss: to be trained.
        replay_buffer: the data; the critics' targets are renewed before each round.
        cfg: the options `trainer`.
        out: the directory.
        saved: the checkpoint to resume from.
        rows: what the data must still hold then.
        episode_share: of the episodes, what each critic learns from.
    """
    optimizer = torch.optim.Adam(loss.parameters(), lr=cfg.lr)
    trainer = Trainer(
        collector=NothingCollected(cfg.round),
        total_frames=cfg.updates,
        frame_skip=1,
        optim_steps_per_batch=cfg.round,
        loss_module=loss,
        optimizer=optimizer,
        optimization_stepper=DetachedStepper(),
        logger=CSVLogger("log", str(out)),
        log_interval=cfg.log_interval,
        checkpoint=Checkpoint(rng=GlobalRNGState(), **({} if rows is None else {"rows": rows})),
        checkpoint_rotation=rotation(out),
        save_trainer_interval=cfg.save_interval,
    )
    trainer.register_op("post_optim", TargetNetUpdaterHook(SoftUpdate(loss, tau=cfg.target_rate)))
    LRSchedulerHook(CosineAnnealingLR(optimizer, cfg.updates), interval="optim").register(trainer)
    trainer.register_op("post_optim_complete_log", show)
    if saved:
        try:
            trainer.load_from_file(saved)
        except CheckpointError as err:
            if isinstance(err.__cause__, InputError):  # of other rows
                raise err.__cause__ from None
            raise InputError(f"out={out}: its checkpoint cannot be loaded, remove it: {err}") from None
        cut_logs(out, trainer.collected_frames)
    # Now, since they are asked of the loss as it was saved.
    replay_buffer = with_anchor_actions(loss, replay_buffer)
    if has_trajectories(loss, replay_buffer):
        seed = torch.initial_seed()
        replay_buffer = with_member_weights(loss, replay_buffer, share=episode_share, seed=seed)
        replay_buffer = with_value_targets(loss, replay_buffer)
        trainer.register_op("pre_epoch", TargetRenewal(loss, replay_buffer))
    # Not registered as a module: the data set would be in every checkpoint.
    trainer.register_op("process_optim_batch", ReplayBufferTrainer(replay_buffer).sample)
    return trainer


def cut_logs(out: Path, updates: int) -> None:
    """Takes out of the logs what was written after the checkpoint: it is written again."""
    for path in (out / "log" / "scalars").glob("*.csv"):
        lines = [line for line in path.read_text().splitlines(True) if int(line.partition(",")[0]) <= updates]
        write_text(path, "".join(lines))


def show(steps: int, losses: TensorDictBase) -> dict[str, Any]:
    """Puts two means of a round beside the progress bar."""
    return {"log_pbar": True, **{name: losses[name].item() for name in ("pred_value", "residual_ratio")}}


def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    updates, out = cfg.trainer.updates, Path(cfg.out)
    if not 1 <= cfg.trainer.round <= updates or updates % cfg.trainer.round:
        raise InputError(f"trainer.updates={updates}: must be a multiple of trainer.round={cfg.trainer.round}")
    if cfg.resume:
        check_options(out, cfg)
    else:
        check_unused(out)
    with claim(out, wait=False):
        train(cfg, out)


def train(cfg: DictConfig, out: Path) -> None:
    data, env, env_kwargs = load(cfg, best_device(cfg.device))
    loss = make_spar_loss(data, **cfg.loss)  # a wrong option ends here, not after the anchor
    save_config(out, cfg)
    torch.manual_seed(cfg.seed)
    saved = rotation(out).latest()
    if saved is None:
        phases = {name: cfg[name] for name in ("anchor", "vae", "critics")}
        bars = {name: Phase(name, phase.steps, [], phase.steps, 0) for name, phase in phases.items()}
        loss, _ = pretrain(data, **phases, report=bars.get, episode_share=cfg.episode_share, **cfg.loss)
    same = SameRows(dataset_name(cfg), data)
    trainer = make_trainer(loss, data, cfg.trainer, out, saved, same, cfg.episode_share)
    if saved is None:
        trainer.save_trainer(force_save=True)
    if trainer.collected_frames < cfg.trainer.updates:
        trainer.train()
    facts = {"env": env, "env_kwargs": env_kwargs, "dataset": dataset_name(cfg), "seed": cfg.seed}
    save_policy(loss, out / "policy.pt", **facts, log=log_options(cfg))
    for name, policy in (("anchor", loss.anchor), ("spar", loss.actor)):
        returns = evaluate(policy, env, cfg.episodes, RESULT_SEED + 100_000 * cfg.seed, **env_kwargs)
        row = summarize(env, returns, env_kwargs)
        print(f"{name}: {describe(row, cfg.episodes, step_limit_of(env, env_kwargs))}")


if __name__ == "__main__":
    run_recipe(main, "drop_in_trainer")
