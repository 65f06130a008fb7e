"""The claims: each script's measurement run small, and the closed forms that must hold whatever the settings."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import compose_recipe, run
from tensordict import TensorDict
from torch import nn

pytest.importorskip("hydra")
import claim
from claims import (
    bootstrapping,
    drift,
    drift_methods,
    gradient_conflict,
    manifolds,
    search_space,
    small_spar,
    suboptimal_anchors,
    support,
)
from omegaconf import OmegaConf

from torchrl_spar import make_toy_data, pretrain, with_value_targets
from torchrl_spar.networks import ObservationNorm

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("bootstrapping", "drift", "gradient_conflict", "search_space", "suboptimal_anchors", "support")
SHORT = ["anchor.steps=20", "vae.steps=5", "critics.steps=5", "spar.updates=4", "spar.loss.hidden=[8]", "batch_size=32"]
SMALL = {
    "bootstrapping": [*SHORT, "seeds=[0]", "episodes=2", "interval=2", "rows=64"],
    "drift": [
        "closed_form.states=512", "closed_form.candidates=[8, 256]", "closed_form.temperatures=[0.3, 1.0]",
        "first_update.states=64", "train.steps=4", "train.interval=2", "noisy.draws=1",
    ],
    "gradient_conflict": [*SHORT, "seeds=[0]", "rows=64", "interval=2"],
    "search_space": [*SHORT, "seeds=[0]", "rows=64"],
    "suboptimal_anchors": [*SHORT, "shares=[0.1]", "episodes=1"],
    "support": [*SHORT, "seeds=[0]", "rows=32", "density.steps=5"],
}  # fmt: skip


def options(name, overrides=()):
    return compose_recipe(f"claims/{name}", *overrides)


def statement(result, words):
    (row,) = [row for row in result["findings"] if words in row["statement"]]
    return row


# ---------------------------------------------------------------------- the geometry


@pytest.mark.parametrize("make", manifolds.MANIFOLDS)
def test_projection_finds_the_nearest_point(make):
    torch.manual_seed(0)
    manifold = make()
    latent = torch.randn(40, manifold.latent_dim, dtype=torch.float64).clamp(-1.5, 1.5)
    point = manifold.decode(latent)
    torch.testing.assert_close(manifold.project(point), latent)
    torch.testing.assert_close(manifold.chart(point), latent)
    assert manifold.defect(point).abs().max() < 1e-12
    action = point + 0.1 * torch.randn_like(point)
    # At the nearest point, what is left is normal to the manifold.
    nearest = manifold.project(action)
    rest = action - manifold.decode(nearest)
    assert (manifold.tangent(nearest).mT @ rest.unsqueeze(-1)).abs().max() < 1e-4
    others = manifold.decode(nearest + 0.1 * torch.randn(1000, *nearest.shape, dtype=torch.float64))
    assert (manifold.distance(action) <= (action - others).norm(dim=-1) + 1e-8).all()


def target(manifold, critic, states=4096, head="residual", **changes):
    """The package's target for a policy at the origin of the manifold, and the candidates' number and spread."""
    origin = manifold.origin
    actor = manifolds.make_actor(manifold, nn.Linear(1, origin.numel(), dtype=torch.float64))
    setting = {"num_candidates": 16, "candidates": "policy", "latent_std": 0.5, "temperature": 2.0}
    setting |= {"latent_bound": 10.0, **changes}
    loss = manifolds.make_loss(actor, [critic], manifolds.make_vae(manifold), **setting)
    state = TensorDict({"observation": torch.zeros(states, 1, dtype=torch.float64)}, [states])
    state["anchor_action"] = origin.expand(states, -1)
    residual = torch.zeros(states, origin.numel(), dtype=torch.float64)
    latent = torch.zeros(states, manifold.latent_dim, dtype=torch.float64) if head == "latent" else None
    torch.manual_seed(0)
    return loss.self_imitation_target(state, residual, latent)[0]


def test_averaged_residuals_leave_a_circle_by_the_closed_form():
    circle = manifolds.circle()
    flat = manifolds.LinearCritic(torch.zeros(2, dtype=torch.float64))
    # The mean of K points at angles 0 and N(0, sigma^2): E cos = exp(-sigma^2 / 2).
    inward = target(circle, flat).mean(0)
    assert inward[0].item() == pytest.approx(15 / 16 * (math.exp(-(0.5**2) / 2) - 1), rel=0.01)
    averaged = circle.decode(target(circle, flat, head="latent"))
    assert circle.distance(averaged).max() < 1e-12


def test_target_on_a_plane_keeps_to_it_and_follows_the_closed_form():
    plane = manifolds.affine()
    torch.manual_seed(1)
    slope = torch.randn(8, dtype=torch.float64)
    columns = plane.decode(torch.eye(2, dtype=torch.float64)) - plane.origin  # rows of W^T
    move = target(plane, manifolds.LinearCritic(slope), num_candidates=256, latent_std=0.2)
    # Tilting N(0, sigma^2) by exp(Q / (tau S)) with S = sigma |W^T slope| shifts it by sigma / tau along W^T slope.
    shift = 0.2 / 2.0 * torch.nn.functional.normalize(columns @ slope, dim=0)
    expected = shift @ columns
    assert (move.mean(0) - expected).norm() < 0.03 * expected.norm()
    off_plane = torch.linalg.svd(columns).Vh[2:]
    assert (move @ off_plane.T).abs().max() < 1e-12


# ---------------------------------------------------------------------- the measurements


@pytest.fixture(scope="module")
def drift_result():
    return drift.measure(options("drift", SMALL["drift"]))


def test_drift_reports_what_the_method_must_do(drift_result):
    shares = drift_result["first_update_normal_share"]
    assert set(shares) == {"affine", "circle", "parabola", "helix"}
    for share in shares.values():
        assert share[drift_methods.LSI_B] < 1e-12 and share[drift_methods.THROUGH] < 1e-12
        assert share[drift_methods.DPG] > 0.9 and share[drift_methods.TD3BC] > 0.9
    assert shares["affine"][drift_methods.LSI_A] < 1e-12 < 0.05 < shares["circle"][drift_methods.LSI_A]
    assert statement(drift_result, "LSI target moves along")["holds"] == "exactly"
    assert statement(drift_result, "the move is sigma^2")["holds"] == "approximately"
    assert statement(drift_result, "raw value gradient")["holds"] == "yes"
    assert statement(drift_result, "action-space candidates (share")["holds"] == "yes"
    assert statement(drift_result, "averaging latents")["holds"] == "exactly"
    assert statement(drift_result, "averaging residuals")["holds"] == "approximately"
    assert statement(drift_result, "trained: head B")["holds"] == "exactly"


def test_drift_draws_what_it_measured(drift_result, tmp_path):
    drift.draw(drift_result).savefig(tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("module", [bootstrapping, gradient_conflict, search_space, support, suboptimal_anchors])
def test_claims_on_data_run(module, tmp_path):
    name = module.__name__.removeprefix("claims.")
    cfg = options(name, SMALL[name])
    result = module.measure(cfg)
    numbers = [x for x in flatten(result) if isinstance(x, float)]
    assert len(numbers) > 10 and all(map(math.isfinite, numbers))
    assert json.loads(json.dumps(result)) == result
    assert {row["holds"] for row in result["findings"]} <= {"yes", "no", "exactly", "approximately"}
    module.draw({**result, "options": dict(cfg)}).savefig(tmp_path / "figure.png")


def flatten(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in flatten(part)] if isinstance(value, list) else [value]


@pytest.fixture(scope="module")
def small():
    """Data, an anchor and the prepared loss."""
    cfg = options("search_space", SMALL["search_space"])
    torch.manual_seed(0)
    data = small_spar.load_embedded(cfg)
    return cfg, data, small_spar.fit_manifold(cfg, data, small_spar.clone_behaviour(cfg, data), cfg.critics)


def test_parts_of_the_actor_loss_add_up_to_it(small):
    _, data, loss = small
    batch = data.sample()
    values = []
    for part in ({"lsi": 1.0, "trust": 0.0}, {"lsi": 0.0, "trust": 1.0}, {"lsi": 1.0, "trust": 1.0}):
        torch.manual_seed(0)
        values.append(gradient_conflict.part_of_actor_loss(loss, batch, **part))
    assert (values[0] + values[1]).item() == pytest.approx(values[2].item(), rel=1e-5)
    assert loss.lsi_coeff == loss.trust_coeff == 1
    params = small_spar.head_parameters(loss)
    gradients = [torch.autograd.grad(value, params, retain_graph=True) for value in values]
    for one, other, whole in zip(*gradients):
        torch.testing.assert_close(one + other, whole, rtol=1e-4, atol=1e-6)


def test_rectified_is_what_the_loss_and_the_policy_play(small):
    _, data, loss = small
    batch = data.sample()
    state, _, action = small_spar.rectified(loss, batch)
    # No update yet: the deployed average is the head itself.
    torch.testing.assert_close(action.detach(), loss.actor(batch.select("observation"))["action"])
    (slope,) = torch.autograd.grad(small_spar.mean_value(loss, state, action).sum(), [action])
    assert slope.abs().max() > 0


def test_returns_alone_are_the_datas_returns():
    data = make_toy_data()
    loss, rows = pretrain(data, anchor={"steps": 2}, vae={"steps": 2}, critics={"steps": 2})
    loss.cut_margin = bootstrapping.KINDS[bootstrapping.RETURNS]["loss"]["cut_margin"]
    targets = with_value_targets(loss, rows)[:]["value_target"]
    # Every episode terminates after rewards of 0, 1, 2, 3, 4.
    expected = [sum(0.99 ** (k - t) * k for k in range(t, 5)) for t in range(5)] * 8
    torch.testing.assert_close(targets.squeeze(-1), loss.reward_scale * torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_heads_are_trained_on_critics_that_stay(small):
    cfg, data, loss = small
    trained = search_space.train_head(cfg, data, loss.anchor, loss)
    assert (trained.qvalue_network_params == loss.qvalue_network_params).all()
    rows = data.sample()
    moved = small_spar.rectified(trained, rows)[1] - small_spar.rectified(loss, rows)[1]
    assert moved.abs().max() > 0


def test_volume_of_independent_columns_is_the_product_of_their_deviations():
    torch.manual_seed(0)
    points = torch.randn(200_000, 3) * torch.tensor([1.0, 0.1, 0.01])
    assert search_space.log_volume(points) == pytest.approx(-3, abs=0.01)


def test_anchor_data_are_whole_episodes(small):
    _, data, _ = small
    rows, part = data[:], suboptimal_anchors.some_episodes(data, 0.1)
    lengths = torch.bincount(rows["episode"])
    kept = torch.bincount(part[:]["episode"])
    assert len(kept) == round(0.1 * len(lengths))
    assert set(kept.tolist()) <= set(lengths.tolist())


def test_rivals_start_from_the_same_critics(small):
    _, data, loss = small
    batch = data.sample()
    values = torch.stack([critic(batch.copy())["state_action_value"] for critic in support.critics_of(loss, 4)])
    state = batch.select("observation")
    torch.testing.assert_close(values.mean(0).squeeze(-1), small_spar.mean_value(loss, state, batch["action"]))
    assert values.requires_grad


def test_density_is_one_over_the_action_space():
    torch.manual_seed(0)
    norm = ObservationNorm(torch.zeros(2), torch.ones(2))
    model = support.ActionDensity(norm, 1, components=3, hidden=[8])
    grid = torch.linspace(-60, 60, 60_001).unsqueeze(-1)
    density = model(torch.zeros(len(grid), 2), grid).exp()
    assert torch.trapezoid(density, grid.squeeze(-1)).item() == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------------- the scripts


def test_help_names_every_claim(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["claim.py", "--help"])
    claim.main()
    printed = capsys.readouterr().out
    assert set(NAMES) == set(claim.NAMES) and all(name in printed for name in NAMES)


@pytest.mark.slow
def test_script_leaves_one_json_and_one_figure(tmp_path):
    command = ["claim", "gradient_conflict", *SMALL["gradient_conflict"], "out=result"]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["result"]
    out = tmp_path / "result"
    assert sorted(os.listdir(out)) == ["gradient_conflict.json", "gradient_conflict.png"]
    facts = json.loads((out / "gradient_conflict.json").read_text())
    assert facts["claim"] == "gradient_conflict" and facts["options"]["rows"] == 64 and "out" not in facts["options"]
    assert facts["findings"][0]["statement"].split()[0] in done.stdout
    again = run(*command, cwd=tmp_path)
    assert again.returncode == 2 and again.stderr.startswith("error: out=result")


@pytest.mark.parametrize("name", NAMES)
def test_committed_result_is_of_the_committed_options(name):
    facts = json.loads((ROOT / "recipes" / "results" / "claims" / f"{name}.json").read_text())
    given = ["dataset=minari:spar/hopper/medium-v0"] if name == "bootstrapping" else []
    expected = {key: value for key, value in OmegaConf.to_container(options(name, given)).items() if key != "out"}
    if "spar" in expected:  # of the loss, a result holds the options that differed from its defaults
        recorded = facts["options"]["spar"]["loss"]
        loss = expected["spar"]["loss"]
        assert recorded and recorded == {key: loss[key] for key in recorded}
        expected["spar"]["loss"] = recorded
    assert facts["claim"] == name and facts["options"] == expected
    assert (ROOT / "recipes" / "results" / "claims" / f"{name}.png").stat().st_size < 150_000
