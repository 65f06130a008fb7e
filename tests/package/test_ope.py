"""Off-policy evaluation against closed forms: chains with known values, slow references, coverage of intervals."""

from __future__ import annotations

import math
import random
import warnings

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.envs.utils import ExplorationType
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives import SoftUpdate

from torchrl_spar import (
    FQELoss,
    InputError,
    estimate_value,
    fit_fqe,
    fit_fqe_each,
    load_offline_dataset,
    make_anchor,
    make_spar_loss,
    residual_family,
    select_policy,
)
from torchrl_spar.ope.estimate import EpisodeTerms, bootstrap, episode_terms, estimates

GAMMA = 0.9
STATES = 4


class Chain:
    """States 0 to 3 with actions -1 and 1; 1 moves on with probability 0.8, -1 with 0.3; the last state ends it.

    A step costs 1 with action 1, and 2 with action -1 (plus noise), so that acting 1 is right.
    """

    move = torch.tensor([0.3, 0.8])
    reward = torch.tensor([-2.0, -1.0])

    def value(self, forward: torch.Tensor) -> float:
        """Of the first state, where the policy takes action 1 with these probabilities, ``[STATES - 1]``."""
        move = self.move[0] + forward * (self.move[1] - self.move[0])
        reward = self.reward[0] + forward * (self.reward[1] - self.reward[0])
        transition = torch.diag(1 - move) + torch.diag(move[:-1], 1)
        return float(torch.linalg.solve(torch.eye(STATES - 1) - GAMMA * transition, reward)[0])

    def data(self, episodes: int, seed: int, forward: float = 0.5, noise: float = 0.5):
        generator, move, cost = random.Random(seed), self.move.tolist(), self.reward.tolist()
        rows, lengths = [], []
        for _ in range(episodes):
            state, length = 0, 0
            while state < STATES - 1:
                action = int(generator.random() < forward)
                following = state + int(generator.random() < move[action])
                reward = cost[action] + generator.gauss(0, noise)
                rows.append((state, 2 * action - 1, reward, following))
                state, length = following, length + 1
            lengths.append(length)
        state, action, reward, following = (torch.tensor([row[i] for row in rows]) for i in range(4))
        one_hot = torch.eye(STATES)
        data = TensorDict(
            {
                "observation": one_hot[state], "action": action.float().unsqueeze(-1),
                "episode": torch.arange(episodes).repeat_interleave(torch.tensor(lengths)),
                "next": {"observation": one_hot[following], "reward": reward.float().unsqueeze(-1),
                         "terminated": (following == STATES - 1).unsqueeze(-1)},
            }, [len(rows)],
        )  # fmt: skip
        return load_offline_dataset(data, batch_size=256)


