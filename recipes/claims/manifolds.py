"""Manifolds of actions in closed form, analytic critics that rise off them, and the losses on both.

The behaviour's actions are ``g(z)``, ``z ~ N(0, spread^2)``. The anchor plays ``g(0)`` everywhere and ``rho = 1``, so
the residuals' manifold is the actions' one, moved by a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.func import jacfwd, jvp, vmap
from torchrl.data import Bounded

from torchrl_spar import ResidualHead, ResidualVAE, SPARActor, SPARLoss

STATE = ["observation", "anchor_action"]
ACTION_BOUND = 3.0
GRID = torch.linspace(-4, 4, 161, dtype=torch.float64).unsqueeze(-1)
NEWTON_STEPS = 8


@dataclass(frozen=True)
class Manifold:
    """An embedded manifold ``g(z)``.

    Attributes:
        decode: ``g``: ``[*B, m]`` to ``[*B, d]``.
        chart: smooth coordinates near the manifold, the inverse of ``g`` on it.
        defect: zero on the manifold, rising off it with a slope of one.
    """

    name: str
    latent_dim: int
    decode: Callable[[Tensor], Tensor]
    chart: Callable[[Tensor], Tensor]
    defect: Callable[[Tensor], Tensor]

    @property
    def origin(self) -> Tensor:
        """The anchor's action ``g(0)``, ``[d]``."""
        return self.decode(torch.zeros(self.latent_dim, dtype=torch.float64))

    def tangent(self, latent: Tensor) -> Tensor:
        """The Jacobian of ``g``, ``[B, d, m]``."""
        return vmap(jacfwd(self.decode))(latent)

    def project(self, action: Tensor) -> Tensor:
        """The latent of the nearest point, ``[*B, m]``."""
        if self.latent_dim > 1:
            return self.chart(action)  # affine: the chart is the projection
        rows = action.reshape(-1, action.shape[-1])
        latent = GRID[torch.cdist(rows, self.decode(GRID)).argmin(-1)]
        for _ in range(NEWTON_STEPS):  # Gauss and Newton, from the nearest point of the grid
            point, tangent = jvp(self.decode, (latent,), (torch.ones_like(latent),))[:2]
            step = ((rows - point) * tangent).sum(-1, True) / tangent.pow(2).sum(-1, True)
            latent = (latent + step).clamp(GRID[0], GRID[-1])
        return latent.view(*action.shape[:-1], 1)

    def distance(self, action: Tensor) -> Tensor:
        """Euclidean distance to the manifold, ``[*B]``."""
        return (action - self.decode(self.project(action))).norm(dim=-1)


def affine(seed: int = 0, dim: int = 8, latent_dim: int = 2) -> Manifold:
    """A plane in general position; its columns are neither orthogonal nor of unit length."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis, _ = torch.linalg.qr(randn(dim, dim))
    plane = basis[:, :latent_dim] @ (torch.eye(latent_dim, dtype=torch.float64) + 0.3 * randn(latent_dim, latent_dim))
    offset, normal, inverse = 0.3 * basis[:, -1], basis[:, latent_dim:].mean(1), torch.linalg.pinv(plane)
    normal = normal / normal.norm()
    return Manifold(
        "affine",
        latent_dim,
        decode=lambda z: z @ plane.T + offset,
        chart=lambda a: (a - offset) @ inverse.T,
        defect=lambda a: (a - offset) @ normal,
    )


def circle() -> Manifold:
    return Manifold(
        "circle",
        1,
        decode=lambda z: torch.cat((z.cos(), z.sin()), -1),
        chart=lambda a: torch.atan2(a[..., 1:], a[..., :1]),
        defect=lambda a: a.norm(dim=-1) - 1,
    )


def parabola() -> Manifold:
    return Manifold(
        "parabola",
        1,
        decode=lambda z: torch.cat((z, z.pow(2) / 2), -1),
        chart=lambda a: a[..., :1],
        defect=lambda a: (a[..., 1] - a[..., 0].pow(2) / 2) / (1 + a[..., 0].pow(2)).sqrt(),
    )


def helix(pitch: float = 0.5) -> Manifold:
    return Manifold(
        "helix",
        1,
        decode=lambda z: torch.cat((z.cos(), z.sin(), pitch * z), -1),
        chart=lambda a: a[..., 2:] / pitch,
        defect=lambda a: a[..., 0] * (a[..., 2] / pitch).cos() + a[..., 1] * (a[..., 2] / pitch).sin() - 1,
    )


MANIFOLDS: tuple[Callable[[], Manifold], ...] = (affine, circle, parabola, helix)


class Critic(nn.Module):
    """``Q(s, a) = -|chart(a) - goal(s)|^2 / 2 + steepness * defect(a)``, plus smooth noise of its own.

    Args:
        manifold: the manifold.
        steepness: slope off it.
        noise: standard deviation of the noise over actions; its slope's is ``noise * frequency`` in each dimension.
        frequency: standard deviation of its wave vectors.
        seed: of the noise.
    """

    WAVES = 16
    directions: Tensor
    phases: Tensor

    def __init__(
        self, manifold: Manifold, steepness: float, noise: float = 0.0, frequency: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.manifold, self.steepness, self.noise = manifold, steepness, noise
        generator = torch.Generator().manual_seed(seed)
        shape = (self.WAVES, manifold.origin.numel())
        self.register_buffer("directions", frequency * torch.randn(shape, generator=generator, dtype=torch.float64))
        phases = 2 * math.pi * torch.rand(self.WAVES, generator=generator, dtype=torch.float64)
        self.register_buffer("phases", phases)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        value = utility(self.manifold, observation, self.manifold.chart(action))
        value = value + self.steepness * self.manifold.defect(action)
        if self.noise:
            waves = (action @ self.directions.T + self.phases).cos().sum(-1)
            value = value + self.noise * (2 / self.WAVES) ** 0.5 * waves
        return value.unsqueeze(-1)


def goal(manifold: Manifold, observation: Tensor) -> Tensor:
    """The best latent of a state in [-1, 1], ``[*B, m]``."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)[: manifold.latent_dim]
    return observation * signs


