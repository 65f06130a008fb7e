"""Order and ends of episodes by the evidence of the observations, against a set whose episodes are known."""

from __future__ import annotations

import re
import warnings

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from helpers import SHARED
from tensordict import TensorDict

from torchrl_spar import InputError, fit_critics, load_offline_dataset, make_spar_loss, returns_to_go
from torchrl_spar.data.jumps import find_jumps, is_disordered

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


@pytest.mark.parametrize(
    "clock",
    [
        lambda step: step + np.random.default_rng(3).uniform(0, 0.5, len(step)),  # times, not counts
        lambda step: step // 20,  # whole seconds of 20 Hz
        lambda step: np.floor(step / 99.7 * 1000),  # milliseconds of 99.7 Hz
    ],
)
@pytest.mark.parametrize("order", [np.arange(EPISODES * STEPS), INTERLEAVED], ids=["as they are", "turns"])
def test_a_clock_is_no_count(tmp_path, clock, order):
    step = clock(np.tile(np.arange(STEPS), EPISODES))[order]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = with_steps(tmp_path, {name: array[order] for name, array in DATA.items()}, step)
    np.testing.assert_allclose(buffer.episode_returns, RETURNS)
    assert (buffer[:]["next", "observation"] - buffer[:]["observation"]).abs().max() < 0.6


@pytest.mark.parametrize("jitter", [0, 1 / 60])
@pytest.mark.parametrize("whole", [0, 1000], ids=["seconds", "milliseconds"])
def test_a_pause_of_a_clock_ends_an_episode(tmp_path, whole, jitter):
    """Of 20 Hz; after two rows the robot stood still."""
    times = np.arange(EPISODES * STEPS) / 20 + np.random.default_rng(3).uniform(0, jitter, EPISODES * STEPS)
    times += 5.0 * (np.arange(len(times)) > 450) + 1.0 * (np.arange(len(times)) > 1030)
    with pytest.warns(UserWarning, match="steps are missing after 2 rows, first after row 450"):
        buffer = with_steps(tmp_path, DATA, np.floor(times * whole) if whole else times)
    assert len(buffer.episode_returns) == EPISODES + 2


