"""What does not fit is named before it is wrong silently; its neighbours that do fit have the same numbers."""

from __future__ import annotations

import pytest
import torch
from helpers import ACTION, OBSERVATION, buffer_of, build_loss, make_batch, total
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import (
    Bounded,
    LazyMemmapStorage,
    LazyStackStorage,
    ListStorage,
    MultiStep,
    ReplayBufferEnsemble,
)
from torchrl.envs.utils import ExplorationType
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives import BCLoss

from torchrl_spar import (
    BackgroundEvaluator,
    BatchSampler,
    FQELoss,
    FrozenAnchor,
    GuardedActor,
    HealthCheck,
    InputError,
    ResidualHead,
    ResidualVAE,
    SPARActor,
    SPARLoss,
    SPARUpdate,
    StackedSPARLoss,
    chunk_actions,
    estimate_value,
    evaluate,
    fit_anchor,
    fit_critics,
    fit_detector,
    fit_fqe,
    fit_fqe_each,
    fit_vae,
    load_offline_dataset,
    load_policy,
    make_anchor,
    make_member,
    make_spar_loss,
    make_toy_data,
    mean_actor,
    measure_residual_scale,
    normalized_score,
    pretrain,
    residual_family,
    returns_to_go,
    save_policy,
    select_policy,
    share_critics,
    with_anchor_actions,
    with_member_weights,
    with_value_targets,
)
from torchrl_spar.data.returns import episode_ends
from torchrl_spar.ope.estimate import episode_terms, estimates_of_critics

SPEC = Bounded(-1, 1, (ACTION,))
SMALL = {"warm_steps": 1, "steps": 1, "slice_len": 4, "hidden": [8]}
DONE, REWARD, TERMINATED = (("next", name) for name in ("done", "reward", "terminated"))


def critic(inputs: int | None = OBSERVATION + ACTION) -> ValueOperator:
    return ValueOperator(MLP(inputs, 1, num_cells=[8]), in_keys=["observation", "action"])


def linear(inputs: int, outputs: int, **options) -> TensorDictModule:
    return TensorDictModule(nn.Linear(inputs, outputs, **options), ["observation"], ["action"])


def acts(observation: torch.Tensor) -> torch.Tensor:
    return observation[..., :ACTION]


def episodes(count: int = 8, steps: int = 10) -> TensorDict:
    """Episodes in order that end in a terminal state, except every third, which is cut off."""
    torch.manual_seed(0)
    states = torch.randn(count, steps + 1, OBSERVATION).cumsum(1)
    last = torch.zeros(count, steps, 1, dtype=torch.bool)
    last[:, -1] = True
    cut = (torch.arange(count) % 3 == 0).view(-1, 1, 1) & last
    outcome = {
        "observation": states[:, 1:], "reward": torch.randn(count, steps, 1),
        "terminated": last & ~cut, "truncated": cut, "done": last,
    }  # fmt: skip
    action = torch.rand(count, steps, ACTION) * 2 - 1
    return TensorDict({"observation": states[:, :-1], "action": action, "next": outcome}, [count, steps]).reshape(-1)


def losses(loss, batch):
    torch.manual_seed(0)
    out = loss(batch.clone())
    return {key: out[key] for key in out.keys()}


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("key, change", [
    (REWARD, lambda x: x[..., 0]), (DONE, lambda x: x[..., 0]), (TERMINATED, lambda x: x[..., 0]),
    (DONE, torch.Tensor.int), (TERMINATED, torch.Tensor.byte), (TERMINATED, torch.Tensor.long),
    (TERMINATED, torch.Tensor.float),
])  # fmt: skip
def test_outcomes_of_another_shape_or_type(key, change):
    """TorchRL's estimators take ``~1`` and ``~0`` of whole numbers for flags, -2 and -1."""
    data, loss = episodes(), build_loss(hidden=[8])
    data.set(key, change(data[key]).clone())
    calls = {
        "loss": lambda: loss(data[:8].clone()),
        "update": lambda: SPARUpdate(loss)(data[:8]),
        "fqe": lambda: FQELoss(linear(OBSERVATION, ACTION), critic())(data[:8].clone()),
        "targets": lambda: loss.value_targets(data, episode_ends(episodes())),
    }
    for call in calls.values():
        with pytest.raises(InputError, match=f"'{key[-1]}'.* (has shape|is of type)"):
            call()


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 4)])  # the last one would be one a critic
def test_value_targets_of_another_shape(shape):
    with pytest.raises(InputError, match=r"'value_target' has shape .*this loss needs \(4, 1\)"):
        build_loss(hidden=[8])(make_batch(4).set("value_target", torch.zeros(shape)))


