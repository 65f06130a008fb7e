"""The mean of finished runs: its actions and scores against the runs' own policies."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import compose_recipe
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded

from torchrl_spar import InputError, evaluate, load_policy, make_spar_loss, save_policy

pytest.importorskip("hydra")
pytest.importorskip("gymnasium")
import average
from harness.finished import finished_runs
from harness.output import save_config
from harness.scores import RESULT_SEED
from rivals.models import ACTORS, Networks

ENV = "Pendulum-v1"


def write_run(out, seed, *options, policy=None, **changed):
    """A finished run as average.py reads it, with a policy as if trained."""
    torch.manual_seed(seed)
    save_config(out, compose_recipe("spar_d4rl", f"env={ENV}", f"seed={seed}", *options))
    actor = make_spar_loss(3, Bounded(-2, 2, (1,)), hidden=[8]).actor
    for param in actor.parameters():
        param.data += 0.5 * torch.randn_like(param)
    facts = {"env": ENV, "env_kwargs": {}, "dataset": "log.npz", "rows_sha256": "a", "log": {"dataset": "log.npz"}}
    if policy is None:
        save_policy(actor, out / "policy.pt", **facts, seed=seed)
    else:
        save_policy(policy, out / "policy.pt", **facts, seed=seed, compare_network=policy.network)
    score = {"return_mean": -100.0 * seed, "return_std": 1.0, "normalized": None}
    results = {"dataset": "log.npz", "env": ENV, "env_kwargs": {}, "seed": seed, "method": "spar", "updates": 4}
    results["episodes"] = 20
    results |= {"rows_sha256": "a", "anchor": score, "spar": score} | changed
    (out / "results.json").write_text(json.dumps(results))
    return actor


def test_the_mean_of_two_runs(tmp_path, capsys):
    actors = [write_run(tmp_path / "runs" / str(seed), seed) for seed in (1, 2)]
    out = tmp_path / "mean"
    average.main(compose_recipe("average", f"runs=[{tmp_path / 'runs'}]", f"out={out}", "episodes=3", "seed=1"))
    policy, facts = load_policy(out / "policy.pt")
    x = torch.randn(50, 3)
    expected = sum(actor(observation=x) for actor in actors) / 2
    torch.testing.assert_close(policy(observation=x), expected)
    assert facts == {
        "env": ENV, "env_kwargs": {}, "dataset": "log.npz", "rows_sha256": "a", "log": {"dataset": "log.npz"},
        "seeds": [1, 2],
    }  # fmt: skip
    found = json.loads((out / "average.json").read_text())
    assert [(row["seed"], row["spar"]["return_mean"]) for row in found["runs"]] == [(1, -100), (2, -200)]
    of_actions = TensorDictModule(
        lambda x: sum(actor(observation=x) for actor in actors) / 2, ["observation"], ["action"]
    )
    of_anchors = TensorDictModule(
        lambda x: sum(actor.anchor(observation=x) for actor in actors) / 2, ["observation"], ["action"]
    )
    for name, mean in {"mean": of_actions, "anchor": of_anchors}.items():
        returns = evaluate(mean, ENV, 3, RESULT_SEED + 100_000)
        assert found[name]["return_mean"] == pytest.approx(returns.mean().item(), rel=1e-4)
    assert found["mean"] != found["anchor"]
    printed = capsys.readouterr().out
    assert "-200.0" in printed and f"{found['mean']['return_mean']:.1f}" in printed


def test_runs_without_a_mean_are_refused_and_nothing_is_written(tmp_path):
    write_run(tmp_path / "one" / "0", 0)
    rival = next(iter(ACTORS.values()))(Networks.of(3, Bounded(-2, 2, (1,)), hidden=[8]))
    for name, options, changed, words in (
        ("alone", [], None, "only one finished run"),
        ("environment", [], {"env_kwargs": {"g": 9.0}}, "another env_kwargs"),
        ("online", [], {"online": {}}, "went on online"),
        ("scores", [], {"spar": None}, "has no scores"),
        ("log", ["dataset=other.npz"], {}, "another dataset"),
        ("rows", [], {"rows_sha256": "b"}, "another rows_sha256"),
        ("discount", ["spar.loss.gamma=0.9"], {}, r"another spar\.loss\.gamma"),
        ("method", [], {"method": "no_lsi"}, "of several methods, no_lsi, spar"),
        ("policy", [], {"policy": rival}, "has no residual on an anchor"),
    ):
        runs = [tmp_path / "one"]
        if changed is not None:
            write_run(tmp_path / name, 1, *options, **changed)
            runs.append(tmp_path / name)
        with pytest.raises(InputError, match=words):
            average.main(compose_recipe("average", f"runs=[{','.join(map(str, runs))}]", f"out={tmp_path / 'out'}"))
        assert not (tmp_path / "out").exists()


def test_a_run_counts_once(tmp_path, monkeypatch):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / str(seed), seed)
    monkeypatch.chdir(tmp_path)
    assert len(finished_runs(["runs", str(tmp_path / "runs"), "runs/0"])) == 2
    shutil.copytree("runs/0", "runs/2")
    with pytest.raises(InputError, match="hold the same policy"):
        average.main(compose_recipe("average", "runs=[runs]", "out=out"))


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
        average.main(compose_recipe("average", f"runs=[{tmp_path}]", f"out={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()
