"""What compare.py says it has left to do."""

from __future__ import annotations

import json
import os

import pytest
from helpers import compose_recipe

pytest.importorskip("hydra")
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from reporting import remaining as plan
from test_rivals import RECIPES


def write_run(tmp_path, method, seed, seconds, *overrides):
    cfg = compose_recipe("compare", f"runs={tmp_path}", f"method={method}", *overrides)
    out = tmp_path / "torchrl-spar-hopper-medium-v0" / method / f"seed{seed}"
    out.mkdir(parents=True)
    (out / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    (out / "results.json").write_text(json.dumps({"wall_seconds": seconds}))


def announce(tmp_path, capsys, *overrides, params=None):
    """What is printed before a sweep."""
    hydra = {"sweeper": {"params": params or {}}, "overrides": {"task": [f"runs={tmp_path}", *overrides]}}
    cfg = OmegaConf.create({"hydra": hydra, "method": {"alpha": "of no run"}})
    with initialize_config_dir(str(RECIPES / "config"), version_base=None):
        plan.Remaining().on_multirun_start(cfg, config_name="compare")
    return capsys.readouterr().out.splitlines(), json.loads(os.environ[plan.LEFT])


def test_finished_runs_of_the_same_sizes_tell_the_hours(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(plan.LEFT, "{}")
    write_run(tmp_path, "iql", 0, 1_000)
    write_run(tmp_path, "iql", 1, 2_000)
    write_run(tmp_path, "td3_bc", 0, 10, "spar.updates=5")
    write_run(tmp_path, "iql", 7, 10, "spar.members=2")
    params = {"dataset": "embedded", "method": "bc", "seed": "0,1,2"}
    lines, left = announce(tmp_path, capsys, "method=iql,td3_bc", "seed=0,1,2,3", params=params)
    # Two of IQL take the mean; the finished run of TD3+BC was another job.
    assert lines[0] == "5 runs to do, 3 finished." and "td3_bc" in lines[2] and left == {"td3_bc": 3}
    assert lines[1] == f"{2 * 1_500 / 3600:.2f} hours, one run a core, for 2: as finished runs of the same sizes took."


def test_a_name_may_depend_on_the_options(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(plan.LEFT, "{}")
    grid = ["method=td3_bc", "method.alpha=1,5", "method.name=td3_bc-${method.alpha}", "seed=10,11"]
    lines, left = announce(tmp_path, capsys, *grid, "dataset=embedded")
    assert lines[0] == "4 runs to do, 0 finished." and left == {"td3_bc-1": 2, "td3_bc-5": 2}
    # Wrong options are the sweep's to refuse.
    assert announce(tmp_path, capsys, "method=td3_bc", "batch_size=0", "seed=1")[0] == []


class Quiet:
    """The base of `Timed`, without a run."""

    def record(self, phase, step, metrics):
        pass


def test_first_updates_tell_where_there_is_no_record(monkeypatch, capsys):
    class Fake(plan.Timed):
        method, out, cfg = "iql", "here", OmegaConf.create({"spar": {"updates": 36_000}})

        def __init__(self):
            pass

    monkeypatch.setattr(plan.Run, "record", Quiet.record)
    clock = iter([5.0, 7.0])
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock))
    monkeypatch.setenv(plan.LEFT, json.dumps({"iql": 4}))
    run = Fake()
    for phase, step in (("critics", 50), ("iql", 100), ("iql", 300), ("iql", 500)):
        run.record(phase, step, {})
    # 200 updates in 2 seconds: 360 seconds a run.
    assert capsys.readouterr().out == (
        "here: 100 updates a second now, so 0.40 hours for the updates of iql's 4 runs, one a core\n"
    )
