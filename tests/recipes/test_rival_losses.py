"""The rivals' losses and updates against TorchRL's, against sums written out by hand, and against the plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import ACTION, OBSERVATION, make_batch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchrl.data import Bounded
from torchrl.objectives import IQLLoss, SoftUpdate, TD3BCLoss

pytest.importorskip("hydra")
from rivals.base import followed
from rivals.cql import ConservativeLoss
from rivals.models import Networks
from rivals.td3 import BehaviorRegularizedLoss
from test_rivals import HIDDEN, build_rival, episodes, make_bandit

from torchrl_spar import InputError
from torchrl_spar.networks import ObservationNorm
from torchrl_spar.training.pretrain import cloning_loss


def modules_of(loss, networks, count, layer_norm):
    """Modules of their own with the loss's parameters: its actor, its critics."""
    critics = networks.critics(count, layer_norm=layer_norm)
    for params, critic in zip(loss.qvalue_network_params.unbind(0), critics):
        params.to_module(critic)
    return critics


@pytest.mark.parametrize("reward_scale", [1.0, 0.2])
@pytest.mark.parametrize("bound", ["min", "lcb"])
@pytest.mark.parametrize("layer_norm", ["before", "after"])
def test_rebracs_penalties_by_hand(bound, reward_scale, layer_norm):
    torch.manual_seed(0)
    networks = Networks.of(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[16])
    actor, options = networks.deterministic_actor(), dict(actor_penalty=0.3, critic_penalty=0.7, bound=bound, kappa=1.5)
    loss = BehaviorRegularizedLoss(
        actor, networks.critics(3, layer_norm=layer_norm), action_spec=networks.action_spec, policy_noise=0.0, **options
    )
    loss.make_value_estimator(gamma=0.9)
    loss.reward_scale.fill_(reward_scale)
    batch = make_batch(32)
    batch["next", "action"] = make_batch(32, seed=1)["action"]
    critics = modules_of(loss, networks, 3, layer_norm)

    def bounded(observation, action):
        values = torch.stack([critic(observation=observation, action=action).squeeze(-1) for critic in critics])
        return values, values.amin(0) if bound == "min" else values.mean(0) - 1.5 * values.std(0, correction=0)

    with torch.no_grad():
        action, following = actor(observation=batch["observation"]), batch["next"]
        _, value = bounded(batch["observation"], action)
        expected = 0.3 * (action - batch["action"]).pow(2).sum(-1).mean() - value.mean() / value.abs().mean()
        torch.testing.assert_close(loss.actor_loss(batch)[0], expected)
        # The targets still equal the networks.
        next_action = actor(observation=following["observation"])
        _, next_value = bounded(following["observation"], next_action)
        # In units of the reward before the scale, as the value is after it.
        next_value = next_value - reward_scale * 0.7 * (next_action - following["action"]).pow(2).sum(-1)
        alive = 1 - following["terminated"].squeeze(-1).float()
        target = reward_scale * following["reward"].squeeze(-1) + 0.9 * alive * next_value
        values, _ = bounded(batch["observation"], batch["action"])
        expected = (values - target).pow(2).mean(1).sum()
        torch.testing.assert_close(loss.qvalue_loss(batch)[0], expected)


def test_rebracs_networks_are_the_published_ones():
    data = episodes(1.0, 2.0, 3.0)
    rival = build_rival(data, 2, "method=rebrac", "method.batch_size=7")
    assert len(rival.data) < len(data) and len(next(rival.batches(0))) == 7
    (norm,) = (module for module in rival.policy.modules() if isinstance(module, ObservationNorm))
    assert (norm.loc == 0).all() and (norm.scale == 1).all()
    linear = [layer for layer in rival.policy.modules() if isinstance(layer, nn.Linear)]
    assert len(linear) == 4 and all((layer.bias == 0.1).all() for layer in linear[:-1])
    assert 0 < linear[-1].weight.abs().max() <= 1e-3 and linear[-1].bias.abs().max() <= 1e-3
    mlp = rival.loss.qvalue_network.module.mlp
    assert [type(layer) for layer in mlp] == [nn.Linear, nn.ReLU, nn.LayerNorm] * 3 + [nn.Linear]
    last = rival.loss.qvalue_network_params["module", "mlp", "9"]
    assert 0 < last["weight"].abs().max() <= 3e-3 and (last["weight"][0] != last["weight"][1]).any()
    # With SPAR's critics the networks are SPAR's; the rows that are dropped count in the statistics.
    norm = next(m for m in build_rival(data, 2, "method=rebrac_critics").policy.modules() if hasattr(m, "loc"))
    assert torch.equal(norm.loc, data.observation_loc)


