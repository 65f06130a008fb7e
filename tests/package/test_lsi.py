"""Latent Self-Imitation on a known manifold: the closed form, and what a value gradient does there."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded

from torchrl_spar import ResidualHead, ResidualVAE, SPARActor, SPARLoss

D, M, STATES = 8, 2, 4096
SIGMA, TEMPERATURE, CANDIDATES = 0.3, 2.0, 256
STATE = ["observation", "anchor_action"]


class Linear(nn.Module):
    """A network that looks at its last input alone."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, *inputs):
        return inputs[-1] @ self.weight.T


class Encoder(Linear):
    def forward(self, *inputs):
        loc = super().forward(*inputs)
        return loc, torch.zeros_like(loc)


class Head(nn.Module):
    """The residual under test, whatever the state."""

    def __init__(self, residual):
        super().__init__()
        self.residual = nn.Parameter(residual)

    def forward(self, observation, anchor_action):
        return self.residual.expand_as(anchor_action)


@pytest.fixture
def world():
    """Data on a plane in D dimensions; a linear Q whose slope points off the plane, mostly."""
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))
    tangent, normal = basis[:, :M], basis[:, M:]
    plane = tangent @ torch.randn(M, M, dtype=torch.float64)
    slope = tangent @ torch.randn(M, dtype=torch.float64) + 5.0 * normal.mean(1) * (D - M)
    return plane, normal, slope


def make_loss(decoder, slope, candidates="policy", residual=0.2):
    anchor = TensorDictModule(lambda s: torch.zeros(*s.shape[:-1], D, dtype=s.dtype), ["observation"], ["action"])
    encode = TensorDictModule(
        Encoder(torch.linalg.pinv(decoder)), [*STATE, "residual"], ["latent_loc", "latent_log_std"]
    )
    decode = TensorDictModule(Linear(decoder), [*STATE, "latent"], ["residual"])
    head = ResidualHead(
        Head(decoder @ torch.full((decoder.shape[1],), residual, dtype=torch.float64)), STATE, ["residual"]
    )
    bounds = torch.full((D,), 100.0, dtype=torch.float64)
    actor = SPARActor(anchor, head, action_spec=Bounded(-bounds, bounds, (D,), dtype=torch.float64))
    critic = TensorDictModule(Linear(slope[None]), ["observation", "action"], ["state_action_value"])
    return SPARLoss(
        actor, [critic], ResidualVAE(encode, decode), num_qvalue_nets=1, candidates=candidates, latent_std=SIGMA,
        latent_bound=100.0, temperature=TEMPERATURE, num_candidates=CANDIDATES,
    )  # fmt: skip


def mean_target(loss):
    """The imitation target, averaged over states, and the policy's residual."""
    torch.manual_seed(1)
    state = TensorDict({"observation": torch.zeros(STATES, 1).double()}, [STATES])
    state["anchor_action"] = torch.zeros(STATES, D).double()
    residual = loss.actor_network.head(state.copy())["residual"].detach()
    target, _ = loss.self_imitation_target(state, residual)
    return target.mean(0), residual[0]


def mean_move(loss):
    """How far the imitation target lies from the policy's residual."""
    target, residual = mean_target(loss)
    return target - residual


def normal_share(move, normal):
    return ((normal.T @ move).norm() / move.norm()).item()


def test_target_moves_along_the_manifold_by_the_closed_form(world):
    plane, normal, slope = world
    move = mean_move(make_loss(plane, slope))
    # Tilting N(z0, sigma^2) by exp(Q / (tau S)) shifts it by sigma^2 / (tau S) dQ/dz, with S = std of Q.
    scale = SIGMA * (plane.T @ slope).norm()
    expected = SIGMA**2 / (TEMPERATURE * scale) * plane @ plane.T @ slope
    assert (move - expected).norm() / expected.norm() < 0.03
    assert normal_share(move, normal) < 1e-12


def test_the_latent_removes_the_drift_not_the_regression(world):
    plane, normal, slope = world
    # The value gradient, by autograd of the same critic.
    loss = make_loss(plane, slope)
    action = torch.zeros(1, D, dtype=torch.float64, requires_grad=True)
    loss.qvalue_network(observation=torch.zeros(1, 1).double(), action=action).sum().backward()
    assert normal_share(action.grad[0], normal) > 0.9
    # The same weighted regression with candidates in action space: an identity for a decoder.
    in_action_space = make_loss(torch.eye(D, dtype=torch.float64), slope)
    assert normal_share(mean_move(in_action_space), normal) > 0.9


def test_candidates_of_the_prior_forget_where_the_policy_is(world):
    plane, normal, slope = world
    for residual in (0.0, 0.05):
        target, _ = mean_target(make_loss(plane, slope, "prior", residual))
        # The tilted prior, from the origin; the policy's own candidate has a weight of about 1 / K.
        scale = SIGMA * (plane.T @ slope).norm()
        expected = SIGMA**2 / (TEMPERATURE * scale) * plane @ plane.T @ slope
        assert (target - expected).norm() / expected.norm() < 0.04
        assert normal_share(target, normal) < 1e-12


def test_flat_values_leave_the_policy_where_it_is(world):
    plane, _, slope = world
    loss = make_loss(plane, 0 * slope)
    move = mean_move(loss)
    # Uniform weights: the mean of K draws, of which the first is the policy's own.
    noise = SIGMA / (CANDIDATES * STATES) ** 0.5
    assert move.norm() < 5 * noise * plane.norm()
