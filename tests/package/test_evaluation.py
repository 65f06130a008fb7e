"""Rollouts against Gymnasium stepped by hand."""

from __future__ import annotations

import math
import multiprocessing
import operator
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from helpers import Started, by_hand
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded

from torchrl_spar import (
    BackgroundEvaluator,
    InputError,
    environment_sizes,
    evaluate,
    make_anchor,
    make_env,
    make_spar_loss,
)
from torchrl_spar.evaluation.fast_policy import action_function

gymnasium = pytest.importorskip("gymnasium")


class Short(gymnasium.Wrapper):
    """Ends after a number of steps that depends on the seed."""

    def reset(self, **kwargs):
        self.left = 3 + kwargs["seed"] % 4
        return self.env.reset(**kwargs)

    def step(self, action):
        self.left -= 1
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated or self.left == 0, truncated, info


class DictObservation(gymnasium.ObservationWrapper):
    def observation(self, observation):
        return {"zeta": observation[:1], "observation": observation[1:], "alpha": observation[:2]}


gymnasium.register("Short-v0", lambda **kw: Short(gymnasium.make("Pendulum-v1", **kw)), max_episode_steps=50)
gymnasium.register("Dict-v0", lambda **kw: DictObservation(gymnasium.make("Pendulum-v1", **kw)), max_episode_steps=5)


def policy(size=3, actions=1):
    torch.manual_seed(0)
    return TensorDictModule(nn.Sequential(nn.Linear(size, actions), nn.Tanh()), ["observation"], ["action"])


@pytest.mark.parametrize("env_id", ["Short-v0", "Pendulum-v1"])
def test_returns_equal_gymnasium_by_hand(env_id):
    actor = policy()
    returns = evaluate(actor, env_id, episodes=5, seed=7)
    expected = torch.tensor([by_hand(actor, gymnasium.make(env_id), 7 + i) for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(returns, expected, rtol=1e-4, atol=1e-4)
    assert len(set(returns.tolist())) == 5


def test_discounted_returns_have_their_closed_form():
    """MountainCarContinuous costs a tenth of the squared action a step; half strength never leaves the valley."""
    half = TensorDictModule(lambda state: 0 * state[..., :1] + 0.5, ["observation"], ["action"])
    found = evaluate(half, "MountainCarContinuous-v0", 2, gamma=0.99, max_episode_steps=100)
    assert found.tolist() == pytest.approx(2 * [-0.025 * (1 - 0.99**100) / 0.01])


def test_dictionary_observations_come_in_the_documented_order():
    seen = []

    def record(observation):
        seen.append(observation.clone())
        return observation[..., :1]

    evaluate(TensorDictModule(record, ["observation"], ["action"]), "Dict-v0", episodes=1, seed=3)
    raw, _ = gymnasium.make("Pendulum-v1").reset(seed=3)
    expected = torch.tensor([raw[1], raw[2], raw[0], raw[1], raw[0]])
    torch.testing.assert_close(seen[0][0], expected)
    assert environment_sizes("Dict-v0")[0] == 5


def test_steps_are_reported():
    steps = []
    evaluate(policy(), "Short-v0", episodes=2, seed=0, on_step=lambda envs: steps.append(len(envs)))
    assert steps == [2] * 4  # seeds 0 and 1 run 3 and 4 steps


def test_sizes():
    size, spec = environment_sizes("Pendulum-v1")
    assert size == 3 and spec.shape == (1,)
    assert spec.space.low.item() == -2 and spec.space.high.item() == 2 and spec.dtype == torch.float32


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"NoSuch.*'module:NoSuch-v0'"):
        make_env("NoSuch-v0")
    with pytest.raises(InputError, match="CartPole"):
        environment_sizes("CartPole-v1")
    with pytest.raises(InputError, match=r"Pendulum-v1.*size 3"):
        evaluate(policy(size=4), "Pendulum-v1", episodes=1)
    with pytest.raises(InputError, match="actions have shape"):
        evaluate(policy(actions=2), "Pendulum-v1", episodes=1)
    with pytest.raises(InputError, match=r"Pendulum-v1.*observations have size 3, the network reads 1"):
        evaluate(make_anchor(1, Bounded(-2, 2, (1,)), hidden=[8]), "Pendulum-v1", episodes=1)
    with pytest.raises(InputError, match=r"FrozenLake-v1.*observations of shape \(\)"):
        environment_sizes("FrozenLake-v1")
    with pytest.raises(InputError, match="episodes=0"):
        evaluate(policy(), "Pendulum-v1", episodes=0)


def default_policy(head="residual", low=-2.0, high=2.0, seed=0):
    """The policy of a loss with weights, statistics and scale away from their start."""
    torch.manual_seed(seed)
    stats = (torch.randn(3), torch.rand(3) + 0.5)
    loss = make_spar_loss(3, Bounded(low, high, (1,)), head=head, hidden=[16, 16], observation_stats=stats)
    actor = loss.actor
    with torch.no_grad():
        for tensor in actor.head.parameters():
            tensor += 0.3 * torch.randn_like(tensor)
        actor.residual_scale.fill_(0.4)
    return actor


@pytest.mark.parametrize("head", ["residual", "latent"])
def test_default_policies_return_what_their_tensordict_calls_do(head):
    actor = default_policy(head)
    returns = evaluate(actor, "Pendulum-v1", episodes=3, seed=11)
    expected = torch.tensor(
        [by_hand(actor, gymnasium.make("Pendulum-v1"), 11 + i) for i in range(3)], dtype=torch.float64
    )
    torch.testing.assert_close(returns, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-2.0, 0.5)])
