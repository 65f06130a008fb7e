"""Members of one pre-training: what they share, what is their own, and their mean."""

from __future__ import annotations

import pytest
import torch
from helpers import ACTION, OBSERVATION
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import Bounded, ListStorage, TensorDictReplayBuffer
from torchrl.modules import MLP, LSTMModule, ValueOperator

from torchrl_spar import (
    BatchSampler,
    FrozenAnchor,
    GuardedActor,
    HealthCheck,
    InputError,
    ResidualHead,
    SPARActor,
    SPARLoss,
    chunk_actions,
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


def test_without_a_start_the_rows_hold_nothing_of_the_first():
    """As those of pretrain(critics=None)."""
    loss, rows = pretrained()
    member, found = make_member(loss, rows, seed=1, critics=None)
    assert {*rows[:].keys()} - {*found[:].keys()} == {"member_weight", "value_target", "advantage_std"}
    assert next(BatchSampler(member, found, length=2, seed=0))["value_target"].shape == (2, rows.batch_size, 1)


def test_rows_of_several_steps_keep_what_they_hold():
    rows = chunk_actions(make_toy_data(episodes=8, steps=8), length=2, gamma=0.99)
    observation, action = (rows[:][name].shape[-1] for name in ("observation", "action"))
    loss = make_spar_loss(observation, Bounded(-1, 1, (action,)), hidden=[8], joint_vae=False)
    _, found = make_member(loss, rows, seed=1, critics=FEW)
    assert (found[:] == rows[:]).all() and "steps_to_next_obs" in found[:].keys()


def test_rows_that_lie_in_a_list():
    loss, rows = pretrained()
    listed = TensorDictReplayBuffer(storage=ListStorage(len(rows)), batch_size=8)
    listed.extend(rows[:])
    one, other = (make_member(loss, of, seed=1, critics=FEW)[0].state_dict() for of in (rows, listed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_that_nothing_resets_are_named():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(OBSERVATION + ACTION))

        def forward(self, *inputs):
            return (torch.cat(inputs, -1) * self.weight).sum(-1, True)

    actor = trained("residual", 1)[0]
    actor.head.requires_grad_(True)
    critics = [ValueOperator(Scaled(), in_keys=["observation", "action"]) for _ in range(2)]
    vae = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8]).residual_vae
    loss = SPARLoss(actor, critics, vae, num_qvalue_nets=2, joint_vae=False)
    with pytest.raises(InputError, match=r"a critic: no reset_parameters\(\) .* draws .*weight.* anew"):
        make_member(loss, pretrained()[1], seed=1, critics=FEW)


@pytest.mark.parametrize("part", ["head", "critics"])
def test_layers_that_are_not_trained_are_the_firsts(part):
    """Such as features that were trained elsewhere; random ones would be of no use."""
    spec = Bounded(-1, 1, (ACTION,))
    loss = make_spar_loss(OBSERVATION, spec, hidden=[8], joint_vae=False)
    critics = [ValueOperator(MLP(OBSERVATION + ACTION, 1, num_cells=[8]), in_keys=["observation", "action"])]
    critics += [ValueOperator(MLP(OBSERVATION + ACTION, 1, num_cells=[8]), in_keys=["observation", "action"])]
    actor = loss.actor_network
    for network in critics if part == "critics" else [actor.head]:
        next(module for module in network.modules() if isinstance(module, torch.nn.Linear)).requires_grad_(False)
    loss = SPARLoss(actor, critics, loss.residual_vae, num_qvalue_nets=2, joint_vae=False)
    member, _ = make_member(loss, make_toy_data(), seed=1, critics=None)
    params, others = (
        each.qvalue_network_params if part == "critics" else each.actor_network_params["head"]
        for each in (loss, member)
    )
    frozen = [key for key, tensor in params.items(True, True) if not tensor.requires_grad and "weight" in key]
    trained = [key for key, tensor in params.items(True, True) if tensor.requires_grad and "weight" in key]
    assert frozen and all(torch.equal(params[key], others[key]) for key in frozen)
    assert trained and not any(torch.equal(params[key], others[key]) for key in trained)


def test_a_value_network_that_nothing_resets_is_named():
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(OBSERVATION))

        def forward(self, observation):
            return (observation * self.weight).sum(-1, True)

    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8], joint_vae=False)
    critics = [ValueOperator(MLP(OBSERVATION + ACTION, 1, num_cells=[8]), in_keys=["observation", "action"])]
    value = ValueOperator(Constant(), in_keys=["observation"])
    loss = SPARLoss(loss.actor_network, critics, loss.residual_vae, value, num_qvalue_nets=1, value_mix=0.5)
    with pytest.raises(InputError, match=r"the value network: no reset_parameters\(\) .* draws .*weight.* anew"):
        make_member(loss, make_toy_data(), seed=1, critics=None)


