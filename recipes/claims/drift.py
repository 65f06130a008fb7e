"""Claim 1, manifold-normal drift: does an update leave the manifold of the data's actions, where Q rises off it?

Known manifolds, analytic critics, and every method on the same head, optimiser and starting point. The self-imitation
targets are `SPARLoss.self_imitation_target`'s and the losses `SPARLoss.actor_loss`'s: the package's own code.

python recipes/claim.py drift
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness.options import option, recipe_options
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import MLP

from claims.claim_tools import finding, grade
from claims.drift_figure import draw  # noqa: F401  # claim.py takes it from here
from claims.drift_methods import (
    AWR,
    DPG,
    IN_ACTIONS,
    LATENT_HEADS,
    LSI_A,
    LSI_B,
    METHODS,
    ON_MANIFOLD,
    SHIPPED,
    TD3BC,
    THROUGH,
    FreeOutputs,
    make_method,
    same_reach,
)
from claims.manifolds import (
    MANIFOLDS,
    Critic,
    LinearCritic,
    Manifold,
    affine,
    draw_batch,
    make_actor,
    make_loss,
    make_vae,
    utility,
)
from torchrl_spar import normal_share

# Candidates from which the closed form is asked for.
MANY = 256


@dataclass
class ClosedForm:
    """An affine manifold, a linear Q."""

    states: int = option(2048, "States.", least=1)
    candidates: list[int] = option([8, 32, 128, 256, 512], "Numbers of candidates.", least=2)
    temperatures: list[float] = option([0.3, 1.0, 2.0], "Temperatures.", above=0)
    latent_std: float = option(0.3, "Spread of the candidates.", above=0)


@dataclass
class FirstUpdate:
    """From points on the manifold, and the curvature bias of its target."""

    states: int = option(1024, "States.", least=1)
    latent_stds: list[float] = option([0.0625, 0.125, 0.25, 0.5], "Spreads of the candidates.", above=0)


@dataclass
class Train:
    """Training of a small network with every method."""

    steps: int = option(400, "Gradient steps.", least=0)
    batch_size: int = option(128, "States in a batch.", least=1)
    lr: float = option(3e-3, "Learning rate.", least=0)
    hidden: list[int] = option([32], "Widths of the hidden layers.", least=1)
    interval: int = option(25, "Steps between two points of the curves.", least=1)


@dataclass
class Noisy:
    """The same training with noisy critics, for the methods that stay near the manifold."""

    draws: int = option(3, "Independent draws of the critics' noise.", least=1)
    num_qvalue_nets: int = option(4, "Critics, each with noise of its own.", least=1)
    std: float = option(0.3, "Standard deviation of a critic's noise over actions.", least=0)
    frequency: float = option(6.0, "That of its wave vectors; the slope of the noise is the product of both.", least=0)


@dataclass
class LSI:
    """Latent Self-Imitation as a step from where the policy is; "as shipped" draws its candidates from the prior."""

    num_candidates: int = option(8, "Candidates.", least=2)
    candidates: str = option("policy", "Their centre.", choices=("policy", "prior"))
    latent_std: float = option(0.5, "Their spread.", above=0)
    temperature: float = option(0.3, "Temperature of their weights.", above=0)


@recipe_options("claims/drift")
@dataclass
class Options:
    out: str = option("outputs/claims/drift", "Output directory; a used one is refused.")
    seed: int = option(0, "Seed of networks, states and candidates; the critics' noise has seeds of its own.", least=0)
    threads: int = option(1, "Torch threads (one is fastest for small networks).", least=1)
    spread: float = option(0.5, "Standard deviation of the behaviour's latents.", least=0)
    steepness: float = option(5.0, "Slope of Q off the manifold; along it, it is |goal - latent|, about 1.")
    closed_form: ClosedForm = option(ClosedForm(), "The closed form.")
    first_update: FirstUpdate = option(FirstUpdate(), "The first update.")
    train: Train = option(Train(), "The training.")
    noisy: Noisy = option(Noisy(), "Noisy critics.")
    lsi: LSI = option(LSI(), "Latent Self-Imitation.")


def closed_form(cfg: DictConfig, steepness: float) -> dict[str, Any]:
    """On a plane with a linear Q: the target's move over ``sigma^2 / (tau S) W W^T grad Q``, S the spread of Q."""
    manifold, sigma = affine(), cfg.latent_std
    origin = manifold.origin
    plane = manifold.tangent(torch.zeros(1, manifold.latent_dim, dtype=torch.float64))[0]
    _, normal_slope = torch.autograd.functional.vjp(manifold.defect, origin)
    slope = plane @ torch.tensor([1.0, -1.0], dtype=torch.float64) + steepness * normal_slope
    state = TensorDict({"observation": torch.zeros(cfg.states, 1, dtype=torch.float64)}, [cfg.states])
    state["anchor_action"] = origin.expand(cfg.states, -1)
    residual = torch.zeros(cfg.states, origin.numel(), dtype=torch.float64)

    def moves(vae_of: Manifold | None, std: float, temperature: float, candidates: int) -> Tensor:
        vae = make_vae(vae_of)
        actor = make_actor(manifold, nn.Linear(1, origin.numel(), dtype=torch.float64))
        loss = make_loss(
            actor, [LinearCritic(slope)], vae,
            candidates="policy", latent_std=std, latent_bound=100.0, temperature=temperature, num_candidates=candidates,
        )  # fmt: skip
        return loss.self_imitation_target(state, residual)[0] - residual

    rows = []
    for temperature in cfg.temperatures:
        for candidates in cfg.candidates:
            move = moves(manifold, sigma, temperature, candidates)
            # The loss divides the advantages by S, here the standard deviation of Q over the candidates.
            scale = sigma * (plane.T @ slope).norm()
            expected = sigma**2 / (temperature * scale) * plane @ (plane.T @ slope)
            mean = move.mean(0)
            in_actions = moves(None, sigma * same_reach(manifold), temperature, candidates).mean(0)
            rows.append({
                "temperature": temperature, "candidates": candidates,
                "ratio": ((mean @ expected) / expected.pow(2).sum()).item(),
                "relative_error": ((mean - expected).norm() / expected.norm()).item(),
                "normal_share": normal_share(move, plane).item(),
                "normal_share_action_space": normal_share(in_actions, plane).item(),
            })  # fmt: skip
    return {"rows": rows, "normal_share_value_gradient": normal_share(slope, plane).item()}


