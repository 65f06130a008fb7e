"""Order and ends of episodes by the evidence of the observations, against a set whose episodes are known."""

from __future__ import annotations

import re
import warnings

import h5py
import numpy as np
import pytest
import torch
from helpers import SHARED
from tensordict import TensorDict

from torchrl_spar import InputError, fit_critics, load_offline_dataset, make_spar_loss, returns_to_go

EPISODES, STEPS = 20, 100


def walk(truncated: bool = True) -> dict[str, np.ndarray]:
    """Twenty episodes of a hundred small steps from far starts, cut by a time limit, in D4RL's arrays."""
    rng = np.random.default_rng(0)
    states = 5 * rng.normal(size=(EPISODES, 1, 3)) + 0.1 * rng.normal(size=(EPISODES, STEPS + 1, 3)).cumsum(1)
    states = states.astype(np.float32)
    last = np.tile(np.arange(STEPS) == STEPS - 1, EPISODES)
    return {
        "observations": states[:, :-1].reshape(-1, 3), "next_observations": states[:, 1:].reshape(-1, 3),
        "actions": rng.uniform(-1, 1, (EPISODES * STEPS, 1)).astype(np.float32), "rewards": rng.normal(size=len(last)),
        "terminals": np.zeros_like(last), "timeouts": last if truncated else np.zeros_like(last),
        "episode": np.repeat(np.arange(EPISODES), STEPS),
    }  # fmt: skip


DATA = walk()
RETURNS = DATA["rewards"].reshape(EPISODES, STEPS).sum(1)
INTERLEAVED = np.arange(EPISODES * STEPS).reshape(EPISODES, STEPS).T.reshape(-1)
SHUFFLED = np.random.default_rng(1).permutation(EPISODES * STEPS)
WRAPPED = np.roll(np.arange(EPISODES * STEPS), 777)
# A collector's batches [environments, 25 steps], one after the other, flat.
BATCHES = np.arange(EPISODES * STEPS).reshape(EPISODES, 4, 25).swapaxes(0, 1).reshape(-1)


def load(path, arrays, *without, **options):
    np.savez(path / "toy.npz", **{key: array for key, array in arrays.items() if key not in ("episode", *without)})
    return load_offline_dataset(path / "toy.npz", **options)


def as_ted(arrays, **more) -> TensorDict:
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    column = {key: tensors[key].unsqueeze(-1) for key in ("rewards", "terminals", "timeouts")}
    return TensorDict(
        {
            "observation": tensors["observations"], "action": tensors["actions"], **more,
            "next": {
                "observation": tensors["next_observations"], "reward": column["rewards"].float(),
                "terminated": column["terminals"], "truncated": column["timeouts"],
            },
        }, [len(tensors["rewards"])],
    )  # fmt: skip


def assert_whole(buffer):
    """Whatever the order of the episodes: their returns, and every row in its place."""
    np.testing.assert_allclose(np.sort(buffer.episode_returns), np.sort(RETURNS), rtol=1e-5, atol=1e-5)
    rows = buffer[:]
    inside = rows["episode"][1:] == rows["episode"][:-1]
    assert inside.sum() == EPISODES * (STEPS - 1)
    assert torch.equal(rows["next", "observation"][:-1][inside], rows["observation"][1:][inside])


@pytest.mark.parametrize("flags", [True, False], ids=["timeouts", "no timeouts"])
def test_next_observations_end_episodes_with_and_without_flags(tmp_path, flags):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = load(tmp_path, walk(flags), *(() if flags else ("timeouts",)))
    assert_whole(buffer)
    np.testing.assert_allclose(buffer.episode_returns, RETURNS)


@pytest.mark.parametrize(
    "order", [INTERLEAVED, SHUFFLED, WRAPPED, BATCHES], ids=["turns", "shuffled", "ring", "batches"]
)
def test_rows_out_of_order_are_put_in_order_with_a_warning(tmp_path, order):
    with pytest.warns(UserWarning, match="go on in rows elsewhere .* put in the order"):
        buffer = load(tmp_path, {key: array[order] for key, array in DATA.items()})
    assert_whole(buffer)
    if order is not WRAPPED:  # whose wrap cuts no episode that a flag ends
        true = returns_to_go(load(tmp_path, DATA)[:], 0.9)
        found = returns_to_go(buffer[:], 0.9)
        assert torch.allclose(found.sort(0)[0], true.sort(0)[0], atol=1e-4)


