"""What evaluation costs: beside bare Gymnasium, and the learner while it runs in a process of its own."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from statistics import median
from typing import Any

import gymnasium
import numpy as np
from tensordict.nn import TensorDictModuleBase

from torchrl_spar import BackgroundEvaluator, evaluate, make_env

RECORDED = "torchrl_spar_benchmark/Recorded-v0"
# Ten episodes of 1,000 steps, what the main job evaluates once its policy does not fall.
STEPS_BESIDE = 10_000


def measure_evaluation(
    policy: TensorDictModuleBase,
    update: Callable[[], Any],
    env_id: str,
    *,
    episodes: int = 10,
    rounds: int = 5,
    seconds: float = 5.0,
) -> dict[str, Any]:
    """Medians over rounds, in each of which everything is timed in turn.

    Args:
        policy: what is evaluated.
        update: one update of the learner, e.g. ``lambda: spar_update(buffer.sample())``.
        env_id: the environment.
        episodes: of one evaluation, side by side, where the learner does nothing.
        rounds: how many.
        seconds: length of each window of the learner.

    Returns:
        ``steps_per_second`` (policy, reset and construction included),
        ``bare_gymnasium`` (bare Gymnasium on the same environments, seeds and actions, one
        episode after the other) and their ``ratio``; ``updates_per_second`` of the learner ``alone``,
        beside evaluations of about ``steps_beside`` steps without a pause (``evaluation``) and beside a process
        of ``bare`` Gymnasium steps, with the ``loss`` (a fraction) each of the two costs; the ``cores`` this
        process may use.
        The cores must be at least two for the loss to mean anything; what bare steps cost too is
        the machine's (hyperthreads, caches, frequency), not the evaluator's.
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
        "steps_beside": STEPS_BESIDE,
        **_learner(policy, update, env_id, math.ceil(episodes * STEPS_BESIDE / steps), rounds, seconds),
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


def _learner(
    policy: TensorDictModuleBase, update: Callable[[], Any], env_id: str, episodes: int, rounds: int, seconds: float
) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"alone": [], "evaluation": [], "bare": []}
    submit_seconds = []
    with BackgroundEvaluator() as evaluator, _bare_steps(env_id) as stepping:

        def submit() -> None:
            submit_seconds.append(_time(evaluator.submit, 0, policy, env_id, episodes))

        def update_and_keep_evaluating() -> None:
            update()
            for _ in evaluator.poll():
                submit()

        submit()
        evaluator.drain()  # it has started
        for _ in range(rounds):
            rates["alone"].append(_rate(update, seconds))
            submit()
            submit()  # one waits, so that the process never does
            rates["evaluation"].append(_rate(update_and_keep_evaluating, seconds))
            evaluator.drain()
            stepping.set()
            rates["bare"].append(_rate(update, seconds))
            stepping.clear()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return {
        "updates_per_second": {name: median(values) for name, values in rates.items()},
        "loss": {
            name: 1 - median(rate / alone for rate, alone in zip(rates[name], rates["alone"]))
            for name in ("evaluation", "bare")
        },
        "submit_milliseconds": 1e3 * median(submit_seconds),
        "cores": cores,
    }


def _rate(call: Callable[[], Any], seconds: float) -> float:
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        call()
        calls += 1
    return calls / elapsed


@contextmanager
def _bare_steps(env_id: str) -> Iterator[Event]:
    """A process that steps an environment while the event is set."""
    context = multiprocessing.get_context("spawn")
    started, stepping = context.Event(), context.Event()
    process = context.Process(target=_step_while, args=(env_id, started, stepping), daemon=True)
    process.start()
    try:
        while not started.wait(1):
            if not process.is_alive():
                raise RuntimeError(f"the process of bare {env_id} steps ended with exit code {process.exitcode}")
        yield stepping
    finally:
        process.terminate()
        process.join()


def _step_while(env_id: str, started: Event, stepping: Event) -> None:
    env = make_env(env_id)
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape, env.action_space.dtype)
    started.set()
    while True:
        stepping.wait()
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
