"""Loggers get the numbers of metrics.csv; one that cannot be used ends in one line."""

from __future__ import annotations

import csv

import pytest

from torchrl_spar import InputError

pytest.importorskip("hydra")
from harness import loggers
from helpers import TINY, run


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def numbers(out):
    """Every number of a run's tables, by its name at a logger and its step."""
    found = {}
    for phase, name in ((None, "metrics.csv"), ("eval", "evaluations.csv")):
        for row in rows(out / name):
            prefix, step = phase or row.pop("phase"), int(row.pop("step"))
            found |= {(f"{prefix}/{key}", step): float(value) for key, value in row.items() if value}
    return found


def test_tensorboard_holds_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run("spar_d4rl", *TINY, "critics.steps=4", "out=result", "logger.backend=tensorboard", cwd=tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    events = EventAccumulator(str(tmp_path / "result" / "log")).Reload()
    found = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    expected = numbers(tmp_path / "result")
    assert {name.split("/")[0] for name, _ in expected} == {"anchor", "vae", "critics", "spar", "eval"}
    assert found == pytest.approx(expected, rel=1e-5)  # the tables have six digits


def test_mlflow_keeps_the_runs_of_a_process_apart(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setattr(loggers, "MLFLOW_SERVER", None)
    for name in ("a", "b"):
        logger = loggers.make_logger(tmp_path / name, "mlflow")
        logger.write({f"spar/{name}": 1.5}, 7)
        logger.close()
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path / name / 'mlflow.db'}")
        (found,) = client.search_runs([client.get_experiment_by_name(loggers.PROJECT).experiment_id])
        assert found.data.metrics == {f"spar/{name}": 1.5} and found.info.status == "FINISHED"


def test_a_missing_backend_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"logger\.backend=trackio: needs 'pip install trackio'"):
        loggers.make_logger(tmp_path / "out", "trackio")
    assert not (tmp_path / "out").exists()
    assert loggers.make_logger(tmp_path / "out", "csv") is None


def test_a_failing_backend_is_named(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "log").write_text("in the way")
    with pytest.raises(InputError, match=r"logger\.backend=tensorboard: .*log"):
        loggers.make_logger(tmp_path, "tensorboard")
