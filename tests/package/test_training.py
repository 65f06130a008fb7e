"""The phases of training against by-hand numbers, and SPAR improving a task that is known."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial
from itertools import islice

import pytest
import torch
from helpers import ACTION, OBSERVATION, buffer_of, make_batch, total
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torchrl.data import Bounded, SamplerWithoutReplacement
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import BCLoss, SoftUpdate, ValueEstimators

from torchrl_spar import (
    BatchSampler,
    InputError,
    SPARLoss,
    SPARUpdate,
    StackedSPARLoss,
    fit_anchor,
    fit_critics,
    fit_vae,
    load_offline_dataset,
    make_anchor,
    make_spar_loss,
    measure_residual_scale,
    with_anchor_actions,
)  # fmt: skip
from torchrl_spar.training import sampling
from torchrl_spar.training.optimization import adam, descent
from torchrl_spar.training.sampling import uniform_batches


def bandit(rows=4000):
    """One-step episodes: actions on a curve a = (x, x^2), reward best at x = 0.8, mean behaviour at x = 0."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(rows, 1, generator=generator) * 2 - 1) * 0.9
    ended = torch.ones(rows, 1, dtype=torch.bool)
    state = torch.randn(rows, 2, generator=generator)
    action = torch.cat((x, x.square()), -1)
    reward = -(x - 0.8).square()
    return TensorDict(
        {"observation": state, "action": action,
         "next": {"observation": state, "reward": reward, "terminated": ended, "truncated": ~ended, "done": ended}},
        [rows],
    )  # fmt: skip


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    data = load_offline_dataset(bandit())
    spec = Bounded(-1, 1, (2,))
    anchor = fit_anchor(make_anchor(2, spec, hidden=[32, 32]), data, steps=300)
    loss = make_spar_loss(2, spec, anchor=anchor, hidden=[32, 32], joint_vae=False)
    return fit_vae(loss, data, steps=600), data


def test_the_deployed_latent_head_decodes_with_the_fitted_decoder():
    rows = make_batch(64)
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8], head="latent", joint_vae=False)
    data = load_offline_dataset(rows, batch_size=16)
    # Without a start of the critics, which would copy all networks into their targets.
    fit_critics(fit_vae(loss, data, steps=5), data, steps=0)
    head = loss.actor_network(rows.select("observation"))
    assert torch.equal(loss.actor(rows.select("observation"))["action"], head["action"])


def test_anchor_learns_the_conditional_mean(fitted):
    loss, data = fitted
    action = loss.anchor(data[:500].select("observation"))["action"]
    torch.testing.assert_close(action.mean(0), data[:]["action"].mean(0), atol=0.1, rtol=0)
    assert action.std(0).max() < 0.15


def test_residual_scale_is_the_rms(fitted):
    loss, data = fitted
    rows = data[:]
    difference = rows["action"] - loss.anchor(rows.select("observation"))["action"]
    torch.testing.assert_close(loss.residual_scale, difference.pow(2).mean(0).sqrt())


def test_exactly_cloned_dimensions_get_the_floor():
    batch = make_batch(50)
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8])
    batch["action"] = loss.anchor(batch.select("observation"))["action"].clone()
    batch["action"][:, 1:] *= 0.5
    scale = measure_residual_scale(loss, load_offline_dataset(batch))
    assert scale[0] == 0.01 and (scale[1:] > 0.01).any()


def test_decoder_covers_the_data(fitted):
    loss, data = fitted
    batch = data[:1000]
    _, metadata = loss.vae_loss(batch)
    assert metadata["reconstruction_error"] < 0.2  # residuals have variance one
    # Decoded prior samples lie on the data's curve.
    state = TensorDict({"observation": batch["observation"]}, [1000])
    anchor = loss.anchor(state.copy())["action"]
    vae = loss.get_stateful_net("residual_vae")
    latent = torch.randn(1000, 4).clamp(-1.5, 1.5)
    decoded = vae.decoder(observation=state["observation"], anchor_action=anchor, latent=latent)

    def off_curve(residual):
        action = anchor + loss.residual_scale * residual
        return (action[:, 1] - action[:, 0].square()).abs().mean()

    # A Gaussian of the residuals' own size leaves the curve.
    assert off_curve(decoded) < 0.5 * off_curve(torch.randn(1000, 2))


