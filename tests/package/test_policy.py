"""Saved policies: raw observations in, no code out of the file."""

from __future__ import annotations

import os
import pickle
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ACTION, OBSERVATION
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded

from torchrl_spar import InputError, SPARLoss, load_policy, make_spar_loss, save_policy
from torchrl_spar.networks import StateMLP


@pytest.mark.parametrize("head", ["residual", "latent"])
def test_loaded_policy_takes_raw_observations(make_loss, tmp_path, head):
    loc, scale = torch.full((OBSERVATION,), 100.0), torch.full((OBSERVATION,), 20.0)
    loss = make_loss(head=head, observation_stats=(loc, scale))
    save_policy(loss, tmp_path / "policy.pt", env="Toy-v0", seed=3)
    policy, facts = load_policy(tmp_path / "policy.pt")
    observation = 100 + 20 * torch.randn(50, OBSERVATION)
    torch.testing.assert_close(policy(observation=observation), loss.actor(observation=observation), rtol=0, atol=0)
    assert facts == {"env": "Toy-v0", "seed": 3}
    # The statistics matter: standardised observations would give something else.
    assert not torch.allclose(policy(observation=(observation - loc) / scale), policy(observation=observation))
    assert os.listdir(tmp_path) == ["policy.pt"]


def test_bounds_survive(make_loss, tmp_path):
    loss = make_spar_loss(OBSERVATION, Bounded(-torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), (2,)), hidden=[8])
    save_policy(loss, tmp_path / "policy.pt")
    policy, _ = load_policy(tmp_path / "policy.pt")
    assert policy.low.tolist() == [-1, -2] and policy.high.tolist() == [3, 4]


def test_saving_and_loading_draw_nothing_and_keep_the_type(make_loss, tmp_path):
    loss = make_loss().double()
    state = torch.random.get_rng_state()
    save_policy(loss, tmp_path / "policy.pt")
    policy, _ = load_policy(tmp_path / "policy.pt")
    assert torch.equal(torch.random.get_rng_state(), state)
    observation = torch.randn(7, OBSERVATION, dtype=torch.float64)
    assert torch.equal(policy(observation=observation), loss.actor(observation=observation))


@pytest.mark.parametrize("fact", [np.float64(3.0), Path("x"), {"inner": {1, Path("x")}}, print])
def test_facts_that_could_not_be_read_again_are_refused(make_loss, tmp_path, fact):
    with pytest.raises(InputError, match=f"score=.*{type(fact).__name__}"):
        save_policy(make_loss(), tmp_path / "policy.pt", score=fact)
    assert not os.listdir(tmp_path)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-code-ran",)


def test_damaged_and_hostile_files_are_refused(make_loss, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "policy.pt"
    with pytest.raises(InputError, match=r"policy\.pt: no such"):
        load_policy(path)
    save_policy(make_loss(), path)
    whole = path.read_bytes()
    for content in (b"", b"not a policy", whole[: len(whole) // 2], whole[:-40]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"policy\.pt"):
            load_policy(path)
    torch.save({"format": "something else"}, path)
    with pytest.raises(InputError, match="not a policy"):
        load_policy(path)
    for save in (lambda value: torch.save(value, path), lambda value: path.write_bytes(pickle.dumps(value))):
        save({"format": Hostile()})
        with pytest.raises(InputError, match=r"policy\.pt"):
            load_policy(path)
    assert not (tmp_path / "hostile-code-ran").exists()


def test_a_policy_that_is_loaded_saves_again_and_has_no_critics(make_loss, tmp_path, monkeypatch):
    loss = make_loss()
    save_policy(loss.actor, tmp_path / "policy.pt")
    monkeypatch.setattr(SPARLoss, "__init__", lambda *_, **__: pytest.fail("a loss was built"))
    policy, _ = load_policy(tmp_path / "policy.pt")
    save_policy(policy, tmp_path / "again.pt")
    again, _ = load_policy(tmp_path / "again.pt")
    observation = torch.randn(7, OBSERVATION)
    assert torch.equal(again(observation=observation), loss.actor(observation=observation))


class Shifted(StateMLP):
    def forward(self, *inputs):
        return super().forward(*inputs) + 1


def test_a_policy_whose_types_would_round_the_weights_is_refused(tmp_path):
    def actor(kind):
        return TensorDictModule(torch.nn.Linear(3, 2, dtype=kind), ["observation"], ["action"])

    save_policy(actor(torch.float64), tmp_path / "policy.pt")
    with pytest.raises(InputError, match=r"module\.weight of type torch\.float64"):
        load_policy(tmp_path / "policy.pt", policy=actor(torch.float32))
    save_policy(actor(torch.float32), tmp_path / "policy.pt")
    load_policy(tmp_path / "policy.pt", policy=actor(torch.float64))


def test_a_network_of_another_class_is_not_taken_for_the_default(make_loss, tmp_path):
    """Same names and shapes of weights, another function."""
    loss = make_loss()
    policy = loss.actor
    policy.head.module.__class__ = Shifted
    save_policy(policy, tmp_path / "policy.pt")
    with pytest.raises(InputError, match="networks of your own"):
        load_policy(tmp_path / "policy.pt")
    other = deepcopy(policy)
    for tensor in other.state_dict().values():
        tensor.zero_()
    observation = torch.randn(7, OBSERVATION)
    expected = policy(observation=observation)
    loaded, _ = load_policy(tmp_path / "policy.pt", policy=other)
    assert torch.equal(loaded(observation=observation), expected)


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="missing"):
        save_policy(make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,))), tmp_path / "missing" / "policy.pt")
    assert not os.listdir(tmp_path)
