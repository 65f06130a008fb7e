"""Training that was stopped and goes on in new objects, against training that was not."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from helpers import ACTION, OBSERVATION, make_batch
from torchrl.data import Bounded

from torchrl_spar import (
    BatchSampler,
    InputError,
    Progress,
    SPARUpdate,
    StackedSPARLoss,
    fit_anchor,
    fit_critics,
    fit_vae,
    load_offline_dataset,
    make_anchor,
    make_spar_loss,
)  # fmt: skip

SPEC = Bounded(-1, 1, (ACTION,))
NAMES = ("loss_bc", "loss_vae", "loss_qvalue", "loss_value")


@pytest.fixture(scope="module")
def data():
    return load_offline_dataset(make_batch(60), batch_size=8)


class Stop(Exception):
    pass


def pretrain(data, saved=None, stop_at=None):
    """All fits, 4 steps each; goes on from `saved`, and after `stop_at` steps in all gives what is to be saved."""
    counted = {"steps": 0, "parts": {}}

    def on_step():
        counted["steps"] += 1
        if counted["steps"] == stop_at:
            raise Stop

    def restored(name, part):
        counted["parts"][name] = part
        if saved is not None and name in saved["parts"]:
            part.load_state_dict(saved["parts"][name])
            if len(counted["parts"]) == len(saved["parts"]):
                torch.set_rng_state(saved["rng"])
        return part

    try:
        progress = restored("progress", Progress(on_step))
        anchor = restored("anchor", make_anchor(OBSERVATION, SPEC, hidden=[8]))
        fit_anchor(anchor, data, steps=4, progress=progress)
        options = dict(anchor=anchor, hidden=[8], value_mix=0.5, joint_vae=False)
        loss = restored("loss", make_spar_loss(OBSERVATION, SPEC, **options))
        fit_vae(loss, data, steps=4, progress=progress)
        fit_critics(loss, data, steps=4, progress=progress)
    except Stop:
        parts = {name: deepcopy(part.state_dict()) for name, part in counted["parts"].items()}
        return {"parts": parts, "rng": torch.get_rng_state()}
    assert [progress.steps(name) for name in NAMES] == [4, 4, 4, 4]
    return loss.state_dict()


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


# In the midst of each fit, and after the last step of each.
@pytest.mark.parametrize("stop_at", [1, 4, 6, 8, 11, 12, 15, 16])
def test_fits_go_on_where_they_were_stopped(data, stop_at):
    torch.manual_seed(0)
    expected = pretrain(data)
    torch.manual_seed(0)
    saved = pretrain(data, stop_at=stop_at)
    torch.manual_seed(1)
    assert_same_bits(pretrain(data, saved), expected)


def test_progress_of_another_length_is_refused(data):
    progress = Progress()
    fit_anchor(make_anchor(OBSERVATION, SPEC, hidden=[4]), data, steps=2, progress=progress)
    with pytest.raises(InputError, match=r"steps=3: .*loss_bc.* 2 steps"):
        fit_anchor(make_anchor(OBSERVATION, SPEC, hidden=[4]), data, steps=3, progress=progress)


@pytest.mark.parametrize("seeds", [1, 2])
def test_updates_go_on_where_they_were_stopped(data, seeds):
    def build(states=()):
        losses = [make_spar_loss(OBSERVATION, SPEC, hidden=[8], joint_vae=True) for _ in range(seeds)]
        for loss, state in zip(losses, states):
            loss.load_state_dict(state)
        return losses, [BatchSampler(loss, data, length=3, seed=seed) for seed, loss in enumerate(losses)]

    def go(losses, samplers, update, blocks):
        for _ in range(blocks):
            batches = [next(sampler) for sampler in samplers]
            update.run(batches[0] if seeds == 1 else torch.stack(batches, 1))
        if seeds > 1:
            update.loss.copy_back()

    def make_update(losses):
        return SPARUpdate(losses[0] if seeds == 1 else StackedSPARLoss(losses), policy_interval=2, decay_steps=20)

    losses, samplers = build()
    update = make_update(losses)
    go(losses, samplers, update, 2)  # an odd number of updates was made when it is saved, below
    update(torch.stack([next(s)[0] for s in samplers]) if seeds > 1 else next(samplers[0])[0])
    if seeds > 1:
        update.loss.copy_back()
    saved = deepcopy([[part.state_dict() for part in parts] for parts in (losses, samplers, [update])])
    go(losses, samplers, update, 3)

    others, other_samplers = build(saved[0])
    for sampler, state in zip(other_samplers, saved[1]):
        sampler.load_state_dict(state)
    other = make_update(others)
    other.load_state_dict(saved[2][0])
    go(others, other_samplers, other, 3)
    for found, expected in zip(others, losses):
        assert_same_bits(found.state_dict(), expected.state_dict())
