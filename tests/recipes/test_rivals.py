"""The rivals' updates, the sweep that runs them, and the report of their runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SHARED, Started, assert_one_line, compose_recipe, run
from tensordict import TensorDict

from torchrl_spar import InputError, load_offline_dataset

pytest.importorskip("hydra")
import compare
import report
from harness import directory as sweep
from omegaconf import OmegaConf
from reporting import statistics as comparison
from reporting.runs import read_runs, write_table
from rivals import BUILDERS
from rivals.base import Problem
from rivals.batches import add_next_actions, keep_best_episodes, transform_rewards

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
BEST = torch.tensor([0.4, -0.3])
HIDDEN = [32, 32]


def configure(*overrides):
    return compose_recipe("compare", f"spar.loss.hidden={HIDDEN}", "batch_size=64", *overrides)


@pytest.fixture(scope="module")
def bandit():
    return make_bandit()


def make_bandit():
    """One-step episodes around the action (0, 0); the reward falls with the squared distance to BEST."""
    generator = torch.Generator().manual_seed(0)
    n = 1_000
    action = (0.4 * torch.randn(n, 2, generator=generator)).clamp(-1, 1)
    observation = torch.randn(n, 3, generator=generator)
    outcome = {
        "observation": observation, "reward": 1 - (action - BEST).pow(2).sum(-1, keepdim=True),
        "terminated": torch.ones(n, 1, dtype=torch.bool),
    }  # fmt: skip
    return load_offline_dataset(
        TensorDict({"observation": observation, "action": action, "next": outcome}, [n]), batch_size=64
    )


def build_rival(data, updates, *overrides):
    """A rival before its first update."""
    torch.manual_seed(0)
    cfg = configure(f"spar.updates={updates}", "anchor.steps=30", "vae.steps=30", "critics.steps=60", *overrides)
    rival = BUILDERS[cfg.method.algorithm](
        Problem(data, cfg, torch.device("cpu")), **compare.method_options(cfg.method, "toy")
    )
    unlogged = SimpleNamespace(add_result=lambda *result: None)
    whole = dict(keep=lambda name, part: part, progress=None)  # not to be gone on with
    rival.pretrain(SimpleNamespace(cfg=cfg, data=data, seed=0, phase=lambda name: None, scores=unlogged, **whole))
    return rival


def train(data, updates, *overrides):
    """A rival trained on the data: what it logged, and the distance of its actions to the best one."""
    rival, rows = build_rival(data, updates, *overrides), []
    for _ in range(updates):
        rows.append({name: float(value) for name, value in rival(rival.data.sample()).items()})
    assert set().union(*rows) <= set(rival.columns)
    with torch.no_grad():
        action = rival.policy(data[:].select("observation"))["action"]
    return rows, (action - BEST).norm(dim=-1).mean().item()


FAST = ["method.actor_lr=3e-3", "method.qvalue_lr=3e-3"]
LEARNERS = {
    "bc10": ["method.lr=3e-3"],
    "td3_bc": FAST,
    "td3_bc_critics": FAST,
    "iql": ["method.lr=3e-3", "method.temperature=5", "method.reward.by_return_range=false"],
    "cql": [*FAST, "method.min_q_weight=0.1", "method.num_random=2"],
    "rebrac": [*FAST, "method.actor_penalty=0.1", "method.batch_size=64"],
    "rebrac_critics": [*FAST, "method.actor_penalty=0.1"],
    "spar_iql": ["method.lr=3e-3", "method.temperature=5", "method.by_return_range=false"],
}


@pytest.fixture(scope="module")
def cloned(bandit):
    return train(bandit, 300, "method=bc", "method.lr=3e-3")


def test_cloning_answers_with_the_mean_action(bandit, cloned):
    rows, distance = cloned
    assert np.mean([row["loss_bc"] for row in rows[-20:]]) < np.mean([row["loss_bc"] for row in rows[:20]])
    assert distance == pytest.approx((bandit[:]["action"].mean(0) - BEST).norm().item(), abs=0.1)


@pytest.mark.parametrize("method", LEARNERS)
def test_every_rival_learns_and_ends_nearer_to_the_best_action_than_cloning(method, bandit, cloned):
    rows, distance = train(bandit, 200, f"method={method}", *LEARNERS[method])
    assert all(np.isfinite(value) for row in rows for value in row.values())
    # The others' critics are there before the first update.
    if "loss_qvalue" in rows[0] and method not in ("spar_iql", "td3_bc_critics", "rebrac_critics"):
        assert np.mean([row["loss_qvalue"] for row in rows[-20:]]) < np.mean([row["loss_qvalue"] for row in rows[:20]])
    assert distance < 0.8 * cloned[1]


def episodes(*returns, length=3):
    """Episodes of equal rewards that add up to the returns; every other one is terminated, the rest cut off."""
    n = len(returns) * length
    last = torch.arange(n).unsqueeze(-1) % length == length - 1
    number = torch.arange(n).unsqueeze(-1) // length
    outcome = {
        "observation": torch.randn(n, 3), "terminated": last & (number % 2 == 0), "truncated": last & (number % 2 == 1),
        "reward": torch.tensor(returns).repeat_interleave(length).view(-1, 1) / length,
    }  # fmt: skip
    observation = torch.arange(1.0, n + 1).view(-1, 1).expand(n, 3)
    action = torch.linspace(-0.9, 0.9, n).view(-1, 1).expand(n, 2)
    return load_offline_dataset(TensorDict({"observation": observation, "action": action, "next": outcome}, [n]))


def test_ten_percent_are_the_best_episodes():
    returns = [float(x) for x in np.random.default_rng(0).permutation(40)]
    best = {index for index, value in enumerate(returns) if value >= 36}
    kept = keep_best_episodes(episodes(*returns), 0.1)
    assert set(kept[:]["episode"].tolist()) == best and len(kept[:]) == 3 * 4
    assert torch.equal(kept.source_rows, kept[:]["observation"][:, 0].long() - 1)
    assert len(keep_best_episodes(episodes(*returns[:5]), 0.1)[:]) == 3
    with pytest.raises(InputError, match="share"):
        keep_best_episodes(episodes(1.0), 0.0)


@pytest.mark.skipif(not (SHARED / "antmaze-umaze-diverse-regen.hdf5").exists(), reason="needs ../shared")
@pytest.mark.parametrize("ended", [False, True])
def test_ten_percent_of_antmaze_are_whole_roll_outs_that_succeed(ended):
    """Every row at the goal is terminal there: counted by flags, the best tenth would be rows at the goal alone."""
    h5py = pytest.importorskip("h5py")
    path = SHARED / "antmaze-umaze-diverse-regen.hdf5"
    with h5py.File(path) as file:
        names = ("observations", "rewards", "terminals", "timeouts")
        observation, reward, terminal, timeout = (file[name][()] for name in names)
    rollouts, rows = [], []
    for row in range(len(reward)):  # a roll-out is what lies between timeouts
        rows.append(row)
        if timeout[row] or row == len(reward) - 1:
            rollouts.append(rows)
            rows = []
    successful = [rows for rows in rollouts if any(reward[row] > 0 for row in rows)]
    assert 15 == len(rollouts) // 10 < len(successful)
    expected = [row for rows in successful[:15] for row in rows if row != rows[-1] or terminal[row]]
    kept = keep_best_episodes(load_offline_dataset(path, end_at_success=ended), 0.1)
    np.testing.assert_array_equal(kept[:]["observation"], observation[expected].astype(np.float32))


def test_rewards_are_scaled_to_the_range_of_the_returns():
    data = episodes(1.0, 5.0, 3.0)
    assert transform_rewards(data) is data
    found = transform_rewards(data, by_return_range=True, scale=2.0, shift=-1.0)[:]["next", "reward"]
    torch.testing.assert_close(found, 2 * 250 * data[:]["next", "reward"] - 1)
    with pytest.raises(InputError, match="by_return_range"):
        transform_rewards(episodes(2.0, 2.0), by_return_range=True)


def test_next_action_is_the_next_rows_and_a_cut_off_row_is_dropped():
    data = episodes(1.0, 2.0)  # rows 0 1 2 terminated, rows 3 4 5 cut off
    rows, action = add_next_actions(data)[:], data[:]["action"]
    torch.testing.assert_close(rows["action"], action[:5])
    torch.testing.assert_close(rows["next", "action"][[0, 1, 3, 4]], action[[1, 2, 4, 5]])
    assert ("next", "action") not in data[:].keys(True)


@pytest.mark.parametrize("method", ["td3_bc_critics", "rebrac_critics"])
def test_spars_critics_start_at_the_returns_and_their_rates_fall_to_zero(method, bandit):
    rival = build_rival(bandit, 20, f"method={method}", "critics.steps=600", "critics.lr=3e-3")
    loss, rows = rival.loss, bandit[:]
    returns = rows["next", "reward"].squeeze(-1)  # each episode is one step
    with torch.no_grad():
        for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
            values = loss._values(rows, rows["action"], params) / loss.reward_scale
            residual = (values - returns).pow(2).mean(-1)
            assert (residual < 0.2 * returns.var()).all() and len(values) == 4
    assert loss.reward_scale.item() == pytest.approx(1 / returns.std().item(), rel=1e-5)
    for _ in range(20):
        rival(rival.data.sample())
    assert [step.optimizer.param_groups[0]["lr"] for step in rival.steps] == pytest.approx([0, 0], abs=1e-9)


def test_a_task_has_its_published_values():
    def penalties(dataset, method="rebrac_tuned"):
        options = compare.method_options(configure(f"method={method}").method, dataset)
        return options["actor_penalty"], options["critic_penalty"], options["qvalue_lr"], options["batch_size"]

    assert penalties("minari:spar/hopper/medium-v0") == (0.01, 0.01, 1e-3, 1024)
    assert penalties("data/hopper_medium_replay-v2.hdf5") == (0.05, 0.5, 1e-3, 1024)
    assert penalties("data/hopper_medium_replay-v2.hdf5", "rebrac") == (0.01, 0.01, 1e-3, 1024)
    assert penalties("door/antmaze-umaze/hopper_medium_replay-v2.hdf5") == (0.05, 0.5, 1e-3, 1024)  # not of folders
    assert penalties("minari:D4RL/pen/human-v2") == (0.1, 0.5, 3e-4, 256)
    assert penalties("minari:D4RL/antmaze/umaze-diverse-v1") == (0.003, 0.001, 5e-5, 256)
    assert penalties("minari:D4RL/antmaze/umaze-diverse-v1", "rebrac_critics") == (0.01, 0.01, 5e-4, None)
    cfg = configure("method=iql", "method.tasks=null", "method.temperature=7").method
    assert compare.method_options(cfg, "minari:D4RL/antmaze/umaze-v1")["temperature"] == 7


# ------------------------------------------------------------------ the sweep


TINY = ["preset=smoke", "spar.loss.hidden=[8]", "anchor.steps=5", "vae.steps=5", "critics.steps=5", "batch_size=8"]
TINY += ["eval.episodes=1", "eval.final_episodes=2", "eval.background=false"]


def without_times(out):
    results = json.loads((out / "results.json").read_text())
    return {key: value for key, value in results.items() if key not in ("updates_per_second", "wall_seconds")}


def runs_of(cwd, method):
    return sorted((cwd / "runs").glob(f"*/{method}/seed*"))


def test_a_killed_sweep_goes_on(tmp_path):
    options = [*TINY, "spar.updates=60", "eval.interval=20"]
    sweep_of = [*options, "runs=runs", "method=spar,spar_latent,spar_iql", "seed=0", "hydra.launcher.n_jobs=1"]
    started = Started("compare", *sweep_of, cwd=tmp_path)
    first, second, third = (
        tmp_path / "runs" / "torchrl-spar-hopper-medium-v0" / method / "seed0"
        for method in ("spar", "spar_latent", "spar_iql")
    )
    try:
        started.until((second / "metrics.csv").exists)
    finally:
        started.kill()
    assert not (second / "results.json").exists()
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in first.iterdir()}

    done = run("compare", *sweep_of, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{first.relative_to(tmp_path)}: finished before" in done.stdout
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in first.iterdir()}
    one, other, extracted = (json.loads((out / "results.json").read_text()) for out in (first, second, third))
    assert [run["method"] for run in (one, other, extracted)] == ["spar", "spar_latent", "spar_iql"]
    # One seed, one anchor, whatever the head and whatever is drawn from the critic.
    assert one["anchor"] == other["anchor"] == extracted["anchor"] and one["spar"] != other["spar"]
    assert [row["step"] for row in other["curve"]] == [0, 20, 40, 60]

    # A wrong option ends in one line, after the other runs, and leaves nothing.
    done = run("compare", *sweep_of, "dataset=nowhere.npz,embedded", "method=bc", cwd=tmp_path)
    assert_one_line(done, "error: nowhere.npz: no such file")
    (out,) = runs_of(tmp_path, "bc")
    found = json.loads((out / "results.json").read_text())
    assert set(found) == set(one) - {"anchor", "spar", "members", "critics_values"} | {"policy"}
    assert found["data"] == one["data"] and found["updates"] == 60

    # The main job is the same run, to the bit.
    done = run("spar_d4rl", *options, "spar.members=1", "seed=0", "out=alone", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert without_times(tmp_path / "alone") == without_times(first)
    assert (tmp_path / "alone" / "metrics.csv").read_text() == (first / "metrics.csv").read_text()


def test_the_processes_of_a_sweep_check_the_options(tmp_path):
    command = [sys.executable, str(RECIPES / "compare.py"), *TINY, "runs=runs", "method=bc", "seed=0,1"]
    command += ["hydra.launcher.n_jobs=2", "spar.updates=0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert_one_line(done, "spar.updates=0: must be a number from 1 on")
    assert not any(tmp_path.rglob("seed*"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("method=td3_bc +method.critics.nmu=7", "method.critics.nmu: no such option, did you mean method.critics.num?"),
        ("method=iql +method.reward.scle=7", "method.reward.scle: no such option, did you mean method.reward.scale?"),
        ("method=rebrac +method.alpa=7", "method.alpa: no such option"),
    ],
)
def test_unknown_options_of_a_method_are_named(given, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        compare.start(compose_recipe("compare", *TINY, *given.split()), 0, tmp_path / "out")


def test_a_finished_run_with_other_options_is_refused(tmp_path):
    cfg = OmegaConf.create(
        {"runs": "a", "out": "b", "seed": 1, "spar": {"updates": 5, "lr": 1e-3}, "eval": {"background": False}}
    )
    out = tmp_path / "seed1"
    assert not sweep.is_finished(out, cfg)
    out.mkdir()
    assert not sweep.is_finished(out, cfg)
    (out / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    (out / "results.json").write_text("{}")
    cfg.runs, cfg.eval.background = "elsewhere", True
    assert sweep.is_finished(out, cfg)
    cfg.spar.updates = 6
    with pytest.raises(InputError, match=r"seed1: .*\(spar\.updates\)"):
        sweep.is_finished(out, cfg)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match="mine"):
        sweep.is_finished(tmp_path / "mine", cfg)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_two_processes_never_do_the_same_run(tmp_path, capsys):
    out, order = tmp_path / "seed0", []

    def other():
        with sweep.claim(out, wait=True):
            order.append("other")

    with sweep.claim(out, wait=True):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]
    assert f"{out}: another process is at it" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.skipif(find_spec("hydra_plugins.hydra_ray_launcher") is None, reason="hydra-ray-launcher is not installed")
def test_the_same_sweep_on_ray(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    options = ["hydra/launcher=ray", "+hydra.launcher.ray.init={num_cpus: 2, include_dashboard: false}"]
    done = run("compare", *TINY, "runs=runs", "method=bc,iql", "seed=0", *options, cwd=tmp_path, HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert "_run_job" in done.stdout + done.stderr  # Ray's name of its worker, before what the run prints
    for method in ("bc", "iql"):
        (out,) = runs_of(tmp_path, method)
        assert json.loads((out / "results.json").read_text())["method"] == method


# ------------------------------------------------------------------ the report


def write_runs(folder, scores, **others):
    """Results of scores[method][data set][seed]; seed 1 of SPAR on a ends four points below its anchor."""
    for method, by_dataset in scores.items():
        for dataset, by_seed in by_dataset.items():
            for seed, score in by_seed.items():
                row = {"normalized": score}
                spar = {"anchor": {"normalized": score + 4 * (dataset == "a" and seed == 1)}, "spar": row}
                facts = {
                    "dataset": dataset, "env": "Hopper-v5", "method": method, "seed": seed, "updates": 10,
                    "data": {"normalized": 5.0}, "episodes": 2, "curve": [{"step": 0, **row}, {"step": 10, **row}],
                    **(spar | others if method == "spar" else {"policy": row}),
                }  # fmt: skip
                out = folder / f"{method}-{dataset}-{seed}"
                (out / "checkpoints").mkdir(parents=True)
                (out / "checkpoints" / "sha256.json").write_text("{}")  # of a run that goes on
                (out / "results.json").write_text(json.dumps(facts))


SCORES = {
    "spar": {"a": {0: 10.0, 1: 30.0}, "b": {0: 50.0, 1: 90.0}},
    "iql": {"a": {0: 20.0, 1: 20.0}, "b": {0: 40.0, 1: 60.0}},
}


def test_report_of_several_methods_by_hand(tmp_path, capsys):
    write_runs(tmp_path, SCORES)
    report.main(tmp_path)
    found = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out == found
    assert "| method | a | b | IQM | P(SPAR (head A) is better) |" in found
    assert "| the data | 5.0 | 5.0 |  |  |" in found
    assert "| SPAR's anchor | 22.0 +- 17.0 (2) | 70.0 +- 28.3 (2) |  |  |" in found
    # IQM: the middle two of 10 30 50 90 and of 20 20 40 60. On a one run of two is better, on b three pairs of four.
    statistics = comparison.Comparison(read_runs(tmp_path))
    means, improvement = statistics.interquartile_means(), statistics.improvements()["iql"]
    assert (means["spar"].point, means["iql"].point) == (40.0, 30.0)
    assert improvement.point == pytest.approx((0.5 + 0.75) / 2)
    # The extremes of resampling each data set's two seeds.
    assert (means["spar"].low, means["spar"].high) == (30.0, 60.0)
    assert f"| SPAR (head A) | 20.0 +- 14.1 (2) | 70.0 +- 28.3 (2) | {means['spar']} | - |" in found
    assert (
        f"| IQL | 20.0 +- 0.0 (2) | 50.0 +- 14.1 (2) | {means['iql']} | {statistics.improvements()['iql']} |" in found
    )
    # By seed: -10 and 10 on a, 10 and 30 on b; of 16 changes of sign those with a sum of at least 40.
    pairs = "| IQL | 0.0 +- 14.1 (2) | 20.0 +- 14.1 (2) | 10.00 ["
    (line,) = (line for line in found.splitlines() if line.startswith(pairs))
    assert line.endswith("| 0.25 |") and "| SPAR (head A) less | a | b | mean of the sets | p |" in found
    assert "SPAR ends more than 3 points below its anchor in 1 of 4 runs: a, seed 1 (34.0 to 30.0)." in found
    shares, _ = statistics.profiles(np.array([0.0, 45.0, 100.0]))
    assert shares["spar"].tolist() == [1.0, 0.5, 0.0]
    for name in ("learning_curves", "interquartile_means", "performance_profiles", "improvement"):
        assert f"({name}.png)" in found
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_several_members_are_a_row_of_their_own(tmp_path, capsys):
    write_runs(tmp_path / "one", SCORES)
    better = {"spar": {name: {seed: score + 5 for seed, score in of.items()} for name, of in SCORES["spar"].items()}}
    write_runs(tmp_path / "three", better, members=3)
    report.main(tmp_path / "one", tmp_path / "three")
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| SPAR (head A)") and " less " not in line]
    assert rows[0].startswith("| SPAR (head A) | 20.0 +- 14.1 (2) |")
    assert rows[1].startswith("| SPAR (head A), mean of 3 | 25.0 +- 14.1 (2) |")
    assert rows[2].startswith("| SPAR (head A), mean of 3 | -5.0 +- 0.0 (2) | -5.0 +- 0.0 (2) | -5.00 [")
    below = "ends more than 3 points below its anchor in 1 of 4 runs: a, seed 1"
    assert f"SPAR {below} (34.0 to 30.0)." in lines
    assert f"SPAR (head A), mean of 3 members {below} (39.0 to 35.0)." in lines


def test_without_a_single_member_the_mean_is_what_others_are_compared_with(tmp_path, capsys):
    write_runs(tmp_path / "rival", {"iql": SCORES["iql"]})
    write_runs(tmp_path / "three", {"spar": SCORES["spar"]}, members=3)
    report.main(tmp_path / "rival", tmp_path / "three")
    found = capsys.readouterr().out
    assert "| P(SPAR (head A), mean of 3 is better) |" in found and "| SPAR (head A), mean of 3 less | a |" in found
    assert "| SPAR's anchor | 22.0 +- 17.0 (2) |" in found and found.index("| IQL |") < found.index("mean of 3 | 20.0")
    assert comparison.Comparison(read_runs(tmp_path)).improvements().keys() == {"iql"}
    report.main(tmp_path / "three")
    assert capsys.readouterr().out.startswith("| data set | seeds | data | anchor | SPAR, mean of 3 |\n")


def test_report_of_one_data_set_has_no_statistics_over_sets(tmp_path, capsys):
    write_runs(tmp_path, {method: {"a": sets["a"]} for method, sets in SCORES.items()})
    report.main(tmp_path)
    assert "| method | a |\n| --- | --- |\n| the data | 5.0 |\n" in capsys.readouterr().out
    assert not (tmp_path / "improvement.png").exists()


def test_further_sources_count_on_the_firsts_data_sets(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    write_runs(tmp_path / "mine", {"iql": {"a": SCORES["iql"]["a"]}})
    write_runs(tmp_path / "theirs", SCORES | {"bc": SCORES["iql"]})
    report.main(tmp_path / "mine", tmp_path / "theirs@spar")
    printed = capsys.readouterr().out
    assert "| method | a |" in printed and "| SPAR (head A) | 20.0 +- 14.1 (2) |" in printed and "BC" not in printed


def test_runs_of_different_budgets_are_refused(tmp_path):
    write_runs(tmp_path, SCORES)
    changed = tmp_path / "iql-b-0" / "results.json"
    changed.write_text(json.dumps({**json.loads(changed.read_text()), "updates": 11}))
    with pytest.raises(InputError, match="runs of 10 and 11 updates are not comparable"):
        report.main(tmp_path)


def test_a_table_holds_the_runs_and_gives_their_report(tmp_path, capsys):
    fresh = tmp_path / "fresh"
    for seed, score in ((0, 123.456), (1, 30.0)):
        for method, lr in (("iql", 0.1), ("bc", 0.2)):
            out = fresh / "a" / method / f"seed{seed}"
            out.mkdir(parents=True)
            row = {"return_mean": 2 * score, "return_std": 1.0, "normalized": score}
            run = {"dataset": "x/pen/human", "env": "E-v1", "method": method, "seed": seed, "updates": 4, "policy": row}
            run |= {"data": row, "episodes": 2, "curve": [{"step": 0, **row}, {"step": 4, **row}]}
            (out / "results.json").write_text(json.dumps(run))
            own = {"name": method, "algorithm": method, "lr": lr, "tasks": {"pen": {"lr": 7 * lr}, "door": {"lr": 9.0}}}
            cfg = {"seed": seed, "out": str(out), "method": own, "spar": {"updates": 4, "loss": {"hidden": [8, 8]}}}
            (out / "config.yaml").write_text(json.dumps(cfg))
    table = tmp_path / "table" / "runs.jsonl"
    table.parent.mkdir()
    assert write_table(table, [fresh]) == 4
    assert len(table.read_text().splitlines()) == 5
    runs = read_runs(table)
    assert [(run["method"], run["seed"], run["policy"]["normalized"]) for run in runs] == [
        ("bc", 0, 123.456), ("bc", 1, 30.0), ("iql", 0, 123.456), ("iql", 1, 30.0),
    ]  # fmt: skip
    # The options of the data set's own task, and those that all runs share.
    assert runs[2]["options"]["method.lr"] == pytest.approx(0.7)
    assert runs[2]["options"]["spar.loss.hidden"] == [8, 8] and "out" not in runs[2]["options"]
    one = tmp_path / "one.jsonl"
    assert write_table(one, [Path(f"{fresh}@bc")]) == 2 and {run["method"] for run in read_runs(one)} == {"bc"}
    with pytest.raises(InputError, match=f"{fresh}@cql: no finished run"):
        write_table(one, [fresh, Path(f"{fresh}@cql")])
    report.main(fresh)
    of_directories = capsys.readouterr().out
    report.main(table.parent)
    assert capsys.readouterr().out == of_directories
    table.write_text(table.read_text().replace("updates", "update\n"))
    with pytest.raises(InputError, match=r"runs\.jsonl: not a table"):
        read_runs(table)


def test_report_says_what_its_statistics_leave_out(tmp_path):
    scores = {method: {name: dict(seeds) for name, seeds in sets.items()} for method, sets in SCORES.items()}
    del scores["iql"]["b"][1]
    write_runs(tmp_path, scores)
    found = comparison.Comparison(read_runs(tmp_path))
    assert found.left_out() == ["a (seed 1): IQL"] and "a (seed 1): IQL" in found.markdown()
    assert found.scores()["iql"].tolist() == [[20.0, 40.0]]
    # On a one run of two is better, on b both; one seed has no spread to resample.
    assert "| 40.0 (1) | 30.00 (one seed) | 0.75 (one seed) |" in found.markdown()


def test_report_refuses_what_is_not_comparable(tmp_path):
    write_runs(tmp_path, SCORES)
    runs = read_runs(tmp_path)
    with pytest.raises(InputError, match="twice"):
        comparison.Comparison([*runs, runs[0]])
    with pytest.raises(InputError, match="updates"):
        comparison.Comparison([*runs, {**runs[0], "seed": 7, "updates": 11}])
    with pytest.raises(InputError, match="runs of episodes 2 and 3 are not comparable"):
        comparison.Comparison([*runs, {**runs[0], "seed": 7, "episodes": 3}])
    with pytest.raises(InputError, match="runs of evaluations at"):
        comparison.Comparison([*runs, {**runs[0], "seed": 7, "curve": runs[0]["curve"][:-1]}])
    known = {**runs[0], "rows_sha256": "one"}
    for other in ({"env": "Hopper-v4"}, {"env_kwargs": {"max_episode_steps": 50}}, {"rows_sha256": "two"}):
        with pytest.raises(InputError, match=f"runs of {next(iter(other))} "):
            report.check_comparable([known, *runs[1:], {**known, "seed": 7, **other}])


def test_one_run_makes_a_table_and_a_folder_is_the_runs_own(tmp_path, capsys):
    write_runs(tmp_path / "mine", {"iql": {"a": {0: 20.0}}})
    out = tmp_path / "mine" / "iql-a-0"
    (out / "config.yaml").write_text("method: {name: iql, algorithm: iql}")
    table = tmp_path / "runs.jsonl"
    assert write_table(table, [tmp_path / "mine"]) == 1
    assert read_runs(table)[0]["curve"] == [{"step": 0, "normalized": 20.0}, {"step": 10, "normalized": 20.0}]
    report.main(Path(f"{tmp_path / 'mine'}@iql"))
    assert (tmp_path / "mine" / "report.md").is_file() and not (tmp_path / "report.md").exists()
    write_runs(tmp_path / "theirs", {"iql": {"b": {0: 20.0}}})
    with pytest.raises(InputError, match="theirs: has no run on a data set of"):
        report.main(tmp_path / "mine", tmp_path / "theirs")
    (out / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results\.json: not a results file"):
        write_table(table, [tmp_path / "mine"])
