"""Runs without an environment: what they leave instead of scores, the tables of them, and the page to sign."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
from copy import deepcopy
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import RECIPES, SMALL, TINY, compose_recipe, run
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ValueOperator

from torchrl_spar import (
    InputError,
    SPARLoss,
    estimate_value,
    fit_fqe,
    load_offline_dataset,
    load_policy,
    make_anchor,
    make_spar_loss,
    make_toy_data,
)

pytest.importorskip("hydra")
import deployment_report
import evaluate
import export
import report
import spar_offline_to_online
from harness import log_values
from harness.earlier import EarlierPolicies
from harness.environment import load_any
from harness.plots import plot_learning_curve
from harness.same_rows import SameRows, digest_of
from harness.spar_run import SPARRun, check_options
from omegaconf import OmegaConf
from reporting import deployment

EPISODES, LENGTH, GAMMA = 12, 20, 0.99
COLUMNS = "columns={observation:[x,v],action:[u,w],reward:r,episode:id,terminated:end}"
LOG = ["dataset=log.csv", COLUMNS, "action_bounds=[[-40,0],[40,1]]"]
FEW = ["ope.steps=4", "ope.warm_steps=4", "batch_size=32"]
# Every step earns 2, so every episode is worth this much.
VALUE = 2 * (1 - GAMMA**LENGTH) / (1 - GAMMA)


def write_log(path):
    """A table with a row a step; the first episodes are listed first."""
    draw = np.random.default_rng(0)
    lines = ["id,x,v,u,w,r,end"]
    for episode in range(EPISODES):
        states = draw.normal(size=(LENGTH, 2)).cumsum(0)
        for step, (x, v) in enumerate(states):
            lines.append(f"{episode},{x},{v},{draw.uniform(-40, 40)},{draw.uniform()},2,{int(step == LENGTH - 1)}")
    path.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    pytest.importorskip("pyarrow")
    cwd = tmp_path_factory.mktemp("logs")
    write_log(cwd / "log.csv")
    done = run("spar_d4rl", *TINY, *LOG, *FEW, "out=result", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done, cwd


def test_a_log_without_an_environment_is_a_whole_run(finished):
    done, cwd = finished
    out = cwd / "result"
    assert done.stdout.count("log.csv names no environment") == 1
    files = ["config.yaml", "evaluations.csv", "learning_curve.png", "metrics.csv", "policy.pt", "results.json"]
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith("deployment")) == files
    results = json.loads((out / "results.json").read_text())
    assert results["env"] is None and results["data"]["normalized"] is None
    assert results["data"]["return_mean"] == pytest.approx(2 * LENGTH)
    # All episodes are alike: their value is known, and resampling them changes nothing.
    for name in ("mean", "low", "high"):
        assert results["estimates"]["data"][name] == pytest.approx(VALUE, rel=1e-5)
    for name in ("anchor", "spar"):
        value = results["estimates"][name]
        assert value["low"] < value["mean"] < value["high"] and len(value["critics"]) == 5
        assert f"{value['mean']:.4g}" in done.stdout
    ahead = np.greater(*(results["estimates"][name]["critics"] for name in ("spar", "anchor"))).sum()
    table = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines() if "│" in line]
    assert {row[1]: row[5] for row in table} == {"data": "", "anchor": "", "spar": f"{ahead} of 5"}
    assert results["versions"]["python"] == platform.python_version()
    assert results["versions"]["numpy"] == np.__version__
    gain = results["estimates"]["gains"]["spar"]
    own, base = (results["estimates"][name]["mean"] for name in ("spar", "anchor"))
    assert gain["mean"] == pytest.approx(own - base, abs=1e-6)
    assert results["estimates"]["choice"] == ("spar" if gain["low"] > 0 else "anchor")
    assert "selected" not in results  # without select=ope the policy is saved as it is
    rows = list(csv.DictReader((out / "evaluations.csv").open()))
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    assert [{key: pytest.approx(float(x), rel=1e-5) for key, x in row.items()} for row in rows] == results["curve"]
    values = results["critics_values"]
    assert values["deployed"] == results["curve"][-1]["value"] != values["anchor"]


def test_the_distance_is_that_of_the_saved_policy(finished):
    """Against a search by hand, through the file's own rows."""
    _, cwd = finished
    table = np.genfromtxt(cwd / "log.csv", delimiter=",", names=True)
    state, action = (np.stack([table[name] for name in names], 1) for names in (("x", "v"), ("u", "w")))
    order = torch.randperm(EPISODES, generator=torch.Generator().manual_seed(0))[: round(0.2 * EPISODES)]
    held = np.isin(table["id"], order.numpy())
    policy, _ = load_policy(cwd / "result" / "policy.pt")
    own = policy(observation=torch.from_numpy(state).float()).detach().numpy()
    width = action[~held].std(0, ddof=1)

    def joined(actions):
        return np.concatenate([(state - state.mean(0)) / state.std(0), actions / width], 1)

    def distance(actions):
        gaps = np.linalg.norm(joined(actions)[held][:, None] - joined(action)[~held][None], axis=-1)
        return np.sort(gaps, 1)[:, :5].mean()

    results = json.loads((cwd / "result" / "results.json").read_text())
    assert results["spar"]["support_distance"] == pytest.approx(distance(own) / distance(action), rel=1e-4)


