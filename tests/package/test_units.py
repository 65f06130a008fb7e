"""The unit of the actions changes nothing: what is trained on them is the same policy in that unit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import buffer_of, make_batch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import Bounded
from torchrl.modules import TanhModule

from torchrl_spar import (
    BatchSampler,
    SPARUpdate,
    estimate_value,
    fit_anchor,
    load_offline_dataset,
    load_policy,
    make_anchor,
    pretrain,
    save_policy,
)
from torchrl_spar.evaluation.fast_policy import action_function

# Powers of two, which only move exponents; one far below and one far above what networks read well.
UNITS = [(1.0, 1.0), (64.0, 0.25), (2.0**-20, 2.0**20)]
FEW = {"steps": 30}


def logged(tmp_path, unit, offset=0.0):
    """Trajectories whose actions, divided by the unit, are always the same."""
    generator = np.random.default_rng(0)
    observation = generator.normal(size=(400, 3)).cumsum(0) / 10
    action = np.clip(np.tanh(observation[:, :2]) + generator.normal(0, 0.2, (400, 2)), -1, 1)
    end = np.arange(400) % 20 == 19
    unit = np.array(unit)
    path = tmp_path / "log.npz"
    np.savez(
        path, observations=observation, actions=action * unit + offset, rewards=-np.square(action).sum(1),
        terminals=np.zeros(400, bool), timeouts=end,
    )  # fmt: skip
    low, high = (torch.tensor(side * unit + offset, dtype=torch.float32) for side in (-1, 1))
    return load_offline_dataset(path, batch_size=32, action_spec=Bounded(low, high, (2,)))


def trained(data, **options):
    torch.manual_seed(0)
    loss, rows = pretrain(data, anchor=FEW, vae=FEW, critics=FEW, hidden=[16, 16], **options)
    update, batches = SPARUpdate(loss, decay_steps=60), BatchSampler(loss, rows, length=1, seed=0)
    for _ in range(30):
        update.run(next(batches))
    return loss


@pytest.mark.parametrize("head", ["residual", "latent"])
def test_a_policy_does_not_depend_on_the_unit(tmp_path, head):
    policies = []
    for unit in UNITS:
        data = logged(tmp_path, unit)
        loss, rows = trained(data, head=head), data[:]
        given = rows.select("observation")
        policies.append(loss.actor(given.clone())["action"] / torch.tensor(unit))
        fast = action_function(loss.actor)(given["observation"])
        torch.testing.assert_close(fast / torch.tensor(unit), policies[-1])
        save_policy(loss, tmp_path / "policy.pt")
        saved, _ = load_policy(tmp_path / "policy.pt")
        assert torch.equal(saved(given.clone())["action"] / torch.tensor(unit), policies[-1])
    assert policies[0].std(0).min() > 0.02  # no constant
    for policy in policies[1:]:
        torch.testing.assert_close(policy, policies[0], rtol=1e-5, atol=1e-6)


def test_bounds_that_are_not_about_zero_change_rounding_alone(tmp_path):
    usual, moved = (trained(logged(tmp_path, (1.0, 1.0), offset)) for offset in (0.0, 3.0))
    rows = logged(tmp_path, (1.0, 1.0))[:]
    actions = [loss.actor(rows.select("observation"))["action"] for loss in (usual, moved)]
    torch.testing.assert_close(actions[1] - 3, actions[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("unit", UNITS[1:])
def test_an_estimate_does_not_depend_on_the_unit(tmp_path, unit):
    def value(unit):
        scale = torch.tensor(unit)
        policy = TensorDictModule(
            lambda observation: observation[..., :2].tanh() / 2 * scale, ["observation"], ["action"]
        )
        options = {"gamma": 0.9, "hidden": [16], "warm_steps": 30, "steps": 60, "slice_len": 8}
        return estimate_value(policy, logged(tmp_path, unit), **options)

    mine, other = value(UNITS[0]), value(unit)
    assert (mine.mean, *mine.interval) == pytest.approx((other.mean, *other.interval), rel=1e-4)


def test_a_tanh_on_the_way_tells_no_bounds():
    """The error is that of the actions, in their own unit."""
    rows = make_batch(64)
    buffer = buffer_of(rows, batch_size=64)
    buffer.sample = lambda: rows
    inner = TensorDictModule(torch.nn.Linear(5, 3), ["observation"], ["hidden"])
    squash = TanhModule(in_keys=["hidden"], out_keys=["squashed"], low=-5.0, high=5.0)
    actor = TensorDictSequential(inner, squash, TensorDictModule(lambda x: 20 * x, ["squashed"], ["action"]))
    actor = actor.select_out_keys("action")
    expected = (actor(rows.select("observation"))["action"] - rows["action"]).pow(2).mean()
    seen = []
    fit_anchor(actor, buffer, steps=1, report=lambda step, metrics: seen.append(metrics["loss_bc"]))
    torch.testing.assert_close(seen[0], expected.detach())


def test_cloning_of_a_plain_buffer_is_in_the_actors_range():
    """Bounds of its tanh: in half ranges the error is that of actions between -1 and 1."""
    rows, errors = make_batch(64), []
    for unit in (1.0, 2.0**-20):
        batch = rows.clone()
        batch["action"] = batch["observation"][:, :3].tanh() * unit
        buffer = buffer_of(batch, batch_size=64)
        torch.manual_seed(0)
        anchor = make_anchor(5, Bounded(-unit, unit, (3,)), hidden=[8])
        errors.append([])
        add = errors[-1].append
        fit_anchor(anchor, buffer, steps=200, report=lambda step, metrics, add=add: add(float(metrics["loss_bc"])))
    assert np.mean(errors[0][-10:]) < 0.7 * np.mean(errors[0][:10])
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)
