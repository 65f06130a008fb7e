"""The options of a method on a data set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.options import unknown_option
from torchrl_spar import InputError

# The options in each group of a method's options; functions take whole groups.
GROUPS = {
    "critics": ("num", "bound", "kappa", "layer_norm"),
    "networks": ("layers", "standardised", "small_start"),
    "reward": ("by_return_range", "scale", "shift"),
}
FILES = (".hdf5", ".h5", ".npz", ".parquet", ".arrow", ".feather", ".csv")


def method_options(method: DictConfig, dataset: str) -> dict[str, Any]:
    """A method's options on a data set: its own, then those of every task that the data set's name contains."""
    if dataset.endswith(FILES):
        dataset = Path(dataset).name  # not the folders' names
    words = "-".join(re.findall(r"[a-z0-9]+", dataset.lower()))
    tasks = [task for task in method.get("tasks") or {} if f"-{task}-" in f"-{words}-"]
    merged = OmegaConf.merge(method, *(method.tasks[task] for task in sorted(tasks, key=len)))
    options: Any = OmegaConf.to_container(merged, resolve=True)
    for group, known in GROUPS.items():
        for name in options.get(group, {}):
            if name not in known:
                raise InputError(unknown_option(f"method.{group}.{name}", [f"method.{group}.{each}" for each in known]))
    return {name: value for name, value in options.items() if name not in ("name", "algorithm", "tasks")}
