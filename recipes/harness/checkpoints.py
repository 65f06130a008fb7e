"""The checkpoints of a run: all it needs to resume bit for bit. The last two are kept."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointAdapter,
    CheckpointRotation,
    GlobalRNGState,
    StateDictCheckpointAdapter,
)

from harness.stopping import Stopped, stop
from torchrl_spar import InputError, NonFiniteError
from torchrl_spar.errors import first_line

NAME = "checkpoints"
CHECKSUMS = "sha256.json"
# Names in TensorDict's archive; a member of any other name could be a pickle.
MEMBER = re.compile(r"meta\.json|tensor_\d{8}\.memmap")


class Part(Protocol):
    """An object with a state."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


P = TypeVar("P", bound=Part)


class Checkpoints:
    """Saves and restores the parts of a run. A part gets its saved state back when it is added.

    Args:
        home: directory of the run, or of the stack of runs; they lie in ``checkpoints`` in it.
        seconds: from the end of one to the begin of the next.
        options: of the runs, to tell a checkpoint of others.

    Raises:
        InputError: if there are checkpoints and none is usable. A damaged one before a good one costs a warning.
    """

    def __init__(self, home: Path, seconds: float, options: dict[str, Any]) -> None:
        self.directory, self.interval, self.options = home / NAME, seconds, options
        self.rotation = CheckpointRotation(self.directory, keep_last=2)
        self.parts: dict[str, Part] = {}
        # From the loaded checkpoint: its number, the states whose parts are not added yet, the random state.
        self.number, self.waiting, self.random = 0, dict[str, Any](), dict[str, Any]()
        self.start = time.perf_counter()
        with named_error(self.directory, "cannot be used"):
            self.directory.mkdir(parents=True, exist_ok=True)
            for left in self.directory.glob(".checkpoint-*"):  # by a killed process
                shutil.rmtree(left, ignore_errors=True)
        self._load()
        self.due = time.monotonic() + seconds

    def add(self, name: str, part: P) -> P:
        """Saves the part from now on, and restores the state that was saved under its name.

        The random state is restored with the last of the saved parts; code before that may draw at will.
        """
        self.parts[name] = part
        if self.knows(name):
            try:
                part.load_state_dict(self.waiting.pop(name))
                if not self.waiting:
                    GlobalRNGState().load_state_dict(self.random)
            except InputError:
                raise
            except Exception as err:  # whatever a library makes of a state that does not fit
                raise InputError(
                    f"{self.latest}: {name} does not fit this version of the code ({first_line(err)}); "
                    "go on with the version that wrote it, or start anew in another directory"
                ) from None
        return part

    def check_all_added(self) -> None:
        """
        Raises:
            InputError: if the loaded checkpoint has parts that nobody has added.
        """
        if self.waiting:
            raise InputError(
                f"{self.latest}: holds {', '.join(self.waiting)}, which this version of the code does not know; "
                "go on with the version that wrote it, or start anew in another directory"
            )

    def knows(self, name: str) -> bool:
        """Whether the loaded checkpoint holds a part of this name that has not been added yet."""
        return name in self.waiting

    def step(self) -> None:
        """Call it between two steps. Saves if a checkpoint is due or a signal has come; a signal then ends the run."""
        if stop.signum is not None or time.monotonic() >= self.due:
            self.save()
        stop.check()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """For evaluations, which take long and change no state: a signal ends them at once."""
        try:
            with stop.at_once(True):
                yield
        except Stopped:
            self.save()
            raise

    def save(self) -> None:
        """
        Raises:
            InputError: if it cannot be written; the checkpoints before it stay as they are.
        """
        if self.waiting:
            return  # nothing has changed since the checkpoint that was loaded
        with named_error(self.directory, f"the checkpoint cannot be written, {self.way_back}"):
            if not self.directory.is_dir():  # TorchRL would make an empty one
                raise FileNotFoundError("the directory is gone")
            self.rotation.save(self._bound(), step=self.number + 1)
        self.number += 1
        self.due = time.monotonic() + self.interval

    @property
    def way_back(self) -> str:
        """For errors."""
        return f"the last good checkpoint is {self.latest}" if self.number else "there is no checkpoint yet"

    @property
    def latest(self) -> Path:
        return self.directory / f"checkpoint-{self.number:012d}"

    @property
    def seconds(self) -> float:
        """Seconds since the run began, without the time between two processes."""
        return time.perf_counter() - self.start

    def state_dict(self) -> dict[str, Any]:
        """
        Raises:
            NonFiniteError: for NaN or infinity in any part: no run could resume from it.
        """
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        for where, tensor in named_tensors(parts):
            if not tensor.isfinite().all():
                raise NonFiniteError(f"NaN or infinity in {where}, so no checkpoint is made")
        return {
            "options": self.options, "seconds": self.seconds, "random": GlobalRNGState().state_dict(), "parts": parts,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["options"] != self.options:
            raise ValueError("it is of another run")
        start = self.start - state["seconds"]
        self.start, self.waiting, self.random = start, dict(state["parts"]), state["random"]

    def _bound(self) -> Checkpoint:
        return Checkpoint().register("run", self, adapter=VerifiedStateAdapter())

    def _load(self) -> None:
        """Loads the newest undamaged checkpoint, if there are any."""
        paths = all_checkpoints(self.directory.parent)
        for path in reversed(paths):
            try:
                self._bound().load(path)
                self.number = int(path.name.removeprefix("checkpoint-"))
                return
            except Exception as err:  # whatever a library makes of garbage
                warnings.warn(f"{path}: damaged, so the one before it is used ({first_line(err)})", stacklevel=4)
        if paths:
            raise InputError(f"{self.directory}: no checkpoint in it is usable; start anew in another directory")


def named_tensors(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in nested dicts and lists, with their paths."""
    if isinstance(state, torch.Tensor):
        yield name.removeprefix(": "), state
    elif isinstance(state, (Mapping, list, tuple)):
        for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
            yield from named_tensors(value, f"{name}: {key}")


def all_checkpoints(home: Path) -> list[Path]:
    """All checkpoints, oldest first, damaged ones included."""
    return sorted((home / NAME).glob("checkpoint-" + 12 * "[0-9]"))


def remove_checkpoints(home: Path) -> None:
    """Removes the checkpoints of a finished run."""
    shutil.rmtree(home / NAME, ignore_errors=True)


@contextmanager
def named_error(path: Path, what: str) -> Iterator[None]:
    """Turns an error of the file system into an InputError that names the file."""
    try:
        yield
    except OSError as err:
        raise InputError(f"{path}: {what}: {err.strerror or err}") from None


class VerifiedStateAdapter(CheckpointAdapter):
    """TorchRL's adapter for state dicts, with a SHA-256 of each file that is checked before any file is read.

    The payload is TensorDict's archive: of the kinds without pickle the only one that is not written through memory
    maps, where a full disk kills the process instead of raising an error.
    """

    adapter_id = "torchrl_spar.verified_state"

    def __init__(self) -> None:
        self.inner = StateDictCheckpointAdapter("archive")
        self.archive, self.files = self.inner.state_archive, (self.inner.state_archive, self.inner.schema_filename)

    def save(self, component: Any, path: Path, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            state = self.inner.save(component, path, args=args, kwargs=kwargs)
        except RuntimeError as err:  # torch's word for a full disk
            raise OSError(first_line(err)) from err
        (path / CHECKSUMS).write_text(json.dumps({name: sha256(path / name) for name in self.files}))
        return state

    def load(self, component: Any, path: Path, **options: Any) -> Any:
        expected = json.loads((path / CHECKSUMS).read_bytes())
        found = {file.name: sha256(file) for file in path.iterdir() if file.name != CHECKSUMS}
        if set(found) != set(self.files) or found != expected:
            raise ValueError("its files are not those that were written")
        with zipfile.ZipFile(path / self.archive) as archive:
            if foreign := [name for name in archive.namelist() if not MEMBER.fullmatch(name)]:
                raise ValueError(f"{self.archive} holds {foreign[0]}, which no checkpoint has")
        return self.inner.load(component, path, **options)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
