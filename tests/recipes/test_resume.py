"""Runs that end before their end and go on, against the same runs undisturbed; and what they say when they cannot."""

from __future__ import annotations

import csv
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_test
import pytest
from harness import checkpoints, scores
from harness import directory as sweep
from harness.checkpoints import Checkpoints
from harness.stopping import Stopped, stop
from helpers import Started, run
from kill_test import DATA, TINY, outcome, start_run

from torchrl_spar import InputError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


# No environment.
LOGS = ("env=none", "ope.steps=3", "ope.warm_steps=3")


class Killed(BaseException):
    pass


def count_steps(monkeypatch, do):
    """Has `do(number, checkpoints)` called after every step of the runs, whose checkpoints never are due."""
    number = 0

    def step(self, real=Checkpoints.step):
        nonlocal number
        self.due = float("inf")
        real(self)
        number += 1
        do(number, self)

    monkeypatch.setattr(Checkpoints, "step", step)


def save_and_die_every(n):
    def do(number, checkpoints):
        if number % n == 0:
            checkpoints.save()
            raise Killed

    return do


def start_until_it_ends(*args):
    """How often it was begun."""
    for times in range(1, 100):
        try:
            start_run(*args)
        except Killed:
            continue
        return times


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("spar", ["spar.members=2", "spar.loss.joint_vae=true", "spar.loss.value_mix=0.5", "keep_policies=2"]),
        ("spar", ["spar.loss.head=latent", "spar.updates=9", "eval.interval=5", "logger.interval=1"]),
        ("stack", ["spar.members=2"]),
        ("bc", []),
        ("td3_bc", []),
        ("td3_bc_critics", []),
        ("cql", []),
        ("spar_iql", []),
        ("ablation/no_anchor", []),
        ("spar", [*LOGS]),
        ("stack", [*LOGS, "select=ope"]),
        ("bc", [*LOGS]),
    ],
)
def test_a_run_that_goes_on_is_the_undisturbed_one(method, options, tmp_path, monkeypatch):
    start_run(method, tmp_path / "undisturbed", *options)
    # The steps of all phases, the last and the first of each included in one run or the other.
    steps = {"bc": 3, "td3_bc": 3, "td3_bc_critics": 5, "cql": 3, "stack": 23}.get(method, 11)
    count_steps(monkeypatch, save_and_die_every(steps))
    assert start_until_it_ends(method, tmp_path / "stopped", *options) > 2
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "undisturbed")


def test_evaluations_that_were_not_done_are_done_again(tmp_path, monkeypatch):
    start_run("spar", tmp_path / "undisturbed")
    left = 9

    def evaluate(*args, real=scores.evaluate, **kwargs):
        nonlocal left
        left -= 1
        if left % 2 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        return real(*args, **kwargs)

    monkeypatch.setattr(scores, "evaluate", evaluate)
    times = 0
    while not (tmp_path / "stopped" / "results.json").exists():
        times += 1
        try:
            start_run("spar", tmp_path / "stopped")
        except Stopped:
            stop.signum = None  # as in a new process
    assert times > 2
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "undisturbed")


