"""NaN and infinity stop a training where they were put; critics and residuals beyond their bounds are named."""

from __future__ import annotations

import warnings

import pytest
import torch
from harness.checkpoints import Checkpoints
from helpers import ACTION, OBSERVATION, buffer_of, make_batch
from kill_test import start_run
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.data import Bounded

from torchrl_spar import (
    HealthCheck,
    NonFiniteError,
    SPARUpdate,
    StackedSPARLoss,
    check_finite,
    fit_anchor,
    fit_critics,
    fit_vae,
    load_offline_dataset,
    make_anchor,
    make_spar_loss,
)  # fmt: skip
from torchrl_spar.training import health

NAN, INF = float("nan"), float("inf")


def test_finite_numbers_pass():
    check_finite(1, {"loss_a": torch.tensor([1.0, -3e38])}, {"loss_a": [torch.zeros(2), torch.tensor([3e38])]})


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_the_loss_or_else_the_parameter_is_named(bad):
    losses = {"loss_a": torch.tensor(1.0), "loss_b": torch.tensor([1.0, bad])}
    with pytest.raises(NonFiniteError, match=r"^step 7: NaN or infinity in loss_b; lower the learning rate"):
        check_finite(7, losses, {"loss_b": [torch.tensor(bad)]})
    parameters = {"loss_a": [torch.zeros(2)], "loss_b": [torch.zeros(2), torch.tensor([[0.0, bad]])]}
    with pytest.raises(NonFiniteError, match=r"^step 7: NaN or infinity in a parameter of loss_b"):
        check_finite(7, {"loss_a": torch.tensor(1.0)}, parameters)


def train(update, steps, spoil=lambda step, batch: None, stack=False):
    batch = make_batch(8)
    if stack:
        batch = torch.stack([batch, batch])
        batch["action_noise"] = torch.randn(2, 8, ACTION)
        batch["candidate_noise"] = torch.randn(2, 8, 7, 2 * ACTION)
    for step in range(1, steps + 1):
        fresh = batch.clone()
        spoil(step, fresh)
        update(fresh)


def spoil_reward(step, batch):
    if step == 137:
        batch["next", "reward"].view(-1)[-1] = INF  # of the last seed of a stack


@pytest.mark.parametrize("stack", [False, True])
def test_one_infinite_reward_stops_the_updates_within_a_hundred(make_loss, stack):
    losses = [make_loss(seed, hidden=[8], joint_vae=False) for seed in range(2)]
    update = SPARUpdate(StackedSPARLoss(losses) if stack else losses[0])
    with pytest.raises(NonFiniteError, match=r"^step 200: NaN or infinity in loss_qvalue, loss_actor;"):
        train(update, 300, spoil_reward, stack)
    assert update.steps == 200


def test_an_infinite_parameter_that_no_loss_sees_stops_them_too(make_loss):
    loss = make_loss(hidden=[8])
    update = SPARUpdate(loss, policy_interval=1000)  # vae_loss, which alone reads the encoder, is not called

    def spoil(step, batch):
        if step == 50:
            next(loss.residual_vae_params.parameters()).data.view(-1)[0] = INF

    with pytest.raises(NonFiniteError, match=r"^step 100: NaN or infinity in a parameter of loss_vae"):
        train(update, 300, spoil)


def test_updates_do_not_wait_for_the_device_but_in_the_check(make_loss):
    class CountWaits(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.waits += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    update = SPARUpdate(make_loss(hidden=[8]))
    with CountWaits() as count:
        torch.ones(()).item()  # it counts
        train(update, 99)
    assert count.waits == 1


@pytest.mark.parametrize("fit", ["anchor", "residual", "value"])
def test_fits_stop_within_a_hundred_steps(fit):
    rows = make_batch(32)
    key = {"anchor": "action", "residual": "action", "value": ("next", "reward")}[fit]
    rows[key][5] = NAN
    buffer = buffer_of(rows)
    spec = Bounded(-1, 1, (ACTION,))
    steps, name = {"anchor": (250, "loss_bc"), "residual": (130, "loss_vae"), "value": (250, "loss_qvalue")}[fit]
    seen = []

    def report(step, metrics):
        seen.append(step)

    with pytest.raises(NonFiniteError, match=rf"^step 100: NaN or infinity in {name}"):
        if fit == "anchor":
            fit_anchor(make_anchor(OBSERVATION, spec, hidden=[8]), buffer, steps=steps, report=report)
        else:
            loss = make_spar_loss(OBSERVATION, spec, hidden=[8])
            {"residual": fit_vae, "value": fit_critics}[fit](loss, buffer, steps=steps, report=report)
    assert seen[-1] == 99


def checked(reward=(0.0, 2.0), gamma=0.9, scale=0.5):
    rows = make_batch(32)
    rows["next", "reward"] = torch.linspace(*reward, 32).unsqueeze(-1)
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8], gamma=gamma, reward_scale=scale)
    return HealthCheck(loss, load_offline_dataset(rows, batch_size=8))


@pytest.mark.parametrize(
    ("reward", "expected"), [((0.0, 2.0), (0, 10)), ((-1.0, 2.0), (-5, 10)), ((-2.0, -1.0), (-10, 0))]
)
def test_values_lie_between_the_sums_of_the_worst_and_the_best_reward(reward, expected):
    assert checked(reward).value_range == pytest.approx(expected)


