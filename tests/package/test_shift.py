"""The coherent shift: against a slow count, and on a policy that fell at the same step of every episode."""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers import ACTION, OBSERVATION, buffer_of, build_loss
from tensordict import TensorDict
from torchrl.data import Bounded

from torchrl_spar import HealthCheck, load_offline_dataset, make_spar_loss
from torchrl_spar.conventions import _stateful
from torchrl_spar.training.shift import LENGTH, CoherentShift

# Of the policy that one-step targets made of the anchor on shared/datasets/hopper-medium-expert-v0.npz (4,000 updates,
# seed 10: score 80 -> 1.5), in float16, and 64 steps of 24 of the data's episodes.
COLLAPSED = Path(__file__).parent / "fixtures" / "collapsed_hopper.pt"


def make_data(lengths, observation=None, action=None):
    rows = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    if observation is None:
        observation = torch.randn(rows, OBSERVATION, generator=generator)
        action = torch.rand(rows, ACTION, generator=generator) * 2 - 1
    done = torch.zeros(rows, 1, dtype=torch.bool)
    done[torch.tensor(lengths).cumsum(0) - 1] = True
    following = {"observation": observation.roll(-1, 0), "reward": torch.zeros(rows, 1)}
    return TensorDict(
        {"observation": observation, "action": action, "next": {**following, "done": done, "terminated": done}}, [rows]
    )


@torch.no_grad()
def slow_shift(loss, data, lengths):
    ages = {}
    start = 0
    for length in lengths:
        for age in range(length // LENGTH):
            window = data[start + age * LENGTH : start + (age + 1) * LENGTH]
            anchor = loss.anchor(observation=window["observation"])
            policy = (loss.actor(observation=window["observation"]) - anchor).mean(0)
            ages.setdefault(age, []).append((policy, (window["action"] - anchor).mean(0)))
        start += length
    found = []
    for windows in ages.values():
        if len(windows) >= 20:
            policy, usual = (torch.stack(part) for part in zip(*windows))
            found.append(policy.mean(0).abs() / usual.std(0).maximum(0.1 * loss.residual_scale))
    return torch.stack(found).max()


def test_shift_is_that_of_a_slow_count():
    loss = build_loss()
    lengths = [70, 31, 40, 100] * 8 + [32] * 3  # 27 windows of the first age, 16 of the second: too few
    data = make_data(lengths)
    torch.testing.assert_close(CoherentShift(loss, buffer_of(data))(), slow_shift(loss, data, lengths))
    more = lengths + [64] * 4  # 20 of the second
    data = make_data(more)
    torch.testing.assert_close(CoherentShift(loss, buffer_of(data))(), slow_shift(loss, data, more))


def biased(loss, bias):
    """The loss with a deployed head that writes about this residual."""
    loss = deepcopy(loss)
    params = loss.target_params("actor_network")["head"]
    params[max(key for key in params.keys(True, True) if key[-1] == "bias")].data.fill_(bias)
    return loss


def test_shift_of_members_is_that_of_their_mean_policy():
    """Of which one's actions are clamped: the mean of the residuals is not that of the actions."""
    loss, lengths = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8]), [32] * 30
    data = make_data(lengths)
    found = CoherentShift([biased(loss, 3.0), biased(loss, -0.5)], buffer_of(data))()
    torch.testing.assert_close(found, slow_shift(biased(loss, 1.25), data, lengths), rtol=1e-3, atol=0)


def test_a_constant_shift_has_a_closed_form():
    """Zero-mean noise of the data, a policy that is off by a constant."""
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8])
    loss.residual_scale = torch.ones(ACTION)
    for key, leaf in loss.target_params("actor_network")["head"].items(True, True):
        if key[-1] in ("weight", "bias"):
            leaf.data.zero_()
    last = max(key for key in loss.target_params("actor_network").keys(True, True) if key[-1] == "bias")
    loss.target_params("actor_network").get(last).data.fill_(0.25)
    generator = torch.Generator().manual_seed(1)
    observation = torch.zeros(100 * LENGTH, OBSERVATION)  # one state: the anchor's action is one, too
    with torch.no_grad():
        anchor = loss.anchor(observation=observation)
    episode = (0.5 * torch.randn(100, 1, ACTION, generator=generator)).expand(-1, LENGTH, -1).reshape(-1, ACTION)
    data = make_data([LENGTH] * 100, observation, anchor + episode)
    expected = 0.25 / (data["action"] - anchor)[::LENGTH].std(0).min()
    torch.testing.assert_close(CoherentShift(loss, buffer_of(data))(), expected)


@pytest.mark.parametrize("lengths", [[31] * 50, [64] * 19])
def test_short_or_few_episodes_have_none(lengths):
    data = buffer_of(make_data(lengths))
    assert CoherentShift(build_loss(), data)() is None
    assert HealthCheck(build_loss(), data)(2000, {}) == {}


def test_rows_out_of_order_have_none():
    data = make_data([64] * 30)
    shuffled = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    assert CoherentShift(build_loss(), buffer_of(shuffled))() is None


def test_a_collapsed_policy_is_named_and_its_anchor_is_not():
    saved = torch.load(COLLAPSED, weights_only=True)
    weights = {name: leaf.float() for name, leaf in saved["state_dict"].items()}
    loss = make_spar_loss(11, Bounded(-1, 1, (3,)), hidden=saved["architecture"]["hidden"])
    for params in (loss.network_params("actor_network"), loss.target_params("actor_network")):
        _stateful(loss.actor_network, params).load_state_dict(weights)
    data = load_offline_dataset(
        make_data([64] * 24, saved["observation"].float().flatten(0, 1), saved["action"].float().flatten(0, 1))
    )
    check = HealthCheck(loss, data)
    with pytest.warns(UserWarning, match=r"at step 4000 .* one direction by 5\.\d standard deviations"):
        assert check(4000, {})["coherent_shift"] > 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(6000, {})  # named once
        for key, leaf in loss.target_params("actor_network")["head"].items(True, True):
            if key[-1] in ("weight", "bias"):
                leaf.data.zero_()
        assert HealthCheck(loss, data)(2000, {})["coherent_shift"] == 0
