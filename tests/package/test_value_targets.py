"""The critics' targets along trajectories: against a slow reference, TorchRL's TD(lambda) and the returns."""

from __future__ import annotations

import pytest
import torch
from helpers import build_loss, make_batch
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives.value.functional import td_lambda_return_estimate

from torchrl_spar import BatchSampler, InputError, returns_to_go
from torchrl_spar.data.returns import discounted_sums, episode_ends

GAMMA = 0.9


def make_data(rows=40):
    """Trajectories in order: where none ends, the next observation is that of the following row."""
    data = make_batch(rows)
    index = torch.arange(rows).unsqueeze(-1)
    terminated, truncated = index % 11 == 10, index % 17 == 16
    data["next", "terminated"], data["next", "truncated"] = terminated, truncated
    data["next", "done"] = terminated | truncated
    going_on = ~(terminated | truncated)[:-1, 0]
    data["next", "observation"][:-1][going_on] = data["observation"][1:][going_on]
    return data


def make_loss(**options):
    loss = build_loss(**options)
    loss.make_value_estimator(gamma=GAMMA)
    loss.reward_scale.fill_(0.5)
    return loss


def values_of(loss, states, action):
    """Of the target critics, one row at a time."""
    rows = []
    for state, act in zip(states, action):
        each = []
        for index in range(loss.num_qvalue_nets):
            with loss.target_params("qvalue_network")[index].to_module(loss.qvalue_network):
                each.append(loss.qvalue_network(observation=state, action=act)[-1].squeeze(-1))
        rows.append(torch.stack(each))
    return torch.stack(rows)  # [N, E]


@torch.no_grad()
def slow_targets(loss, data):
    def bound(values):
        return values.mean(-1) - loss.kappa * values.std(-1, correction=0)

    now, later = data["observation"], data["next", "observation"]
    policy = values_of(loss, now, loss.actor(observation=now))
    advantage = (values_of(loss, now, data["action"]) - policy).mean(-1)
    following = bound(values_of(loss, later, loss.actor(observation=later)))
    targets = torch.zeros(len(data))
    for t in reversed(range(len(data))):
        reward = 0.5 * data["next", "reward"][t, 0]
        if data["next", "terminated"][t]:
            targets[t] = reward
        elif data["next", "done"][t] or t == len(data) - 1:
            targets[t] = reward + GAMMA * following[t]
        else:
            cut = torch.exp((advantage[t + 1] + loss.cut_margin) / loss.cut_temperature).clamp(max=1)
            trace = loss.lmbda * cut
            targets[t] = reward + GAMMA * ((1 - trace) * following[t] + trace * targets[t + 1])
    return targets.unsqueeze(-1)


@pytest.mark.parametrize("head", ["residual", "latent"])
@pytest.mark.parametrize("lmbda", [1.0, 0.7])
def test_targets_are_those_of_the_slow_reference(lmbda, head):
    loss, data = make_loss(lmbda=lmbda, head=head, cut_margin=0.0, cut_temperature=0.05), make_data()
    targets = loss.value_targets(data, episode_ends(data))["value_target"]
    torch.testing.assert_close(targets, slow_targets(loss, data), rtol=1e-5, atol=1e-6)
    never_cut = make_loss(lmbda=lmbda, head=head, cut_margin=1e6)
    assert not torch.allclose(targets, never_cut.value_targets(data, episode_ends(data))["value_target"]), (
        "no trace was cut"
    )


@torch.no_grad()
def test_the_spread_of_the_datas_advantages():
    loss, data = make_loss(kappa=0.7), make_data()
    now = data["observation"]
    data_values, policy_values = (values_of(loss, now, a) for a in (data["action"], loss.actor(observation=now)))
    bounds = [values.mean(-1) - 0.7 * values.std(-1, correction=0) for values in (data_values, policy_values)]
    found = loss.value_targets(data, episode_ends(data))["advantage_std"]
    torch.testing.assert_close(found, (bounds[0] - bounds[1]).std(correction=0).expand(len(data), 1))


