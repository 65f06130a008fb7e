"""What tests share: small losses, random batches, one torch thread."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tensordict import TensorDict
from torchrl.data import Bounded

from torchrl_spar import SPARLoss, make_spar_loss

OBSERVATION, ACTION = 5, 3
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "datasets"

# A run of the main job in seconds.
SMALL = ["preset=smoke", "anchor.steps=5", "vae.steps=5", "spar.updates=4", "eval.interval=2", "eval.final_episodes=2"]
SMALL += ["spar.loss.hidden=[8]", "logger.interval=2"]
# A second process costs seconds to start.
TINY = [*SMALL, "eval.background=false"]

# As this process found it: recipes that tests import change theirs.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# What every recipe loads.
LIBRARIES = "torchrl.collectors torchrl.objectives gymnasium h5py hydra matplotlib.pyplot rich.console"

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


def run(script: str, *overrides: Any, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A recipe as a user runs it, in a process of its own.

    It is forked from one that has loaded the libraries, which takes seconds. With variables, which libraries may read
    as they are loaded, it is a fresh one.
    """
    command = [str(RECIPES / f"{script}.py"), *map(str, overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MINARI_DATASETS_PATH": str(cwd / "minari"), **variables}
    if variables:
        command = [sys.executable, *command]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, env=environment)
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch, name) for name in ("stdout", "stderr")]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES.split())
        process = context.Process(target=_become, args=(command, cwd, environment, outputs))
        with patch.dict(os.environ, ENVIRONMENT, clear=True):
            process.start()
        process.join(600)
        process.kill()
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in outputs))


def _become(command: list[str], cwd: Path, environment: dict[str, str], outputs: list[Path]) -> None:
    for stream, path in zip((sys.stdout, sys.stderr), outputs):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = command
    tests = Path(__file__).parent
    sys.path[:] = [str(RECIPES), *(path for path in sys.path if not Path(path).is_relative_to(tests))]
    runpy.run_path(command[0], run_name="__main__")


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """That a recipe ended in one line that has these words."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(message) == 1, done.stderr
    for word in words:
        assert word in message[0]