@pytest.mark.slow
@pytest.mark.parametrize("trust_coeff", [0.0, 1.0])
def test_spar_improves_the_anchor_and_leaves_frozen_parts_alone(fitted, trust_coeff):
    loss, data = fitted
    torch.manual_seed(0)
    options = dict(hidden=[32, 32], joint_vae=False, trust_coeff=trust_coeff)
    fresh = make_spar_loss(2, Bounded(-1, 1, (2,)), **options)
    state = loss.state_dict()
    state["trust_coeff"] = fresh.trust_coeff
    fresh.load_state_dict(state)
    update = SPARUpdate(fresh, target_rate=0.02)
    frozen = {
        k: v.clone()
        for k, v in fresh.state_dict().items()
        if "anchor" in k or "residual_vae" in k or ("value_network_params" in k and "qvalue" not in k)
    }
    states = TensorDict({"observation": torch.randn(500, 2)}, [500])
    before = fresh.anchor(states.copy())["action"]
    for _ in range(200):
        metrics = update(data.sample())
    after = fresh.actor(states.copy())["action"]

    def value(action):
        return -(action[:, 0] - 0.8).square().mean()

    assert value(after) > value(before) + 0.2
    assert metrics["residual_ratio"] > 0.1
    for key, tensor in fresh.state_dict().items():
        if key in frozen:
            assert torch.equal(tensor, frozen[key]), key


def test_critics_start_from_the_returns(fitted):
    _, data = fitted
    fresh = make_spar_loss(2, Bounded(-1, 1, (2,)), hidden=[32, 32], joint_vae=False, value_mix=0.5)
    others = {k: v.clone() for k, v in fresh.state_dict().items() if "actor" in k or "vae" in k}
    fit_critics(fresh, data, steps=400)
    rows = data[:1000]
    returns = rows["next", "reward"].view(-1)  # one-step episodes
    scale = 1 / data[:]["next", "reward"].std()
    torch.testing.assert_close(fresh.reward_scale, scale)
    for params in (fresh.qvalue_network_params, fresh._modules["target_qvalue_network_params"]):
        error = fresh._qvalue(rows, rows["action"], params).mean(0) - scale * returns
        assert error.pow(2).mean() < 0.05  # of variance one
    value = fresh._value(rows)
    assert (value.mean() - scale * returns.mean()).abs() < 0.6  # an expectile near the mean
    for key, tensor in fresh.state_dict().items():
        if key in others:
            assert torch.equal(tensor, others[key]), key


def test_the_start_of_the_critics_leaves_the_deployed_policy_alone(make_loss):
    loss = make_loss()  # its moving average lags behind its head
    observation = torch.randn(7, OBSERVATION)
    before = loss.actor(observation=observation)
    fit_critics(loss, load_offline_dataset(make_batch(32), batch_size=8), steps=2)
    assert torch.equal(loss.actor(observation=observation), before)
    assert not torch.equal(loss.actor_network(observation=observation), before)


def test_returns_follow_renamed_ends(make_loss):
    rows = make_batch(32)
    renamed, other = rows.clone(), {"terminated": "over", "done": "ended"}
    for old, new in other.items():
        # Left behind under the usual names: flags that say something else.
        renamed["next"].set(new, renamed["next", old].clone()).set(old, ~renamed["next", old])
    losses = [make_loss(), make_loss()]
    losses[1].set_keys(**other)
    for loss, data in zip(losses, (rows, renamed)):
        torch.manual_seed(0)
        fit_critics(loss, buffer_of(data), steps=3)
    torch.testing.assert_close(losses[1].state_dict(), losses[0].state_dict())


def test_fits_take_a_loss_without_reduction(make_loss):
    states = []
    for reduction in ("mean", "none"):
        torch.manual_seed(0)
        loss, data = make_loss(reduction=reduction), load_offline_dataset(make_batch(32), batch_size=8)
        states.append(fit_critics(fit_vae(loss, data, steps=3), data, steps=3).state_dict())
    torch.testing.assert_close(*states)


def test_batches_of_a_fit_do_not_depend_on_where_it_starts(monkeypatch):
    rows = TensorDict({"row": torch.arange(50)}, [50])
    whole = list(islice(uniform_batches(rows, 8, 0, 5), 250))
    later = list(islice(uniform_batches(rows, 8, 130, 5), 120))
    assert all(torch.equal(one["row"], other["row"]) for one, other in zip(whole[130:], later, strict=True))
    counts = torch.cat([batch["row"] for batch in whole]).bincount(minlength=50)
    assert counts.min() > 10 and counts.max() < 80  # 40 on average
    monkeypatch.setattr(sampling, "FIT_BLOCK_BYTES", 3 * 8 * rows[:1].bytes())
    few = uniform_batches(rows, 8, 0, 5)
    assert len({tuple(next(few)["row"].tolist()) for _ in range(7)}) == 7