@pytest.mark.parametrize(
    "option", ["critics.layer_norm=true", "networks.layers=0", "batch_size=0"], ids=lambda option: option.split("=")[0]
)
def test_impossible_networks_are_named(option):
    with pytest.raises(InputError, match=option.split(".")[-1].replace("true", "True")):
        build_rival(episodes(1.0, 2.0), 2, "method=rebrac", f"method.{option}")


LOW, HIGH = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 1.0, 0.5])


@pytest.mark.parametrize("max_q_backup", [False, True])
def test_cql_by_hand(max_q_backup):
    """State by state and action by action, with torch's own distributions."""
    torch.manual_seed(0)
    networks = Networks.of(OBSERVATION, Bounded(LOW, HIGH, (ACTION,)), hidden=[16, 16])
    count, weight, actor = 4, 3.0, networks.squashed_actor()
    loss = ConservativeLoss(
        actor, networks.critics(2, layer_norm=None), low=LOW, high=HIGH, action_spec=networks.action_spec,
        num_random=count, min_q_weight=weight, max_q_backup=max_q_backup, alpha_init=0.5,
    )  # fmt: skip
    loss.make_value_estimator(gamma=0.9)
    critics, batch = modules_of(loss, networks, 2, None), make_batch(6)

    def policy(observation):
        stretch = torch.distributions.AffineTransform((LOW + HIGH) / 2, (HIGH - LOW) / 2)
        tanh = torch.distributions.TanhTransform(cache_size=1)
        *_, loc, scale = (part[0] for part in actor[0](observation=observation[None]))
        normal = torch.distributions.Normal(loc, scale)
        return normal, torch.distributions.TransformedDistribution(normal, [tanh, stretch])

    def draw(observation, noise):
        normal, squashed = policy(observation)
        raw = normal.loc + normal.scale * noise
        action = squashed.transforms[1](squashed.transforms[0](raw))
        return action, squashed.log_prob(action).sum()

    def value(critic, observation, action):
        return critic(observation=observation[None], action=action[None]).squeeze()

    # The order of the draws is the loss's.
    torch.manual_seed(3)
    backup = torch.randn(*([count] if max_q_backup else []), 6, ACTION).view(-1, 6, ACTION)
    here, there = torch.randn(count, 6, ACTION), torch.randn(count, 6, ACTION)
    uniform = LOW + (HIGH - LOW) * torch.rand(count, 6, ACTION)
    expected = penalty = torch.zeros(())
    with torch.no_grad():
        for row in range(6):
            now, then = batch[row]["observation"], batch[row]["next", "observation"]
            best = [max(value(critic, then, draw(then, noise[row])[0]) for noise in backup) for critic in critics]
            alive = 0.0 if batch[row]["next", "terminated"] else 1.0
            target = batch[row]["next", "reward"].squeeze() + 0.9 * alive * min(best)
            actions = [(action[row], -(HIGH - LOW).log().sum()) for action in uniform]
            actions += [draw(now, noise[row]) for noise in here] + [draw(then, noise[row]) for noise in there]
            for critic in critics:
                own = value(critic, now, batch[row]["action"])
                total = sum(math.exp(value(critic, now, action) - log_prob) for action, log_prob in actions)
                penalty = penalty + weight * (math.log(total) - own) / 6
                expected = expected + (own - target).pow(2) / 6
        torch.manual_seed(3)
        found, metadata = loss.qvalue_loss(batch)
        torch.testing.assert_close((found, metadata["loss_cql"]), (expected + penalty, penalty), rtol=1e-4, atol=1e-4)

        torch.manual_seed(4)
        noise = torch.randn(6, ACTION)
        drawn = [draw(state, one) for state, one in zip(batch["observation"], noise)]
        lowest = [min(value(c, s, a) for c in critics) for s, (a, _) in zip(batch["observation"], drawn)]
        log_prob = torch.stack([log_prob for _, log_prob in drawn])
        torch.manual_seed(4)
        found, _ = loss.actor_loss(batch)
    expected = (0.5 * log_prob - torch.stack(lowest)).mean() - math.log(0.5) * (log_prob - ACTION).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_cql_trains_each_network_by_its_own_term():
    networks = Networks.of(OBSERVATION, Bounded(LOW, HIGH, (ACTION,)), hidden=[16])
    critics, spec = networks.critics(2, layer_norm=None), networks.action_spec
    loss = ConservativeLoss(networks.squashed_actor(), critics, low=LOW, high=HIGH, action_spec=spec)
    loss.make_value_estimator(gamma=0.9)
    params = {"actor": [*loss.actor_network_params.parameters(), loss.log_alpha]}
    params["qvalue"] = list(loss.qvalue_network_params.parameters())
    for name in params:
        value, _ = getattr(loss, f"{name}_loss")(make_batch(8))
        for other, of_other in params.items():
            moved = torch.autograd.grad(value, of_other, allow_unused=True, retain_graph=True)
            assert all((grad is not None) == (name == other) for grad in moved)


