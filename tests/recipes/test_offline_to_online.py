"""From offline to online: the transitions against the environment, the shares of batches, the curve, the recipe."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers import RECIPES, compose_recipe, run
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded

from torchrl_spar import InputError, evaluate, load_offline_dataset, make_env

pytest.importorskip("hydra")
import gymnasium
from harness.actors import read_actor
from harness.scores import CURVE_SEED
from omegaconf import OmegaConf
from online.collecting import make_collector, make_torchrl_env, with_noise
from online.curves import describe, report, start_of
from online.phase import check, count_updates, go_online
from online.replay import anneal, make_replay_buffer
from online.warm_start import check_warm_start, warm_start
from rivals import td3_bc
from rivals.base import Problem

HOPPER = Bounded(-1, 1, (3,))
CPU = torch.device("cpu")


class Counter(gymnasium.Env):
    """Adds the action to where it is; ends beyond 1, which the registry's limit of 7 steps may come before."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-0.5, 0.5)
        return np.array([self.place, 0.0]), {}

    def step(self, action):
        self.place += 0.3 * float(action[0])
        return np.array([self.place, float(action[0])]), self.place, self.place > 1, False, {}


gymnasium.register("OnlineCounter-v0", lambda **kwargs: Counter(**kwargs), max_episode_steps=7)


def constant(value, size=1, inputs=2):
    module = torch.nn.Linear(inputs, size)
    torch.nn.init.zeros_(module.weight)
    torch.nn.init.constant_(module.bias, value)
    return TensorDictModule(module, ["observation"], ["action"])


def collect(policy, env_id, frames, per_batch=20, backend="direct", seed=3):
    cfg = OmegaConf.create({"backend": backend, "workers": 2, "frames_per_batch": per_batch})
    collector = make_collector(cfg, policy, env_id, {}, total_frames=frames, seed=seed, device=CPU)
    try:
        return torch.cat([batch.reshape(-1).clone() for batch in collector])
    finally:
        collector.shutdown()


def test_transitions_are_the_environments_own():
    """Every episode is stepped again by hand, from its first state and with the recorded actions."""
    pytest.importorskip("mujoco")
    torch.manual_seed(0)
    policy = TensorDictModule(torch.nn.Linear(11, 3), ["observation"], ["action"])
    rows = collect(with_noise(policy, HOPPER, 0.3), "Hopper-v5", 100)
    env = make_env("Hopper-v5").unwrapped
    fresh, ends = True, 0
    for row in rows:
        if fresh:
            env.reset(seed=0)
            # Hopper observes all of its state but x, on which nothing depends, and clips velocities at 10.
            state = row["observation"].double().numpy()
            env.set_state(np.concatenate([[0.0], state[:5]]), state[5:])
        observation, reward, terminated, *_ = env.step(row["action"].numpy())
        # The record is not looked at again: rounding to float32 enters at the start of an episode alone.
        assert np.allclose(row["next", "observation"], observation, atol=1e-3)
        assert row["next", "reward"].item() == pytest.approx(reward, abs=1e-3)
        assert row["next", "terminated"].item() == terminated
        fresh = row["next", "done"].item()
        ends += fresh
    assert ends >= 2
    follows = ~rows["next", "done"][:-1, 0]
    assert torch.equal(rows["next", "observation"][:-1][follows], rows["observation"][1:][follows])
    env.close()


@pytest.mark.parametrize("push, length, flag", [(1.0, None, "terminated"), (-1.0, 7, "truncated")])
def test_ends_are_told_apart(push, length, flag):
    rows = collect(constant(push), "OnlineCounter-v0", 60)
    place = rows["next", "observation"][:, 0]
    assert torch.equal(rows["next", "terminated"][:, 0], place > 1)
    done = rows["next", "done"][:, 0]
    assert torch.equal(rows["next", flag], rows["next", "done"]) and done.sum() >= 3
    if length:
        assert done.nonzero()[:, 0].tolist() == list(range(length - 1, 60, length))
    # The outcome of an end is the state it ended in, not that of the next start.
    assert torch.allclose(place, rows["observation"][:, 0] + 0.3 * push, atol=1e-6)


