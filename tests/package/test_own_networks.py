"""SPARLoss with networks of the user's own, alone and with IQLLoss on one optimiser."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from helpers import ACTION, OBSERVATION, make_batch, total
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import CQLLoss, IQLLoss, SoftUpdate

from torchrl_spar import (
    FrozenAnchor,
    GaussianEncoder,
    InputError,
    ResidualHead,
    ResidualVAE,
    SPARActor,
    SPARLoss,
    SPARUpdate,
    fit_anchor,
    fit_critics,
    fit_vae,
    load_offline_dataset,
    load_policy,
    make_spar_loss,
    save_policy,
    share_critics,
)

SPEC = Bounded(-1, 1, (ACTION,))
STATE = ["observation", "anchor_action"]
LATENT = 4


class Joined(nn.Module):
    """An MLP on all its inputs side by side: the whole of what an own network must be."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = MLP(inputs, outputs, num_cells=[16], activation_class=nn.SiLU)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.body(torch.cat(inputs, -1))


def make_anchor() -> TensorDictModule:
    return TensorDictModule(nn.Sequential(Joined(OBSERVATION, ACTION), nn.Tanh()), ["observation"], ["action"])


def make_vae(decoded: int = ACTION) -> ResidualVAE:
    encoder = GaussianEncoder(Joined(OBSERVATION + 2 * ACTION, 2 * LATENT))
    return ResidualVAE(
        TensorDictModule(encoder, [*STATE, "residual"], ["latent_loc", "latent_log_std"]),
        TensorDictModule(Joined(OBSERVATION + ACTION + LATENT, decoded), [*STATE, "latent"], ["residual"]),
    )


def make_actor(anchor: nn.Module, outputs: int = ACTION) -> SPARActor:
    return SPARActor(anchor, ResidualHead(Joined(OBSERVATION + ACTION, outputs), STATE), action_spec=SPEC)


def make_critics(count: int = 4, outputs: int = 1) -> list[ValueOperator]:
    return [
        ValueOperator(Joined(OBSERVATION + ACTION, outputs), in_keys=["observation", "action"]) for _ in range(count)
    ]


def make_loss(**options) -> SPARLoss:
    torch.manual_seed(0)
    return SPARLoss(make_actor(make_anchor()), make_critics(), make_vae(), **options)