def warned(check, values, key="pred_value"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, value in enumerate(values):
            check(100 * step, {key: torch.tensor(value)})
    return [str(warning.message) for warning in caught]


def test_divergence_warns_once_when_it_lasts():
    assert warned(checked(), [9.0] * 20 + [12.0] * 4 + [9.0] + [12.0] * 4) == []
    (text,) = warned(checked(), [12.0] * 20)
    assert "step 400" in text and "12" in text and "[0, 10]" in text and "qvalue_lr" in text
    assert warned(checked(), [-2.0] * 20)
    assert warned(checked((0.0, 0.0)), [0.05] * 20) == []


def test_residual_collapse_warns_once_when_it_lasts():
    assert warned(checked(), [0.5] * 20 + [0.8] * 4, "residual_ratio") == []
    (text,) = warned(checked(), [0.8] * 20, "residual_ratio")
    assert "trust_coeff" in text and "0.80" in text


@pytest.mark.parametrize(
    ("key", "good", "bad"), [("pred_value", 9.0, 12.0), ("pred_value", 9.0, -2.0), ("residual_ratio", 0.1, 0.9)]
)
def test_the_member_that_fails_is_named_though_the_mean_of_all_is_healthy(key, good, bad):
    (text,) = warned(checked(), [[good, good, bad]] * 20, key)
    assert " of member 2 " in text
    assert warned(checked(), [[good, good, good]] * 20 + [[bad, good, good]] * 3 + [[good, bad, good]] * 3, key) == []


def test_metrics_may_come_later_and_be_plain_numbers():
    check = checked()
    assert check(100, {}) == check(200, {"pred_value": 1.0}) == check(300, {"residual_ratio": torch.tensor(0.1)}) == {}


@pytest.mark.parametrize(
    ("steps", "measured"),
    [
        (range(100, 6001, 100), [2000, 4000, 6000]),
        (range(64, 6500, 64), [2048, 4032, 6016]),
        (range(3100, 4301, 100), [4000]),  # resumed
        ([2000], [2000]),
    ],
)
def test_the_shift_is_measured_every_two_thousand_steps_whenever_it_is_called(steps, measured):
    check = checked()
    check._shift = lambda: torch.tensor(1.0)
    assert [step for step in steps if "coherent_shift" in check(step, {})] == measured


def test_a_run_warns_by_its_logged_rows(tmp_path, monkeypatch):
    # Any residual is too much: the eight logged rows of this run all say so, five are enough.
    monkeypatch.setattr(health, "RESIDUAL_RATIO_LIMIT", -1.0)
    with pytest.warns(UserWarning, match="at step 10 its residual is .* raise trust_coeff") as caught:
        start_run("spar", tmp_path / "run")
    assert sum("trust_coeff" in str(warning.message) for warning in caught) == 1


@pytest.mark.slow
def test_real_divergence_is_found(make_loss):
    loss = make_loss(hidden=[8], bound="lcb", kappa=0.0, reward_scale=1.0, gamma=0.9, joint_vae=False)
    loss.value_estimator.gamma.fill_(1.2)  # a target that grows without bound; make_value_estimator refuses it
    rows = make_batch(64)
    rows["next", "reward"] = torch.ones(64, 1)
    rows["next", "terminated"] = rows["next", "done"] = torch.zeros(64, 1, dtype=torch.bool)
    check = HealthCheck(make_loss(hidden=[8], gamma=0.9), load_offline_dataset(rows, batch_size=64))
    update = SPARUpdate(loss, qvalue_lr=1e-2, target_rate=0.5)
    with pytest.warns(UserWarning, match="the critics diverge"):
        for step in range(1, 801):
            metrics = update(rows)
            if step % 20 == 0:
                check(step, metrics)


def test_no_checkpoint_is_made_of_nan(tmp_path):
    net = torch.nn.Linear(2, 2)
    saver = Checkpoints(tmp_path, 0, {})
    saver.add("seed 0: net", net)
    saver.save()
    net.bias.data[1] = NAN
    with pytest.raises(NonFiniteError, match="in seed 0: net: bias, so no checkpoint"):
        saver.save()
    net.bias.data[1] = 1.0
    assert Checkpoints(tmp_path, 0, {}).number == 1
    saver.save()
    assert Checkpoints(tmp_path, 0, {}).number == 2


@pytest.mark.parametrize("method", ["spar", "td3_bc"])
def test_a_run_names_its_last_good_checkpoint(method, tmp_path):
    # Critics that overflow at once: SPAR's after its fits, a checkpoint after each step; TD3+BC has nothing before.
    change = {"spar": "spar.qvalue_lr=1e30", "td3_bc": "method.qvalue_lr=1e30"}[method]
    with pytest.raises(NonFiniteError, match="NaN or infinity") as caught:
        start_run(method, tmp_path / "run", change, "checkpoint.seconds=0")
    saved = sorted((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    way_back = f"the last good checkpoint is {saved[-1]}" if method == "spar" else "there is no checkpoint yet"
    assert str(caught.value).endswith(f"; {way_back}")