class Table(nn.Module):
    """A value for each state and sign of the action."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * STATES, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, observation, action):
        return self.linear(self.features(observation, action))

    @staticmethod
    def features(observation, action):
        return torch.cat([observation * (action > 0), observation * (action <= 0)], -1)

    @property
    def functional(self):
        return lambda params, *inputs: self.features(*inputs) @ params["linear"]["weight"].T


class Fixed(nn.Module):
    """One action everywhere, or one a state."""

    def __init__(self, actions):
        super().__init__()
        self.register_buffer("actions", torch.as_tensor(actions, dtype=torch.float32).reshape(-1, 1))

    def forward(self, observation):
        return observation @ self.actions.to(observation)


def policy_of(*signs):
    return TensorDictModule(Fixed([*signs, 1.0]), ["observation"], ["action"])


def tables(count=3):
    return [ValueOperator(Table(), in_keys=["observation", "action"]) for _ in range(count)]


FAST = {"gamma": GAMMA, "slice_len": 4, "warm_steps": 30, "steps": 120, "lr": 0.1, "target_rate": 0.3}
CHAIN = Chain()


# ---------------------------------------------------------------- FQE


def test_updates_equal_a_hand_written_iteration():
    """Gradient steps on the table and Polyak averages, in plain numbers."""
    rows = CHAIN.data(6, seed=0)[:]
    rows = rows.apply(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    signs, rate, tau, steps = [1, -1, 1, 1], 0.3, 0.2, 25
    loss = FQELoss(policy_of(*signs[:3]), tables(1), num_qvalue_nets=1).double()
    loss.make_value_estimator(gamma=GAMMA)
    updater, optimizer = SoftUpdate(loss, tau=tau), torch.optim.SGD(loss.parameters(), lr=rate)
    q = {(state, sign): 0.0 for state in range(STATES) for sign in (-1, 1)}
    target = dict(q)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(rows)["loss_qvalue"].backward()
        optimizer.step()
        updater.step()
        gradient = dict.fromkeys(q, 0.0)
        for row in rows.unbind(0):
            state, following = int(row["observation"].argmax()), int(row["next", "observation"].argmax())
            at = state, int(row["action"])
            goal = float(row["next", "reward"])
            if not row["next", "terminated"]:
                goal += GAMMA * target[following, signs[following]]
            gradient[at] += 2 * (q[at] - goal) / len(rows)
        q = {at: value - rate * gradient[at] for at, value in q.items()}
        target = {at: (1 - tau) * target[at] + tau * q[at] for at in q}
    weight = loss.qvalue_network_params["module", "linear", "weight"].data.flatten()
    expected = [q[state, sign] for sign in (1, -1) for state in range(STATES)]
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("lmbda", [0.0, 0.9])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_fqe_finds_the_exact_value(signs, lmbda):
    """Of policies that differ from the data's, which acts at random."""
    exact = CHAIN.value((torch.tensor(signs) > 0).float())
    data = CHAIN.data(4_000, seed=1, noise=0.1)
    long = {**FAST, "steps": 400, "target_rate": 0.5}
    loss, held = fit_fqe(policy_of(*signs), data, qvalue_network=tables(2), lmbda=lmbda, **long)
    found = loss.state_value(held[:1]).mean()
    assert abs(exact - CHAIN.value(torch.full((3,), 0.5))) > 0.9
    assert abs(found - exact) < 0.25


def test_a_seed_gives_the_same_fit_and_another_one_another():
    data = CHAIN.data(30, seed=0)
    small = {**FAST, "steps": 20, "warm_steps": 20, "qvalue_network": None, "hidden": [8]}
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(values))  # the global generator plays no part
        loss, held = fit_fqe(policy_of(1, 1, 1), data, seed=seed, **small)
        values.append(loss.state_value(held[:1]))
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert len(values[0].unique()) == 5  # five critics, each with its own data


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_policies_side_by_side_are_fitted_as_alone(own, count):
    """Tables, and default networks with LayerNorm, from the behaviour's values and from another start."""
    data = CHAIN.data(30, seed=0)
    policies = {str(signs): policy_of(*signs) for signs in [(1, 1, 1), (-1, 1, 1), (-1, -1, -1)]}
    small = {**FAST, "steps": 25, "warm_steps": 15, "lr": 0.02, "hidden": [8], "num_qvalue_nets": count}
    small["qvalue_network"] = tables(count) if own else None
    start = fit_fqe(policies["(1, 1, 1)"], data, **small).loss
    for begin in (None, start):
        seen = []
        fits = fit_fqe_each(policies, data, start=begin, report=lambda step, got, seen=seen: seen.append(got), **small)
        assert list(fits) == list(policies) and seen[-1]["pred_value"].shape == (3,)
        values = []
        for name, policy in policies.items():
            alone, held = fit_fqe(policy, data, start=begin, **small)
            values.append(alone.state_value(held))
            loss, rows = fits[name]
            assert (rows["policy_action"] == held["policy_action"]).all()
            torch.testing.assert_close(loss.state_value(rows), values[-1], rtol=1e-4, atol=1e-4)
            for part in ("qvalue_network_params", "target_qvalue_network_params"):
                for key, tensor in alone._modules[part].data.items(True, True):
                    other = loss._modules[part].data[key]
                    torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-4)
        assert (values[0] - values[2]).abs().mean() > 0.02  # the policies do differ


def test_policies_that_draw_their_actions_are_fitted_alone():
    data = CHAIN.data(8, seed=0)
    policies = {"one": gaussian(0.0), "other": gaussian(1.0)}
    with pytest.raises(InputError, match="exploration_type="):
        fit_fqe_each(policies, data, exploration_type=ExplorationType.RANDOM)
    with pytest.raises(InputError, match="policies="):
        fit_fqe_each({}, data)