def first_update(manifold: Manifold, cfg: DictConfig, lsi: dict[str, Any]) -> dict[str, float]:
    """The share of each method's update that is normal to the manifold, from points on it."""
    batch = draw_batch(manifold, cfg.first_update.states, cfg.spread)
    latent = cfg.spread * torch.randn(cfg.first_update.states, manifold.latent_dim, dtype=torch.float64)
    tangent = manifold.tangent(latent)
    shares = {}
    for name in METHODS:
        start = latent if name in LATENT_HEADS else manifold.decode(latent) - manifold.origin
        tables: list[FreeOutputs] = []

        def table(size: int, start: Tensor = start, tables: list[FreeOutputs] = tables) -> nn.Module:
            tables.append(FreeOutputs(start.clone()))
            return tables[-1]

        _, objective = make_method(name, manifold, [Critic(manifold, cfg.steepness)], table, lsi)
        (gradient,) = torch.autograd.grad(objective(batch), [tables[0].outputs])
        move = -gradient
        if name in LATENT_HEADS:
            move = (tangent @ move.unsqueeze(-1)).squeeze(-1)
        shares[name] = normal_share(move, tangent).item()
    return shares


def curvature_bias(manifold: Manifold, cfg: DictConfig, lsi: dict[str, Any]) -> list[dict[str, float]]:
    """Mean distance of the target to the manifold, from points on it: averaged residuals (A), averaged latents (B)."""
    batch = draw_batch(manifold, cfg.first_update.states, cfg.spread)
    latent = cfg.spread * torch.randn(cfg.first_update.states, manifold.latent_dim, dtype=torch.float64)
    state = batch.select("observation")
    state["anchor_action"] = manifold.origin.expand(cfg.first_update.states, -1)
    residual = manifold.decode(latent) - manifold.origin
    flat = LinearCritic(torch.zeros_like(manifold.origin))
    rows = []
    for sigma in cfg.first_update.latent_stds:
        row = {"latent_std": sigma, "expected": sigma**2 / 2}
        for label, critic in (("flat", flat), ("steep", Critic(manifold, cfg.steepness))):
            actor = make_actor(manifold, nn.Linear(1, manifold.origin.numel(), dtype=torch.float64))
            # Many candidates where the expectation is meant, the package's number where its own step is.
            count = 128 if label == "flat" else lsi["num_candidates"]
            options = {**lsi, "latent_std": sigma, "latent_bound": 10.0, "num_candidates": count}
            loss = make_loss(actor, [critic], make_vae(manifold), **options)
            averaged = loss.self_imitation_target(state, residual)[0] + manifold.origin
            decoded = manifold.decode(loss.self_imitation_target(state, residual, latent)[0])
            row[f"head_a_{label}"] = manifold.distance(averaged).mean().item()
            row[f"head_b_{label}"] = manifold.distance(decoded).mean().item()
        rows.append(row)
    return rows


