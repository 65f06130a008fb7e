"""D4RL's tasks through compare.py: data, environments, presets and seeds of each; our scores beside the paper's.

python recipes/reproduce_d4rl.py files=~/.d4rl/datasets                        # SPAR on locomotion, seeds 0 to 3
python recipes/reproduce_d4rl.py files=~/.d4rl/datasets tasks=locomotion,antmaze,adroit method=spar,iql,rebrac_tuned
python recipes/reproduce_d4rl.py tasks=pen-human seed=0,1 spar.compile=true    # further options are compare.py's

tasks: names such as hopper-medium-replay, or the families. files: a folder with D4RL's own files, such as
hopper_medium-v2.hdf5 and pen-human-v1.hdf5; without them AntMaze and Adroit are Minari's sets. Minari's ant is another
than D4RL's, which the table marks. runs: the directory (outputs/d4rl). The same command resumes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import compare  # noqa: F401 - registers the options
from harness.directory import run_directory
from harness.launch import RECIPES
from harness.options import checked, explain
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from reporting.names import label, row, score_of
from reporting.remaining import remaining

from torchrl_spar import InputError
from torchrl_spar.paths import user_path

# The SPAR paper's scores that we have read.
PAPER = {
    "halfcheetah-medium-expert": 97.0, "hopper-medium-replay": 101.9, "walker2d-medium-expert": 113.4,
    "antmaze-umaze-diverse": 76.7, "pen-human": 62.7, "pen-cloned": 76.2,
}  # fmt: skip
DEFAULTS = {"tasks": "locomotion", "files": "", "method": "spar", "seed": "0,1,2,3", "runs": "outputs/d4rl"}


@dataclass(frozen=True)
class Task:
    """D4RL's file and the environment that it belongs to, and Minari's set, which names its own environment."""

    name: str
    family: str
    preset: str
    file: str | None = None
    env: str = "null"
    minari: str | None = None


def all_tasks() -> list[Task]:
    tasks = []
    for robot, level in product(("HalfCheetah", "Hopper", "Walker2d"), ("medium", "medium-replay", "medium-expert")):
        file = f"{robot.lower()}_{level.replace('-', '_')}-v2.hdf5"
        tasks.append(Task(f"{robot.lower()}-{level}", "locomotion", "d4rl", file, f"{robot}-v4"))
    for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
        tasks.append(Task(f"antmaze-{maze}", "antmaze", "[d4rl,antmaze]", minari=f"D4RL/antmaze/{maze}-v1"))
    for hand, level in product(("pen", "door", "hammer", "relocate"), ("human", "cloned")):
        file, env, own = f"{hand}-{level}-v1.hdf5", f"AdroitHand{hand.title()}-v1", f"D4RL/{hand}/{level}-v2"
        tasks.append(Task(f"{hand}-{level}", "adroit", "[d4rl,adroit]", file, env, own))
    return tasks


def chosen(names: str) -> list[Task]:
    tasks, asked = all_tasks(), {*names.split(",")}
    known = dict.fromkeys(name for task in tasks for name in (task.family, task.name))
    if unknown := asked - known.keys():
        raise InputError(f"tasks={','.join(sorted(unknown))}: must be of {', '.join(known)}")
    return [task for task in tasks if {task.name, task.family} & asked]


def source(task: Task, folder: Path | None) -> tuple[str, str]:
    """The data and the environment of a task, as options of compare.py."""
    if folder and task.file and (folder / task.file).is_file():
        return str(folder / task.file), task.env
    if task.minari is None:
        raise InputError(f"files={folder or ''}: {task.name} needs a folder with D4RL's {task.file}")
    return f"minari:{task.minari}", "null"


def table(tasks: dict[Task, str], methods: list[str], runs: Path, seeds: list[int]) -> str:
    """Scores, mean +- standard deviation (seeds), as far as runs are finished."""
    lines = [row("task", "SPAR (paper)", *(f"{label(method)}, here" for method in methods))]
    lines.append(row(*["---"] * (len(methods) + 2)))
    for task, dataset in tasks.items():
        cells = []
        for method in methods:
            outs = [run_directory(runs, dataset, method, seed) / "results.json" for seed in seeds]
            scores = [score_of(json.loads(out.read_text())) for out in outs if out.is_file()]
            spread = f" +- {stdev(scores):.1f}" if len(scores) > 1 else ""
            cells.append(f"{mean(scores):.1f}{spread} ({len(scores)})" if scores else "-")
        mark = " (another ant)" if task.family == "antmaze" else ""
        lines.append(row(task.name + mark, str(PAPER.get(task.name, "-")), *cells))
    return "\n".join(lines)


def quoted(value: str) -> str:
    """As Hydra's grammar reads it whole."""
    return "'" + value.replace("'", "\\'") + "'"


