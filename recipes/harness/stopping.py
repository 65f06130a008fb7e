"""SIGTERM and Ctrl-C: a run ends where nothing is lost, with one line instead of a traceback."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """Ends the run after a signal; not an Exception, so that no `except Exception` catches it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


class Stop:
    """The signal that this process has received; it ends the run at once, or where training calls `check`."""

    signum: int | None = None
    _at_once = True
    _forward = False

    @contextmanager
    def handled(self, *, forward: bool = False) -> Iterator[None]:
        """Handles both signals; with `forward`, child processes get them, too."""
        self.check()
        if threading.current_thread() is not threading.main_thread():  # as on Ray, where Python takes none
            yield
            return
        before = {signum: signal.signal(signum, self._take) for signum in SIGNALS}
        forwarded, self._forward = self._forward, forward
        try:
            yield
        finally:
            self._forward = forwarded
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def at_once(self, value: bool) -> Iterator[None]:
        """Sets whether a signal ends the run at once: not while training changes its state."""
        before, self._at_once = self._at_once, value
        try:
            if value:
                self.check()
            yield
        finally:
            self._at_once = before

    def __reduce__(self) -> str:
        return "stop"  # joblib sends functions of a script by value, with all that they name: to it, its own process's

    def check(self) -> None:
        if self.signum is not None:
            raise Stopped(self.signum)

    def _take(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)  # who presses Ctrl-C twice does not want to wait
        if self._forward:
            for child in multiprocessing.active_children():
                child.terminate()
        if self._at_once:
            raise Stopped(signum)


stop = Stop()


@cache
def stop_with_parent() -> None:
    """Sends this process SIGTERM once its parent is gone: a pool's worker that nobody waits for."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