def test_a_known_environment_can_be_left_out(capsys):
    data, env, env_kwargs = load_any(compose_recipe("spar_d4rl", "env=none", "out=x"), torch.device("cpu"))
    assert (data.env_id, env, env_kwargs) == ("Hopper-v5", None, {})
    assert "names no environment" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["env_kwargs={frame_skip:2}"], r"env_kwargs=.*env=none"),
        (["action_scale=env"], r"action_scale=env.*env=none"),
        (["action_bounds=env"], r"action_bounds=env: needs env=NAME"),
    ],
)
def test_options_of_an_environment_are_refused_without_one(options, message):
    cfg = compose_recipe("spar_d4rl", "env=none", "out=x", *options)
    with pytest.raises(InputError, match=message):
        load_any(cfg, torch.device("cpu"))


def test_going_online_needs_an_environment(tmp_path):
    cfg = compose_recipe("spar_offline_to_online", "env=none", "method=spar", f"runs={tmp_path}")
    with pytest.raises(InputError, match=r"env=none.*Hopper-v5"):
        spar_offline_to_online.main(cfg)


def test_evaluate_reads_the_policys_own_log(finished, capsys, monkeypatch):
    _, cwd = finished
    monkeypatch.chdir(cwd)

    def main(*options):
        evaluate.main(compose_recipe("evaluate", "policy=result/policy.pt", *FEW[:2], *options))
        return capsys.readouterr().out

    results = json.loads((cwd / "result" / "results.json").read_text())
    shown = main()
    assert f"{VALUE:.4g}" in shown and f"{results['spar']['support_distance']:.2f}" in shown
    # Another log is read with the same columns; its rewards are half.
    (cwd / "new.csv").write_text((cwd / "log.csv").read_text().replace(",2,", ",1,"))
    assert f"{VALUE / 2:.4g}" in main("dataset=new.csv")
    # So is a file that is no table, and columns that are given replace the policy's own.
    table = np.genfromtxt(cwd / "new.csv", delimiter=",", names=True)
    pairs = {"observations": ("x", "v"), "actions": ("u", "w")}
    arrays = {name: np.stack([table[key] for key in keys], 1) for name, keys in pairs.items()}
    np.savez(cwd / "new.npz", **arrays, rewards=table["r"], terminals=table["end"])
    assert f"{VALUE / 2:.4g}" in main("dataset=new.npz", "action_bounds=[[-40,0],[40,1]]")
    renamed = COLUMNS.replace(",episode:id,terminated:end", ",done:end")
    assert f"{VALUE / 2:.4g}" in main("dataset=new.csv", renamed)
    for options, message in (
        (["dataset=new.csv", COLUMNS.replace("[x,v]", "[x]")], r"does not fit dataset=new\.csv"),
        (["video=a.gif"], "video=a.gif: needs an environment"),
        (["env=Hopper-v5", "dataset=new.csv"], r"dataset=new\.csv.*env=none"),
        (["env=Hopper-v5", "action_scale=env"], r"action_scale=env.*env=none"),
        (["env=Hopper-v5"], r"ope\.steps=4.*env=none"),
    ):
        with pytest.raises(InputError, match=message):
            main(*options)


def test_a_log_that_has_changed_since_the_training_is_refused(finished, tmp_path, monkeypatch):
    _, cwd = finished
    shutil.copytree(cwd / "result", tmp_path / "result")
    log = (cwd / "log.csv").read_text()
    monkeypatch.chdir(tmp_path)
    commands = {
        evaluate: ["evaluate", "policy=result/policy.pt", *FEW[:2]],
        deployment_report: ["deployment_report", "run=result"],
        export: ["export", "policy=result/policy.pt", "guard=0.9", "formats=[pt2]", "out=exported"],
    }
    for changed in (log.replace(",2,", ",1,", 1), log.rsplit("\n", LENGTH)[0]):
        (tmp_path / "log.csv").write_text(changed)
        for recipe, options in commands.items():
            with pytest.raises(InputError, match=r"dataset=log\.csv: holds other rows than those that were trained on"):
                recipe.main(compose_recipe(*options))
    data = small_data()
    before = digest_of(data)
    data[:]["action"].mul_(2)  # as where actions are rescaled for an environment
    assert digest_of(data) == before
    same, other = (SameRows("log", small_data(episodes=count)) for count in (8, 9))
    same.load_state_dict(same.state_dict())
    with pytest.raises(InputError, match="dataset=log: holds other rows"):
        other.load_state_dict(same.state_dict())