@pytest.mark.parametrize("column", ["flags", "no flags"])
def test_ids_that_two_logs_share_are_told_apart(tmp_path, column):
    """Without steps and next observations; ids of streams that take turns are whole episodes."""
    names = ["observations", "actions", "rewards", "terminals", *(["timeouts"] if column == "flags" else [])]
    arrays = {name: DATA[name] for name in names} | {"episode": DATA["episode"] % (EPISODES // 2)}
    np.savez(tmp_path / "both.npz", **arrays)
    told = column != "flags" and pytest.warns(UserWarning, match=f"used again {EPISODES // 2} times, first in row")
    with told or warnings.catch_warnings():
        buffer = load_offline_dataset(tmp_path / "both.npz")
    np.testing.assert_allclose(np.sort(buffer.episode_returns), np.sort(RETURNS))
    turns = {name: array[INTERLEAVED] for name, array in {**arrays, "episode": DATA["episode"]}.items()}
    np.savez(tmp_path / "turns.npz", **turns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = load_offline_dataset(tmp_path / "turns.npz")
    np.testing.assert_allclose(buffer.episode_returns, RETURNS)


@pytest.mark.parametrize("length", [1, 10], ids=["turns", "chunks"])
@pytest.mark.parametrize("terminated", [0, 20])
def test_streams_of_a_fast_system_are_put_together_by_their_ids(tmp_path, length, terminated):
    """Whose observations differ as much from row to row as from stream to stream."""
    rng, count, steps = np.random.default_rng(4), 4, 100
    states = np.concatenate([np.sin(8 * np.arange(steps)[:, None] * rng.uniform(0.5, 1.5, 6)) for _ in range(count)])
    states[:, 3:] = rng.normal(size=(count * steps, 3))  # as of an accelerometer
    order = np.arange(count * steps).reshape(count, -1, length).transpose(1, 0, 2).ravel()
    end = (np.arange(count * steps) % terminated == terminated - 1) if terminated else np.zeros(count * steps, bool)
    arrays = {
        "observations": states, "actions": np.tanh(states[:, :2]), "rewards": np.ones(len(states)), "terminals": end,
        "episode": np.repeat(np.arange(count), steps),
    }  # fmt: skip
    np.savez(tmp_path / "toy.npz", **{name: array[order] for name, array in arrays.items()})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*used again")
        buffer = load_offline_dataset(tmp_path / "toy.npz")
    rows = buffer[:]
    row = order[buffer.source_rows]  # of the streams, one after the other
    going = ~rows["next", "terminated"][:, 0].numpy()
    states = states.astype(np.float32)
    np.testing.assert_array_equal(rows["observation"], states[row])
    np.testing.assert_array_equal(rows["next", "observation"][going], states[row[going] + 1])
    assert len(states) - len(rows) == (0 if terminated else count)


def test_a_clock_that_is_set_back_cuts_an_episode(tmp_path):
    times = np.arange(EPISODES * STEPS) / 50
    late = times.copy()
    late[[450, 451]] = late[[451, 450]]
    times[451:500] -= 0.811
    with pytest.warns(UserWarning, match="the clock is set back 1 times, first after row 450"):
        buffer = with_steps(tmp_path, DATA, times)
    assert len(buffer.episode_returns) == EPISODES + 1
    assert (buffer[:]["next", "observation"] - buffer[:]["observation"]).abs().max() < 0.6
    # Two rows that were logged in each other's place are put in order.
    swapped = np.arange(len(late))
    swapped[[450, 451]] = [451, 450]
    buffer = with_steps(tmp_path, {name: array[swapped] for name, array in DATA.items()}, late)
    np.testing.assert_allclose(buffer.episode_returns, RETURNS)


def test_steps_that_count_down_are_told_of(tmp_path):
    left = np.tile(np.arange(STEPS)[::-1], EPISODES)
    with pytest.warns(UserWarning, match="steps or times fall from row to row.* count what is left"):
        with_steps(tmp_path, DATA, left)
    newest_first = {name: array[::-1] for name, array in DATA.items()}
    with pytest.warns(UserWarning, match="put in the order in which they grow"):
        buffer = with_steps(tmp_path, newest_first, np.arange(EPISODES * STEPS)[::-1])
    np.testing.assert_allclose(np.sort(buffer.episode_returns), np.sort(RETURNS))


def test_nanoseconds_since_1970_and_pauses_between_episodes(tmp_path):
    """One session, whose episodes' ends are flagged."""
    step = 1_700_000_000_000_000_000 + np.arange(EPISODES * STEPS) * 20_000_003
    step += np.repeat(np.arange(EPISODES), STEPS) * 5_000_000_000
    end = np.arange(EPISODES * STEPS) % STEPS == STEPS - 1
    arrays = {**DATA, "episode": np.zeros(len(step), int), "terminals": end}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = with_steps(tmp_path, {name: array[SHUFFLED] for name, array in arrays.items()}, step[SHUFFLED])
    np.testing.assert_allclose(buffer.episode_returns, RETURNS)


@pytest.mark.parametrize("longest", [2, 4, 39])
def test_ids_that_are_used_again_by_short_episodes_are_told_apart(tmp_path, longest):
    rng = np.random.default_rng(0)
    steps = rng.integers(1, longest + 1, 200)
    states = np.repeat(rng.normal(size=(200, 2)), steps, axis=0) + 0.05 * rng.normal(size=(steps.sum(), 2))
    step = np.concatenate([np.arange(count) for count in steps])
    arrays = {"observations": states, "actions": np.tanh(states), "rewards": np.ones(len(step))}
    arrays |= {"terminals": np.zeros(len(step)), "episode": np.repeat(np.tile(np.arange(20), 10), steps)}
    assert with_steps(tmp_path, arrays, step).episode_returns.tolist() == steps.tolist()


def test_irregular_times_put_shuffled_rows_in_order(tmp_path):
    times = np.random.default_rng(2).exponential(size=EPISODES * STEPS).cumsum()[SHUFFLED]
    buffer = with_steps(tmp_path, {name: array[SHUFFLED] for name, array in DATA.items()}, times)
    np.testing.assert_allclose(buffer.episode_returns, RETURNS)


@pytest.mark.parametrize("digits", [4, 12])
def test_durations_of_steps_tell_no_order(tmp_path, digits):
    lasted = np.round(0.02 + 1e-4 * np.random.default_rng(3).normal(size=EPISODES * STEPS), digits)
    with pytest.warns(UserWarning, match="neither grow along the episodes nor count"):
        buffer = with_steps(tmp_path, DATA, lasted)
    np.testing.assert_allclose(buffer.episode_returns, RETURNS)
    assert torch.equal(buffer.source_rows, torch.arange(EPISODES * STEPS).reshape(EPISODES, STEPS)[:, :-1].flatten())


@pytest.mark.parametrize(
    "order", [np.arange(EPISODES * STEPS), INTERLEAVED, SHUFFLED], ids=["ordered", "turns", "shuffled"]
)
def test_rows_that_are_there_twice_count_once(tmp_path, order):
    order = np.append(order, [130, 777])
    arrays = {name: array[order] for name, array in DATA.items()}
    with pytest.warns(UserWarning, match=f"2 rows are there twice, first row {EPISODES * STEPS}"):
        buffer = with_steps(tmp_path, arrays, np.tile(np.arange(STEPS), EPISODES)[order])
    np.testing.assert_allclose(buffer.episode_returns, RETURNS)
    assert torch.equal(torch.from_numpy(arrays["observations"])[buffer.source_rows], buffer[:]["observation"])


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


@pytest.mark.parametrize("given", [False, True], ids=["no next", "reset as next"])
@pytest.mark.parametrize("longest", [1, 3])
def test_episodes_of_one_step_are_told_apart(tmp_path, longest, given):
    """Some states are alike by chance, and old vector environments give the state after the reset as the next."""
    rng = np.random.default_rng(0)
    steps = rng.integers(1, longest + 1, 300)
    states = np.repeat(rng.normal(size=(300, 1)), steps, axis=0) + 0.1 * rng.normal(size=(steps.sum(), 1))
    terminal = np.zeros(steps.sum(), dtype=bool)
    terminal[steps.cumsum() - 1] = True
    arrays = {
        "observations": states, "next_observations": np.roll(states, -1, axis=0), "actions": np.tanh(states),
        "rewards": np.ones(steps.sum()), "terminals": terminal,
    }  # fmt: skip
    buffer = load(tmp_path, arrays, *(() if given else ("next_observations",)))
    assert buffer.episode_returns.tolist() == steps.tolist()


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP"])
def test_resets_that_vector_environments_log_as_steps_are_named(tmp_path, mode):
    vector = gymnasium.vector
    options = {"vectorization_mode": "sync", "vector_kwargs": {"autoreset_mode": vector.AutoresetMode[mode]}}
    envs, rows = gymnasium.make_vec("CartPole-v1", num_envs=1, **options), []
    before, _ = envs.reset(seed=0)
    for step in range(200):
        after, reward, terminated, _, info = envs.step(np.array([step % 3 % 2]))
        last = info["final_obs"][0] if mode == "SAME_STEP" and terminated[0] else after[0]
        rows.append((before[0], last, [0.5], reward[0], terminated[0]))
        before = after
    names = ("observations", "next_observations", "actions", "rewards", "terminals")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(tmp_path, dict(zip(names, map(np.array, zip(*rows)), strict=True)))
    told = [str(warning.message) for warning in caught if "log their resets" in str(warning.message)]
    first = [row[4] for row in rows].index(True) + 1
    assert (len(told) == 1 and f"first row {first}:" in told[0]) if mode == "NEXT_STEP" else not told


@pytest.mark.parametrize("period", [8, 12, 25, 50])
@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_periodic_motion_is_in_order(period, noise):
    t, rng = np.arange(4000), np.random.default_rng(0)
    motion = np.stack([np.sin(2 * np.pi * t / period + phase) for phase in range(6)], 1)
    motion += noise * rng.normal(size=motion.shape)
    assert not is_disordered(motion, t % 1000 == 999)
    for streams in (2, 5):  # that are out of step
        each = [motion[int(period * (0.3 + 0.618 * stream)) :][: 4000 - 5 * period] for stream in range(streams)]
        together = np.stack(each, 1).reshape(-1, 6)
        assert is_disordered(together, np.zeros(len(together), dtype=bool))


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


def test_a_contact_is_no_reset_where_ends_are_told():
    """A ball that is stopped by the floor in each of 20 episodes of 100 steps, from heights that differ."""
    rng, time = np.random.default_rng(0), np.arange(100)
    speed = np.where(time < 60, -time / 60, 0)
    episodes = []
    for height in 3 + 0.1 * rng.random(20):
        episodes.append(np.stack([height + np.cumsum(speed) / 20, speed], 1))
    observation = np.concatenate(episodes)
    end = np.arange(2_000) % 100 == 99
    assert not find_jumps(observation, end).any()
    told = end.copy()
    told[499] = False
    assert np.flatnonzero(find_jumps(observation, told)).tolist() == [499]
    assert 59 in np.flatnonzero(find_jumps(observation, end & (np.arange(2_000) > 1_500)))  # too few are told
