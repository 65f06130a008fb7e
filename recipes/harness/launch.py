"""What every recipe needs: Hydra with one clear line for a wrong option, the device, scores in words."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.options import OPTIONS, checked, ensure_registered, explain, print_help
from harness.stopping import Stopped, stop
from torchrl_spar import InputError, evaluate, normalized_score
from torchrl_spar.errors import check_device

RECIPES = Path(__file__).resolve().parents[1]
# What evaluations set themselves.
RESERVED = {"id", "render_mode", *inspect.signature(evaluate).parameters}
# What the user typed, before run_recipe adds to it.
ARGUMENTS = tuple(sys.argv[1:])


def run_recipe(
    main: Callable[[DictConfig], None], name: str, *, sweeps: Sequence[str] | None = None, more_help: str = ""
) -> None:
    """Runs `main` under Hydra. An `InputError` ends in one line and an exit code, in a sweep after the other runs.

    Args:
        main: of the recipe.
        name: of its options.
        sweeps: the options of which commas give several runs; None allows all.
        more_help: what `--help` says after the configuration.
    """
    if {"--help", "-h"} & {*sys.argv}:
        about = inspect.getdoc(sys.modules["__main__"]) or ""
        if name in OPTIONS:
            print_help(name, about)
        else:
            print(f"{about}\n\n{(RECIPES / 'config' / f'{name}.yaml').read_text()}\n{more_help}")
        return

    has_options = name in OPTIONS

    def guarded(cfg: DictConfig) -> None:
        try:
            if has_options:
                ensure_registered(name)
            plain = checked(cfg, name)
            expand_home(plain)
            check_seeds(plain)
            main(plain)
        except (InputError, HydraException) as err:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # which Hydra keeps until all runs are done
            print(f"error: {explain(err, name)}", file=sys.stderr)
            sys.exit(2)
        except Stopped as err:
            if "resume" not in cfg:
                raise
            how = "the same command" if cfg.resume else f"the same command with resume=true out={cfg.out}"
            print(f"{err}: {how} resumes it", file=sys.stderr)
            sys.exit(128 + err.signum)

    # Each recipe owns its output: Hydra's log files are not used, and what --multirun notes lies aside.
    own = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    own += ["hydra.sweep.dir=outputs/multirun", "hydra.sweep.subdir=."]
    arguments = [quote(argument) for argument in sys.argv[1:]]
    if sweeps is not None and not any(argument.startswith("-") for argument in arguments):
        arguments.append("--multirun")  # else Hydra blames the commas for a wrong value
    sys.argv[1:] = with_overrides(arguments, own)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of being printed
    try:
        check_sweeps(sys.argv[1:], sweeps)
        with stop.handled():
            hydra.main(version_base=None, config_path=str(RECIPES / "config"), config_name=name)(guarded)()
    except (InputError, HydraException, OmegaConfBaseException) as err:
        print(f"error: {explain(err, name)}", file=sys.stderr)
        sys.exit(2)
    except Stopped as err:  # between runs, or where there is nothing to go on with
        print(err, file=sys.stderr)
        sys.exit(128 + err.signum)


def with_overrides(arguments: Sequence[str], added: Sequence[str]) -> list[str]:
    """Moves Hydra's flags behind the overrides, which its parser accepts only in one piece."""
    given, _ = get_args_parser().parse_known_intermixed_args(arguments)
    overrides = Counter(given.overrides)
    flags: list[str] = []
    for argument in reversed(arguments):
        if overrides[argument]:
            overrides[argument] -= 1
        else:
            flags.insert(0, argument)
    return [*given.overrides, *added, *flags]


