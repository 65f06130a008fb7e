"""The evaluations of a run, each a row of evaluations.csv: episodes, beside training or in line, or from the log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase

from harness.launch import summarize
from harness.log_values import Support
from harness.output import MetricLog, write_text
from harness.stopping import stop
from torchrl_spar import BackgroundEvaluator, evaluate

# Evaluations of the curve and of the results start from states of their own.
CURVE_SEED, RESULT_SEED = 10_000, 20_000


class InLineEvaluator:
    """A `BackgroundEvaluator` that evaluates when it is asked for results, in this process."""

    def __init__(self) -> None:
        self.unfinished: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def submit(
        self, key: Any, policy: TensorDictModuleBase, env_id: str, episodes: int, seed: int, **env_kwargs: Any
    ) -> None:
        self.unfinished.append((key, (policy, env_id, episodes, seed), env_kwargs))

    def poll(self) -> list[tuple[Any, torch.Tensor]]:
        """Evaluates one request at a time, so that a signal costs one at most."""
        if not self.unfinished:
            return []
        key, args, env_kwargs = self.unfinished.pop(0)
        return [(key, evaluate(*args, **env_kwargs))]

    drain = poll

    def close(self) -> None:
        """Nothing to end."""


class Scores:
    """The learning curve, by step, and the results, by name.

    Rows of evaluations.csv are written in order, as they are done. What was pending at a checkpoint is done again: a
    point of the curve from the checkpoint, a result when it is added again.
    """

    columns: tuple[str, ...] = ("return_mean", "return_std", "normalized")

    def __init__(
        self, out: Path, env: str, env_kwargs: dict[str, Any], seed: int, log: MetricLog, *, background: bool
    ) -> None:
        self.env, self.env_kwargs, self.seed, self.log = env, env_kwargs, 100_000 * seed, log
        self.path = out / "evaluations.csv"
        self.curve: list[dict[str, Any]] = []
        self.results: dict[str, dict[str, float | None]] = {}
        # The policies of the curve's points that are not evaluated yet.
        self.pending: dict[int, dict[str, torch.Tensor]] = {}
        self.evaluator = BackgroundEvaluator() if background else InLineEvaluator()

    def add_to_curve(self, step: int, policy: TensorDictModuleBase, episodes: int) -> None:
        self.pending[step] = policy.state_dict()
        self.evaluator.submit(step, policy, self.env, episodes, CURVE_SEED + self.seed, **self.env_kwargs)

    def has(self, step: int) -> bool:
        """Whether the curve has a point at this step."""
        return step in self.pending or any(row["step"] == step for row in self.curve)

    def add_again(self, policy: TensorDictModuleBase, episodes: int) -> None:
        """Submits again what was pending in the checkpoint; `policy` is a policy of the same structure."""
        for step, state in sorted(self.pending.items()):
            policy = deepcopy(policy)
            policy.load_state_dict(state)
            self.add_to_curve(step, policy, episodes)

    def add_result(self, name: str, policy: TensorDictModuleBase, episodes: int) -> None:
        if name not in self.results:
            self.evaluator.submit(name, policy, self.env, episodes, RESULT_SEED + self.seed, **self.env_kwargs)

    def collect(self, *, wait: bool = False) -> None:
        """Collects finished evaluations; with `wait`, all that were submitted."""
        while done := self.evaluator.poll():
            self._take(done)
        if wait:
            self._take(self.evaluator.drain())

    def _take(self, done: list[tuple[Any, torch.Tensor]]) -> None:
        with stop.at_once(False):
            for key, returns in done:
                row = summarize(self.env, returns, self.env_kwargs)
                if isinstance(key, str):
                    self.results[key] = row
                else:
                    del self.pending[key]
                    self._append(key, row)
            self.write()
        stop.check()

    def _append(self, step: int, row: dict[str, float | None]) -> None:
        self.curve.append({"step": step, **row})
        self.log.show("eval", step, {name: value for name, value in row.items() if value is not None})

    def write(self) -> None:
        rows = [
            [row["step"], *("" if row[name] is None else f"{row[name]:.6g}" for name in self.columns)]
            for row in self.curve
        ]
        write_text(self.path, "".join(",".join(map(str, row)) + "\n" for row in [["step", *self.columns], *rows]))

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve, "results": self.results, "pending": self.pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.curve, self.results, self.pending = state["curve"], state["results"], state["pending"]

    def close(self) -> None:
        self.evaluator.close()


class LogScores(Scores):
    """Scores without an environment: the critics' values of the policy, and its distance to the data.

    Args:
        out: the run's directory.
        support: distances to the data.
        values: the critics' values of the policy in initial states, ``[E]``, or None.
        log: of the run.
    """

    columns = ("value", "value_std", "support_distance")

    def __init__(self, out: Path, support: Support, values: Callable[[], torch.Tensor | None], log: MetricLog) -> None:
        super().__init__(out, "", {}, 0, log, background=False)
        self.support, self.values = support, values

    def add_to_curve(self, step: int, policy: TensorDictModuleBase, episodes: int) -> None:
        values = self.values()
        row: dict[str, float | None] = {"value": None, "value_std": None}
        if values is not None:
            row = {"value": values.mean().item(), "value_std": values.std(correction=0).item()}
        self._append(step, row | {"support_distance": self.support.of_policy(policy)})
        self.write()

    def add_result(self, name: str, policy: TensorDictModuleBase, episodes: int) -> None:
        self.results[name] = {"support_distance": self.support.of_policy(policy)}
