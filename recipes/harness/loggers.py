"""TorchRL's loggers beside metrics.csv: a run of its own for each seed, and one line when a service refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from torchrl.record.loggers import Logger, MLFlowLogger, get_logger

from torchrl_spar import InputError
from torchrl_spar.errors import first_line

BACKENDS = ("csv", "tensorboard", "wandb", "mlflow", "trackio")
PROJECT = "torchrl_spar"
# Read at the start: MLflow writes where it logs to into the environment.
MLFLOW_SERVER = os.environ.get("MLFLOW_TRACKING_URI")


def make_logger(out: Path, backend: str) -> RunLogger | None:
    """The logger of a run in directory `out`, which is made; none for csv."""
    if backend not in BACKENDS:
        raise InputError(f"logger.backend={backend}: must be one of {', '.join(BACKENDS)}")
    if backend != "csv" and find_spec(backend) is None:
        raise InputError(f"logger.backend={backend}: needs 'pip install {backend}'; csv needs nothing")
    out.mkdir(parents=True, exist_ok=True)
    return None if backend == "csv" else RunLogger(out, backend)


class RunLogger:
    """A logger whose errors name the option; `out` is the run's name at a service."""

    def __init__(self, out: Path, backend: str) -> None:
        self.backend = backend
        with self._named_error():
            self.logger = _open(out, backend)

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        with self._named_error():
            self.logger.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        with self._named_error():
            self.logger.close()
            if isinstance(self.logger, MLFlowLogger):  # whose close leaves the process's one active run open
                import mlflow

                mlflow.end_run()

    @contextmanager
    def _named_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as err:  # no login, no server, no room: each library has errors of its own
            raise InputError(f"logger.backend={self.backend}: {first_line(err)}") from err


def _open(out: Path, backend: str) -> Logger:
    if backend == "mlflow":  # get_logger's is a directory of files, which MLflow no longer takes
        import mlflow

        if mlflow.active_run() is not None:
            raise InputError("one run a process: on a GPU, where seeds=[...] is one stack, give one seed at a time")
        logger = MLFlowLogger(PROJECT, MLFLOW_SERVER or f"sqlite:///{out.resolve() / 'mlflow.db'}")
        mlflow.set_tag("mlflow.runName", str(out))
        return logger
    # Without these a second run of a process, or of the same name, would continue the first one's log.
    options = {
        "wandb_kwargs": {"project": PROJECT, "reinit": "create_new"},
        "trackio_kwargs": {"project": PROJECT, "resume": "never"},
    }
    name = "log" if backend == "tensorboard" else str(out)  # TensorBoard's is a directory within out
    return get_logger(backend, str(out), name, **options)
