"""TorchRL's buffers, masks, transforms and losses around the package: nothing is lost or changed on the way."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from helpers import buffer_of
from tensordict import LazyStackedTensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import LazyStackStorage, LazyTensorStorage, ListStorage
from torchrl.envs.transforms import ObservationNorm, RewardScaling
from torchrl.modules import MLP, MultiAgentMLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import BCLoss, IQLLoss

from torchrl_spar import (
    BatchSampler,
    FrozenAnchor,
    GaussianEncoder,
    InputError,
    ResidualHead,
    ResidualVAE,
    SPARActor,
    SPARLoss,
    SPARUpdate,
    estimate_value,
    fit_anchor,
    fit_critics,
    load_offline_dataset,
    make_anchor,
    make_spar_loss,
    make_toy_data,
    measure_residual_scale,
    pretrain,
    save_policy,
    share_critics,
    with_anchor_actions,
    with_member_weights,
    with_value_targets,
)
from torchrl_spar.data.returns import episode_ends
from torchrl_spar.training.sampling import ends_of

STEPS = 6
TOY = make_toy_data(episodes=16, steps=STEPS, batch_size=96)
ROWS = TOY[:].clone().exclude("index")
REWARD = ("next", "reward")


def loss_of(seed=0, **options) -> SPARLoss:
    torch.manual_seed(seed)
    return make_spar_loss(TOY, hidden=[8], joint_vae=False, **options)


def halving() -> RewardScaling:
    return RewardScaling(0.0, 0.5, in_keys=[REWARD])


def test_whole_reads_leave_the_rows_of_a_transformed_buffer_alone():
    data = load_offline_dataset(ROWS, action_spec=TOY.action_spec, transform=halving())
    scaled = ROWS.clone()
    scaled[REWARD] = scaled[REWARD] / 2
    expected = estimate_value(None, load_offline_dataset(scaled, action_spec=TOY.action_spec)).mean
    assert [estimate_value(None, data).mean for _ in range(3)] == [expected] * 3
    pretrain(data, anchor={"steps": 1}, vae={"steps": 1}, critics={"steps": 1})
    sampled = data.sample()
    assert torch.equal(sampled[REWARD], scaled[REWARD][sampled["index"]])
    assert torch.equal(data.storage[:][REWARD], ROWS[REWARD])
    plain = buffer_of(ROWS, ListStorage(96), transform=halving())
    for buffer in (data, plain):
        for _ in range(2):
            block = next(BatchSampler(loss_of(), buffer, length=1, seed=0))
            assert set(block[REWARD].unique().tolist()) <= set(scaled[REWARD].unique().tolist())
    sequences = buffer_of(ROWS.reshape(16, STEPS), LazyTensorStorage(96, ndim=2), transform=halving())
    scales = [fit_critics(loss_of(), buffer, steps=0).reward_scale for buffer in (plain, sequences, sequences)]
    assert scales[0] == scales[1] == scales[2]
    with pytest.raises(InputError, match="LazyStackStorage"):
        fit_critics(loss_of(), buffer_of(ROWS, LazyStackStorage(96), transform=halving()), steps=1)


@pytest.mark.parametrize("key", ["mask", ("collector", "mask")])
def test_padding_is_not_cloned(key):
    valid = torch.arange(96) % STEPS < 3
    padded = ROWS.clone().set(key, valid)
    padded["action"][~valid] = -1.0
    anchor, seen = make_anchor(TOY, hidden=[8]), []
    expected = BCLoss(anchor)(ROWS[valid])["loss_bc"].detach()
    for batch in (padded, padded.reshape(16, STEPS)):
        reading = buffer_of(batch, transform=lambda rows: rows)
        reading.sample = lambda batch=batch: batch  # every row once
        fit_anchor(anchor, reading, steps=1, lr=0.0, report=lambda step, metrics: seen.append(metrics["loss_bc"]))
    torch.testing.assert_close(torch.stack(seen), expected.expand(2))


def test_a_mask_of_another_name_counts_in_the_functions_of_data_too():
    valid = torch.arange(96) % STEPS < 4
    padded = ROWS.clone()
    padded[REWARD][~valid], padded["action"][~valid] = 1e3, -1.0
    named, usual = loss_of(), loss_of()
    named.loss_mask_key = "valid"
    ours, known = buffer_of(padded.clone().set("valid", valid)), buffer_of(padded.clone().set("mask", valid))
    for function in (measure_residual_scale, lambda loss, data: fit_critics(loss, data, steps=0).reward_scale):
        assert torch.equal(function(named, ours), function(usual, known))
    assert "valid" in next(BatchSampler(named, ours, length=1, seed=0)).keys()
    with pytest.raises(InputError, match="without a mask"):
        with_value_targets(named, ours)


def test_what_a_loss_may_read_reaches_its_batches():
    loss = loss_of()
    weighted = with_member_weights(loss, TOY)
    extra = weighted[:].copy().set("priority_weight", torch.rand(96, 1)).set("value_target", torch.rand(96, 1))
    for data in (with_anchor_actions(loss, buffer_of(extra)), buffer_of(extra)):
        batch = next(BatchSampler(loss, data, length=1, seed=0, target_interval=None))[0]
        for key in ("member_weight", "priority_weight", "value_target"):
            source = {tuple(row.tolist()): value for row, value in zip(extra["observation"], extra[key], strict=True)}
            found = torch.stack([source[tuple(row.tolist())] for row in batch["observation"]])
            assert torch.equal(batch[key], found), key


def test_blocks_of_sequences_give_the_losses_of_their_rows():
    loss = loss_of()
    sampler = BatchSampler(loss, buffer_of(ROWS.reshape(16, STEPS), LazyTensorStorage(96, ndim=2), 4), length=2, seed=0)
    batch = next(sampler)[1]
    assert batch.shape == (4, STEPS)
    for key, value in loss(batch.reshape(-1)).items():
        torch.testing.assert_close(loss(batch)[key], value, msg=key)
    SPARUpdate(loss).run(next(sampler))


def test_statistics_are_of_what_a_transform_gives():
    shift = ObservationNorm(loc=-5.0, scale=2.0, in_keys=["observation", ("next", "observation")])  # 2 x - 5
    data = load_offline_dataset(ROWS, action_spec=TOY.action_spec, transform=shift)
    torch.testing.assert_close(data.observation_loc, 2 * TOY.observation_loc - 5)
    torch.testing.assert_close(data.observation_scale, 2 * TOY.observation_scale)


def test_what_pre_training_returns_is_a_data_set_again():
    few = {"steps": 1}
    loss, rows = pretrain(TOY, anchor=few, vae=few, critics=few)
    for name in ("name", "env_id", "env_kwargs", "reward_shift", "longest_episode", "action_spec"):
        assert getattr(rows, name) == getattr(TOY, name), name
    for name in ("observation_loc", "observation_scale", "source_rows", "episode_returns"):
        assert torch.equal(getattr(rows, name), getattr(TOY, name)), name
    assert estimate_value(None, rows).mean == estimate_value(None, TOY).mean
    make_spar_loss(rows, hidden=[8], anchor=loss.anchor)


def test_a_copied_update_would_train_the_first_loss():
    with pytest.raises(InputError, match="copy the loss"):
        deepcopy(SPARUpdate(loss_of()))


def reading_state() -> SPARLoss:
    """A loss of own networks that read ``"state"``."""
    torch.manual_seed(0)
    state = ["state", "anchor_action"]
    anchor = TensorDictModule(nn.Sequential(MLP(3, 2), nn.Tanh()), ["state"], ["action"])
    encoder = TensorDictModule(GaussianEncoder(MLP(7, 8)), [*state, "residual"], ["latent_loc", "latent_log_std"])
    vae = ResidualVAE(encoder, TensorDictModule(MLP(9, 2), [*state, "latent"], ["residual"]))
    actor = SPARActor(anchor, ResidualHead(MLP(5, 2), state), action_spec=TOY.action_spec)
    critics = [ValueOperator(MLP(5, 1), in_keys=["state", "action"]) for _ in range(4)]
    return SPARLoss(actor, critics, vae, joint_vae=False)


@pytest.mark.parametrize(
    "function",
    [
        with_value_targets,
        with_member_weights,
        lambda loss, data: fit_critics(loss, data, steps=1),
        lambda loss, data: BatchSampler(loss, data, length=1, seed=0),
    ],
)
def test_shuffled_rows_are_refused_whatever_the_observation_is_called(function):
    rows = ROWS.exclude("episode").copy()
    rows.rename_key_("observation", "state")
    rows["next"].rename_key_("observation", "state")
    function(reading_state(), buffer_of(rows))
    with pytest.raises(InputError, match="shuffled or interleaved"):
        function(reading_state(), buffer_of(rows[torch.randperm(96, generator=torch.Generator().manual_seed(0))]))


def test_a_sampler_that_resumes_asks_the_loaded_anchor():
    before, after = loss_of(0), loss_of(1)
    first, second = (BatchSampler(loss, TOY, length=3, seed=0) for loss in (before, after))
    next(first)
    after.load_state_dict(before.state_dict())
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(next(second), next(first), rtol=0, atol=0)


def test_entries_of_several_shapes_that_nobody_reads_are_left_alone():
    rows = [row.set("extra", torch.zeros(1 + i % 3)) for i, row in enumerate(ROWS.clone().unbind(0))]
    loss, data = loss_of(), buffer_of(LazyStackedTensorDict(*rows), LazyStackStorage(96))
    found, expected = (with_anchor_actions(loss, source)[:]["anchor_action"] for source in (data, buffer_of(ROWS)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["observation", "place"])
def test_an_entry_that_changes_regularly_does_not_hide_disorder(name):
    rows = ROWS.exclude("episode").clone()
    expected = episode_ends(rows)
    time = torch.arange(96.0).remainder(STEPS)[:, None]
    rows["time"], rows["next", "time"] = time, (time + 1).remainder(STEPS)
    if name != "observation":
        rows.rename_key_("observation", name)
        rows["next"].rename_key_("observation", name)
    read = SimpleNamespace(tensor_keys=loss_of().tensor_keys, in_keys=["time", name, "action"])
    assert torch.equal(ends_of(read, rows), expected)
    with pytest.raises(InputError, match="shuffled or interleaved"):
        ends_of(read, rows[torch.randperm(96, generator=torch.Generator().manual_seed(0))])


def test_each_draw_of_a_lazy_stack_has_its_own_noise():
    loss, data = loss_of(), buffer_of(ROWS, LazyStackStorage(96))
    found, expected = BatchSampler(loss, data, length=5, seed=0), BatchSampler(loss, buffer_of(ROWS), length=5, seed=0)
    blocks = [next(found) for _ in range(2)]
    for block in blocks:
        other = next(expected)
        assert torch.equal(block["candidate_noise"], other["candidate_noise"])
        assert torch.equal(block["action"], other["action"])


@pytest.mark.parametrize("placeholder", [torch.zeros(96), torch.zeros(1, 1).expand(96, 1), torch.zeros(96, 1).long()])
def test_targets_replace_placeholders_of_another_kind(placeholder):
    loss = loss_of()
    expected = with_value_targets(loss, with_anchor_actions(loss, TOY))[:]
    data = buffer_of(with_anchor_actions(loss, TOY)[:].copy().set("advantage_std", placeholder))
    found = with_value_targets(loss, data)[:]
    for key in ("value_target", "advantage_std"):
        torch.testing.assert_close(found[key], expected[key])


def test_priorities_of_a_sharing_loss_are_in_the_callers_batch():
    spar = loss_of()
    body = nn.Sequential(MLP(3, 4, num_cells=[8]), NormalParamExtractor())
    gaussian = TensorDictModule(body, ["observation"], ["loc", "scale"])
    likely = ProbabilisticActor(gaussian, in_keys=["loc", "scale"], distribution_class=TanhNormal)
    critics, value = (
        [deepcopy(spar.qvalue_network) for _ in range(4)],
        ValueOperator(MLP(3, 1), in_keys=["observation"]),
    )
    iql = share_critics(spar, IQLLoss(likely, critics, value, num_qvalue_nets=4, deactivate_vmap=True))
    batch = ROWS[:8].clone()
    before = batch[REWARD].clone()
    iql(batch)
    assert batch["td_error"].shape[0] == 8 and torch.equal(batch[REWARD], before)


def test_weights_of_several_networks_in_one_are_no_anchor():
    net = MultiAgentMLP(3, 2, n_agents=2, centralised=True, share_params=False, num_cells=[4], depth=1)
    with pytest.raises(InputError, match="TensorDictParams"):
        FrozenAnchor(TensorDictModule(net, ["observation"], ["action"]))


class Counting(nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


def test_a_state_that_is_no_tensor_is_named(tmp_path):
    policy = TensorDictModule(Counting(3, 2), ["observation"], ["action"])
    with pytest.raises(InputError, match=r"_extra_state', a dict; only tensors"):
        save_policy(policy, tmp_path / "policy.pt")
    assert not list(tmp_path.iterdir())
