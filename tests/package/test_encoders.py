"""Encoders of images and dictionaries: one before the loss that all terms share, or one in each network."""

from __future__ import annotations

import torch
from helpers import ACTION, make_batch, total
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import MLP, ConvNet
from torchrl.objectives import SoftUpdate

from torchrl_spar import ResidualHead, ResidualVAE, SPARActor, SPARLoss, make_spar_loss
from torchrl_spar.residual import GaussianEncoder

SPEC = Bounded(-1, 1, (ACTION,))
FEATURES, STATE = 6, 4


class Encoder(nn.Module):
    """A tiny convolution of an image, beside a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.image = ConvNet(3, num_cells=[4], kernel_sizes=3, strides=2)
        self.joint = nn.Linear(4 * 9 + STATE, FEATURES)

    def forward(self, pixels: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return self.joint(torch.cat((self.image(pixels), state), -1)).tanh()


IN_KEYS = [("robot", "pixels"), ("robot", "state")]


def encode(key="observation") -> TensorDictModule:
    return TensorDictModule(Encoder(), IN_KEYS, [key])


def make_images(count: int = 6) -> TensorDict:
    batch = make_batch(count).exclude("observation", ("next", "observation"))
    for part in (batch, batch["next"]):
        part["robot"] = TensorDict({"pixels": torch.rand(count, 3, 8, 8), "state": torch.randn(count, STATE)}, [count])
    return batch


def gradients(term, params):
    grads = torch.autograd.grad(term, params, allow_unused=True, retain_graph=True)
    return [grad is not None and bool(grad.abs().sum() > 0) for grad in grads]


def test_one_encoder_before_everything():
    """The anchor brings a copy of the encoder, which stays; the shared one learns from the terms it is given to."""
    torch.manual_seed(0)
    encoder = encode()
    cloned = TensorDictSequential(encoder, TensorDictModule(nn.Linear(FEATURES, ACTION), ["observation"], ["action"]))
    loss = make_spar_loss(FEATURES, SPEC, anchor=cloned, hidden=[8], with_value=True)
    # All entries at the root are images: the features are there only after the encoder.
    batch = make_images()
    before = loss.anchor(batch.clone())["action"]
    policy = TensorDictSequential(encoder, loss.actor)
    assert policy.in_keys == IN_KEYS
    parameters = [*encoder.parameters(), *loss.parameters()]
    optimizer, updater = torch.optim.Adam(parameters, lr=0.01), SoftUpdate(loss, tau=0.5)

    encoded = encoder(batch.clone())
    with torch.no_grad():
        encoded["next"] = encoder(encoded["next"])
    losses = loss(encoded)
    for name in ("loss_qvalue", "loss_value", "loss_actor", "loss_vae"):
        assert all(gradients(losses[name], list(encoder.parameters()))), name
    total(losses).backward()
    optimizer.step()
    updater.step()
    # The shared encoder has moved, the anchor has not.
    torch.testing.assert_close(loss.anchor(batch.clone())["action"], before, rtol=0, atol=0)
    assert not torch.allclose(cloned(batch.clone())["action"], before)
    assert policy(batch.clone())["action"].shape == (6, ACTION)

    # A term that is given detached features leaves the encoder alone.
    detached = loss.actor_loss(encoder(batch.clone()).detach())[0]
    assert not any(gradients(detached, list(encoder.parameters())))


def test_an_encoder_in_each_network():
    torch.manual_seed(0)

    def network(inputs, size, outputs, split=False):
        body = MLP(FEATURES + sum(size for _, size in inputs), size, num_cells=[8])
        module = GaussianEncoder(body) if split else body
        return TensorDictSequential(
            encode("features"), TensorDictModule(module, ["features", *(key for key, _ in inputs)], outputs)
        )

    class PixelHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.body = Encoder(), MLP(FEATURES + ACTION, ACTION, num_cells=[8])

        def forward(self, pixels, state, anchor_action):
            return self.body(self.encoder(pixels, state), anchor_action)

    base, residual, latent = ("anchor_action", ACTION), ("residual", ACTION), ("latent", 4)
    vae = ResidualVAE(
        network([base, residual], 8, ["latent_loc", "latent_log_std"], split=True),
        network([base, latent], ACTION, ["residual"]),
    )  # fmt: skip
    head = ResidualHead(PixelHead(), [*IN_KEYS, "anchor_action"], ["residual"])
    actor = SPARActor(network([], ACTION, ["action"]), head, action_spec=SPEC)
    critics = [network([("action", ACTION)], 1, ["state_action_value"]) for _ in range(2)]
    loss = SPARLoss(actor, critics, vae, network([], 1, ["state_value"]), num_qvalue_nets=2, num_candidates=3)
    batch = make_images()
    losses = loss(batch)
    own = {
        "loss_qvalue": "qvalue_network_params", "loss_value": "value_network_params",
        "loss_actor": "actor_network_params", "loss_vae": "residual_vae_params",
    }  # fmt: skip
    names, params = zip(*loss.named_parameters())
    for term, owner in own.items():
        for name, reached in zip(names, gradients(losses[term], params)):
            assert reached == name.startswith(owner), (term, name)
    assert loss.actor(batch.clone())["action"].shape == (6, ACTION)