def test_padding_is_masked_under_each_name_that_the_data_functions_know():
    batch, loss = make_batch(4, 3), build_loss(hidden=[8])
    mask = torch.arange(12).view(4, 3) % 4 != 1
    expected = losses(loss, batch.clone().set(("collector", "mask"), mask.unsqueeze(-1)))
    for key, value in ((("collector", "mask"), mask), ("mask", mask), ("mask", mask.unsqueeze(-1))):
        torch.testing.assert_close(losses(loss, batch.clone().set(key, value)), expected)
    loss.loss_mask_key = ("collector", "mask")  # TorchRL's: this one alone
    torch.testing.assert_close(losses(loss, batch.clone().set("mask", mask)), losses(loss, batch))


@pytest.mark.parametrize("mask, message", [
    (torch.ones(12, 1, dtype=torch.int64), "is of type torch.int64"), (torch.ones(12), "is of type torch.float32"),
    (torch.ones(12, 2, dtype=torch.bool), r"has shape \(12, 2\)"),
])  # fmt: skip
def test_masks_of_another_type_or_shape(mask, message):
    for loss in (build_loss(hidden=[8], joint_vae=False), FQELoss(linear(OBSERVATION, ACTION), critic())):
        with pytest.raises(InputError, match=f"'mask'.*{message}"):
            loss(make_batch(12).set(("collector", "mask"), mask))


def test_padding_has_no_priority():
    batch, mask = make_batch(4, 3), torch.arange(12).view(4, 3) % 4 != 1
    priority = []
    for one in (batch.clone(), batch.clone().set("mask", mask)):
        torch.manual_seed(0)
        build_loss(hidden=[8])(one)
        priority.append(one["td_error"])
    assert priority[0].all() and torch.equal(priority[1], priority[0] * mask)


def test_a_batch_of_padding_alone_moves_nothing():
    loss = build_loss(hidden=[8])
    total(loss(make_batch(12).set("mask", torch.zeros(12, dtype=torch.bool)))).backward()
    grads = [parameter.grad for parameter in loss.parameters() if parameter.grad is not None]
    assert grads and not any(grad.isnan().any() or grad.any() for grad in grads)


def test_priority_weights_fit_the_batch():
    batch, loss, weight = make_batch(4, 3), build_loss(hidden=[8]), torch.rand(4, 3)
    expected = losses(loss, batch.clone().set("priority_weight", weight))
    torch.testing.assert_close(losses(loss, batch.clone().set("priority_weight", weight.unsqueeze(-1))), expected)
    with pytest.raises(InputError, match=r"'priority_weight' has shape \(4, 3, 2\)"):
        loss(batch.clone().set("priority_weight", torch.rand(4, 3, 2)))


def test_an_empty_batch():
    for loss in (build_loss(hidden=[8]), FQELoss(linear(OBSERVATION, ACTION), critic())):
        with pytest.raises(InputError, match=r"the batch is empty: its shape is \(0,\)"):
            loss(make_batch(12)[:0].clone())


@pytest.mark.parametrize("key", ["observation", "action", *(("next", k) for k in ("observation", "reward", "done"))])
def test_an_update_names_what_its_batch_lacks(key):
    stack = StackedSPARLoss([make_spar_loss(OBSERVATION, SPEC, hidden=[8], joint_vae=False) for _ in range(2)])
    for loss, batch in ((build_loss(hidden=[8]), make_batch(4)), (stack, make_batch(2, 4))):
        with pytest.raises(InputError, match=f"the batch lacks .*'{key if isinstance(key, str) else key[-1]}'"):
            SPARUpdate(loss)(batch.exclude(key))


def test_a_stack_names_the_noise_that_it_does_not_draw():
    stack = StackedSPARLoss([make_spar_loss(OBSERVATION, SPEC, hidden=[8], joint_vae=False) for _ in range(2)])
    with pytest.raises(InputError, match=r"lacks \['action_noise', 'candidate_noise'\]: a stack draws no noise"):
        SPARUpdate(stack)(make_batch(2, 4))
    with pytest.raises(InputError, match="give at least one to stack"):
        StackedSPARLoss([])


