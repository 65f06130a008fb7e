"""D4RL in one command, on made-up files of D4RL's names and shapes."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
from helpers import RECIPES, TINY, Started, assert_one_line, run

pytest.importorskip("hydra")
import h5py
import reproduce_d4rl as reproduce
from reproduce_d4rl import PAPER, all_tasks, chosen, source

from torchrl_spar import InputError

# A process that saves for a second when it is stopped.
SAVING = """
import pathlib, signal, sys, time

def save(*_):
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit(130)

for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, save)
pathlib.Path("ready").touch()
time.sleep(60)
"""
SHAPES = {"hopper_medium-v2.hdf5": (11, 3), "hopper_medium_replay-v2.hdf5": (11, 3), "pen-human-v1.hdf5": (45, 24)}


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name, (observations, actions) in SHAPES.items():
        n = 60
        with h5py.File(tmp_path / name, "w") as file:
            file["observations"] = random.normal(size=(n, observations)).astype(np.float32)
            file["actions"] = random.uniform(-1, 1, (n, actions)).astype(np.float32)
            file["rewards"] = random.normal(size=n).astype(np.float32)
            file["terminals"] = np.zeros(n, bool)
            file["timeouts"] = np.arange(n) % 20 == 19
    return tmp_path


def test_tasks_are_d4rls_with_their_environments(folder):
    tasks = {task.name: task for task in all_tasks()}
    assert len(tasks) == 9 + 6 + 8 and PAPER.keys() <= tasks.keys()
    assert source(tasks["hopper-medium-replay"], folder) == (str(folder / "hopper_medium_replay-v2.hdf5"), "Hopper-v4")
    assert source(tasks["pen-human"], folder) == (str(folder / "pen-human-v1.hdf5"), "AdroitHandPen-v1")
    assert source(tasks["pen-cloned"], folder) == ("minari:D4RL/pen/cloned-v2", "null")
    assert source(tasks["antmaze-umaze-diverse"], None) == ("minari:D4RL/antmaze/umaze-diverse-v1", "null")
    assert [task.name for task in chosen("walker2d-medium,antmaze")][:2] == ["walker2d-medium", "antmaze-umaze"]
    with pytest.raises(InputError, match=r"walker2d-medium needs a folder with D4RL's walker2d_medium-v2\.hdf5"):
        source(tasks["walker2d-medium"], folder)
    with pytest.raises(InputError, match="tasks=hopper: must be of locomotion, halfcheetah-medium"):
        chosen("hopper,locomotion")


def test_each_family_is_one_sweep_and_the_table_shows_what_is_finished(folder, monkeypatch, capsys):
    commands = []

    def run(command):
        commands.append(command[2:])
        return 0

    monkeypatch.setattr(reproduce, "run_to_its_end", run)
    monkeypatch.setenv("COMPARE_RUNS_LEFT", "{}")
    runs = folder / "runs"
    for seed, score in ((0, 80.0), (1, 100.0)):
        out = reproduce.run_directory(runs, str(folder / "hopper_medium_replay-v2.hdf5"), "spar", seed)
        out.mkdir(parents=True)
        (out / "results.json").write_text(json.dumps({"spar": {"normalized": score}, "wall_seconds": 7_200}))
        (out / "config.yaml").write_text("{}")
    tasks = "tasks=hopper-medium,hopper-medium-replay,pen-human"
    options = [f"files={folder}", tasks, "method=spar,iql", "seed=0,1", f"runs={runs}", "spar.updates=7"]
    assert reproduce.main(options) == 0
    files = [f"'{folder / name}'" for name in SHAPES]
    shared = ["method=spar,iql", "seed=0,1"]
    last = [f"runs='{runs}'", "spar.updates=7"]
    assert commands == [
        [f"dataset={files[0]},{files[1]}", *shared, "env=Hopper-v4", "preset=d4rl", *last],
        [f"dataset={files[2]}", *shared, "env=AdroitHandPen-v1", "preset=[d4rl,adroit]", *last],
    ]
    printed = capsys.readouterr().out
    assert "In all: 10 runs to do, 2 finished." in printed
    assert "| task | SPAR (paper) | SPAR (head A), here | IQL, here |" in printed
    assert "| hopper-medium-replay | 101.9 | 90.0 +- 14.1 (2) | - |" in printed
    assert "| pen-human | 62.7 | - | - |" in printed


def test_the_whole_way_on_made_up_data(folder):
    small = [option for option in TINY if not option.startswith("preset")]
    small += ["eval.episodes=1", "eval.final_episodes=1", "critics.steps=5", "batch_size=8", "logger.interval=2"]
    options = [f"files={folder}", "tasks=hopper-medium", "method=bc", "seed=0", "runs=runs", *small]
    done = run("reproduce_d4rl", *options, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "In all: 1 runs to do, 0 finished." in done.stdout and done.stdout.splitlines()[-1].startswith(
        "| hopper-medium | - | "
    )
    (results,) = folder.glob("runs/*/bc/seed0/results.json")
    found = json.loads(results.read_text())
    assert found["env"] == "Hopper-v4" and found["steps"]["evaluation"] == 1000 and found["updates"] == 4
    assert done.stdout.splitlines()[-1] == f"| hopper-medium | - | {found['policy']['normalized']:.1f} (1) |"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("dataset=embedded", "dataset=embedded: the task sets it"),
        ("preset=smoke", "preset=smoke: the task sets it"),
        ("files=nowhere", "files=.*nowhere: no such folder"),
        ("seed=0,0", "seed=0,0: must be different whole numbers"),
        ("pen-human", "pen-human: options are given as name=value"),
        ("seed=range(2)", "must be different whole numbers"),
    ],
)
def test_what_would_train_something_else_is_refused(option, message):
    with pytest.raises(InputError, match=message):
        reproduce.main(["tasks=pen-human", option])


def test_an_unknown_option_is_named_before_files_are_looked_for():
    done = run("reproduce_d4rl", "tsks=pen-human", cwd=RECIPES)
    assert_one_line(done, "tsks: no such option, did you mean tasks?")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_what_the_child_saves(signum, tmp_path):
    code = "import sys; from reproduce_d4rl import run_to_its_end as run; "
    (tmp_path / "parent.py").write_text(f"{code}sys.exit(run([sys.executable, '-c', {SAVING!r}]))")
    parent = Started(tmp_path / "parent.py", cwd=tmp_path)
    parent.until((tmp_path / "ready").exists)
    send = os.killpg if signum == signal.SIGINT else os.kill  # Ctrl-C reaches the child, too
    send(parent.process.pid, signum)
    assert parent.wait(60).returncode == 130 and (tmp_path / "saved").exists()
