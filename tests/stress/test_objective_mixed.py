"""SPARLoss beside TorchRL's losses on one batch, and with every key nested."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from helpers import ACTION, OBSERVATION, make_batch, total
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import BCLoss, CQLLoss, IQLLoss, TD3BCLoss

from torchrl_spar import FrozenAnchor, InputError, ResidualHead, ResidualVAE, SPARActor, SPARLoss, make_spar_loss

SPEC = Bounded(-1, 1, (ACTION,))


class Cat(nn.Module):
    """A linear layer on all inputs; with ``split``, its two halves."""

    def __init__(self, *sizes: int, split: bool = False) -> None:
        super().__init__()
        self.linear, self.split = nn.Linear(*sizes), split

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        out = self.linear(torch.cat(inputs, -1))
        return out.chunk(2, -1) if self.split else out


# ---------------------------------------------------------------- beside other losses


def torchrl_losses() -> dict[str, nn.Module]:
    def critic() -> ValueOperator:
        return ValueOperator(Cat(OBSERVATION + ACTION, 1), in_keys=["observation", "action"])

    def gaussian() -> ProbabilisticActor:
        network = nn.Sequential(nn.Linear(OBSERVATION, 2 * ACTION), NormalParamExtractor())
        return ProbabilisticActor(
            TensorDictModule(network, ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"], distribution_class=TanhNormal, spec=SPEC,
        )  # fmt: skip

    def plain() -> TensorDictModule:
        return TensorDictModule(nn.Sequential(nn.Linear(OBSERVATION, ACTION), nn.Tanh()), ["observation"], ["action"])

    losses = {
        "iql": IQLLoss(gaussian(), critic(), ValueOperator(nn.Linear(OBSERVATION, 1), in_keys=["observation"])),
        "cql": CQLLoss(gaussian(), critic(), action_spec=SPEC),
        "td3bc": TD3BCLoss(plain(), critic(), action_spec=SPEC),
        "bc": BCLoss(plain()),
    }
    for name in ("iql", "cql", "td3bc"):
        losses[name].make_value_estimator(gamma=0.9)
    return losses


@pytest.fixture
def losses():
    torch.manual_seed(0)
    others = torchrl_losses()
    spar = make_spar_loss(OBSERVATION, SPEC, anchor=others["bc"].actor_network, hidden=[8])
    return {**others, "spar": spar}


def value_of(loss, batch, seed):
    torch.manual_seed(seed)
    return total(loss(batch))


def gradients(losses):
    return {
        (name, key): None if parameter.grad is None else parameter.grad.clone()
        for name, loss in losses.items()
        for key, parameter in loss.named_parameters()
    }


@pytest.mark.filterwarnings("ignore")  # that no target updater is set
@pytest.mark.parametrize("order", [1, -1])
def test_each_loss_has_the_gradients_it_has_alone(losses, order):
    for seed, loss in enumerate(losses.values()):
        value_of(loss, make_batch(12), seed).backward()
    alone = gradients(losses)
    for loss in losses.values():
        loss.zero_grad(set_to_none=True)
    batch, seeds = make_batch(12), {name: seed for seed, name in enumerate(losses)}
    values = [value_of(losses[name], batch, seeds[name]) for name in list(losses)[::order]]
    sum(values).backward()
    mixed = gradients(losses)
    for key, grad in alone.items():
        assert (grad is None) == (mixed[key] is None), key
        if grad is not None:
            torch.testing.assert_close(mixed[key], grad)
    anchor = {key: value.clone() for key, value in losses["spar"].anchor.state_dict().items()}
    parameters = [parameter for loss in losses.values() for parameter in loss.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    torch.optim.Adam(parameters, lr=1e-3).step()
    for old, parameter in zip(before, parameters):
        assert torch.equal(old, parameter) == (parameter.grad is None or not parameter.grad.any())
    for key, value in losses["spar"].anchor.state_dict().items():
        assert torch.equal(value, anchor[key])


# ---------------------------------------------------------------- nested keys


def small_loss(key) -> SPARLoss:
    """Linear networks on the keys that ``key`` makes of the default names."""
    obs, act, base = key("observation"), key("action"), key("anchor_action")
    vae = ResidualVAE(
        TensorDictModule(
            Cat(OBSERVATION + 2 * ACTION, 8, split=True), [obs, base, key("residual")],
            [key("latent_loc"), key("latent_log_std")],
        ),
        TensorDictModule(Cat(OBSERVATION + ACTION + 4, ACTION), [obs, base, key("latent")], [key("residual")]),
        latent_key=key("latent"),
    )  # fmt: skip
    actor = SPARActor(
        FrozenAnchor(TensorDictModule(nn.Linear(OBSERVATION, ACTION), [obs], [act]), action_key=act),
        ResidualHead(Cat(OBSERVATION + ACTION, ACTION), [obs, base], [key("residual")]),
        action_spec=SPEC, anchor_action_key=base, residual_key=key("residual"),
    )  # fmt: skip
    critic = TensorDictModule(Cat(OBSERVATION + ACTION, 1), [obs, act], [key("state_action_value")])
    value = TensorDictModule(nn.Linear(OBSERVATION, 1), [obs], [key("state_value")])
    loss = SPARLoss(actor, critic, vae, value, value_mix=0.5, num_candidates=4)
    loss.set_keys(**{field.name: key(field.default) for field in fields(SPARLoss._AcceptedKeys)})
    return loss


def test_with_every_key_nested_the_numbers_are_the_same():
    def nested(name):
        return ("robot", "arm", name)

    flat, deep = small_loss(lambda name: name), small_loss(nested)
    assert all(isinstance(getattr(deep.tensor_keys, field.name), tuple) for field in fields(SPARLoss._AcceptedKeys))
    deep.load_state_dict(flat.state_dict())
    batch = make_batch(12)
    torch.manual_seed(0)
    # Each of these is read where it is given, none is asked for.
    batch["anchor_action"] = torch.rand(12, ACTION)
    batch["next", "anchor_action"] = torch.rand(12, ACTION)
    for name, shape in (("action_noise", (ACTION,)), ("candidate_noise", (3, 4)), ("latent_noise", (4,))):
        batch[name] = torch.randn(12, *shape)
    batch["priority_weight"] = torch.linspace(0.1, 2, 12)
    moved = TensorDict(batch_size=[12])
    for key, value in batch.items(True, True):
        moved[("next", *nested(key[1])) if isinstance(key, tuple) else nested(key)] = value
    before = set(moved.keys(True, True))
    outs = flat(batch), deep(moved)
    torch.testing.assert_close(outs[0], outs[1])
    for out in outs:
        total(out).backward()
    for one, two in zip(flat.parameters(), deep.parameters()):
        torch.testing.assert_close(one.grad, two.grad)
    assert set(moved.keys(True, True)) - before == {nested("td_error")}
    torch.testing.assert_close(moved[nested("td_error")], batch["td_error"])
    for name in ("anchor_action", "action_noise", "candidate_noise", "latent_noise", "priority_weight"):
        changed = moved.clone()
        changed[nested(name)] *= torch.linspace(0.5, 2, 12).view(12, *[1] * (changed[nested(name)].ndim - 1))
        assert total(deep(changed)) != total(outs[1]), name
    for key in deep.in_keys:
        with pytest.raises(InputError, match=key[-1]):
            deep(moved.exclude(key))


@pytest.mark.parametrize("value_mix", [0.0, 0.5])
def test_what_the_value_network_alone_reads_is_asked_for_where_it_is_read(value_mix):
    parts = make_spar_loss(OBSERVATION, SPEC, hidden=[8])
    value = ValueOperator(nn.Linear(2, 1), in_keys=["privileged"])
    loss = SPARLoss(parts.actor_network, parts.qvalue_network, parts.residual_vae, value, value_mix=value_mix)
    batch = make_batch(12).set("privileged", torch.randn(12, 2))
    batch["next", "privileged"] = torch.randn(12, 2)
    assert ("privileged" in loss.in_keys, ("next", "privileged") in loss.in_keys) == (True, value_mix > 0)
    loss(batch.select(*loss.in_keys))
    for key in ["privileged", *([("next", "privileged")] if value_mix else [])]:
        with pytest.raises(InputError, match="privileged"):
            loss(batch.exclude(key))


def test_a_nested_priority_weight_scales_the_losses(make_loss):
    loss, batch = make_loss(), make_batch(12)
    loss.reduction = "none"
    torch.manual_seed(0)
    plain = loss(batch.clone())
    loss.set_keys(priority_weight=("replay", "weight"))
    batch["replay", "weight"] = torch.linspace(0.1, 2, 12)
    torch.manual_seed(0)
    torch.testing.assert_close(loss(batch)["loss_value"], plain["loss_value"] * batch["replay", "weight"])
