"""The guard: how often it falls back, on Gaussian data in closed form, and what it does then."""

from __future__ import annotations

import pytest
import torch
from helpers import build_loss
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded

from torchrl_spar import (
    GuardedActor,
    InputError,
    fit_detector,
    load_offline_dataset,
    make_anchor,
    make_spar_loss,
    make_toy_data,
)

EPISODES, LENGTH, SIZE = 200, 50, 5
ROWS = EPISODES * LENGTH


def dataset(observation):
    """Episodes of equal length with these observations, which nothing else depends on."""
    rows = len(observation)
    end = (torch.arange(rows) % LENGTH == LENGTH - 1).unsqueeze(-1)
    following = {"observation": observation.roll(-1, 0), "reward": torch.zeros(rows, 1), "terminated": end}
    action = torch.linspace(-1, 1, rows).unsqueeze(-1).expand(rows, 3)
    return load_offline_dataset(TensorDict({"observation": observation, "action": action, "next": following}, [rows]))


def correlated(rows, seed):
    """Gaussian observations, far from standardised: their mean, the root of their covariance, and the rows."""
    draw = torch.Generator().manual_seed(0)
    loc, root = 10 * torch.randn(SIZE, generator=draw), torch.randn(SIZE, SIZE, generator=draw)
    noise = torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed))
    return loc, root, loc + noise @ root.T


@pytest.mark.parametrize("quantile", [0.9, 0.99])
def test_one_gaussian_falls_back_beyond_the_quantile_of_chi_square(quantile):
    loc, root, observation = correlated(ROWS, 1)
    detector = fit_detector(dataset(observation), quantile=quantile, num_gaussians=1)
    fresh = correlated(50_000, 2)[2]
    share = detector(fresh).float().mean().item()
    assert share == pytest.approx(1 - quantile, abs=3 * ((1 - quantile) / 2_000) ** 0.5)  # of 2,000 held-out rows
    # Mahalanobis' distance, whose quantile is that of chi-square with 5 degrees of freedom.
    exact = torch.linalg.solve(root, (fresh - loc).T).square().sum(0)
    bound = {0.9: 9.236, 0.99: 15.086}[quantile]
    same = (exact > bound) == detector(fresh)
    assert same.float().mean() > 1 - 0.3 * (1 - quantile)


