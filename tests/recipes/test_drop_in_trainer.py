"""SPARLoss in TorchRL's Trainer: a plain loop's parameters, resumption bit by bit, the script as a user runs it."""

from __future__ import annotations

import csv
import math
import os
import re
import shutil

import pytest
import torch
from helpers import compose_recipe, make_batch, run, total

from torchrl_spar import InputError, evaluate, load_policy, with_anchor_actions, with_member_weights, with_value_targets

pytest.importorskip("hydra")
pytest.importorskip("gymnasium")
pytest.importorskip("h5py")
import drop_in_trainer
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

SMALL = ["anchor.steps=5", "vae.steps=5", "critics.steps=5", "loss.hidden=[8]"]
SMALL += ["trainer.updates=12", "trainer.round=3", "trainer.log_interval=2", "trainer.save_interval=2", "episodes=2"]


def options(out, *more):
    return compose_recipe("drop_in_trainer", *SMALL, f"out={out}", *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("run")
    done = run("drop_in_trainer", *SMALL, "out=result", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done, cwd / "result"


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_trainer_makes_the_updates_of_a_plain_loop(share, make_loss, tmp_path):
    found, expected = make_loss(), make_loss()
    before = make_loss().state_dict()
    rows = TensorDictReplayBuffer(storage=LazyTensorStorage(32), batch_size=16)
    rows.extend(make_batch(32))
    cfg = options(tmp_path, "trainer.updates=6").trainer

    torch.manual_seed(1)
    drop_in_trainer.make_trainer(found, rows, cfg, tmp_path, episode_share=share).train()

    torch.manual_seed(1)
    rows = with_member_weights(expected, with_anchor_actions(expected, rows), share=share, seed=1)
    assert rows[:]["member_weight"].max() == 1 / share
    optimizer = torch.optim.Adam(expected.parameters(), lr=cfg.lr)
    names = ("actor_network", "qvalue_network")
    for name in names:  # SoftUpdate begins with equal parameters
        expected.target_params(name).data.copy_(expected.network_params(name).data)
    for step in range(6):
        if step % cfg.round == 0:
            rows = with_value_targets(expected, rows)
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 + math.cos(math.pi * step / 6)) / 2
        total(expected(rows.sample())).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name in names:
            expected.target_params(name).data.lerp_(expected.network_params(name).data, cfg.target_rate)

    state = found.state_dict()
    torch.testing.assert_close(state, expected.state_dict(), rtol=1e-5, atol=1e-7)
    for name, _ in found.named_parameters():
        if "residual_vae" not in name:
            assert not torch.equal(state[name], before[name]), name


def test_the_trainer_keeps_no_graph(make_loss, tmp_path):
    rows = TensorDictReplayBuffer(storage=LazyTensorStorage(32), batch_size=16)
    rows.extend(make_batch(32))
    trainer = drop_in_trainer.make_trainer(make_loss(), rows, options(tmp_path, "trainer.updates=3").trainer, tmp_path)
    trainer.train()
    logged = [value for values in trainer._log_dict.values() for value in values if isinstance(value, torch.Tensor)]
    assert logged and not any(value.requires_grad for value in logged)


def test_script_leaves_logs_checkpoints_and_a_policy(finished):
    done, out = finished
    assert "Warning" not in done.stderr and "12/12" in done.stderr
    assert sorted(os.listdir(out)) == ["checkpoints", "config.yaml", "log", "policy.pt"]
    assert sorted(os.listdir(out / "checkpoints")) == [f"checkpoint-{step:012d}" for step in (9, 12)]
    logged = {path.stem: list(csv.reader(path.open())) for path in (out / "log" / "scalars").iterdir()}
    for name in ("loss_qvalue", "loss_actor", "residual_ratio", "grad_norm"):
        assert [int(step) for step, _ in logged[name]] == [3, 6, 9, 12], name
        assert all(math.isfinite(float(value)) for _, value in logged[name])


def test_printed_return_is_the_saved_policys(finished):
    done, out = finished
    policy, facts = load_policy(out / "policy.pt")
    assert (facts["env"], facts["seed"]) == ("Hopper-v5", 0)
    expected = evaluate(policy, "Hopper-v5", 2, seed=20_000).mean().item()
    printed = dict(re.findall(r"^(\w+): return (\S+)", done.stdout, re.M))
    assert printed.keys() == {"anchor", "spar"} and printed["spar"] == f"{expected:.1f}"


def test_resume_gives_the_undisturbed_runs_bits(finished, tmp_path, capsys):
    _, out = finished
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / f"checkpoint-{12:012d}")
    (tmp_path / "out" / "policy.pt").unlink()
    drop_in_trainer.main(options(tmp_path / "out", "resume=true"))
    assert "anchor:" not in capsys.readouterr().err  # nothing is trained again
    found, expected = (load_policy(path / "policy.pt")[0].state_dict() for path in (tmp_path / "out", out))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_does_not_go_on_with_other_rows_and_logs_nothing_twice(finished, tmp_path, monkeypatch):
    _, out = finished
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / f"checkpoint-{12:012d}")
    monkeypatch.setattr("harness.same_rows._digest", lambda data: "another")
    with pytest.raises(InputError, match="holds other rows"):
        drop_in_trainer.main(options(tmp_path / "out", "resume=true"))
    monkeypatch.undo()
    drop_in_trainer.main(options(tmp_path / "out", "resume=true"))
    for log in (out / "log" / "scalars").glob("loss_*.csv"):
        assert (tmp_path / "out" / "log" / "scalars" / log.name).read_text() == log.read_text()


def test_a_finished_run_trains_no_further(finished, tmp_path):
    _, out = finished
    shutil.copytree(out, tmp_path / "out")
    drop_in_trainer.main(options(tmp_path / "out", "resume=true"))
    found, expected = (load_policy(path / "policy.pt")[0].state_dict() for path in (tmp_path / "out", out))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "option, message",
    [
        ("resume=false", "exists and is not empty"),
        ("trainer.round=5", "trainer.updates=12: must be a multiple of trainer.round=5"),
        ("trainer.round=0", "trainer.round=0: must be a number from 1 on"),
        ("loss.hidden=[9]", r"of a run with other options \(loss\.hidden\)"),
        ("seed=1", r"of a run with other options \(seed\)"),
        ("dataset=other.npz", r"of a run with other options \(dataset\)"),
    ],
)
def test_wrong_options_end_in_one_error(finished, option, message):
    _, out = finished
    with pytest.raises(InputError, match=message):
        drop_in_trainer.main(options(out, "resume=true", option))


def test_an_unknown_option_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match=r"loss\.kapa: no such option, did you mean loss\.kappa\?"):
        drop_in_trainer.main(options(tmp_path / "out", "+loss.kapa=1"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_ends_in_one_error(finished, tmp_path):
    _, out = finished
    shutil.copytree(out, tmp_path / "out")
    for path in (tmp_path / "out" / "checkpoints" / f"checkpoint-{12:012d}").rglob("*.memmap"):
        path.write_bytes(path.read_bytes()[:1])
    with pytest.raises(InputError, match="cannot be loaded"):
        drop_in_trainer.main(options(tmp_path / "out", "resume=true"))