def test_the_callers_critics_stay_and_each_fit_begins_alike():
    data, critics = CHAIN.data(30, seed=0), tables(2)
    small = {**FAST, "steps": 10, "warm_steps": 10}
    first, again = (fit_fqe(policy_of(1, 1, 1), data, qvalue_network=critics, **small).loss for _ in range(2))
    start = fit_fqe(policy_of(1, 1, 1), data, qvalue_network=critics, **{**small, "steps": 0}).loss
    before = start.qvalue_network_params.data.clone()
    fit_fqe(policy_of(-1, 1, 1), data, qvalue_network=critics, start=start, **small)
    assert not any(critic.module.linear.weight.any() for critic in critics)
    assert (first.qvalue_network_params.data == again.qvalue_network_params.data).all()
    assert (first.qvalue_network_params.data != before).any()
    assert (start.qvalue_network_params.data == before).all()


def test_held_out_episodes_do_not_reach_the_critics():
    data = CHAIN.data(20, seed=0)
    _, held = fit_fqe(policy_of(1, 1, 1), data, qvalue_network=tables(), **{**FAST, "steps": 0, "warm_steps": 0})
    spoiled = data[:].clone()
    own = (data[:]["next", "reward"] == held["next", "reward"].reshape(1, -1)).any(1)
    assert own.sum() == len(held) and int(held["episode"][-1]) == 3
    spoiled["next", "reward"][own] += 100
    small = {**FAST, "steps": 20, "warm_steps": 0}
    weights = [
        fit_fqe(policy_of(1, 1, 1), buffer, qvalue_network=tables(), **small).loss.qvalue_network_params
        for buffer in (load_offline_dataset(data[:], batch_size=64), load_offline_dataset(spoiled, batch_size=64))
    ]
    scaled = [params["module", "linear", "weight"] for params in weights]
    torch.testing.assert_close(*scaled)


def test_bad_data_and_options_are_named():
    with pytest.raises(InputError, match="3 episodes, and at least 4 are needed"):
        fit_fqe(policy_of(1, 1, 1), CHAIN.data(3, seed=0))
    data = CHAIN.data(8, seed=0)
    with pytest.raises(InputError, match="slice_len=257"):
        fit_fqe(policy_of(1, 1, 1), data, slice_len=257)
    with pytest.raises(InputError, match=r"the data lacks .'pixels'."):
        fit_fqe(TensorDictModule(nn.Linear(4, 1), ["pixels"], ["action"]), data)
    with pytest.raises(InputError, match="no density"):
        small = {**FAST, "steps": 1, "warm_steps": 1}
        estimate_value(policy_of(1, 1, 1), data, behaviour=policy_of(1, 1, 1), qvalue_network=tables(), **small)


# ---------------------------------------------------------------- estimates


def gaussian(mean, scale=1.0):
    class Head(nn.Module):
        def forward(self, observation):
            loc = observation[..., :1] * 0 + mean
            return loc, torch.full_like(loc, scale)

    return ProbabilisticActor(
        TensorDictModule(Head(), ["observation"], ["loc", "scale"]), in_keys=["loc", "scale"],
        distribution_class=torch.distributions.Normal,
    )  # fmt: skip