def train(name: str, manifold: Manifold, critics: Sequence[nn.Module], cfg: DictConfig, lsi: dict[str, Any]) -> dict:
    """Distance to the manifold and regret along it, over training; means over states."""
    torch.manual_seed(cfg.seed)

    def network(size: int) -> nn.Module:
        return MLP(1, size, num_cells=list(cfg.train.hidden), activation_class=nn.Tanh).double()

    actor, objective = make_method(name, manifold, critics, network, lsi)
    optimizer = torch.optim.Adam(actor.head.parameters(), cfg.train.lr)
    states = torch.linspace(-1, 1, 101, dtype=torch.float64).unsqueeze(-1)
    curve: dict[str, list[float]] = {"step": [], "distance": [], "regret": []}
    for step in range(cfg.train.steps + 1):
        if step % cfg.train.interval == 0:
            with torch.no_grad():
                action = actor(TensorDict({"observation": states}, [len(states)]))["action"]
                regret = -utility(manifold, states, manifold.project(action))
            curve["step"].append(step)
            curve["distance"].append(manifold.distance(action).mean().item())
            curve["regret"].append(regret.mean().item())
        loss = objective(draw_batch(manifold, cfg.train.batch_size, cfg.spread))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return curve


def without_noise(name: str, manifold: Manifold, cfg: DictConfig, lsi: dict[str, Any]) -> dict[str, list[float]]:
    """The curve with the exact critic."""
    return train(name, manifold, [Critic(manifold, cfg.steepness)], cfg, lsi)


def with_noise(name: str, manifold: Manifold, cfg: DictConfig, lsi: dict[str, Any]) -> dict[str, list[float]]:
    """Final distance and regret, one each for every draw of the critics' noise."""
    final: dict[str, list[float]] = {"distance": [], "regret": []}
    for index in range(cfg.noisy.draws):
        seeds = range(1 + cfg.noisy.num_qvalue_nets * index, 1 + cfg.noisy.num_qvalue_nets * (index + 1))
        critics = [Critic(manifold, cfg.steepness, cfg.noisy.std, cfg.noisy.frequency, seed) for seed in seeds]
        curve = train(name, manifold, critics, cfg, lsi)
        for quantity, values in final.items():
            values.append(curve[quantity][-1])
    return final


def measure(cfg: DictConfig) -> dict[str, Any]:
    torch.manual_seed(cfg.seed)
    lsi = dict(cfg.lsi)
    manifolds = [make() for make in MANIFOLDS]
    result: dict[str, Any] = {
        "closed_form": closed_form(cfg.closed_form, cfg.steepness),
        "first_update_normal_share": {m.name: first_update(m, cfg, lsi) for m in manifolds},
        "curvature_bias": {m.name: curvature_bias(m, cfg, lsi) for m in manifolds},
        "training": {m.name: {name: without_noise(name, m, cfg, lsi) for name in METHODS} for m in manifolds},
        "noisy": {m.name: {name: with_noise(name, m, cfg, lsi) for name in ON_MANIFOLD} for m in manifolds},
    }
    return {"findings": verdict(result, cfg), **result}