def run_to_its_end(command: list[str]) -> int:
    """Waits until it has saved and ended after a Ctrl-C, which it gets itself; passes SIGTERM on."""
    child = subprocess.Popen(command)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def main(arguments: list[str]) -> int:
    if bare := [argument for argument in arguments if "=" not in argument]:
        raise InputError(f"{bare[0]}: options are given as name=value, such as tasks=hopper-medium")
    given = dict(argument.split("=", 1) for argument in arguments)
    if taken := sorted(given.keys() & {"dataset", "env", "preset", "seeds"}):
        raise InputError(f"{taken[0]}={given[taken[0]]}: the task sets it; for others there is compare.py")
    own = DEFAULTS | {name: given[name] for name in DEFAULTS.keys() & given.keys()}
    rest = [argument for argument in arguments if argument.split("=", 1)[0] not in DEFAULTS]
    with initialize_config_dir(str(RECIPES / "config"), version_base=None):
        checked(compose("compare", rest), "compare")
    folder = Path(user_path(own["files"])) if own["files"] else None
    if folder and not folder.is_dir():
        raise InputError(f"files={folder}: no such folder")
    sources = {task: source(task, folder) for task in chosen(own["tasks"])}
    methods, numbers = own["method"].split(","), own["seed"].split(",")
    if not all(map(str.isdecimal, numbers)) or len({*numbers}) < len(numbers):
        raise InputError(f"seed={own['seed']}: must be different whole numbers, as 0,1,2")
    seeds = [int(number) for number in numbers]
    sweeps = defaultdict(list)
    for task, (dataset, env) in sources.items():
        sweeps[f"env={env}", f"preset={task.preset}"].append(quoted(dataset))
    common = [f"runs={quoted(str(user_path(own['runs'])))}", *rest]
    jobs = [
        [f"dataset={data}", f"method={method}", *options, *common]
        for options, found in sweeps.items()
        for data, method in product(found, methods)
    ]
    with initialize_config_dir(str(RECIPES / "config"), version_base=None):
        cfgs = [(checked(compose("compare", job), "compare"), seeds) for job in jobs]
    print(f"In all: {remaining(cfgs)}", flush=True)
    failed = 0
    for options, found in sweeps.items():
        sweep = [f"dataset={','.join(found)}", f"method={own['method']}", f"seed={own['seed']}", *options, *common]
        code = run_to_its_end([sys.executable, str(RECIPES / "compare.py"), *sweep])
        if code < 0 or code > 128:  # it was stopped
            return code
        failed |= code
    names = [cfg.method.name for cfg, _ in cfgs]
    datasets = {task: dataset for task, (dataset, _) in sources.items()}
    print(table(datasets, list(dict.fromkeys(names)), Path(cfgs[0][0].runs), seeds))
    return failed


if __name__ == "__main__":
    if {"--help", "-h"} & {*sys.argv}:
        sys.exit(print(__doc__))
    try:
        sys.exit(main(sys.argv[1:]))
    except (InputError, HydraException, OmegaConfBaseException, ValueError) as err:
        known = isinstance(err, (InputError, ValueError))
        sys.exit(f"error: {err if known else explain(err, 'compare', beside=DEFAULTS)}")
