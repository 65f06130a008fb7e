"""Wrong options end before anything is read or trained: of another kind than the default, or out of range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import NoneType
from typing import Any

from omegaconf import DictConfig, ListConfig

from torchrl_spar import InputError

_COUNTS = (
    "threads", "batch_size", "hidden", "updates", "policy_interval", "interval", "episodes", "final_episodes",
    "eval_interval", "eval_episodes", "frames_per_batch", "workers", "rounds",
)  # fmt: skip
_FACTORS = ("lr", "qvalue_lr", "actor_lr", "seconds", "updates_per_step", "exploration_noise")
# The least and the largest, by the last part of an option's name.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_COUNTS, (1, math.inf)),
    **dict.fromkeys(("steps", "first_update", *_FACTORS), (0, math.inf)),
    **dict.fromkeys(("gamma", "target_rate"), (0, 1)),
}


def check_config(cfg: DictConfig, defaults: Mapping[Any, Any], path: str = "") -> None:
    """Raises an `InputError` that names the option; null is let pass where there is no range."""
    for name, value in cfg.items():
        default, option = defaults.get(name), f"{path}{name!s}"
        if not isinstance(value, DictConfig) or not isinstance(default, (DictConfig, NoneType)):
            _check_kind(option, value, default)
            _check_range(option, str(name), value)
        elif "_target_" not in value:  # what an object is made of, with defaults of its own, is its class's to check
            check_config(value, default or {}, f"{option}.")


def _check_kind(option: str, value: Any, default: Any) -> None:
    if not _is_alike(value, default) and (value is not None or isinstance(default, DictConfig)):
        raise InputError(f"{option}={value}: must be {_describe(default)}")


def _check_range(option: str, name: str, value: Any) -> None:
    if name not in RANGES:
        return
    least, most = RANGES[name]
    parts = value if isinstance(value, ListConfig) else [value]
    if not all(_is_number(part) and least <= part <= most for part in parts):
        bound = "on" if most == math.inf else f"to {most}"
        raise InputError(f"{option}={value}: must be a number from {least} {bound}")


def _is_alike(value: Any, default: Any) -> bool:
    if default is None:
        return True
    if isinstance(default, ListConfig):
        return isinstance(value, ListConfig) and all(_is_alike(part, default[0]) for part in value if default)
    if isinstance(default, bool) or not _is_number(default):
        return isinstance(value, type(default))
    return _is_number(value) and (isinstance(default, float) or isinstance(value, int))


def _describe(default: Any) -> str:
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, ListConfig):
        return f"a list such as {default}"
    if isinstance(default, DictConfig):
        return "names and values"
    return {int: "a whole number", float: "a number"}.get(type(default), "text")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
