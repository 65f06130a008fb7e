"""The directories of runs: which are finished, which resume, and a lock against two processes in one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf
from yaml import YAMLError

from harness.checkpoints import NAME, Checkpoints, all_checkpoints, named_error, remove_checkpoints
from harness.stopping import stop
from torchrl_spar import InputError, NonFiniteError
from torchrl_spar.errors import first_line

# Options that may differ when a run resumes.
FREE = ("runs", "out", "threads", "eval.background", "resume", "checkpoint.seconds")
LOCK = ".lock"
# Options that were added later, with the values that older runs had in effect.
LATER = {"spar.members": 1, "keep_policies": 1}
# What every run leaves in results.json.
RESULTS = ("dataset", "env", "env_kwargs", "seed", "method", "updates")


def run_directory(runs: Path, dataset: str, method: str, seed: int) -> Path:
    return runs / re.sub(r"[^\w.-]+", "-", dataset).strip("-.") / method / f"seed{seed}"


@contextmanager
def started(cfgs: Sequence[DictConfig], *, wait: bool = False) -> Iterator[Checkpoints | None]:
    """Locks the directory of a run, or of a stack of runs, and yields its checkpoints; None if all is finished.

    The checkpoints are removed when what is done with them ends well.

    Args:
        cfgs: one a run, each with its own ``seed`` and ``out``; a stack's lie side by side.
        wait: for another process that holds it.

    Raises:
        InputError: if another process holds it, it is something else, or it was begun with other options.
    """
    outs = [Path(cfg.out) for cfg in cfgs]
    home = outs[0] if len(outs) == 1 else outs[0].parent
    with claim(home, wait=wait):
        if not cfgs[0].resume:
            for out in outs:
                check_new(out)
            if all_checkpoints(home):
                check_new(home)
        elif all([is_finished(out, cfg) for out, cfg in zip(outs, cfgs)]):
            for out in outs:
                print(f"{out}: finished before", flush=True)
            remove_checkpoints(home)  # a process may have been killed right after its last result
            yield None
            return
        with stop.handled():
            seconds, which = cfgs[0].checkpoint.seconds, {str(i): options(cfg) for i, cfg in enumerate(cfgs)}
            checkpoints = Checkpoints(home, seconds, which)
            try:
                yield checkpoints
            except NonFiniteError as err:
                raise NonFiniteError(f"{err}; {checkpoints.way_back}") from None
        remove_checkpoints(home)


@contextmanager
def claim(out: Path, *, wait: bool) -> Iterator[None]:
    """Makes and locks a directory. A killed process releases its lock; a directory that stays empty is removed."""
    path = out / LOCK
    try:
        import fcntl
    except ImportError:  # not on Windows, where nobody is kept out
        yield
        return
    while True:
        with named_error(out, "cannot be used as a run's directory"):
            out.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                file.close()
                raise InputError(
                    f"out={out}: another process is at it; wait for its end, or give another directory"
                ) from None
            print(f"{out}: another process is at it, waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        # The process that held the lock may have removed the file, and another one may hold a new file.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            for directory in (out / NAME, out):
                with suppress(OSError):  # not empty
                    directory.rmdir()


def check_new(out: Path) -> None:
    """Refuses a run's directory that holds anything but a lock and unfinished files."""
    if contents(out):
        raise InputError(
            f"out={out}: exists and is not empty; resume=true resumes the run in it, "
            "else give another directory or remove it"
        )


def contents(out: Path) -> set[str]:
    """Names in a directory, without those of a run that has not begun."""
    if not out.is_dir():
        return {out.name} if out.exists() else set()
    found = {path.name for path in out.iterdir() if not path.match(".*.partial")} - {LOCK}
    return found if all_checkpoints(out) else found - {NAME}


def read_run(run: Path) -> tuple[DictConfig, dict[str, Any]]:
    """The options and the results of a finished run.

    Raises:
        InputError: if a file cannot be read.
    """
    config, results = run / "config.yaml", run / "results.json"
    try:
        options = OmegaConf.load(config)
        if not isinstance(options, DictConfig) or not options:
            raise ValueError("it holds no options")
    except (OSError, ValueError, YAMLError) as err:
        raise InputError(f"{config}: damaged, or no run's options: {first_line(err)}") from None
    try:
        found = json.loads(results.read_text())
        if missing := [name for name in RESULTS if name not in (found if isinstance(found, dict) else {})]:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (OSError, ValueError) as err:
        raise InputError(f"{results}: damaged, or no run's results: {first_line(err)}") from None
    return options, found


def is_finished(out: Path, cfg: DictConfig) -> bool:
    """Whether the directory holds a finished run with these options.

    Raises:
        InputError: see `check_options`.
    """
    return check_options(out, cfg) and (out / "results.json").is_file()


def check_options(out: Path, cfg: DictConfig) -> bool:
    """Whether the directory holds a run with these options.

    Raises:
        InputError: if the run there has other options, or the directory is something else.
    """
    if not (out / "config.yaml").is_file():
        if contents(out):
            raise InputError(f"out={out}: exists and is not a run's directory; give another one, or remove it")
        return False
    if different := sorted(differences(OmegaConf.load(out / "config.yaml"), cfg)):
        raise InputError(
            f"out={out}: of a run with other options ({', '.join(different)}); "
            "give them as they were, another directory, or remove it"
        )
    return True


def differences(one: Container, other: Container) -> set[str]:
    """Dotted names of the options in which two configurations differ."""
    left, right = options(one), options(other)
    names = left.keys() | right.keys()
    return {name for name in names if (name in left, left.get(name)) != (name in right, right.get(name))}


def options(cfg: Container) -> dict[str, Any]:
    """The options that identify a run."""
    flat = flatten(OmegaConf.to_container(cfg, resolve=True))
    return {name: value for name, value in flat.items() if name not in FREE and (name, value) not in LATER.items()}


def flatten(options: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(options, dict) or not options:
        return {prefix.removesuffix("."): options}
    parts = (flatten(value, f"{prefix}{name}.") for name, value in options.items())
    return {name: value for part in parts for name, value in part.items()}
