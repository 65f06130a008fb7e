"""Members of one pre-training: what they share, what is their own, and their mean."""

from __future__ import annotations

import pytest
import torch
from helpers import ACTION, OBSERVATION
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded

from torchrl_spar import (
    BatchSampler,
    InputError,
    SPARActor,
    fit_critics,
    load_policy,
    make_member,
    make_spar_loss,
    make_toy_data,
    mean_actor,
    pretrain,
    residual_family,
    save_policy,
    with_member_weights,
    with_value_targets,
)
from torchrl_spar.evaluation.fast_policy import action_function

FEW = {"steps": 3}
HEADS = ["residual", "latent"]


def pretrained(head="residual", **options):
    torch.manual_seed(0)
    data = make_toy_data(episodes=16, steps=4)
    return pretrain(data, anchor=FEW, vae=FEW, critics=FEW, hidden=[8], head=head, **options)


def split(loss):
    """What members share, and what is their own."""
    state = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    shared = {
        name: x for name, x in state.items() if any(part in name for part in ("anchor", "residual_vae", "decoder"))
    }
    shared |= {name: x for name, x in state.items() if any(part in name for part in ("scale", "low", "high", "loc"))}
    return shared, {name: x for name, x in state.items() if name not in shared and x.is_floating_point()}


@pytest.mark.parametrize("head", HEADS)
def test_a_member_shares_anchor_and_vae_and_nothing_else(head):
    loss, rows = pretrained(head)
    member, _ = make_member(loss, rows, seed=1, critics=FEW)
    (shared, own), (same, others) = split(loss), split(member)
    assert len(shared) > 10 and all(torch.equal(shared[name], same[name]) for name in shared)
    weights = [name for name in own if name.endswith("weight")]  # biases of a layer norm start at zero for all
    assert any("qvalue" in name for name in weights) and any("head" in name for name in weights)
    assert not any(torch.equal(own[name], others[name]) for name in weights if own[name].unique().numel() > 1)


@pytest.mark.parametrize("head", HEADS)
def test_a_member_is_new_networks_on_the_old_anchor_trained_by_the_fits(head):
    """Put together by hand from the public functions."""
    loss, rows = pretrained(head)
    member, found = make_member(loss, rows, seed=7, critics=FEW, episode_share=0.25)

    plain = pretrained(head, episode_share=1.0)[1]
    other = make_spar_loss(make_toy_data(episodes=16, steps=4), hidden=[8], head=head, joint_vae=False)
    torch.manual_seed(7)
    other.reset_parameters_recursive()
    other.load_state_dict(other.state_dict() | split(loss)[0])
    fit_critics(other, plain, **FEW)
    expected = with_value_targets(other, with_member_weights(other, plain, share=0.25, seed=7))[:]
    for key in ("member_weight", "value_target", "advantage_std"):
        torch.testing.assert_close(found[:][key], expected[key], rtol=0, atol=0)
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(member.state_dict()[name], tensor, rtol=0, atol=0)


def test_the_first_is_not_changed_and_no_random_number_is_drawn():
    loss, rows = pretrained()
    before, held, state = loss.state_dict(), rows[:].clone(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in before.items()}
    _, found = make_member(loss, rows, seed=1, critics=FEW)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in loss.state_dict().items())
    assert (rows[:] == held).all()
    assert not torch.equal(found[:]["member_weight"], held["member_weight"])
    assert not torch.equal(found[:]["value_target"], held["value_target"])
    assert found[:]["anchor_action"].data_ptr() == rows[:]["anchor_action"].data_ptr()  # not computed again


