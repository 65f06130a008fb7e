"""Exported policies give the policy's own actions where neither this package nor TorchRL can be imported."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from helpers import OBSERVATION, build_loss, compose_recipe, run
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded

from torchrl_spar import InputError, load_policy, make_anchor, mean_actor, save_policy

pytest.importorskip("hydra")
import export
from harness.sensor_faults import shares_of_faults

HEADS = ("residual", "latent")
LOC, SCALE = torch.linspace(-3, 3, OBSERVATION), torch.linspace(0.2, 2, OBSERVATION)
BATCHES = (1, 7)
BLOCK = "import sys; sys.modules.update(dict.fromkeys(['torchrl', 'tensordict', 'torchrl_spar'{}]))\n"
LOOP = """
import numpy as np
inputs = np.load("observations.npz")
for head in {heads}:
{load}
    np.savez(head + "{suffix}.npz", **{{name: np.asarray({call}) for name, x in inputs.items()}})
"""
PT2 = BLOCK.format("") + LOOP.format(
    heads=HEADS, suffix="-pt2",
    load="    import torch; policy = torch.export.load(head + '/policy.pt2').module()",
    call="policy(torch.from_numpy(x))",
)  # fmt: skip
ONNX = BLOCK.format(", 'torch'") + LOOP.format(
    heads=HEADS, suffix="-onnx",
    load="    import onnxruntime; session = onnxruntime.InferenceSession(head + '/policy.onnx')",
    call="session.run(['action'], {'observation': x})[0]",
)  # fmt: skip


def observations() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    found = {}
    for rows in BATCHES:
        noise = generator.normal(size=(rows, OBSERVATION)).astype(np.float32)
        cases = {"typical": LOC.numpy() + SCALE.numpy() * noise, "zero": 0 * noise, "tiny": 1e-30 * noise}
        cases |= {"far": 1e6 * noise, "farthest": 1e20 * noise}
        for name, value in (("nan", np.nan), ("infinite", np.inf)):
            cases[name] = noise.copy()
            cases[name][-1, 2] = value
        found |= {f"{name} {rows}": value for name, value in cases.items()}
    return found


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """Both heads' policies, exported, and their own actions; the first by the script as a user runs it."""
    for package in export.NEEDED["onnx"]:
        pytest.importorskip(package, reason=f"ONNX needs {package}")
    folder = tmp_path_factory.mktemp("deployed")
    inputs = observations()
    np.savez(folder / "observations.npz", **inputs)
    expected = {}
    for head in HEADS:
        save_policy(build_loss(head=head, observation_stats=(LOC, SCALE)), folder / f"{head}.pt")
        policy, _ = load_policy(folder / f"{head}.pt")
        with torch.no_grad():
            expected[head] = {name: policy(observation=torch.from_numpy(x)).numpy() for name, x in inputs.items()}
    done = run("export", "policy=residual.pt", "out=residual", cwd=folder)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert all(name in done.stdout for name in ("policy itself", "policy.pt2", "policy.onnx", "ms"))
    export.main(compose_recipe("export", f"policy={folder / 'latent.pt'}", f"out={folder / 'latent'}"))
    return folder, expected


@pytest.mark.parametrize(("suffix", "code"), [("pt2", PT2), ("onnx", ONNX)])
def test_the_same_actions_without_torchrl(deployed, suffix, code):
    folder, expected = deployed
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for head in HEADS:
        written = sorted(path.name for path in (folder / head).iterdir())
        assert written == ["export.json", "policy.onnx", "policy.pt2"]
        found = np.load(folder / f"{head}-{suffix}.npz")
        for name, action in expected[head].items():
            assert found[name].dtype == np.float32
            np.testing.assert_allclose(found[name], action, rtol=0, atol=1e-6, err_msg=f"{head} {name}")
            assert np.isnan(found[name][-1]).all() == name.startswith(("nan", "infinite"))
    typical = expected["latent"]["typical 7"]
    assert np.abs(typical - expected["residual"]["typical 7"]).max() > 1e-2 and np.ptp(typical, 0).min() > 1e-2


