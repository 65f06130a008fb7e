"""TorchRL's IQL trainer from TorchRL's structured configs, with SPAR as a choice of its loss group.

python recipes/iql_trainer.py                # TorchRL's IQLLoss
python recipes/iql_trainer.py loss=spar      # SPARLoss

It shows what is to be written in such a YAML (config/iql_trainer.yaml, config/models/) and trains for seconds; the
anchor is not cloned before, so the policy is no better for it. The whole method: drop_in_trainer.py, spar_d4rl.py.
"""

from __future__ import annotations

import torch
from harness.launch import run_recipe
from harness.options import help_of_loss
from harness.spar_options import Loss
from hydra.utils import instantiate
from omegaconf import DictConfig

from torchrl_spar.configs import register_configs


def main(cfg: DictConfig) -> None:
    torch.manual_seed(cfg.trainer.seed)  # of the networks; the trainer seeds what comes after
    trainer = instantiate(cfg.trainer)
    trainer.train()
    print(f"{type(trainer.loss_module).__name__}: {trainer.collected_frames} frames")


if __name__ == "__main__":
    register_configs()
    run_recipe(main, "iql_trainer", more_help=f"Options of loss=spar:\n{help_of_loss(Loss)}")