def test_a_fresh_process_gives_the_same_bits(tmp_path):
    code = "import sys, pathlib, kill_test; kill_test.start_run('spar', pathlib.Path(sys.argv[1]), sys.argv[2])"
    paths = os.pathsep.join([str(Path(kill_test.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "fresh"), f"dataset={DATA}"], env=environment, check=True
    )
    start_run("spar", tmp_path / "here")
    assert outcome(tmp_path / "fresh") == outcome(tmp_path / "here")


def rows(out, phase):
    path = out / "metrics.csv"
    return sum(row["phase"] == phase for row in csv.DictReader(path.open())) if path.exists() else 0


def end_by(signum, started, condition):
    """What a run says that ends by a signal once the condition holds."""
    try:
        started.until(condition)
        # From a terminal every process gets Ctrl-C, from a scheduler the first alone its signal.
        (os.killpg if signum == signal.SIGINT else os.kill)(started.process.pid, signum)
    finally:
        done = started.wait(60)
    output = done.stdout + done.stderr
    assert done.returncode == 128 + signum, output
    assert "Traceback" not in output and output.count("stopped by") == 1
    hint = f"stopped by {signum.name}: the same command with resume=true out=stopped resumes it"
    assert done.stderr.rstrip().endswith(hint)


def test_sigterm_ends_a_run_in_one_line_and_it_goes_on(tmp_path):
    options = ["seed=3", "anchor.steps=300", "eval.background=true", "out=stopped"]
    start_run("spar", tmp_path / "undisturbed", "anchor.steps=300")
    started = Started("spar_d4rl", *TINY, *options, cwd=tmp_path)
    end_by(signal.SIGTERM, started, lambda: rows(tmp_path / "stopped", "anchor") > 2)
    done = run("spar_d4rl", *TINY, *options, "resume=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "undisturbed")


def test_ctrl_c_ends_several_seeds_in_one_line_and_they_go_on(tmp_path):
    outs = {seed: tmp_path / "stopped" / f"seed_{seed}" for seed in (3, 4)}
    started = Started("spar_d4rl", *TINY, "seeds=[3,4]", "vae.steps=300", "out=stopped", cwd=tmp_path)
    end_by(signal.SIGINT, started, lambda: all(rows(out, "vae") > 2 for out in outs.values()))
    for seed, out in outs.items():
        assert (
            checkpoints.all_checkpoints(out) or (out / "results.json").exists()
        )  # one may be done before the other begins
        start_run("spar", out, "vae.steps=300", seed=seed)
        start_run("spar", tmp_path / "undisturbed" / out.name, "vae.steps=300", seed=seed)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "undisturbed")


def test_resume_begins_goes_on_and_leaves_what_is_finished(tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    start_run("spar", out)  # with an empty directory it begins
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    start_run("spar", out)
    assert capsys.readouterr().out == f"{out}: finished before\n"
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(InputError, match=r"out=.*run: exists and is not empty; resume=true resumes"):
        start_run("spar", out, "resume=false")
    with pytest.raises(InputError, match=r"run: of a run with other options \(anchor\.lr, critics\.steps\)"):
        start_run("spar", out, "anchor.lr=1", "critics.steps=7")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match="mine: exists and is not a run's directory"):
        start_run("spar", tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    with pytest.raises(InputError, match=r"thesis\.tex.*cannot be used"):
        start_run("spar", tmp_path / "mine" / "thesis.tex")


def test_a_finished_run_of_before_an_option_is_one_with_what_it_did(tmp_path, capsys):
    out = tmp_path / "run"
    start_run("spar", out, "spar.members=1")
    config = (out / "config.yaml").read_text()
    for line in ("  members: 1\n", "keep_policies: 1\n"):
        assert config.count(line) == 1
        config = config.replace(line, "")
    (out / "config.yaml").write_text(config)
    capsys.readouterr()
    start_run("spar", out, "spar.members=1")
    assert capsys.readouterr().out == f"{out}: finished before\n"
    for option, name in (("spar.members=3", r"spar\.members"), ("keep_policies=2", "keep_policies")):
        with pytest.raises(InputError, match=rf"other options \({name}\)"):
            start_run("spar", out, option)


def test_a_checkpoint_with_parts_that_nobody_knows_is_refused(tmp_path, monkeypatch):
    """As one of another version: its run would go on with new parts in their place."""

    def rename(number, checkpoints):
        if "position" in checkpoints.parts:
            checkpoints.parts["momentum"] = checkpoints.parts.pop("update 0")
            checkpoints.save()
            raise Killed

    with monkeypatch.context() as patch:
        count_steps(patch, rename)
        with pytest.raises(Killed):
            start_run("spar", tmp_path)
    with pytest.raises(InputError, match=r"checkpoint-.*: holds momentum, which this version"):
        start_run("spar", tmp_path)


def test_two_runs_on_one_directory(tmp_path, monkeypatch):
    out, said = tmp_path / "run", []

    def second(number, checkpoints):
        if number == 3:
            with pytest.raises(InputError, match="run: another process is at it") as caught:
                start_run("spar", out)
            said.append(str(caught.value))

    with monkeypatch.context() as patch:
        count_steps(patch, second)
        start_run("spar", out)
    assert len(said) == 1
    start_run("spar", tmp_path / "alone")
    assert outcome(out) == outcome(tmp_path / "alone")


def test_a_run_goes_on_after_its_disk_was_full(tmp_path, monkeypatch):
    start_run("spar", tmp_path / "undisturbed")
    out = tmp_path / "run"

    def fill(number, checkpoints):
        if number == 15:
            checkpoints.save()
        if number == 17:
            (log,) = (part for name, part in checkpoints.parts.items() if name.endswith(": log"))
            os.dup2(os.open("/dev/full", os.O_WRONLY), log.file.fileno())

    with monkeypatch.context() as patch:
        count_steps(patch, fill)
        with pytest.raises(InputError, match=r"metrics\.csv: cannot be written: No space left on device"):
            start_run("spar", out)
    start_run("spar", out)
    assert outcome(out) == outcome(tmp_path / "undisturbed")


def test_a_run_whose_rows_are_lost_does_not_go_on(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        count_steps(patch, save_and_die_every(15))
        start_run("spar", out)
    for lose in (lambda path: os.truncate(path, 10), Path.unlink):
        lose(out / "metrics.csv")
        with pytest.raises(InputError, match=r"metrics\.csv"):
            start_run("spar", out)


def test_a_damaged_checkpoint_costs_the_way_from_the_one_before(tmp_path, monkeypatch):
    start_run("spar", tmp_path / "undisturbed")
    out = tmp_path / "run"

    def do(number, checkpoints):
        if number in (14, 26):
            checkpoints.save()
        if number == 29:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        count_steps(patch, do)
        start_run("spar", out)
    path = out / checkpoints.NAME / "checkpoint-000000000002" / "components" / "0000-run" / "state.tdz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="checkpoint-000000000002: damaged"):
        start_run("spar", out)
    assert outcome(out) == outcome(tmp_path / "undisturbed")


def test_killed_runs_of_compare_go_on(tmp_path):
    options = [
        "method=iql",
        "seed=3",
        "spar.updates=400",
        "checkpoint.seconds=0.2",
        "runs=runs",
        "hydra/launcher=basic",
    ]
    start_run("iql", tmp_path / "undisturbed", "spar.updates=400")
    out = sweep.run_directory(tmp_path / "runs", str(DATA), "iql", 3)
    started = Started("compare", *TINY, *options, cwd=tmp_path)
    try:
        started.until(lambda: list(out.glob("checkpoints/checkpoint-*")))
    finally:
        started.kill()
    assert checkpoints.all_checkpoints(out) and not (out / "results.json").exists()
    start_run("iql", out, "spar.updates=400")
    assert outcome(out) == outcome(tmp_path / "undisturbed")


def test_a_vanished_directory_ends_a_run_and_is_not_made_anew(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def do(number, checkpoints):
        if number == 15:
            shutil.rmtree(out)
            checkpoints.save()

    count_steps(monkeypatch, do)
    with pytest.raises(InputError, match=f"{out}.*the directory is gone"):
        start_run("spar", out)
    assert not out.exists()


def test_a_function_sent_to_another_process_finds_that_processes_stop():
    assert pickle.loads(pickle.dumps(stop)) is stop
