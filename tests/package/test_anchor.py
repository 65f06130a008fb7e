"""The anchor stays what it was, whatever is done to it."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import MLP, LSTMModule, ProbabilisticActor, TanhNormal

from torchrl_spar import FrozenAnchor, InputError


def deterministic():
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    return TensorDictModule(net, ["observation"], ["action"])


def probabilistic():
    net = nn.Sequential(MLP(3, 4, num_cells=[8]), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"], out_keys=["action"], distribution_class=TanhNormal, return_log_prob=True,
    )  # fmt: skip


def states(seed=0, n=6):
    return TensorDict({"observation": torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))}, [n])


@pytest.fixture(params=[deterministic, probabilistic])
def actor(request):
    torch.manual_seed(0)
    return request.param()


def test_equals_the_actor_and_leaves_it_alone(actor):
    anchor = FrozenAnchor(actor)
    assert all(p.requires_grad for p in actor.parameters()) and actor.training
    actor.eval()
    torch.testing.assert_close(anchor(states())["action"], actor(states())["action"])
    for p in actor.parameters():
        p.data.zero_()
    assert anchor(states())["action"].abs().sum() > 0


def test_probabilistic_actor_answers_with_its_mode():
    actor = probabilistic()
    out = FrozenAnchor(actor)(states())
    torch.testing.assert_close(out["action"], actor.get_dist(states()).loc.tanh())
    assert set(out.keys()) == {"observation", "action"}


def test_nothing_changes_it(actor):
    anchor = FrozenAnchor(actor)
    parent = TensorDictSequential(anchor, TensorDictModule(nn.Linear(2, 1), ["action"], ["value"]))
    before = anchor(states())["action"]
    assert not list(anchor.parameters())
    assert len(list(parent.parameters())) == 2
    parent.train()
    parent.requires_grad_(True)
    parent.reset_parameters_recursive()
    parent.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    for _ in range(3):
        anchor(states(seed=1))  # batch statistics must not move
    assert not any(module.training for module in anchor.modules())
    assert not anchor(states())["action"].requires_grad
    torch.testing.assert_close(anchor(states())["action"], before, rtol=0, atol=0)


def test_no_gradient_passes(actor):
    data = states()
    data["observation"].requires_grad_()
    assert not FrozenAnchor(actor)(data)["action"].requires_grad


@pytest.mark.parametrize("copy", [deepcopy, lambda anchor: pickle.loads(pickle.dumps(anchor)), FrozenAnchor])
def test_copies(actor, copy):
    anchor = FrozenAnchor(actor)
    torch.testing.assert_close(copy(anchor)(states())["action"], anchor(states())["action"])


def test_saved_under_the_actors_own_names(actor):
    anchor = FrozenAnchor(actor)
    assert {key.removeprefix("actor.") for key in anchor.state_dict()} == set(actor.state_dict())
    other = FrozenAnchor(probabilistic() if isinstance(actor, ProbabilisticActor) else deterministic())
    other.load_state_dict(anchor.state_dict())
    torch.testing.assert_close(other(states())["action"], anchor(states())["action"])


def test_tied_parameters_stay_tied():
    layer = nn.Linear(3, 3)
    anchor = FrozenAnchor(TensorDictModule(nn.Sequential(layer, nn.Tanh(), layer), ["observation"], ["action"]))
    weights = {tensor.data_ptr() for key, tensor in anchor.state_dict().items() if key.endswith("weight")}
    assert len(weights) == 1


def test_recurrent_actor():
    torch.manual_seed(0)
    lstm = LSTMModule(3, 4, in_key="observation", out_key="features", default_recurrent_mode=True)
    actor = TensorDictSequential(lstm, TensorDictModule(nn.Linear(4, 2), ["features"], ["action"]))
    data = TensorDict({"observation": torch.randn(2, 5, 3), "is_init": torch.zeros(2, 5, 1, dtype=torch.bool)}, [2, 5])
    anchor = FrozenAnchor(actor)
    expected = actor(data.copy())["action"]
    data = data.select(*anchor.in_keys, strict=False)
    for key in anchor.in_keys:
        if key not in data.keys():
            data[key] = torch.zeros(2, 5, 1, 4)
    torch.testing.assert_close(anchor(data)["action"], expected)


def test_wrong_actors_are_named():
    with pytest.raises(InputError, match="Linear"):
        FrozenAnchor(nn.Linear(3, 2))
    with pytest.raises(InputError, match="'action'"):
        FrozenAnchor(TensorDictModule(nn.Linear(3, 2), ["observation"], ["act"]))
    with pytest.raises(InputError, match="lazy"):
        FrozenAnchor(TensorDictModule(nn.LazyLinear(2), ["observation"], ["action"]))
    with pytest.raises(KeyError, match="observation"):
        FrozenAnchor(TensorDictModule(nn.Linear(3, 2), ["observation"], ["action"]))(TensorDict({}, [2]))