def test_next_states_that_do_not_fit():
    batch = make_batch(12).set(("next", "anchor_action"), torch.zeros(12, 1))
    with pytest.raises(InputError, match="cannot take the next states of this batch"):
        build_loss(hidden=[8])(batch)


def test_whole_numbers_are_no_actions():
    with pytest.raises(InputError, match=r"'action' is of type torch.int64; the policy's is of type torch.float32"):
        build_loss(hidden=[8])(make_batch(12).set("action", torch.zeros(12, ACTION, dtype=torch.int64)))


# ---------------------------------------------------------------- the losses themselves


@pytest.mark.parametrize("name, writer", [
    ("latent_loc", "the encoder"), ("latent_log_std", "the encoder"), ("value", "the value network"),
])  # fmt: skip
def test_keys_that_a_network_does_not_write(name, writer):
    loss = build_loss(hidden=[8])
    loss.set_keys(**{name: ("inner", "key")})
    with pytest.raises(InputError, match=rf"{writer} writes .*, not \('inner', 'key'\): tell the loss its keys"):
        loss(make_batch(12))


@pytest.mark.parametrize("gamma", [-0.1, 1.5, float("nan")])
def test_a_gamma_outside_its_range(gamma):
    for loss in (build_loss(hidden=[8]), FQELoss(linear(OBSERVATION, ACTION), critic())):
        with pytest.raises(InputError, match=r"gamma=.*between 0 and 1"):
            loss.make_value_estimator(gamma=gamma)


@pytest.mark.parametrize("name", ["lsi_coeff", "trust_coeff"])
def test_a_schedule_does_not_revive_a_term(name):
    loss = build_loss(hidden=[8], **{name: 0.0})
    setattr(loss, name, 0.0)
    with pytest.raises(InputError, match=f"{name}: set to 0.5, but this loss was built with {name}=0"):
        setattr(loss, name, 0.5)
    with pytest.raises(InputError, match=f"{name}=-1: must be at least 0"):
        setattr(build_loss(hidden=[8]), name, -1)


def test_lazy_networks():
    parts = [build_loss(hidden=[8]).get_stateful_net(name) for name in ("actor_network", "residual_vae")]
    lazy = [
        ("qvalue_network", lambda: SPARLoss(parts[0], critic(None), parts[1])),
        ("qvalue_network", lambda: SPARLoss(parts[0], [critic(None) for _ in range(4)], parts[1])),
        ("value_network", lambda: SPARLoss(parts[0], critic(), parts[1], ValueOperator(MLP(out_features=1)))),
        ("qvalue_network", lambda: FQELoss(linear(OBSERVATION, ACTION), critic(None))),
        ("the head", lambda: ResidualHead(MLP(out_features=ACTION))),
    ]
    for name, build in lazy:
        with pytest.raises(InputError, match=f"{name}: parameter .* is lazy: call the network once"):
            build()
    called = critic(None)
    called(observation=torch.zeros(1, OBSERVATION), action=torch.zeros(1, ACTION))
    assert SPARLoss(parts[0], called, parts[1])(make_batch(12))["loss_qvalue"].isfinite()


NO_CRITICS = [None, [], nn.Linear(8, 1), [critic(), nn.Linear(8, 1)], [critic(), critic(9)]]


@pytest.mark.parametrize("networks", NO_CRITICS, ids=["none", "empty", "plain", "one is plain", "of two sizes"])
def test_what_is_no_critic(networks):
    loss = build_loss(hidden=[8])
    actor, vae = (loss.get_stateful_net(name) for name in ("actor_network", "residual_vae"))
    for build in (lambda: SPARLoss(actor, networks, vae, num_qvalue_nets=2),
                  lambda: FQELoss(linear(OBSERVATION, ACTION), networks, num_qvalue_nets=2)):  # fmt: skip
        with pytest.raises(InputError, match="qvalue_network: "):
            build()
    many = nn.ModuleList([critic(), critic()]), (critic(), critic())
    for each in many:
        assert SPARLoss(actor, each, vae, num_qvalue_nets=2)(make_batch(12))["loss_qvalue"].isfinite()


def test_plain_modules_are_told_what_to_become():
    loss, plain = build_loss(hidden=[8]), nn.Linear(3, 3)
    actor, vae = (loss.get_stateful_net(name) for name in ("actor_network", "residual_vae"))
    for name, build in {
        "value_network": lambda: SPARLoss(actor, critic(), vae, plain),
        "encoder": lambda: ResidualVAE(plain, vae.decoder), "decoder": lambda: ResidualVAE(vae.encoder, plain),
        "head": lambda: SPARActor(linear(OBSERVATION, ACTION), plain, action_spec=SPEC),
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=f"^{name}: a Linear; give a TensorDictModule"):
            build()


