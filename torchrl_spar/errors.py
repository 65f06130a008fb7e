"""Errors for bad input and for a failed training."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.objectives.common import LossModule


class InputError(ValueError):
    """Bad input: data, option, file or key. The message names the culprit and what to do.

    Recipes print it as one line and exit; everything else that is raised is a bug and
    keeps its traceback.

    Source: ours.

    Examples:
        >>> from torchrl_spar import InputError
        >>> raise InputError("data.npz: no array 'actions'")
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: data.npz: no array 'actions'
    """


class NonFiniteError(InputError):
    """A loss or a parameter has become NaN or infinite: the data or a learning rate is to blame.

    Source: ours.

    Examples:
        >>> from torchrl_spar import NonFiniteError
        >>> raise NonFiniteError("step 300: NaN or infinity in loss_qvalue")
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.NonFiniteError: step 300: NaN or infinity in loss_qvalue
    """


# Larger ones are placeholders for "none": 1e10, 1e14, 1e20 and float32's largest number are met in the wild.
LARGEST_BOUND = 1e9


def check_bounds(name: str, low: Any, high: Any) -> None:
    """Refuses action bounds (arrays or tensors) that are infinite, too large to bound anything, or out of order.

    Raises:
        InputError: it says why bounds are needed.

    Examples:
        >>> import numpy as np
        >>> check_bounds("action_spec", np.array([-1.0]), np.array([1e20]))
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: action_spec: ...
    """
    if not ((abs(low) < LARGEST_BOUND).all() and (abs(high) < LARGEST_BOUND).all() and (low < high).all()):
        raise InputError(
            f"{name}: no finite bounds with low < high (within +-{LARGEST_BOUND:g}), which actions are clamped to and "
            "noise is measured in: give them as action_spec=Bounded(low, high, shape) (in recipes "
            "action_bounds=[low,high] or [[low,...],[high,...]])"
        )


def check_built(name: str, *modules: torch.nn.Module) -> None:
    """Refuses modules with lazy parameters, which have no shape yet.

    Examples:
        >>> check_built("qvalue_network", torch.nn.LazyLinear(1))
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: qvalue_network: parameter 'weight' is lazy: ...
    """
    for module in modules:
        for key, parameter in module.named_parameters():
            if torch.nn.parameter.is_lazy(parameter):
                raise InputError(f"{name}: parameter {key!r} is lazy: call the network once before")


def check_module(name: str, module: Any) -> None:
    """Refuses what is no TensorDictModule, or has lazy parameters.

    Examples:
        >>> check_module("value_network", torch.nn.Linear(3, 1))
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: value_network: a Linear; give a TensorDictModule, which names its inputs ...
    """
    if not isinstance(module, TensorDictModuleBase):
        raise InputError(
            f"{name}: a {type(module).__name__}; give a TensorDictModule, which names its inputs and outputs"
        )
    check_built(name, module)


def check_policy(name: str, policy: Any, action_key: NestedKey | None = None) -> None:
    """Refuses anything but an actor that writes the action at this key; a compiled one is one, too.

    Examples:
        >>> check_policy("policy", torch.nn.Linear(3, 1))
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: policy: a Linear; give an actor: a TensorDictModule that writes ...
    """
    has_keys = isinstance(policy, torch.nn.Module) and hasattr(policy, "in_keys") and hasattr(policy, "out_keys")
    if not has_keys or isinstance(getattr(policy, "_orig_mod", policy), LossModule):
        raise InputError(
            f"{name}: a {type(policy).__name__}; give an actor: a TensorDictModule that writes the action, such as "
            "TensorDictModule(network, ['observation'], ['action']) or a loss's actor"
        )
    if action_key is not None and action_key not in policy.out_keys:
        raise InputError(f"{name}: writes {list(policy.out_keys)}, not {action_key!r}")


def check_bool(entry: torch.Tensor, key: NestedKey) -> torch.Tensor:
    """The entry itself, refused where it is not of type bool: the ``~`` of other types is no "not".

    Examples:
        >>> check_bool(torch.zeros(5, 1), "done")
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: 'done' is of type torch.float32; it must be torch.bool: ...
    """
    if entry.dtype != torch.bool:
        raise InputError(f"{key!r} is of type {entry.dtype}; it must be torch.bool: convert the data's by .bool()")
    return entry


def check_present(rows: TensorDictBase, keys: Iterable[NestedKey]) -> None:
    """Refuses data that lacks one of the entries.

    Examples:
        >>> from tensordict import TensorDict
        >>> check_present(TensorDict({"action": torch.zeros(5, 2)}, [5]), ["action", ("next", "reward")])
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: the data lacks [('next', 'reward')]
    """
    if missing := [key for key in keys if rows.get(key, None) is None]:
        raise InputError(f"the data lacks {missing}")


def check_device(device: Any) -> None:
    """Refuses a device that is not here; None is torch's default.

    Examples:
        >>> check_device("gpu")
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: device=gpu: not available here ...
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise InputError(f"device={device}: not available here ({first_line(err)})") from None


def first_line(err: BaseException) -> str:
    """The first line of an error's text, for a message of one line.

    Examples:
        >>> first_line(KeyError("a")), first_line(EOFError())
        ("'a'", 'EOFError')
    """
    return next(iter(str(err).splitlines()), type(err).__name__)


def check_options(*checks: tuple[bool, str, Any, str]) -> None:
    """Raises an :class:`InputError` for the first invalid one of tuples (is valid, name, value, what it must be).

    Examples:
        >>> check_options((False, "kappa", -1, "at least 0"))
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: kappa=-1: must be at least 0
    """
    for valid, name, value, expected in checks:
        if not valid:
            raise InputError(f"{name}={value!r}: must be {expected}")


def check_names(options: Iterable[str], *functions: Callable[..., Any], prefix: str = "") -> None:
    """Refuses options that are no keyword of the functions; suggests the one that is most like it.

    Examples:
        >>> def fit(*, steps=1, lr=1e-3): ...
        >>> check_names({"stepz": 2}, fit, prefix="vae.")
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: vae.stepz: no such option, did you mean vae.steps?
    """
    parameters = [each for function in functions for each in inspect.signature(function).parameters.values()]
    known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise InputError(f"{prefix}{name}: no such option{suggestion(name, known, prefix)}")


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The known name that is most like it, as the end of an error's text; empty where none is."""
    found = difflib.get_close_matches(name, [*known], n=1, cutoff=0.5)
    return f", did you mean {prefix}{found[0]}?" if found else ""
