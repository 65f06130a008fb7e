"""The study of off-policy evaluation: its figures by independent formulas, and a whole run of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, compose_recipe, run
from tensordict.nn import TensorDictSequential

from torchrl_spar import FrozenAnchor, InputError, evaluate, load_policy, save_policy
from torchrl_spar.ope import select

pytest.importorskip("hydra")
import compare
import ope_study
from ablations.no_anchor import mid_range
from harness import scores
from reporting import ope_figures


def test_the_rank_correlation_is_spearmans():
    generator = np.random.default_rng(0)
    for _ in range(5):
        one, other = generator.permutation(9), generator.permutation(9)
        exact = 1 - 6 * ((one - other) ** 2).sum() / (9 * (81 - 1))  # without ties
        assert ope_figures.spearman(torch.tensor(one), torch.tensor(other)) == pytest.approx(exact)
    tied = torch.tensor([3.0, 1.0, 3.0, 2.0])
    assert ope_figures.ranks(tied).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert ope_figures.spearman(tied, torch.ones(4)) is None


def test_the_figures_of_four_policies():
    names = ("score", "true_value", "value", "low", "high", "updates", "c")
    numbers = [
        (50.0, 100.0, 90.0, 85.0, 95.0, 0, None),  # the anchor; its interval lies below the truth
        (60.0, 120.0, 130.0, 70.0, 190.0, 10, 1.0),
        (80.0, 160.0, 125.0, 100.0, 161.0, 20, 1.0),
        (70.0, 140.0, 135.0, 99.0, 171.0, 20, 0.5),
    ]
    rows = [{"name": name, **dict(zip(names, row))} for name, row in zip(("anchor", "a", "b", "c"), numbers)]
    found = ope_figures.figures(rows, "anchor")
    assert found["coverage"] == 0.75 and found["mean_absolute_error"] == (10 + 10 + 35 + 5) / 4
    # Places by score 0 1 3 2, by value 0 2 1 3: 1 - 6 * (0 + 1 + 4 + 1) / (4 * 15).
    assert found["spearman"] == pytest.approx(0.4)
    assert list(found["regret"].values()) == [10.0, 0.0, 30.0, 0.0, 15.0]
    for row, value in zip(rows, (10.0, 30.0, 20.0, None)):
        row["critics_value"] = value
    again = ope_figures.figures(rows, "anchor")["regret"]
    assert again == found["regret"] | {"critics' own value": 80.0 - 60.0}


def test_the_figures_of_safe_choices():
    scores = {"anchor": 50.0, "a c=1": 70.0, "b c=0": 40.0, "b c=0.5": 60.0, "b c=1": 36.0}
    rows = [{"name": name, "score": score} for name, score in scores.items()]
    families = {"a": ["anchor", "a c=1"], "b": ["b c=0", "b c=0.5", "b c=1"]}
    found = ope_figures.safe_choice(rows, families, {"a": "a c=1", "b": "b c=1"})
    assert found["worse_than_anchor"] == 1 and found["gain_kept"] == (20 - 4) / (20 + 20)
    found = ope_figures.safe_choice(rows, families, {"a": "anchor", "b": "b c=0.5"})
    assert found["worse_than_anchor"] == 0 and found["gain_kept"] == 0.5
    assert found["runs"]["b"] == {"anchor": "b c=0", "choice": "b c=0.5"}
    assert ope_figures.safe_choice(rows, {"b": ["b c=0", "b c=1"]}, {"b": "b c=0"})["gain_kept"] is None


def copy_run(source, target, **changed):
    shutil.copytree(source, target)
    results = json.loads((target / "results.json").read_text())
    (target / "results.json").write_text(json.dumps(results | changed))


def no_anchor(run):
    """As the ablation saves its policy: the middle of the range is no anchor to fall back to."""
    policy, facts = load_policy(run / "policy.pt")
    facts["compare_network"] = {"kind": "no_anchor", **policy.architecture}
    policy.anchor = FrozenAnchor(mid_range(policy.low, policy.high))
    save_policy(TensorDictSequential(policy), run / "policy.pt", **facts)


def d3rlpy_joins_a_finished_study(monkeypatch, out, options):
    """A peer that gives 1, 2, ... and is cut before the third policy, then goes on there."""
    before, values = json.loads((out / "ope.json").read_text()), []

    def fqe_values(policies, data, *, steps, gamma, seed):
        assert (len(policies), steps, gamma, seed) == (1, 5, 0.99, 0)
        if values == [1.0, 2.0]:
            values.append(0.0)
            raise KeyboardInterrupt
        values.append(1.0 + len(values))
        return {name: values[-1] for name in policies}

    monkeypatch.setattr(ope_study, "d3rlpy_peer", lambda: SimpleNamespace(fqe_values=fqe_values))
    cfg = compose_recipe("ope_study", f"out={out}", "d3rlpy_steps=5", *options)
    with pytest.raises(KeyboardInterrupt):
        ope_study.main(cfg)
    assert json.loads((out / "ope.json").read_text())["d3rlpy"]["policies"] == 2
    ope_study.main(cfg)
    facts = json.loads((out / "ope.json").read_text())
    assert [row["d3rlpy_value"] for row in facts["rows"]] == [1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    own = [{key: value for key, value in row.items() if not key.startswith("d3rlpy")} for row in facts["rows"]]
    assert own == before["rows"] and facts["d3rlpy"]["ours_spearman"] == pytest.approx(before["spearman"], abs=1e-5)
    for changed, name in (("episodes=3", "episodes"), ("d3rlpy_steps=6", "d3rlpy_steps")):
        with pytest.raises(InputError, match=rf"out={out}: has a study with another {name}; give another"):
            ope_study.main(compose_recipe("ope_study", f"out={out}", "d3rlpy_steps=5", *options, changed))


def a_study_that_is_cut_goes_on(monkeypatch, tmp_path, options):
    """In groups of three, cut in the second one."""
    out, groups = tmp_path / "cut", []
    undisturbed = json.loads((tmp_path / "out" / "ope.json").read_text())

    def evaluate_each(policies, *args, **kwargs):
        groups.append(len(policies))
        if len(groups) == 2:
            raise KeyboardInterrupt
        return select.evaluate_each(policies, *args, **kwargs)

    monkeypatch.setattr(ope_study, "GROUP", 3)
    monkeypatch.setattr(ope_study, "evaluate_each", evaluate_each)
    cfg = compose_recipe("ope_study", f"out={out}", *options)
    with pytest.raises(KeyboardInterrupt):
        ope_study.main(cfg)
    with pytest.raises(InputError, match=rf"out={out}: has a study with another seed; give another"):
        ope_study.main(compose_recipe("ope_study", f"out={out}", *options, "seed=1"))
    ope_study.main(cfg)
    assert groups == [3, 3, 3, 1] and [path.name for path in out.iterdir()] == ["ope.json"]
    rows = json.loads((out / "ope.json").read_text())["rows"]
    for row, other in zip(rows, undisturbed["rows"], strict=True):
        assert row == {name: pytest.approx(x, rel=1e-4) if isinstance(x, float) else x for name, x in other.items()}
    monkeypatch.undo()


def test_a_study_of_several_runs(tmp_path, capsys, monkeypatch):
    for seed in (0, 1):
        done = run("spar_d4rl", *TINY, "batch_size=32", f"seed={seed}", f"out=runs/{seed}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    compare.start(compose_recipe("compare", *TINY, "batch_size=32", "method=iql"), 0, tmp_path / "runs" / "4")
    # Stand for an ablation and for SPAR with another option; both have the anchor of their seed.
    copy_run(tmp_path / "runs" / "0", tmp_path / "runs" / "2", method="no_lsi")
    copy_run(tmp_path / "runs" / "1", tmp_path / "runs" / "3", critics_values={})
    few = ["scales=[1]", "episodes=2", "ope.steps=2", "ope.warm_steps=2", "ope.num_qvalue_nets=2"]
    cfg = compose_recipe("ope_study", f"runs=[{tmp_path / 'runs'}]", f"out={tmp_path / 'out'}", *few)
    ope_study.main(cfg)
    facts = json.loads((tmp_path / "out" / "ope.json").read_text())
    runs = [str(tmp_path / "runs" / seed) for seed in "01234"]
    # The first run's c=0 is the anchor, and no anchor comes twice.
    expected = [f"{runs[0]} c=1", f"{runs[1]} c=0", *(f"{run} c=1" for run in runs[1:4]), runs[4]]
    assert [row["name"] for row in facts["rows"]] == ["anchor", *expected] and facts["policies"] == 7
    anchors = {run: made["anchor"] for run, made in facts["safe_choice"]["runs"].items()}
    assert anchors == {runs[0]: "anchor", runs[2]: "anchor", runs[1]: f"{runs[1]} c=0", runs[3]: f"{runs[1]} c=0"}
    assert [row["updates"] for row in facts["rows"]] == [0, *[4] * 6]
    assert [row["method"] for row in facts["rows"]] == ["anchor", "spar", "spar", "spar", "no_lsi", "spar", "iql"]
    own = [json.loads((tmp_path / "runs" / seed / "results.json").read_text())["critics_values"] for seed in "01"]
    expected = [own[0]["anchor"], *(own[i][name] for i, name in ((0, "deployed"), (1, "anchor"), (1, "deployed")))]
    expected = [pytest.approx(value, rel=1e-5) for value in (*expected, own[0]["deployed"])]
    # An older run and a rival have none.
    assert [row["critics_value"] for row in facts["rows"]] == [*expected, None, None]
    assert "critics' own value" in facts["regret"]
    played = [{key: row[key] for key in ("score", "true_value")} for row in facts["rows"]]
    assert played[4] == played[1] and played[5] == played[3] and played[6] not in played[:6]
    policy, facts_of_1 = load_policy(tmp_path / "runs" / "1" / "policy.pt")
    returns = evaluate(policy, "Hopper-v5", 2, ope_study.RESULT_SEED)
    row = facts["rows"][3]
    assert row["score"] == pytest.approx(100 * (returns.mean().item() + 20.272305) / (3234.3 + 20.272305), rel=1e-4)
    own = json.loads((tmp_path / "runs" / "4" / "results.json").read_text())["policy"]["normalized"]
    assert facts["rows"][-1]["score"] == pytest.approx(own, rel=1e-5)
    # Each step of a hopper that stands earns about 1: discounting takes something off, not all.
    assert 0 < row["true_value"] < returns.mean()
    assert "regret of choosing by highest value" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists and is not empty"):
        ope_study.main(cfg)
    options = [f"runs=[{tmp_path / 'runs'}]", *few]
    a_study_that_is_cut_goes_on(monkeypatch, tmp_path, options)
    d3rlpy_joins_a_finished_study(monkeypatch, tmp_path / "out", options)
    save_policy(policy, tmp_path / "runs" / "1" / "policy.pt", **facts_of_1, choice="anchor")
    with pytest.raises(InputError, match=r"has a study with another policy\.pt"):
        ope_study.main(compose_recipe("ope_study", f"out={tmp_path / 'out'}", "d3rlpy_steps=5", *options))
    with pytest.raises(InputError, match=r"runs: .*1 was saved with select=ope"):
        ope_study.main(compose_recipe("ope_study", f"runs=[{tmp_path / 'runs'}]", f"out={tmp_path / 'other'}"))
    no_anchor(tmp_path / "runs" / "2")
    with pytest.raises(InputError, match="none has an anchor to compare with"):
        ope_study.main(compose_recipe("ope_study", f"runs=[{runs[2]},{runs[4]}]", f"out={tmp_path / 'other'}"))


def test_policies_that_runs_kept_are_studied(tmp_path):
    """They are those that the learning curve is of."""
    for method, out in (("spar", "0"), ("iql", "1")):
        options = [*TINY, "batch_size=32", f"method={method}", "keep_policies=2", "eval.episodes=2"]
        compare.start(compose_recipe("compare", *options), 0, tmp_path / out)
    runs = {str(tmp_path / out): json.loads((tmp_path / out / "results.json").read_text()) for out in "01"}
    spar, iql = runs
    studied, families = ope_study.policies_of(runs, [0.5, 1.0], torch.device("cpu"))
    names = [f"{spar}{step} c={c}" for step in ("", "@2") for c in (0.5, 1)]
    assert list(studied) == ["anchor", *names, iql, f"{iql}@2"]
    assert families == {spar: ["anchor", *names]}
    assert [each.updates for each in studied.values()] == [0, 4, 4, 2, 2, 4, 2]
    assert [each.c for each in studied.values()] == [None, 0.5, 1.0, 0.5, 1.0, None, None]
    values = runs[spar]["critics_values"]
    expected = [values["anchor"], None, values["deployed"], None, values["2"], None, None]
    assert len({*expected}) == 4 and [each.critics_value for each in studied.values()] == expected
    for path, suffix in ((spar, " c=1"), (iql, "")):
        for name, step in ((f"{path}{suffix}", 4), (f"{path}@2{suffix}", 2)):
            [point] = [row for row in runs[path]["curve"] if row["step"] == step]
            returns = evaluate(studied[name].policy, "Hopper-v5", 2, scores.CURVE_SEED)
            assert returns.mean().item() == pytest.approx(point["return_mean"], rel=1e-6)
    cfg = compose_recipe("ope_study", f"runs=[{tmp_path}]", f"out={tmp_path / 'out'}")
    found = ope_study.asked_for(cfg, [tmp_path / "0", tmp_path / "1"])["policy.pt"]
    assert [*found] == [spar, f"{spar}@2", iql, f"{iql}@2"]
    assert found[f"{spar}@2"] == hashlib.sha256((tmp_path / "0" / "policy_2.pt").read_bytes()).hexdigest()


def test_runs_that_do_not_compare_are_named(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        ope_study.main(compose_recipe("ope_study", f"runs=[{tmp_path}]", f"out={tmp_path / 'out'}"))
