"""One run of any method: a seed on a data set, with its directory, its phases and its scores."""

from __future__ import annotations

import math
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from tqdm import tqdm

import torchrl_spar
from harness.actors import FACT
from harness.checkpoints import Checkpoints, P
from harness.earlier import EarlierPolicies
from harness.environment import dataset_name, load, load_any, log_options, step_limit_of
from harness.launch import RECIPES, best_device, summarize
from harness.log_values import Support, estimate_any, fqe_options
from harness.loggers import make_logger
from harness.output import MetricLog, save_config, write_json
from harness.printing import show
from harness.same_rows import SameRows
from harness.scores import LogScores, Scores
from torchrl_spar import Progress, save_policy

VERSIONED = ("torch", "torchrl", "tensordict", "numpy", "gymnasium", "mujoco")
# Updates that are made without a look at anything else, at most.
LONGEST_BLOCK = 100


class Phase:
    """A progress bar over one phase. Every `interval` steps each run records its metrics."""

    def __init__(self, name: str, steps: int, runs: Sequence[Run], interval: int, line: int) -> None:
        self.name, self.runs, self.interval, self.steps = name, runs, interval, steps
        self.line = line
        self.bar: Any = None

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        if self.bar is None:  # not earlier: a phase may begin anywhere, or be finished
            look = {"unit": "step", "dynamic_ncols": True, "mininterval": 1.0, "position": self.line}
            self.bar = tqdm(total=self.steps, initial=step - 1, desc=f"{self.name:>6}", **look)
        self.bar.update(step - self.bar.n)
        if step % self.interval == 0 or step == self.steps:
            for index, run in enumerate(self.runs):
                run.record(self.name, step, {key: x[index] if x.ndim else x for key, x in metrics.items()})
        if step == self.steps:
            self.bar.close()

    def show(self, curve: list[dict[str, Any]]) -> None:
        """The last score beside the bar."""
        for row in curve[-1:] if self.bar is not None else []:
            shown = [name for name in ("normalized", "return_mean", *LogScores.columns) if row.get(name) is not None]
            self.bar.set_postfix(score=f"{row[shown[0]]:.1f} at {row['step']}", refresh=False)


def of_one_run(cfg: DictConfig, seed: int, out: Path) -> DictConfig:
    """The configuration of one run, as it is saved in its directory."""
    return cast(DictConfig, OmegaConf.merge(cfg, {"seed": seed, "seeds": None, "out": str(out)}))


