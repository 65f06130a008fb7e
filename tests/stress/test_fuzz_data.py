"""Random data sets of every form: each trains with finite numbers on the source's own rows, or ends in one InputError.

``FUZZ_EXAMPLES=5000 pytest tests/stress/test_fuzz_data.py`` tries that many of every form, new ones at every call.
"""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from fuzz_sources import KEYS, TWINS, draw_arrays, draw_defects, expected_rows, expected_sequences, spoil
from gymnasium.spaces import Box, Dict
from helpers import make_batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.serialization import serialize_space
from tensordict import TensorDict
from test_data import write

from torchrl_spar import (
    BatchSampler,
    InputError,
    OfflineReplayBuffer,
    SPARUpdate,
    fit_anchor,
    fit_critics,
    fit_vae,
    load_offline_dataset,
    make_anchor,
    make_spar_loss,
    returns_to_go,
)

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
fuzz = settings(
    max_examples=int(EXAMPLES or 50),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TED_KEYS = {
    "observations": "observation", "next_observations": ("next", "observation"), "actions": "action",
    "rewards": ("next", "reward"), "terminals": ("next", "terminated"), "timeouts": ("next", "truncated"),
}  # fmt: skip
# Minari's name for each of D4RL's.
MINARI_KEYS = {"observations": "observations", "actions": "actions", "rewards": "rewards", **TWINS}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------- the two ends


def assert_trains(buffer: OfflineReplayBuffer) -> None:
    width = buffer[:1]["observation"].shape[-1]
    options = {"observation_stats": (buffer.observation_loc, buffer.observation_scale), "hidden": [4]}
    anchor = fit_anchor(make_anchor(width, buffer.action_spec, **options), buffer, steps=2)
    loss = make_spar_loss(width, buffer.action_spec, anchor=anchor, num_qvalue_nets=2, value_mix=0.5, **options)
    fit_vae(loss, buffer, steps=2)
    fit_critics(loss, buffer, steps=2)
    metrics = SPARUpdate(loss).run(next(BatchSampler(loss, buffer, length=2, seed=0)))
    for name, value in [*metrics.items(), *loss.state_dict().items(), *anchor.state_dict().items()]:
        if isinstance(value, torch.Tensor):
            assert value.isfinite().all(), name
    assert metrics["loss_actor"] < 1e6  # nor is it far from the order of one


def assert_rows(buffer: OfflineReplayBuffer, rows: dict[str, np.ndarray]) -> None:
    data = buffer[:]
    assert len(buffer) == len(rows["observation"])
    found = {
        "observation": data["observation"], "action": data["action"],
        "next_observation": data["next", "observation"], "reward": data["next", "reward"].squeeze(-1),
        "terminated": data["next", "terminated"].squeeze(-1), "truncated": data["next", "truncated"].squeeze(-1),
    }  # fmt: skip
    if rows["ordered"]:
        found["episode"] = data["episode"]
    for key, tensor in found.items():
        np.testing.assert_array_equal(tensor.numpy(), rows[key].astype(tensor.numpy().dtype), err_msg=key)
    np.testing.assert_allclose(buffer.episode_returns, rows["returns"], rtol=1e-9, atol=1e-6)


def check(source, rows, culprits, prefix) -> None:
    """Loads and trains where there is no culprit; else one line must name the source and one of them."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            buffer = load_offline_dataset(source, batch_size=4)
        except InputError as err:
            message = str(err)
            assert culprits, message
            assert message.startswith(f"{prefix}: ") and "\n" not in message
            assert any(culprit in message for culprit in culprits), (culprits, message)
            return
        assert not culprits, f"{culprits} were not refused"
        expected = rows()
        assert_rows(buffer, expected)
        if expected["ordered"]:
            assert_trains(buffer)
        else:
            with pytest.raises(InputError, match="go on in rows elsewhere"):
                returns_to_go(buffer[:], 0.9)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_files(directory, suffix):
    @fuzz
    @given(
        draw_arrays(),
        draw_defects(*(["empty"] if suffix == ".npz" else [])),
        st.sets(st.sampled_from(["next_observations", "timeouts"])),
        st.integers(0, 20),
    )
    def run(drawn, defects, absent, row):
        arrays = {key: array for key, array in drawn[0].items() if key not in absent}
        culprits = [] if len(arrays["rewards"]) else ["holds no step"]
        culprits += [key for kind, key in defects if spoil(arrays, kind, key, row)]
        if not culprits and "observation" not in expected_rows(arrays):
            culprits = ["no row is left"]
        path = directory / f"toy{suffix}"
        write(path, arrays)
        check(path, lambda: expected_rows(arrays), culprits, path)

    run()


@pytest.mark.parametrize("entry", ["rewards.npy", "rewards"])
def test_an_npz_that_holds_a_key_twice_is_refused(directory, entry):
    path = directory / "twice.npz"
    write(path, dict.fromkeys(("observations", "actions"), np.ones((3, 1))) | {"rewards": np.ones(3)})
    content = io.BytesIO()
    np.save(content, np.zeros(3))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as file:
        warnings.simplefilter("ignore")  # zipfile's own, about the duplicate
        file.writestr(entry, content.getvalue())
    with pytest.raises(InputError, match=r"twice.npz: it holds 'rewards' 2 times"):
        load_offline_dataset(path)


# ---------------------------------------------------------------- TensorDicts


@fuzz
@given(draw_arrays(), draw_defects("scalar", "shorter", "longer", "empty", "twin"), st.integers(0, 20), st.data())
def test_tensordicts(drawn, defects, row, data):
    arrays, episode = dict(drawn[0]), drawn[1]
    culprits = [] if len(episode) else ["holds no step"]
    refused = [key for kind, key in defects if spoil(arrays, kind, key, row) or key == "next_observations"]
    culprits += [str(TED_KEYS[key]) for key in refused]
    label = episode if data.draw(st.booleans()) else None
    source = TensorDict(batch_size=[len(episode)])
    for key, array in arrays.items():
        source[TED_KEYS[key]] = "text" if array.dtype.kind == "S" else torch.from_numpy(array)
    if label is not None:
        source["episode"] = torch.from_numpy(2**60 + label)
    rows = partial(expected_rows, arrays, label=label)
    if len(episode) and data.draw(st.booleans()):
        length = data.draw(st.sampled_from([size for size in (1, 2, 3) if len(episode) % size == 0]))
        source, rows = source.unflatten(0, (-1, length)), partial(expected_sequences, arrays, label, length)
    check(source, rows, culprits, "TensorDict")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.set("next", torch.ones(12, 2)), r"\('next', 'reward'\) cannot be read"),
        (lambda data: data.set("action", data["action"].to_sparse()), "'action' cannot be read"),
        (lambda data: data.set("observation", {"a": torch.ones(12, 2)}), "'observation' is a TensorDict"),
        (lambda data: data.to("meta"), "'observation' cannot be read"),
        (
            lambda data: TensorDict.lazy_stack([data[0], data[1].set("observation", torch.ones(2))]),
            "'observation' cannot be read",
        ),
    ],
    ids=["next is a tensor", "sparse", "nested", "meta", "widths differ"],
)
def test_tensordicts_of_strange_kinds(change, message):
    with pytest.raises(InputError, match=f"TensorDict: {message}"):
        load_offline_dataset(change(make_batch(12)))


def test_bfloat16_becomes_the_same_float32():
    source = make_batch(12).apply(lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
    data = load_offline_dataset(source)[:]
    for key in ("observation", "action", ("next", "reward")):
        assert torch.equal(data[key], source[key].float())


def test_large_episode_numbers_are_told_apart():
    source = make_batch(12).set("episode", 2**60 + torch.arange(12) // 4)
    for flag in ("terminated", "truncated", "done"):
        source["next", flag].zero_()
    assert load_offline_dataset(source)[:]["episode"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


# ---------------------------------------------------------------- Minari


def split(observations: np.ndarray, form: str):
    """The same columns as one array, or as a dictionary that joins to them."""
    if form == "plain":
        return observations
    first, rest = observations[:, :1], observations[:, 1:]
    goal = {"z": rest} if form == "nested" else rest
    return {"observation": first, "goal": goal} if rest.shape[1] else {"observation": first}


def space_of(value):
    if isinstance(value, dict):
        return Dict({key: space_of(item) for key, item in value.items()})
    return Box(-np.inf, np.inf, value.shape[1:], np.float64)


def write_group(group, name, value):
    if isinstance(value, dict):
        group = group.create_group(name)
        for key, item in value.items():
            write_group(group, key, item)
    else:
        group[name] = value


def write_minari(path, episodes, steps, space, action_width):
    (path / "data").mkdir(parents=True, exist_ok=True)
    with h5py.File(path / "data" / "main_data.hdf5", "w") as file:
        for number, episode in enumerate(episodes):
            group = file.create_group(f"episode_{number}")
            group.attrs["id"] = number
            for key, value in episode.items():
                write_group(group, key, value)
    actions = Box(-1, 1, (action_width,), np.float32)
    facts = {
        "dataset_id": "test/fuzz-v0", "minari_version": "0.5.4", "data_format": "hdf5",
        "total_episodes": len(episodes), "total_steps": steps,
        "observation_space": serialize_space(space), "action_space": serialize_space(actions),
    }  # fmt: skip
    (path / "data" / "metadata.json").write_text(json.dumps(facts))


@fuzz
@given(
    draw_arrays(),
    draw_defects("scalar", "empty", "twin"),
    st.sampled_from(["plain", "dictionary", "nested"]),
    st.integers(0, 20),
)
def test_minari(directory, drawn, defects, form, row):
    arrays, episode = drawn
    kept = [np.flatnonzero(episode == number) for number in range(5)]
    episodes = [{key: arrays[key][rows] for key in KEYS} for rows in kept]  # of no step, too
    culprits = [] if len(episode) else ["holds no step"]
    filled = [number for number in range(5) if len(kept[number])] or [0]
    spoiled = filled[row % len(filled)]
    for kind, key in defects:
        # One episode of several; of zeros alone only the whole set is refused.
        if len(episode) and key in MINARI_KEYS and kind not in ("zeros", "wider"):
            if kind == "missing":
                del episodes[spoiled][key]
            elif not spoil(episodes[spoiled], kind, key, row):
                continue
            culprits.append(MINARI_KEYS[key])
    space = space_of(split(arrays["observations"], form))
    written = []
    for part in episodes:
        observations, following = part.get("observations"), part["next_observations"]
        if observations is not None and observations.shape[1:] == following.shape[1:]:
            last = following[-1:] if len(following) else np.ones((1, following.shape[1]))
            part["observations"] = split(np.concatenate([observations, last]), form)
        written.append({MINARI_KEYS[key]: part[key] for key in MINARI_KEYS if key in part})
    path = directory / "minari"
    write_minari(path, written, len(episode), space, arrays["actions"].shape[1])
    check(path, lambda: expected_rows(arrays, episode=episode), culprits, path)


# ---------------------------------------------------------------- what it found in training


def rows_of(n: int, reward: float, terminated: bool) -> TensorDict:
    data = make_batch(n)
    data["next", "reward"].fill_(reward)
    for flag in ("terminated", "truncated", "done"):
        data["next", flag].fill_(terminated and flag != "truncated")
    return data


@pytest.mark.parametrize("n", [1, 12])
@pytest.mark.parametrize("reward", [0.0, 3.0, -9e14])
def test_constant_rewards_of_any_size_train(n, reward):
    buffer = load_offline_dataset(rows_of(n, reward, terminated=True), batch_size=4)
    assert_trains(buffer)


def test_rounding_of_a_large_constant_observation_is_no_signal():
    data = make_batch(12)
    data["observation"][:, 0] = 1e14 + 1e7 * data["observation"][:, 0]
    buffer = load_offline_dataset(data, batch_size=4)
    assert ((data["observation"] - buffer.observation_loc) / buffer.observation_scale).abs().max() < 12**0.5
    assert_trains(buffer)
