"""Rollouts against Gymnasium stepped by hand."""

from __future__ import annotations

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_spar import InputError, environment_sizes, evaluate, make_env

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


def by_hand(actor, env_id, seed):
    env = gymnasium.make(env_id)
    observation, _ = env.reset(seed=seed)
    total, done = 0.0, False
    while not done:
        with torch.no_grad():
            action = actor(observation=torch.as_tensor(observation, dtype=torch.float32))
        observation, reward, terminated, truncated, _ = env.step(action.numpy())
        total, done = total + reward, terminated or truncated
    return total


@pytest.mark.parametrize("env_id", ["Short-v0", "Pendulum-v1"])
def test_returns_equal_gymnasium_by_hand(env_id):
    actor = policy()
    returns = evaluate(actor, env_id, episodes=5, seed=7)
    expected = torch.tensor([by_hand(actor, env_id, 7 + i) for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(returns, expected, rtol=1e-4, atol=1e-4)
    assert len(set(returns.tolist())) == 5


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
    with pytest.raises(InputError, match="NoSuch-v0"):
        make_env("NoSuch-v0")
    with pytest.raises(InputError, match="CartPole"):
        environment_sizes("CartPole-v1")
    with pytest.raises(InputError, match=r"Pendulum-v1.*size 3"):
        evaluate(policy(size=4), "Pendulum-v1", episodes=1)
    with pytest.raises(InputError, match="actions have shape"):
        evaluate(policy(actions=2), "Pendulum-v1", episodes=1)
    with pytest.raises(InputError, match="episodes=0"):
        evaluate(policy(), "Pendulum-v1", episodes=0)
