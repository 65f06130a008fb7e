"""FQELoss: its numbers against slow references, and what a TorchRL loss must do."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from helpers import ACTION, OBSERVATION, make_batch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs.utils import ExplorationType
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import BCLoss, HardUpdate, SoftUpdate

from torchrl_spar import FQELoss, InputError

MASK = ("collector", "mask")


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(OBSERVATION + ACTION, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, observation, action):
        return self.net(torch.cat([observation, action], -1))


def key_of(name, nested):
    return ("robot", name) if nested else name


def make_fqe(*, seed=0, nested=False, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    observation, action = key_of("observation", nested), key_of("action", nested)
    policy = TensorDictModule(nn.Sequential(nn.Linear(OBSERVATION, ACTION), nn.Tanh()), [observation], [action])
    critics = [
        ValueOperator(Critic(), in_keys=[observation, action], out_keys=[key_of("state_action_value", nested)])
        for _ in range(3)
    ]
    options = {"lmbda": 0.8, "trace_width": 0.7, "reward_scale": 0.5, **options}
    loss = FQELoss(policy, critics, num_qvalue_nets=3, **options)
    loss.make_value_estimator(gamma=0.9)
    loss.target_qvalue_network_params.data.apply_(lambda tensor: tensor.add_(0.1 * torch.randn_like(tensor)))
    return loss.to(dtype)


def make_data(*shape, masked=True, weighted=True):
    batch = make_batch(*(shape or (3, 4)), dtype=torch.float64)
    index = torch.arange(batch.numel()).view(*batch.shape, 1)
    if masked:
        batch[MASK] = index % 4 != 2
    if weighted:
        batch["member_weight"] = torch.rand(*batch.shape, 3, dtype=torch.float64)
    return batch


def member(params, index):
    net = Critic().double()
    net.load_state_dict({name: params[("module", *name.split("."))][index] for name in net.state_dict()})
    return lambda s, a: net(s, a).squeeze(-1)


def test_targets_match_a_slow_reference():
    """One position at a time, the sum over all later ones written out."""
    loss, batch = make_fqe(), make_data()
    batch["steps_to_next_obs"] = torch.randint(1, 4, (3, 4, 1))
    policy = loss.get_stateful_net("actor_network")

    def act(state):
        return policy(state.select("observation"))["action"]

    total, s, a, nxt = 0, batch["observation"], batch["action"], batch["next"]
    pi, next_pi = act(batch), act(nxt)
    for e in range(3):
        online, target = (
            member(params.data, e)
            for params in (loss.qvalue_network_params, loss._modules["target_qvalue_network_params"])
        )
        for b in range(3):
            for t in range(4):
                if not batch[MASK][b, t]:
                    continue
                expected, carry = target(s[b, t], a[b, t]), 1.0
                for k in range(t, 4):
                    if not batch[MASK][b, k]:
                        break
                    if k > t:
                        distance = ((a[b, k] - pi[b, k]) / 0.7).pow(2).mean()
                        carry = carry * 0.9 ** batch["steps_to_next_obs"][b, k - 1] * 0.8 * torch.exp(-distance / 2)
                    discount = 0.9 ** batch["steps_to_next_obs"][b, k]
                    bootstrap = target(nxt["observation"][b, k], next_pi[b, k]) * ~nxt["terminated"][b, k]
                    delta = 0.5 * nxt["reward"][b, k] + discount * bootstrap - target(s[b, k], a[b, k])
                    expected = expected + carry * delta
                    if nxt["done"][b, k]:
                        break
                total += batch["member_weight"][b, t, e] * (online(s[b, t], a[b, t]) - expected.squeeze()).pow(2)
    torch.testing.assert_close(loss(batch)["loss_qvalue"], total / batch[MASK].sum())


def test_without_traces_a_flat_batch_equals_a_time_batch():
    loss, batch = make_fqe(lmbda=0.0), make_data()
    torch.testing.assert_close(loss(batch), loss(batch.reshape(-1)))


def test_a_given_policy_action_replaces_the_call():
    loss, batch = make_fqe(), make_data()
    expected = loss(batch)
    for state in (batch, batch["next"]):
        state["policy_action"] = loss.policy_action(state)
    torch.testing.assert_close(loss(batch), expected)
    batch["next", "policy_action"] += 0.3
    assert loss(batch)["loss_qvalue"] != expected["loss_qvalue"]


def test_values_are_in_raw_units():
    loss, batch = make_fqe(), make_data()
    policy = loss.get_stateful_net("actor_network")
    action = policy(batch.select("observation"))["action"]
    expected = [member(loss.qvalue_network_params.data, e)(batch["observation"], action) / 0.5 for e in range(3)]
    torch.testing.assert_close(loss.state_value(batch), torch.stack(expected))


def test_only_the_critics_learn_and_the_batch_stays():
    loss, batch = make_fqe(), make_data()
    given = batch.clone()
    out = loss(given)
    assert set(out.keys()) == set(loss.out_keys) and out["loss_qvalue"].requires_grad
    assert not any(out[key].requires_grad for key in loss.out_keys[1:])
    out["loss_qvalue"].backward()
    names = {name for name, parameter in loss.named_parameters() if parameter.grad is not None}
    assert names and names == {name for name, _ in loss.named_parameters()}
    assert all(name.startswith("qvalue_network_params") for name in names)
    assert set(given.keys(True, True)) == set(batch.keys(True, True)) | {"td_error"}
    assert given["td_error"].shape == (3, 4) and not given["td_error"].requires_grad
    assert (given.exclude("td_error") == batch).all()
    torch.testing.assert_close(loss(batch.clone().lock_()), out)


@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_agree(weighted):
    loss, batch = make_fqe(), make_data()
    count = batch[MASK].squeeze(-1).double()
    if weighted:
        batch["priority_weight"] = torch.linspace(0.1, 2, 12, dtype=torch.float64).view(3, 4)
        count = count * batch["priority_weight"]
    out = {}
    for loss.reduction in ("none", "mean", "sum"):
        out[loss.reduction] = loss(batch)["loss_qvalue"]
    assert out["none"].shape == (3, 4)
    torch.testing.assert_close(out["sum"], out["none"].sum())
    torch.testing.assert_close(out["mean"], out["none"].sum() / count.sum())


def test_masked_positions_do_not_matter():
    loss, batch = make_fqe(), make_data()
    other, off = batch.clone(), ~batch[MASK].squeeze(-1)
    for key in batch.exclude("collector").keys(True, True):
        other[key][off] = ~batch[key][off] if batch[key].dtype == torch.bool else batch[key][off] * 3 + 40
    torch.testing.assert_close(loss(other), loss(batch))


def test_copies_give_the_same_numbers_and_share_nothing():
    loss, batch = make_fqe(), make_data()
    fresh = make_fqe(seed=5, reward_scale=2.0, trace_width=3.0)
    expected = loss(batch)
    assert fresh(batch)["loss_qvalue"] != expected["loss_qvalue"]
    fresh.load_state_dict(loss.state_dict())
    copies = fresh, deepcopy(loss), pickle.loads(pickle.dumps(loss))
    for copy in copies:
        torch.testing.assert_close(copy(batch), expected)
        for parameter in copy.parameters():
            parameter.data.zero_()
    torch.testing.assert_close(loss(batch), expected)


def test_nested_keys_give_the_same_numbers():
    loss, batch = make_fqe(), make_data()
    nested = make_fqe(nested=True)
    renamed = [name for name in vars(loss.tensor_keys) if not name.startswith("_")]
    nested.set_keys(**{name: key_of(getattr(loss.tensor_keys, name), True) for name in renamed})
    assert nested.in_keys == [
        ("next", "robot", key[1]) if isinstance(key, tuple) else ("robot", key) for key in loss.in_keys
    ]
    other = TensorDict({MASK: batch[MASK]}, batch.shape)
    for key in ("observation", "action", "member_weight"):
        other["robot", key] = batch[key]
    for key in ("observation", "reward", "done", "terminated"):
        other["next", "robot", key] = batch["next", key]
    torch.testing.assert_close(nested(other), loss(batch))
    assert ("robot", "td_error") in other.keys(True)


@pytest.mark.parametrize("lmbda", [0.0, 0.8])
def test_in_keys_are_exactly_what_is_read(lmbda):
    loss, batch = make_fqe(lmbda=lmbda), make_data(weighted=False)
    expected = loss(batch)["loss_qvalue"]
    torch.testing.assert_close(loss(batch.select(*loss.in_keys, MASK))["loss_qvalue"], expected)
    for key in loss.in_keys:
        with pytest.raises(InputError, match=key if isinstance(key, str) else key[-1]):
            loss(batch.exclude(key))
        spoiled = batch.clone()
        spoiled[key] = ~spoiled[key] if spoiled[key].dtype == torch.bool else spoiled[key] + 10
        if key != ("next", "done") or lmbda:
            assert loss(spoiled)["loss_qvalue"] != expected, key


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_updaters_move_the_critics_targets_alone(kind):
    loss = make_fqe()
    updater = SoftUpdate(loss, tau=0.25) if kind == "soft" else HardUpdate(loss, value_network_update_interval=1)
    policy = loss.actor_network_params.data.clone()
    old = loss.target_qvalue_network_params.data.clone()
    for _ in range(1 if kind == "soft" else 2):  # HardUpdate copies at its second call
        updater.step()
    new = old.lerp(loss.qvalue_network_params.data, 0.25 if kind == "soft" else 1.0)
    torch.testing.assert_close(loss.target_qvalue_network_params.data, new)
    assert (loss.actor_network_params.data == policy).all()


def test_reset_draws_new_critics_and_leaves_the_policy():
    loss = make_fqe()
    policy, critics = loss.actor_network_params.data.clone(), loss.qvalue_network_params.data.clone()
    loss.reset_parameters_recursive()
    assert (loss.actor_network_params.data == policy).all()
    weight = loss.qvalue_network_params["module", "net", "0", "weight"]
    assert not torch.equal(weight, critics["module", "net", "0", "weight"]) and not torch.equal(weight[0], weight[1])
    assert (loss.target_qvalue_network_params.data == loss.qvalue_network_params.data).all()


def test_the_caller_keeps_its_policy_and_train_mode_leaves_ours_in_eval():
    policy = TensorDictModule(
        nn.Sequential(nn.Linear(OBSERVATION, ACTION), nn.Dropout(0.9)), ["observation"], ["action"]
    )
    loss = FQELoss(policy, ValueOperator(Critic(), in_keys=["observation", "action"]))
    loss.train()
    batch = make_batch(5)
    torch.testing.assert_close(loss.policy_action(batch), policy.module[0](batch["observation"]).detach())
    assert policy.training and all(parameter.requires_grad for parameter in policy.parameters())


def test_a_stochastic_policy_is_evaluated_as_asked():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(OBSERVATION, 2 * ACTION), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(body, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
    )
    batch = make_batch(6)
    for kind, fixed in ((ExplorationType.DETERMINISTIC, True), (ExplorationType.RANDOM, False)):
        loss = FQELoss(actor, ValueOperator(Critic(), in_keys=["observation", "action"]), exploration_type=kind)
        assert torch.equal(loss.policy_action(batch), loss.policy_action(batch)) == fixed


def test_beside_another_loss_the_gradients_are_its_own():
    loss, batch = make_fqe(dtype=torch.float32), make_batch(3, 4)
    other = BCLoss(TensorDictModule(nn.Linear(OBSERVATION, ACTION), ["observation"], ["action"]))
    loss(batch)["loss_qvalue"].backward()
    alone = [parameter.grad.clone() for parameter in loss.parameters()]
    loss.zero_grad()
    (other(batch)["loss_bc"] + loss(batch)["loss_qvalue"]).backward()
    torch.testing.assert_close([parameter.grad for parameter in loss.parameters()], alone)


def test_dispatch():
    loss, batch = make_fqe(), make_data(masked=False, weighted=False)
    out = loss(**{"_".join(key) if isinstance(key, tuple) else key: batch[key] for key in loss.in_keys})
    torch.testing.assert_close(out[0], loss(batch)["loss_qvalue"])


def test_compiles_to_one_graph():
    loss, batch = make_fqe(), make_data()
    SoftUpdate(loss, tau=0.1)
    expected = loss(batch.clone())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="eager")(batch.clone()), expected)


@pytest.mark.parametrize(
    "options",
    [{"lmbda": 1.5}, {"trace_width": 0.0}, {"num_qvalue_nets": 2}, {"loss_function": "l3"}, {"reduction": "max"}],
)
def test_wrong_options_are_named(options):
    policy = TensorDictModule(nn.Linear(OBSERVATION, ACTION), ["observation"], ["action"])
    critics = [ValueOperator(Critic(), in_keys=["observation", "action"]) for _ in range(3)]
    with pytest.raises(InputError, match=next(iter(options))):
        FQELoss(policy, critics, **{"num_qvalue_nets": 3, **options})


def test_networks_that_do_not_fit_are_named():
    critic = ValueOperator(Critic(), in_keys=["observation", "action"])
    with pytest.raises(InputError, match="actor_network: a Linear; give an actor"):
        FQELoss(nn.Linear(2, 2), critic)
    with pytest.raises(InputError, match="none of what the actor writes"):
        FQELoss(TensorDictModule(nn.Linear(OBSERVATION, ACTION), ["observation"], ["torque"]), critic)