def test_wrong_options_are_named():
    first = pretrained()
    with pytest.raises(InputError, match=r"critics\.stepz"):
        make_member(*first, seed=1, critics={"stepz": 3})
    for option in ("report", "progress"):
        with pytest.raises(InputError, match=rf"critics\.{option}: give it as {option}=..., beside critics"):
            make_member(*first, seed=1, critics={option: None})
        with pytest.raises(InputError, match=rf"vae\.{option}: give it as"):
            pretrain(make_toy_data(), anchor=FEW, vae={option: None})
    for seed in (True, -1, 1.0, None):
        with pytest.raises(InputError, match=f"seed={seed}"):
            make_member(*first, seed=seed)
    with pytest.raises(InputError, match="loss: a SPARActor; give the SPARLoss"):
        make_member(first[0].actor, first[1], seed=1)
    with pytest.raises(InputError, match="losses: a SPARActor; give the SPARLoss"):
        HealthCheck([first[0], first[0].actor], make_toy_data())
    with pytest.raises(InputError, match="seed=-1"):
        make_member(*first, seed=-1)
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
    mean, anchor = mean_actor(actors), actors[0].anchor
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
    mean = mean_actor(actors)
    expected = mean(observation=x)
    save_policy(mean, tmp_path / "policy.pt")
    save_policy(actors[0], tmp_path / "one.pt")
    loaded, _ = load_policy(tmp_path / "policy.pt")
    assert torch.equal(loaded(observation=x), expected)
    of_two = mean_actor([mean, mean_actor(actors[:2])])
    save_policy(of_two, tmp_path / "means.pt")
    assert torch.equal(load_policy(tmp_path / "means.pt")[0](observation=x), of_two(observation=x))
    monkeypatch.setattr(SPARActor, "forward", None)
    assert torch.equal(action_function(mean)(x), expected)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_the_type_of_the_members_stays(dtype, rounding):
    actors = [actor.to(dtype) for actor in trained("residual")]
    for actor in actors:
        actor.low.fill_(-1 - 1e-9)
    mean, x = mean_actor(actors), torch.randn(100, OBSERVATION, dtype=dtype)
    action, base = mean(observation=x), actors[0].anchor(observation=x)
    assert action.dtype == dtype and torch.equal(mean.low, actors[0].low)
    residual = sum(actor.head(observation=x, anchor_action=base) for actor in actors) / 3
    expected = (base + actors[0].residual_scale * residual).clamp(mean.low, mean.high)
    torch.testing.assert_close(action, expected, rtol=0, atol=rounding)


def test_a_guard_falls_back_to_the_anchor():
    actors, x = trained("residual"), torch.randn(100, OBSERVATION)
    mean, far = mean_actor(actors), x[:, 0] > 0
    detector = TensorDictModule(lambda x: x[..., 0] > 0, ["observation"], ["unlike"])
    action = GuardedActor(mean, lambda x: detector(observation=x))(observation=x)[0]
    torch.testing.assert_close(action[far], actors[0].anchor(observation=x)[far])
    torch.testing.assert_close(action[~far], mean(observation=x)[~far])


def test_later_training_of_a_member_changes_nothing():
    actors, x = trained("residual"), torch.randn(100, OBSERVATION)
    mean = mean_actor(actors)
    before = mean(observation=x)
    for param in actors[0].parameters():
        param.data.zero_()
    assert torch.equal(mean(observation=x), before)


def own(anchor, head=None):
    """A policy on an anchor of your own."""
    head = head or ResidualHead(MLP(OBSERVATION + ACTION, ACTION))
    return SPARActor(anchor, head, action_spec=Bounded(-9, 9, (ACTION,)))


def test_a_mean_with_networks_of_your_own_needs_them_to_be_read(tmp_path):
    def build():
        anchor = TensorDictModule(MLP(OBSERVATION, ACTION), ["observation"], ["action"])
        return mean_actor([own(anchor), own(anchor)])

    policy, x = build(), torch.randn(100, OBSERVATION)
    save_policy(policy, tmp_path / "policy.pt")
    with pytest.raises(InputError, match="networks of your own"):
        load_policy(tmp_path / "policy.pt")
    loaded, _ = load_policy(tmp_path / "policy.pt", policy=build())
    assert torch.equal(loaded(observation=x), policy(observation=x))


def test_what_has_no_mean_is_named():
    one, other = trained("residual", 2)
    other.residual_scale = 2 * other.residual_scale
    lstm = LSTMModule(OBSERVATION, ACTION, in_key="observation", out_key="action", default_recurrent_mode=True)
    wide = make_spar_loss(OBSERVATION, Bounded(-2, 1, (ACTION,)), hidden=[8]).actor
    network = TensorDictModule(MLP(OBSERVATION, ACTION), ["observation"], ["torque"])
    stranger = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8]).actor
    stranger.residual_scale = one.residual_scale
    with pytest.raises(InputError, match="one SPARActor; give a list"):
        mean_actor(one)
    with pytest.raises(InputError, match="losses: none given"):
        HealthCheck([], make_toy_data())
    for others, words in (
        ([], "1 given"),
        ([one.anchor], r"actors\[1\]: a FrozenAnchor"),
        ([own(TensorDictSequential(lstm))], r"actors\[1\] writes"),
        ([own(FrozenAnchor(network, action_key="torque"))], r"actors\[1\]: its action_key"),
        ([one, wide], r"actors\[2\]: its low"),
        ([one.__class__.double(stranger)], r"actors\[1\]: of torch.float64"),
        ([other], r"actors\[1\]: its residual_scale"),
    ):
        with pytest.raises(InputError, match=words):
            mean_actor([one, *others])
    stranger.float()
    with pytest.raises(InputError, match=r"actors\[1\]: its anchor is not"):
        mean_actor([one, stranger])


def test_heads_of_your_own_may_read_more_than_the_anchor():
    anchor = TensorDictModule(MLP(OBSERVATION, ACTION), ["observation"], ["action"])

    def reading_a_goal(factor):
        keys = ["observation", "anchor_action", "goal"]
        return own(anchor, TensorDictModule(lambda x, action, goal: factor * goal, keys, ["residual"]))

    mean = mean_actor([reading_a_goal(1), reading_a_goal(3)])
    x, goal = torch.randn(4, OBSERVATION), torch.randn(4, ACTION)
    assert mean.in_keys == ["observation", "goal"]
    torch.testing.assert_close(mean(observation=x, goal=goal), (anchor(observation=x) + 2 * goal).clamp(-9, 9))