@pytest.mark.parametrize("head", ["residual", "latent"])
def test_actions_are_the_policys_to_the_last_bit(head, bounds, n):
    actor = default_policy(head, *bounds)
    anchor = make_anchor(3, Bounded(*bounds, (1,)), hidden=[16])
    x = 3 * torch.randn(n, 3)
    for policy in (actor, actor.anchor, anchor):
        with torch.no_grad():
            assert torch.equal(action_function(policy)(x), policy(TensorDict({"observation": x}, [n]))["action"])


def test_a_changed_policy_keeps_its_own_call():
    """Whatever the default networks do not do: hooks, subclasses, other layers."""
    x = torch.randn(4, 3)
    hooked = default_policy()
    hooked.head.module.mlp[0].register_forward_hook(lambda module, args, out: out + 1)
    subclassed = default_policy()
    subclassed.__class__ = type("Loud", (type(subclassed),), {"compose": lambda self, anchor, residual: anchor + 5})
    layered = default_policy()
    layered.head.module.mlp[1] = nn.Tanh()
    plain = action_function(default_policy())(x)
    for changed in (hooked, subclassed, layered):
        found = action_function(changed)(x)
        assert torch.equal(found, changed(observation=x))
        assert not torch.allclose(found, plain)


@pytest.fixture(scope="module")
def evaluator():
    with BackgroundEvaluator() as running:
        yield running


def test_background_returns_equal_evaluate_of_the_snapshot(evaluator):
    actor = default_policy()
    expected = []
    for step in range(3):
        evaluator.submit(step, actor, "Pendulum-v1", episodes=2, seed=4)
        expected.append((step, evaluate(actor, "Pendulum-v1", episodes=2, seed=4).tolist()))
        with torch.no_grad():  # after the snapshot
            actor.head.module.mlp[0].weight.add_(0.5)
    assert [(step, returns.tolist()) for step, returns in evaluator.drain()] == expected
    assert len({tuple(returns) for _, returns in expected}) == 3
    assert evaluator.poll() == [] and evaluator.drain() == []


def test_poll_never_waits_and_keeps_the_order(evaluator):
    actor, finished = default_policy(), []
    evaluator.submit("long", actor, "Pendulum-v1", episodes=20)
    evaluator.submit("short", actor, "Pendulum-v1", episodes=1)
    assert evaluator.poll() == []
    while len(finished) < 2:
        finished += evaluator.poll()
        time.sleep(0.01)
    assert [(key, len(returns)) for key, returns in finished] == [("long", 20), ("short", 1)]


