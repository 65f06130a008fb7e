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
from torchrl_spar.residual import GaussianEncoder


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
    found = net.call_with(TensorDict.from_module(net).to_dict(), observation, action, latent)
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


class Scaled(StateMLP):
    def forward(self, *inputs):
        return 3 + 2 * super().forward(*inputs)


class ScaledEncoder(GaussianEncoder):
    def forward(self, *inputs):
        loc, log_std = super().forward(*inputs)
        return loc + 1, log_std


class Norm(ObservationNorm):
    def forward(self, observation):
        return super().forward(observation).clamp(-1, 1)


class Both(Scaled):
    """Overrides both, so its own ``functional`` counts again."""

    def forward(self, *inputs):
        return 2 * StateMLP.forward(self, *inputs)

    @property
    def functional(self):
        return lambda params, *inputs: 2 * self.call_with(params, *inputs)


def with_layer(net, layer):
    net.mlp[1] = layer
    return net


def hooked(net):
    net.mlp[0].register_forward_hook(lambda module, inputs, output: output + 1)
    return net


def with_own_norm(net):
    net.norm = Norm(torch.zeros(3), torch.ones(3)).double()
    return net


def with_own_forward(net):
    net.forward = lambda *inputs: torch.cat(inputs, -1)[..., :2]
    return net


def of_class(net, kind):
    net.__class__ = kind
    return net


@pytest.mark.parametrize("through", [lambda net: net, GaussianEncoder, ScaledEncoder], ids=["net", "encoder", "own"])
@pytest.mark.parametrize(
    "change",
    [
        lambda net: of_class(net, Scaled), lambda net: of_class(net, Both), with_own_norm, with_own_forward, hooked,
        lambda net: with_layer(net, nn.PReLU().double()), lambda net: with_layer(net, nn.Tanh()),
        lambda net: (nn.utils.parametrizations.weight_norm(net.mlp[2]), net)[1],
    ],
)  # fmt: skip
def test_a_changed_network_is_called_as_it_is(change, through):
    """What is trained is what is deployed, and what it is given are the parameters it is called with."""
    net = through(change(make_net()))
    keys = ["loc", "log_std"] if isinstance(net, GaussianEncoder) else ["out"]
    module = TensorDictModule(net, ["observation", "action", "latent"], keys)
    state = TensorDict({"observation": torch.randn(5, 3), "action": torch.randn(5, 2), "latent": torch.randn(5, 4)})
    state = state.double().auto_batch_size_()
    params = TensorDict.from_module(module)
    found = call(module, params, state, {})
    torch.testing.assert_close(found, {key: module(state.clone())[key] for key in keys})
    halves = params.data.apply(lambda tensor: tensor / 2)
    with halves.to_module(module):
        expected = module(state.clone())
    torch.testing.assert_close(call(module, halves, state, {}), {key: expected[key] for key in keys})
    if len(keys) == 1:
        both = torch.stack([params.data, halves])
        values = call_ensemble(module, both, state, {}, out_key="out")
        torch.testing.assert_close(values, torch.stack([found["out"], expected["out"]]))


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
