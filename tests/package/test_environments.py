"""Environments as a data set records them, against Minari's own; step limits; D4RL's protocols."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import SHARED, by_hand
from tensordict.nn import TensorDictModule
from test_data import write_minari
from torch import nn

from torchrl_spar import (
    BackgroundEvaluator,
    InputError,
    environment_sizes,
    evaluate,
    load_offline_dataset,
    load_policy,
    make_env,
    make_spar_loss,
    normalized_score,
    save_policy,
)
from torchrl_spar.data.environment import recorded_environment
from torchrl_spar.evaluation.protocols import d4rl_protocol

gymnasium = pytest.importorskip("gymnasium")
minari = pytest.importorskip("minari")
from minari.data_collector.episode_buffer import EpisodeBuffer  # noqa: E402

MODULE = """
import gymnasium, numpy as np
class Walk(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    def __init__(self, pay=1.0):
        self.pay = pay
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(3, np.float32), {}
    def step(self, action):
        return np.zeros(3, np.float32), self.pay, False, False, {}
gymnasium.register("TestWalk-v0", entry_point="walk_of_a_test:Walk", max_episode_steps=7)
gymnasium.register("walks/NoLimit-v0", entry_point="walk_of_a_test:Walk")
"""


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """A module of somebody else's that registers environments."""
    (tmp_path / "walk_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import walk_of_a_test

    yield walk_of_a_test
    del sys.modules["walk_of_a_test"]
    for name in ("TestWalk-v0", "walks/NoLimit-v0"):
        gymnasium.registry.pop(name, None)


def collect(root, env, episodes=2):
    """A Minari set of random actions in an environment."""
    buffers = []
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        env.action_space.seed(seed)
        rows = {"observations": [observation], "actions": [], "rewards": [], "terminations": [], "truncations": []}
        while not (rows["truncations"] and (rows["terminations"][-1] or rows["truncations"][-1])):
            rows["actions"].append(env.action_space.sample())
            observation, *outcome, _ = env.step(rows["actions"][-1])
            rows["observations"].append(observation)
            for name, value in zip(("rewards", "terminations", "truncations"), outcome):
                rows[name].append(value)
        buffers.append(EpisodeBuffer(**{name: np.stack(values) for name, values in rows.items()}))
    return write_minari(root, buffers, None, None, name="test/recorded-v0", env=env)


def push(size, actions=1):
    torch.manual_seed(0)
    return TensorDictModule(nn.Sequential(nn.Linear(size, actions), nn.Tanh()), ["observation"], ["action"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: gymnasium.wrappers.RescaleAction(env, -1.0, 1.0),
        lambda env: gymnasium.wrappers.TimeAwareObservation(env),
        lambda env: gymnasium.wrappers.TimeAwareObservation(gymnasium.wrappers.RescaleAction(env, -0.5, 0.5)),
        lambda env: gymnasium.wrappers.TimeLimit(env.unwrapped, 30),
        lambda env: gymnasium.wrappers.RecordEpisodeStatistics(env),
    ],
    ids=["rescaled", "time", "both", "limit", "statistics"],
)
def test_an_evaluation_is_that_of_the_environment_that_minari_recovers(tmp_path, wrap):
    path = collect(tmp_path, wrap(gymnasium.make("Pendulum-v1", g=9.0)))
    data = load_offline_dataset(path)
    theirs = minari.MinariDataset(path / "data").recover_environment()
    size, spec = environment_sizes(data.env_id, **data.env_kwargs)
    assert (size,) == theirs.observation_space.shape == data.observation_loc.shape
    assert np.array_equal(spec.space.high, theirs.action_space.high)
    policy = push(size)
    found = evaluate(policy, data.env_id, 2, 5, **data.env_kwargs)
    assert found.tolist() == pytest.approx([by_hand(policy, theirs, 5 + i) for i in range(2)], rel=1e-4)


def test_a_plain_environment_needs_no_arguments(tmp_path):
    data = load_offline_dataset(collect(tmp_path, gymnasium.make("Pendulum-v1")))
    assert (data.env_id, data.env_kwargs) == ("Pendulum-v1", {})
    assert recorded_environment(None) == (None, {})


def test_what_only_looks_on_is_left_out(tmp_path):
    env = gymnasium.make("Pendulum-v1", render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        filmed = gymnasium.wrappers.RenderCollection(env)
    assert recorded_environment(filmed.spec) == ("Pendulum-v1", {})


def test_an_environment_of_somebody_elses_module_is_made_by_its_entry_point(tmp_path, walk):
    path = collect(tmp_path, gymnasium.make("TestWalk-v0", pay=2.0))
    for name in ("TestWalk-v0", "walks/NoLimit-v0"):
        del gymnasium.registry[name]
    data = load_offline_dataset(path)
    assert evaluate(push(3, 2), data.env_id, 1, **data.env_kwargs).tolist() == [14.0]  # 7 steps, 2 each
    with pytest.raises(InputError, match=r"TestWalk-v0.*needs the module 'no_such_module'.*PYTHONPATH"):
        make_env("TestWalk-v0", entry_point="no_such_module:Walk")
    with pytest.raises(InputError, match=r"needs the module 'no_such_module'"):
        make_env("no_such_module:TestWalk-v0")


def test_wrappers_with_statistics_that_the_set_does_not_hold_are_told(tmp_path):
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    normalised = gymnasium.wrappers.NormalizeObservation(env)
    with pytest.warns(UserWarning, match="has the wrapper NormalizeObservation, whose running statistics"):
        load_offline_dataset(collect(tmp_path / "first", normalised))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*statistics")
        load_offline_dataset(collect(tmp_path / "second", gymnasium.wrappers.RescaleAction(env, -1.0, 1.0)))


def test_a_wrapper_without_its_arguments_is_named():
    lost = {"name": "Mine", "entry_point": "gymnasium.wrappers:RescaleAction", "kwargs": None}
    with pytest.raises(InputError, match=r"Pendulum-v1.*Mine.*name it \(env="):
        make_env("Pendulum-v1", additional_wrappers=[lost])


def test_a_module_is_imported_for_an_environment_in_wrappers(walk):
    del sys.modules["walk_of_a_test"], gymnasium.registry["walks/NoLimit-v0"]
    wrapper = {
        "name": "",
        "entry_point": "gymnasium.wrappers:TransformReward",
        "kwargs": {"func": lambda reward: 2 * reward},
    }
    name = "walk_of_a_test:walks/NoLimit-v0"
    assert evaluate(push(3, 2), name, 1, max_episode_steps=4, additional_wrappers=[wrapper]).tolist() == [8]


def test_an_environment_without_a_step_limit_ends(walk):
    policy = push(3, 2)
    with pytest.raises(InputError, match=r"walks/NoLimit-v0.*1 of 1 episodes.*max_episode_steps"):
        evaluate(policy, "walks/NoLimit-v0", 1)
    assert evaluate(policy, "walks/NoLimit-v0", 2, max_episode_steps=4).tolist() == [4, 4]
    with BackgroundEvaluator() as evaluator:
        evaluator.submit(3, policy, "walks/NoLimit-v0", 1, entry_point="walk_of_a_test:Walk")
        with pytest.raises(InputError, match=r"evaluation 3: .*NoLimit-v0.*max_episode_steps"):
            evaluator.drain()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_policy_gets_observations_of_its_own_type(dtype):
    policy = push(3)
    expected = evaluate(policy, "Pendulum-v1", 1)
    torch.testing.assert_close(evaluate(policy.to(dtype), "Pendulum-v1", 1), expected, rtol=0.2, atol=0)


def test_a_failing_policy_is_not_said_to_have_the_wrong_size():
    mixed = push(3)
    mixed.module.append(nn.Linear(1, 1).double())
    with pytest.raises(InputError, match=r"size 3, float64 on cpu: .*dtype"):
        evaluate(mixed, "Pendulum-v1", 1)


SCRIPT = """
import torch
from tensordict.nn import TensorDictModule
from torchrl_spar import BackgroundEvaluator
policy = TensorDictModule(torch.nn.Linear(3, 1), ["observation"], ["action"])
with BackgroundEvaluator() as evaluator:
    evaluator.submit("first", policy, "Pendulum-v1", 1)
    evaluator.drain()
"""


def test_a_missing_guard_is_named(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "InputError" in last and 'if __name__ == "__main__":' in last
    assert done.stderr.count("Traceback") == 1 and "memory" not in done.stderr


def test_home_is_expanded_everywhere_alike_and_its_absence_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    loss = make_spar_loss(3, environment_sizes("Pendulum-v1")[1], hidden=[8])
    save_policy(loss, "~/policy.pt")
    assert (tmp_path / "policy.pt").is_file() and load_policy("~/policy.pt")[1] == {}
    with pytest.raises(InputError, match=r"~nobody_here/policy\.pt: there is no such home directory"):
        load_policy("~nobody_here/policy.pt")
    for source, options in (("~nobody_here/x.npz", {}), ("minari:a/b-v0", {"root": "~nobody_here/x"})):
        with pytest.raises(InputError, match="there is no such home directory"):
            load_offline_dataset(source, **options)


# --- D4RL's protocols -------------------------------------------------------------------------------


def adroit(task):
    pytest.importorskip("gymnasium_robotics")
    env_id = f"AdroitHand{task}-v1"
    return make_env(env_id), make_env(env_id, **d4rl_protocol(env_id))


# Where the observation holds the palm's offset from what it is to reach.
OFFSET = {"Door": slice(35, 38), "Relocate": slice(30, 33)}


@pytest.mark.parametrize("task", OFFSET)
def test_the_hands_distance_is_taken_from_the_reward(task):
    from importlib.metadata import version

    from torchrl_spar.evaluation.adroit import is_reversed

    if not is_reversed(version("gymnasium-robotics")):
        pytest.skip("this release of gymnasium-robotics has D4RL's sign")
    raw, fixed = adroit(task)
    actions = np.random.default_rng(0).uniform(-1, 1, (20, *raw.action_space.shape)).astype(np.float32)
    raw.reset(seed=1)
    fixed.reset(seed=1)
    for action in actions:
        observation, reward, *_ = raw.step(action)
        found, corrected, *_ = fixed.step(action)
        assert np.array_equal(found, observation)
        assert corrected - reward == pytest.approx(-0.2 * np.linalg.norm(observation[OFFSET[task]]), abs=1e-9)


def test_the_pens_episode_ends_at_the_drop_and_after_100_steps():
    raw, fixed = adroit("Pen")
    rng = np.random.default_rng(0)
    fixed.reset(seed=3)
    raw.reset(seed=3)
    for _ in range(100):
        action = rng.uniform(-1, 1, 24).astype(np.float32)
        _, reward, terminated, truncated, _ = fixed.step(action)
        assert raw.step(action)[1:4] == (reward, False, False)  # 1.4.2 never ends it
        height = fixed.unwrapped.data.body("Object").xpos[2]
        assert terminated == (height < 0.075)
        if terminated:
            break
    assert terminated and not truncated
    idle = TensorDictModule(lambda observation: observation[..., :24] * 0, ["observation"], ["action"])
    steps = []
    evaluate(idle, "AdroitHandPen-v1", 3, 0, on_step=lambda _: steps.append(1), **d4rl_protocol("AdroitHandPen-v1"))
    assert len(steps) <= 100


@pytest.mark.skipif(not (SHARED / "relocate-human-24.hdf5").exists(), reason="needs ../shared")
def test_relocates_correction_is_the_one_of_recorded_rewards():
    h5py = pytest.importorskip("h5py")
    with h5py.File(SHARED / "relocate-human-24.hdf5") as file:
        d4rl, robotics = file["rewards"][:], file["infos/reward_gymnasium_robotics_1_4_2"][:]
        offset = file["next_observations"][:, OFFSET["Relocate"]]
    np.testing.assert_allclose(d4rl - robotics, -0.2 * np.linalg.norm(offset, axis=1), atol=1e-4)


@pytest.mark.skipif(not (SHARED / "antmaze-umaze-diverse-regen.hdf5").exists(), reason="needs ../shared")
def test_antmazes_roll_outs_are_counted_between_timeouts():
    h5py = pytest.importorskip("h5py")
    path = SHARED / "antmaze-umaze-diverse-regen.hdf5"
    with h5py.File(path) as file:
        timeouts, rewards = file["timeouts"][:].astype(bool), file["rewards"][:]
    rollouts = np.split(rewards, np.flatnonzero(timeouts) + 1)
    successes = [rollout.max() for rollout in rollouts if len(rollout)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        returns = load_offline_dataset(path).episode_returns
    assert (returns > 0).tolist() == [success > 0 for success in successes]
    score = normalized_score("antmaze_d4rl:AntMazeD4RL-UMaze-v0", returns).mean().item()
    assert score == pytest.approx(100 * np.mean(successes)) == pytest.approx(19.87, abs=0.01)


@pytest.mark.skipif(not (SHARED / "pen-expert-regen.hdf5").exists(), reason="needs ../shared")
def test_the_pens_data_has_its_score_under_d4rls_protocol():
    data = load_offline_dataset(SHARED / "pen-expert-regen.hdf5")
    assert normalized_score("AdroitHandPen-v1", data.episode_returns).mean().item() == pytest.approx(90.5, abs=0.1)
    assert data[:]["episode"].bincount().max() <= d4rl_protocol("AdroitHandPen-v1")["max_episode_steps"]


def test_only_environments_that_are_known_get_arguments():
    for name in ("Hopper-v5", "antmaze_d4rl:AntMazeD4RL-UMaze-v0", "adroit_d4rl:d4rl/AdroitHandPen-v1", "MyKitchen-v0"):
        assert d4rl_protocol(name) == {}
    assert d4rl_protocol("AdroitHandDoor-v1")["max_episode_steps"] == 200
    assert d4rl_protocol("FrankaKitchen-v1")["remove_task_when_completed"]