def test_errors_of_the_other_process_surface_here(evaluator):
    evaluator.submit(2, policy(), "Pendulum-v1", episodes=1)
    evaluator.submit(3, policy(size=4), "Pendulum-v1", episodes=1)
    evaluator.submit(4, policy(), "Pendulum-v1", episodes=1)
    with pytest.raises(InputError, match=r"evaluation 3: .*Pendulum-v1.*size 3"):
        evaluator.drain()
    assert [key for key, _ in evaluator.drain()] == [2, 4]
    locked = policy()
    locked.lock = threading.Lock()
    with pytest.raises(InputError, match=r"evaluation 5: .*pickle"):
        evaluator.submit(5, locked, "Pendulum-v1")
    # A bug, not an input: it keeps its traceback.
    broken = TensorDictModule(operator.itemgetter("nothing"), ["observation"], ["action"])
    evaluator.submit(6, broken, "Pendulum-v1", episodes=1)
    with pytest.raises(RuntimeError, match=r"(?s)evaluation 6 .*Traceback"):
        evaluator.drain()


@pytest.mark.parametrize("moment", ["starting", "evaluating", "idle"])
def test_a_killed_evaluation_is_named(moment):
    before = set(multiprocessing.active_children())
    with BackgroundEvaluator() as running:
        (process,) = set(multiprocessing.active_children()) - before
        if moment != "starting":
            running.submit("first", policy(), "Pendulum-v1", episodes=1)
            running.drain()
        if moment != "idle":
            running.submit(2000, policy(), "Pendulum-v1", episodes=500)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with pytest.raises(InputError, match=rf"evaluation 2000: its process {process.pid} was killed by SIGKILL"):
            running.submit(2000, policy(), "Pendulum-v1", episodes=500)
            running.drain()
    assert not process.is_alive()


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


PARENT = """
import multiprocessing, os, pathlib, signal, time
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl_spar import BackgroundEvaluator
policy = TensorDictModule(nn.Linear(3, 1), ["observation"], ["action"])
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    with BackgroundEvaluator() as evaluator:
        evaluator.submit("first", policy, "Pendulum-v1", episodes=1)
        evaluator.drain()
        evaluator.submit("second", policy, "Pendulum-v1", episodes=5000)
        pathlib.Path("pids").write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
        os.rename("pids", "children")
        time.sleep(600)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads the processes of Linux")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(end, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = Started(tmp_path / "parent.py", cwd=tmp_path)
    parent.until((tmp_path / "children").exists)
    children = [int(pid) for pid in (tmp_path / "children").read_text().split()]
    assert len(children) == 1 and all(map(is_running, children))
    (os.killpg if end == signal.SIGINT else os.kill)(
        parent.process.pid, end
    )  # as the terminal does, or another process
    parent.process.join(60)
    errors = parent.outputs[1].read_text()
    assert errors.count("Traceback") == (end == signal.SIGINT)  # the parent's own KeyboardInterrupt alone
    deadline = time.monotonic() + 30
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, children))


class Faulty(gymnasium.Env):
    """An environment of somebody else, with one fault."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, fault="none"):
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        if self.fault == "reset":
            raise TypeError("no seeds here")
        return np.zeros(3, np.float32), {}

    def step(self, action):
        if self.fault == "step":
            raise OSError("the port is closed")
        reward = {"reward": math.nan, "array": np.array([2.0]), "vector": np.zeros(2)}.get(self.fault, 2.0)
        return np.full(3, math.inf if self.fault == "observation" else 0.5, np.float32), reward, False, False, {}


gymnasium.register("Faulty-v0", Faulty, max_episode_steps=3, disable_env_checker=True, order_enforce=False)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("reset", r"'Faulty-v0' fails in reset\(\): TypeError: no seeds here"),
        ("step", r"'Faulty-v0' fails in step\(\): OSError: the port is closed"),
        ("vector", r"'Faulty-v0' fails in step\(\): ValueError"),
        ("reward", r"'Faulty-v0' gives a reward that is NaN or infinite, after 0 steps"),
        ("observation", r"'Faulty-v0' gives an observation that is NaN or infinite, after 1 steps"),
    ],
)
def test_an_environment_that_fails_is_named(fault, message):
    with pytest.raises(InputError, match=message):
        evaluate(policy(), "Faulty-v0", episodes=2, fault=fault)


def test_a_reward_may_be_an_array_of_one_number():
    assert evaluate(policy(), "Faulty-v0", episodes=2, fault="array").tolist() == [6.0, 6.0]
