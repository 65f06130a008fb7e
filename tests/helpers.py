"""What tests share: small losses, random batches, one torch thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.data import Bounded

from torchrl_spar import SPARLoss, make_spar_loss

OBSERVATION, ACTION = 5, 3
SHARED = Path(__file__).resolve().parents[2] / "shared" / "datasets"

torch.set_num_threads(1)


def make_batch(*batch: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> TensorDict:
    """A random TED batch; every third position is terminated, every fifth truncated."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=dtype)

    index = torch.arange(torch.Size(batch).numel()).view(*batch, 1)
    terminated, truncated = index % 3 == 0, index % 5 == 0
    return TensorDict(
        {
            "observation": randn(OBSERVATION),
            "action": randn(ACTION).tanh(),
            "next": {
                "observation": randn(OBSERVATION),
                "reward": randn(1),
                "terminated": terminated,
                "truncated": truncated,
                "done": terminated | truncated,
            },
        },
        batch,
    )


def build_loss(seed: int = 0, **options: Any) -> SPARLoss:
    """A small loss whose head, targets and scale are away from their start."""
    torch.manual_seed(seed)
    options = {"hidden": [16, 16], "with_value": True, **options}
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), **options)
    loss.residual_scale = torch.tensor([0.3, 0.5, 0.8])
    generator = torch.Generator().manual_seed(seed + 1)
    for name in ("actor_network_params", "target_actor_network_params", "target_qvalue_network_params"):
        for key, tensor in loss._modules[name].items(True, True):
            if key[-1] in ("weight", "bias") and "anchor" not in key:
                tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    return loss


def total(losses: TensorDict) -> torch.Tensor:
    """The sum that one optimiser minimises."""
    return sum(value for key, value in losses.items() if key.startswith("loss_"))


def compose_recipe(name: str, *overrides: str) -> Any:
    """A recipe's configuration, without starting the recipe."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "recipes" / "config"), version_base=None):
        return compose(name, list(overrides))
