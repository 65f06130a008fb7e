"""SPAR with one part replaced, against what the part must do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import ACTION, OBSERVATION, TINY, compose_recipe, make_batch, run
from tensordict import TensorDict
from torchrl.data import Bounded

from torchrl_spar import SPARActor, make_spar_loss

pytest.importorskip("hydra")
import compare
from ablations.action_space import ActionSpaceLoss
from ablations.no_anchor import MidRange
from ablations.value_gradient import ALPHA, ValueGradientLoss
from harness.actors import read_actor
from harness.directory import flatten
from omegaconf import OmegaConf
from reporting.names import NAMES as SHOWN

CONFIG = Path(__file__).resolve().parents[2] / "recipes" / "config"
NAMES = sorted(path.stem for path in (CONFIG / "method" / "ablation").glob("*.yaml"))


def build(loss_class, **options):
    torch.manual_seed(0)
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[16], loss_class=loss_class, **options)
    loss.residual_scale = torch.tensor([0.1, 0.2, 0.3])
    return loss.double()


def make_state(loss):
    batch = make_batch(6, dtype=torch.float64)
    return TensorDict({"observation": batch["observation"], "anchor_action": 0.3 * batch["action"]}, [6])


def test_value_gradient_is_that_of_the_critics_mean():
    loss = build(ValueGradientLoss)
    state, residual = make_state(loss), torch.zeros(6, ACTION, dtype=torch.float64, requires_grad=True)
    imitation, metadata = loss.self_imitation(state, residual)
    (gradient,) = torch.autograd.grad(imitation.sum(), residual)

    def value(residual):
        action = state["anchor_action"] + loss.residual_scale * residual
        members = loss.qvalue_network_params.data.unbind(0)
        values = []
        for member in members:
            with member.to_module(loss.qvalue_network):
                values.append(loss.qvalue_network(observation=state["observation"], action=action)[..., 0])
        return sum(values) / len(members)

    # TD3+BC's alpha in units of squared residuals, 0.1, 0.2 and 0.3 long.
    scale = ALPHA / ((0.01 + 0.04 + 0.09) / 3) / value(residual.detach()).abs().mean()
    step = 1e-6
    for j in range(ACTION):
        bump = torch.zeros(ACTION, dtype=torch.float64)
        bump[j] = step
        slope = (value(residual.detach() + bump) - value(residual.detach() - bump)) / (2 * step)
        torch.testing.assert_close(gradient[:, j], -scale * slope, rtol=1e-5, atol=1e-8)
    assert not metadata
    # Padding counts in nothing.
    mask = torch.tensor([True, True, False, True, True, False])
    padded = state.clone()
    padded["observation"][~mask] += 3
    valid, moved = (loss.self_imitation(x, residual, mask=mask)[0][mask] for x in (state, padded))
    torch.testing.assert_close(valid, moved)
    out = loss(make_batch(6, dtype=torch.float64))
    assert set(out.keys()) == set(loss.out_keys)


def test_action_space_candidates_are_the_noise_itself():
    loss = build(ActionSpaceLoss, latent_std=0.5, temperature=1e6)
    state, residual = make_state(loss), torch.full((6, ACTION), 0.4, dtype=torch.float64)
    noise = torch.randn(6, 7, ACTION, dtype=torch.float64)
    target, _ = loss.self_imitation_target(state, residual, noise=noise)
    # Flat weights: the mean of the policy's own residual and of seven draws.
    expected = (residual + (0.5 * noise).clamp(-2, 2).sum(1)) / 8
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)


def test_middle_of_the_range():
    anchor = MidRange(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0]))
    assert anchor(torch.randn(5, 3)).tolist() == [[0.0, 2.0]] * 5


@pytest.mark.parametrize("name", NAMES)
def test_an_ablation_changes_spars_own_options(name):
    plain, changed = compose_recipe("compare"), compose_recipe("compare", f"method=ablation/{name}")
    assert changed.method.name == name and changed.method.algorithm in compare.SPAR_RUNS
    assert name in SHOWN
    changed.method = plain.method
    known, found = (flatten(OmegaConf.to_container(cfg)) for cfg in (plain, changed))
    # Hydra takes unknown keys of a group without a word.
    assert known.keys() == found.keys()
    assert known != found or name in ("value_gradient", "action_space", "no_anchor")


def test_the_ablations_with_code_run(tmp_path):
    methods = ["ablation/value_gradient", "ablation/action_space", "ablation/no_anchor"]
    # action_space has nothing to fit.
    options = [*(option for option in TINY if option != "vae.steps=5"), "keep_policies=2"]
    done = run(
        "compare", *options, f"method={','.join(methods)}", "seed=0", "runs=runs", "hydra/launcher=basic", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = {path.parent.parent.name for path in (tmp_path / "runs").rglob("results.json")}
    assert found == {"value_gradient", "action_space", "no_anchor"}
    for name in ("policy", "policy_2"):
        anchored = {file.parent.parent.name: isinstance(read_actor(file)[0], SPARActor)
                    for file in (tmp_path / "runs").rglob(f"{name}.pt")}  # fmt: skip
        assert anchored == {"value_gradient": True, "action_space": True, "no_anchor": False}