def test_an_anchors_action_is_not_repeated_along_the_datas():
    """Networks that join what they read take any anchor; its one action would stand for all three."""

    class Joined(nn.Module):
        def __init__(self, inputs, outputs, parts=1):
            super().__init__()
            self.linear, self.parts = nn.Linear(inputs, outputs), parts

        def forward(self, *inputs):
            out = self.linear(torch.cat(inputs, -1))
            return out if self.parts == 1 else out.chunk(self.parts, -1)

    state = ["observation", "anchor_action"]
    encoder = TensorDictModule(Joined(9, 8, 2), [*state, "residual"], ["latent_loc", "latent_log_std"])
    vae = ResidualVAE(encoder, TensorDictModule(Joined(10, ACTION), [*state, "latent"], ["residual"]))
    actor = SPARActor(linear(OBSERVATION, 1), ResidualHead(Joined(6, ACTION)), action_spec=SPEC)
    loss = SPARLoss(actor, critic(), vae)
    with pytest.raises(InputError, match=r"'anchor_action' has shape \(12, 1\); this loss needs \(12, 3\)"):
        loss(make_batch(12))


def test_bounds_of_another_size_than_the_datas_actions():
    data = load_offline_dataset(episodes())
    with pytest.raises(InputError, match="action_spec has 2 dimensions, the data's actions have 3"):
        make_spar_loss(data, Bounded(-1, 1, (2,)))


def test_bounds_along_leading_dimensions():
    low, high = torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 3.0])
    actor = make_spar_loss(3, Bounded(low.expand(4, 2), high.expand(4, 2), (4, 2)), hidden=[8]).actor
    assert torch.equal(actor.low, low) and torch.equal(actor.high, high)
    with pytest.raises(InputError, match=r"bounds differ along its leading dimensions, \(2,\)"):
        make_spar_loss(3, Bounded(torch.stack([low, 2 * low]), torch.stack([high, high]), (2, 2)))
    with pytest.raises(InputError, match=r"not a BoundedContinuous of shape \(\)$"):
        make_spar_loss(3, Bounded(-1, 1, ()))


# ---------------------------------------------------------------- buffers


FUNCTIONS = {
    "fit_anchor": lambda loss, buffer: fit_anchor(linear(OBSERVATION, ACTION), buffer, steps=1),
    "with_anchor_actions": with_anchor_actions,
    "measure_residual_scale": measure_residual_scale,
    "fit_vae": lambda loss, buffer: fit_vae(loss, buffer, steps=1),
    "fit_critics": lambda loss, buffer: fit_critics(loss, buffer, steps=1),
    "with_value_targets": with_value_targets,
    "with_member_weights": with_member_weights,
    "BatchSampler": lambda loss, buffer: next(BatchSampler(loss, buffer, length=1, seed=0)),
    "HealthCheck": HealthCheck,
    "chunk_actions": lambda loss, buffer: chunk_actions(buffer, 2),
}
OF_LOSS = FUNCTIONS.keys() - {"fit_anchor", "chunk_actions"}
READS = {
    "action": set(FUNCTIONS) - {"with_member_weights", "HealthCheck"},
    "observation": set(FUNCTIONS) - {"with_member_weights", "HealthCheck", "chunk_actions", "measure_residual_scale"},
    REWARD: {"fit_critics", "with_value_targets", "BatchSampler", "HealthCheck", "chunk_actions"},
    "next": set(FUNCTIONS) - {"fit_anchor"},
}


@pytest.mark.parametrize("kind", ["Linear", "SPARActor", "BCLoss", "FQELoss", "NoneType", "tuple"])
def test_what_is_no_loss(kind):
    buffer, actor = buffer_of(episodes()), linear(OBSERVATION, ACTION)
    wrong = {
        "Linear": nn.Linear(3, 3), "SPARActor": build_loss(hidden=[8]).actor, "BCLoss": BCLoss(actor),
        "FQELoss": FQELoss(actor, critic()), "NoneType": None, "tuple": (build_loss(hidden=[8]), buffer),
    }[kind]  # fmt: skip
    others = {
        "SPARUpdate": lambda loss, buffer: SPARUpdate(loss), "make_member": lambda *first: make_member(*first, seed=1),
        "StackedSPARLoss": lambda loss, buffer: StackedSPARLoss([loss]),
        "share_critics": lambda loss, buffer: share_critics(loss, BCLoss(actor)),
    }  # fmt: skip
    for name, function in {**{name: FUNCTIONS[name] for name in OF_LOSS}, **others}.items():
        culprit = "TensorDictReplayBuffer" if (name, kind) == ("HealthCheck", "tuple") else kind
        with pytest.raises(InputError, match=f"(loss|losses|spar): a {culprit}; give the SPARLoss"):
            function(wrong, buffer)


