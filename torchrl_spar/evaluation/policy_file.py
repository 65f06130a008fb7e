"""A policy in a file: its weights and the facts to rebuild it, never code."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torchrl.data import Bounded

from torchrl_spar.build import make_spar_loss
from torchrl_spar.errors import InputError, first_line
from torchrl_spar.objective import SPARLoss
from torchrl_spar.residual import SPARActor

FORMAT = "torchrl_spar.evaluation.policy_file.1"


def save_policy(loss: SPARLoss, path: str | os.PathLike[str], **facts: Any) -> None:
    """Writes the deployable policy of a loss made by :func:`~torchrl_spar.make_spar_loss`.

    The file appears whole or not at all. It holds tensors, numbers and strings only, the
    observation statistics included: a loaded policy takes raw observations.

    Args:
        loss: its :attr:`~torchrl_spar.SPARLoss.actor` is saved.
        path: the file.
        **facts: plain values kept beside the weights, e.g. ``env="Hopper-v5"``.

    Raises:
        InputError: if the loss has networks of your own (save its ``state_dict`` instead), a fact is no plain
            value, or the file cannot be written.

    Source: ours.

    Examples:
        >>> import tempfile, pathlib, torch
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import load_policy, make_spar_loss, save_policy
        >>> loss = make_spar_loss(3, Bounded(-1, 1, (2,)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_policy(loss, pathlib.Path(folder) / "policy.pt", env="Toy-v0")
        ...     policy, facts = load_policy(pathlib.Path(folder) / "policy.pt")
        >>> x = torch.randn(4, 3)
        >>> torch.equal(policy(observation=x), loss.actor(observation=x)), facts
        (True, {'env': 'Toy-v0'})
    """
    content = {
        "format": FORMAT,
        "architecture": getattr(loss, "architecture", None),
        "state_dict": {name: tensor.cpu() for name, tensor in loss.actor.state_dict().items()},
        "facts": facts,
    }
    try:
        _rebuild(content)
    except (RuntimeError, TypeError) as err:
        raise InputError(
            "save_policy knows the default networks of make_spar_loss only; "
            f"save loss.actor.state_dict() for your own ({first_line(err)})"
        ) from None
    for name, value in facts.items():
        if not _is_plain(value):
            raise InputError(
                f"{name}={value!r}: of type {type(value).__name__}; facts must be numbers, strings, None, or lists "
                "and dictionaries of them"
            )
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
        os.replace(partial, path)
    except OSError as err:
        raise InputError(f"{path}: the policy cannot be written: {err}") from None
    finally:
        partial.unlink(missing_ok=True)


def load_policy(
    path: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> tuple[SPARActor, dict[str, Any]]:
    """Reads a policy; never executes code from the file.

    Args:
        path: a file written by :func:`save_policy`.
        device: where the policy lives; the CPU by default.

    Returns:
        The policy, raw ``observation -> action``, and the facts saved with it.

    Raises:
        InputError: if the file is missing, damaged or something else.

    Source: ours.

    Examples:
        >>> import pathlib, tempfile
        >>> from torchrl_spar import load_policy, make_spar_loss, save_policy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "policy.pt"
        ...     save_policy(make_spar_loss(3, Bounded(-1, 1, (2,))), path, env="Toy-v0")
        ...     policy, facts = load_policy(path)
        >>> policy(observation=torch.zeros(4, 3)).shape, facts["env"]
        (torch.Size([4, 2]), 'Toy-v0')
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such policy file")
    try:
        content = torch.load(path, map_location=device or "cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path}: not a policy written by torchrl_spar ({FORMAT})")
        return _rebuild(content).to(device or "cpu"), content["facts"]
    except (RuntimeError, TypeError, KeyError, AttributeError, EOFError, OSError, pickle.UnpicklingError) as err:
        raise InputError(f"{path}: damaged, or not a policy file: {first_line(err)}") from None


def _rebuild(content: dict[str, Any]) -> SPARActor:
    architecture = dict(content["architecture"])
    low, high = (torch.tensor(architecture.pop(name)) for name in ("low", "high"))
    with torch.random.fork_rng(devices=[]):  # the weights that are drawn here are not used
        loss = make_spar_loss(action_spec=Bounded(low, high, low.shape, dtype=low.dtype), **architecture)
    policy = loss.actor
    policy.load_state_dict(content["state_dict"], assign=True)  # in its own types
    return policy


def _is_plain(value: Any) -> bool:
    """Whether it can be read again without executing code."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except (pickle.PickleError, TypeError, AttributeError):
        return False
    return True
