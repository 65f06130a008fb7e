"""The study of off-policy evaluation: its figures by independent formulas, and a whole run of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import TINY, compose_recipe, run

from torchrl_spar import InputError, evaluate, load_policy

pytest.importorskip("hydra")
import ope_study


def test_the_rank_correlation_is_spearmans():
    generator = np.random.default_rng(0)
    for _ in range(5):
        one, other = generator.permutation(9), generator.permutation(9)
        exact = 1 - 6 * ((one - other) ** 2).sum() / (9 * (81 - 1))  # without ties
        assert ope_study.spearman(torch.tensor(one), torch.tensor(other)) == pytest.approx(exact)
    tied = torch.tensor([3.0, 1.0, 3.0, 2.0])
    assert ope_study.ranks(tied).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert ope_study.spearman(tied, torch.ones(4)) is None


def test_the_figures_of_four_policies():
    names = ("score", "true_value", "value", "low", "high", "updates", "c")
    numbers = [
        (50.0, 100.0, 90.0, 85.0, 95.0, 0, None),  # the anchor; its interval lies below the truth
        (60.0, 120.0, 130.0, 70.0, 190.0, 10, 1.0),
        (80.0, 160.0, 125.0, 100.0, 161.0, 20, 1.0),
        (70.0, 140.0, 135.0, 99.0, 171.0, 20, 0.5),
    ]
    rows = [{"name": name, **dict(zip(names, row))} for name, row in zip(("anchor", "a", "b", "c"), numbers)]
    found = ope_study.figures(rows, "anchor")
    assert found["coverage"] == 0.75 and found["mean_absolute_error"] == (10 + 10 + 35 + 5) / 4
    # Places by score 0 1 3 2, by value 0 2 1 3: 1 - 6 * (0 + 1 + 4 + 1) / (4 * 15).
    assert found["spearman"] == pytest.approx(0.4)
    assert list(found["regret"].values()) == [10.0, 0.0, 30.0, 0.0, 15.0]


def test_a_study_of_two_runs(tmp_path, capsys):
    for seed in (0, 1):
        done = run("spar_d4rl", *TINY, "batch_size=32", f"seed={seed}", f"out=runs/{seed}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    few = ["scales=[0,1]", "episodes=2", "ope.steps=2", "ope.warm_steps=2", "ope.num_qvalue_nets=2"]
    cfg = compose_recipe("ope_study", f"runs=[{tmp_path / 'runs'}]", f"out={tmp_path / 'out'}", *few)
    ope_study.main(cfg)
    facts = json.loads((tmp_path / "out" / "ope.json").read_text())
    runs = [str(tmp_path / "runs" / seed) for seed in "01"]
    # The first run's c=0 is the anchor.
    expected = ["anchor", f"{runs[0]} c=1", f"{runs[1]} c=0", f"{runs[1]} c=1"]
    assert [row["name"] for row in facts["rows"]] == expected and facts["policies"] == 4
    assert [row["updates"] for row in facts["rows"]] == [0, 4, 4, 4]
    policy, _ = load_policy(tmp_path / "runs" / "1" / "policy.pt")
    returns = evaluate(policy, "Hopper-v5", 2, ope_study.RESULT_SEED)
    row = facts["rows"][-1]
    assert row["score"] == pytest.approx(100 * (returns.mean().item() + 20.272305) / (3234.3 + 20.272305), rel=1e-4)
    # Each step of a hopper that stands earns about 1: discounting takes something off, not all.
    assert 0 < row["true_value"] < returns.mean()
    assert "regret of choosing by highest value" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists and is not empty"):
        ope_study.main(cfg)
    chosen = tmp_path / "runs" / "1" / "config.yaml"
    chosen.write_text(chosen.read_text().replace("select: null", "select: ope"))
    with pytest.raises(InputError, match=r"runs: .*1 was saved with select=ope"):
        ope_study.main(compose_recipe("ope_study", f"runs=[{tmp_path / 'runs'}]", f"out={tmp_path / 'other'}"))


def test_runs_that_do_not_compare_are_named(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        ope_study.main(compose_recipe("ope_study", f"runs=[{tmp_path}]", f"out={tmp_path / 'out'}"))