class Run:
    """One seed of one method; a subclass adds the method. Options are checked before anything is written or trained.

    Args:
        cfg: of this run alone, see `of_one_run`.
        checkpoints: of the run, or of the runs of which it is one.
        line: of its progress bars.
    """

    # What is evaluated, and its name in results.json.
    policy: TensorDictModuleBase
    policy_name = "policy"
    # Whether the method itself acts in the environment.
    needs_environment = False

    def __init__(self, cfg: DictConfig, checkpoints: Checkpoints, line: int = 0) -> None:
        self.cfg, self.seed, self.out = cfg, cfg.seed, Path(cfg.out)
        self.checkpoints, self.line = checkpoints, line
        self.device = best_device(cfg.device)
        self.data, self.env, self.env_kwargs = (load if self.needs_environment else load_any)(cfg, self.device)
        self.data_scores = summarize(self.env, self.data.episode_returns, self.data.env_kwargs)
        limit = step_limit_of(self.env, self.env_kwargs) if self.env else None
        self.steps = {"data": self.data.longest_episode, "evaluation": limit}
        # Before anything is written: it refuses data of too few episodes.
        self.support = Support(self.data, cfg.ope.held_out, self.seed) if self.env is None or cfg.select else None

    @property
    def method(self) -> str:
        return self.cfg.method.name

    @property
    def network(self) -> dict[str, Any] | None:
        """Kind and sizes of networks that are not SPAR's default ones, for `harness.actors.read_actor`."""
        return None

    def open(self, columns: Iterable[str]) -> None:
        """Makes the directory, with a log of these columns."""
        cfg, go_on = self.cfg, self.checkpoints.knows(self._name("log"))
        logger = make_logger(self.out, cfg.logger.backend)
        for left in self.out.glob(".*.partial"):  # by a killed process
            left.unlink()
        save_config(self.out, cfg)  # before anything else: it makes the directory a run's
        log = MetricLog(self.out, logger, dict.fromkeys(columns), go_on=go_on)
        self.log = self.keep("log", log)
        scores: Scores
        if self.env is None:
            self.data_scores["support_distance"] = 1.0
            scores = LogScores(self.out, cast(Support, self.support), lambda: self.critics_values(self.policy), log)
        else:
            scores = Scores(self.out, self.env, self.env_kwargs, self.seed, log, background=cfg.eval.background)
        self.scores = self.keep("scores", scores)
        self.scores.write()
        self.progress = self.keep("progress", Progress(self.checkpoints.step))
        self.kept = self.keep("kept policies", EarlierPolicies(cfg, cfg.keep_policies))
        self.rows = self.keep("rows", SameRows(dataset_name(cfg), self.data))

    def keep(self, name: str, part: P) -> P:
        """Adds a part of this run to its checkpoints and restores the state it had."""
        return self.checkpoints.add(self._name(name), part)

    def _name(self, part: str) -> str:
        return f"seed {self.seed}: {part}"

    def phase(self, name: str, *, logged: bool = True) -> Phase | None:
        """The report of a pre-training phase; None if the phase has no steps."""
        if not self.cfg[name].steps:
            return None
        return Phase(name, self.cfg[name].steps, [self] if logged else [], self.cfg.logger.interval, self.line)

    def record(self, phase: str, step: int, metrics: dict[str, Tensor]) -> None:
        """A row of the log."""
        self.log.write(phase, step, metrics)

    def critics_values(self, policy: TensorDictModuleBase) -> Tensor | None:
        """Values of a policy in the data's initial states by the method's critics, ``[E]``; None without critics."""
        return None

    def estimate(self) -> tuple[dict[str, Any], TensorDictModuleBase]:
        """Values from the log alone, and the policy to deploy."""
        return estimate_any(self.policy, self.data, fqe_options(self.cfg)), self.policy

    def evaluate(self, step: int) -> None:
        """Adds a point to the learning curve."""
        policy = self.policy
        self.kept.add(step, policy)
        self.scores.add_to_curve(step, on_cpu(policy), self.cfg.eval.episodes)

    def evaluate_again(self) -> None:
        """Evaluates again the points that were pending when the checkpoint was written."""
        self.scores.add_again(on_cpu(self.policy), self.cfg.eval.episodes)

    def finish(self, *, updates_per_second: float) -> None:
        """The final evaluation, and all files."""
        cfg = self.cfg
        self.scores.add_result(self.policy_name, on_cpu(self.policy), cfg.eval.final_episodes)
        with self.checkpoints.interruptible():
            self.scores.collect(wait=True)
        results: dict[str, Any] = {
            "dataset": dataset_name(cfg), "env": self.env, "env_kwargs": self.env_kwargs, "seed": self.seed,
            "method": self.method,
            "updates": cfg.spar.updates, **self.scores.results, "data": self.data_scores, "steps": self.steps,
            "rows_sha256": self.rows.digest,
            "episodes": cfg.eval.final_episodes, "updates_per_second": updates_per_second,
            "versions": versions(), "commit": commit(),
            "curve": self.scores.curve,
        }  # fmt: skip
        self.deployed = self.policy
        if self.env is None or cfg.select:
            self.estimate_into(results)
        self.go_on(results)
        results["wall_seconds"] = self.checkpoints.seconds
        self.save(results)
        self.draw(results)
        write_json(self.out / "results.json", results)  # last: with it the run is finished
        show(results, self.out)

    def estimate_into(self, results: dict[str, Any]) -> None:
        """Adds values from the log alone, and the score of the deployed policy if it is another one."""
        with self.checkpoints.interruptible():
            results["estimates"], self.deployed = self.estimate()
            if self.cfg.select and "choice" in results["estimates"]:
                self.scores.add_result("selected", on_cpu(self.deployed), self.cfg.eval.final_episodes)
                self.scores.collect(wait=True)
                results["selected"] = self.scores.results["selected"]

    def go_on(self, results: dict[str, Any]) -> None:
        """Adds to the results what follows the offline phase; nothing by default."""

    def save(self, results: dict[str, Any]) -> None:
        """Writes the policy to deploy, and the earlier ones that are kept."""
        facts = {key: results[key] for key in ("env", "env_kwargs", "dataset", "seed", "rows_sha256")}
        facts["log"] = log_options(self.cfg) | {"gamma": self.cfg.spar.loss.gamma}
        if self.network is not None:
            facts[FACT] = self.network
        for step, policy in self.kept.policies(self.policy).items():
            save_policy(self.as_saved(policy), self.out / f"policy_{step}.pt", **facts)
        if self.cfg.select and "choice" in results["estimates"]:
            facts["choice"] = results["estimates"]["choice"]
        save_policy(self.as_saved(self.deployed), self.out / "policy.pt", **facts)

    def as_saved(self, policy: TensorDictModuleBase) -> TensorDictModuleBase:
        """The policy in the form that is saved; as it is by default."""
        return policy

    def draw(self, results: dict[str, Any]) -> None:
        """Draws the method's figures after all other files are written; none by default."""

    def close(self) -> None:
        """Ends background processes and closes the log."""
        self.scores.close()
        self.log.close()