def test_importance_weights_match_a_slow_reference():
    torch.manual_seed(0)
    data = CHAIN.data(12, seed=2)
    policy, behaviour = gaussian(0.7), gaussian(-0.2, 1.5)
    fit = fit_fqe(policy, data, qvalue_network=tables(), **{**FAST, "steps": 30})
    rows = fit.held_out  # with the mode's actions: nothing is drawn
    terms = episode_terms(fit, policy, behaviour)
    counts = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    found = estimates(terms, counts)
    q = [lambda s, a, w=w: float(w[0, s + (0 if a > 0 else STATES)] / fit.loss.reward_scale)
         for w in fit.loss.qvalue_network_params["module", "linear", "weight"].data]  # fmt: skip
    episodes = [rows[rows["episode"] == i] for i in range(2)]

    def ratio(action):
        density = [math.exp(-(((action - m) / s) ** 2) / 2) / s for m, s in ((0.7, 1.0), (-0.2, 1.5))]
        return density[0] / density[1]

    longest = max(map(len, episodes))
    for draw in range(2):
        for e in range(3):
            weights, expected = [1.0, 1.0], 0.0
            size = float(counts[draw].sum())
            for i, episode in enumerate(episodes):
                expected += float(counts[draw, i]) / size * q[e](int(episode[0]["observation"].argmax()), 0.7)
            for t in range(longest):
                for i, episode in enumerate(episodes):
                    if t < len(episode):
                        weights[i] *= ratio(float(episode[t]["action"]))
                total = sum(float(counts[draw, i]) * weights[i] for i in range(2))
                for i, episode in enumerate(episodes):
                    if t < len(episode):
                        row = episode[t]
                        state, following = int(row["observation"].argmax()), int(row["next", "observation"].argmax())
                        after = 0.0 if row["next", "terminated"] else q[e](following, 0.7)
                        delta = float(row["next", "reward"]) + GAMMA * after - q[e](state, float(row["action"]))
                        expected += GAMMA**t * float(counts[draw, i]) * weights[i] / total * delta
            assert found[draw, e] == pytest.approx(expected, rel=1e-4)


def test_importance_weights_mend_a_wrong_critic():
    """Bandits: the critic knows nothing, the weights alone find the value of the shifted Gaussian."""
    generator = torch.Generator().manual_seed(0)
    action = torch.randn(4_000, 1, generator=generator).clamp(-5, 5)
    state = torch.randn(4_000, 2, generator=generator)
    ended = torch.ones(4_000, 1, dtype=torch.bool)
    step = {"observation": state, "reward": action, "terminated": ended, "done": ended}
    rows = TensorDict({"observation": state, "action": action, "episode": torch.arange(4_000), "next": step}, [4_000])
    loss = FQELoss(gaussian(0.5), [ValueOperator(Wrong(), in_keys=["observation", "action"])], num_qvalue_nets=1)
    terms = episode_terms((loss, rows), gaussian(0.5), gaussian(0.0))
    ones = torch.ones(1, 4_000, dtype=torch.float64)
    assert estimates(terms, ones).item() == pytest.approx(0.5, abs=0.06)  # of 4,000 rewards of variance 1
    assert float(loss.state_value(rows).mean()) == 7.0


class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(7.0))

    def forward(self, observation, action):
        return self.bias + 0 * action


def test_the_behaviours_value_is_its_mean_return():
    data = CHAIN.data(2_000, seed=3)
    mean, (low, high) = estimate_value(None, data, gamma=GAMMA, held_out=0.5)
    assert low < mean < high and high - low < 0.5
    assert mean == pytest.approx(CHAIN.value(torch.full((3,), 0.5)), abs=0.25)


@pytest.mark.parametrize("count", [2, 4, 10])
def test_intervals_cover_where_episodes_are_few(count):
    """Normal returns around 0, 400 times."""
    covered = 0
    for seed in range(400):
        returns = torch.randn(1, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        none = torch.zeros(1, count, 1, dtype=torch.float64)
        _, drawn = bootstrap([EpisodeTerms(returns, none, none[0], False)], 500, seed)
        covered += bool(drawn[0].quantile(0.05) < 0 < drawn[0].quantile(0.95))
    assert 0.84 < covered / 400 < 0.96


def log_of(reward, kind=torch.float32):
    """Ten episodes of 20 steps that end at a time limit."""
    generator = torch.Generator().manual_seed(0)
    observation = torch.randn(200, 3, generator=generator).cumsum(0)
    ends = (torch.arange(200) % 20 == 19)[:, None]
    following = {"observation": observation + 1, "reward": reward, "done": ends, "terminated": torch.zeros_like(ends)}
    action = torch.rand(200, 2, generator=generator)
    rows = TensorDict({"observation": observation, "action": action, "next": following}, [200])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of next observations that go on nowhere
        return load_offline_dataset(rows, batch_size=64)


def test_rewards_that_do_not_vary_are_worth_their_sum():
    few = {"warm_steps": 500, "steps": 1, "slice_len": 4, "hidden": [32], "lr": 5e-3}
    mean, _ = estimate_value(numpy_controller(), log_of(torch.full((200, 1), 1e4)), **few)
    assert mean == pytest.approx(1e4 / (1 - 0.99), rel=0.4)  # learnt in units of 1, critics get to a tenth of it


def test_without_a_discount_a_cut_has_no_value():
    with pytest.raises(InputError, match="gamma=1: 10 episodes are cut"):
        estimate_value(None, log_of(torch.ones(200, 1)), gamma=1.0)


def test_returns_that_hardly_vary_are_warned_of():
    reward = -1e5 + torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="subtract a constant from the rewards"):
        fit_fqe(numpy_controller(), log_of(reward), warm_steps=1, steps=1, slice_len=4, hidden=[8])