def test_checksums_tie_the_files_to_the_policy(deployed, tmp_path, monkeypatch, capsys):
    """That of policy.pt is on the page to sign."""
    folder, _ = deployed
    found = json.loads((folder / "residual" / "export.json").read_text())
    paths = [folder / "residual.pt", *((folder / "residual" / name) for name in ("policy.onnx", "policy.pt2"))]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert found == {"policy": {"residual.pt": digests.pop("residual.pt")}, "files": digests}
    # Networks of your own with their own weights have no file.
    monkeypatch.setattr(export, "load_actor", lambda cfg: (numpy_policy(torch.tanh), {}, "mine"))
    export.main(compose_recipe("export", f"out={tmp_path / 'out'}", "formats=[pt2]", "observation_dim=3"))
    digest = hashlib.sha256((tmp_path / "out" / "policy.pt2").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == {"policy": {}, "files": {"policy.pt2": digest}}
    assert f"{digest}  policy.pt2" in capsys.readouterr().out


def write_log(path, size=OBSERVATION, episodes=40, length=50):
    """D4RL's arrays, each sensor but the first two a sum of those."""
    generator = np.random.default_rng(1)
    rows = episodes * length
    observation = generator.normal(size=(rows, 2)) @ generator.normal(size=(2, size))
    observation += 0.1 * generator.normal(size=(rows, size))
    ends = np.arange(rows) % length == length - 1
    np.savez(
        path, observations=observation.astype(np.float32), actions=generator.uniform(-1, 1, (rows, 3)),
        next_observations=np.roll(observation, -1, 0).astype(np.float32), rewards=np.zeros(rows), terminals=ends,
    )  # fmt: skip
    return torch.from_numpy(observation).float()


def test_the_guard_decides_alike_in_all_files(tmp_path, monkeypatch, capsys):
    for package in export.NEEDED["onnx"]:
        pytest.importorskip(package, reason=f"ONNX needs {package}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "TIMED_CALLS", 5)
    seen = write_log("log.npz")
    actor = build_loss(observation_stats=(seen.mean(0), seen.std(0))).actor
    save_policy(actor, "policy.pt", env=None, log={"dataset": "log.npz", "gamma": 0.99})
    cfg = compose_recipe("export", "policy=policy.pt", "out=out", "guard=0.99")
    export.main(cfg)
    printed = capsys.readouterr().out
    assert "of the 2000 observations in log.npz" in printed and "policy.onnx" in printed
    shifted = seen.clone()
    shifted[:, 3] += 3 * seen[:, 3].std()  # a sensor with an offset
    rows = torch.cat([seen, shifted, torch.full((1, OBSERVATION), 1e20), torch.full((1, OBSERVATION), torch.nan)])
    with torch.no_grad():
        readable = torch.where(rows.abs() < 1e19, rows, seen.mean(0))  # else no measurement
        own, anchor = actor(observation=rows), actor.anchor(observation=readable)
    decisions = []
    for name, act in export.load(tmp_path / "out", cfg.formats, 1).items():
        action, fallback = act(rows)
        assert fallback.dtype == torch.bool and fallback.shape == rows.shape[:1], name
        inside, caught = fallback[: len(seen)].float().mean(), fallback[len(seen) : -2].float().mean()
        assert 0.001 < inside < 0.03 and caught > 0.95 and fallback[-2:].all(), (name, inside, caught)
        expected = torch.where(fallback.unsqueeze(1), anchor, own)
        torch.testing.assert_close(action, expected, rtol=0, atol=1e-6, equal_nan=True)
        decisions.append(fallback)
    # Another fit to the same data, without files.
    norm = export.norm_of(actor, None, "policy=policy.pt")
    policy, _ = export.guarded(cfg, actor, {"log": {"dataset": "log.npz"}}, norm, "policy=policy.pt")
    with torch.no_grad():
        found, fallback = policy(observation=rows)
    assert len(decisions) == 2 and all(torch.equal(fallback, other) for other in decisions)
    torch.testing.assert_close(found, action, rtol=0, atol=1e-6, equal_nan=True)


@pytest.fixture
def guarded_mean(tmp_path, monkeypatch):
    """The mean of three members, its log, and options that export it with a guard."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "TIMED_CALLS", 5)
    seen = write_log("log.npz")
    options = {"observation_stats": (seen.mean(0), seen.std(0)), "hidden": [128, 128]}
    anchor = make_anchor(OBSERVATION, Bounded(-1, 1, (3,)), **options)
    actor = mean_actor([build_loss(seed, anchor=anchor, **options).actor for seed in range(3)])
    save_policy(actor, "policy.pt", env=None, log={"dataset": "log.npz"})
    return actor, seen, ["policy=policy.pt", "out=out", "guard=0.99"]


def test_the_mean_of_three_with_a_guard_is_compared_where_either_acts(guarded_mean, tmp_path):
    for package in export.NEEDED["onnx"]:
        pytest.importorskip(package, reason=f"ONNX needs {package}")
    actor, seen, options = guarded_mean
    cfg = compose_recipe("export", *options)
    export.main(cfg)
    norm = export.norm_of(actor, None, "policy=policy.pt")
    policy, observation = export.guarded(cfg, actor, {"log": {"dataset": "log.npz"}}, norm, "policy=policy.pt")
    assert all((seen == row).all(1).any() for row in observation[:1000])
    calls = export.load(tmp_path / "out", cfg.formats, 1)
    table = export.compare(policy, observation, calls)
    titles = [f"the {who} acts in 1000 rows: off by" for who in ("policy", "anchor")]
    assert [column.header for column in table.columns[2:]] == titles
    with torch.no_grad():
        own, anchor = (each(observation=observation) for each in (actor, actor.anchor))
    assert (own - anchor).abs().amax(1).median() > 1e-2
    for act in calls.values():
        action, fallback = act(observation)
        assert not fallback[:1000].any() and fallback[1000:].all()
        torch.testing.assert_close(action, torch.cat([own[:1000], anchor[1000:]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", ["policy", "anchor"])
def test_a_file_that_is_wrong_where_one_of_them_acts_is_not_left(wrong, guarded_mean, tmp_path, monkeypatch):
    def load(*args, real=export.load):
        def act(observation, inner):
            action, fallback = inner(observation)
            return action + 0.01 * (fallback == (wrong == "anchor")).unsqueeze(1), fallback

        return {name: partial(act, inner=inner) for name, inner in real(*args).items()}

    monkeypatch.setattr(export, "load", load)
    with pytest.raises(InputError, match=r"policy\.pt2: its outputs are off by 1\.0e-02"):
        export.main(compose_recipe("export", *guarded_mean[2], "formats=[pt2]"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.npz", "policy.pt"]


def test_a_guard_needs_an_anchor_and_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    actor = build_loss().actor
    save_policy(actor, "policy.pt", env=None)
    write_log("small.npz", size=OBSERVATION - 1)
    for options, message in (
        ([], "guard=0.9.*does not say how its data is read; give dataset="),
        (["dataset=absent.npz"], "absent.npz"),
        (["dataset=small.npz"], "observations have size 4, the policy's have 5"),
        (["guard=1.5"], "guard=1.5"),
        (["guard=null", "dataset=small.npz"], "dataset=small.npz: read only for a guard"),
    ):
        with pytest.raises(InputError, match=message):
            options = ["policy=policy.pt", "formats=[pt2]", "guard=0.9", *options]
            export.main(compose_recipe("export", "out=out", *options))
    monkeypatch.setattr(export, "load_actor", lambda cfg: (actor.anchor, {}, "policy=policy.pt"))
    with pytest.raises(InputError, match=r"guard=0\.9: .*no anchor to fall back to"):
        export.main(compose_recipe("export", "out=out", "policy=policy.pt", "formats=[pt2]", "guard=0.9"))
    assert not (tmp_path / "out").exists()


def test_pt2_alone_needs_no_onnx(tmp_path, monkeypatch):
    save_policy(build_loss(), tmp_path / "policy.pt")
    options = [f"policy={tmp_path / 'policy.pt'}", f"out={tmp_path / 'out'}"]
    monkeypatch.setattr(export, "find_spec", lambda package: None)
    with pytest.raises(InputError, match=r"onnx needs onnx, onnxscript.*\[export\].*formats=\[pt2\]"):
        export.main(compose_recipe("export", *options))
    export.main(compose_recipe("export", *options, "formats=[pt2]"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "policy.pt2"]


def numpy_policy(function, kind=torch.float32):
    """A policy without parameters of its own but for its type."""

    class Body(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("gain", torch.ones((), dtype=kind))

        def forward(self, observation):
            return function(observation[..., :2] * self.gain)

    return TensorDictModule(Body(), ["observation"], ["action"])


@pytest.mark.parametrize("function", [torch.rand_like, lambda x: x / 0 * 0], ids=["random", "not finite"])
def test_a_file_that_does_not_give_the_policys_actions_is_not_left(function, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_actor", lambda cfg: (numpy_policy(function), {}, "mine"))
    with pytest.raises(InputError, match="the policy is random, or its actions not finite"):
        export.main(compose_recipe("export", f"out={tmp_path / 'out'}", "formats=[pt2]", "observation_dim=3"))
    assert not list(tmp_path.iterdir())


def test_networks_of_your_own_keep_their_type(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_actor", lambda cfg: (numpy_policy(torch.tanh, torch.float64), {}, "mine"))
    export.main(compose_recipe("export", f"out={tmp_path / 'out'}", "formats=[pt2]", "observation_dim=3"))
    rows = torch.rand(4, 3, dtype=torch.float64)
    assert torch.equal(export.load(tmp_path / "out", ["pt2"], 1)["policy.pt2"](rows), rows[:, :2].tanh())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policy=absent.pt"], "absent.pt: no such policy"),
        (["policy=policy.pt", "out=used"], "out=used: exists and is not empty"),
        (["policy=policy.pt", "formats=[tflite]"], "'tflite' is none of pt2, onnx"),
        (["policy=policy.pt", "formats=[]"], "at least one"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_written(overrides, message, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda package: True)
    monkeypatch.chdir(tmp_path)
    save_policy(build_loss(), tmp_path / "policy.pt")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "policy.pt2").write_text("mine")
    with pytest.raises(InputError, match=message):
        export.main(compose_recipe("export", "out=new", *overrides))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.pt", "used"]
    assert (tmp_path / "used" / "policy.pt2").read_text() == "mine"


def test_the_shares_of_wrong_sensors_are_those_of_a_calculation():
    ramp = torch.linspace(0, 1, 2_001)
    order = torch.randperm(len(ramp), generator=torch.Generator().manual_seed(0))
    shares = shares_of_faults(lambda x: (x > 1).any(-1), torch.stack([ramp, ramp[order]], 1), torch.full((2,), 0.1))
    above = 0.1 / math.sqrt(2 * math.pi)  # of one sensor that noise of 0.1 takes beyond 1: E[max(noise, 0)]
    expected = [0.3, 0.5, 0, 0, 1 - (1 - above) ** 2]
    assert [*shares.values()] == pytest.approx(expected, abs=0.015)
    # Two sensors that always agree: what moves one of them shows, what exchanges them does not.
    shares = shares_of_faults(lambda x: x[:, 0] != x[:, 1], torch.stack([ramp, ramp], 1), torch.full((2,), 0.1))
    assert [*shares.values()] == pytest.approx([1, 1, 0, 1, 1], abs=0.002)
    # Not all at once: a detector's distances take memory. One sensor has no other to be exchanged with.
    sizes = []
    one = shares_of_faults(lambda x: sizes.append(len(x)) or x[:, 0] > 2, ramp.unsqueeze(1), torch.ones(1))
    assert max(sizes) <= 1_000 and list(one) == [fault for fault in shares if "swapped" not in fault]
