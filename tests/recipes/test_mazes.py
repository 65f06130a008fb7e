"""Mazes: success as an end, against a slow loop; environments with arguments, from the data to the saved policy."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from helpers import compose_recipe
from minari.data_collector import EpisodeBuffer
from rivals.batches import add_next_actions, keep_best_episodes, transform_rewards
from test_data import ARRAYS, write, write_minari

from torchrl_spar import InputError, load_offline_dataset, returns_to_go
from torchrl_spar.data import readers

ID = "test/maze-v0"
SPACE = Dict(
    {"observation": Box(-9, 9, (3,), np.float64), **{f"{x}_goal": Box(-9, 9, (2,)) for x in ("achieved", "desired")}}
)
# Success at each step of five episodes: never, once, at the goal to the end, there and back, at the very end.
SUCCESSES = [[0, 0, 0, 0], [0, 1, 0], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0, 0], [0, 1]]


def maze_episode(success, seed, recorded="with reset", **changes):
    rng, steps = np.random.default_rng(seed), len(success)
    observations = {
        key: rng.normal(size=(steps + 1, *space.shape)).astype(space.dtype) for key, space in SPACE.spaces.items()
    }
    flags = np.array(success, bool)
    told = {"with reset": np.concatenate([[seed % 2 == 0], flags]), "steps alone": flags, None: None}[recorded]
    arrays = {
        "observations": observations, "actions": rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        "rewards": flags.astype(np.float64), "terminations": np.zeros(steps, bool),
        "truncations": np.arange(steps) == steps - 1,
        "infos": None if told is None else {"success": told, "position": rng.normal(size=(steps + 1, 2))},
    }  # fmt: skip
    return EpisodeBuffer(**{**arrays, **changes})


def write_maze(root, episodes, space=SPACE, bound=1, **options):
    return write_minari(root, episodes, space, Box(-bound, bound, (2,), np.float32), name=ID, **options)


def relabelled(episodes):
    """Rows as the field has them, one after the other: observation, next one, action, reward, terminated, done."""
    for number, data in enumerate(episodes):
        joined = np.concatenate([data.observations[key] for key in ("observation", "achieved_goal", "desired_goal")], 1)
        for step, success in enumerate(SUCCESSES[number]):
            reward = 0.0 if success else -1.0
            last = step == len(SUCCESSES[number]) - 1
            yield (
                joined[step],
                joined[step + 1],
                data.actions[step],
                reward,
                bool(success),
                bool(success) or last,
                number,
            )


@pytest.mark.parametrize("how", ["fast", "by Minari"])
@pytest.mark.parametrize("recorded", ["with reset", "steps alone", None])
def test_success_ends_and_costs_nothing(tmp_path, monkeypatch, recorded, how):
    if how == "by Minari":
        monkeypatch.setattr(readers, "_is_plain", lambda space: False)
    episodes = [maze_episode(success, seed, recorded) for seed, success in enumerate(SUCCESSES)]
    buffer = load_offline_dataset(write_maze(tmp_path, episodes), end_at_success=True)
    data, rows = buffer[:], list(relabelled(episodes))
    assert len(buffer) == len(rows) == sum(map(len, SUCCESSES))
    for row, (observation, following, action, reward, terminated, done, number) in zip(data, rows):
        assert np.array_equal(row["observation"], observation.astype(np.float32))
        assert np.array_equal(row["next", "observation"], following.astype(np.float32))
        assert np.array_equal(row["action"], action) and row["next", "reward"].item() == reward
        assert row["next", "terminated"].item() == terminated and row["next", "done"].item() == done
        assert row["episode"].item() == number
    # Returns are the environment's: how many steps were at the goal.
    assert buffer.episode_returns.tolist() == [float(sum(success)) for success in SUCCESSES]
    assert buffer.reward_shift == -1


def test_success_is_what_the_environment_says_before_what_it_pays(tmp_path):
    """Thresholds of the two differ between versions of gymnasium-robotics."""
    paid = maze_episode([0, 1, 0], 1, rewards=np.array([0.0, 1.0, 1.0]))
    data = load_offline_dataset(write_maze(tmp_path, [paid]), end_at_success=True)[:]
    assert data["next", "terminated"].flatten().tolist() == [False, True, False]
    assert data["next", "reward"].flatten().tolist() == [-1, 0, 0]


def test_without_the_option_nothing_changes(tmp_path):
    episodes = [maze_episode(success, seed) for seed, success in enumerate(SUCCESSES)]
    buffer = load_offline_dataset(write_maze(tmp_path, episodes))
    assert not buffer[:]["next", "terminated"].any() and buffer.reward_shift == 0
    assert buffer[:]["next", "reward"].flatten().tolist() == [float(x) for success in SUCCESSES for x in success]


def test_returns_to_go_stop_at_a_success(tmp_path):
    """The cost of the steps to the next success; after the last one the episode was cut off."""
    path = write_maze(tmp_path, [maze_episode(success, seed) for seed, success in enumerate(SUCCESSES)])
    found = returns_to_go(load_offline_dataset(path, end_at_success=True)[:], 0.9).flatten().tolist()
    row = 0
    for success in SUCCESSES:
        for step in range(len(success)):
            if 1 in success[step:]:
                left = success[step:].index(1)
                assert found[row] == pytest.approx(-(1 - 0.9**left) / (1 - 0.9), abs=1e-5)
            row += 1


def test_files_and_their_last_row(tmp_path):
    """A success at the file's end is terminal, so that its row is kept; elsewhere a reward of 1 is a success."""
    rewards = np.array([0, 1, 0, 0, 1, 0, 0, 1], np.float32)
    arrays = {**ARRAYS, "rewards": rewards, "terminals": np.zeros(8, bool), "timeouts": np.arange(8) == 4}
    path = write(tmp_path / "maze.npz", arrays)
    assert len(load_offline_dataset(path)) == 6  # rows 4 and 7 do not tell what came next
    buffer = load_offline_dataset(path, end_at_success=True)
    assert len(buffer) == 8 and buffer.episode_returns.tolist() == [2, 1]
    assert buffer[:]["next", "terminated"].flatten().tolist() == (rewards == 1).tolist()
    assert buffer[:]["next", "reward"].flatten().tolist() == (rewards - 1).tolist()
    assert buffer[:]["next", "truncated"].flatten().tolist() == arrays["timeouts"].tolist()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rewards": np.array([0.0, 0.5, 1.0])}, r"end_at_success: 1 rewards are .* first in row 1 is 0.5"),
        ({"infos": {"success": np.zeros(2, bool)}}, r"episode 0 has 3 rewards and 2 infos\['success'\]"),
        ({"infos": {"success": np.array([0.0, 0.3, 1.0])}}, r"success: 1 values are neither 0 nor 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_relabelled_is_named(tmp_path, changes, message):
    path = write_maze(tmp_path, [maze_episode([0, 1, 0], 0, **changes)])
    with pytest.raises(InputError, match=message) as caught:
        load_offline_dataset(path, end_at_success=True)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    load_offline_dataset(path)  # without the option it is a data set as any other


def test_episodes_with_and_without_success_are_refused(tmp_path):
    path = write_maze(tmp_path, [maze_episode([0, 1], 0), maze_episode([0, 1], 1, recorded=None)])
    with pytest.raises(InputError, match=r"episode 1 has 2 rewards and no infos\['success'\]"):
        load_offline_dataset(path, end_at_success=True)


def test_rivals_rewards_are_made_from_the_sources(tmp_path):
    """IQL's -1 on antmaze is not taken twice, CQL's 10 r - 5 is the source's r; other methods' data stay shifted."""
    path = write_maze(tmp_path, [maze_episode(success, seed) for seed, success in enumerate(SUCCESSES)])
    plain, ended = load_offline_dataset(path), load_offline_dataset(path, end_at_success=True)
    for options in ({"shift": -1.0}, {"scale": 10.0, "shift": -5.0}, {"by_return_range": True}):
        found, expected = (transform_rewards(data, **options)[:]["next", "reward"] for data in (ended, plain))
        torch.testing.assert_close(found, expected)
    assert transform_rewards(ended) is ended
    assert set(keep_best_episodes(ended, 0.4)[:]["episode"].tolist()) == {2, 3}  # 3 steps at the goal each
    assert keep_best_episodes(ended, 0.4).reward_shift == add_next_actions(ended).reward_shift == -1


# --- environments with arguments ----------------------------------------------------------------


class Corridor(gymnasium.Env):
    """Five steps that pay `pay`, whatever is done."""

    observation_space = SPACE
    action_space = Box(-1, 1, (2,), np.float32)

    def __init__(self, pay=1.0, halls=((0, 1), (1, 0)), continuing_task=True, render_mode=None):
        self.pay, self.continuing_task, self.halls = pay, continuing_task, halls

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now = 0
        return {key: space.low for key, space in SPACE.spaces.items()}, {}

    def step(self, action):
        self.now += 1
        ended = not self.continuing_task and self.now == 2
        return {key: space.low for key, space in SPACE.spaces.items()}, self.pay, ended, self.now == 5, {}


CORRIDOR = {"entry_point": f"{__name__}:Corridor"}  # a name, as Minari keeps it in its JSON
gymnasium.register("Corridor-v0", **CORRIDOR)


def make_set(root, **options):
    return write_maze(root, [maze_episode(success, seed) for seed, success in enumerate(SUCCESSES)], **options)


def test_arguments_are_those_of_evaluation_else_of_the_collection(tmp_path):
    collected = gymnasium.make("Corridor-v0", pay=3.0, halls=[[1, "g"], [0, 1]])
    meant = gymnasium.make("Corridor-v0", pay=7.0)
    plain = load_offline_dataset(make_set(tmp_path / "a", env=collected))
    assert (plain.env_id, plain.env_kwargs) == ("Corridor-v0", {"pay": 3.0, "halls": [[1, "g"], [0, 1]], **CORRIDOR})
    buffer = load_offline_dataset(make_set(tmp_path / "b", env=collected, eval_env=meant))
    assert (buffer.env_id, buffer.env_kwargs) == ("Corridor-v0", {"pay": 7.0, **CORRIDOR})
    assert load_offline_dataset(make_set(tmp_path / "c")).env_kwargs == {}


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], 5 * 3),
        (["env_kwargs={pay:2}"], 5 * 2),
        (["env_kwargs={continuing_task:false}"], 2 * 3),
        (["env=Corridor-v0", "end_at_success=true"], 5 * 3),
        (["env=Corridor-v1"], 5 * 1),  # another environment: nothing of the data's
    ],
)
def test_a_run_its_policy_and_the_evaluate_recipe_use_the_arguments(tmp_path, monkeypatch, capsys, options, expected):
    import evaluate
    import spar_d4rl

    monkeypatch.setitem(gymnasium.registry, "Corridor-v1", gymnasium.spec("Corridor-v0"))
    path = make_set(tmp_path, env=gymnasium.make("Corridor-v0", pay=3.0))
    tiny = ["preset=smoke", "anchor.steps=2", "vae.steps=2", "critics.steps=2", "spar.updates=2", "eval.interval=2"]
    tiny += ["spar.loss.hidden=[8]", "logger.interval=2", "eval.background=false", "batch_size=4"]
    cfg = compose_recipe("spar_d4rl", f"dataset={path}", f"out={tmp_path / 'out'}", *tiny, *options)
    spar_d4rl.main(cfg)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = [results["anchor"], results["spar"], *results["curve"]]
    assert [row["return_mean"] for row in found] == [expected] * 4
    assert results["data"]["return_mean"] == 8 / 5  # steps at the goal, also where rewards were shifted
    capsys.readouterr()
    evaluate.main(compose_recipe("evaluate", f"policy={tmp_path / 'out' / 'policy.pt'}", "episodes=2"))
    assert f"return {expected:.1f} +-" in capsys.readouterr().out
    changed = ["env_kwargs={pay:4,continuing_task:true}", "episodes=1"]
    evaluate.main(compose_recipe("evaluate", f"policy={tmp_path / 'out' / 'policy.pt'}", *changed))
    assert "return 20.0 +-" in capsys.readouterr().out


