"""The loader against slow references that read the same files another way."""

import json
import os
import pickle
import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from minari.data_collector import EpisodeBuffer
from tensordict import TensorDict
from torchrl.data import Bounded, SliceSampler, Unbounded

from torchrl_spar.data import readers
from torchrl_spar.data.buffer import load_offline_dataset
from torchrl_spar.errors import InputError

DATASETS = Path(__file__).resolve().parents[3] / "shared" / "datasets"
LEAVES = {
    "observation": torch.float32, "action": torch.float32, "episode": torch.int64,
    "done": torch.bool, "terminated": torch.bool, "truncated": torch.bool,
    ("next", "observation"): torch.float32, ("next", "reward"): torch.float32,
    ("next", "done"): torch.bool, ("next", "terminated"): torch.bool, ("next", "truncated"): torch.bool,
}  # fmt: skip

# Eight steps: a terminal (2), a timeout (4), both at once (5), and a last row that is neither (7).
ARRAYS = {
    "observations": np.array([[i + 1, 10 * (i + 1)] for i in range(8)], np.float32),
    "actions": np.array([-1, -0.75, -0.5, -0.25, 0, 0.5, 0.75, 1], np.float32)[:, None],
    "rewards": np.array([1, 2, 4, 8, 16, 32, 64, 128], np.float32),
    "terminals": np.array([0, 0, 1, 0, 0, 1, 0, 0], bool),
    "timeouts": np.array([0, 0, 0, 0, 1, 1, 0, 0], bool),
}


def write(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file[key] = array
    return path


def without(key):
    return {name: array for name, array in ARRAYS.items() if name != key}


def changed(key, row, value):
    array = ARRAYS[key].astype(float)
    array[row] = value
    return {**ARRAYS, key: array}


def assert_same(left, right):
    for key in LEAVES:
        assert torch.equal(left[key], right[key]), key


def random_arrays(n=1000, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(n, 3)),
        "actions": rng.uniform(-1, 1, size=(n, 2)),
        "rewards": rng.normal(size=n),
        "terminals": rng.random(n) < 0.1,
        "timeouts": rng.random(n) < 0.1,
    }


# --- D4RL's arrays ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".hdf5", ".h5", ".npz"])
def test_file_rows_by_hand(tmp_path, suffix):
    buffer = load_offline_dataset(write(tmp_path / f"toy{suffix}", ARRAYS))
    data = buffer[:]
    assert len(buffer) == 6 and data.batch_size == torch.Size([6])
    assert data["observation"][:, 0].tolist() == [1, 2, 3, 4, 6, 7]
    assert data["observation"][:, 1].tolist() == [10, 20, 30, 40, 60, 70]
    # the terminal rows stand in for themselves; rows 4 (timeout) and 7 (end of file) are gone
    assert data["next", "observation"][:, 0].tolist() == [2, 3, 3, 5, 6, 8]
    assert data["action"].tolist() == [[-1], [-0.75], [-0.5], [-0.25], [0.5], [0.75]]
    assert data["next", "reward"].tolist() == [[1], [2], [4], [8], [32], [64]]
    assert data["next", "terminated"].flatten().tolist() == [False, False, True, False, True, False]
    assert data["next", "truncated"].flatten().tolist() == [False, False, False, False, True, False]
    assert data["next", "done"].flatten().tolist() == [False, False, True, False, True, False]
    assert data["episode"].tolist() == [0, 0, 0, 1, 2, 3]
    assert buffer.episode_returns.tolist() == [7, 24, 32, 192]
    assert buffer.episode_returns.dtype == torch.float64
    for flag in ("done", "terminated", "truncated"):
        assert not data[flag].any()
    assert {key: data[key].dtype for key in data.keys(True, True)} == LEAVES
    assert all(data[key].shape == (6, 1) for key in LEAVES if LEAVES[key] == torch.bool)
    assert buffer.name == str(tmp_path / f"toy{suffix}") and buffer.env_id is None


