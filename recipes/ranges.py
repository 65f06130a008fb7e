"""What a number among the options may be, by the last part of the option's name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig

from torchrl_spar import InputError

_COUNTS = (
    "threads", "batch_size", "hidden", "updates", "policy_interval", "interval", "episodes", "final_episodes",
    "eval_interval", "eval_episodes", "frames_per_batch", "workers", "rounds",
)  # fmt: skip
_FACTORS = ("lr", "qvalue_lr", "actor_lr", "seconds", "updates_per_step", "exploration_noise")
# Whether it is whole, the least and the largest.
RANGES: dict[str, tuple[bool, float, float]] = {
    **dict.fromkeys(_COUNTS, (True, 1, math.inf)),
    **dict.fromkeys(("steps", "first_update"), (True, 0, math.inf)),
    **dict.fromkeys(_FACTORS, (False, 0, math.inf)),
    **dict.fromkeys(("gamma", "target_rate"), (False, 0, 1)),
}


def check_ranges(cfg: DictConfig) -> None:
    """Refuses a number out of its range, before anything is read or trained; what a library checks is left to it."""
    for option, name, value in _leaves(cfg):
        whole, least, most = RANGES.get(name, (False, -math.inf, math.inf))
        if name in RANGES and not _is_number(value, whole, least, most):
            kind = "a whole number" if whole else "a number"
            bounds = f"from {least} on" if most == math.inf else f"from {least} to {most}"
            raise InputError(f"{option}={value}: must be {kind} {bounds}")


def _is_number(value: Any, whole: bool, least: float, most: float) -> bool:
    kind = int if whole else (int, float)
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= most


def _leaves(cfg: DictConfig, path: str = "") -> Iterator[tuple[str, str, Any]]:
    for name, value in cfg.items():
        option = f"{path}{name!s}"
        if isinstance(value, DictConfig):
            yield from _leaves(value, f"{option}.")
        else:
            yield from ((option, str(name), part) for part in (value if isinstance(value, ListConfig) else [value]))
