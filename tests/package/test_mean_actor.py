"""The mean of several policies: against their own actions."""

from __future__ import annotations

import pytest
import torch
from helpers import ACTION, OBSERVATION
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import Bounded
from torchrl.modules import MLP, LSTMModule

from torchrl_spar import (
    FrozenAnchor,
    GuardedActor,
    InputError,
    ResidualHead,
    SPARActor,
    load_policy,
    make_spar_loss,
    mean_actor,
    residual_family,
    save_policy,
)
from torchrl_spar.evaluation.fast_policy import action_function


def make_actor(seed, **options):
    """As if trained: the residual is as large as the anchor's action, so that some actions are clamped."""
    torch.manual_seed(seed)
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8], **options)
    for param in loss.actor.parameters():
        param.data += 0.5 * torch.randn_like(param)
    loss.residual_scale = 0.1 + torch.rand(ACTION)
    return loss.actor


@pytest.fixture
def actors():
    return [make_actor(seed=0), make_actor(seed=1, head="latent"), make_actor(seed=2)]


def test_actions_and_anchor_are_the_means(actors):
    mean, x = mean_actor(actors), torch.randn(100, OBSERVATION)
    actions = [actor(observation=x) for actor in actors]
    assert (torch.stack(actions).abs() == 1).any()
    torch.testing.assert_close(mean(observation=x), sum(actions) / 3)
    torch.testing.assert_close(mean.anchor(observation=x), sum(actor.anchor(observation=x) for actor in actors) / 3)


def test_scaled_residuals_lead_from_the_mean_anchor_to_the_mean(actors):
    mean, x = mean_actor(actors), torch.randn(100, OBSERVATION)
    anchor, action = mean.anchor(observation=x), mean(observation=x)
    family = residual_family(mean, [0, 0.25, 1])
    for share, policy in zip([0, 0.25, 1], family.values()):
        torch.testing.assert_close(policy(observation=x), anchor + share * (action - anchor))


def test_members_that_keep_to_their_anchors(actors):
    """As select_policy leaves them where no gain is sure: without a scale there is no unit."""
    for scale in (torch.zeros(ACTION), torch.cat([torch.zeros(1), torch.ones(ACTION - 1)])):
        for actor in actors:
            actor.residual_scale.copy_(scale)
        mean, x = mean_actor(actors), torch.randn(100, OBSERVATION)
        torch.testing.assert_close(mean(observation=x), sum(actor(observation=x) for actor in actors) / 3)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_the_type_of_the_members_stays(actors, dtype, rounding):
    actors = [actor.to(dtype) for actor in actors]
    actors[0].low.fill_(-1 - 1e-9)
    for actor in actors[1:]:
        actor.low.copy_(actors[0].low)
    mean, x = mean_actor(actors), torch.randn(100, OBSERVATION, dtype=dtype)
    action = mean(observation=x)
    assert action.dtype == dtype and torch.equal(mean.low, actors[0].low)
    expected = sum(actor(observation=x) for actor in actors) / 3
    torch.testing.assert_close(action, expected, rtol=0, atol=rounding)


def test_the_fast_function_gives_the_means_actions_to_the_bit(actors, monkeypatch):
    mean, x = mean_actor(actors), torch.randn(100, OBSERVATION)
    expected = mean(observation=x)
    act = action_function(mean)
    monkeypatch.setattr(SPARActor, "forward", None)  # it calls no module
    assert torch.equal(act(x), expected)


def test_a_guard_falls_back_to_the_mean_anchor(actors):
    mean, x = mean_actor(actors), torch.randn(100, OBSERVATION)
    detector = TensorDictModule(lambda x: x[..., 0] > 0, ["observation"], ["unlike"])
    guarded = GuardedActor(mean, lambda x: detector(observation=x))
    action = guarded(observation=x)[0]
    far = x[:, 0] > 0
    torch.testing.assert_close(action[far], mean.anchor(observation=x)[far])
    torch.testing.assert_close(action[~far], mean(observation=x)[~far])


def test_later_training_of_a_member_changes_nothing(actors):
    mean, x = mean_actor(actors), torch.randn(100, OBSERVATION)
    before = mean(observation=x)
    for param in actors[0].parameters():
        param.data.zero_()
    assert torch.equal(mean(observation=x), before)


def test_a_saved_mean_and_a_mean_of_means_are_read_again_to_the_bit(actors, tmp_path):
    x = torch.randn(100, OBSERVATION)
    for policy in (mean_actor(actors), mean_actor([mean_actor(actors[:2]), actors[2]])):
        save_policy(policy, tmp_path / "policy.pt", seeds=[0, 1, 2])
        loaded, facts = load_policy(tmp_path / "policy.pt")
        assert torch.equal(loaded(observation=x), policy(observation=x)) and facts == {"seeds": [0, 1, 2]}


def own(anchor):
    """A policy on an anchor of your own."""
    head = ResidualHead(MLP(OBSERVATION + ACTION, ACTION))
    return SPARActor(anchor, head, action_spec=Bounded(-1, 1, (ACTION,)))


def test_a_mean_with_networks_of_your_own_needs_them_to_be_read(actors, tmp_path):
    def build():
        return mean_actor([own(TensorDictModule(MLP(OBSERVATION, ACTION), ["observation"], ["action"])), actors[0]])

    policy, x = build(), torch.randn(100, OBSERVATION)
    save_policy(policy, tmp_path / "policy.pt")
    with pytest.raises(InputError, match="networks of your own"):
        load_policy(tmp_path / "policy.pt")
    loaded, _ = load_policy(tmp_path / "policy.pt", policy=build())
    assert torch.equal(loaded(observation=x), policy(observation=x))


def test_what_has_no_mean_is_named(actors):
    lstm = LSTMModule(OBSERVATION, ACTION, in_key="observation", out_key="action", default_recurrent_mode=True)
    wide = make_spar_loss(OBSERVATION, Bounded(-2, 1, (ACTION,)), hidden=[8]).actor
    network = TensorDictModule(MLP(OBSERVATION, ACTION), ["observation"], ["torque"])
    renamed = own(FrozenAnchor(network, action_key="torque"))
    for others, words in (
        ([], "1 given"),
        ([actors[1].anchor], r"actors\[1\]: a FrozenAnchor"),
        ([own(TensorDictSequential(lstm))], r"actors\[1\] writes"),
        ([renamed], r"actors\[1\] writes"),
        ([actors[1], wide], r"actors\[2\]: its action bounds"),
        ([make_actor(seed=3).double()], r"actors\[1\]: of torch.float64"),
    ):
        with pytest.raises(InputError, match=words):
            mean_actor([actors[0], *others])