def numpy_controller():
    return TensorDictModule(lambda observation: observation[..., :2].double().tanh(), ["observation"], ["action"])


def critic_of(inputs):
    return ValueOperator(MLP(inputs, 1), in_keys=["observation", "action"])


def test_what_is_no_data_no_option_or_no_critic_is_named():
    data = log_of(torch.rand(200, 1))
    for call, words in (
        (lambda: estimate_value(numpy_controller(), data[:]), "a TensorDict; give the replay buffer"),
        (lambda: estimate_value(None, data, slice_len=3), "slice_len: nothing is fitted"),
        (lambda: estimate_value(None, data, held_out=2.0), "held_out=2.0"),
        (lambda: fit_fqe(numpy_controller(), data, qvalue_network=[critic_of(7)]), "cannot take"),
        (lambda: fit_fqe(numpy_controller(), data, qvalue_network=[critic_of(5)] * 2), "there twice"),
    ):
        with pytest.raises(InputError, match=words):
            call()


@pytest.mark.parametrize("members", [3, 5])
def test_intervals_of_the_bootstrap_cover_at_their_level(members):
    """Gaussian critics and episodes around a known value, 400 times."""
    covered = 0
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(members, 1, generator=generator, dtype=torch.float64)
        # All critics share an error of the size of their own spread: that of the data.
        shared = torch.randn((), generator=generator, dtype=torch.float64)
        episodes = torch.randn(40, generator=generator, dtype=torch.float64)
        initial = 5 + 0.5 * shared + 0.5 * noise / (1 + 1 / members) ** 0.5 * 1.0 + episodes
        none = torch.zeros(members, 40, 1, dtype=torch.float64)
        _, drawn = bootstrap([EpisodeTerms(initial, none, none[0], False)], 500, seed)
        low, high = drawn[0].quantile(0.05), drawn[0].quantile(0.95)
        covered += bool(low < 5 < high)
    assert 0.84 < covered / 400 < 0.96


@pytest.mark.slow
def test_intervals_of_fits_cover_the_exact_value():
    """90 % intervals over independent data sets; at that level 14 of 20 or fewer would happen once in 90 times."""
    exact = CHAIN.value(torch.ones(3))
    covered = 0
    small = {**FAST, "warm_steps": 20, "steps": 60}
    for seed in range(20):
        data = CHAIN.data(60, seed=100 + seed)
        _, (low, high) = estimate_value(policy_of(1, 1, 1), data, qvalue_network=tables(), seed=seed, **small)
        covered += low < exact < high
    assert covered >= 15


# ---------------------------------------------------------------- the choice


def choose(candidates, data, **options):
    return select_policy(candidates, data, qvalue_network=tables(), **{**FAST, "steps": 80, **options})


def test_the_better_policy_is_chosen_where_the_data_is_decisive():
    """Forward beats backward, the best of the three beats the middle one; the anchor acts backward."""
    data = CHAIN.data(300, seed=4)
    better = {"middle": policy_of(1, -1, -1), "best": policy_of(1, 1, 1)}
    choice = choose(better, data, anchor=policy_of(-1, -1, -1))
    assert choice.name == "best" and choice.policy is better["best"]
    exact = CHAIN.value(torch.ones(3)) - CHAIN.value(torch.zeros(3))
    assert choice.gains["best"].mean == pytest.approx(exact, rel=0.3)
    assert 0 < choice.gains["best"].interval[0] < choice.gains["best"].mean
    assert list(choice.values) == ["anchor", "middle", "best"]
    for name, forward in (("anchor", [0.0, 0.0, 0.0]), ("middle", [1.0, 0.0, 0.0]), ("best", [1.0, 1.0, 1.0])):
        (low, high), critics = choice.values[name].interval, choice.members[name]
        assert choice.values[name].mean == pytest.approx(CHAIN.value(torch.tensor(forward)), rel=0.25)
        assert low < choice.values[name].mean < high
        assert critics.mean().item() == pytest.approx(choice.values[name].mean)