def test_a_buffer_with_a_sampler_or_transform_of_its_own_is_asked_for_batches():
    seen = []
    actor = make_anchor(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[4])
    for options in (
        {"sampler": SamplerWithoutReplacement()},
        {"transform": lambda rows: seen.append(len(rows)) or rows},
    ):
        data = load_offline_dataset(make_batch(32), batch_size=8, **options)
        sample = data.sample
        data.sample = lambda sample=sample: seen.append("asked") or sample()
        fit_anchor(actor, data, steps=2)
    assert seen == ["asked", "asked", 32, "asked", 8, "asked", 8]  # 32 for the statistics


def test_cloning_is_that_of_bc_loss():
    """The first loss of each kind of actor, on all rows in an order of their own."""
    data = load_offline_dataset(make_batch(32), batch_size=32, sampler=SamplerWithoutReplacement())
    gaussian = TensorDictModule(
        nn.Sequential(nn.Linear(OBSERVATION, 2 * ACTION), NormalParamExtractor()), ["observation"], ["loc", "scale"]
    )
    likely = ProbabilisticActor(gaussian, in_keys=["loc", "scale"], distribution_class=TanhNormal)
    seen = []
    for actor in (make_anchor(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[4]), likely):
        expected, before = BCLoss(actor)(data[:])["loss_bc"].detach(), deepcopy(actor.state_dict())
        fit_anchor(actor, data, steps=1, report=lambda step, metrics: seen.append(metrics["loss_bc"]))
        torch.testing.assert_close(seen[-1], expected)
        assert any((before[key] != value).any() for key, value in actor.state_dict().items())


@pytest.mark.slow
def test_compiled_fits_are_the_eager_ones(monkeypatch):
    """But for the VAE's, which draws its noise in the trace. Of the update, below, the code that is made is tested."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    data, states = load_offline_dataset(make_batch(32), batch_size=8), []
    for compile in (False, True):
        torch.manual_seed(0)
        anchor, loss = make_anchor(data, hidden=[4]), make_spar_loss(data, hidden=[4], value_mix=0.5)
        for fit, module in ((fit_anchor, anchor), (fit_critics, loss)):
            torch.manual_seed(1)
            fit(module, data, steps=5, compile=compile)
        states.append(deepcopy({**anchor.state_dict(), **loss.state_dict()}))
        rows = []
        fit_vae(loss, data, steps=60, compile=compile, report=lambda *row, rows=rows: rows.append(row[1]["loss_vae"]))
        assert torch.stack(rows[-10:]).mean() < torch.stack(rows[:10]).mean()
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_buffers_without_a_batch_size_are_refused(make_loss):
    data = buffer_of(make_batch(32), batch_size=None)
    for use in (
        lambda: fit_critics(make_loss(), data, steps=1),
        lambda: BatchSampler(make_loss(), data, length=1, seed=0),
    ):
        with pytest.raises(InputError, match="no batch_size"):
            use()


class CountingCritic(nn.Module):
    """With a buffer of whole numbers, as BatchNorm has."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(OBSERVATION + ACTION, 1)
        self.register_buffer("place", torch.arange(2))

    def forward(self, observation, action):
        return self.linear(torch.cat((observation, action), -1))


def test_buffers_of_whole_numbers_are_no_parameters(make_loss):
    like = make_loss(joint_vae=False)
    parts = [like.actor_network, ValueOperator(CountingCritic(), in_keys=["observation", "action"])]
    update = SPARUpdate(SPARLoss(*parts, like.residual_vae, joint_vae=False))
    for _ in range(100):
        metrics = update(make_batch(4))
    assert metrics["loss_qvalue"].isfinite()


