"""What the loader tells of data that it takes, on logs of a made-up robot."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from torchrl_spar import InputError, load_offline_dataset

EPISODES, STEPS = 20, 50
ROWS = EPISODES * STEPS
SOME, LAST = (np.arange(ROWS) % STEPS == step for step in (30, STEPS - 1))


def make_log() -> dict[str, np.ndarray]:
    """A point that is pushed about and put back after every episode."""
    rng = np.random.default_rng(0)
    action = rng.uniform(-0.8, 0.8, (EPISODES, STEPS, 2))
    place = np.cumsum(0.1 * action, axis=1) + rng.normal(size=(EPISODES, 1, 2))
    observation = np.concatenate([place, action.cumsum(axis=1)], axis=2).reshape(ROWS, 4)
    return {
        "observations": observation, "actions": action.reshape(ROWS, 2), "rewards": -np.abs(observation[:, :2]).sum(1),
        "terminals": np.zeros(ROWS, bool), "timeouts": LAST,
    }  # fmt: skip


def notes(tmp_path, **changes) -> list[str]:
    path = tmp_path / "log.npz"
    np.savez(path, **{name: array for name, array in (make_log() | changes).items() if array is not None})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_offline_dataset(path)
    return [str(warning.message) for warning in caught]


def following(at_ends=None) -> np.ndarray:
    observation = make_log()["observations"]
    after = np.concatenate([observation[1:], observation[-1:]])
    return after if at_ends is None else np.where(LAST[:, None], at_ends, after)


def test_a_good_log_is_taken_in_silence(tmp_path):
    moved = make_log()["observations"] + 0.01
    for changes in ({}, {"next_observations": following(moved)}, {"rewards": np.ones(ROWS)}, {"rewards": 1e9 * SOME}):
        assert notes(tmp_path, **changes) == []


@pytest.mark.parametrize(("at_ends", "what"), [(None, "the first ones of the next episode"), (0.0, "all zero")])
@pytest.mark.parametrize("flag", ["timeouts", "episode"])
def test_next_observations_of_another_episode_are_told(tmp_path, at_ends, what, flag):
    flags = {"timeouts": None, "episode": np.arange(ROWS) // STEPS} if flag == "episode" else {}
    (note,) = notes(tmp_path, next_observations=following(at_ends), **flags)
    assert f"the next observations of 19 rows at the ends of episodes are {what}" in note


def test_next_observations_beyond_a_terminal_are_never_read(tmp_path):
    ended = {"terminals": LAST, "timeouts": np.zeros(ROWS, bool)}
    assert notes(tmp_path, next_observations=following(), **ended) == []


def test_flags_of_rows_that_go_on_are_told_from_terminals(tmp_path):
    (note,) = notes(tmp_path, terminals=~LAST)
    assert "98% of the rows are terminal" in note and "1 - terminals" in note
    rng = np.random.default_rng(0)  # of one step each
    ends = {"terminals": np.ones(ROWS, bool), "timeouts": np.zeros(ROWS, bool)}
    assert notes(tmp_path, observations=rng.normal(size=(ROWS, 4)), **ends) == []


def test_rewards_that_teach_nothing_or_drown_the_others_are_told(tmp_path):
    (note,) = notes(tmp_path, rewards=np.zeros(ROWS))
    assert "all rewards are 0" in note
    rewards = make_log()["rewards"]
    rewards[7::97] = -9999.0
    (note,) = notes(tmp_path, rewards=rewards)
    assert "the reward of row 7 is -9999" in note


def test_arrays_are_told_where_they_belong():
    with pytest.raises(InputError, match=r"^dict: no known form of source \(arrays: write them with np\.savez"):
        load_offline_dataset(make_log())


def test_tables_that_are_not_whole_or_leak_the_action_are_refused(tmp_path):
    pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    (tmp_path / "meta").mkdir()
    (tmp_path / "data").mkdir()
    table = arrow.table({
        "observation.state": list(np.random.default_rng(0).normal(size=(20, 2))),
        "action": [[0.1 * i] for i in range(20)], "next.reward": [1.0] * 20,
        "episode_index": [0] * 10 + [1] * 10, "frame_index": [*range(10)] * 2,
    })  # fmt: skip
    arrow.parquet.write_table(table, tmp_path / "data" / "0.parquet")
    features = {name: {"dtype": "float32", "shape": [1]} for name in table.column_names}
    (tmp_path / "meta" / "info.json").write_text(json.dumps({"features": features, "total_frames": 50}))
    with pytest.raises(InputError, match="tells of 50 frames, the Parquet files below data hold 20"):
        load_offline_dataset(f"lerobot:{tmp_path}")
    (tmp_path / "text.csv").write_text("x,u,e\n1,0.5,0\n2,error,0\n")
    with pytest.raises(InputError, match="u: type string, such as 'error' in row 1, expected numbers"):
        load_offline_dataset(
            tmp_path / "text.csv", columns={"observation": "x", "action": "u", "reward": "x", "episode": "e"}
        )
    (tmp_path / "log.csv").write_bytes("v\xe9,u,r,e\n1,0.5,1,0\n".encode("latin-1"))
    columns = {"observation": ["v", "u"], "action": "u", "reward": "r", "episode": "e"}
    with pytest.raises(InputError, match="'u' is named in 'observation' and in 'action'"):
        load_offline_dataset(tmp_path / "log.csv", columns=columns)
    with pytest.raises(InputError, match=r"log\.csv: cannot be read \(UnicodeDecodeError"):
        load_offline_dataset(tmp_path / "log.csv", columns=columns | {"observation": "v"})