def plain_loss(method, rival, data):
    """TorchRL's own loss where there is one, with the rival's parameters."""
    networks, options = Networks.of(data, hidden=HIDDEN), {"loss_function": "l2", "deactivate_vmap": True}
    critics = networks.critics(2, layer_norm=None)
    if method == "bc":
        return cloning_loss(rival.policy)
    if method == "td3_bc":
        theirs = TD3BCLoss(networks.deterministic_actor(), critics, action_spec=data.action_spec, alpha=2.5, **options)
    elif method == "iql":
        options |= {"temperature": 3.0, "expectile": 0.7}
        theirs = IQLLoss(networks.gaussian_actor(), critics, networks.value(), num_qvalue_nets=2, **options)
    else:
        return rival.loss
    theirs.make_value_estimator(gamma=0.99)
    state = rival.loss.state_dict()
    theirs.load_state_dict({name: value for name, value in state.items() if name != "reward_scale"})
    return theirs


@pytest.mark.parametrize("method", ["bc", "td3_bc", "iql", "cql", "rebrac"])
def test_updates_are_those_of_the_plain_loop(method):
    """TorchRL's losses, torch.optim.Adam for each, TorchRL's schedule and SoftUpdate."""
    bandit = make_bandit()
    small = {"cql": ["method.num_random=2"], "rebrac": ["method.batch_size=64"]}.get(method, [])
    fast, slow = (build_rival(bandit, 12, f"method={method}", *small) for _ in range(2))
    batches = [next(draws) for draws in [fast.batches(0)] for _ in range(12)]
    loss = plain_loss(method, slow, bandit)
    params = {"qvalue": "qvalue_network_params", "value": "value_network_params"}
    adams, schedules = {}, {}
    for step in slow.steps:
        name = step.name.removeprefix("loss_")
        of_term = list(getattr(loss, params.get(name, "actor_network_params")).parameters())
        of_term += [loss.log_alpha] if (method, name) == ("cql", "actor") else []
        adams[name] = torch.optim.Adam(of_term, lr=step.lr, fused=False, foreach=False)
        schedules[name] = CosineAnnealingLR(adams[name], 12) if step.decay_steps else None
    targets = None if method == "bc" else SoftUpdate(loss, tau=slow.target_rate)
    start = [param.clone() for step in fast.steps for param in step.params]
    torch.manual_seed(1)
    for count, batch in enumerate(batches, start=1):
        for step, (name, optimizer) in zip(slow.steps, adams.items()):
            if count % step.interval:
                continue
            batch = batch.clone()  # TorchRL's losses write into it
            value = loss(batch)["loss_bc"] if method == "bc" else getattr(loss, f"{name}_loss")(batch)[0]
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if schedules[name] is not None:
                schedules[name].step()
        if targets is not None and count % slow.target_interval == 0:
            targets.step()
    torch.manual_seed(1)
    for batch in batches:
        fast(batch)
    moved = [param for step in fast.steps for param in step.params]
    expected = [param for optimizer in adams.values() for param in optimizer.param_groups[0]["params"]]
    assert all((one - other).abs().max() > 1e-5 for one, other in zip(moved, start))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
    if targets is not None:
        followers = [target for _, target in followed(loss)]
        torch.testing.assert_close(fast.targets, followers, rtol=0, atol=1e-6)