def test_next_observations_of_the_file_are_used_and_nothing_is_dropped(tmp_path):
    following = ARRAYS["observations"] + 0.5
    data = load_offline_dataset(write(tmp_path / "toy.hdf5", {**ARRAYS, "next_observations": following}))[:]
    assert torch.equal(data["next", "observation"], torch.from_numpy(following))
    assert torch.equal(data["next", "truncated"].flatten(), torch.from_numpy(ARRAYS["timeouts"]))
    assert torch.equal(data["next", "terminated"].flatten(), torch.from_numpy(ARRAYS["terminals"]))
    assert data["episode"].tolist() == [0, 0, 0, 1, 1, 2, 3, 3]


def test_random_file_against_a_loop(tmp_path):
    arrays = random_arrays()
    buffer = load_offline_dataset(write(tmp_path / "toy.npz", arrays))
    rows, returns, episode = [], [0.0], 0
    for i in range(1000):
        terminal, timeout = arrays["terminals"][i], arrays["timeouts"][i]
        returns[-1] += arrays["rewards"][i]
        if terminal or (not timeout and i < 999):
            following = arrays["observations"][i if terminal else i + 1]
            rows.append((i, episode, following, terminal, timeout))
        if (terminal or timeout) and i < 999:
            episode += 1
            returns.append(0.0)
    index, episodes, following, terminated, truncated = map(np.array, zip(*rows))
    data = buffer[:]
    assert len(buffer) == len(index) < 1000
    np.testing.assert_array_equal(data["observation"], arrays["observations"][index].astype(np.float32))
    np.testing.assert_array_equal(data["action"], arrays["actions"][index].astype(np.float32))
    np.testing.assert_array_equal(data["next", "reward"][:, 0], arrays["rewards"][index].astype(np.float32))
    np.testing.assert_array_equal(data["next", "observation"], following.astype(np.float32))
    np.testing.assert_array_equal(data["next", "terminated"][:, 0], terminated)
    np.testing.assert_array_equal(data["next", "truncated"][:, 0], truncated)
    np.testing.assert_array_equal(data["next", "done"][:, 0], terminated | truncated)
    np.testing.assert_array_equal(data["episode"], episodes)
    np.testing.assert_allclose(buffer.episode_returns, returns, rtol=1e-12)


@pytest.mark.parametrize(
    "arrays",
    [
        {**without("terminals"), "terminations": ARRAYS["terminals"]},
        {**without("timeouts"), "truncations": ARRAYS["timeouts"]},
        {**ARRAYS, "rewards": ARRAYS["rewards"][:, None], "timeouts": ARRAYS["timeouts"][:, None]},
        {**ARRAYS, "terminals": ARRAYS["terminals"].astype(np.uint8), "timeouts": ARRAYS["timeouts"].astype(float)},
        {**ARRAYS, "observations": ARRAYS["observations"].astype(np.float64)},
        {**ARRAYS, "rewards": ARRAYS["rewards"].astype(np.float16)},
    ],
    ids=["terminations", "truncations", "columns", "number flags", "float64", "float16"],
)
def test_other_spellings_shapes_and_types_mean_the_same(tmp_path, arrays):
    expected = load_offline_dataset(write(tmp_path / "plain.npz", ARRAYS))
    got = load_offline_dataset(write(tmp_path / "other.npz", arrays))
    assert_same(got[:], expected[:])
    assert torch.equal(got.episode_returns, expected.episode_returns)


def test_float16_actions_become_the_nearest_float32(tmp_path):
    actions = (0.9 * ARRAYS["actions"]).astype(np.float16)
    data = load_offline_dataset(write(tmp_path / "toy.npz", {**ARRAYS, "actions": actions}))[:]
    assert data["action"].dtype == torch.float32
    assert data["action"].flatten().tolist() == actions.astype(float)[[0, 1, 2, 3, 5, 6], 0].tolist()


def test_returns_keep_the_source_precision(tmp_path):
    rewards = np.array([1e8, 1, -1e8, 0, 0, 0, 0, 0])  # in float32 the 1 would be lost
    buffer = load_offline_dataset(write(tmp_path / "toy.npz", {**ARRAYS, "rewards": rewards}))
    assert buffer.episode_returns[0] == 1