def test_what_shares_no_critics():
    with pytest.raises(InputError, match="other: a Linear; give a loss of TorchRL's"):
        share_critics(build_loss(hidden=[8]), nn.Linear(3, 3))


@pytest.mark.parametrize("kind", ["TensorDict", "str", "list", "NoneType"])
def test_what_is_no_buffer(kind):
    wrong = {"TensorDict": episodes(), "str": "log.npz", "list": [episodes()], "NoneType": None}[kind]
    loss, actor = build_loss(hidden=[8]), linear(OBSERVATION, ACTION)
    others = {
        "pretrain": lambda loss, data: pretrain(data), "fit_detector": lambda loss, data: fit_detector(data),
        "make_member": lambda *first: make_member(*first, seed=1),
        "estimate_value": lambda loss, data: estimate_value(None, data),
        "fit_fqe": lambda loss, data: fit_fqe(actor, data),
    }  # fmt: skip
    message = f"^a {kind}; give the replay buffer that load_offline_dataset returns: call that first$"
    for function in {**FUNCTIONS, **others}.values():
        with pytest.raises(InputError, match=message):
            function(loss, wrong)


@pytest.mark.parametrize("function", [pretrain, fit_detector])
def test_a_buffer_of_torchrls_is_to_be_loaded_where_its_statistics_are_read(function):
    with pytest.raises(InputError, match=r"^a TensorDictReplayBuffer; give the .*load_offline_dataset returns"):
        function(buffer_of(episodes()))


@pytest.mark.parametrize("key", READS)
def test_a_function_names_what_a_buffer_lacks(key):
    for name in READS[key]:
        with pytest.raises(InputError, match=f"lacks .*'{key if isinstance(key, str) else key[-1]}'"):
            FUNCTIONS[name](build_loss(hidden=[8]), buffer_of(episodes().exclude(key)))


def test_a_fit_names_the_entry_that_does_not_fit_and_not_the_outcome_that_it_does_not_read():
    rows = episodes()
    buffer = buffer_of(rows.set("action", rows["action"].double()))
    for name in ("fit_vae", "fit_critics", "with_value_targets", "BatchSampler"):
        with pytest.raises(InputError, match=r"cannot take this batch, which holds .*'action': '\[3\] torch.float64"):
            FUNCTIONS[name](build_loss(hidden=[8]), buffer)


@pytest.mark.parametrize("key", [DONE, TERMINATED])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_returns_take_flags_alone(key, dtype):
    rows = episodes()
    with pytest.raises(InputError, match=f"'{key[-1]}' is of type {dtype}; it must be torch.bool"):
        returns_to_go(rows.set(key, rows[key].to(dtype)), 0.9)


def test_returns_are_of_rows():
    rows = episodes()
    with pytest.raises(InputError, match=r"of rows \[N\] in order, not of \(8, 10\)"):
        returns_to_go(rows.reshape(8, 10), 0.9)
    with pytest.raises(InputError, match=r"have shapes \(80, 2\) and \(80, 1\); both must be \[80, 1\]"):
        returns_to_go(rows.clone().set(REWARD, torch.zeros(80, 2)), 0.9)
    with pytest.raises(InputError, match=r"of different shapes, \(80, 6\) and \(80, 5\)"):
        returns_to_go(rows.clone().set("observation", torch.zeros(80, 6)), 0.9)