def test_a_loaded_update_keeps_its_own_rates(make_loss):
    updates = [SPARUpdate(make_loss(), qvalue_lr=lr, actor_lr=lr) for lr in (1e-3, 1e-5)]
    for _ in range(2):
        updates[0](make_batch(8))
    state = updates[0].state_dict()
    for name in ("critic_optimizer", "actor_optimizer"):
        state[name]["param_groups"][0]["capturable"] = True  # as of a run that was captured
    updates[1].load_state_dict(state)
    for optimizer in (updates[1].critic_optimizer, updates[1].actor_optimizer):
        group = optimizer.param_groups[0]
        assert (group["lr"], group["capturable"]) == (1e-5, False)
        assert all(int(moments["step"]) >= 1 for moments in optimizer.state.values())
    updates[1](make_batch(8))


def test_head_is_updated_every_policy_interval_steps():
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8], joint_vae=False)
    update = SPARUpdate(loss, policy_interval=3)
    for step in range(1, 7):
        before = loss.actor_network_params["head"].data.clone()
        update(make_batch(12))
        changed = not (loss.actor_network_params["head"].data == before).all()
        assert changed == (step % 3 == 0)


@pytest.mark.parametrize("options", [{}, {"head": "latent"}, {"value_mix": 0.5}, {"candidate_dtype": torch.bfloat16}])
@pytest.mark.parametrize("joint_vae", [False, True])
def test_the_update_is_the_plain_loop(options, joint_vae):
    options = dict(hidden=[16, 16], joint_vae=joint_vae, num_candidates=4, **options)
    torch.manual_seed(0)
    fast = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), **options)
    plain = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), **options)
    plain.load_state_dict(fast.state_dict())
    update = SPARUpdate(fast, target_rate=0.05, policy_interval=2)
    critics = [p for name, p in plain.named_parameters() if name.startswith(("qvalue", "value"))]
    others = [p for p in plain.parameters() if all(p is not q for q in critics)]
    optimizer, actor_optimizer = torch.optim.Adam(critics, lr=5e-4), torch.optim.Adam(others, lr=1e-3)
    updater = SoftUpdate(plain, tau=0.05)
    for step in range(1, 41):
        batch = make_batch(32, seed=step)
        noise = {"action_noise": (32, ACTION), "candidate_noise": (32, 3, 2 * ACTION), "latent_noise": (32, 2 * ACTION)}
        for key, shape in noise.items():
            batch[key] = torch.randn(shape)
        update(batch.copy())
        optimizer.zero_grad()
        actor_optimizer.zero_grad()
        total(plain(batch)).backward()
        optimizer.step()
        if step % 2 == 0:
            actor_optimizer.step()
        updater.step()
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_process_compiles_more_programs_than_dynamo_keeps_of_one(monkeypatch):
    made = []

    def count(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    for programs in range(1, 11):
        layer = nn.Linear(2, 1)
        weight = layer.weight.detach().clone()
        step = descent({"loss": lambda b, x=layer: (x(b["x"]).sum(), {})}, adam(layer.parameters(), 0.1), compile=True)
        step(TensorDict({"x": torch.ones(3, 2)}, [3]))
        assert len(made) == programs
        torch.testing.assert_close(layer.weight, weight - 0.1)  # Adam's first step is the rate


@pytest.mark.slow
def test_the_compiled_update_is_the_eager_one(monkeypatch):
    # The tracing of the programs before and after the critics settle, each in one graph; the code made of one is below.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    compiled_and_eager_agree(policy_interval=2, decay_steps=4)


@pytest.mark.slow
def test_the_generated_code_is_the_eager_update(monkeypatch):
    # Inductor's own word, on nothing but the compiler: any other failure is to fail here.
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as err:
        pytest.skip(str(err))
    made = []

    def inductor(graph, inputs):
        made.append(compile_fx(graph, inputs))
        return made[-1]

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=inductor))
    compiled_and_eager_agree(policy_interval=1, num_candidates=2)
    assert made


def compiled_and_eager_agree(policy_interval, decay_steps=None, **options):
    torch.manual_seed(0)
    options = {"hidden": [8], "joint_vae": False, "num_candidates": 8, **options}
    losses = [make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), **options) for _ in range(2)]
    losses[1].load_state_dict(losses[0].state_dict())
    for loss, compile in zip(losses, (False, True)):
        update = SPARUpdate(loss, compile=compile, policy_interval=policy_interval, decay_steps=decay_steps)
        torch.manual_seed(1)
        for step in range(4):
            batch = make_batch(12, seed=step)
            batch["action_noise"] = torch.randn(12, ACTION)
            batch["candidate_noise"] = torch.randn(12, options["num_candidates"] - 1, 2 * ACTION)
            update(batch)
    torch.testing.assert_close(losses[1].state_dict(), losses[0].state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "option",
    [
        {"qvalue_lr": -1.0},
        {"actor_lr": -1.0},
        {"target_rate": 2.0},
        {"policy_interval": 0},
        {"decay_steps": 0},
        {"critic_share": 0.0},
        {"cudagraph": True},
    ],
)
def test_wrong_options_are_named(make_loss, option):
    ((name, value),) = option.items()
    with pytest.raises(InputError, match=f"{name}={value}: must be"):
        SPARUpdate(make_loss(), **option)