@pytest.mark.parametrize("seed", range(3))
def test_many_gaussians_keep_the_rate_of_held_out_episodes(seed):
    """Two separate clouds: their middle, the mean of the data, is unlike both."""
    observation = correlated(ROWS, seed + 10)[2]
    far = torch.where((torch.arange(ROWS) // LENGTH % 2 == 0).unsqueeze(-1), 0.0, 200.0)
    detector = fit_detector(dataset(observation + far), quantile=0.99, seed=seed)
    fresh = correlated(20_000, seed + 20)[2]
    for cloud in (0, 200):
        assert 0.003 < detector(fresh + cloud).float().mean() < 0.025
    assert detector(fresh + 100).all()


def test_shifted_sensors_are_caught():
    """Sensors that the others predict up to a tenth of their spread, as joint angles and their rates are."""
    _, _, observation = correlated(ROWS, 3)
    noise = torch.randn(2 * ROWS, SIZE, generator=torch.Generator().manual_seed(4))
    twice = torch.cat([observation, correlated(ROWS, 5)[2]])
    twice = torch.cat([twice, twice + 0.1 * twice.std(0) * noise], 1)
    data, fresh = dataset(twice[:ROWS]), twice[ROWS:]
    detector, scale = fit_detector(data, quantile=0.99), twice.std(0)
    assert detector(fresh).float().mean() < 0.02
    rates = {"stuck": [], "offset": [], "swapped": []}
    for i in range(2 * SIZE):
        stuck, offset, swapped = (fresh.clone() for _ in range(3))
        stuck[:, i] = fresh[0, i]
        offset[:, i] += 3 * scale[i]
        swapped[:, [i, (i + 1) % SIZE]] = fresh[:, [(i + 1) % SIZE, i]]
        for name, rows in (("stuck", stuck), ("offset", offset), ("swapped", swapped)):
            rates[name].append(detector(rows).float().mean().item())
    means = {name: sum(shares) / len(shares) for name, shares in rates.items()}
    assert means["offset"] > 0.99 and means["swapped"] > 0.9 and means["stuck"] > 0.6, means


def test_nan_and_infinity_are_unlike_the_data():
    detector = fit_detector(dataset(correlated(ROWS, 6)[2]), quantile=1.0)
    rows = correlated(4, 6)[2]
    for i, value in enumerate((float("nan"), float("inf"), 1e30)):
        rows[i, 2] = value
    assert detector(rows).tolist() == [True, True, True, False]


def test_the_largest_number_of_a_broken_sensor_is_no_measurement():
    data = make_toy_data()
    guarded = GuardedActor(make_spar_loss(data).actor, fit_detector(data))
    row = data[:1].select("observation")
    action, fallback = guarded(observation=row["observation"].index_fill(1, torch.tensor(1), 3.4e38))
    mean = row["observation"].index_copy(1, torch.tensor(1), data.observation_loc[None, 1:2])
    assert fallback.all() and torch.equal(action, guarded.anchor(observation=mean))


def test_the_anchor_acts_where_the_guard_says_so():
    loss, data = build_loss(), dataset(correlated(ROWS, 7)[2])
    policy = GuardedActor(loss.actor, fit_detector(data))
    observation = data[:3]["observation"].clone()
    observation[1] += 100
    action, fallback = policy(observation=observation)
    assert fallback.tolist() == [False, True, False]
    own, anchor = loss.actor(observation=observation), loss.anchor(observation=observation)
    assert (own - anchor).abs().amin(0).min() > 0
    assert torch.equal(action, torch.stack([own[0], anchor[1], own[2]]))
    for value in (float("nan"), float("inf")):
        broken, whole = observation.clone(), observation.clone()
        broken[0, 1], whole[0, 1] = value, data.observation_loc[1]
        action, fallback = policy(observation=broken)
        assert fallback.tolist() == [True, True, False]
        torch.testing.assert_close(action[0], loss.anchor(observation=whole)[0])
    # One observation without a batch, as a robot's loop has it.
    torch.testing.assert_close(policy(TensorDict({"observation": observation[1]}))["action"], anchor[1])


def test_the_anchor_stays_within_the_policys_bounds():
    loss = build_loss(anchor=TensorDictModule(nn.Linear(SIZE, 3), ["observation"], ["action"]))
    far = torch.full((2, SIZE), 1e4)
    action, fallback = GuardedActor(loss.actor, fit_detector(dataset(correlated(ROWS, 9)[2])))(observation=far)
    anchor = loss.anchor(observation=far)
    assert fallback.all() and anchor.abs().max() > 1
    assert torch.equal(action, anchor.clamp(-1, 1))


def test_wrong_parts_are_named():
    data = dataset(correlated(ROWS, 8)[2])
    anchor = make_anchor(SIZE, Bounded(-1, 1, (3,)))
    with pytest.raises(InputError, match="has none: give anchor="):
        GuardedActor(anchor, fit_detector(data))
    assert GuardedActor(anchor, fit_detector(data), anchor).out_keys == ["action", "fallback"]
    writes_other = TensorDictModule(nn.Linear(SIZE, 3), ["observation"], ["torque"])
    with pytest.raises(InputError, match="'torque'"):
        GuardedActor(anchor, fit_detector(data), writes_other)
    for options, message in (({"quantile": 0.0}, "quantile=0"), ({"num_gaussians": 0}, "num_gaussians=0")):
        with pytest.raises(InputError, match=message):
            fit_detector(data, **options)
    with pytest.raises(InputError, match="at least 4 are needed"):
        fit_detector(load_offline_dataset(data[: 3 * LENGTH]))
    with pytest.raises(InputError, match="load_offline_dataset"):
        fit_detector(torch.zeros(3))