@pytest.mark.parametrize("kind", ["tensor", "memmap", "list", "stack", "transform", "ensemble"])
def test_targets_are_read_where_they_were_written(kind, tmp_path):
    """A list stacks its rows whenever it is read: what is written to the stack is lost.

    Of a thousand rows, the second stack often lies where the first one lay.
    """
    loss, rows = build_loss(hidden=[8]), episodes(count=100)
    rows = with_value_targets(loss, with_anchor_actions(loss, buffer_of(rows)))[:].exclude("index")
    buffer = {
        "tensor": lambda: buffer_of(rows),
        "memmap": lambda: buffer_of(rows, LazyMemmapStorage(1000, scratch_dir=tmp_path)),
        "list": lambda: buffer_of(rows, ListStorage(1000)), "stack": lambda: buffer_of(rows, LazyStackStorage(1000)),
        "transform": lambda: buffer_of(rows, transform=lambda rows: rows.clone()),
        "ensemble": lambda: ReplayBufferEnsemble(buffer_of(rows[:500]), buffer_of(rows[500:]), batch_size=8),
    }[kind]()  # fmt: skip
    with torch.no_grad():
        for parameter in loss.target_params("qvalue_network").values(True, True):
            parameter.data += 0.1
    expected = loss.value_targets(rows, episode_ends(rows))["value_target"]
    assert not torch.allclose(expected, rows["value_target"])
    found = with_value_targets(loss, buffer)
    torch.testing.assert_close(found[:]["value_target"], expected)
    assert (found is buffer) == (kind in ("tensor", "memmap"))


def test_functions_take_ensembles_as_their_rows():
    rows, loss = episodes(), build_loss(hidden=[8])
    ensemble, whole = ReplayBufferEnsemble(buffer_of(rows[:40]), buffer_of(rows[40:]), batch_size=8), buffer_of(rows)
    assert HealthCheck(loss, ensemble).value_range == HealthCheck(loss, whole).value_range
    for function in (FUNCTIONS["BatchSampler"], lambda loss, buffer: with_member_weights(loss, buffer)[:]):
        found, expected = function(loss, ensemble), function(loss, whole)
        for key in expected.exclude("index").keys(True, True):
            torch.testing.assert_close(found[key], expected[key])


def test_rewards_of_several_steps_are_not_taken_for_those_of_one():
    data = load_offline_dataset(episodes(), batch_size=8)
    chunks, multi = chunk_actions(data, 2), MultiStep(0.9, 3)(episodes().reshape(8, 10))
    for source in (chunks, chunks[:], multi):
        with pytest.raises(InputError, match=r"sums of several steps .*load the single steps"):
            load_offline_dataset(source)
    for call in (lambda: chunk_actions(chunks, 2), lambda: returns_to_go(chunks[:], 0.9)):
        with pytest.raises(InputError, match=r"sums of several steps .*give the data of single steps"):
            call()
    ones = episodes().set("steps_to_next_obs", torch.ones(80, 1, dtype=torch.int64))
    assert torch.equal(load_offline_dataset(ones).episode_returns, data.episode_returns)


def test_a_loaded_set_is_not_loaded_again():
    """Its bounds, environment and returns would be lost without a word."""
    data = load_offline_dataset(episodes(), action_spec=Bounded(-2, 2, (ACTION,)))
    with pytest.raises(InputError, match="OfflineReplayBuffer: it is loaded already"):
        load_offline_dataset(data)


# ---------------------------------------------------------------- actors


