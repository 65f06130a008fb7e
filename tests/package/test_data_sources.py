"""TensorDicts in every container of TorchRL's, with and without padding: the same rows, or one line that helps."""

from __future__ import annotations

import pytest
import torch
from helpers import build_loss
from tensordict import TensorDict, lazy_stack
from torchrl.collectors.utils import split_trajectories
from torchrl.data import (
    Bounded,
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    ReplayBufferEnsemble,
    TensorDictReplayBuffer,
)

from torchrl_spar import (
    InputError,
    SPARUpdate,
    chunk_actions,
    fit_critics,
    load_offline_dataset,
    make_spar_loss,
    measure_residual_scale,
    with_anchor_actions,
)

LENGTHS = (3, 1, 6)


def episode(length: int) -> TensorDict:
    torch.manual_seed(length)
    states = torch.randn(length + 1, 5).cumsum(0) + 5
    ended = torch.arange(length).unsqueeze(-1) == length - 1
    return TensorDict(
        {
            "observation": states[:-1], "action": torch.rand(length, 3) * 2 - 1,
            "next": {
                "observation": states[1:], "reward": torch.rand(length, 1), "done": ended, "terminated": ended.clone(),
                "truncated": torch.zeros_like(ended),
            },
        }, [length],
    )  # fmt: skip


EPISODES = [episode(length) for length in LENGTHS]
FLAT = torch.cat(EPISODES)
SPEC = Bounded(-1, 1, (3,))


def filled(storage, items, cls=ReplayBuffer):
    buffer = cls(storage=storage, batch_size=2)
    buffer.extend(items)
    return buffer


def padded(value: float = 0.0) -> TensorDict:
    batch = split_trajectories(FLAT, done_key="done")
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        batch[key][~batch["mask"]] = value
    return batch


def ensemble():
    parts = [filled(LazyTensorStorage(10), part, TensorDictReplayBuffer) for part in (FLAT[:4], FLAT[4:])]
    return ReplayBufferEnsemble(*parts, p=[0.5, 0.5], batch_size=2)


SOURCES = {
    "list": lambda: EPISODES,
    "tuple of a list": lambda: (EPISODES[:2], EPISODES[2]),
    "lazy stack": lambda: lazy_stack(EPISODES),
    "padded": padded,
    "padding of NaN": lambda: padded(torch.nan),
    "padded by a collector": lambda: padded(9.0).rename_key_("mask", ("collector", "mask")),
    "mask [B, T, 1]": lambda: padded(9.0).apply(lambda x: x).update({"mask": padded()["mask"].unsqueeze(-1)}),
    "ListStorage of episodes": lambda: filled(ListStorage(9), EPISODES),
    "ListStorage of steps": lambda: filled(ListStorage(20), FLAT, TensorDictReplayBuffer),
    "LazyStackStorage": lambda: filled(LazyStackStorage(9), EPISODES),
    "padded in a buffer": lambda: filled(LazyTensorStorage(9), padded(9.0)),
    "ensemble": ensemble,
}


@pytest.mark.parametrize("name", SOURCES)
def test_containers_hold_the_same_rows(name):
    found, true = load_offline_dataset(SOURCES[name]()), load_offline_dataset(FLAT)
    for key in true[:].keys(True, True):
        assert torch.equal(found[:][key], true[:][key]), key
    assert torch.equal(found.episode_returns, true.episode_returns) and len(true.episode_returns) == len(LENGTHS)
    assert torch.equal(found.observation_loc, true.observation_loc)
    assert "\n" not in found.name and len(found.name) < 40


@pytest.mark.parametrize(
    "name", [name for name in SOURCES if "Storage" in name or name in ("padded in a buffer", "ensemble")]
)
def test_buffers_of_the_users_count_valid_rows_alone(name):
    found, true = SOURCES[name](), load_offline_dataset(FLAT, batch_size=2)
    scales, spreads = [], []
    for buffer in (found, true):
        loss = build_loss()
        scales.append(measure_residual_scale(loss, buffer))
        spreads.append(fit_critics(loss, buffer, steps=1).reward_scale)
        assert with_anchor_actions(loss, buffer)[:].numel() >= len(FLAT)
    torch.testing.assert_close(*scales)
    torch.testing.assert_close(*spreads)
    rows = [chunk_actions(buffer, 2)[:] for buffer in (found, true)]
    assert torch.equal(rows[0]["action"], rows[1]["action"])


@pytest.mark.parametrize(
    "source, message",
    [
        (lambda: [], "list: the data set holds no step"),
        (lambda: [1, 2], "list: it holds a int; expected TensorDicts"),
        (lambda: [EPISODES[0], EPISODES[1].exclude(("next", "reward"))], r"no array \('next', 'reward'\)"),
        (lambda: [EPISODES[0], EPISODES[1].set("episode", torch.zeros(1))], "'episode' is in some of the TensorDicts"),
        (lambda: [EPISODES[0], EPISODES[1].clone().set("action", torch.rand(1, 2))], "'action': shapes"),
        (lambda: split_trajectories(FLAT, done_key="done", as_nested=True), "nested tensors: give a list"),
        (lambda: padded().set("mask", torch.zeros(3, 6, dtype=torch.bool)), "the data set holds no step"),
        (lambda: filled(ListStorage(3), [1, 2]), "ReplayBuffer: its rows cannot be stacked|it holds"),
    ],
)
def test_what_is_refused_is_refused_in_one_short_line(source, message):
    with pytest.raises(InputError, match=message) as caught:
        load_offline_dataset(source())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("device", ["gpu", "cuda:77"])
def test_a_device_that_is_not_here_is_named(device):
    for call in (lambda: load_offline_dataset(FLAT, device=device), lambda: make_spar_loss(3, SPEC, device=device)):
        with pytest.raises(InputError, match=f"device={device}: not available here"):
            call()


@pytest.mark.parametrize("loc, scale", [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_statistics_that_divide_by_nothing_are_refused(loc, scale):
    with pytest.raises(InputError, match="observation_stats: means must be finite, standard deviations finite and ab"):
        make_spar_loss(3, SPEC, observation_stats=(torch.full((3,), loc), torch.full((3,), scale)))


@pytest.mark.parametrize(
    "change, found", [(lambda x: x.double(), "torch.float64 cpu"), (lambda x: x.to("meta"), "torch.float32 meta")]
)
def test_an_update_names_the_entry_whose_type_or_device_does_not_fit(change, found):
    update = SPARUpdate(make_spar_loss(5, SPEC))
    with pytest.raises(InputError, match=rf"cannot take this batch, which holds .*'observation': '\[5\] {found}'"):
        update(change(FLAT))
