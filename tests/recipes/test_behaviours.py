"""The controller of PointMaze, in the environment itself, and the data set that is made with it."""

import json

import make_dataset
import numpy as np
import pytest
from behaviours.waypoints import WALL, WaypointController, distances
from helpers import compose_recipe
from make_dataset import on_leaves, successes

from torchrl_spar import load_offline_dataset, make_env

D4RL = {"position_gain": 10.0, "velocity_gain": 1.0, "noise": 0.5}


def test_distances_equal_relaxation_of_every_cell():
    rng = np.random.default_rng(0)
    for _ in range(10):
        maze = np.ones((7, 8), int)
        maze[1:-1, 1:-1] = rng.random((5, 6)) < 0.3
        free = [tuple(map(int, cell)) for cell in np.argwhere(maze == 0)]
        goal = free[rng.integers(len(free))]
        # Bellman and Ford: relaxed as often as there are cells.
        expected = {cell: 0.0 if cell == goal else np.inf for cell in free}
        for _ in free:
            for (row, column), (up, left) in (
                (a, b) for a in free for b in free if sum(np.abs(np.subtract(a, b))) == 1
            ):
                expected[row, column] = min(expected[row, column], expected[up, left] + 1)
        assert distances(maze.tolist(), goal) == {cell: n for cell, n in expected.items() if n < np.inf}


def test_letters_are_free_cells_and_there_is_no_diagonal():
    maze = [[1, 1, 1, 1], [1, "r", 1, 1], [1, 1, "g", 1], [1, 0, "c", 1], [1, 1, 1, 1]]
    assert distances(maze, (2, 2)) == {(2, 2): 0, (3, 2): 1, (3, 1): 2}


def run_episode(env, controller, seed):
    observation, _ = env.reset(seed=seed)
    goals, done, actions, inside = [], False, [], True
    while not done:
        actions.append(controller(observation))
        row, column = env.unwrapped.maze.cell_xy_to_rowcol(observation["achieved_goal"])
        inside &= env.unwrapped.maze.maze_map[row][column] != WALL
        observation, reward, terminated, truncated, info = env.step(actions[-1])
        goals.append(reward)
        assert info["success"] == (reward == 1)
        done = terminated or truncated
    assert inside
    return np.array(goals), np.array(actions)


@pytest.mark.parametrize("env_id", ["PointMaze_UMaze-v3", "PointMaze_Medium-v3", "PointMaze_Large-v3"])
def test_the_controller_reaches_every_goal_and_stays(env_id):
    pytest.importorskip("gymnasium_robotics")
    env = make_env(env_id)
    controller = WaypointController(env.unwrapped.maze, seed=0, **D4RL)
    for seed in range(8):
        goals, actions = run_episode(env, controller, seed)
        first = goals.argmax()
        assert goals[first] == 1 and goals[first:].mean() > 0.9
        assert actions.dtype == np.float32 and np.abs(actions).max() <= 1
    env.close()


def test_noise_comes_from_the_seed_alone():
    pytest.importorskip("gymnasium_robotics")
    env = make_env("PointMaze_UMaze-v3")
    first, same, other = (WaypointController(env.unwrapped.maze, seed=seed, **D4RL) for seed in (1, 1, 2))
    observation, _ = env.reset(seed=0)
    actions = [[controller(observation) for _ in range(5)] for controller in (first, same, other)]
    assert np.array_equal(actions[0], actions[1]) and not np.array_equal(actions[0], actions[2])
    still = WaypointController(env.unwrapped.maze, seed=1, **{**D4RL, "noise": 0.0})
    assert np.array_equal(still(observation), still(observation))
    env.close()


def test_a_pointmaze_set_is_what_the_environment_gives(tmp_path, monkeypatch):
    pytest.importorskip("gymnasium_robotics")
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", "")  # the recipe sets it; this sets it back
    options = ["env=PointMaze_UMaze-v3", "dataset=toy/pointmaze/umaze-v0", "steps=500", f"root={tmp_path}", "seed=3"]
    make_dataset.main(compose_recipe("make_dataset", *options))
    path = tmp_path / "toy" / "pointmaze" / "umaze-v0"
    dataset = minari.MinariDataset(path / "data")
    facts = json.loads(dataset.storage.metadata["description"])
    assert dataset.total_steps == 600 and dataset.env_spec.id == "PointMaze_UMaze-v3" and "normalized" not in facts
    # Played again, from the seeds and the recorded actions.
    env = make_env("PointMaze_UMaze-v3")
    for number, episode in enumerate(dataset.iterate_episodes()):
        observation, info = env.reset(seed=3 + 10_000 + number)
        for step, action in enumerate(episode.actions):
            for key, value in observation.items():
                assert np.array_equal(episode.observations[key][step], value.astype(np.float32))
            assert episode.infos["success"][step] == info["success"]
            observation, reward, terminated, truncated, info = env.step(action)
            assert (episode.rewards[step], episode.terminations[step]) == (reward, terminated)
        assert truncated and episode.truncations[-1] and episode.infos["success"][-1] == info["success"]
    env.close()
    buffer = load_offline_dataset(path, end_at_success=True)
    assert buffer[:]["observation"].shape == (600, 8) and buffer.env_id == "PointMaze_UMaze-v3"
    assert facts["return_mean"] == pytest.approx(buffer.episode_returns.mean().item())
    assert buffer[:]["next", "terminated"].sum() == buffer.episode_returns.sum() > 0


def test_observations_may_be_dictionaries_and_success_is_kept_where_it_is_told():
    nested = [{"b": {"c": np.full(2, i)}, "a": np.full(1, -i)} for i in range(3)]
    joined = on_leaves(lambda *rows: np.stack(rows), *nested)
    assert joined["b"]["c"].tolist() == [[0, 0], [1, 1], [2, 2]] and joined["a"].tolist() == [[0], [-1], [-2]]
    assert on_leaves(lambda *rows: np.stack(rows), np.zeros(2), np.ones(2)).tolist() == [[0, 0], [1, 1]]
    assert successes([{"success": False}, {"success": True}])["success"].tolist() == [False, True]
    assert successes([{"x_position": 1.0}, {"x_position": 2.0}]) is None
