"""How fast evaluation is, beside bare Gymnasium."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import gymnasium
import numpy as np
from tensordict.nn import TensorDictModuleBase

from torchrl_spar import evaluate, make_env

RECORDED = "torchrl_spar_benchmark/Recorded-v0"


def measure_evaluation(
    policy: TensorDictModuleBase, env_id: str, *, episodes: int = 10, rounds: int = 5
) -> dict[str, Any]:
    """Medians over rounds, in each of which both are timed in turn.

    Args:
        policy: what is evaluated.
        env_id: the environment.
        episodes: of one evaluation, side by side.
        rounds: how many.

    Returns:
        ``steps_per_second`` (policy, reset and construction included), ``bare_gymnasium`` (bare Gymnasium on the same
        environments, seeds and actions, one episode after the other) and their ``ratio``.
    """
    actions = _actions_of(policy, env_id, episodes)
    steps = sum(map(len, actions))
    timings = [
        (_time(lambda: evaluate(policy, env_id, episodes)), _time(_replay, env_id, actions)) for _ in range(rounds)
    ]
    evaluation, bare = (median(column) for column in zip(*timings))
    return {
        "env": env_id, "episodes": episodes, "steps": steps,
        "steps_per_second": steps / evaluation,
        "bare_gymnasium": steps / bare,
        "ratio": median(bare / evaluation for evaluation, bare in timings),
    }  # fmt: skip


def _actions_of(policy: TensorDictModuleBase, env_id: str, episodes: int) -> list[list[np.ndarray]]:
    """The actions of each episode of an evaluation."""
    recorders: list[_Recorder] = []

    def make(**kwargs: Any) -> _Recorder:
        recorders.append(_Recorder(make_env(env_id, **kwargs)))
        return recorders[-1]

    gymnasium.register(RECORDED, make, disable_env_checker=True, order_enforce=False)
    try:
        evaluate(policy, RECORDED, episodes)
    finally:
        del gymnasium.registry[RECORDED]
    return [recorder.actions for recorder in recorders]


class _Recorder(gymnasium.Wrapper):
    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.actions: list[np.ndarray] = []

    def step(self, action: np.ndarray) -> Any:
        self.actions.append(action.copy())
        return super().step(action)


def _replay(env_id: str, actions: list[list[np.ndarray]]) -> None:
    for seed, episode in enumerate(actions):
        env = make_env(env_id)
        env.reset(seed=seed)
        for action in episode:
            env.step(action)
        env.close()


def _time(call: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start
