"""The cache against the source: the same bits, never a stale or half-written entry, whoever dies or writes at once."""

import json
import multiprocessing
import os
import resource
import signal
import tracemalloc
import warnings
from pathlib import Path

import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from helpers import SHARED
from tensordict import TensorDict
from test_data import ARRAYS, EPISODES, LEAVES, episode, ted, without, write, write_minari
from torchrl.data import Bounded

from torchrl_spar.data import buffer as data
from torchrl_spar.data import cache
from torchrl_spar.data.buffer import load_offline_dataset

EMBEDDED = Path(__file__).resolve().parents[2] / "recipes" / "data" / "torchrl-spar" / "hopper" / "medium-v0"
SETS = [EMBEDDED, *sorted(SHARED.glob("minari/spar/*/*-v0"))]
GOALS = {"goal": {"b": np.ones((3, 2)), "a": np.zeros((3, 1))}, "observation": np.arange(9, dtype=np.float32)[:, None]}
GOALS["observation"] = GOALS["observation"].reshape(3, 3)
GOAL_SPACE = Dict(
    goal=Dict(a=Box(-9, 9, (1,), np.float64), b=Box(-9, 9, (2,), np.float64)), observation=Box(-9, 9, (3,))
)


@pytest.fixture
def source(tmp_path):
    return write_minari(tmp_path / "sets", EPISODES, env="Pendulum-v1")


def assert_same(left, right):
    for key in LEAVES:
        assert torch.equal(left[:][key], right[:][key]) and left[:][key].dtype == right[:][key].dtype, key
    assert set(left[:].keys(True, True)) == set(right[:].keys(True, True)) == LEAVES.keys()
    assert left[:].batch_size == right[:].batch_size and left[:].device == right[:].device
    for name in ("episode_returns", "observation_loc", "observation_scale"):
        first, second = getattr(left, name), getattr(right, name)
        assert torch.equal(first, second) and first.dtype == second.dtype, name
    assert left.action_spec == right.action_spec
    assert (left.env_id, left.name, len(left)) == (right.env_id, right.name, len(right))