def verdict(result: dict[str, Any], cfg: DictConfig) -> list[dict[str, Any]]:
    """What holds exactly, what approximately, what does not."""
    closed, update = result["closed_form"], result["first_update_normal_share"]
    curved = [name for name in update if name != "affine"]
    warm = [row for row in closed["rows"] if row["candidates"] >= MANY and row["temperature"] >= 1]
    sharp = min(closed["rows"], key=lambda row: (row["temperature"], row["candidates"]))
    normal = max(row["normal_share"] for row in closed["rows"])
    error = max((row["relative_error"] for row in warm), default=float("nan"))

    def trained(name: str, quantity: str = "distance") -> dict[str, float]:
        return {m: result["training"][m][name][quantity][-1] for m in update}

    def noisy(name: str) -> dict[str, float]:
        return {m: float(torch.tensor(result["noisy"][m][name]["regret"]).mean()) for m in update}

    bias = {m: rows[-1]["head_a_flat"] / rows[-1]["expected"] for m, rows in result["curvature_bias"].items()}
    small = {m: rows[0]["head_a_flat"] / rows[0]["expected"] for m, rows in result["curvature_bias"].items()}
    every = [row for rows in result["curvature_bias"].values() for row in rows]
    latent_bias = max(value for row in every for name, value in row.items() if "head_b" in name)
    return [
        finding("affine: the LSI target moves along the manifold alone", grade(normal, 1e-3), normal_share=normal),
        finding(
            f"affine, linear Q, tau >= 1, K >= {MANY}: the move is sigma^2 / (tau S) W W^T grad Q",
            grade(error, 0.05), relative_error=error,
        ),
        finding(
            "the same at the package's tau and K: the softmax saturates, only the direction is left",
            grade(abs(1 - sharp["ratio"]), 0.05), temperature=sharp["temperature"], candidates=sharp["candidates"],
            ratio_of_move=sharp["ratio"],
        ),
        finding(
            "affine: the raw value gradient points off the manifold (share > 0.9)",
            closed["normal_share_value_gradient"] > 0.9, normal_share=closed["normal_share_value_gradient"],
        ),
        finding(
            "affine: so do action-space candidates (share > 0.9): the latent removes the drift, not the regression",
            min(row["normal_share_action_space"] for row in closed["rows"]) > 0.9,
            smallest_normal_share=min(row["normal_share_action_space"] for row in closed["rows"]),
        ),
        finding(
            "curved: head A's update is free of a normal part",
            grade(max(update[m][LSI_A] for m in curved), 0.05), normal_share={m: update[m][LSI_A] for m in curved},
        ),
        finding(
            "curved: head B's update is free of a normal part", grade(max(update[m][LSI_B] for m in curved), 0.05),
            normal_share={m: update[m][LSI_B] for m in curved},
        ),
        finding(
            "curved: averaging residuals (head A, flat Q) leaves the manifold by sigma^2 / 2",
            grade(max(abs(1 - small[m]) for m in curved), 0.15),
            ratio_at_smallest_sigma=small, ratio_at_largest_sigma=bias,
        ),
        finding("averaging latents (head B) leaves no bias", grade(latent_bias, 1e-3), distance=latent_bias),
        finding(
            "trained: head A stays on the manifold", grade(max(trained(LSI_A).values()), 0.05),
            distance=trained(LSI_A),
        ),
        finding(
            "trained: head B stays on the manifold", grade(max(trained(LSI_B).values()), 0.05),
            distance=trained(LSI_B),
        ),
        finding(
            "trained: SPAR as shipped stays on the manifold (the trust term averages data, as AWR does)",
            grade(max(trained(SHIPPED).values()), 0.05),
            distance=trained(SHIPPED), distance_awr=trained(AWR),
        ),
        finding(
            "trained: the value gradient, TD3+BC and action-space candidates leave it by more than 0.3",
            min(min(trained(name).values()) for name in (DPG, TD3BC, IN_ACTIONS)) > 0.3,
            **{name: trained(name) for name in (DPG, TD3BC, IN_ACTIONS)},
        ),
        finding(
            "a value gradient through an exact decoder leaves it, too",
            max(trained(THROUGH).values()) > 0.05,
            distance=trained(THROUGH),
        ),
        finding(
            "exact critics: LSI (head B) and the gradient through the decoder end within 0.02 of the best value",
            max(*trained(LSI_B, "regret").values(), *trained(THROUGH, "regret").values()) < 0.02,
            regret_head_b=trained(LSI_B, "regret"), regret_through_decoder=trained(THROUGH, "regret"),
        ),
        finding(
            "noisy critics: LSI (head B) ends with less regret than the gradient through the decoder",
            all(noisy(LSI_B)[m] < noisy(THROUGH)[m] for m in update),
            regret_head_a=noisy(LSI_A), regret_head_b=noisy(LSI_B), regret_through_decoder=noisy(THROUGH),
        ),
    ]  # fmt: skip