def make_iql(critics: list[nn.Module], value: nn.Module | None = None) -> IQLLoss:
    gaussian = nn.Sequential(Joined(OBSERVATION, 2 * ACTION), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(gaussian, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"], distribution_class=TanhNormal,
    )  # fmt: skip
    value = ValueOperator(value or Joined(OBSERVATION, 1), in_keys=["observation"])
    options = {"num_qvalue_nets": len(critics), "loss_function": "l2", "deactivate_vmap": True}
    loss = IQLLoss(actor, critics, value, **options)
    loss.make_value_estimator(gamma=0.99)
    return loss


def test_the_whole_training_with_own_networks(tmp_path):
    torch.manual_seed(0)
    data = load_offline_dataset(make_batch(64), batch_size=16)
    anchor = fit_anchor(make_anchor(), data, steps=20)
    loss = SPARLoss(make_actor(anchor), make_critics(), make_vae(), joint_vae=False)
    fit_vae(loss, data, steps=20)
    fit_critics(loss, data, steps=20)
    start = loss.state_dict()["actor_network_params.head.module.body.0.weight"].clone()
    update = SPARUpdate(loss)
    for _ in range(20):
        update(data.sample())
    assert not torch.equal(start, loss.state_dict()["actor_network_params.head.module.body.0.weight"])

    save_policy(loss, tmp_path / "policy.pt", env="Toy-v0")
    with pytest.raises(InputError, match=r"networks of your own.*policy="):
        load_policy(tmp_path / "policy.pt")
    policy, facts = load_policy(tmp_path / "policy.pt", policy=make_actor(make_anchor()))
    observation = torch.randn(7, OBSERVATION)
    assert torch.equal(policy(observation=observation), loss.actor(observation=observation))
    assert facts == {"env": "Toy-v0"}
    built = load_policy(
        tmp_path / "policy.pt", policy=lambda facts: make_actor(make_anchor()) if facts["env"] == "Toy-v0" else None
    )[0]
    assert torch.equal(built(observation=observation), policy(observation=observation))
    with pytest.raises(InputError, match=r"networks of your own.*policy="):
        load_policy(tmp_path / "policy.pt", policy=lambda facts: None)
    with pytest.raises(InputError, match=r"does not fit .*head"):
        load_policy(tmp_path / "policy.pt", policy=make_actor(make_anchor(), outputs=2))


# ---------------------------------------------------------------- with IQL


def test_iql_beside_spar_with_critics_of_its_own():
    spar, batch = make_loss(), make_batch(12)
    iql = make_iql(make_critics(2))
    both = nn.ModuleList([spar, iql])
    optimizer = torch.optim.Adam(both.parameters(), lr=1e-3)
    updaters = [SoftUpdate(loss, tau=0.01) for loss in both]
    torch.manual_seed(1)
    total(spar(batch.clone())).backward()
    alone = [parameter.grad.clone() for parameter in spar.parameters()]
    optimizer.zero_grad()
    torch.manual_seed(1)
    (total(spar(batch)) + total(iql(batch))).backward()
    torch.testing.assert_close([parameter.grad for parameter in spar.parameters()], alone)
    optimizer.step()
    for updater in updaters:
        updater.step()


@pytest.mark.parametrize("value_mix", [0.0, 0.5])
def test_shared_critics_have_the_sum_of_both_gradients_in_one_unit(value_mix):
    torch.manual_seed(0)
    value = ValueOperator(Joined(OBSERVATION, 1), in_keys=["observation"]) if value_mix else None
    options = {"value_mix": value_mix, "reward_scale": 0.01}
    spar = SPARLoss(make_actor(make_anchor()), make_critics(), make_vae(), value, **options)
    batch = make_batch(12)
    shared = share_critics(spar, make_iql(make_critics()))
    # The truth: an IQL of its own with the same weights, on rewards that are scaled by hand.
    apart = make_iql(make_critics())
    for name in ("actor_network", "qvalue_network", "value_network"):
        for prefix in ("", "target_"):
            params = getattr(apart, f"{prefix}{name}_params", None)
            if params is not None:
                params.data.update_(getattr(shared, f"{prefix}{name}_params").data)
    scaled = batch.clone()
    scaled["next", "reward"] = 0.01 * scaled["next", "reward"]
    torch.manual_seed(1)
    total(spar(batch.clone())).backward()
    expected = [parameter.grad.clone() for parameter in spar.qvalue_network_params.parameters()]
    total(apart(scaled)).backward()
    spar.zero_grad()
    torch.manual_seed(1)
    (total(spar(batch)) + total(shared(batch))).backward()
    theirs = [parameter.grad for parameter in apart.qvalue_network_params.parameters()]
    for parameter, one, other in zip(spar.qvalue_network_params.parameters(), expected, theirs):
        torch.testing.assert_close(parameter.grad, one + other)
    # Each parameter once, targets moved by SPAR's updater alone, and the batch as it was.
    both = nn.ModuleList([spar, shared])
    found = list(both.parameters())
    assert len(found) == len({id(parameter) for parameter in found})
    torch.optim.Adam(found, lr=0.1).step()
    before = shared.target_qvalue_network_params.data.clone()
    SoftUpdate(spar, tau=0.5).step()
    assert not (shared.target_qvalue_network_params.data == before).all()
    assert torch.equal(batch["next", "reward"], make_batch(12)["next", "reward"])
    has_value = "value_network_params" in dict(spar.named_children())
    assert (has_value and shared.value_network_params is spar.value_network_params) == bool(value_mix)


def test_what_cannot_be_shared_is_named():
    spar = make_loss()
    with pytest.raises(InputError, match=r"qvalue_network: the parameters of IQLLoss differ .*copies of spar.qvalue_n"):
        share_critics(spar, make_iql(make_critics(2)))
    with pytest.raises(InputError, match=r"differ"):
        share_critics(spar, make_iql(make_critics(4, outputs=2)))
    value = ValueOperator(Joined(OBSERVATION, 1), in_keys=["observation"])
    mixed = SPARLoss(make_actor(make_anchor()), make_critics(), make_vae(), value, value_mix=0.5)
    wider = make_iql(make_critics(), value=MLP(OBSERVATION, 1, num_cells=[8]))
    with pytest.raises(InputError, match=r"value_network: .*IQLLoss differ .*give it a copy of spar.value_network$"):
        share_critics(mixed, wider)
    with pytest.raises(InputError, match="with a TensorDict"):
        iql = share_critics(spar, make_iql([deepcopy(spar.qvalue_network) for _ in range(4)]))
        batch = make_batch(4)
        iql(**{"_".join(key) if isinstance(key, tuple) else key: batch[key] for key in iql.in_keys})
    two = make_spar_loss(OBSERVATION, SPEC, hidden=[8], num_qvalue_nets=2)
    gaussian = deepcopy(make_iql(make_critics(2)).actor_network)
    critics = [deepcopy(two.qvalue_network) for _ in range(2)]
    cql = share_critics(two, CQLLoss(gaussian, critics, action_spec=SPEC))
    assert cql.qvalue_network_params is two.qvalue_network_params


# ---------------------------------------------------------------- mistakes


def test_a_plain_actor_is_told_where_it_belongs():
    with pytest.raises(InputError, match=r"TensorDictModule: an actor of your own is the anchor, as in make_spar_loss"):
        SPARLoss(make_anchor(), make_critics(), make_vae())


def test_a_scale_in_the_place_of_a_log_std_is_refused():
    network = nn.Sequential(Joined(OBSERVATION + 2 * ACTION, 2 * LATENT), NormalParamExtractor())
    encoder = TensorDictModule(network, [*STATE, "residual"], ["latent_loc", "latent_log_std"])
    with pytest.raises(InputError, match=r"NormalParamExtractor, .*GaussianEncoder"):
        ResidualVAE(encoder, make_vae().decoder)


@pytest.mark.parametrize("key", ["latent_scale", "std", ("latent", "scale")])
def test_a_key_of_a_scale_in_the_place_of_a_log_std_is_refused(key):
    class Halves(torch.nn.Module):
        def forward(self, *inputs):
            return torch.cat(inputs, -1)[..., : 2 * LATENT].chunk(2, -1)

    def named(key, network=None):
        encoder = TensorDictModule(network or Halves(), [*STATE, "residual"], ["latent_loc", key])
        return ResidualVAE(encoder, make_vae().decoder)

    with pytest.raises(InputError, match=r"the encoder writes .*logarithm of a standard deviation.*GaussianEncoder"):
        named(key)
    for logarithm in ("latent_log_scale", ("latent", "logstd"), "ln_std", ("rescaled", "rho")):
        assert named(logarithm).out_keys[1] == logarithm
    # GaussianEncoder gives the logarithm, whatever it is called.
    assert named(key, GaussianEncoder(Joined(OBSERVATION + 2 * ACTION, 2 * LATENT))).out_keys[1] == key


def test_a_list_of_another_length_is_named():
    with pytest.raises(InputError, match=r"a list of 2 critics, but num_qvalue_nets=4"):
        SPARLoss(make_actor(make_anchor()), make_critics(2), make_vae())


@pytest.mark.parametrize("critics", [lambda: make_critics(1), lambda: make_critics(1)[0]], ids=["list", "module"])
def test_one_critic_learns(critics):
    loss = SPARLoss(make_actor(make_anchor()), critics(), make_vae(), num_qvalue_nets=1)
    before = deepcopy(loss.qvalue_network_params)
    SPARUpdate(loss)(make_batch(12))
    pairs = zip(loss.qvalue_network_params.values(True, True), before.values(True, True), strict=True)
    changed = [bool((now != was).any()) for now, was in pairs]
    assert changed and all(changed)


class Pictures(nn.Module):
    """A convolution that takes one batch dimension, over the observation as an image."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, (OBSERVATION, 1))
        self.joint = nn.Linear(2 + ACTION, 1)

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        image = self.convolution(observation[..., None, :, None]).flatten(-3)
        return self.joint(torch.cat((image, action), -1))


class Attention(nn.Module):
    """The observation and the action as two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.ModuleList([nn.Linear(size, 8) for size in (OBSERVATION, ACTION)])
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.value = nn.Linear(8, 1)

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        tokens = [embed(part) for embed, part in zip(self.tokens, (observation, action))]
        return self.value(self.mix(torch.stack(tokens, -2)).mean(-2))


class Normalised(nn.Module):
    """BatchNorm with statistics of its own, over as many features as the batch has rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.value = nn.Linear(OBSERVATION + ACTION, 12), nn.BatchNorm1d(12), nn.Linear(12, 1)
        nn.init.normal_(self.norm.running_mean)
        self.eval()

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.value(self.norm(self.embed(torch.cat((observation, action), -1))))


@pytest.mark.parametrize("network", [Pictures, Attention, Normalised])
def test_candidates_are_one_batch_to_a_network_of_ones_own(network):
    torch.manual_seed(0)
    critics = [ValueOperator(network(), in_keys=["observation", "action"]) for _ in range(4)]
    loss = SPARLoss(make_actor(make_anchor()), critics, make_vae())
    loss.eval()
    for critic in critics:
        critic.eval()
    batch = make_batch(12)
    assert loss(batch)["loss_actor"].isfinite()
    actions = torch.rand(5, 12, ACTION) * 2 - 1
    at_once = loss._qvalue(batch, actions, loss.qvalue_network_params)
    one_by_one = [
        [critic(observation=batch["observation"], action=action)[..., 0] for action in actions] for critic in critics
    ]
    torch.testing.assert_close(at_once, torch.stack([torch.stack(values) for values in one_by_one]))


def test_networks_that_nothing_would_train_are_refused():
    shared = Joined(OBSERVATION, 8)
    critics = [ValueOperator(nn.Sequential(shared, nn.Linear(8, 1)), in_keys=["observation"]) for _ in range(4)]
    with pytest.raises(InputError, match="critics share parameters that are trained"):
        SPARLoss(make_actor(make_anchor()), critics, make_vae())
    shared.requires_grad_(False)
    SPARLoss(make_actor(make_anchor()), critics, make_vae())
    loss = make_loss()
    with pytest.raises(InputError, match=r"its head has no parameter that is trained.*requires_grad_"):
        SPARLoss(loss.actor, make_critics(), make_vae())
    again = deepcopy(loss.actor)
    again.head.requires_grad_(True)
    assert SPARLoss(again, make_critics(), make_vae()).actor_network_params.get("head").requires_grad


def test_an_output_of_another_name_is_named():
    anchor = TensorDictModule(nn.Sequential(Joined(OBSERVATION, ACTION), nn.Tanh()), ["observation"], ["act"])
    critics = [TensorDictModule(Joined(OBSERVATION + ACTION, 1), ["observation", "action"], ["q"]) for _ in range(4)]
    with pytest.raises(InputError, match=r"a critic writes \['q'\], not 'state_action_value': .*set_keys"):
        SPARLoss(make_actor(make_anchor()), critics, make_vae())(make_batch(12))
    with pytest.raises(InputError, match=r"the anchor writes \['act'.*not 'action': .*set_keys"):
        SPARLoss(make_actor(FrozenAnchor(anchor, action_key="act")), make_critics(), make_vae())(make_batch(12))


def test_reduction_none_is_torchrls_default():
    assert make_loss(reduction=None).reduction == "mean"
    assert make_loss().reduction == "mean"


def test_a_value_mix_needs_a_value_network():
    with pytest.raises(InputError, match=r"value_mix=0.5: must be 0 without a value_network"):
        make_loss(value_mix=0.5)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        # These would be repeated along the action without a word.
        (
            lambda: (make_actor(make_anchor(), outputs=1), make_critics(), make_vae()),
            r"head writes .* of size 1",
        ),
        (
            lambda: (make_actor(make_anchor()), make_critics(), make_vae(decoded=1)),
            r"decoder writes .* of size 1",
        ),
        (lambda: (make_actor(make_anchor()), make_critics(outputs=2), make_vae()), r"critic writes .* of size 2"),
    ],
)
def test_wrong_outputs_are_named(parts, message):
    with pytest.raises(InputError, match=message):
        SPARLoss(*parts())(make_batch(12))


def test_a_batch_of_other_sizes_is_named():
    loss, batch = make_spar_loss(OBSERVATION, SPEC, hidden=[8]), make_batch(12)
    for part in (batch, batch["next"]):
        part["observation"] = torch.randn(12, OBSERVATION + 1)
    with pytest.raises(InputError, match=r"anchor cannot take this batch, .*'observation': '\[6\] torch.float32 cpu'"):
        loss(batch)
    batch = make_batch(12).set("action", torch.rand(12, ACTION + 1))
    with pytest.raises(InputError, match=r"'action' has shape \(12, 4\); this loss needs \(12, 3\)"):
        loss(batch)
    with pytest.raises(InputError, match=r"lacks \[\('next', 'reward'\)\]"):
        loss(make_batch(12).exclude(("next", "reward")))


def test_noise_of_another_shape_is_named():
    loss = make_spar_loss(OBSERVATION, SPEC, hidden=[8], num_candidates=64)
    for key, shape in (("candidate_noise", (7, 2 * ACTION)), ("action_noise", (1,)), ("latent_noise", (1,))):
        with pytest.raises(InputError, match=rf"'{key}' has shape \(12, {shape[0]}"):
            loss(make_batch(12).set(key, torch.randn(12, *shape)))