def test_without_cuts_they_are_torchrls_td_lambda():
    loss, data = make_loss(lmbda=0.8, cut_margin=1e6), make_data()
    following = loss._policy_value(data["next"]).unsqueeze(-1)
    done = episode_ends(data)
    expected = td_lambda_return_estimate(
        GAMMA, 0.8, following, 0.5 * data["next", "reward"], done, data["next", "terminated"]
    )
    torch.testing.assert_close(loss.value_targets(data, done)["value_target"], expected)


def test_lambda_zero_is_one_step():
    loss, data = make_loss(lmbda=0.0, policy_noise=0.0), make_data()
    targets = loss.value_targets(data, episode_ends(data))["value_target"]
    torch.testing.assert_close(targets, loss._one_step_target(data))


def test_whole_episodes_without_cuts_are_their_returns():
    loss, data = make_loss(cut_margin=1e6), make_data(44)  # the last row is terminated
    data["next", "truncated"].zero_()
    data["next", "done"] = data["next", "terminated"].clone()
    data["next", "observation"][:-1][~data["next", "done"][:-1, 0]] = data["observation"][1:][
        ~data["next", "done"][:-1, 0]
    ]
    targets = loss.value_targets(data, episode_ends(data))["value_target"]
    torch.testing.assert_close(targets, 0.5 * returns_to_go(data, GAMMA))


def test_a_target_replaces_the_outcome():
    loss, data = make_loss(), make_data()
    target = torch.randn(len(data), 1)
    given = data.select("observation", "action").set("value_target", target)
    assert loss.qvalue_loss(given)[1]["target_value"] == target.mean()
    assert loss(given)["target_value"] == target.mean()  # nothing of the following state is asked for
    with pytest.raises(InputError, match="reward"):
        loss(given.exclude("value_target"))


def test_discounted_sums_are_exact():
    torch.manual_seed(0)
    values, factors = torch.randn(500, dtype=torch.float64), torch.rand(500, dtype=torch.float64)
    sums = discounted_sums(values, factors)
    for t in (0, 123, 499):
        weights = torch.cat((torch.ones(1, dtype=torch.float64), factors[t:-1].cumprod(0)))
        torch.testing.assert_close(sums[t], (weights * values[t:]).sum())


def make_sampler(loss, data, **options):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)), batch_size=8)
    buffer.extend(data)
    return BatchSampler(loss, buffer, length=5, seed=0, **options)


def test_targets_are_renewed_when_they_are_due():
    loss, data = make_loss(), make_data()
    sampler = make_sampler(loss, data, target_interval=10)
    assert "action_noise" not in sampler.noise  # nothing bootstraps in one step
    before = loss.value_targets(sampler.data, sampler.ends)["value_target"]
    for expected in (before, before, None):
        block = next(sampler)
        assert block["value_target"].shape == (5, 8, 1)
        if expected is None:
            expected = loss.value_targets(sampler.data, sampler.ends)["value_target"]
            assert not torch.equal(expected, before)
        assert torch.equal(sampler.rows["value_target"], expected)
        loss.target_params("qvalue_network").data.mul_(1.1)


def test_a_resumed_sampler_goes_on_with_the_same_targets():
    loss, data = make_loss(), make_data()
    sampler = make_sampler(loss, data, target_interval=10)
    next(sampler)
    loss.target_params("qvalue_network").data.mul_(1.1)  # since the targets were made
    state = {name: value.clone() if torch.is_tensor(value) else value for name, value in sampler.state_dict().items()}
    again = make_sampler(loss, data, target_interval=10)
    again.load_state_dict(state)
    for _ in range(3):
        expected, found = next(sampler), next(again)
        for key in expected.keys(True, True):
            assert torch.equal(expected[key], found[key]), key


@pytest.mark.parametrize("change", ["interval", "lmbda", "steps"])
def test_one_step_where_trajectories_are_not_followed(change):
    loss, data = make_loss(lmbda=0.0 if change == "lmbda" else 1.0), make_data()
    if change == "steps":
        data["steps_to_next_obs"] = torch.full((len(data), 1), 2)
    sampler = make_sampler(loss, data, target_interval=None if change == "interval" else 10)
    block = next(sampler)
    assert "value_target" not in block.keys() and "action_noise" in block.keys()