def test_no_timeouts_ends_episodes_at_terminals_and_warns(tmp_path):
    path = write(tmp_path / "toy.npz", without("timeouts"))
    with pytest.warns(UserWarning, match="toy.npz: no 'timeouts'"):
        data = load_offline_dataset(path)[:]
    assert data["episode"].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert not data["next", "truncated"].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_offline_dataset(write(path, {**without("timeouts"), "next_observations": ARRAYS["observations"]}))


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize(
    "arrays, message",
    [
        (without("actions"), r"no array 'actions'; there are: observations, rewards, terminals, timeouts"),
        (without("terminals"), r"no array 'terminals' or 'terminations'; there are: .*observations"),
        (changed("observations", 3, np.nan), r"observations: 2 values are NaN or infinite .* first in row 3"),
        (changed("actions", 5, np.inf), r"actions: 1 values are NaN .* first in row 5"),
        (changed("rewards", 2, -np.inf), r"rewards: 1 values .* first in row 2"),
        (changed("rewards", 6, 1e39), r"rewards: 1 values are NaN or infinite or beyond .*, the first in row 6"),
        (changed("timeouts", 1, np.nan), r"timeouts: 1 values .* first in row 1"),
        (changed("terminals", 4, 2), r"terminals: 1 values are neither 0 nor 1, the first in row 4"),
        ({**ARRAYS, "next_observations": np.full((8, 2), np.nan)}, r"next_observations: 16 values .* row 0"),
        ({**ARRAYS, "rewards": ARRAYS["rewards"][:7]}, r"different lengths: observations 8, .*rewards 7"),
        ({**ARRAYS, "next_observations": np.ones((8, 3))}, r"observations: 2 dimensions, next_observations: 3"),
        ({**ARRAYS, "observations": np.ones(8)}, r"observations: shape \(8,\)"),
        ({**ARRAYS, "observations": np.ones((8, 4, 4))}, r"observations: shape \(8, 4, 4\)"),
        ({**ARRAYS, "actions": np.ones((8, 0))}, r"actions: shape \(8, 0\)"),
        ({**ARRAYS, "rewards": np.ones((8, 2))}, r"rewards: shape \(8, 2\)"),
        ({**ARRAYS, "actions": np.ones((8, 1), int)}, r"actions: type int64; SPAR needs continuous"),
        ({**ARRAYS, "observations": np.full((8, 2), b"x")}, r"observations: type .*expected numbers"),
        ({**ARRAYS, "observations": np.zeros((8, 2))}, r"observations: all 8 rows .*MinariExperienceReplay"),
        ({**ARRAYS, "actions": np.zeros((8, 1))}, r"actions: all 8 rows are exactly zero.*load_offline_dataset"),
        ({key: array[:0] for key, array in ARRAYS.items()}, r"holds no step"),
        ({key: array[:1] for key, array in ARRAYS.items()}, r"no row is left"),
        (changed("actions", 3, -1.25), r"1 of 8 actions .* row 3: component 0 is -1.25, its bounds are -1 to 1"),
    ],
)
def test_bad_arrays(tmp_path, suffix, arrays, message):
    path = write(tmp_path / f"bad{suffix}", arrays)
    with pytest.raises(InputError, match=message) as caught:
        load_offline_dataset(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_missing_and_damaged_files(tmp_path, suffix):
    path = tmp_path / f"toy{suffix}"
    with pytest.raises(InputError, match=f"toy{suffix}: no such file"):
        load_offline_dataset(path)
    content = write(path, random_arrays()).read_bytes()
    for damaged in (content[: len(content) // 2], b"not a data set", b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"toy{suffix}: cannot be read"):
            load_offline_dataset(path)


def test_hdf5_groups_are_no_arrays(tmp_path):
    path = write(tmp_path / "toy.hdf5", {**without("observations"), "observations/goal": np.ones((8, 2))})
    with pytest.raises(InputError, match=r"no array 'observations'; there are: .*observations/"):
        load_offline_dataset(path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("how", ["object array", "pickle"])
def test_npz_never_unpickles(tmp_path, how):
    path, mark = tmp_path / "toy.npz", tmp_path / "executed"
    bomb = np.array([Bomb(mark)] * 8, dtype=object)
    if how == "object array":
        write(path, {**ARRAYS, "rewards": bomb})
    else:
        path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(InputError, match=r"toy.npz: cannot be read"):
        load_offline_dataset(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "source, message",
    [
        ("d4rl:hopper-medium-v2", r"d4rl:hopper-medium-v2: .*give the path of the data set's .hdf5 file"),
        ("hopper-medium-v2", r"hopper-medium-v2: .*Accepted are 'minari:<id>'.*TensorDict"),
        (3, r"int: .*Accepted are 'minari:<id>'"),
        (None, r"NoneType: .*Accepted are 'minari:<id>'"),
    ],
)
def test_unknown_sources(source, message):
    with pytest.raises(InputError, match=message):
        load_offline_dataset(source)


# --- Minari -------------------------------------------------------------------------------------

ID = "test/toy-v0"
OBSERVATIONS = Box(-np.inf, np.inf, (3,), np.float64)
ACTIONS = Box(-2, 2, (2,), np.float32)


def episode(length, terminated=False, truncated=False, seed=0, observations=None, actions=None):
    rng = np.random.default_rng(seed)
    flags = np.zeros((2, length), bool)
    flags[:, -1] = terminated, truncated
    return EpisodeBuffer(
        observations=rng.normal(size=(length + 1, 3)) if observations is None else observations,
        actions=rng.uniform(-2, 2, size=(length, 2)).astype(np.float32) if actions is None else actions,
        rewards=rng.normal(size=length),
        terminations=flags[0],
        truncations=flags[1],
    )


def write_minari(root, episodes, observation_space=OBSERVATIONS, action_space=ACTIONS, *, name=ID, **options):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an author and a description
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        minari.create_dataset_from_buffers(
            name, episodes, observation_space=observation_space, action_space=action_space, **options
        )
    return root / name


EPISODES = [
    episode(4, terminated=True, seed=1),
    episode(1, truncated=True, seed=2),
    episode(3, terminated=True, truncated=True, seed=3),
    episode(2, seed=4),
]


def assert_equals_hdf5(buffer, path):
    """Episode by episode against the file, read without Minari."""
    data, row = buffer[:], 0
    with h5py.File(path, "r") as file:
        for i in range(len(file)):
            group = {key: file[f"episode_{i}"][key][()] for key in file[f"episode_{i}"] if key != "infos"}
            steps = len(group["rewards"])
            part = data[row : row + steps]
            observations = group["observations"].astype(np.float32)
            np.testing.assert_array_equal(part["observation"], observations[:-1])
            np.testing.assert_array_equal(part["next", "observation"], observations[1:])
            np.testing.assert_array_equal(part["action"], group["actions"])
            np.testing.assert_array_equal(part["next", "reward"][:, 0], group["rewards"].astype(np.float32))
            np.testing.assert_array_equal(part["next", "terminated"][:, 0], group["terminations"])
            np.testing.assert_array_equal(part["next", "truncated"][:, 0], group["truncations"])
            np.testing.assert_array_equal(part["next", "done"][:, 0], group["terminations"] | group["truncations"])
            assert (part["episode"] == i).all()
            np.testing.assert_allclose(buffer.episode_returns[i], group["rewards"].astype(float).sum(), rtol=1e-9)
            row += steps
        assert row == len(buffer) and len(buffer.episode_returns) == len(file)


def test_whole_numbers_of_minari_keep_their_values(tmp_path):
    counts = 100_000_000 + np.random.default_rng(0).integers(-50, 50, (5, 3)).astype(np.int32)
    space = Box(0, 2**31 - 1, (3,), np.int32)
    write_minari(tmp_path, [episode(4, observations=counts)], observation_space=space)
    buffer = load_offline_dataset(f"minari:{ID}", root=tmp_path)
    assert np.array_equal(buffer[:]["observation"].numpy(), counts[:-1])
    np.testing.assert_allclose(buffer.observation_scale, counts[:-1].std(0), rtol=1e-6)


def test_minari_equals_the_file(tmp_path, monkeypatch):
    path = write_minari(tmp_path, EPISODES)
    by_root = load_offline_dataset(f"minari:{ID}", root=tmp_path)
    assert len(by_root) == 10
    assert_equals_hdf5(by_root, path / "data" / "main_data.hdf5")
    assert set(by_root[:].keys(True, True)) == LEAVES.keys()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert_same(load_offline_dataset(f"minari:{ID}")[:], by_root[:])
    assert_same(load_offline_dataset(str(path))[:], by_root[:])


def test_minari_metadata(tmp_path):
    path = write_minari(tmp_path, EPISODES, env="Pendulum-v1")
    buffer = load_offline_dataset(path)
    assert buffer.env_id == "Pendulum-v1"
    assert buffer.action_spec == Bounded(-2, 2, (2,), dtype=torch.float32)
    assert load_offline_dataset(f"minari:{ID}", root=tmp_path).name == f"minari:{ID}"


def test_minari_without_environment(tmp_path):
    assert load_offline_dataset(write_minari(tmp_path, EPISODES)).env_id is None


def test_minari_dictionaries_in_the_documented_order(tmp_path):
    parts = {"goal": np.full((3, 2), 2.0), "observation": np.arange(9.0).reshape(3, 3), "achieved": np.ones((3, 1))}
    space = Dict({key: Box(-np.inf, np.inf, part.shape[1:], np.float64) for key, part in parts.items()})
    data = load_offline_dataset(write_minari(tmp_path, [episode(2, True, observations=parts)], space))[:]
    assert data["observation"].tolist() == [[0, 1, 2, 1, 2, 2], [3, 4, 5, 1, 2, 2]]
    assert data["next", "observation"].tolist() == [[3, 4, 5, 1, 2, 2], [6, 7, 8, 1, 2, 2]]


def edit(path, index, **arrays):
    """Replaces arrays of a written episode, or the first rows of them where a number is given."""
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        group = file[f"episode_{index}"]
        for key, value in arrays.items():
            kept = group[key][:value] if isinstance(value, int) else value
            del group[key]
            group[key] = kept


def test_minari_episodes_without_a_step_are_skipped(tmp_path):
    path = write_minari(tmp_path, EPISODES)
    edit(path, 1, observations=1, actions=0, rewards=0, terminations=0, truncations=0)
    buffer = load_offline_dataset(path)
    assert buffer[:]["episode"].tolist() == [0] * 4 + [1] * 3 + [2] * 2
    np.testing.assert_allclose(buffer.episode_returns[1], EPISODES[2].rewards.sum())


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"observations": 3}, r"episode 2 has 3 rewards and 3 observations, not 4"),
        ({"actions": 2}, r"episode 2 has 3 rewards and 2 actions, not 3"),
        ({"rewards": 0, "observations": 1}, r"episode 2 has 0 rewards and 3 actions, not 0"),
        ({"terminations": 1}, r"episode 2 has 3 rewards and 1 terminations"),
        ({"observations": np.full((4, 3), np.nan)}, r"observations: 9 values are NaN .* first in row 5"),
        ({"observations": np.full((4, 3), 1e300)}, r"observations: 9 values are NaN or infinite or beyond"),
        ({"observations": np.full((4, 2), 1.0)}, r"cannot be read"),
        ({"observations": np.array([[0.0] * 3] * 3 + [[np.inf] * 3])}, r"observations \(as next\): 3 values .* row 7"),
        ({"actions": np.full((3, 2), 2.5)}, r"3 of 10 actions leave their bounds, the first in row 5: .* 2.5"),
    ],
)
def test_bad_minari_episodes(tmp_path, arrays, message):
    path = write_minari(tmp_path, EPISODES)
    edit(path, 2, **arrays)
    with pytest.raises(InputError, match=message) as caught:
        load_offline_dataset(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_minari_needs_continuous_bounded_actions(tmp_path):
    discrete = episode(3, True, actions=np.ones(3, np.int64))
    path = write_minari(tmp_path / "discrete", [discrete], action_space=Discrete(3))
    with pytest.raises(InputError, match=r"Discrete\(3\); SPAR needs continuous actions"):
        load_offline_dataset(path)
    path = write_minari(tmp_path / "open", EPISODES, action_space=Box(-np.inf, np.inf, (2,), np.float32))
    with pytest.raises(InputError, match=r"no finite bounds .*: give them as action_spec"):
        load_offline_dataset(path)
    assert load_offline_dataset(path, action_spec=Bounded(-2, 2, (2,))).action_spec.space.high.tolist() == [2, 2]


def test_damaged_minari_sets(tmp_path):
    path = write_minari(tmp_path, EPISODES)
    main, metadata = path / "data" / "main_data.hdf5", path / "data" / "metadata.json"
    content, text = main.read_bytes(), metadata.read_text()
    main.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        load_offline_dataset(path)
    main.write_bytes(content)
    for broken in (text[:100], json.dumps({**json.loads(text), "total_episodes": 9})):
        metadata.write_text(broken)
        with pytest.raises(InputError, match="cannot be read"):
            load_offline_dataset(path)
    metadata.write_text(json.dumps({**json.loads(text), "total_episodes": 0}))
    with pytest.raises(InputError, match="holds no step"):
        load_offline_dataset(path)
    metadata.unlink()
    with pytest.raises(InputError, match=r"it holds no data/metadata.json, which Minari has written since 0.5"):
        load_offline_dataset(path)
    main.unlink()
    with pytest.raises(InputError, match=r"no Minari data set: it holds no data/metadata.json"):
        load_offline_dataset(path)


def test_minari_download_goes_to_the_root(tmp_path, monkeypatch):
    remote = write_minari(tmp_path / "remote", EPISODES)

    def download(dataset_id):
        shutil.copytree(remote, Path(os.environ["MINARI_DATASETS_PATH"]) / dataset_id)

    monkeypatch.setattr(minari, "download_dataset", download)
    monkeypatch.setenv("MINARI_DATASETS_PATH", "elsewhere")
    assert len(load_offline_dataset(f"minari:{ID}", root=tmp_path / "local")) == 10
    assert os.environ["MINARI_DATASETS_PATH"] == "elsewhere"
    assert (tmp_path / "local" / ID).is_dir()

    monkeypatch.setattr(minari, "download_dataset", None)  # a second load may not download
    assert len(load_offline_dataset(f"minari:{ID}", root=tmp_path / "local")) == 10


def test_minari_download_failure_says_what_to_do(tmp_path, monkeypatch):
    def download(dataset_id):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(minari, "download_dataset", download)
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    with pytest.raises(InputError, match=f"minari:{ID}: not found under .*no route") as caught:
        load_offline_dataset(f"minari:{ID}", root=tmp_path)
    message = str(caught.value)
    assert f"`minari download {ID}`" in message and "MINARI_DATASETS_PATH" in message and "local file" in message
    assert "\n" not in message
    assert "MINARI_DATASETS_PATH" not in os.environ


def test_h5py_and_minari_are_optional(tmp_path, monkeypatch):
    hdf5, npz = write(tmp_path / "toy.hdf5", ARRAYS), write(tmp_path / "toy.npz", ARRAYS)
    directory = write_minari(tmp_path, EPISODES)
    for module in ("h5py", "minari"):
        monkeypatch.setitem(sys.modules, module, None)
    runpy.run_path(readers.__file__)  # imports neither
    assert len(load_offline_dataset(npz)) == 6
    with pytest.raises(InputError, match=re.escape("needs h5py: pip install 'torchrl-spar[recipes]'")):
        load_offline_dataset(hdf5)
    for source in (directory, f"minari:{ID}"):
        with pytest.raises(InputError, match=re.escape("needs minari: pip install 'torchrl-spar[recipes]'")):
            load_offline_dataset(source)


# --- TensorDicts --------------------------------------------------------------------------------


def ted(**changes):
    data = TensorDict(
        {
            "observation": torch.arange(1.0, 13).view(6, 2),
            "action": torch.linspace(-1, 1, 6)[:, None],
            "next": {
                "observation": torch.arange(3.0, 15).view(6, 2),
                "reward": torch.ones(6, 1),
                "terminated": torch.tensor([0, 0, 1, 0, 0, 0]).bool()[:, None],
            },
        },
        [6],
    )
    for key, value in changes.items():
        key = tuple(key.split("__"))
        data = data.exclude(key) if value is None else data.set(key, value)
    return data


def test_tensordict_keeps_every_row():
    source = ted()
    buffer = load_offline_dataset(source)
    data = buffer[:]
    assert buffer.name == "TensorDict"
    for key in source.keys(True, True):
        assert torch.equal(data[key], source[key]), key
    assert data["episode"].tolist() == [0, 0, 0, 1, 1, 1]
    assert not data["next", "truncated"].any()
    assert torch.equal(data["next", "done"], data["next", "terminated"])
    source["observation"].zero_()
    assert data["observation"].all()  # the buffer has its own memory


def test_tensordict_done_that_is_not_terminated_is_truncated():
    done = torch.tensor([0, 0, 1, 0, 1, 0]).bool()[:, None]
    data = load_offline_dataset(ted(next__done=done))[:]
    assert data["next", "truncated"].flatten().tolist() == [False, False, False, False, True, False]
    assert torch.equal(data["next", "done"], done)
    assert data["episode"].tolist() == [0, 0, 0, 1, 1, 2]
    truncated = torch.tensor([0, 0, 1, 0, 0, 0]).bool()[:, None]
    data = load_offline_dataset(ted(next__truncated=truncated))[:]
    assert torch.equal(data["next", "truncated"], truncated)
    assert torch.equal(data["next", "terminated"], truncated)


def test_tensordict_trajectories_end_with_the_batch_and_the_episode_key():
    data = load_offline_dataset(ted().unflatten(0, (3, 2)))[:]
    assert data.shape == (6,)
    assert torch.equal(data["observation"], ted()["observation"])
    assert data["episode"].tolist() == [0, 0, 1, 2, 3, 3]
    data = load_offline_dataset(ted(episode=torch.tensor([7, 9, 9, 9, 9, 2])))[:]
    assert data["episode"].tolist() == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    "source, message",
    [
        (ted(next__reward=None), r"no array \('next', 'reward'\); there are: .*'terminated'"),
        (ted(next__observation=None), r"no array \('next', 'observation'\)"),
        (ted(observation=TensorDict({"a": torch.ones(6, 1)}, [6])), r"'observation' is a TensorDict, not a tensor"),
        (ted(action=torch.ones(6, 1).long()), r"'action': type int64; SPAR needs continuous"),
        (ted(next__reward=torch.full((6, 1), torch.nan)), r"\('next', 'reward'\): 6 values .* row 0"),
        (ted().apply(torch.zeros_like), r"'observation': all 6 rows are exactly zero.*MinariExperienceReplay"),
        (ted()[:0], r"the data set holds no step"),
        (ted()[0], r"the batch size is empty"),
    ],
)
def test_bad_tensordicts(source, message):
    with pytest.raises(InputError, match=f"TensorDict: {message}"):
        load_offline_dataset(source)