def test_wrong_arguments_are_named(tmp_path):
    from harness.environment import load

    path = make_set(tmp_path, env=gymnasium.make("Corridor-v0"))
    dense = f"dataset={write(tmp_path / 'dense.npz', ARRAYS)}"
    for options, message in (
        (["env_kwargs={colour:red}"], r"Corridor-v0.*env_kwargs=.*colour"),
        (["env_kwargs=3"], r"env_kwargs=3: must be names and values"),
        ([dense, "end_at_success=true"], r"dense.npz: end_at_success: 7 rewards"),
    ):
        cfg = compose_recipe("spar_d4rl", f"dataset={path}", "out=x", *options)
        with pytest.raises(InputError, match=message):
            load(cfg, torch.device("cpu"))


def test_the_kitchens_tasks_are_the_data_sets(tmp_path):
    """Its observation has two entries a task, so that the wrong tasks do not fit; a preset adds how tasks count."""
    pytest.importorskip("gymnasium_robotics")
    from harness.environment import load

    from torchrl_spar import make_env

    tasks = ["microwave", "kettle"]
    env = make_env("FrankaKitchen-v1", tasks_to_complete=tasks, remove_task_when_completed=False)
    observation, _ = env.reset(seed=0)

    def stack(value):
        return {key: stack(x) for key, x in value.items()} if isinstance(value, dict) else np.stack([value, value])

    row = EpisodeBuffer(
        observations=stack(observation), actions=np.full((1, 9), 0.5, np.float32), rewards=np.zeros(1),
        terminations=np.zeros(1, bool), truncations=np.ones(1, bool),
    )  # fmt: skip
    write_minari(tmp_path, [row], None, Box(-1, 1, (9,), np.float32), name=ID, env=env)
    env.close()
    options = [f"dataset={tmp_path / ID}", "out=x"]
    data, env_id, kwargs = load(compose_recipe("spar_d4rl", *options, "preset=kitchen"), torch.device("cpu"))
    assert data.observation_loc.numel() == 59 + 2 * (1 + 7) and env_id == "FrankaKitchen-v1"
    assert kwargs["tasks_to_complete"] == tasks and kwargs["remove_task_when_completed"]
    assert not data.env_kwargs["remove_task_when_completed"]
    with pytest.raises(InputError, match="observations have size 75, env=FrankaKitchen-v1 has"):
        load(compose_recipe("spar_d4rl", *options, "env_kwargs={tasks_to_complete:[kettle]}"), torch.device("cpu"))
