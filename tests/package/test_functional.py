"""Calling a network directly equals calling it through tensordict, values and gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import ACTION, OBSERVATION, make_batch, total
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded

from torchrl_spar import functional, make_spar_loss
from torchrl_spar.functional import call, call_ensemble
from torchrl_spar.networks import ObservationNorm, StateMLP


def make_net(layer_norm=False):
    norm = ObservationNorm(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 1.0]))
    return StateMLP(norm, 3 + 2 + 4, 2, hidden=[8, 8], layer_norm=layer_norm).double()


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3)])
@pytest.mark.parametrize("batch", [(5,), (4, 5)])
def test_inputs_repeat_the_observation(layer_norm, lead, batch):
    """Sharing what the observation adds to the first layer changes nothing."""
    net = make_net(layer_norm)
    observation, action = torch.randn(*batch, 3).double(), torch.randn(*batch, 2).double()
    latent = torch.randn(*lead, *batch, 4).double()
    found = net.functional(TensorDict.from_module(net).to_dict(), observation, action, latent)
    expected = net(observation.expand(*lead, *batch, 3), action.expand(*lead, *batch, 2), latent)
    torch.testing.assert_close(found, expected)


def test_an_anchor_without_parameters_serves_as_one():
    torch.manual_seed(0)
    idle = TensorDictModule(lambda s: 0 * s[..., :ACTION] + 0.25, ["observation"], ["action"])
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), anchor=idle, hidden=[8])
    batch = make_batch(16)
    whole = batch.copy()
    for part in (whole, whole["next"]):
        part["anchor_action"] = torch.full((16, ACTION), 0.25)
    found = []
    for rows in (batch, whole):
        torch.manual_seed(1)
        found.append(total(loss(rows.copy())))
    torch.testing.assert_close(*found)
    found[0].backward()


@pytest.mark.parametrize("head", ["residual", "latent"])
@pytest.mark.parametrize("batch", [(64,), (6, 5)])
def test_the_loss_is_the_same_either_way(make_loss, monkeypatch, head, batch):
    loss = make_loss(head=head, value_mix=0.5).double()
    found, gradients = [], []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(functional, "_direct", lambda module: None)
        loss.zero_grad()
        torch.manual_seed(3)
        losses = loss(make_batch(*batch, dtype=torch.float64))
        total(losses).backward()
        found.append(losses.detach())
        gradients.append({name: param.grad.clone() for name, param in loss.named_parameters()})
    torch.testing.assert_close(found[0].to_dict(), found[1].to_dict())
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())


def test_frozen_parameters_pass_the_gradient_on():
    module = TensorDictModule(make_net(), ["observation", "action", "latent"], ["residual"])
    params = TensorDict.from_module(module)
    state = TensorDict({"observation": torch.randn(5, 3).double(), "action": torch.randn(5, 2).double()}, [5])
    latent = torch.randn(5, 4).double().requires_grad_()
    out = call(module, params, state, {"latent": latent}, frozen=True)["residual"]
    out.sum().backward()
    assert latent.grad.abs().sum() > 0
    assert all(param.grad is None for param in module.parameters())


def test_a_module_with_its_own_forward_is_not_bypassed():
    """Only where the network is all there is to the module is it called without it."""

    class Doubled(TensorDictModule):
        def forward(self, tensordict):
            out = super().forward(tensordict)
            return out.set("residual", 2 * out["residual"])

    net = make_net()
    state = TensorDict({"observation": torch.randn(5, 3), "action": torch.randn(5, 2)}, [5]).double()
    entries = {"latent": torch.randn(5, 4).double()}
    keys = ["observation", "action", "latent"], ["residual"]
    single, doubled = TensorDictModule(net, *keys), Doubled(net, *keys)
    params = TensorDict.from_module(single)
    expected = 2 * call(single, params, state, entries)["residual"]
    torch.testing.assert_close(call(doubled, params, state, entries)["residual"], expected)


@pytest.mark.parametrize("own", [True, False])
def test_a_missing_entry_is_named(own):
    network = make_net() if own else nn.Bilinear(3, 2, 2)
    keys = ["observation", "action", "latent"] if own else ["observation", "action"]
    module = TensorDictModule(network, keys, ["residual"])
    with pytest.raises(KeyError, match="action"):
        call(module, TensorDict.from_module(module), TensorDict({"observation": torch.randn(5, 3)}, [5]), {})


def test_one_critic_or_many():
    nets = [TensorDictModule(make_net(), ["observation", "action", "latent"], ["value"]) for _ in range(3)]
    state = TensorDict({"observation": torch.randn(5, 3), "action": torch.randn(5, 2)}, [5]).double()
    entries = {"latent": torch.randn(7, 5, 4).double()}
    stacked = call_ensemble(nets[0], TensorDict.from_modules(*nets, as_module=False), state, entries, out_key="value")
    assert stacked.shape == (3, 7, 5, 2)
    for net, values in zip(nets, stacked):
        single = call_ensemble(net, TensorDict.from_module(net), state, entries, out_key="value")
        torch.testing.assert_close(single[0], values)
