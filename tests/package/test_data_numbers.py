"""Numbers of all sizes: precision of observations, bounds, returns and their scale, against float64 references."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers import make_batch
from tensordict import TensorDict
from torchrl.data import Bounded

from torchrl_spar import (
    InputError,
    environment_sizes,
    evaluate,
    fit_anchor,
    fit_critics,
    load_offline_dataset,
    load_policy,
    make_anchor,
    make_spar_loss,
    returns_to_go,
    save_policy,
)

N = 4000


def wide(center: float, spread: float, n: int = N) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([center + spread * rng.normal(size=n), rng.normal(size=n)], axis=1)


def write(path, observations, **more):
    n = len(observations)
    arrays = {
        "observations": observations, "actions": np.clip((observations - observations.mean(0)) / 1e9, -1, 1) + 0.1,
        "rewards": np.ones(n), "terminals": np.arange(n) % 50 == 49, "timeouts": np.zeros(n, bool),
    }  # fmt: skip
    np.savez(path / "toy.npz", **arrays | more)
    return path / "toy.npz"


@pytest.mark.parametrize("center, spread", [(1e5, 0.05), (-1e6, 0.5), (1.7e9, 3600.0), (2.0**24, 3.0)])
def test_float64_columns_keep_their_values(tmp_path, center, spread):
    raw = wide(center, spread)
    buffer = load_offline_dataset(write(tmp_path, raw))
    found = buffer[:]["observation"]
    assert np.array_equal(found.numpy(), raw)
    standard = make_anchor(2, buffer.action_spec, observation_stats=stats(buffer))[0].module.norm(found)
    assert standard.dtype == torch.float32 and len(standard[:, 0].unique()) > 0.99 * len(np.unique(raw[:, 0]))
    np.testing.assert_allclose(standard, (raw - raw.mean(0)) / raw.std(0), atol=1e-4)


def stats(buffer):
    return buffer.observation_loc, buffer.observation_scale


@pytest.mark.parametrize("observations", [wide(1e3, 1.0), wide(1e5, 0.05).astype(np.float32), wide(0.1, 0.0)])
def test_other_columns_stay_float32(tmp_path, observations):
    buffer = load_offline_dataset(write(tmp_path, observations))
    assert buffer[:]["observation"].dtype == buffer.observation_loc.dtype == torch.float32


def test_a_policy_tells_such_values_apart_once_it_is_deployed(tmp_path):
    """The action is the sign of a deviation that float32 cannot hold; a saved policy knows it, too."""
    torch.manual_seed(0)
    raw = wide(1e8, 0.5)
    action = np.sign(raw[:, :1] - 1e8) * 0.8
    buffer = load_offline_dataset(write(tmp_path, raw, actions=action), batch_size=256)
    options = {"observation_stats": stats(buffer), "hidden": [16]}
    anchor = fit_anchor(make_anchor(2, buffer.action_spec, **options), buffer, steps=300, lr=1e-2)
    loss = make_spar_loss(2, buffer.action_spec, anchor=anchor, **options)
    save_policy(loss, tmp_path / "policy.pt")
    policy, _ = load_policy(tmp_path / "policy.pt")
    state = torch.tensor([[1e8 - 0.5, 0.0], [1e8 + 0.5, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        low, high = policy(observation=state)[:, 0]
        assert torch.equal(policy(observation=state), loss.actor(observation=state))
    assert low < -0.5 and high > 0.5


def test_evaluation_gives_such_a_policy_the_environments_float64():
    gymnasium = pytest.importorskip("gymnasium")
    seen = []

    class Far(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

        def reset(self, seed=None, options=None):
            return np.array([1e8 + 0.25, 0.0]), {}

        def step(self, action):
            seen.append(float(action[0]))
            return np.array([1e8 + 0.25, 0.0]), 0.0, True, False, {}

    gymnasium.register("FarFromZero-v0", Far)
    try:
        loc = torch.tensor([1e8, 0.0], dtype=torch.float64)
        policy = make_spar_loss(2, Bounded(-1, 1, (1,)), observation_stats=(loc, torch.ones(2)), hidden=[8]).actor
        evaluate(policy, "FarFromZero-v0", episodes=1)
        expected = policy(observation=torch.tensor([[1e8 + 0.25, 0.0]], dtype=torch.float64)).item()
    finally:
        del gymnasium.registry["FarFromZero-v0"]
    assert seen == [pytest.approx(expected, abs=1e-6)]
    assert expected != policy(observation=torch.tensor([[1e8, 0.0]], dtype=torch.float64)).item()


@pytest.mark.parametrize("bound", [3.4028235e38, 1e20, 1e14, 1e10, float("inf")])
def test_bounds_that_bound_nothing_are_refused_everywhere(bound):
    spec = Bounded(-bound, bound, (3,))
    for call in (
        lambda: make_spar_loss(5, spec),
        lambda: make_anchor(5, spec),
        lambda: load_offline_dataset(make_batch(12), action_spec=spec),
    ):
        with pytest.raises(InputError, match="no finite bounds"):
            call()
    gymnasium = pytest.importorskip("gymnasium")

    class Open(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gymnasium.spaces.Box(-bound, bound, (1,), np.float64)

        def reset(self, seed=None, options=None):
            return np.zeros(2, np.float32), {}

    gymnasium.register("OpenActions-v0", Open)
    try:
        with pytest.raises(InputError, match="no finite bounds"):
            environment_sizes("OpenActions-v0")
    finally:
        del gymnasium.registry["OpenActions-v0"]


def slow_returns(reward, terminated, end, gamma):
    """Float64 passes, each from what the one before says of the rows beyond a cut."""

    def backward(beyond):
        out, total = np.zeros(len(reward)), 0.0
        for i in reversed(range(len(reward))):
            if end[i]:
                total = 0.0 if terminated[i] else beyond
            total = reward[i] + gamma * total
            out[i] = total
        return out

    plain, far = backward(0.0), []
    ends = np.flatnonzero(end)
    for i in range(len(reward)):
        last = ends[np.searchsorted(ends, i)]
        if not terminated[last] and last - i + 1 > (3 / (1 - gamma) if gamma < 1 else np.inf):
            far.append(plain[i])
    if far:
        return backward(np.mean(far))
    found = backward(plain.mean())
    while gamma < 1 and abs((again := backward(found.mean())) - found).max() > 1e-11:
        found = again
    return found


def test_undiscounted_returns_go_on_with_the_mean():
    cut = torch.tensor([[False], [True]])
    rows = TensorDict({"next": {"reward": torch.ones(2, 1), "done": cut, "terminated": ~cut & cut}}, [2])
    assert returns_to_go(rows, 1.0).flatten().tolist() == [3.5, 2.5]


@pytest.mark.parametrize("gamma", [0.0, 1e-9, 0.5, 0.9, 0.999, 1.0])
def test_returns_to_go_are_those_of_a_slow_reference(gamma):
    rng = np.random.default_rng(0)
    n = 3000
    end = rng.random(n) < 0.004
    end[-1] = True
    terminated = end & (rng.random(n) < 0.5)
    reward = rng.normal(size=n)
    done = terminated | (end & (rng.random(n) < 0.5))  # the other ends are told by their episodes' ids alone
    rows = {"reward": reward, "done": done, "terminated": terminated}
    data = TensorDict({"next": {name: torch.from_numpy(row)[:, None] for name, row in rows.items()}}, [n])
    found = returns_to_go(data.set("episode", torch.from_numpy(end.cumsum() - end)), gamma)
    np.testing.assert_allclose(found[:, 0], slow_returns(reward, terminated, end, gamma), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.95, 0.99, 0.999])
def test_a_constant_reward_is_worth_the_same_however_short_the_recordings_are(gamma):
    end = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) < 0.2
    rows = {"reward": torch.ones(500, 1, dtype=torch.float64), "done": end, "terminated": torch.zeros_like(end)}
    found = returns_to_go(TensorDict({"next": rows}, [500]), gamma)
    torch.testing.assert_close(found, torch.full_like(found, 1 / (1 - gamma)))


def test_returns_of_one_long_episode_need_no_square():
    n = 300_000  # a matrix of n by n would take 360 GB
    ended = torch.zeros(n, 1, dtype=torch.bool)
    ended[-1] = True
    data = TensorDict({"next": {"reward": torch.ones(n, 1), "done": ended, "terminated": ended}}, [n])
    found = returns_to_go(data, 0.99)
    expected = (1 - 0.99 ** torch.arange(n, 0, -1, dtype=torch.float64)) / 0.01
    torch.testing.assert_close(found[:, 0].double(), expected, rtol=1e-6, atol=0)


def test_a_gamma_outside_its_range_is_refused():
    with pytest.raises(InputError, match=r"gamma=1\.1"):
        returns_to_go(make_batch(4), 1.1)


@pytest.mark.parametrize("reward", [0.0, 1e-9, -1.0, 3.0])
def test_constant_rewards_are_not_scaled(reward):
    data = make_batch(60)
    data["next", "reward"].fill_(reward)
    buffer = load_offline_dataset(data, batch_size=4)
    loss = fit_critics(make_spar_loss(5, buffer.action_spec, hidden=[4]), buffer, steps=1)
    assert loss.reward_scale == 1


def test_a_single_success_is_scaled_by_the_spread_of_returns():
    data = make_batch(60)
    data["next", "reward"].zero_()[7] = 1
    buffer = load_offline_dataset(data, batch_size=4)
    loss = fit_critics(make_spar_loss(5, buffer.action_spec, hidden=[4]), buffer, steps=1)
    torch.testing.assert_close(loss.reward_scale, 1 / returns_to_go(buffer[:], 0.99).std())


def test_clipped_actions_are_those_of_the_environment(tmp_path):
    actions = np.linspace(-3, 2, N)[:, None]
    path = write(tmp_path, wide(0.0, 1.0), actions=actions)
    with pytest.raises(InputError, match=r"2400 of 4000 actions .* clip_actions=True"):
        load_offline_dataset(path)
    with pytest.warns(UserWarning, match=r"2400 of 4000 components of actions \(60.0%\) went up to 2 beyond"):
        buffer = load_offline_dataset(path, clip_actions=True)
    np.testing.assert_array_equal(buffer[:]["action"], actions.clip(-1, 1).astype(np.float32))


def test_what_clip_action_clips_to_are_the_bounds():
    wrapper = {"name": "", "entry_point": "gymnasium.wrappers:ClipAction", "kwargs": {}}
    outer = {"name": "", "entry_point": "gymnasium.wrappers:TimeAwareObservation", "kwargs": {}}
    _, spec = environment_sizes("Pendulum-v1", additional_wrappers=[wrapper, outer])
    assert spec.space.low == -2 and spec.space.high == 2


def test_rewards_of_rows_that_are_left_out_are_told_of(tmp_path):
    """A success on the last row, which no observation follows."""
    end = np.arange(200) % 20 == 19
    states = np.random.default_rng(0).normal(0, 0.1, (200, 2)).cumsum(0)
    options = {"terminals": np.zeros(200, bool), "timeouts": end, "actions": np.tanh(states)}
    with pytest.warns(UserWarning, match=r"10 rows at episodes' ends are left out.* they hold 100% of the rewards"):
        load_offline_dataset(write(tmp_path, states, rewards=1.0 * end, **options))
    quiet = [
        {"rewards": 1.0 * end, **options, "terminals": end, "timeouts": ~end & end},
        {"rewards": 1.0 * end, **options, "next_observations": np.vstack((states[1:], states[-1:]))},
        {"rewards": 1.0 * (np.arange(200) % 20 == 18), **options},
    ]
    for arrays in quiet:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*are left out")
            load_offline_dataset(write(tmp_path, states, **arrays))


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e5])
def test_bounds_are_checked_and_guessed_in_the_unit_of_the_actions(tmp_path, unit):
    bounds = Bounded(-unit, unit, (2,))
    actions = np.random.default_rng(1).uniform(-1, 1, (100, 2))
    for beyond, fits in ((1 + 1e-7, True), (1.01, False)):
        actions[7, 1] = beyond
        path = write(tmp_path, np.ones((100, 2)) * np.arange(100)[:, None], actions=(actions * unit).astype(np.float32))
        if fits:
            assert len(load_offline_dataset(path, action_spec=bounds))
        else:
            with pytest.raises(InputError, match="1 of 100 actions leave their bounds, the first in row 7"):
                load_offline_dataset(path, action_spec=bounds)


def test_actions_that_hardly_use_their_bounds_are_told_of(tmp_path):
    actions = np.random.default_rng(1).uniform(-1, 1, (100, 3)) * [1, 1e-3, 0]
    with pytest.warns(UserWarning, match=r"components \[1\] of actions vary by less than 1%"):
        load_offline_dataset(write(tmp_path, np.ones((100, 2)) * np.arange(100)[:, None], actions=actions))


def test_guessed_bounds_are_the_actions_own(tmp_path):
    """In a table; a constant column, too, needs a range."""
    n = 60
    rows = {"x": np.arange(n) / n, "u": np.r_[-2e-4, np.zeros(n - 2), 3e-4], "w": np.linspace(0, 50, n), "c": [7.0] * n}
    lines = [
        ",".join([*rows, "reward", "done"]),
        *(",".join(map(str, [*values, 1, int(i % 20 == 19)])) for i, values in enumerate(zip(*rows.values()))),
    ]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    columns = {"observation": ["x"], "action": ["u", "w", "c"], "reward": "reward", "done": "done"}
    space = load_offline_dataset(tmp_path / "log.csv", columns=columns).action_spec.space
    assert space.low.tolist() == pytest.approx([-2e-4, 0, 7]) and space.high.tolist() == pytest.approx(
        [3e-4, 50, 7.007]
    )


@pytest.mark.parametrize("unit, is_told", [(1e-9, True), (1e-5, False), (1e-15, False)])
def test_observations_in_too_large_a_unit_are_told_of(tmp_path, unit, is_told):
    states = np.random.default_rng(0).normal(size=(200, 2)).cumsum(0) / 10
    states[:, 1] *= unit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scale = load_offline_dataset(write(tmp_path, states, actions=np.tanh(states))).observation_scale
    told = [
        str(one.message) for one in caught if "columns [1] of observations vary by less than 1e-06" in str(one.message)
    ]
    assert len(told) == is_told and (scale[1] == 1) == (unit < 1e-6)