@pytest.mark.parametrize("env", ["none", "Pendulum-v1"])
def test_too_few_episodes_are_refused_before_anything_is_written(env, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"observations": rng.normal(size=(30, 3)).cumsum(0), "actions": rng.uniform(-1, 1, (30, 1))}
    flags = {"terminals": np.zeros(30), "timeouts": np.arange(30) % 10 == 9}
    np.savez(tmp_path / "few.npz", **arrays, **flags, rewards=np.ones(30))
    data = [f"dataset={tmp_path / 'few.npz'}", "action_bounds=[[-2],[2]]"]
    done = run("spar_d4rl", *TINY, *data, f"env={env}", "select=ope", "out=result", cwd=tmp_path)
    assert done.returncode == 2 and "3 episodes, and at least 4 are needed" in done.stderr
    assert not (tmp_path / "result" / "config.yaml").exists() and not (tmp_path / "result" / "metrics.csv").exists()


def test_the_chosen_residual_is_what_is_saved(monkeypatch):
    """The choice itself is select_policy's; here it is given."""
    torch.manual_seed(0)  # no action at its bound
    data = small_data()
    actor = make_spar_loss(data, hidden=[8]).actor
    nn.init.constant_(actor.head.module.mlp[-1].bias, 0.4)
    options = {"gamma": 0.9, "seed": 0, "hidden": [8], "steps": 0, "warm_steps": 0, "num_qvalue_nets": 2}
    options |= {"held_out": 0.5, "confidence": 0.95}
    state = torch.randn(5, 3)
    anchor, whole = actor.anchor(observation=state), actor(observation=state)
    assert (whole - anchor).abs().min() > 0
    for name, share in (("c=0.5", 0.5), ("anchor", 0.0), ("spar", 1.0)):
        real = log_values.select_policy

        def choose(*args, real=real, name=name, **kwargs):
            return real(*args, **kwargs)._replace(name=name)

        monkeypatch.setattr(log_values, "select_policy", choose)
        found, chosen = log_values.estimate_spar(actor, data, options, select=True)
        monkeypatch.setattr(log_values, "select_policy", real)
        assert found["choice"] == name
        assert [*found["gains"]] == ["c=0.25", "c=0.5", "c=0.75", "spar"]
        torch.testing.assert_close(chosen(observation=state), anchor + share * (whole - anchor))
    torch.testing.assert_close(actor(observation=state), whole)


def test_policies_of_earlier_evaluations_are_candidates(monkeypatch):
    """Each is kept as it was, and saved when it is chosen."""
    options = ["spar.updates=10", "eval.interval=2", "out=x"]
    earlier = EarlierPolicies(compose_recipe("spar_d4rl", *options), 3)
    data = small_data()
    actor = make_spar_loss(data, hidden=[8]).actor
    state, expected = torch.randn(5, 3), {}
    for step in range(0, 11, 2):
        nn.init.constant_(actor.head.module.mlp[-1].bias, 0.05 * step)
        expected[step] = actor(observation=state)
        earlier.add(step, actor)
    again = EarlierPolicies(compose_recipe("spar_d4rl", *options), 3)
    again.load_state_dict(deepcopy(earlier.state_dict()))
    policies = again.policies(actor)
    assert list(policies) == [2, 6]  # of 2, 4, 6, 8 and 10, the last of which is the policy itself
    assert (expected[2] - expected[10]).abs().min() > 0
    for step in (2, 6):
        torch.testing.assert_close(policies[step](observation=state), expected[step])
    policies = {f"step {step}": policy for step, policy in policies.items()}
    real = log_values.select_policy
    chosen_name = "c=0.5 of step 2"
    monkeypatch.setattr(log_values, "select_policy", lambda *args, **kw: real(*args, **kw)._replace(name=chosen_name))
    few = {"gamma": 0.9, "seed": 0, "hidden": [8], "steps": 1, "warm_steps": 0, "num_qvalue_nets": 2}
    few |= {"held_out": 0.5, "confidence": 0.95}
    found, chosen = log_values.estimate_spar(actor, data, few, select=True, checkpoints=policies)
    assert len(found["gains"]) == 12 and found["choice"] == chosen_name
    anchor = actor.anchor(observation=state)
    torch.testing.assert_close(chosen(observation=state), (anchor + expected[2]) / 2)
    with pytest.raises(InputError, match="select_from=3: needs select=ope"):
        check_options(compose_recipe("spar_d4rl", "select_from=3", "out=x"), torch.device("cpu"))


