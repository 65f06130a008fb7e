"""How long a sweep of compare.py takes: by finished runs of the same sizes, else by the first updates of each method.

Hydra calls `Remaining` before the sweep (config/compare.yaml); `Timed` tells of what has no record yet.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Any

from harness.directory import LATER, flatten, run_directory
from harness.environment import dataset_name
from harness.options import checked
from harness.run import Run
from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchrl_spar import InputError

# Runs of a method that agree in these options take about as long.
SIZES = (
    "batch_size", "spar.updates", "spar.members", "spar.compile", "spar.loss.hidden", "eval.interval", "eval.episodes",
    "eval.final_episodes", "anchor.steps", "vae.steps", "critics.steps", "method.batch_size",
)  # fmt: skip
# Tells the processes of the sweep how many runs of each method have no record.
LEFT = "COMPARE_RUNS_LEFT"


class Remaining(Callback):
    """Prints what a sweep has left to do."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Left unresolved: `method.name=${method.algorithm}` differs between runs.
        hydra: Any = OmegaConf.to_container(config.hydra, resolve=False)
        given = [f"{key}={value}" for key, value in hydra["sweeper"]["params"].items()]
        parsed = OverridesParser.create().parse_overrides([*given, *hydra["overrides"]["task"]])
        seeds = defaultdict(list)  # seeds share a configuration, and composing one takes time
        for job in BasicSweeper.split_arguments(parsed, None)[0]:
            (seed,) = (part for part in job if part.startswith("seed="))
            seeds[tuple(part for part in job if part != seed)].append(int(seed.removeprefix("seed=")))
        # The sweep itself reports wrong options.
        with suppress(InputError, HydraException, OmegaConfBaseException):
            name = kwargs["config_name"]
            print(remaining((checked(compose(name, list(job)), "compare"), own) for job, own in seeds.items()))


class Timed(Run):
    """A run that tells, where there is no record of its method, how long its updates take."""

    begun: tuple[int, float] | None = None

    def record(self, phase: str, step: int, metrics: dict[str, Any]) -> None:
        super().record(phase, step, metrics)
        left = json.loads(os.environ.get(LEFT, "{}")).get(self.method, 0)
        if not left or phase in ("anchor", "vae", "critics") or self.begun == (0, 0.0):
            return
        now = time.perf_counter()
        if self.begun is None:
            self.begun = step, now
            return
        rate = (step - self.begun[0]) / (now - self.begun[1])
        hours, self.begun = left * self.cfg.spar.updates / rate / 3600, (0, 0.0)
        print(
            f"{self.out}: {rate:.0f} updates a second now, so {hours:.2f} hours for the updates of {self.method}'s "
            f"{left} runs, one a core",
            flush=True,
        )


def remaining(jobs: Iterable[tuple[DictConfig, list[int]]]) -> str:
    """What is left of runs, given as configurations with their seeds, and its hours where finished runs tell them."""
    left, unknown, finished, seconds = Counter[str](), Counter[str](), 0, 0.0
    for cfg, seeds in jobs:
        outs = [run_directory(Path(cfg.runs), dataset_name(cfg), cfg.method.name, seed) for seed in seeds]
        count = sum(not (out / "results.json").is_file() for out in outs)
        finished += len(outs) - count
        left[cfg.method.name] += count
        if record := records(cfg):
            seconds += count * mean(record)
        else:
            unknown[cfg.method.name] += count
    os.environ[LEFT] = json.dumps(unknown)
    lines = [f"{sum(left.values())} runs to do, {finished} finished."]
    if known := left.total() - unknown.total():
        lines.append(
            f"{seconds / 3600:.2f} hours, one run a core, for {known}: as finished runs of the same sizes took."
        )
    if unknown.total():
        lines.append(f"No record yet of {', '.join(+unknown)}: their first updates will tell.")
    return "\n".join(lines)


def records(cfg: DictConfig) -> list[float]:
    """Seconds of the finished runs of the same method and sizes."""
    found = []
    for results in Path(cfg.runs).glob(f"*/{cfg.method.name}/seed*/results.json"):
        if sizes(OmegaConf.load(results.with_name("config.yaml"))) == sizes(cfg):
            found.append(json.loads(results.read_text())["wall_seconds"])
    return found


def sizes(cfg: Any) -> list[Any]:
    options = flatten(OmegaConf.to_container(cfg))
    return [options.get(name, LATER.get(name)) for name in SIZES]