def quote(argument: str) -> str:
    """Quotes the values of an override that hold what Hydra's grammar accepts only in quotes, as paths may.

    Examples:
        >>> quote("out=~/x"), quote("dataset=~/a,b,~/c"), quote("~trainer")
        ("out='~/x'", "dataset='~/a',b,'~/c'", '~trainer')
        >>> quote("runs=/tmp/données"), quote("runs=/tmp/a (1)"), quote("seed=range(0,3)")
        ("runs='/tmp/données'", "runs='/tmp/a (1)'", 'seed=range(0,3)')
    """
    if {"'", '"'} & {*argument}:
        return argument
    special = r"~#&;!<>^`\x80-\U0010ffff"
    if not re.search(r"[=,\[]\s*\w+\(", argument):  # a function of Hydra's
        special += "()"
    return re.sub(rf"(?<=[=,\[])[^=,\[\]{{}}]*[{special}][^,\[\]{{}}]*", lambda value: f"'{value[0]}'", argument)


def check_sweeps(arguments: Sequence[str], sweeps: Sequence[str] | None) -> None:
    """Refuses several values of an option whose runs would share a directory, as `method.name` has none of them."""
    if sweeps is None:
        return
    overrides = OverridesParser.create().parse_overrides(get_args_parser().parse_args(arguments).overrides)
    names = [str(override.get_value_string()) for override in overrides if override.key_or_group == "method.name"]
    for override in overrides:
        name = override.key_or_group
        is_swept = override.is_sweep_override() and not name.startswith("hydra")
        if is_swept and name == "method" and names and "${method." not in names[-1]:
            raise InputError(f"method.name={names[-1]}: all methods would have this name; give one method")
        if is_swept and name not in sweeps and not any(f"${{{name}}}" in each for each in names):
            raise InputError(
                f"{name}: one value at a time, with a runs=... of its own; commas are for {', '.join(sweeps)}, and for "
                f"an option that method.name tells apart, as in 'method.name=x-${{{name}}}'"
            )


def expand_home(cfg: DictConfig) -> None:
    """Expands `~` in every path."""
    for key in cfg:
        if OmegaConf.is_missing(cfg, key):  # TorchRL's own configs leave open what it fills in itself
            continue
        name, value = str(key), cfg[key]
        if isinstance(value, DictConfig):
            expand_home(value)
        elif isinstance(value, str) and value.startswith("~"):
            path = os.path.expanduser(value)
            if path.startswith("~"):
                raise InputError(f"{name}={value}: there is no such home directory here; give the whole path")
            cfg[name] = path


def check_seeds(cfg: DictConfig) -> None:
    """Refuses a list of seeds that is empty or names one twice."""
    if (seeds := cfg.get("seeds")) is not None and (not seeds or min(seeds) < 0 or len({*seeds}) < len(seeds)):
        raise InputError(f"seeds={seeds}: must be a list of different whole numbers from 0 on, such as [0,1,2]")


def best_device(name: str | None) -> torch.device:
    """The named device, or cuda if there is one, else cpu."""
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return torch.device(device)


def summarize(env: str | None, returns: torch.Tensor, env_kwargs: Mapping[str, Any]) -> dict[str, float | None]:
    """Mean, spread and normalised score of episodes; the score is None where D4RL's references do not apply."""
    mean, score = returns.mean().item(), None
    # Else it is another environment under a known name, or a kitchen that rewards all steps after a task.
    if env is not None and is_own(env_kwargs.get("entry_point")) and env_kwargs.get("remove_task_when_completed", True):
        with suppress(InputError):
            score = normalized_score(env, returns).mean().item()
    return {"return_mean": mean, "return_std": returns.std(correction=0).item(), "normalized": score}


def is_own(entry_point: str | None) -> bool:
    """Whether an environment is what Gymnasium or gymnasium-robotics registers by its id."""
    return entry_point is None or entry_point.startswith(("gymnasium.", "gymnasium_robotics."))


def describe(row: Mapping[str, float | None], episodes: int, steps: int | None = None) -> str:
    """What `summarize` returns, in words, with the step limit of the episodes if there is one."""
    score = "" if row["normalized"] is None else f", normalised score {row['normalized']:.1f}"
    limit = "" if steps is None else f" of up to {steps} steps"
    return f"return {row['return_mean']:.1f} +- {row['return_std']:.1f} over {episodes} episodes{limit}{score}"