WRONG = {
    "another size": (lambda: linear(OBSERVATION, 1), r"writes actions of shape \(1,\) a row; the data's"),
    "another observation": (lambda: linear(4, ACTION), r"cannot take the data, .*'\[5\] torch.float32 cpu'"),
    "another type": (lambda: linear(OBSERVATION, ACTION, dtype=torch.float64), "cannot take the data, .*dtype"),
    "another entry": (
        lambda: TensorDictModule(nn.Linear(2, ACTION), ["goal"], ["action"]), r"the data lacks \['goal'\], which",
    ),
    "NaN": (lambda: TensorDictModule(lambda x: x[..., :3] * torch.nan, ["observation"], ["action"]),
            "writes NaN or infinity for"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_an_actor_that_does_not_fit_the_data(kind):
    make, message = WRONG[kind]
    data = load_offline_dataset(episodes(), batch_size=8)
    few = {"steps": 1}
    calls = {
        "the anchor": lambda: pretrain(data, anchor=make(), vae=few, critics=few, hidden=[8]),
        "the policy": lambda: estimate_value(make(), data, **SMALL),
        "the policy's": lambda: estimate_value(make(), data, exploration_type=ExplorationType.RANDOM, **SMALL),
    }
    for call in calls.values():
        with pytest.raises(InputError, match=message):
            call()


def test_cloning_names_an_actor_of_another_size():
    """Its one action would be compared with each of the data's."""
    with pytest.raises(InputError, match=r"the actor writes actions of shape \(1,\) a row"):
        fit_anchor(linear(OBSERVATION, 1), buffer_of(episodes()), steps=1)
    with pytest.raises(InputError, match="the actor cannot take the data"):
        fit_anchor(linear(4, ACTION), buffer_of(episodes()), steps=1)


@pytest.mark.parametrize("kind", ["Linear", "SPARLoss", "function"])
def test_what_is_no_actor(kind):
    data, loss, good = load_offline_dataset(episodes(), batch_size=8), build_loss(hidden=[8]), linear(5, ACTION)
    wrong, detector = {"Linear": nn.Linear(5, 3), "SPARLoss": loss, "function": acts}[kind], fit_detector(data)
    late = {**SMALL, "warm_steps": 10**9}  # it is told before anything is fitted
    calls = [
        lambda: evaluate(wrong, "Pendulum-v1"), lambda: fit_anchor(wrong, data), lambda: FrozenAnchor(wrong),
        lambda: make_spar_loss(data, anchor=wrong), lambda: FQELoss(wrong, critic()),
        lambda: GuardedActor(wrong, detector), lambda: GuardedActor(loss.actor, detector, wrong),
        lambda: estimate_value(wrong, data, **late), lambda: fit_fqe(wrong, data, **late),
        lambda: fit_fqe_each({"one": good, "other": wrong}, data, **late),
        lambda: select_policy({"one": wrong}, data, anchor=good, **late),
        lambda: select_policy({"one": good}, data, anchor=wrong, **late),
    ]  # fmt: skip
    if kind != "function":  # which load_policy takes, and which does not pickle
        calls += [lambda: load_policy("never.pt", policy=wrong)]
    if kind != "SPARLoss":
        calls += [lambda: save_policy(wrong, "never.pt")]
    for call in calls:
        with pytest.raises(InputError, match=f": a {kind}; give an actor: a TensorDictModule that writes the action"):
            call()
    with pytest.raises(InputError, match=f"actor: a {kind} has no residual; give a SPARActor"):
        residual_family({"one": loss.actor, "other": wrong})


def test_an_actor_that_writes_no_action():
    policy, data = TensorDictModule(nn.Linear(3, 1), ["observation"], ["torque"]), load_offline_dataset(episodes())
    for call in (
        lambda: evaluate(policy, "Pendulum-v1"),
        lambda: fit_anchor(policy, data),
        lambda: FrozenAnchor(policy),
    ):
        with pytest.raises(InputError, match=r"writes \['torque'\], not 'action'"):
            call()


def test_a_background_evaluation_refuses_what_is_no_actor_where_it_is_submitted():
    with BackgroundEvaluator() as evaluator, pytest.raises(InputError, match="policy: a Linear; give an actor"):
        evaluator.submit("step 1", nn.Linear(3, 1), "Pendulum-v1")


def test_one_where_several_belong_and_other_neighbours():
    data, loss = load_offline_dataset(episodes(), batch_size=8), build_loss(hidden=[8])
    for call, message in (
        (lambda: StackedSPARLoss(loss), "losses: one SPARLoss; give a list"),
        (lambda: mean_actor(loss.actor), "actors: one SPARActor; give a list"),
        (lambda: mean_actor(None), "actors: one NoneType; give a list"),
        (lambda: fit_fqe_each(loss.actor, data, **SMALL), "policies: a SPARActor; give policies by name"),
        (lambda: fit_fqe(loss.actor, data, qvalue_network=nn.Linear(8, 1), **SMALL), "qvalue_network: one critic"),
        (lambda: fit_fqe(loss.actor, data, start=loss, **SMALL), "start='SPARLoss': must be an FQELoss"),
        (lambda: GuardedActor(loss.actor, None), "detector=None: must be what fit_detector returns"),
        (lambda: returns_to_go(data, 0.9), r"data: a OfflineReplayBuffer; give rows as a TensorDict, .*buffer\[:\]"),
        (lambda: normalized_score(data.env_id, 1.0), "no D4RL reference returns are known for None"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_what_is_no_policy():
    data, loss = load_offline_dataset(episodes(), batch_size=8), build_loss(hidden=[8])
    for call in (
        lambda: pretrain(data, anchor=nn.Linear(OBSERVATION, ACTION)),
        lambda: residual_family(make_anchor(data)),
        lambda: select_policy(make_anchor(data), data, anchor=make_anchor(data)),
        lambda: save_policy({}, "never.pt"),
        lambda: save_policy(BCLoss(linear(OBSERVATION, ACTION)), "never.pt"),
        lambda: load_policy("never.pt", policy=loss),
    ):
        with pytest.raises(InputError, match="give a"):
            call()


def test_loading_a_policy_names_a_device_that_is_not_here(tmp_path):
    save_policy(build_loss(hidden=[8]), tmp_path / "policy.pt")
    with pytest.raises(InputError, match="device=cuda:77: not available here"):
        load_policy(tmp_path / "policy.pt", device="cuda:77")


# ---------------------------------------------------------------- off-policy evaluation


def uniform(low: float, high: float) -> ProbabilisticActor:
    class Edges(nn.Module):
        def forward(self, observation):
            like = torch.ones_like(observation[..., :ACTION])
            return low * like, high * like

    def box(low, high):
        return torch.distributions.Independent(torch.distributions.Uniform(low, high, validate_args=False), 1)

    edges = TensorDictModule(Edges(), ["observation"], ["low", "high"])
    return ProbabilisticActor(edges, in_keys=["low", "high"], distribution_class=box)


def test_importance_ratios_need_a_behaviour_that_could_have_acted_so():
    data = load_offline_dataset(episodes(), batch_size=8)
    with pytest.raises(InputError, match="behaviour: it gives actions of the data a density of zero"):
        estimate_value(uniform(-1.1, 1.1), data, behaviour=uniform(0.5, 0.6), **SMALL)
    with pytest.raises(InputError, match="TensorDictModule has no density"):  # before an hour of fitting
        estimate_value(linear(OBSERVATION, ACTION), data, behaviour=uniform(-1.1, 1.1), warm_steps=10**9)


def test_a_policy_that_never_acts_like_the_data_is_judged_by_its_critics_alone():
    data, policy = load_offline_dataset(episodes(), batch_size=8), uniform(1.05, 1.1)
    fit = fit_fqe(policy, data, exploration_type=ExplorationType.RANDOM, **SMALL)
    terms = episode_terms(fit, policy, uniform(-1.1, 1.1))
    assert not terms.weight.any()
    torch.testing.assert_close(estimates_of_critics(terms), terms.initial.mean(1))


def test_returns_that_differ_by_rounding_have_the_scale_of_their_mean():
    """Their spread, 1e-8, would make rewards and values a hundred million times as large; their mean makes them 1."""
    rows = episodes(16, 1)
    rows[REWARD] = 0.1 + 7e-9 * (torch.arange(16).view(16, 1) % 2)
    assert rows[REWARD].std() > 0
    data = load_offline_dataset(rows.set(TERMINATED, torch.ones(16, 1, dtype=torch.bool)), batch_size=8)
    torch.testing.assert_close(fit_fqe(make_anchor(data), data, **SMALL).loss.reward_scale, torch.tensor(10.0))


def test_options_of_evaluation_that_give_no_interval():
    data = load_offline_dataset(episodes(), batch_size=8)
    with pytest.raises(InputError, match="draws=1: must be at least 2"):
        select_policy({"one": make_anchor(data)}, data, anchor=make_anchor(data), draws=1)
    with pytest.raises(InputError, match="qvalue_network: one critic; give a list"):
        fit_fqe(make_anchor(data), data, qvalue_network=critic())


def test_compiled_losses_and_actors_are_taken_as_before():
    data = make_toy_data()
    loss = make_spar_loss(data, hidden=[8], joint_vae=False)
    compiled, actor = torch.compile(loss, backend="eager"), torch.compile(loss.actor, backend="eager")
    found, expected = (with_anchor_actions(each, data)[:] for each in (compiled, loss))
    assert (found["anchor_action"] == expected["anchor_action"]).all()
    before = loss.actor_network_params["head"].data.clone()
    SPARUpdate(compiled, policy_interval=1)(data.sample())
    assert not (loss.actor_network_params["head"].data == before).all()
    guarded = GuardedActor(actor, fit_detector(data), loss.anchor)
    assert guarded(observation=data[:4]["observation"])[0].shape == data[:4]["action"].shape
    with pytest.raises(InputError, match="policy: a OptimizedModule; give an actor"):
        save_policy(compiled, "policy.pt")


def test_policies_in_a_module_dict_are_policies_by_name():
    data = make_toy_data()
    policies = nn.ModuleDict({name: make_anchor(data) for name in ("one", "other")})
    assert [*fit_fqe_each(policies, data, warm_steps=1, steps=1, slice_len=4, hidden=[4])] == ["one", "other"]
