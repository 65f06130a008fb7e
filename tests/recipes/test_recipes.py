"""The scripts as a user runs them: the smoke job end to end, and every wrong input ending in one line."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from helpers import RECIPES, SHARED, SMALL, TINY, assert_one_line, compose_recipe, run, run_fresh
from test_data import write

import torchrl_spar
from torchrl_spar import (
    BatchSampler,
    InputError,
    SPARUpdate,
    evaluate,
    load_policy,
    make_member,
    mean_actor,
    pretrain,
)
from torchrl_spar.training import health
from torchrl_spar.training.compiling import check_compiler

pytest.importorskip("hydra")
import compare
import gymnasium
import h5py
import spar_d4rl
from harness.environment import load
from harness.launch import check_seeds, check_sweeps
from harness.output import new_directory
from harness.run import versions
from omegaconf import OmegaConf
from PIL import Image

EMBEDDED = RECIPES / "data" / "torchrl-spar" / "hopper" / "medium-v0"
DATASET = "torchrl-spar-hopper-medium-v0"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("run")
    done = run("spar_d4rl", *SMALL, "seed=3", "out=result", "logger.backend=csv", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done, cwd


def test_main_job_leaves_everything_it_promises(finished):
    done, cwd = finished
    assert "Warning" not in done.stderr
    assert sorted(os.listdir(cwd)) == ["result"]
    out = cwd / "result"
    files = ["config.yaml", "evaluations.csv", "learning_curve.png", "metrics.csv", "policy.pt", "results.json"]
    assert sorted(os.listdir(out)) == files
    results = json.loads((out / "results.json").read_text())
    assert {"dataset", "env", "seed", "updates", "updates_per_second", "wall_seconds", "versions"} <= set(results)
    for name in ("anchor", "spar", "data"):
        assert set(results[name]) == {"return_mean", "return_std", "normalized"}
    assert (results["env"], results["seed"], results["updates"]) == ("Hopper-v5", 3, 4)
    assert results["method"] == "spar"
    assert set(results["critics_values"]) == {"anchor", "deployed"}
    assert [row["step"] for row in results["curve"]] == [0, 2, 4]
    assert results["versions"]["torch"] == torch.__version__
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert {(row["phase"], row["step"]) for row in rows} >= {
        ("anchor", "4"),
        ("vae", "4"),
        ("spar", "2"),
        ("spar", "4"),
    }
    first, second = (row for row in rows if row["phase"] == "spar")
    assert float(first["loss_qvalue"]) > 0 and float(first["loss_actor"]) > 0
    assert second["loss_qvalue"] == "" and float(second["loss_actor"]) > 0  # the critics have settled
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    for word in ("data", "anchor", "spar", f"{results['spar']['return_mean']:.1f}"):
        assert word in done.stdout


def test_in_line_evaluation_gives_the_same_run(finished, tmp_path):
    _, cwd = finished
    done = run("spar_d4rl", *TINY, "seed=3", "out=result", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, expected = (json.loads((path / "result" / "results.json").read_text()) for path in (cwd, tmp_path))
    for timing in ("updates_per_second", "wall_seconds"):
        assert found.pop(timing) > 0 and expected.pop(timing) > 0
    assert found == expected
    for name in ("metrics.csv", "evaluations.csv"):
        found, expected = ((path / "result" / name).read_text() for path in (cwd, tmp_path))
        assert found == expected
    results = json.loads((cwd / "result" / "results.json").read_text())
    rows = list(csv.DictReader((cwd / "result" / "evaluations.csv").open()))
    assert [{key: pytest.approx(float(value), rel=1e-5) for key, value in row.items()} for row in rows] == results[
        "curve"
    ]


def test_reported_return_is_the_saved_policys(finished):
    _, cwd = finished
    results = json.loads((cwd / "result" / "results.json").read_text())
    policy, facts = load_policy(cwd / "result" / "policy.pt")
    assert facts["env"] == "Hopper-v5"
    returns = evaluate(policy, "Hopper-v5", 2, seed=20_000 + 100_000 * 3)
    assert returns.mean().item() == pytest.approx(results["spar"]["return_mean"], rel=1e-6)


def test_data_return_is_the_data_sets(finished):
    _, cwd = finished
    results = json.loads((cwd / "result" / "results.json").read_text())
    with h5py.File(EMBEDDED / "data" / "main_data.hdf5") as file:
        returns = [file[name]["rewards"][()].astype(np.float64).sum() for name in file]
    assert results["data"]["return_mean"] == pytest.approx(np.mean(returns))
    assert results["data"]["return_std"] == pytest.approx(np.std(returns))


def test_evaluate_recipe(finished):
    _, cwd = finished
    done = run("evaluate", "policy=result/policy.pt", "episodes=2", "seed=320000", cwd=cwd)
    assert done.returncode == 0, done.stderr
    results = json.loads((cwd / "result" / "results.json").read_text())
    assert f"return {results['spar']['return_mean']:.1f}" in done.stdout


class Slideshow(gymnasium.Env):
    """Takes any action for 43 steps at 125 a second; frame n is n shades of grey."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 125}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode, self.now = render_mode, 0

    def reset(self, *, seed=None, options=None):
        self.now = 0
        return np.zeros(11), {}

    def step(self, action):
        self.now += 1
        return np.zeros(11), 0.0, self.now == 43, False, {}

    def render(self):
        return np.full((8, 8, 3), 5 * self.now, np.uint8)