def test_the_value_of_a_rival_has_that_of_each_critic():
    """The same critics that SPAR's anchor has with the same seed, where they start."""
    data = small_data()
    actor = make_spar_loss(data, hidden=[8]).actor
    options = {"gamma": 0.9, "seed": 3, "hidden": [8], "warm_steps": 3, "num_qvalue_nets": 3, "held_out": 0.5}
    for steps in (0, 2):
        found = log_values.estimate_any(actor.anchor, data, options | {"steps": steps, "confidence": 0.9})
        mean, bounds = estimate_value(actor.anchor, data, confidence=0.8, slice_len=16, steps=steps, **options)
        assert (found["policy"]["mean"], found["policy"]["low"], found["policy"]["high"]) == (mean, *bounds)
        assert len(found["policy"]["critics"]) == 3 and np.ptp(found["policy"]["critics"]) > 0
        assert np.mean(found["policy"]["critics"]) == pytest.approx(mean, rel=1e-12)
    start = options | {"steps": 0, "confidence": 0.9}
    of_spar, _ = log_values.estimate_spar(actor, data, start)
    assert log_values.estimate_any(actor.anchor, data, start)["policy"]["critics"] == of_spar["anchor"]["critics"]


def small_data(episodes=8, length=10, batch_size=16):
    draw = torch.Generator().manual_seed(0)
    n = episodes * length
    end = (torch.arange(n) % length == length - 1).unsqueeze(-1)
    following = {"observation": torch.randn(n, 3, generator=draw), "reward": torch.randn(n, 1, generator=draw)}
    rows = TensorDict({"observation": torch.randn(n, 3, generator=draw),
                       "action": torch.rand(n, 2, generator=draw) / 2,
                       "next": {**following, "terminated": end}}, [n])  # fmt: skip
    return load_offline_dataset(rows, batch_size=batch_size)


def test_the_critics_values_are_of_a_policy_at_the_initial_states():
    """By critics that say u and 3 u of the action's first number, in scaled rewards, of two members."""
    data = small_data()

    def member(reward_scale):
        loss = make_spar_loss(data, hidden=[8])
        actor = deepcopy(loss.actor)
        actor.head.requires_grad_(True)
        critics = [ValueOperator(First(slope), in_keys=["observation", "action"]) for slope in (1.0, 3.0)]
        return SPARLoss(actor, critics, loss.residual_vae, num_qvalue_nets=2, reward_scale=reward_scale)

    members = [member(0.5), member(0.25)]
    state = data[:]["observation"][::10]  # episodes of ten steps
    for policy in (members[0].actor, members[0].actor.anchor):
        u = policy(observation=state)[:, 0].mean()
        found = SPARRun.critics_values(SimpleNamespace(data=data, losses=members), policy)
        torch.testing.assert_close(found, u * torch.tensor([1 / 0.5, 3 / 0.5, 1 / 0.25, 3 / 0.25]))