@pytest.mark.parametrize(("option", "value"), [("steps", -1), ("lr", -1.0)])
def test_a_fit_names_its_wrong_option(fitted, option, value):
    loss, data = fitted
    for fit in (fit_vae, fit_critics):
        with pytest.raises(InputError, match=f"{option}={value}: must be at least 0"):
            fit(deepcopy(loss), data, **{option: value})


@pytest.mark.parametrize("options", [{}, {"head": "latent"}, {"joint_vae": True, "value_mix": 0.5}])
def test_stacked_seeds_are_the_single_runs(fitted, options):
    _, data = fitted
    options = {"hidden": [16, 16], "joint_vae": False, "num_candidates": 4, **options}

    def build(seed):
        torch.manual_seed(seed)
        loss = make_spar_loss(2, Bounded(-1, 1, (2,)), **options)
        return loss, BatchSampler(loss, data, length=6, seed=seed)

    singles, metrics = [build(seed) for seed in range(3)], []
    for loss, sampler in singles:
        update = SPARUpdate(loss, policy_interval=2)
        metrics.append([update(batch) for _ in range(3) for batch in next(sampler)][-1])
    runs = [build(seed) for seed in range(3)]
    stack = StackedSPARLoss([loss for loss, _ in runs])
    update = SPARUpdate(stack, policy_interval=2)
    for _ in range(3):
        stacked = update.run(torch.stack([next(sampler) for _, sampler in runs], 1))
    for name, value in stacked.items():
        torch.testing.assert_close(value, torch.stack([m[name] for m in metrics]), rtol=1e-3, atol=1e-5)
    before = runs[0][0].state_dict()["qvalue_network_params.module.mlp.0.weight"].clone()
    stack.copy_back()
    for (single, _), (loss, _) in zip(singles, runs):
        torch.testing.assert_close(loss.state_dict(), single.state_dict(), rtol=1e-3, atol=1e-5)
    assert not before.equal(runs[0][0].state_dict()["qvalue_network_params.module.mlp.0.weight"])


def test_stacks_are_of_one_kind():
    spec = Bounded(-1, 1, (2,))
    with pytest.raises(InputError, match="differ in their options"):
        StackedSPARLoss([make_spar_loss(2, spec, hidden=[4], kappa=kappa) for kappa in (0.0, 1.0)])
    with pytest.raises(InputError, match="joint_vae=True with head='latent'"):
        StackedSPARLoss([make_spar_loss(2, spec, hidden=[4], head="latent")])
    losses = [make_spar_loss(2, spec, hidden=[4]) for _ in range(2)]
    StackedSPARLoss(losses)
    losses[1].set_keys(reward="other")
    with pytest.raises(InputError, match="differ in their options"):
        StackedSPARLoss(losses)
    losses[1].set_keys(reward="reward")
    losses[1].make_value_estimator(ValueEstimators.TD1)
    with pytest.raises(InputError, match="differ in their options"):
        StackedSPARLoss(losses)


def test_blocks_depend_on_their_seed_alone(fitted):
    loss, data = fitted
    torch.manual_seed(0)
    first = [next(sampler) for sampler in [BatchSampler(loss, data, length=3, seed=7)] for _ in range(2)]
    torch.manual_seed(1)
    second = [next(sampler) for sampler in [BatchSampler(loss, data, length=3, seed=7)] for _ in range(2)]
    assert all((a == b).all() for a, b in zip(first, second))
    assert not (first[0] == first[1]).all()
    rows = data[:]
    for batch in first[0]:  # every row is one of the data's, with its own outcome
        index = (rows["observation"].unsqueeze(0) == batch["observation"].unsqueeze(1)).all(-1).int().argmax(1)
        for key in ("action", ("next", "reward"), ("next", "terminated")):
            assert rows[key][index].equal(batch[key])
    big = next(BatchSampler(loss, data, length=50, seed=0, target_interval=None))
    for key in ("action_noise", "candidate_noise"):
        assert abs(big[key].mean()) < 0.02 and abs(big[key].std() - 1) < 0.02