def load_from_cache(path, directory, **options):
    """Loads silently, with readers that must not be used."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        for reader in ("read_minari", "read_file"):
            patch.setattr(data, reader, None)
        warnings.simplefilter("error")
        return load_offline_dataset(path, cache=directory, **options)


def entry_of(directory):
    (record,) = directory.rglob("record.json")
    return record.parent


# --- what a cached start returns ----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"action_spec": Bounded(-3, [2.0, 5.0], (2,))}], ids=["default", "spec"])
def test_a_cached_minari_set_is_the_same_bit_for_bit(tmp_path, source, options):
    plain = load_offline_dataset(source, **options)
    assert not (tmp_path / "cache").exists()
    assert_same(load_offline_dataset(source, cache=tmp_path / "cache", **options), plain)
    cached = load_from_cache(source, str(tmp_path / "cache"), batch_size=7, **options)
    assert_same(cached, plain)
    assert cached.episode_returns.dtype == torch.float64 and cached.env_id == "Pendulum-v1"
    batch = cached.sample()
    assert type(batch) is TensorDict and type(batch["observation"]) is torch.Tensor and batch.shape == (7,)
    by_id = load_from_cache("minari:test/toy-v0", tmp_path / "cache", root=tmp_path / "sets", **options)
    assert by_id.name == "minari:test/toy-v0" and torch.equal(by_id[:]["action"], plain[:]["action"])


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_a_cached_file_is_the_same_with_its_warning(tmp_path, suffix):
    path = write(tmp_path / f"toy{suffix}", without("timeouts"))
    with pytest.warns(UserWarning, match="no 'timeouts'"):
        plain = load_offline_dataset(path)
    assert len(plain) == 7  # a row is dropped
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"toy{suffix}: no 'timeouts'") as caught:
            assert_same(load_offline_dataset(path, cache=tmp_path / "cache"), plain)
        assert len(caught) == 1
    assert entry_of(tmp_path / "cache")


def test_what_is_written_to_cached_data_never_gets_into_the_cache(tmp_path, source):
    plain = load_offline_dataset(source, cache=tmp_path / "cache")
    for key in LEAVES:
        load_from_cache(source, tmp_path / "cache")[:][key].zero_()
    assert_same(load_from_cache(source, tmp_path / "cache"), plain)


def test_options_and_sources_do_not_share_an_entry(tmp_path, source):
    other = write_minari(tmp_path / "others", EPISODES[:2])
    for path, bound in ((source, 2), (source, 3), (other, 2), (source, 3)):
        spec = Bounded(-bound, bound, (2,))
        buffer = load_offline_dataset(path, cache=tmp_path / "cache", action_spec=spec)
        assert buffer.action_spec == spec and len(buffer) == (10 if path == source else 5)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_tensordicts_are_not_cached(tmp_path):
    load_offline_dataset(ted(), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_bad_source_is_an_error_and_is_not_cached(tmp_path):
    path = tmp_path / "toy.npz"
    for _ in range(2):
        with pytest.raises(data.InputError, match="no such file"):
            load_offline_dataset(path, cache=tmp_path / "cache")
    write(path, without("rewards"))
    for _ in range(2):
        with pytest.raises(data.InputError, match="no array 'rewards'"):
            load_offline_dataset(path, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# --- a changed source ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["size", "times", "times set back"])
def test_a_changed_source_is_read_again_and_replaces_its_entry(tmp_path, how):
    path = write(tmp_path / "toy.npz", ARRAYS)
    first = load_offline_dataset(path, cache=tmp_path / "cache")
    before, stat = entry_of(tmp_path / "cache"), path.stat()
    arrays = {**ARRAYS, "rewards": ARRAYS["rewards"] + 1}
    if how == "size":
        arrays["extra"] = np.ones(3)
    write(path, arrays)
    if how != "size":
        assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (10**6 if how == "times" else 0)))
    second = load_offline_dataset(path, cache=tmp_path / "cache")
    assert torch.equal(second[:]["next", "reward"], first[:]["next", "reward"] + 1)
    assert entry_of(tmp_path / "cache") != before and not before.exists()
    assert_same(load_from_cache(path, tmp_path / "cache"), second)


def test_a_source_that_changes_while_it_is_read_is_not_cached(tmp_path, source, monkeypatch):
    def read(path):
        steps = read_minari(path)
        os.utime(path / "data" / "main_data.hdf5")
        return steps

    read_minari = data.read_minari
    monkeypatch.setattr(data, "read_minari", read)
    load_offline_dataset(source, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("record.json"))


# --- damage -------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rename_environment(path):
    path.write_text(path.read_text().replace("Pendulum-v1", "Pendulum-v2"))


@pytest.mark.parametrize(
    "file, damage",
    [
        ("data/rows/observation.memmap", lambda path: os.truncate(path, 30)),
        ("data/rows/next/observation.memmap", flip),
        ("data/episode_returns.memmap", Path.unlink),
        ("data/rows/meta.json", flip),
        ("record.json", Path.unlink),
        ("record.json", lambda path: os.truncate(path, 100)),
        ("record.json", lambda path: path.write_bytes(b"\xff\x00")),
        ("record.json", lambda path: path.write_text("[]")),
        ("record.json", rename_environment),
    ],
)
def test_a_damaged_entry_is_rebuilt_with_a_warning(tmp_path, source, file, damage):
    plain = load_offline_dataset(source, cache=tmp_path / "cache")
    damage(entry_of(tmp_path / "cache") / file)
    with pytest.warns(UserWarning, match=r"cached data is damaged .*, so the source is read again"):
        assert_same(load_offline_dataset(source, cache=tmp_path / "cache"), plain)
    assert_same(load_from_cache(source, tmp_path / "cache"), plain)


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, source):
    plain = load_offline_dataset(source)
    (tmp_path / "file").write_text("not a directory")
    with pytest.warns(UserWarning, match=r"cannot be cached here") as caught:
        assert_same(load_offline_dataset(source, cache=tmp_path / "file"), plain)
    assert len(caught) == 1
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.geteuid():  # nothing is closed to root
        with pytest.warns(UserWarning, match=r"cannot be cached here"):
            assert_same(load_offline_dataset(source, cache=closed), plain)


@pytest.mark.parametrize("room", [100, 500], ids=["for no map", "for no record"])
def test_a_full_disk_costs_a_warning_and_leaves_nothing(tmp_path, source, room, monkeypatch):
    def write_with_little_room(*args, **kwargs):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # a write fails, as on a full disk
        try:
            write(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    write = cache._write
    monkeypatch.setattr(cache, "_write", write_with_little_room)
    plain = load_offline_dataset(source)
    with pytest.warns(UserWarning, match="cannot be cached here .*File too large"):
        assert_same(load_offline_dataset(source, cache=tmp_path / "cache"), plain)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["lock"]


# --- processes ----------------------------------------------------------------------------------


def in_process(work):
    """Starts `work` in a process of its own; its exit code is 0 if nothing was raised."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_start_at_once(tmp_path, damaged):
    """Several rounds of three processes on one source, on an empty cache or one with a damaged entry."""
    source = write_minari(tmp_path / "sets", [episode(50, truncated=True, seed=seed) for seed in range(40)])
    plain = load_offline_dataset(source)
    for number in range(6):
        directory = tmp_path / f"cache{number}"
        if damaged:
            load_offline_dataset(source, cache=directory)
            flip(entry_of(directory) / "data/rows/action.memmap")
        barrier = multiprocessing.get_context("fork").Barrier(3)

        def work(directory=directory, barrier=barrier):
            barrier.wait()
            with warnings.catch_warnings():
                if not damaged:
                    warnings.simplefilter("error")
                for _ in range(3):
                    assert_same(load_offline_dataset(source, cache=directory), plain)

        processes = [in_process(work) for _ in range(3)]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert {path.name for path in entry_of(directory).parent.iterdir()} == {"lock", entry_of(directory).name}
        assert_same(load_from_cache(source, directory), plain)