def test_noise_has_the_asked_size_and_keeps_the_bounds():
    spec = Bounded(torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 1.0]))
    state = TensorDict({"observation": torch.zeros(20_000, 2)}, [20_000])
    action = with_noise(constant(0.0, 2), spec, 0.1)(state.clone())["action"]
    assert action.std(0).tolist() == pytest.approx([0.2, 0.1], rel=0.05)
    action = with_noise(constant(0.9, 2), spec, 1.0)(state)["action"]
    assert (action.abs() <= torch.tensor([2.0, 1.0])).all() and (action[:, 1] == 1).float().mean() > 0.4


def offline_rows(n=50):
    """Data that can be told from anything collected: its observations are 1000 and more."""
    flag = torch.zeros(n, 1, dtype=torch.bool)
    step = {"reward": torch.zeros(n, 1), "terminated": flag}
    observation = 1000 + torch.arange(2.0 * n).view(n, 2)
    data = TensorDict(
        {"observation": observation, "action": torch.full((n, 1), 0.5), "next": {"observation": observation, **step}},
        [n],
    )
    return load_offline_dataset(data, batch_size=40, action_spec=Bounded(-1, 1, (1,)))


class Recorder:
    """Stands for a method: keeps what it is given, and moves its policy by a hundredth an update."""

    def __init__(self):
        self.policy, self.batches = constant(0.0), []

    def __call__(self, batch):
        self.batches.append(batch.clone())
        self.policy.module.bias.data += 0.01
        return {"loss_qvalue": torch.zeros(())}


class Rows:
    def __init__(self):
        self.steps = []

    def write(self, phase, step, metrics):
        assert phase == "online"
        self.steps.append(step)


def run_online(*overrides):
    data = offline_rows()
    cfg = compose_recipe(
        "spar_offline_to_online", "batch_size=40", "online.steps=200", "collector.frames_per_batch=20",
        "online.eval_interval=100", "online.eval_episodes=2", "online.first_update=40", *overrides,
    )  # fmt: skip
    check(cfg)
    update = Recorder()
    run = type("Run", (), dict(
        cfg=cfg, seed=0, data=data, device=CPU, env="OnlineCounter-v0", env_kwargs={}, log=Rows(), method="recorder",
    ))  # fmt: skip
    return go_online(run, update.policy, update), update, run


def test_batches_hold_the_configured_share_of_the_data():
    _, update, run = run_online("online.offline_share.start=0.8", "online.offline_share.end=0.2")
    # After 60, 80, ..., 200 steps, 20 updates each.
    assert run.log.steps == list(range(60, 201, 20)) and len(update.batches) == 160 == count_updates(run.cfg)
    counts = [int((batch["observation"][:, 0] >= 1000).sum()) for batch in update.batches]
    expected = [round(40 * (0.8 - 0.6 * step / 200)) for step in run.log.steps for _ in range(20)]
    assert counts == expected and counts[-1] == 8
    for batch in update.batches:
        online = batch[batch["observation"][:, 0] < 1000]
        assert torch.allclose(online["next", "observation"][:, 1:], online["action"])
        assert torch.equal(online["next", "reward"], online["next", "observation"][:, :1])


def test_a_constant_share_stays():
    _, update, _ = run_online("online.offline_share.start=0.5", "online.offline_share.end=0.5")
    assert {int((batch["observation"][:, 0] >= 1000).sum()) for batch in update.batches} == {20}


def test_anneal_is_a_line_between_the_shares():
    buffer = make_replay_buffer(offline_rows(), start=0.6, capacity=10, batch_size=10, device=CPU)
    for step, share in [(0, 0.6), (25, 0.5), (50, 0.4), (100, 0.2)]:
        anneal(buffer, step, 100, start=0.6, end=0.2)
        assert buffer.offline_fraction == pytest.approx(share)


def test_collected_actions_are_those_of_the_updated_policy():
    """Without exploration the newest actions tell which weights the collector had."""
    _, update, _ = run_online("online.exploration_noise=0", "online.updates_per_step=0.25", "online.first_update=0")
    # Five updates of 0.01 after every 20 steps: what is collected before the n-th round has the weights of n - 1.
    final = update.batches[-1]
    actions = final["action"][final["observation"][:, 0] < 1000]
    rounds = actions / 0.05
    assert torch.allclose(rounds, rounds.round(), atol=1e-3)
    assert {int(n) for n in rounds.round()} <= set(range(10)) and rounds.max().round() >= 7


