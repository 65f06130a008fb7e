"""Behaviour policies for recipes/make_dataset.py, one file each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Behaviour:
    """A policy to record.

    Args:
        act: the observation, as float32, to the action.
        algorithm: its name in Minari's metadata.
        policy: what it is, in words.
        options: what it was made with.
        training_steps: environment steps that it was trained for.
    """

    act: Callable[[Any], np.ndarray]
    algorithm: str
    policy: str
    options: dict[str, Any]
    training_steps: int = 0