@pytest.mark.parametrize("name", ["_size_and_crc32", "_crc32_of_json", "rename"])
def test_a_killed_writer_leaves_nothing_that_is_served(tmp_path, source, name):
    """Killed with the files written, with the record half written, right before the rename."""
    plain = load_offline_dataset(source)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        if name == "rename":
            os.replace = die
        else:
            setattr(cache, name, die)
        load_offline_dataset(source, cache=tmp_path / "cache")

    process = in_process(work)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").rglob("partial")
    assert any(path.is_file() for path in left.rglob("*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load_offline_dataset(source, cache=tmp_path / "cache"), plain)
    assert not left.exists()
    assert_same(load_from_cache(source, tmp_path / "cache"), plain)


# --- reading HDF5 without Minari's reader -------------------------------------------------------


def by_minari(path, flatten=lambda observations: observations):
    episodes = list(minari.MinariDataset(path / "data").iterate_episodes())
    observations = [flatten(item.observations).astype(np.float32) for item in episodes]
    return {
        "observation": np.concatenate([array[:-1] for array in observations]),
        ("next", "observation"): np.concatenate([array[1:] for array in observations]),
        "action": np.concatenate([item.actions for item in episodes]).astype(np.float32),
        ("next", "reward"): np.concatenate([item.rewards for item in episodes]).astype(np.float32)[:, None],
        ("next", "terminated"): np.concatenate([item.terminations for item in episodes])[:, None],
        ("next", "truncated"): np.concatenate([item.truncations for item in episodes])[:, None],
        "episode": np.concatenate([np.full(len(item), number) for number, item in enumerate(episodes)]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", SETS, ids=lambda path: "-".join(path.parts[-2:]))
def test_hdf5_is_read_as_minari_reads_it(path, monkeypatch):
    expected = by_minari(path)
    monkeypatch.setattr(minari.MinariDataset, "iterate_episodes", None)  # not used
    rows = load_offline_dataset(path)[:]
    for key, array in expected.items():
        np.testing.assert_array_equal(rows[key], array, err_msg=str(key))


def test_nested_dictionaries_are_read_as_minari_reads_them(tmp_path, monkeypatch):
    path = write_minari(tmp_path, [episode(2, True, observations=GOALS), EPISODES[0]][:1], GOAL_SPACE)
    expected = by_minari(
        path, lambda item: np.concatenate([item["observation"], item["goal"]["a"], item["goal"]["b"]], axis=-1)
    )
    monkeypatch.setattr(minari.MinariDataset, "iterate_episodes", None)
    rows = load_offline_dataset(path)[:]
    for key, array in expected.items():
        np.testing.assert_array_equal(rows[key], array, err_msg=str(key))


def test_other_storage_formats_go_through_minari(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        spaces = dict(observation_space=Box(-9, 9, (3,), np.float64), action_space=Box(-2, 2, (2,), np.float32))
        minari.create_dataset_from_buffers("test/arrow-v0", EPISODES, data_format="arrow", **spaces)
    arrow = load_offline_dataset(tmp_path / "test" / "arrow-v0")
    plain = load_offline_dataset(write_minari(tmp_path, EPISODES))
    arrow.name = plain.name
    assert_same(arrow, plain)


@pytest.mark.parametrize("steps", [0, 3, 1000])
def test_a_wrong_number_of_steps_in_the_metadata_does_no_harm(tmp_path, source, steps):
    plain = load_offline_dataset(source)
    metadata = source / "data" / "metadata.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "total_steps": steps}))
    assert_same(load_offline_dataset(source), plain)


def test_loading_holds_the_data_once(tmp_path):
    path = write_minari(tmp_path, [episode(500, truncated=True, seed=seed) for seed in range(40)])
    rows = load_offline_dataset(path)[:]  # what is imported on the way is now in memory
    size = sum(rows[key].numel() * rows[key].element_size() for key in LEAVES)
    tracemalloc.start()
    load_offline_dataset(path)
    peak = tracemalloc.get_traced_memory()[1]  # NumPy's arrays are in it
    tracemalloc.stop()
    assert peak < 1.5 * size