def utility(manifold: Manifold, observation: Tensor, latent: Tensor) -> Tensor:
    """What there is to gain along the manifold: 0 at the goal, negative elsewhere, ``[*B]``."""
    return -(latent - goal(manifold, observation)).pow(2).sum(-1) / 2


def draw_batch(manifold: Manifold, size: int, spread: float) -> TensorDict:
    """States in [-1, 1] and the behaviour's actions."""
    latent = spread * torch.randn(size, manifold.latent_dim, dtype=torch.float64)
    observation = 2 * torch.rand(size, 1, dtype=torch.float64) - 1
    return TensorDict({"observation": observation, "action": manifold.decode(latent)}, [size])


class Encoder(nn.Module):
    """The nearest point's latent, without spread."""

    def __init__(self, project: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.project = project

    def forward(self, observation: Tensor, anchor_action: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.project(anchor_action + residual)
        return latent, torch.zeros_like(latent)


class Decoder(nn.Module):
    """The residual of a latent."""

    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.decode = decode

    def forward(self, observation: Tensor, anchor_action: Tensor, latent: Tensor) -> Tensor:
        return self.decode(latent) - anchor_action


def make_vae(manifold: Manifold | None) -> ResidualVAE:
    """The manifold's own encoder and decoder; without one, the latent is the action itself."""
    project, decode = (manifold.project, manifold.decode) if manifold else (nn.Identity(), nn.Identity())
    return ResidualVAE(
        TensorDictModule(Encoder(project), [*STATE, "residual"], ["latent_loc", "latent_log_std"]),
        TensorDictModule(Decoder(decode), [*STATE, "latent"], ["residual"]),
    )


def make_actor(manifold: Manifold, network: nn.Module, vae: ResidualVAE | None = None) -> SPARActor:
    """The anchor ``g(0)`` and a head on it: a residual's, or with a VAE a latent's (head B)."""
    origin = manifold.origin
    spec = Bounded(-ACTION_BOUND, ACTION_BOUND, origin.shape, dtype=torch.float64)
    anchor = TensorDictModule(lambda s: origin.expand(*s.shape[:-1], -1), ["observation"], ["action"])
    head = ResidualHead(network, ["observation"], ["residual" if vae is None else "latent"], init_scale=0.01)
    return SPARActor(anchor, head, action_spec=spec, decoder=vae.decoder if vae else None)


def make_loss(actor: SPARActor, critics: Sequence[nn.Module], vae: ResidualVAE, **options: Any) -> SPARLoss:
    """The package's loss on analytic networks."""
    networks = [TensorDictModule(critic, ["observation", "action"], ["state_action_value"]) for critic in critics]
    value = TensorDictModule(nn.Linear(1, 1, dtype=torch.float64), ["observation"], ["state_value"])
    return SPARLoss(actor, networks, vae, value, num_qvalue_nets=len(critics), joint_vae=False, **options)


class LinearCritic(nn.Module):
    """``Q(s, a) = slope . a``; flat with a zero slope."""

    slope: Tensor

    def __init__(self, slope: Tensor) -> None:
        super().__init__()
        self.register_buffer("slope", slope)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return (action @ self.slope).unsqueeze(-1)