RAY = pytest.param("ray", marks=pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"))


@pytest.mark.parametrize("backend", ["process", RAY])
def test_workers_get_the_weights_own_noise_and_give_whole_batches(backend, monkeypatch):
    # For Ray's workers, which know nothing of pytest's own paths.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(RECIPES), str(RECIPES.parent)]))
    policy = constant(0.0, inputs=3)
    explorer = with_noise(policy, Bounded(-2, 2, (1,)), 0.1)
    # What one worker of the same seed draws with the first weights.
    alone = collect(explorer, "Pendulum-v1", 30, per_batch=10, seed=0)
    weights = TensorDict.from_module(explorer).data
    cfg = OmegaConf.create({"backend": backend, "workers": 2, "frames_per_batch": 20})
    collector = make_collector(cfg, explorer, "Pendulum-v1", {}, total_frames=60, seed=0, device=CPU)
    batches = []
    try:
        collector.update_policy_weights_(weights)
        for batch in collector:
            batches.append(batch.clone())
            policy.module.bias.data += 0.1
            collector.update_policy_weights_(weights)
    finally:
        collector.shutdown()
    rows = torch.cat(batches, 1)
    noise = rows["action"] - torch.arange(3).repeat_interleave(10)[:, None] / 10
    torch.testing.assert_close(noise[0], alone["action"])
    assert len(noise.unique()) == 60
    assert rows.shape == (2, 30) and not torch.equal(rows[0]["observation"], rows[1]["observation"])
    assert torch.equal(rows["next", "observation"][:, :-1], rows["observation"][:, 1:])


def test_the_curve_is_the_policys_return():
    online, *_ = run_online("online.updates_per_step=0.5")
    assert [row["step"] for row in online["curve"]] == [0, 100, 200]
    # Idle at first: the place it starts at, seven times.
    starts = [np.random.Generator(np.random.PCG64(10_000 + i)).uniform(-0.5, 0.5) for i in range(2)]
    assert online["curve"][0]["return_mean"] == pytest.approx(7 * np.mean(starts), rel=1e-5)
    assert online["curve"][-1]["return_mean"] > online["curve"][0]["return_mean"]


def test_td3_starts_from_what_td3_bc_trained():
    data = offline_rows()
    cfg = OmegaConf.create({"spar": {"loss": {"hidden": [8]}, "updates": 1, "compile": False}})
    problem = Problem(data, cfg, CPU)
    options = dict(
        critics={"num": 2, "layer_norm": None, "bound": "min", "kappa": 1.0}, networks={}, alpha=2.5, policy_noise=0.2,
        noise_clip=0.5, actor_lr=1e-2, qvalue_lr=1e-2, policy_interval=2, target_rate=0.005, gamma=0.9,
    )  # fmt: skip
    pretrained = td3_bc.build(problem, **options)
    for _ in range(4):
        pretrained(data.sample())
    td3 = warm_start(pretrained, problem, **options)
    state = data[:].select("observation")
    before = pretrained.policy(state.clone())["action"]
    assert torch.equal(td3.policy(state.clone())["action"], before)
    old, new = (rival.loss.state_dict() for rival in (pretrained, td3))
    assert set(old) >= set(new) and all(torch.equal(old[key], new[key]) for key in new)
    for _ in range(2):
        td3(data.sample())
    assert not torch.equal(td3.policy(state.clone())["action"], before)
    assert torch.equal(pretrained.policy(state)["action"], before)
    with pytest.raises(InputError, match="bound=lcb"):
        check_warm_start(**{**options, "critics": {**options["critics"], "bound": "lcb"}})
    with pytest.raises(InputError, match=r"method\.start=true"):
        check_warm_start(**options, start=True)


def test_the_start_is_judged_against_two_standard_errors():
    rows = [(0, 100, 30), (10, 90, 40), (20, 80, 40), (30, 70, 0), (40, 300, 0)]
    curve = [{"step": step, "return_mean": mean, "return_std": std} for step, mean, std in rows]
    start = start_of({"curve": curve, "episodes": 25})
    assert start == {"offline": 100, "lowest_of_first_half": 80, "noise": pytest.approx(20.0)}
    run = {"method": "spar", "seed": 1, "online": {"curve": curve, "episodes": 25}}
    assert "not below" in describe(run)
    run["online"]["episodes"] = 26
    assert "below by more than noise" in describe(run)


@pytest.mark.parametrize(
    "override, message",
    [
        ("collector.backend=slurm", "direct, process, ray"),
        ("collector.workers=0", "collector.workers=0: must be a number from 1 on"),
        ("online.steps=150", "multiple of collector.frames_per_batch=100"),
        ("online.eval_interval=150", "multiple of collector.frames_per_batch=100"),
        ("online.offline_share.start=1.0", "0 < start < 1"),
        ("online.offline_share.end=0.96", "end <= start"),
        ("online.updates_per_step=-1", "online.updates_per_step=-1"),
        ("end_at_success=true", "end_at_success=true"),
        ("online.updates_per_step=0.004", "updates_per_step=0.004: times collector.frames_per_batch=100"),
        ("online.first_update=10000", "must be below online.steps=10000"),
        ("select=ope", "chooses among offline policies"),
        ("keep_policies=2", "keeps offline policies"),
    ],
)
def test_wrong_options_are_named(override, message):
    with pytest.raises(InputError, match=message):
        check(compose_recipe("spar_offline_to_online", override))


def test_runs_that_differ_are_left_out_of_the_figure(tmp_path, capsys):
    def run(seed, **other):
        row = {"return_mean": 1.0, "return_std": 0.0}
        facts = {"dataset": "d", "env": "E-v1", "env_kwargs": {}, "rows_sha256": "x", "versions": {}, "data": row}
        online = {"episodes": 2, "curve": [{"step": step, **row} for step in (0, 10)]}
        out = tmp_path / "spar" / f"seed{seed}"
        out.mkdir(parents=True)
        facts |= {"method": "spar", "seed": seed, "online": online, **other}
        (out / "results.json").write_text(json.dumps(facts))
        return out

    run(0, env="E-v2")
    run(1, online={"episodes": 2, "curve": [{"step": 0, "return_mean": 1.0, "return_std": 0.0}] * 3})
    report(run(2))
    assert list(json.loads((tmp_path / "online.json").read_text())["methods"]["spar"]) == ["seed 2"]
    printed = capsys.readouterr().out
    assert "seed0: left out of online.json, for other env\n" in printed and "for other evaluations\n" in printed


def test_updates_of_a_round_may_be_whole_up_to_rounding():
    cfg = compose_recipe("spar_offline_to_online", "online.updates_per_step=0.07", "online.first_update=0")
    check(cfg)  # 100 times it is 7.000000000000001
    assert count_updates(cfg) == 700


def test_workers_must_share_the_frames():
    with pytest.raises(InputError, match=r"multiple of collector\.workers=3"):
        check(compose_recipe("spar_offline_to_online", "collector.backend=process", "collector.workers=3"))


def test_dictionaries_come_in_the_datas_order():
    pytest.importorskip("gymnasium_robotics")
    env = make_torchrl_env("PointMaze_UMaze-v3", 0, {})
    state = env.reset()
    raw = env._env.unwrapped
    assert state["observation"].dtype == torch.float32 and state["observation"].shape == (8,)
    assert torch.allclose(state["observation"][-2:], torch.from_numpy(raw.goal).float())
    env.close()


TINY = [
    "preset=smoke", "anchor.steps=2", "vae.steps=2", "critics.steps=2", "spar.updates=2", "eval.interval=2",
    "logger.interval=2", "eval.final_episodes=1", "spar.loss.hidden=[8]", "online.steps=40",
    "online.first_update=0",
    "online.updates_per_step=0.1", "collector.frames_per_batch=20", "online.eval_interval=20", "online.eval_episodes=1",
    "runs=runs", "seed=0",
]  # fmt: skip


@pytest.mark.parametrize("backend", ["direct", "process", RAY])
def test_recipe(backend, tmp_path):
    pytest.importorskip("mujoco")
    methods = "td3_bc" if backend == "direct" else "spar"
    done = run("spar_offline_to_online", *TINY, f"method={methods}", f"collector.backend={backend}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "torchrl-spar-hopper-medium-v0"
    content = json.loads((folder / "online.json").read_text())
    assert list(content["methods"]) == methods.split(",")
    for method in methods.split(","):
        assert content["methods"][method]["seed 0"]["step"] == [0, 20, 40]
        rows = (folder / method / "seed0" / "metrics.csv").read_text()
        assert "online,20," in rows and "online,40," in rows
        # The saved policy is the one that has been online.
        curve = json.loads((folder / method / "seed0" / "results.json").read_text())["online"]["curve"]
        policy, _ = read_actor(folder / method / "seed0" / "policy.pt")
        assert evaluate(policy, "Hopper-v5", 1, CURVE_SEED).mean().item() == curve[-1]["return_mean"]
        assert curve[-1]["return_mean"] != curve[0]["return_mean"]
    assert (folder / "online.png").read_bytes().startswith(b"\x89PNG")
