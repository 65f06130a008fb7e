"""The evaluations of a run: beside training or in line, each with states of its own, each a row of metrics.csv."""

from __future__ import annotations

from typing import Any

import torch
from common import summarize
from run_output import MetricLog
from tensordict.nn import TensorDictModuleBase

from torchrl_spar import BackgroundEvaluator, evaluate

# Evaluations of the curve and of the results start from states of their own.
CURVE_SEED, RESULT_SEED = 10_000, 20_000


class InLineEvaluator:
    """A `BackgroundEvaluator` that evaluates at once, in this process."""

    def __init__(self) -> None:
        self.finished: list[tuple[Any, torch.Tensor]] = []

    def submit(
        self, key: Any, policy: TensorDictModuleBase, env_id: str, episodes: int, seed: int, **env_kwargs: Any
    ) -> None:
        self.finished.append((key, evaluate(policy, env_id, episodes, seed, **env_kwargs)))

    def poll(self) -> list[tuple[Any, torch.Tensor]]:
        finished, self.finished = self.finished, []
        return finished

    drain = poll

    def close(self) -> None:
        """Nothing to end."""


class Scores:
    """The learning curve, by step, and the results, by name. Rows of `eval` come when they are done, in order."""

    def __init__(self, env: str, env_kwargs: dict[str, Any], seed: int, log: MetricLog, *, background: bool) -> None:
        self.env, self.env_kwargs, self.seed, self.log = env, env_kwargs, 100_000 * seed, log
        self.curve: list[dict[str, Any]] = []
        self.results: dict[str, dict[str, float | None]] = {}
        self.evaluator = BackgroundEvaluator() if background else InLineEvaluator()

    def add_to_curve(self, step: int, policy: TensorDictModuleBase, episodes: int) -> None:
        self.evaluator.submit(step, policy, self.env, episodes, CURVE_SEED + self.seed, **self.env_kwargs)

    def add_result(self, name: str, policy: TensorDictModuleBase, episodes: int) -> None:
        self.evaluator.submit(name, policy, self.env, episodes, RESULT_SEED + self.seed, **self.env_kwargs)

    def collect(self, *, wait: bool = False) -> None:
        """Takes what is done; with `wait`, all that was added."""
        for key, returns in self.evaluator.drain() if wait else self.evaluator.poll():
            row = summarize(self.env, returns, self.env_kwargs)
            if isinstance(key, str):
                self.results[key] = row
            else:
                self.curve.append({"step": key, **row})
                self.log.write("eval", key, {name: value for name, value in row.items() if value is not None})

    def close(self) -> None:
        self.evaluator.close()