def test_only_noise_that_a_term_reads_is_drawn(fitted):
    _, data = fitted
    expected = {
        (1.0, True, None): {"action_noise", "candidate_noise", "latent_noise"},
        (1.0, False, None): {"action_noise", "candidate_noise"},
        (0.0, False, None): {"action_noise"},
        (1.0, False, 10): {"candidate_noise"},
    }
    for (lsi_coeff, joint_vae, interval), keys in expected.items():
        loss = make_spar_loss(2, Bounded(-1, 1, (2,)), hidden=[4], lsi_coeff=lsi_coeff, joint_vae=joint_vae)
        block = next(BatchSampler(loss, data, length=2, seed=0, target_interval=interval))
        assert {key for key in block.keys() if key.endswith("_noise")} == keys
        SPARUpdate(loss).run(block)


def test_anchor_actions_computed_once_are_the_anchors(fitted):
    loss, data = fitted
    rows = with_anchor_actions(loss, data)[:]
    for state in (rows, rows["next"]):
        torch.testing.assert_close(state["anchor_action"], loss.anchor(state.select("observation"))["action"])
    assert "anchor_action" not in data[:].keys()
    assert rows["observation"].data_ptr() == data[:]["observation"].data_ptr()
    assert measure_residual_scale(loss, with_anchor_actions(loss, data)).equal(measure_residual_scale(loss, data))


def test_learning_rates_fall_along_a_cosine():
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8], joint_vae=False)
    update = SPARUpdate(loss, qvalue_lr=1e-2, actor_lr=1e-3, decay_steps=4, critic_share=1.0)
    rates = []
    for _ in range(6):
        update(make_batch(12))
        rates.append([o.param_groups[0]["lr"] for o in (update.critic_optimizer, update.actor_optimizer)])
    share = [1, 0.853553, 0.5, 0.146447, 0, 0]
    torch.testing.assert_close(rates, [[1e-2 * x, 1e-3 * x] for x in share], rtol=1e-5, atol=1e-12)


def test_settled_critics_stay_and_the_head_goes_on():
    """Against a loop by hand: the head's own Adam at the rate of the whole run, targets that still follow."""
    torch.manual_seed(0)
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8], joint_vae=False, evidence_scale=None)
    update = SPARUpdate(loss, actor_lr=1e-2, target_rate=0.1, decay_steps=8)  # the critics settle half-way
    batches = [make_batch(12).set("candidate_noise", torch.randn(12, 7, 2 * ACTION)) for _ in range(8)]
    rates = []
    for batch in batches[:4]:
        update(batch)
        rates.append(update.critic_optimizer.param_groups[0]["lr"])
    torch.testing.assert_close(rates, [5e-4 * x for x in (1, 0.853553, 0.5, 0.146447)], rtol=1e-5, atol=1e-12)
    other, adam = deepcopy(loss), deepcopy(update.actor_optimizer.state_dict())
    optimizer = torch.optim.Adam([p for p in other.actor_network_params.parameters() if p.requires_grad])
    optimizer.load_state_dict(adam)
    critics = loss.network_params("qvalue_network").clone()
    for step, batch in enumerate(batches[4:], start=4):
        metrics = update(batch)
        assert ("loss_actor" in metrics, "loss_qvalue" in metrics) == (step % 2 == 1, False)
        if step % 2:
            optimizer.param_groups[0]["lr"] = 1e-2 * (0.5 + 0.5 * math.cos(math.pi * step / 8))
            optimizer.zero_grad()
            other.actor_loss(batch)[0].backward()
            optimizer.step()
        for name in ("actor_network", "qvalue_network"):
            for key, target in other.target_params(name).items(True, True):
                target.data.lerp_(other.network_params(name)[key].data, 0.1)
    assert (loss.network_params("qvalue_network") == critics).all()
    for name, value in loss.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])


def test_reports_reach_every_step(fitted):
    _, data = fitted
    seen = []
    fit_anchor(make_anchor(2, Bounded(-1, 1, (2,)), hidden=[4]), data, steps=3, report=lambda *row: seen.append(row))
    assert [step for step, _ in seen] == [1, 2, 3] and all("loss_bc" in metrics for _, metrics in seen)