def test_film_keeps_every_fourth_of_125_frames_a_second(finished, monkeypatch):
    _, cwd = finished
    monkeypatch.syspath_prepend(RECIPES)
    from evaluate import film

    gymnasium.register("Slideshow-v0", Slideshow)
    policy, _ = load_policy(cwd / "result" / "policy.pt")
    film(policy, "Slideshow-v0", 0, cwd / "slides.gif")
    with Image.open(cwd / "slides.gif") as video:
        found = [video.seek(i) or video.convert("RGB").getpixel((4, 4))[0] for i in range(video.n_frames)]
    assert found == pytest.approx([5 * n for n in range(1, 44, 4)], abs=2)
    assert not list(cwd.glob(".*.partial"))


def opengl_missing():
    """Why MuJoCo itself, without this package or Gymnasium, gets no OpenGL context here; empty if it does."""
    code = "import mujoco; mujoco.GLContext(8, 8).make_current()"
    environment = {**os.environ, "MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def test_video_of_a_mujoco_episode(finished, monkeypatch):
    reason = opengl_missing()
    if reason:
        pytest.skip(f"MuJoCo cannot render on this machine: {reason}")
    monkeypatch.delenv("DISPLAY", raising=False)  # without a screen EGL is the default
    _, cwd = finished
    options = ["policy=result/policy.pt", "episodes=1", "seed=5", "video=hopper.gif"]
    done = run_fresh("evaluate", *options, cwd=cwd)  # loads OpenGL anew
    assert done.returncode == 0, done.stderr
    lengths = []
    policy, _ = load_policy(cwd / "result" / "policy.pt")
    evaluate(policy, "Hopper-v5", 1, seed=5, on_step=lambda envs: lengths.append(1))
    with Image.open(cwd / "hopper.gif") as video:
        # Hopper makes 125 steps a second, about 30 of which are filmed.
        assert video.n_frames == -(-len(lengths) // 4)


def test_an_opengl_that_mujoco_cannot_load_is_named(tmp_path):
    done = run_fresh("evaluate", "policy=absent.pt", cwd=tmp_path, MUJOCO_GL="nonsense")
    assert_one_line(done, "MUJOCO_GL=nonsense", "unset it")


@pytest.mark.parametrize("video", ["result/policy.pt", "hopper.what", "nowhere/hopper.gif"])
def test_a_video_that_cannot_be_written_is_refused_at_once(finished, video):
    _, cwd = finished
    before = (cwd / "result" / "policy.pt").read_bytes()
    assert_one_line(run("evaluate", "policy=result/policy.pt", f"video={video}", cwd=cwd), f"video={video}")
    assert (cwd / "result" / "policy.pt").read_bytes() == before


def test_used_directory_is_never_overwritten(finished):
    _, cwd = finished
    before = {path.name: path.read_bytes() for path in (cwd / "result").iterdir()}
    done = run("spar_d4rl", *TINY, "out=result", cwd=cwd)
    assert_one_line(done, "out=result")
    assert {path.name: path.read_bytes() for path in (cwd / "result").iterdir()} == before


def steps(n=40, observation=11, action=3, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(n, observation)), "actions": rng.uniform(-1, 1, (n, action)),
        "rewards": rng.normal(size=n), "terminals": np.arange(n) % 10 == 9, "timeouts": np.zeros(n, bool),
    }  # fmt: skip
    return {key: value for key, value in {**arrays, **changes}.items() if value is not None}


BAD_DATA = {
    "missing key": (steps(rewards=None), ["rewards"]),
    "NaN": (
        steps(observations=np.where(np.arange(40)[:, None] == 7, np.nan, np.ones((40, 11)))),
        ["observations", "7"],
    ),
    "infinite reward": (steps(rewards=np.where(np.arange(40) == 5, np.inf, 1.0)), ["rewards", "5"]),
    "lengths": (steps(actions=np.zeros((39, 3)) + 0.1), ["actions", "39", "40"]),
    "observation size": (steps(observation=12), ["observations", "12", "11"]),
    "action size": (steps(action=2), ["actions", "2", "3"]),
    "bounds": (steps(actions=np.full((40, 3), 1.5)), ["actions", "bounds"]),
    "zeros": (steps(observations=np.zeros((40, 11))), ["observations", "zero"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_ends_in_one_line_and_writes_nothing(case, tmp_path):
    arrays, words = BAD_DATA[case]
    np.savez(tmp_path / "data.npz", **arrays)
    done = run("spar_d4rl", *TINY, "dataset=data.npz", "env=Hopper-v5", "out=result", cwd=tmp_path)
    assert_one_line(done, "data.npz", *words)
    assert os.listdir(tmp_path) == ["data.npz"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset=nowhere.hdf5"], ["nowhere.hdf5"]),
        (["env=NoSuchRobot-v0"], ["NoSuchRobot-v0"]),
        (["device=tpu9"], ["tpu9"]),
        (["spar.loss.kappa=-1"], ["kappa"]),
        (["anchor.lr=-1"], ["anchor.lr=-1: must be a number from 0 on"]),
        (["spar.loss.temperature=warm"], ["spar.loss.temperature=warm: must be a number"]),
        (["seed=1.5"], ["seed=1.5: must be a whole number"]),
        (["seed=-1"], ["seed=-1: must be a number from 0 on"]),
        (["+spar.loss.temprature=0.1"], ["spar.loss.temprature: no such option, did you mean spar.loss.temperature?"]),
        (["logger.backend=paper"], ["logger.backend"]),
        (["spar.loss.temprature=0.1"], ["spar.loss.temprature: no such option, did you mean spar.loss.temperature?"]),
        (["preset=d4lr"], ["preset/d4lr", "kitchen"]),
        (["spar.loss.lsi_coeff=0", "spar.loss.trust_coeff=0"], ["spar.loss.trust_coeff=0: must be positive"]),
        (["anchor=null"], ["anchor=None: must be names and values"]),
    ],
)
def test_wrong_options_end_in_one_line_and_write_nothing(overrides, words, tmp_path):
    done = run("spar_d4rl", *TINY, "out=result", *overrides, cwd=tmp_path)
    assert_one_line(done, *words)
    assert not (tmp_path / "result").exists()


def test_a_wrong_value_is_named_beside_commas(tmp_path):
    done = run("compare", *TINY, "seed=0,1", "eval.interval=null", cwd=tmp_path)
    assert_one_line(done, "eval.interval=None: must be a whole number")
    assert not os.listdir(tmp_path)


def test_a_set_that_cannot_be_downloaded_is_named(tmp_path):
    done = run("spar_d4rl", *TINY, "dataset=minari:no/such/set-v0", "out=result", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert_one_line(done, "no/such/set-v0", "download")
    assert not os.listdir(tmp_path)


def test_compile_without_a_compiler_is_named(tmp_path, monkeypatch):
    check_compiler.cache_clear()
    # An empty cache, for code that was compiled before needs no compiler.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("absent",))
    cfg = compose_recipe("spar_d4rl", *TINY, "device=cpu", "spar.compile=true", "out=x")
    with pytest.raises(InputError, match=r"compile=True: .*C\+\+ compiler"):
        spar_d4rl.train(cfg, [0], [tmp_path / "result"])
    assert not (tmp_path / "result").exists()


def test_every_preset_and_method_passes_the_checks():
    presets = [f"preset={path.stem}" for path in RECIPES.glob("config/preset/*.yaml")]
    methods = RECIPES.glob("config/method/**/*.yaml")
    methods = [f"method={path.relative_to(RECIPES / 'config' / 'method').with_suffix('')}" for path in methods]
    assert len(presets) > 4 and len(methods) > 20
    for recipe, choices in {"spar_d4rl": presets, "compare": methods}.items():
        for choice in choices:
            compose_recipe(recipe, choice)


@pytest.mark.parametrize("script", ["spar_d4rl", "evaluate", "make_dataset", "export"])
def test_unknown_option_is_named(script, tmp_path):
    done = run(script, "sede=1", cwd=tmp_path)
    assert_one_line(done, "sede: no such option" + (", did you mean seed?" if script != "export" else ""))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("compare", ["method=bc", "out=mine"], "out=mine: an option of spar_d4rl.py; here it is runs="),
        ("compare", ["method=spar", "spar.loss.head=latent"], "head=latent: that is method=spar_latent"),
        ("compare", ["method=spar", "+method.foo=1"], "method.foo: spar has no options of its own"),
        ("compare", ["seeds=[1]"], r"seeds=\[1\]: an option of spar_d4rl.py"),
        ("make_dataset", ["dataset=mine"], "dataset=mine: must be as maker/task/name-v0"),
        ("make_dataset", ["env=CartPole-v1"], "continuous actions"),
        ("make_dataset", ["env=Pendulum-v1"], "D4RL has no score for it"),
        ("inspect_dataset", ["figure=x.foo"], "figure=x.foo: must end in one of"),
    ],
)
def test_what_could_not_be_used_is_refused_before_any_work(recipe, options, words, tmp_path):
    if recipe == "make_dataset":
        options = ["dataset=mine/task/set-v0", f"root={tmp_path / 'data'}", *options]
    check = compare.check if recipe == "compare" else import_module(recipe).main
    with pytest.raises(InputError, match=words):
        check(compose_recipe(recipe, *options))


def test_several_values_of_an_option_need_directories_of_their_own(tmp_path):
    check_sweeps(["method=bc,spar", "seed=range(0,3)", "spar.loss.hidden=[8,8]"], compare.SWEEPS)
    check_sweeps(["spar.loss.kappa=0.5,1", "method.name=spar-${spar.loss.kappa}"], compare.SWEEPS)
    check_sweeps(["method=spar,iql", "method.name=x-${method.algorithm}"], compare.SWEEPS)
    with pytest.raises(InputError, match=r"method\.name=.*: all methods would have this name"):
        check_sweeps(["method=spar,iql", "seed=0,1", "method.name=x-${seed}"], compare.SWEEPS)
    with pytest.raises(InputError, match=r"spar\.updates: one value at a time"):
        both = ["spar.loss.kappa=0.5,1", "spar.updates=1,2", "method.name=spar-${spar.loss.kappa}"]
        check_sweeps(both, compare.SWEEPS)
    with pytest.raises(InputError, match=r"spar\.loss\.kappa: one value at a time.* commas are for dataset, method"):
        check_sweeps(["method=bc,spar", "spar.loss.kappa=0.5,1"], compare.SWEEPS)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file.x: cannot be made"):
        new_directory(tmp_path / "file" / "x")


def test_damaged_policy_is_named(tmp_path):
    (tmp_path / "policy.pt").write_bytes(b"nonsense")
    assert_one_line(run("evaluate", "policy=policy.pt", cwd=tmp_path), "policy.pt")
    assert_one_line(run("evaluate", "policy=absent.pt", cwd=tmp_path), "absent.pt")
    assert_one_line(run("evaluate", cwd=tmp_path), "policy=")


def test_make_dataset_writes_what_the_loader_reads(tmp_path):
    minari = pytest.importorskip("minari")
    options = ["steps=120", "level=-10", "level_episodes=2", "train.init_random_frames=100", "train.batch_size=8"]
    options += ["train.hidden=[8]", "train.updates_per_step=0.1", "root=sets", "dataset=toy/hopper/tiny-v0"]
    done = run("make_dataset", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dataset = minari.MinariDataset(tmp_path / "sets" / "toy" / "hopper" / "tiny-v0" / "data")
    facts = json.loads(dataset.storage.metadata["description"])
    returns = [episode.rewards.sum(dtype=np.float64) for episode in dataset.iterate_episodes()]
    assert facts["return_mean"] == pytest.approx(np.mean(returns)) and facts["seed"] == 0
    assert facts["command"].startswith("python recipes/make_dataset.py steps=120")
    assert dataset.total_steps >= 120
    actions = np.concatenate([episode.actions for episode in dataset.iterate_episodes()])
    assert (actions.min(0) < 0).all() and (actions.max(0) > 0).all() and np.abs(actions).max() <= 1
    again = run("make_dataset", *options, cwd=tmp_path)
    assert_one_line(again, "toy/hopper/tiny-v0")
    trained = run("spar_d4rl", *TINY, "dataset=sets/toy/hopper/tiny-v0", "batch_size=8", "out=result", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr


def run_on_the_door(path, cwd):
    """The main job on a D4RL file, checked against the file itself."""
    done = run("spar_d4rl", *TINY, f"dataset={path}", "env=AdroitHandDoor-v1", "out=r", cwd=cwd)
    assert done.returncode == 0, done.stderr
    results = json.loads((cwd / "r" / "results.json").read_text())
    with h5py.File(path) as file:
        ends = np.flatnonzero(file["timeouts"][()] | file["terminals"][()].astype(bool)) + 1
        returns = [part.sum() for part in np.split(file["rewards"][()].astype(np.float64), ends) if len(part)]
    assert results["data"]["return_mean"] == pytest.approx(np.mean(returns))
    low, high = -56.512833, 2880.5693  # D4RL's references for door
    for name in ("data", "anchor", "spar"):
        score = 100 * (results[name]["return_mean"] - low) / (high - low)
        assert results[name]["normalized"] == pytest.approx(score)
    rows = list(csv.DictReader((cwd / "r" / "metrics.csv").open()))
    assert all(np.isfinite(float(value)) for row in rows for name, value in row.items() if value and name != "phase")
    policy, _ = load_policy(cwd / "r" / "policy.pt")
    assert policy(observation=torch.zeros(1, 39)).shape == (1, 28)


def test_door_shaped_file_runs_end_to_end(tmp_path):
    index = np.arange(40)
    arrays = steps(observation=39, action=28, terminals=np.zeros(40, bool), timeouts=index % 10 == 9)
    run_on_the_door(write(tmp_path / "door.hdf5", arrays), tmp_path)


@pytest.mark.skipif(not (SHARED / "door-human.hdf5").exists(), reason="the real demonstrations are not at hand")
def test_door_demonstrations_run_end_to_end(tmp_path):
    run_on_the_door(SHARED / "door-human.hdf5", tmp_path)


def test_multirun_leaves_one_run_a_seed(tmp_path):
    done = run("spar_d4rl", "--multirun", *TINY, "seed=0,1", "out=runs/${seed}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seeds = [json.loads((tmp_path / "runs" / str(seed) / "results.json").read_text())["seed"] for seed in (0, 1)]
    assert seeds == [0, 1]


@pytest.mark.parametrize("stacked", [False, True])
def test_seeds_at_once_are_the_single_runs(finished, tmp_path, stacked):
    """On a CPU a process for each seed: the same bits. As one stack, what a GPU does: the same to round-off."""
    if stacked:  # the script's own function
        cfg = compose_recipe("spar_d4rl", *TINY, "out=many")
        spar_d4rl.train(cfg, [2, 3], [tmp_path / "many" / f"seed_{seed}" for seed in (2, 3)])
    else:
        done = run("spar_d4rl", *TINY, "seeds=[2,3]", "out=many", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "many")) == ["seed_2", "seed_3"]
    (_, cwd), out = finished, tmp_path / "many" / "seed_3"
    states = [load_policy(folder / "policy.pt")[0].state_dict() for folder in (cwd / "result", out)]
    torch.testing.assert_close(
        states[1], states[0], **(dict(rtol=1e-4, atol=1e-5) if stacked else dict(rtol=0, atol=0))
    )
    results = json.loads((out / "results.json").read_text())
    assert results["seed"] == 3 and "seed: 3\n" in (out / "config.yaml").read_text()
    if not stacked:
        assert results["curve"] == json.loads((cwd / "result" / "results.json").read_text())["curve"]


def test_seeds_whose_parameters_are_tied_train_one_after_the_other(tmp_path):
    """A stack would untie the decoder that head B and the VAE's own term share."""
    states = []
    for seeds in ([3], [2, 3]):
        cfg = compose_recipe("spar_d4rl", *TINY, "spar.loss.head=latent", "spar.loss.joint_vae=true", "out=x")
        outs = [tmp_path / f"{len(seeds)}_{seed}" for seed in seeds]
        spar_d4rl.train(cfg, seeds, outs)
        states.append(load_policy(outs[-1] / "policy.pt")[0].state_dict())
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_the_policy_is_the_mean_of_members_that_were_trained_alone(tmp_path):
    cfg = compose_recipe("spar_d4rl", *TINY, "spar.members=2", "out=x")
    spar_d4rl.train(cfg, [3], [tmp_path])
    data, updates = load(cfg, torch.device("cpu"))[0], cfg.spar.updates
    torch.manual_seed(3)
    first = pretrain(data, anchor=cfg.anchor, vae=cfg.vae, critics=cfg.critics, hidden=[8])
    members = {3: first, 2**32 + 3_001: make_member(*first, seed=2**32 + 3_001, critics=cfg.critics)}
    for seed, (loss, rows) in members.items():
        update = SPARUpdate(loss, decay_steps=updates)
        batches = BatchSampler(loss, rows, length=2, seed=seed)
        for _ in range(updates // 2):
            update.run(next(batches))
    policy, x = load_policy(tmp_path / "policy.pt")[0], data[:100]["observation"]
    one, other = (loss.actor for loss, _ in members.values())
    assert not torch.equal(one(observation=x), other(observation=x))
    assert torch.equal(policy(observation=x), mean_actor([one, other])(observation=x))
    assert json.loads((tmp_path / "results.json").read_text())["members"] == 2


def test_health_of_a_stack_is_that_of_the_single_run_at_the_same_step(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "SHIFT_INTERVAL", 2)
    shifts = {}
    for name, seeds in {"one": [3], "many": [2, 3]}.items():
        cfg = compose_recipe("spar_d4rl", *TINY, f"out={name}")
        spar_d4rl.train(cfg, seeds, [tmp_path / name / f"seed_{seed}" for seed in seeds])
        rows = csv.DictReader((tmp_path / name / "seed_3" / "metrics.csv").open())
        shifts[name] = [float(row["coherent_shift"]) for row in rows if row["coherent_shift"]]
    assert len({*shifts["one"]}) == 2  # it moves from one to the other
    assert shifts["many"] == pytest.approx(shifts["one"], rel=1e-4)


def test_wrong_seeds_end_in_one_line(tmp_path):
    assert_one_line(run("spar_d4rl", *TINY, "seeds=3", "out=x", cwd=tmp_path), "seeds=3")
    final = "eval.final_episodes=0"
    assert_one_line(run("spar_d4rl", *TINY, final, "out=x", cwd=tmp_path), final)
    assert_one_line(run("spar_d4rl", *TINY, "spar.loss.candidate_dtype=half2", "out=x", cwd=tmp_path), "half2")


@pytest.mark.parametrize("seeds", ["[]", "[1,1]", "[0,-2]"])
def test_a_list_of_seeds_that_is_none_is_named(seeds):
    with pytest.raises(InputError, match=r"seeds=.*: must be a list of different whole numbers from 0 on"):
        check_seeds(OmegaConf.create(f"seeds: {seeds}"))


def test_seeds_pass():
    for options in ({}, {"seeds": None}, {"seeds": [0, 7]}):
        check_seeds(OmegaConf.create(options))


def report(folder, cwd):
    return run("report", folder, cwd=cwd)


def test_report_tells_how_it_is_used(tmp_path):
    for flag in ("--help", "-h"):
        done = report(flag, tmp_path)
        assert done.returncode == 0 and "python recipes/report.py" in done.stdout and not done.stderr


def test_report_gives_mean_and_spread_over_seeds(tmp_path):
    for seed, score in ((0, 10.0), (1, 30.0)):
        row = {"normalized": score}
        facts = {"dataset": "toy", "env": "Hopper-v5", "seed": seed, "data": row, "anchor": row, "spar": row}
        facts |= {"updates": 1, "episodes": 2, "curve": [{"step": 1, **row}]}
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "results.json").write_text(json.dumps(facts))
    spread = "20.0 +- 14.1 (10.0 / 30.0)"
    assert report(tmp_path, tmp_path).stdout.splitlines()[-1] == f"| toy | 0, 1 | 20.0 | {spread} | {spread} |"
    (tmp_path / "drift.json").write_text(json.dumps({"claim": "drift", "findings": []}))
    assert report(tmp_path, tmp_path).stdout.splitlines()[-1].startswith("| toy | 0, 1 |")
    (tmp_path / "1" / "results.json").write_text("{")
    assert_one_line(report(tmp_path, tmp_path), "results.json")
    (tmp_path / "empty").mkdir()
    assert_one_line(report(tmp_path / "empty", tmp_path), "empty")
    assert_one_line(report(tmp_path / "nowhere", tmp_path), "nowhere: no such folder or table")


def test_a_package_that_is_on_the_path_alone_has_a_version(monkeypatch):
    def version(name):
        if name == "torchrl-spar":
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr("harness.run.version", version)
    assert versions()["torchrl-spar"] == torchrl_spar.__version__ and versions()["torch"] == "1.2"