def test_action_spec_overrides_the_bounds():
    source = ted(action=torch.linspace(-3, 3, 6)[:, None])
    with pytest.raises(InputError, match=r"4 of 6 actions .* row 0: component 0 is -3, its bounds are -1 to 1"):
        load_offline_dataset(source)
    spec = load_offline_dataset(source, action_spec=Bounded(-3, 3, (1,), dtype=torch.float64)).action_spec
    assert spec == Bounded(-3, 3, (1,), dtype=torch.float32)
    with pytest.raises(InputError, match=r"must be a torchrl.data.Bounded, not Unbounded"):
        load_offline_dataset(source, action_spec=Unbounded((1,)))
    with pytest.raises(InputError, match=r"actions are of shape \(1,\), their bounds of shape \(2,\)"):
        load_offline_dataset(source, action_spec=Bounded(-3, 3, (2,)))


def test_actions_may_leave_their_bounds_by_rounding_only():
    assert len(load_offline_dataset(ted(action=torch.full((6, 1), 1 + 5e-7)))) == 6
    with pytest.raises(InputError, match="6 of 6 actions"):
        load_offline_dataset(ted(action=torch.full((6, 1), 1 + 5e-6)))


# --- the buffer ---------------------------------------------------------------------------------


def test_statistics_are_those_of_the_kept_rows(tmp_path):
    arrays = random_arrays()
    arrays["observations"] = arrays["observations"] * [1, 1e-3, 100] + [1e3, 0, 0]
    flat = np.tile([4321.1, 0, 1e6], (1000, 1))
    flat[::2, 2] += 0.0625  # the next float32: rounding, not signal
    arrays["observations"] = np.hstack([arrays["observations"], flat])
    buffer = load_offline_dataset(write(tmp_path / "toy.npz", arrays))
    kept = buffer[:]["observation"].numpy().astype(np.float64)
    assert buffer.observation_loc.dtype == buffer.observation_scale.dtype == torch.float32
    np.testing.assert_allclose(buffer.observation_loc, kept.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(buffer.observation_scale[:3], kept.std(0)[:3], rtol=1e-6)
    assert buffer.observation_scale[3:].tolist() == [1, 1, 1]


def test_samples_are_plain_contiguous_rows_of_the_set():
    torch.manual_seed(0)
    buffer = load_offline_dataset(ted(), batch_size=64)
    batch = buffer.sample()
    assert type(batch) is TensorDict and batch.shape == (64,)
    assert set(batch.keys(True, True)) == LEAVES.keys() | {"index"}
    assert batch["index"].unique().tolist() == list(range(6))
    for key in LEAVES:
        assert batch[key].is_contiguous() and torch.equal(batch[key], buffer[:][key][batch["index"]]), key
    with pytest.raises(RuntimeError, match="doesn't allow writing"):
        buffer.extend(ted())
    with pytest.raises(InputError, match="batch_size=0"):
        load_offline_dataset(ted(), batch_size=0)


def test_slices_stay_in_their_episode(tmp_path):
    torch.manual_seed(0)
    arrays = random_arrays()
    arrays["observations"][:, 0] = np.arange(1000)
    buffer = load_offline_dataset(write(tmp_path / "toy.npz", arrays), batch_size=300)
    buffer.set_sampler(SliceSampler(slice_len=3, traj_key="episode"))
    batch = buffer.sample().view(100, 3)
    assert (batch["episode"] == batch["episode"][:, :1]).all() and len(batch["episode"].unique()) > 20
    assert (batch["observation"][:, 1:, 0] - batch["observation"][:, :-1, 0] == 1).all()
    assert torch.equal(batch["next", "observation"][:, :-1], batch["observation"][:, 1:])


def test_device():
    device = "cuda" if torch.cuda.is_available() else "meta"  # meta: placement without an accelerator
    buffer = load_offline_dataset(ted(), device=device)
    tensors = [*buffer[:].values(True, True), buffer.observation_loc, buffer.observation_scale]
    assert {tensor.device.type for tensor in tensors} == {device}
    assert buffer.action_spec.device.type == device
    assert load_offline_dataset(ted())[:].device.type == "cpu"


# --- real sets, where they are at hand ----------------------------------------------------------


@pytest.mark.skipif(not (DATASETS / "door-human.hdf5").exists(), reason="door-human is not at hand")
def test_door_human():
    path = DATASETS / "door-human.hdf5"
    buffer = load_offline_dataset(path)
    data = buffer[:]
    with h5py.File(path, "r") as file:
        observations, timeouts = file["observations"][()], file["timeouts"][()]
        rewards, kept = file["rewards"][()].astype(float), np.flatnonzero(~file["timeouts"][()])
    assert (len(timeouts), len(buffer), len(buffer.episode_returns)) == (6729, 6704, 25)
    assert not data["next", "done"].any() and data["episode"].unique().tolist() == list(range(25))
    np.testing.assert_array_equal(data["observation"], observations[kept])
    np.testing.assert_array_equal(data["next", "observation"], observations[kept + 1])
    starts = np.concatenate([[0], np.flatnonzero(timeouts)[:-1] + 1])
    np.testing.assert_allclose(buffer.episode_returns, np.add.reduceat(rewards, starts), rtol=1e-9)


@pytest.mark.skipif(not (DATASETS / "minari" / "spar" / "hopper").exists(), reason="the Minari sets are not at hand")
def test_hopper_medium():
    buffer = load_offline_dataset("minari:spar/hopper/medium-v0", root=DATASETS / "minari")
    assert len(buffer) == 200_000 and buffer.env_id == "Hopper-v5"
    path = DATASETS / "minari" / "spar" / "hopper" / "medium-v0" / "data" / "main_data.hdf5"
    assert_equals_hdf5(buffer, path)