class First(nn.Module):
    """The first number of the action, times a slope."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, observation, action):
        return self.slope * action[..., :1]


def test_calibration_is_of_the_critics_predictions():
    """Critics that say x and 3 x of the first number of the observation: their mean is known."""
    data = small_data()

    class Linear(nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(slope))

        def forward(self, observation, action):
            return self.slope * observation[..., :1]

    critics = [ValueOperator(Linear(slope), in_keys=["observation", "action"]) for slope in (1.0, 3.0)]
    fit = fit_fqe(make_anchor(data), data, qvalue_network=critics, warm_steps=0, steps=0, slice_len=4)
    found = log_values.calibration(fit)
    predicted = 2 * fit.held_out["observation"][:, 0].double().numpy() / fit.loss.reward_scale.item()
    true = fit.held_out["return_to_go"][:, 0].double().numpy()
    assert found["bias"] == pytest.approx((predicted - true).mean())
    assert found["rmse"] == pytest.approx(math.sqrt(((predicted - true) ** 2).mean()))
    groups = np.array_split(np.argsort(predicted), 10)
    np.testing.assert_allclose(found["predicted"], [predicted[group].mean() for group in groups], rtol=1e-5)
    np.testing.assert_allclose(found["true"], [true[group].mean() for group in groups], rtol=1e-5)


# ------------------------------------------------------------------ tables


# By seed, what three critics say of SPAR's anchor.
OF_ANCHOR = {0: [9.0, 9.9, 11.0], 1: [13.0, 15.0, 14.4]}


def write_runs(folder, values, env=None, scores=None):
    """Results of values[method][seed], with bounds one below and two above, and three critics 0.5 apart."""
    for method, by_seed in values.items():
        for seed, value in by_seed.items():
            name = "spar" if method == "spar" else "policy"
            row = {"support_distance": 1.25, "normalized": scores and scores[method]}
            of_method = {"mean": value, "low": value - 1.0, "high": value + 2.0}
            of_method["critics"] = [value - 0.5, value, value + 0.5]
            estimated = {"gamma": 0.99, "data": {"mean": 5.0, "low": 4.0, "high": 6.0}, name: of_method}
            if method == "spar":
                estimated["anchor"] = {"mean": 11.0, "low": 9.0, "high": 14.0, "critics": OF_ANCHOR[seed]}
            facts = {
                "dataset": "a", "env": env, "method": method, "seed": seed, "updates": 10, "episodes": 2,
                "curve": [{"step": 0, "normalized": 1.0}], "data": {"normalized": 1.0}, name: row,
                "anchor": {"support_distance": 1.1, "normalized": 1.0}, "estimates": estimated,
            }  # fmt: skip
            out = folder / f"{method}-{seed}-{env}"
            out.mkdir(parents=True)
            (out / "results.json").write_text(json.dumps(facts))


VALUES = {"spar": {0: 10.0, 1: 14.0}, "iql": {0: 13.0, 1: 13.0}, "bc": {0: 3.0, 1: 3.0}}


def test_the_table_of_logs_has_values_and_the_choice(tmp_path, capsys):
    write_runs(tmp_path, VALUES)
    report.main(tmp_path)
    shown = capsys.readouterr().out
    assert "| a | the data | 5 +- 0 (2) | 4 +- 0 (2) | 6 +- 0 (2) | 1.00 |  |" in shown
    assert "| a | SPAR's anchor | 11 +- 0 (2) | 9 +- 0 (2) | 14 +- 0 (2) | 1.10 |  |" in shown
    # Rivals are compared with the anchor of the same seed.
    assert "| a | SPAR (head A) | 12 +- 2.8 (2) | 11 +- 2.8 (2) | 14 +- 2.8 (2) | 1.25 | 4 of 6 |" in shown
    assert "| a | IQL | 13 +- 0 (2) | 12 +- 0 (2) | 15 +- 0 (2) | 1.25 | 3 of 6 |" in shown
    assert "| a | BC | 3 +- 0 (2) | 2 +- 0 (2) | 5 +- 0 (2) | 1.25 | 0 of 6 |" in shown
    assert "IQL would be chosen of 3." in shown and "regret" not in shown
    assert (tmp_path / "report.md").read_text() == shown


def test_the_table_of_logs_has_what_the_files_have(tmp_path, capsys):
    """Rivals alone have no anchor, and rivals of old no critics."""
    write_runs(tmp_path, {method: VALUES[method] for method in ("iql", "bc")})
    report.main(tmp_path)
    assert "| 15 +- 0 (2) | 1.25 |  |" in capsys.readouterr().out
    write_runs(tmp_path, {"spar": VALUES["spar"]})
    for path in tmp_path.glob("iql-*/results.json"):
        facts = json.loads(path.read_text())
        del facts["estimates"]["policy"]["critics"]
        path.write_text(json.dumps(facts))
    report.main(tmp_path)
    shown = capsys.readouterr().out
    assert "| 15 +- 0 (2) | 1.25 |  |" in shown and "| 4 of 6 |" in shown and "| 0 of 6 |" in shown


def test_the_anchor_counts_once_a_seed(tmp_path, capsys):
    """SPAR and its ablations share it; no_anchor has none of them."""
    write_runs(tmp_path, VALUES)
    for seed in (0, 1):
        facts = json.loads((tmp_path / f"spar-{seed}-None" / "results.json").read_text())
        for method, anchor in (("no_lsi", 11.0), ("no_anchor", 99.0)):
            facts["method"], facts["estimates"]["anchor"]["mean"] = method, anchor
            (tmp_path / f"{method}-{seed}").mkdir()
            (tmp_path / f"{method}-{seed}" / "results.json").write_text(json.dumps(facts))
    report.main(tmp_path)
    assert "| a | SPAR's anchor | 11 +- 0 (2) | 9 +- 0 (2) |" in capsys.readouterr().out


def test_a_table_of_spar_alone_is_printed_only(tmp_path, capsys):
    write_runs(tmp_path, {"spar": VALUES["spar"]})
    report.main(tmp_path)
    assert "| 4 of 6 |" in capsys.readouterr().out and not (tmp_path / "report.md").exists()


def test_the_table_is_of_the_policies_that_are_saved(tmp_path, capsys):
    write_runs(tmp_path, {"spar": {0: 10.0}, "iql": {0: 9.0}})
    path = tmp_path / "spar-0-None" / "results.json"
    facts = json.loads(path.read_text())
    facts["selected"] = {"support_distance": 1.03}
    facts["estimates"]["choice"] = "anchor"
    facts["estimates"]["anchor"] |= {"mean": 7.0, "low": 6.5, "high": 7.5}
    path.write_text(json.dumps(facts))
    report.main(tmp_path)
    shown = capsys.readouterr().out
    assert "| a | SPAR (head A) | 7 (1) | 6.5 (1) | 7.5 (1) | 1.03 |  |" in shown
    assert "IQL would be chosen of 2." in shown


def test_the_choice_costs_its_regret_where_scores_are_known(tmp_path, capsys):
    write_runs(tmp_path, VALUES, env="Hopper-v5", scores={"spar": 70.0, "iql": 64.5, "bc": 20.0})
    report.main(tmp_path)
    assert "IQL would be chosen of 3 (64.5 points, regret 5.5 to SPAR (head A))" in capsys.readouterr().out


def test_scores_and_values_are_not_mixed(tmp_path):
    write_runs(tmp_path, {"spar": {0: 1.0}})
    write_runs(tmp_path, {"iql": {0: 1.0}}, env="Hopper-v5", scores={"iql": 1.0})
    with pytest.raises(InputError, match="1 of 2 runs have no environment"):
        report.main(tmp_path)


def test_values_of_different_discounts_are_not_compared(tmp_path):
    write_runs(tmp_path, {"spar": {0: 1.0}, "iql": {0: 1.0}})
    path = tmp_path / "iql-0-None" / "results.json"
    path.write_text(path.read_text().replace("0.99", "0.9"))
    with pytest.raises(InputError, match=r"0\.9 and 0\.99"):
        report.main(tmp_path)


# ------------------------------------------------------------------ the page to sign


@pytest.fixture(scope="module")
def signed(finished):
    _, cwd = finished
    done = run("deployment_report", "run=result", "rows=3", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done, cwd / "result"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_no_other_file_and_has_everything(signed):
    done, out = signed
    text = (out / "deployment.html").read_text()
    page = Page(text)
    assert page.open == [] and len(page.links) == 4
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert "url(" not in text and "@import" not in text and "<script" not in text
    facts = json.loads((out / "deployment.json").read_text())
    for path in (out / "policy.pt", out / "results.json", out / "config.yaml", out.parent / "log.csv"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert facts["checksums"][path.name] == digest and digest in page.text
    assert hashlib.sha256((out / "deployment.json").read_bytes()).hexdigest() in page.text
    results = json.loads((out / "results.json").read_text())
    for name in ("data", "anchor", "spar"):
        assert f"{results['estimates'][name]['mean']:.4g}" in page.text
    for row in facts["checks"]:
        assert row["what"] in page.text and row["what"] in done.stdout


def test_the_farthest_rows_are_rows_of_the_log(signed):
    _, out = signed
    table = list(csv.DictReader((out.parent / "log.csv").open()))
    facts = json.loads((out / "deployment.json").read_text())
    policy, _ = load_policy(out / "policy.pt")
    farthest = facts["support"]["farthest"]
    assert len(farthest) == 3
    for row in farthest:
        source = table[row["row"]]
        assert (int(source["id"]), row["row"] % LENGTH) == (row["episode"], row["step"])
        assert row["observation"] == pytest.approx([float(source["x"]), float(source["v"])], rel=1e-5)
        assert row["action_of_data"] == pytest.approx([float(source["u"]), float(source["w"])], rel=1e-5)
        state = torch.tensor(row["observation"])
        assert row["policy"] == pytest.approx(policy(observation=state).tolist(), rel=1e-4, abs=1e-5)
        assert row["anchor"] == pytest.approx(policy.anchor(observation=state).tolist(), rel=1e-4, abs=1e-5)
    text = Page((out / "deployment.html").read_text()).text
    for row in farthest:
        state = [float(table[row["row"]][name]) for name in ("x", "v")]
        assert "x: {:.4g}, v: {:.4g}".format(*state) in text
    excess = [row["distance"] - row["of_data"] for row in farthest]
    assert excess == sorted(excess, reverse=True)


def test_residuals_and_rates_are_those_of_the_saved_policy(signed):
    _, out = signed
    table = np.genfromtxt(out.parent / "log.csv", delimiter=",", names=True)
    facts = json.loads((out / "deployment.json").read_text())
    policy, _ = load_policy(out / "policy.pt")
    state = torch.from_numpy(np.stack([table["x"], table["v"]], 1)).float()
    with torch.no_grad():
        action, anchor = policy(observation=state).double().numpy(), policy.anchor(observation=state).double().numpy()
    assert [*facts["residual"]] == [*facts["limits"]] == ["u", "w"]
    follows = np.diff(table["id"]) == 0
    for i, (name, width) in enumerate((("u", 80.0), ("w", 1.0))):
        residual, row = (action - anchor)[:, i], facts["residual"][name]
        assert row["quantiles"]["most"] == pytest.approx(residual.max(), rel=1e-3)
        assert row["quantiles"]["median"] == pytest.approx(np.median(residual), rel=0.05, abs=1e-3 * width)
        assert row["rms_share_of_range"] == pytest.approx(np.sqrt((residual**2).mean()) / width, rel=1e-3)
        assert sum(row["histogram"]) == len(table)
        limits = facts["limits"][name]
        for whose, actions in (("data", table[name]), ("policy", action[:, i])):
            change = np.abs(np.diff(actions))[follows]
            assert limits[whose]["rate"]["most"] == pytest.approx(change.max(), rel=1e-4)
            assert limits[whose]["size"]["least"] == pytest.approx(actions.min(), rel=1e-4)


def test_checks_ask_for_a_look_where_something_is_wrong(signed):
    _, out = signed
    facts = json.loads((out / "deployment.json").read_text())
    facts["estimates"] |= {"of": "spar", "gains": {"spar": {"mean": 2.0, "low": 1.0}}}
    for name, critics in (("spar", [3.0, 4.0]), ("anchor", [1.0, 2.0])):
        facts["estimates"][name]["critics"] = critics
    facts["support"]["share_beyond"]["policy"] = 0.04
    for row in facts["limits"].values():
        row["policy"]["rate"]["99%"], row["data"]["rate"]["99%"] = 1.0, 2.0
    facts["estimates"]["calibration"] |= {"bias": 0.1, "rmse": 0.5, "spread_of_returns": 1.0}

    def failing():
        return [i for i, row in enumerate(deployment.checks(facts)) if not row["holds"]]

    assert failing() == []
    for i, (section, key, value) in enumerate(
        [
            (facts["estimates"]["gains"]["spar"], "low", -0.1),
            (facts["estimates"]["spar"], "critics", [0.5, 4.0]),
            (facts["support"]["share_beyond"], "policy", 0.2),
            (facts["limits"]["w"]["policy"]["rate"], "99%", 3.0),
            (facts["estimates"]["calibration"], "bias", -0.5),
        ]
    ):
        before, section[key] = section[key], value
        assert failing() == [i]
        section[key] = before


def test_the_page_needs_a_finished_run_of_spar(tmp_path):
    with pytest.raises(InputError, match=r"config\.yaml"):
        deployment_report.main(compose_recipe("deployment_report", f"run={tmp_path}"))
    for name, content in (("config.yaml", "a: ["), ("policy.pt", ""), ("results.json", "{")):
        (tmp_path / name).write_text(content)
    for damaged in ("config", "results"):
        with pytest.raises(InputError, match=rf"{damaged}\.\w+: damaged"):
            deployment_report.main(compose_recipe("deployment_report", f"run={tmp_path}"))
        (tmp_path / "config.yaml").write_text("a: 1")


def test_options_of_evaluation_count_where_the_run_has_no_estimates(finished, tmp_path, monkeypatch):
    _, cwd = finished
    monkeypatch.chdir(cwd)
    shutil.copytree(cwd / "result", tmp_path / "result")
    asked = [f"run={tmp_path / 'result'}", "ope.gamma=0.5", "ope.steps=2", "ope.warm_steps=0"]
    with pytest.raises(InputError, match=r"ope: .*results\.json has estimates"):
        deployment_report.main(compose_recipe("deployment_report", *asked))
    results = json.loads((tmp_path / "result" / "results.json").read_text())
    del results["estimates"]
    (tmp_path / "result" / "results.json").write_text(json.dumps(results))
    deployment_report.main(compose_recipe("deployment_report", *asked))
    facts = json.loads((tmp_path / "result" / "deployment.json").read_text())
    assert (facts["evaluation"]["gamma"], facts["evaluation"]["steps"]) == (0.5, 2)
    estimates = facts["estimates"]
    assert estimates["data"]["mean"] == pytest.approx(2 * (1 - 0.5**LENGTH) / (1 - 0.5), rel=1e-5)


def test_long_states_are_folded(signed):
    _, out = signed
    facts = json.loads((out / "deployment.json").read_text())
    before = deployment_report.page(facts)
    facts["data"]["observation"] = {f"column {i}": facts["data"]["observation"]["x"] for i in range(21)}
    for row in facts["support"]["farthest"]:
        row["observation"] = [i + 0.123456 for i in range(21)]
    after = deployment_report.page(facts)
    folded = re.findall(r"<details><summary>state: 21 numbers</summary>(.*?)</details>", after)
    assert "numbers</summary>" not in before and len(folded) == 3
    shown = Page(folded[0]).text.split(", ")
    assert shown[0] == "column 0: 0.1235" and shown[20].strip() == "column 20: 20.12"


def test_versions_and_options_of_the_evaluation_are_the_runs_own(finished, tmp_path, monkeypatch):
    _, cwd = finished
    monkeypatch.chdir(cwd)
    shutil.copytree(cwd / "result", tmp_path / "result")
    path = tmp_path / "result" / "results.json"
    results = json.loads(path.read_text())
    evaluation = {"hidden": [8], "seed": 0, "steps": 4, "warm_steps": 4, "num_qvalue_nets": 5}
    evaluation |= {"held_out": 0.2, "confidence": 0.95, "gamma": 0.99}
    # Runs of old noted neither Python nor NumPy.
    for versions in ({"torch": "1.2.3", "python": "3.4.5", "numpy": "6.7.8"}, {"torch": "1.2.3"}):
        path.write_text(json.dumps(results | {"versions": versions}))
        deployment_report.main(compose_recipe("deployment_report", f"run={tmp_path / 'result'}"))
        facts = json.loads((tmp_path / "result" / "deployment.json").read_text())
        assert facts["versions"] == versions | {"commit": results["commit"]} and facts["evaluation"] == evaluation
        text = Page((tmp_path / "result" / "deployment.html").read_text()).text
        assert all(version in text for version in versions.values()) and platform.python_version() not in text
        assert all(f"{name}={value}" in text for name, value in evaluation.items())


def test_text_in_the_log_cannot_change_the_page(signed):
    _, out = signed
    facts = json.loads((out / "deployment.json").read_text())
    facts["run"]["dataset"] = "<script>alert(1)</script>"
    assert "<script" not in deployment_report.page(facts)
    assert re.search(r"&lt;script&gt;", deployment_report.page(facts))


# ------------------------------------------------------------------ the page "Your own robot"


@pytest.mark.slow
def test_the_commands_of_the_page_lead_to_a_policy(tmp_path):
    pytest.importorskip("onnxruntime")
    draw = np.random.default_rng(0)
    for name in ("log.csv", "new.csv"):
        lines = ["episode,x,y,vx,vy,ux,uy,reward,timeout"]
        for episode in range(12):
            numbers = np.cumsum(draw.normal(size=(20, 4)), 0)
            force = draw.uniform([-40, -20], [40, 20], (20, 2))
            for step in range(20):
                row = [episode, *numbers[step], *force[step], draw.normal(), int(step == 19)]
                lines.append(",".join(map(str, row)))
        (tmp_path / name).write_text("\n".join(lines))
    text = (RECIPES / "robot" / "README.md").read_text()
    block = re.search(r"^```sh\n(.*?)^```", text, flags=re.M | re.S)[1].replace("\\\n", "")
    commands = [shlex.split(line) for line in block.splitlines() if line.startswith("python")]
    assert len(commands) == 7
    for _, script, *options in commands:
        name = script.removeprefix("recipes/").removesuffix(".py")
        small = {"spar_d4rl": [*TINY, *FEW], "compare": [*SMALL, *FEW, "hydra/launcher=basic"], "evaluate": FEW[:2]}
        done = run(name, *options, *small.get(name, []), cwd=tmp_path)
        assert done.returncode == 0, (name, done.stdout, done.stderr)
    assert (tmp_path / "outputs" / "robot_spar" / "deployment.html").is_file()
    assert (tmp_path / "outputs" / "robot_deployed" / "policy.onnx").is_file()


def test_estimates_may_have_a_discount_of_their_own():
    cfg = compose_recipe("spar_d4rl", "spar.loss.gamma=0.9")
    assert log_values.fqe_options(cfg)["gamma"] == 0.9
    cfg.ope.gamma = 0.5
    assert log_values.fqe_options(cfg)["gamma"] == 0.5
    OmegaConf.set_struct(cfg, False)
    del cfg.ope["gamma"]  # as in the files of runs before the option
    assert log_values.fqe_options(cfg)["gamma"] == 0.9


def test_a_component_that_never_moves_does_not_drown_the_distance():
    rows = make_toy_data(episodes=20)[:].exclude("index")
    rows["action"][:, 1] = 0.3
    support = log_values.Support(load_offline_dataset(rows), 0.2, 0)

    def ending_with(last):
        act = lambda state: torch.tensor([0.0, last]).expand(len(state), 2)  # noqa: E731
        return TensorDictModule(act, ["observation"], ["action"])

    exact, near = (support.of_policy(ending_with(last)) for last in (0.3, 0.301))
    assert near < 1.1 * exact


def test_a_name_that_is_no_utf_8_has_its_figure(tmp_path):
    row = {"return_mean": 1.0, "normalized": 2.0}
    results = {
        "spar": row,
        "anchor": row,
        "data": row,
        "env": "Toy-v0",
        "dataset": os.fsdecode(b"l\xf6g.npz"),
        "seed": 0,
    }
    plot_learning_curve(tmp_path / "curve.png", [{"step": 1, **row}], results)
    assert (tmp_path / "curve.png").stat().st_size > 0