def test_seeds_make_other_members_and_one_seed_the_same():
    first = pretrained()
    one, again, other = (make_member(*first, seed=seed, critics=FEW)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_without_a_start_the_critics_are_new_and_the_rows_are_the_given_ones():
    loss, rows = pretrained()
    member, found = make_member(loss, rows, seed=1, critics=None)
    assert found is rows
    assert next(BatchSampler(member, found, length=2, seed=0))["value_target"].shape == (2, rows.batch_size, 1)


def test_wrong_options_are_named():
    first = pretrained()
    with pytest.raises(InputError, match=r"critics\.stepz"):
        make_member(*first, seed=1, critics={"stepz": 3})
    with pytest.raises(InputError, match="share=0"):
        make_member(*first, seed=1, critics=FEW, episode_share=0)


def trained(head, count=3):
    """As if trained: residuals are as large as the anchor's actions, so that some actions are clamped."""
    torch.manual_seed(0)
    first = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8], head=head)
    first.residual_scale = 0.1 + torch.rand(ACTION)
    actors = []
    for _ in range(count):
        actor = first.actor
        for param in actor.head.parameters():
            param.data = param.data + torch.randn_like(param)
        actors.append(actor)
    return actors


@pytest.mark.parametrize("head", HEADS)
def test_the_mean_is_the_anchor_plus_the_mean_residual(head):
    actors, x = trained(head), torch.randn(200, OBSERVATION)
    mean, anchor = mean_actor(actors, one_anchor=True), actors[0].anchor
    asked = []
    mean.anchor.register_forward_hook(lambda *_: asked.append(1))
    action, base = mean(observation=x), anchor(observation=x)
    assert len(asked) == 1
    residuals = []
    for actor in actors:
        state = actor.head(observation=x, anchor_action=base)
        residuals.append(
            state if head == "residual" else actor.decoder(observation=x, anchor_action=base, latent=state)
        )
    free = base + actors[0].residual_scale * sum(residuals) / 3
    assert (free.abs() > 1).any() and (free.abs() < 1).any()
    torch.testing.assert_close(action, free.clamp(-1, 1))
    assert not torch.equal(actors[0](observation=x), actors[1](observation=x))
    # What scales the residual takes it, too.
    half = residual_family(mean, [0.5])
    torch.testing.assert_close(next(iter(half.values()))(observation=x), (base + 0.5 * (free - base)).clamp(-1, 1))


@pytest.mark.parametrize("head", HEADS)
def test_it_is_saved_and_called_to_the_bit(head, tmp_path, monkeypatch):
    actors, x = trained(head), torch.randn(100, OBSERVATION)
    mean = mean_actor(actors, one_anchor=True)
    expected = mean(observation=x)
    save_policy(mean, tmp_path / "policy.pt")
    save_policy(actors[0], tmp_path / "one.pt")
    loaded, _ = load_policy(tmp_path / "policy.pt")
    assert torch.equal(loaded(observation=x), expected)
    of_two = mean_actor([mean, mean_actor(actors[:2], one_anchor=True)])
    save_policy(of_two, tmp_path / "means.pt")
    assert torch.equal(load_policy(tmp_path / "means.pt")[0](observation=x), of_two(observation=x))
    monkeypatch.setattr(SPARActor, "forward", None)
    assert torch.equal(action_function(mean)(x), expected)


def test_another_anchor_or_scale_is_named():
    one, other = trained("residual", 2)
    other.residual_scale = 2 * other.residual_scale
    with pytest.raises(InputError, match=r"the residual_scale of actors\[1\]"):
        mean_actor([one, other], one_anchor=True)
    stranger = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8]).actor
    with pytest.raises(InputError, match=r"the anchor of actors\[1\] has other weights"):
        mean_actor([one, stranger], one_anchor=True)


def test_custom_heads_may_read_more_than_the_anchor():
    torch.manual_seed(0)

    def own(seed):
        anchor = TensorDictModule(torch.nn.Linear(OBSERVATION, ACTION), ["observation"], ["action"])
        head = TensorDictModule(
            lambda x, a, goal: seed * goal + 0 * a, ["observation", "anchor_action", "goal"], ["residual"]
        )
        return SPARActor(anchor, head, action_spec=Bounded(-9, 9, (ACTION,)))

    one, other = own(1.0), own(3.0)
    other.anchor = one.anchor
    mean, x, goal = mean_actor([one, other], one_anchor=True), torch.randn(4, OBSERVATION), torch.randn(4, ACTION)
    assert mean.in_keys == ["observation", "goal"]
    expected = one.anchor(observation=x) + 2 * goal
    torch.testing.assert_close(mean(observation=x, goal=goal), expected.clamp(-9, 9))