@pytest.mark.parametrize("key", ["episode", ("collector", "traj_ids"), "traj_ids"])
@pytest.mark.parametrize("order", [INTERLEAVED, BATCHES], ids=["turns", "batches"])
def test_ids_put_rows_in_order_silently(key, order):
    arrays = {name: array[order] for name, array in DATA.items()}
    source = as_ted(arrays).set(key, torch.from_numpy(arrays["episode"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = load_offline_dataset(source)
    assert_whole(buffer)
    np.testing.assert_allclose(buffer.episode_returns, RETURNS, rtol=1e-4, atol=1e-4)


def names_of(episode):
    return np.array([f"run {number}" for number in episode])


@pytest.mark.parametrize("order", [INTERLEAVED, SHUFFLED, WRAPPED], ids=["turns", "shuffled", "ring"])
@pytest.mark.parametrize("key", ["episode", "episode_ids", "traj_id"])
@pytest.mark.parametrize("label", [np.asarray, names_of, lambda episode: episode[:, None] + 2**60])
def test_ids_and_steps_of_a_file_put_rows_in_order_without_next_observations(tmp_path, order, key, label):
    arrays = {name: array[order] for name, array in DATA.items() if name not in ("next_observations", "timeouts")}
    arrays |= {key: label(arrays.pop("episode")), "step": np.tile(np.arange(STEPS), EPISODES)[order]}
    np.savez(tmp_path / "toy.npz", **arrays)
    with h5py.File(tmp_path / "toy.hdf5", "w") as file:
        for name, array in arrays.items():
            file[name] = array.astype("S") if array.dtype.kind == "U" else array
    for file in ("toy.npz", "toy.hdf5"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            buffer = load_offline_dataset(tmp_path / file)
        np.testing.assert_allclose(np.sort(buffer.episode_returns), np.sort(RETURNS))
        rows = buffer[:]  # less the last ones, whose next observation is unknown
        states = torch.from_numpy(DATA["observations"])
        place = torch.cdist(rows["observation"], states).argmin(1)
        assert len(rows) == EPISODES * (STEPS - 1) and torch.equal(rows["next", "observation"], states[place + 1])


def test_names_that_mean_something_else_are_left_alone(tmp_path):
    more = {"episode_ids": np.arange(EPISODES), "step": np.zeros((len(DATA["rewards"]), 2))}
    np.savez(tmp_path / "toy.npz", **{name: array for name, array in DATA.items() if name != "episode"}, **more)
    assert_whole(load_offline_dataset(tmp_path / "toy.npz"))


def with_steps(path, arrays, step):
    """Without next observations and flags."""
    names = ("observations", "actions", "rewards", "terminals", "episode")
    np.savez(path / "steps.npz", **{name: arrays[name] for name in names}, step=step)
    return load_offline_dataset(path / "steps.npz")


def test_ids_that_are_used_again_are_told_apart_by_steps_that_begin_anew(tmp_path):
    buffer = with_steps(tmp_path, {**DATA, "episode": DATA["episode"] % 3}, np.tile(np.arange(STEPS), EPISODES))
    np.testing.assert_allclose(buffer.episode_returns, RETURNS)


def test_an_episode_is_cut_where_steps_are_missing(tmp_path):
    step = np.tile(np.arange(STEPS), EPISODES)
    kept = ~np.isin(np.arange(len(step)), (450, 451, 1030))
    with pytest.warns(UserWarning, match="steps are missing after 2 rows, first after row 449"):
        buffer = with_steps(tmp_path, {name: array[kept] for name, array in DATA.items()}, step[kept])
    assert len(buffer.episode_returns) == EPISODES + 2 and len(buffer) == kept.sum() - EPISODES - 2
    assert (buffer[:]["next", "observation"] - buffer[:]["observation"]).abs().max() < 0.6  # single steps alone
    every_other = {name: array[::2] for name, array in DATA.items()}
    assert len(with_steps(tmp_path, every_other, step[::2]).episode_returns) == EPISODES
    jitter = step + np.random.default_rng(3).uniform(0, 0.5, len(step))  # times, not counts
    np.testing.assert_allclose(with_steps(tmp_path, DATA, jitter).episode_returns, RETURNS)


def test_rows_shuffled_within_their_episodes_are_noticed(tmp_path):
    arrays = {name: array[SHUFFLED] for name, array in DATA.items() if name not in ("next_observations", "timeouts")}
    np.savez(tmp_path / "toy.npz", **arrays)
    with pytest.warns(UserWarning, match="rows seem to be shuffled or interleaved"):
        load_offline_dataset(tmp_path / "toy.npz")


@pytest.mark.parametrize("without", [("timeouts",), ()])
def test_a_file_in_which_nothing_ends_says_so(tmp_path, without):
    arrays = {name: array[:50] for name, array in walk(truncated=False).items()}
    with pytest.warns(UserWarning, match="nothing tells where episodes end, so all 50 rows are taken for one episode"):
        load(tmp_path, arrays, "next_observations", *without)


def test_ids_that_two_files_share_do_not_join_their_episodes():
    source = as_ted(DATA, episode=torch.from_numpy(DATA["episode"] % 10))
    np.testing.assert_allclose(load_offline_dataset(source).episode_returns, RETURNS, rtol=1e-4, atol=1e-4)


def test_time_may_be_the_first_dimension():
    source = as_ted(DATA).unflatten(0, (EPISODES, STEPS))
    for batch in (source, source.transpose(0, 1), source.transpose(0, 1).contiguous()):
        np.testing.assert_allclose(load_offline_dataset(batch).episode_returns, RETURNS, rtol=1e-4, atol=1e-4)


def test_rows_that_cannot_be_ordered_have_no_returns(tmp_path):
    part = SHUFFLED[: len(SHUFFLED) // 2]
    with pytest.warns(UserWarning, match="cannot be put together again, so there are no returns"):
        buffer = load(tmp_path, {key: array[part] for key, array in DATA.items()}, batch_size=4)
    assert len(buffer) == len(part) and not len(buffer.episode_returns) and "episode" not in buffer[:].keys()
    loss = make_spar_loss(3, buffer.action_spec, hidden=[4])
    for call in (lambda: returns_to_go(buffer[:], 0.9), lambda: fit_critics(loss, buffer, steps=1)):
        with pytest.raises(InputError, match=r"go on in rows elsewhere.*return_to_go"):
            call()


def test_returns_of_any_buffer_end_where_the_next_observation_breaks():
    true = returns_to_go(as_ted(DATA).set(("next", "done"), as_ted(DATA)["next", "truncated"]), 0.9)
    silent = as_ted(walk(truncated=False))
    silent["next", "done"] = silent["next", "truncated"]
    torch.testing.assert_close(returns_to_go(silent, 0.9), true)
    with pytest.raises(InputError, match="shuffled or interleaved"):
        returns_to_go(silent[torch.from_numpy(SHUFFLED)], 0.9)


def test_next_observations_that_are_noise_leave_the_flags_in_charge(tmp_path):
    noise = np.random.default_rng(2).normal(size=DATA["observations"].shape)
    with pytest.warns(UserWarning, match="flags and ids alone"):
        buffer = load(tmp_path, {**DATA, "next_observations": noise})
    np.testing.assert_allclose(buffer.episode_returns, RETURNS)


@pytest.mark.parametrize(
    "order, without, message",
    [
        (slice(None), ("timeouts",), r"jumps 1[0-9] times .* first after row \d*99"),
        (SHUFFLED, (), "rows seem to be shuffled or interleaved"),
        (INTERLEAVED, (), "rows seem to be shuffled or interleaved"),
    ],
    ids=["resets", "shuffled", "turns"],
)
def test_without_next_observations_the_observations_tell(tmp_path, order, without, message):
    arrays = {key: array[order] for key, array in DATA.items()}
    with pytest.warns(UserWarning) as caught:
        load(tmp_path, arrays, "next_observations", *without)
    assert any(re.search(message, str(warning.message)) for warning in caught)


def test_terminals_in_a_row_are_one_episode_that_earns_up_to_the_first(tmp_path):
    """As in AntMaze, where a robot stays at its goal until the time limit."""
    n = 10
    arrays = {
        "observations": np.arange(2.0 * n).reshape(n, 2), "actions": np.linspace(-1, 1, n)[:, None],
        "next_observations": np.arange(2.0 * n).reshape(n, 2) + 2, "rewards": np.ones(n),
        "terminals": np.isin(np.arange(n), (3, 4, 5, 9)), "timeouts": np.arange(n) == 5,
    }  # fmt: skip
    for without in ((), ("next_observations",)):
        buffer = load(tmp_path, arrays, *without)
        assert buffer[:]["episode"].tolist() == [0] * 6 + [1] * 4
        assert buffer.episode_returns.tolist() == [4, 4]
    # A reset between two terminals: an episode of a single step.
    arrays["next_observations"][3] = 99
    assert load(tmp_path, arrays)[:]["episode"].tolist() == [0] * 4 + [1] * 2 + [2] * 4


FILES = ("door-human.hdf5", "relocate-human-24.hdf5", "pen-expert-regen.hdf5", "antmaze-umaze-diverse-regen.hdf5")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("given", [True, False], ids=["next", "no next"])
def test_real_sets_raise_no_alarm(tmp_path, name, given):
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not at hand")
    with h5py.File(SHARED / name) as file:
        keys = (
            "observations",
            "actions",
            "rewards",
            "terminals",
            "timeouts",
            *(["next_observations"] if given else []),
        )
        arrays = {key: file[key][()] for key in keys if key in file}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = load(tmp_path, arrays)
    if "antmaze" not in name:
        assert len(buffer.episode_returns) == np.count_nonzero(arrays["terminals"] | arrays["timeouts"])
