"""What tests share: small losses, random batches, one torch thread."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer

from torchrl_spar import SPARLoss, make_spar_loss

OBSERVATION, ACTION = 5, 3
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "datasets"

# A run of the main job in seconds.
SMALL = ["preset=smoke", "anchor.steps=5", "vae.steps=5", "critics.steps=5", "spar.updates=4"]
SMALL += ["eval.interval=2", "eval.final_episodes=2", "spar.loss.hidden=[8]", "spar.members=1", "logger.interval=2"]
# A second process costs seconds to start.
TINY = [*SMALL, "eval.background=false"]

# As this process found it: recipes that tests import change theirs.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# What every recipe loads.
LIBRARIES = "torchrl.checkpoint torchrl.collectors torchrl.objectives torchrl.record gymnasium.envs.mujoco minari"
LIBRARIES += " matplotlib.backends.backend_agg matplotlib.pyplot rich.console"
LIBRARIES += " hydra._internal.core_plugins.basic_sweeper hydra_plugins.hydra_joblib_launcher.joblib_launcher"

torch.set_num_threads(1)


def make_batch(*batch: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> TensorDict:
    """A random TED batch; every third position is terminated, every fifth truncated."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=dtype)

    index = torch.arange(torch.Size(batch).numel()).view(*batch, 1)
    terminated, truncated = index % 3 == 0, index % 5 == 0
    return TensorDict(
        {
            "observation": randn(OBSERVATION),
            "action": randn(ACTION).tanh(),
            "next": {
                "observation": randn(OBSERVATION),
                "reward": randn(1),
                "terminated": terminated,
                "truncated": truncated,
                "done": terminated | truncated,
            },
        },
        batch,
    )


def buffer_of(rows: Any, storage: Any = None, batch_size: int | None = 8, **options: Any) -> TensorDictReplayBuffer:
    """TorchRL's buffer of the rows, in memory unless ``storage`` says otherwise."""
    storage = LazyTensorStorage(len(rows)) if storage is None else storage
    buffer = TensorDictReplayBuffer(storage=storage, batch_size=batch_size, **options)
    buffer.extend(rows)
    return buffer


def build_loss(seed: int = 0, **options: Any) -> SPARLoss:
    """A small loss whose head, targets and scale are away from their start."""
    torch.manual_seed(seed)
    options = {"hidden": [16, 16], "with_value": True, **options}
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), **options)
    loss.residual_scale = torch.tensor([0.3, 0.5, 0.8])
    generator = torch.Generator().manual_seed(seed + 1)
    for name in ("actor_network_params", "target_actor_network_params", "target_qvalue_network_params"):
        for key, tensor in loss._modules[name].items(True, True):
            if key[-1] in ("weight", "bias") and "anchor" not in key:
                tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    return loss


def by_hand(policy: Any, env: Any, seed: int) -> float:
    """The return of a policy in an environment that somebody else made."""
    observation, _ = env.reset(seed=seed)
    total, done = 0.0, False
    while not done:
        with torch.no_grad():
            action = policy(observation=torch.as_tensor(observation, dtype=torch.float32)[None])[0].numpy()
        observation, reward, terminated, truncated, _ = env.step(action)
        total, done = total + float(reward), terminated or truncated
    return total


def total(losses: TensorDict) -> torch.Tensor:
    """The sum that one optimiser minimises."""
    return sum(value for key, value in losses.items() if key.startswith("loss_"))


def compose_recipe(name: str, *overrides: str) -> Any:
    """A recipe's configuration, checked, without starting the recipe."""
    from harness.options import checked
    from hydra import compose, initialize_config_dir

    importlib.import_module(name.replace("/", "."))  # which registers its options
    with initialize_config_dir(str(RECIPES / "config"), version_base=None):
        return checked(compose(name, list(overrides)), name)


class Started:
    """A recipe (or another script, by its path) as a user starts it, in a process and a session of its own.

    It is forked from one that has loaded the libraries, which takes seconds.
    """

    def __init__(self, script: str | Path, *overrides: Any, cwd: Path, **variables: str) -> None:
        self.command = [str(RECIPES / f"{script}.py" if isinstance(script, str) else script), *map(str, overrides)]
        self.scratch = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.scratch.name, name) for name in ("stdout", "stderr")]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES.split())
        environment = environment_in(cwd, variables)
        self.process = context.Process(target=_become, args=(self.command, cwd, environment, self.outputs))
        with patch.dict(os.environ, ENVIRONMENT, clear=True):
            self.process.start()

    def wait(self, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """Its exit code and what it said; it is killed if it takes longer."""
        self.process.join(seconds)
        self.kill()
        return subprocess.CompletedProcess(
            self.command, self.process.exitcode, *(path.read_text() for path in self.outputs)
        )

    def kill(self) -> None:
        """Kills it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()

    def until(self, condition: Callable[[], object]) -> None:
        """Waits until the condition holds; fails if the recipe ends before."""
        end = time.monotonic() + 120
        while not condition():
            assert self.process.exitcode is None and time.monotonic() < end, self.wait(0)
            time.sleep(0.01)


def run(script: str, *overrides: Any, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A recipe from its start to its end."""
    return Started(script, *overrides, cwd=cwd, **variables).wait()


def run_fresh(script: str, *overrides: Any, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Where libraries read the variables as they load."""
    command = [sys.executable, str(RECIPES / f"{script}.py"), *map(str, overrides)]
    environment = environment_in(cwd, variables)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, env=environment)


def environment_in(cwd: Path, variables: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MINARI_DATASETS_PATH": str(cwd / "minari"), **variables}


def _become(command: list[str], cwd: Path, environment: dict[str, str], outputs: list[Path]) -> None:
    os.setsid()
    for stream, path in zip((sys.stdout, sys.stderr), outputs):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = command
    tests = Path(__file__).parent
    sys.path[:] = [str(RECIPES), *(path for path in sys.path if not Path(path).is_relative_to(tests))]
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        # As an interpreter ends: what its frames still hold is not destroyed, such as progress bars, which then print.
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1 if isinstance(end.code, str) else end.code or 0)


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """That a recipe ended in one line that has these words."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(message) == 1, done.stderr
    for word in words:
        assert word in message[0]
