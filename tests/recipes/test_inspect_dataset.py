"""inspect_dataset.py as a user and a CI job run it: what it prints, draws and returns."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import run


def inspect(path, *options):
    done = run("inspect_dataset", f"dataset={path}", "env=Pendulum-v1", *options, cwd=path.parent)
    return done.returncode, " ".join(done.stdout.split()), done.stderr


def write(path, bound=2.0, **changes):
    """Three episodes of Pendulum's sizes: 40 steps each, the first terminated, the second timed out, the third cut."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(3, 41, 3)).cumsum(1)
    arrays = {
        "observations": states[:, :-1].reshape(-1, 3), "next_observations": states[:, 1:].reshape(-1, 3),
        "actions": rng.uniform(-bound, bound, (120, 1)), "rewards": np.ones(120),
        "terminals": np.arange(120) == 39, "timeouts": np.arange(120) == 79,
    }  # fmt: skip
    np.savez(path / "toy.npz", **{**arrays, **changes})
    return path / "toy.npz"


def test_what_is_wrong_is_told_with_an_exit_code(tmp_path):
    path = write(tmp_path, bound=0.05)
    code, printed, errors = inspect(path, "figure=null")
    assert code == 1, errors
    for fact in ("rows │ 120", "episodes │ 3", "40 to 40", "terminated │ 1", "timeout │ 1", "cut │ 1", "40 +- 0"):
        assert fact in printed, fact
    assert "its actions' bounds are -1 to 1, those of env=Pendulum-v1 are -2 to 2" in printed
    assert "use less than 10% of their bounds" in printed


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rewards": np.ones(119)}, "different lengths"),
        ({"actions": np.full((120, 1), 7.0)}, "120 of 120 actions leave their bounds"),
    ],
)
def test_what_cannot_be_loaded_ends_in_one_line(tmp_path, changes, message):
    code, _printed, errors = inspect(write(tmp_path, **changes))
    assert code == 2 and message in errors and "Traceback" not in errors


def test_the_environment_is_the_one_that_training_would_take(tmp_path):
    """Rescaled actions, the horizon of both, and a table's columns, as spar_d4rl.py reads them."""
    code, printed, errors = inspect(
        write(tmp_path, bound=1.0), "figure=null", "action_scale=env", "env_kwargs={max_episode_steps:60}"
    )
    assert code == 0, printed + errors
    assert "action bounds │ -2 to 2 │ -2 to 2" in printed and "steps up to │ 40 │ 60" in printed
    with np.load(write(tmp_path)) as arrays:
        columns = {f"x{i}": arrays["observations"][:, i] for i in range(3)}
        columns |= {"u": arrays["actions"][:, 0], "r": np.tile([0.5, 1.5], 60), "id": np.repeat(np.arange(3), 40)}
    np.savetxt(
        tmp_path / "t.csv", np.stack([*columns.values()], 1), delimiter=",", header=",".join(columns), comments=""
    )
    named = "columns={observation:[x0,x1,x2],action:u,reward:r,episode:id}"
    code, printed, errors = inspect(tmp_path / "t.csv", named, "figure=null")
    assert code == 0 and "40 +- 0" in printed, printed + errors


def test_clipped_actions_are_counted(tmp_path):
    path = write(tmp_path, bound=4.0)
    with np.load(path) as arrays:
        beyond = int((abs(arrays["actions"]) > 2).sum())
    code, printed, errors = inspect(path, "figure=null")
    assert code == 2 and "clip_actions=true" in errors
    code, printed, _ = inspect(path, "figure=null", "clip_actions=true")
    assert code == 1 and f"problem: {path}: {beyond} of 120 components of actions" in printed
    assert "-2 │ 2 │ -2 │ 2" in printed


def test_the_embedded_set_has_no_problem_and_a_figure(tmp_path):
    done = run("inspect_dataset", "dataset=embedded", "figure=sub/look.png", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no problem found" in done.stdout and (tmp_path / "sub" / "look.png").stat().st_size > 10_000


def test_a_log_that_teaches_nothing_is_a_problem(tmp_path):
    """Rewards that are all the same, unless an end cuts them short; fewer episodes than an estimate needs."""
    never = np.zeros(120, bool)
    for changes, found in (
        ({"rewards": np.zeros(120)}, "all rewards are 0, so nothing tells"),
        ({"terminals": never, "timeouts": np.arange(120) % 40 == 39}, "all rewards are 1, so nothing tells"),
        ({}, "3 episodes: values are estimated from the log with 4 at least"),
    ):
        code, printed, _ = inspect(write(tmp_path, bound=1.0, **changes), "figure=null", "env=none")
        assert code == 1 and found in printed
    assert "all rewards" not in printed  # where an episode ends, less is earned
