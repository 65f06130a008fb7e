"""Evaluation beside training, in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import exploration_type, set_exploration_type

from torchrl_spar.errors import InputError, check_policy
from torchrl_spar.evaluation.rollouts import evaluate

# The exit code of a process that has come upon this class again while it read the script.
_NO_GUARD = 96


class BackgroundEvaluator:
    """:func:`evaluate` in a process of its own, one evaluation after the other.

    The returns are those of :func:`evaluate` with one torch thread. Leaving the ``with`` block,
    or the end of this process however it comes, ends the other one and what it has not finished.
    The process is spawned: as always in Python, a script needs ``if __name__ == "__main__":``. Without it the first
    evaluation ends in an :class:`InputError` that says so.

    Source: ours. TorchRL's ``Evaluator`` gives its episodes no seeds.

    Examples:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import BackgroundEvaluator, evaluate, make_spar_loss
        >>> policy = make_spar_loss(3, Bounded(-2, 2, (1,))).actor
        >>> with BackgroundEvaluator() as evaluator:
        ...     evaluator.submit("update 0", policy, "Pendulum-v1", episodes=2, seed=5)
        ...     [(key, returns)] = evaluator.drain()
        >>> key, torch.equal(returns, evaluate(policy, "Pendulum-v1", episodes=2, seed=5))
        ('update 0', True)
    """

    def __init__(self) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            os._exit(_NO_GUARD)  # which the script's own process reports
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name="evaluation", daemon=True)
        with without_ctrl_c():
            self._process.start()
        theirs.close()
        self._unfinished: deque[tuple[Any, bytes]] = deque()
        self._finished: list[tuple[Any, torch.Tensor]] = []
        self._is_idle = False  # the process says when it has started

    def submit(
        self, key: Any, policy: TensorDictModuleBase, env_id: str, episodes: int = 10, seed: int = 0, **env_kwargs: Any
    ) -> None:
        """Takes a snapshot of the policy and queues its evaluation; takes about 1 ms and never waits for another one.

        Args:
            key: given back with the returns, e.g. the training step; errors name it.
            policy: as for :func:`evaluate`; it must pickle.
            env_id: as for :func:`evaluate`.
            episodes: as for :func:`evaluate`.
            seed: as for :func:`evaluate`.
            **env_kwargs: as for :func:`evaluate`.

        Raises:
            InputError: if the policy is not an actor or does not pickle, or the process is gone.
        """
        check_policy("policy", policy, "action")
        try:
            request = pickle.dumps((exploration_type(), (policy, env_id, episodes, seed), env_kwargs))
        except (pickle.PicklingError, AttributeError, TypeError) as err:
            raise InputError(f"evaluation {key!r}: the policy does not pickle: {err}") from None
        self._unfinished.append((key, request))
        self._send_next()

    def poll(self) -> list[tuple[Any, torch.Tensor]]:
        """Evaluations finished since the last call, in the order of submission: keys and returns ``[episodes]``.

        Raises:
            InputError: if an evaluation failed or its process is gone; the message names the key.
        """
        while self._unfinished and self._connection.poll():
            self._receive()
        return self._take()

    def drain(self) -> list[tuple[Any, torch.Tensor]]:
        """Waits for all submitted evaluations, then does what :meth:`poll` does, errors included."""
        while self._unfinished:
            self._receive()
        return self._take()

    def close(self) -> None:
        """Ends the process, busy or not."""
        self._process.terminate()
        self._process.join()
        self._connection.close()

    def __enter__(self) -> BackgroundEvaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_next(self) -> None:
        # One request at a time: it is read at once, so that sending a large policy does not wait.
        if self._is_idle and self._unfinished:
            self._is_idle = False
            try:
                self._connection.send_bytes(self._unfinished[0][1])
            except OSError:
                raise self._lost() from None

    def _take(self) -> list[tuple[Any, torch.Tensor]]:
        finished, self._finished = self._finished, []
        return finished

    def _receive(self) -> None:
        try:
            kind, content = self._connection.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        self._is_idle = True
        if kind == "ready":
            self._send_next()
            return
        key, _ = self._unfinished.popleft()
        self._send_next()
        if kind == "input error":
            raise InputError(f"evaluation {key!r}: {content}")
        if kind == "error":
            raise RuntimeError(f"evaluation {key!r} failed in its process:\n{content}")
        self._finished.append((key, torch.tensor(content, dtype=torch.float64)))

    def _lost(self) -> InputError:
        self._process.join()
        code, what = self._process.exitcode or 0, f"evaluation {self._unfinished[0][0]!r}: its process"
        if code == _NO_GUARD:
            return InputError(
                f"{what} is started anew while it reads your script, which lacks the guard: put what the script does "
                'under if __name__ == "__main__":, or evaluate in line'
            )
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}; the system does so where memory runs out (SIGKILL)"
        else:
            how = f"ended with exit code {code}; what it printed says why"
        return InputError(f"{what} {self._process.pid} {how}. Evaluate in line to do without it")


def _serve(connection: Connection) -> None:
    """Evaluates requests from the connection until it closes."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    connection.send(("ready", None))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        try:
            kind, args, env_kwargs = pickle.loads(request)
            with set_exploration_type(kind):
                # A list: tensors travel as shared memory, which needs both processes alive.
                answer: tuple[str, Any] = ("returns", evaluate(*args, **env_kwargs).tolist())
        except InputError as err:
            answer = ("input error", str(err))
        except Exception:
            answer = ("error", traceback.format_exc())
        connection.send(answer)


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Processes started inside get no Ctrl-C: their parent gets it and ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Ends this process when its parent is killed, which closes nothing while an evaluation runs."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
