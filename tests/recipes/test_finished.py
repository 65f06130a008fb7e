"""Which runs a study reads, and what it refuses."""

from __future__ import annotations

import json

import pytest
from helpers import compose_recipe

from torchrl_spar import InputError

pytest.importorskip("hydra")
from harness.finished import finished_runs, read_agreeing
from harness.output import save_config

ENV = "Pendulum-v1"


def write_run(out, seed, *options, **changed):
    """The files of a finished run that are read."""
    save_config(out, compose_recipe("spar_d4rl", f"env={ENV}", f"seed={seed}", *options))
    (out / "policy.pt").touch()
    results = {"dataset": "log.npz", "env": ENV, "env_kwargs": {}, "seed": seed, "method": "spar", "updates": 4}
    (out / "results.json").write_text(json.dumps(results | {"rows_sha256": "a"} | changed))


def test_runs_of_other_data_or_tasks_are_named(tmp_path):
    write_run(tmp_path / "one", 0)
    write_run(tmp_path / "same", 1)
    assert len(read_agreeing([tmp_path / "one", tmp_path / "same"])) == 2
    for name, options, changed, words in (
        ("environment", [], {"env_kwargs": {"g": 9.0}}, "another env_kwargs"),
        ("log", ["dataset=other.npz"], {}, "another dataset"),
        ("rows", [], {"rows_sha256": "b"}, "another rows_sha256"),
        ("discount", ["spar.loss.gamma=0.9"], {}, r"another spar\.loss\.gamma"),
    ):
        write_run(tmp_path / name, 1, *options, **changed)
        with pytest.raises(InputError, match=words):
            read_agreeing([tmp_path / "one", tmp_path / name])


def test_a_run_counts_once(tmp_path, monkeypatch):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / str(seed), seed)
    monkeypatch.chdir(tmp_path)
    assert len(finished_runs(["runs", str(tmp_path / "runs"), "runs/0"])) == 2


def test_what_is_missing_or_unfinished_is_said(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), seed)
    with pytest.raises(InputError, match=r"no finished run with .*nowhere"):
        finished_runs([str(tmp_path), str(tmp_path / "nowhere")])
    capsys.readouterr()
    (tmp_path / "1" / "results.json").rename(tmp_path / "1" / "metrics.csv")
    (tmp_path / "0" / "wandb").mkdir()
    (tmp_path / "0" / "wandb" / "config.yaml").touch()  # a logger's own
    assert finished_runs([str(tmp_path)]) == [tmp_path / "0"]
    assert capsys.readouterr().out == f"{tmp_path / '1'}: not finished, left out\n"


@pytest.mark.parametrize("name", ["results.json", "config.yaml"])
@pytest.mark.parametrize("content", ["", "[]", "null", "{}", "words"])
def test_damaged_files_of_a_run_are_named(name, content, tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), seed)
    (tmp_path / "1" / name).write_text(content)
    with pytest.raises(InputError, match=f"1(/{name}: damaged| has another dataset)"):
        read_agreeing(finished_runs([str(tmp_path)]))