def test_the_anchor_stays_where_nothing_is_better():
    data, anchor = CHAIN.data(300, seed=4), policy_of(1, 1, 1)
    worse = {"worse": policy_of(-1, -1, -1), "bad": policy_of(1, -1, 1)}
    choice = choose(worse, data, anchor=anchor)
    assert choice.name == "anchor" and choice.policy is anchor
    assert choice.gains["worse"].interval[1] < 0


def test_the_anchor_stays_where_the_data_says_nothing():
    """Rewards are noise alone: in four data sets no candidate is surely better, whatever the critics fit."""
    names = []
    for seed in range(4):
        rows = CHAIN.data(30, seed=seed)[:].clone()
        rows["next", "reward"] = torch.randn(len(rows), 1, generator=torch.Generator().manual_seed(seed))
        many = {str(signs): policy_of(*signs) for signs in [(1, 1, -1), (-1, 1, 1), (1, 1, 1)]}
        data = load_offline_dataset(rows, batch_size=64)
        names.append(choose(many, data, anchor=policy_of(-1, -1, -1), steps=30, warm_steps=10, seed=seed).name)
    assert names == ["anchor"] * 4


def test_the_family_of_a_residual_goes_from_the_anchor_to_the_policy():
    data = CHAIN.data(20, seed=0)
    actor = make_spar_loss(data).actor
    torch.nn.init.constant_(actor.head.module.mlp[-1].bias, 0.4)
    family = residual_family(actor, (0, 0.5, 1))
    state = torch.eye(STATES)
    anchor, half, whole = (policy(observation=state) for policy in family.values())
    torch.testing.assert_close(anchor, actor.anchor(observation=state))
    torch.testing.assert_close(whole, actor(observation=state))
    torch.testing.assert_close(half, (anchor + whole) / 2)
    assert (whole - anchor).abs().min() > 0.1
    choice = select_policy(actor, data, hidden=[8], **{**FAST, "steps": 2, "warm_steps": 2})
    assert list(choice.gains) == ["c=0.25", "c=0.5", "c=0.75", "c=1"]


def test_a_choice_needs_candidates_and_an_anchor():
    data = CHAIN.data(8, seed=0)
    with pytest.raises(InputError, match="anchor="):
        select_policy({"one": make_anchor(data)}, data)
    with pytest.raises(InputError, match="'anchor' is the name"):
        select_policy({"anchor": make_anchor(data)}, data, anchor=make_anchor(data))
    with pytest.raises(InputError, match="at least one candidate"):
        select_policy({}, data, anchor=make_anchor(data))
    with pytest.raises(InputError, match=r"scales=1\.5"):
        residual_family(make_spar_loss(data).actor, [1.5])


def test_a_choice_by_importance_ratios_needs_and_uses_densities():
    """Reward is the action: the shifted Gaussian is better by its shift."""
    generator = torch.Generator().manual_seed(0)
    action, ended = torch.randn(600, 1, generator=generator).clamp(-4, 4), torch.ones(600, 1, dtype=torch.bool)
    state = torch.randn(600, 2, generator=generator)
    step = {"observation": state, "reward": action, "terminated": ended}
    rows = TensorDict({"observation": state, "action": action, "next": step}, [600])
    data = load_offline_dataset(rows, batch_size=64, action_spec=Bounded(-4, 4, (1,)))
    small = {"qvalue_network": [ValueOperator(Wrong(), in_keys=["observation", "action"])], "warm_steps": 5}
    choice = select_policy(
        {"up": gaussian(0.5), "down": gaussian(-0.5)}, data, anchor=gaussian(0.0), behaviour=gaussian(0.0),
        held_out=0.9, slice_len=1, steps=2, **small,
    )  # fmt: skip
    assert choice.name == "up"
    assert choice.gains["up"].mean == pytest.approx(0.5, abs=0.2)
    assert choice.gains["down"].interval[1] < 0