@contextmanager
def closing_all(runs: Sequence[Run]) -> Iterator[None]:
    """Closes all runs in the list when the block ends."""
    try:
        yield
    finally:
        for run in runs:
            run.close()


def on_cpu(policy: TensorDictModuleBase) -> TensorDictModuleBase:
    """A copy on the CPU for evaluation: ten states a step are too few for a GPU."""
    return deepcopy(policy).cpu()


def block_length(cfg: DictConfig) -> int:
    """Number of updates in a block. Blocks end where an evaluation or a log row is due."""
    common = math.gcd(cfg.eval.interval, cfg.logger.interval, cfg.spar.updates)
    return max(n for n in range(1, min(common, LONGEST_BLOCK) + 1) if common % n == 0)


@dataclass
class Position:
    """Where the main phase is, and how long it took so far."""

    step: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]


class MainPhase:
    """Evaluations, logs and checkpoints around the updates of the main phase. It resumes from the runs' checkpoint.

    Args:
        runs: with one configuration and the same checkpoints.
        name: of the phase in the logs.

    Examples::

        phase = MainPhase(runs, "spar")
        for step in phase.steps():  # the last update of each block
            phase.after(step, make_updates(block_length(cfg)))
    """

    def __init__(self, runs: Sequence[Run], name: str) -> None:
        self.runs, self.cfg, self.checkpoints = runs, runs[0].cfg, runs[0].checkpoints
        self.total = self.cfg.spar.updates
        self.report = Phase(name, self.total, runs, self.cfg.logger.interval, runs[0].line)
        self.position = self.checkpoints.add("position", Position())
        self.start = time.perf_counter() - self.position.seconds

    def steps(self) -> Iterator[int]:
        """Yields the number of updates at the end of each remaining block."""
        self.checkpoints.check_all_added()
        for run in self.runs:
            run.evaluate_again()
            if self.position.step == 0 and not run.scores.has(0):
                run.evaluate(0)
        self._collect_scores()
        length = block_length(self.cfg)
        yield from range(self.position.step + length, self.total + 1, length)
        self.checkpoints.save()

    def after(self, step: int, metrics: dict[str, Tensor]) -> None:
        """Logs, evaluates and saves what is due once `step` updates are made."""
        self.report(step, metrics)
        is_due = step % self.cfg.eval.interval == 0 or step == self.total
        if is_due:
            for run in self.runs:
                run.evaluate(step)
        self.position.step, self.position.seconds = step, time.perf_counter() - self.start
        if is_due or step % self.cfg.logger.interval == 0:
            self._collect_scores()
        self.checkpoints.step()

    @property
    def updates_per_second(self) -> float:
        """Updates per second of each run, in-line evaluations included."""
        return self.total / self.position.seconds

    def _collect_scores(self) -> None:
        with self.checkpoints.interruptible():
            for run in self.runs:
                run.scores.collect()
        self.report.show(self.runs[0].scores.curve)


def versions() -> dict[str, str]:
    """The versions of what a run uses. This package may be a folder on the path, without metadata."""
    found = {"python": platform.python_version(), "torchrl-spar": torchrl_spar.__version__}
    for name in VERSIONED:
        with suppress(PackageNotFoundError):  # claims without an environment need no MuJoCo
            found[name] = version(name)
    return found


def commit() -> str | None:
    """Commit of the code, marked if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=RECIPES, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
