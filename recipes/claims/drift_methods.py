"""The methods that claim 1 compares, each as an actor and the loss of its head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.objectives import TD3BCLoss

from claims.manifolds import ACTION_BOUND, Manifold, make_actor, make_loss, make_vae
from torchrl_spar import SPARActor

LSI_A, LSI_B, SHIPPED, AWR = "LSI, head A", "LSI, head B", "SPAR as shipped (A + trust)", "AWR (trust term alone)"
THROUGH, IN_ACTIONS = "gradient through decoder", "action-space candidates"
TD3BC, DPG = "TD3+BC", "value gradient (DPG)"
METHODS = (LSI_A, LSI_B, SHIPPED, AWR, THROUGH, IN_ACTIONS, TD3BC, DPG)
LATENT_HEADS = (LSI_B, THROUGH)
ON_MANIFOLD = (LSI_A, LSI_B, THROUGH)
NetworkOf = Callable[[int], nn.Module]
Objective = Callable[[TensorDict], Tensor]


class FreeOutputs(nn.Module):
    """One free output a state: its gradient is the update that the loss asks of each state."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, observation: Tensor) -> Tensor:
        return self.outputs


def make_method(
    name: str, manifold: Manifold, critics: Sequence[nn.Module], network_of: NetworkOf, lsi: dict[str, Any]
) -> tuple[SPARActor, Objective]:
    """The actor and the loss of its head."""
    vae = make_vae(None if name == IN_ACTIONS else manifold)
    is_latent = name in LATENT_HEADS
    size = manifold.latent_dim if is_latent else manifold.origin.numel()
    actor = make_actor(manifold, network_of(size), vae if is_latent else None)
    if name in (THROUGH, DPG):

        def negative_value(batch: TensorDict) -> Tensor:
            action = actor(batch.select("observation"))["action"]
            return -torch.stack([critic(batch["observation"], action) for critic in critics]).mean()

        return actor, negative_value
    if name == TD3BC:
        networks = [TensorDictModule(critic, ["observation", "action"], ["state_action_value"]) for critic in critics]
        td3bc = TD3BCLoss(
            actor, networks, bounds=(-ACTION_BOUND, ACTION_BOUND), num_qvalue_nets=len(critics),
            delay_actor=False, delay_qvalue=False,
        )  # fmt: skip
        return actor, lambda batch: td3bc.actor_loss(batch)[0]
    options = {**lsi, "lsi_coeff": float(name != AWR), "trust_coeff": float(name in (AWR, SHIPPED))}
    if name == SHIPPED:  # a prior as wide as the behaviour, which a fitted VAE would make 1
        options["candidates"] = "prior"
    if name == IN_ACTIONS:  # candidates as far away, on average, and nothing clamped
        options["latent_std"] *= same_reach(manifold)
        options["latent_bound"] = 10 * ACTION_BOUND
    loss = make_loss(actor, critics, vae, **options)
    return actor, lambda batch: loss.actor_loss(batch)[0]


def same_reach(manifold: Manifold) -> float:
    """The spread per action dimension that moves as far as a spread of one in the latent, at the origin."""
    tangent = manifold.tangent(torch.zeros(1, manifold.latent_dim, dtype=torch.float64))
    return float(tangent.norm()) / manifold.origin.numel() ** 0.5
