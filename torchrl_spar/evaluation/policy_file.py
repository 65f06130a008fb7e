"""A policy in a file: its weights and, for default networks, the sizes to rebuild it; never code."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase

from torchrl_spar.build import rebuild_actor
from torchrl_spar.errors import InputError, check_device, check_policy, first_line
from torchrl_spar.mean_actor import unchecked_mean
from torchrl_spar.objective import SPARLoss
from torchrl_spar.paths import user_path
from torchrl_spar.residual import SPARActor

FORMAT = "torchrl_spar.evaluation.policy_file.1"
# Builds a policy from the facts of its file; None where they name no networks that it knows.
Build = Callable[[dict[str, Any]], TensorDictModuleBase | None]


def save_policy(policy: SPARLoss | TensorDictModuleBase, path: str | os.PathLike[str], **facts: Any) -> None:
    """Writes a policy to deploy.

    The file appears whole or not at all. It holds tensors, numbers and strings only, the
    observation statistics included: a loaded policy takes raw observations.

    Args:
        policy: any actor, or a loss, whose :attr:`~torchrl_spar.SPARLoss.actor` is saved.
        path: the file.
        **facts: plain values kept beside the weights, e.g. ``env="Hopper-v5"``.

    Raises:
        InputError: if the policy is not an actor, a fact is no plain value, or the file cannot be written.

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
    policy = policy.actor if isinstance(policy, SPARLoss) else policy
    check_policy("policy", policy)
    for name, value in policy.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"the policy's state holds {name!r}, a {type(value).__name__}; only tensors are saved")
    content = {
        "format": FORMAT,
        "architecture": policy.architecture if _is_default(policy) else None,
        "state_dict": {name: tensor.cpu() for name, tensor in policy.state_dict().items()},
        "facts": facts,
    }
    for name, value in facts.items():
        if not _is_plain(value):
            raise InputError(
                f"{name}={value!r}: of type {type(value).__name__}; facts must be numbers, strings, None, or lists "
                "and dictionaries of them"
            )
    path = user_path(path)
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
    path: str | os.PathLike[str],
    *,
    policy: TensorDictModuleBase | Build | None = None,
    device: torch.device | str | None = None,
) -> tuple[TensorDictModuleBase, dict[str, Any]]:
    """Reads a policy; never executes code from the file.

    Args:
        path: a file written by :func:`save_policy`.
        policy: an actor of the same structure, whose weights are replaced, or a function of the facts that builds
            one; needed where the saved one has networks of your own. The default networks of
            :func:`~torchrl_spar.make_spar_loss`, and means of them, are built anew.
        device: where the policy lives; the CPU by default.

    Returns:
        The policy, raw ``observation -> action``, in eval mode, and the facts saved with it.

    Raises:
        InputError: if the file is missing, damaged or something else, or needs a ``policy`` of another structure; if
            the device is not here.

    Source: ours.

    Examples:
        >>> import pathlib, tempfile, torch
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import load_policy, make_spar_loss, save_policy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "policy.pt"
        ...     save_policy(make_spar_loss(3, Bounded(-1, 1, (2,))), path, env="Toy-v0")
        ...     policy, facts = load_policy(path)
        >>> policy(observation=torch.zeros(4, 3)).shape, facts["env"]
        (torch.Size([4, 2]), 'Toy-v0')
    """
    path = user_path(path)
    check_device(device)
    if isinstance(policy, torch.nn.Module) or not (policy is None or callable(policy)):
        check_policy("policy", policy)
    if not path.is_file():
        raise InputError(f"{path}: no such policy file")
    try:
        content = torch.load(path, map_location=device or "cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path}: not a policy written by torchrl_spar ({FORMAT})")
        architecture, weights, facts = content["architecture"], content["state_dict"], content["facts"]
        built: TensorDictModuleBase | None
        if isinstance(policy, TensorDictModuleBase):
            built = policy
            if misfits := _misfits(policy, weights) or _rounded(policy, weights):
                more = f", ... ({len(misfits)} in all)" if len(misfits) > 6 else ""
                raise InputError(f"{path}: does not fit the policy that was given: {', '.join(misfits[:6])}{more}")
        elif architecture is not None:
            built = rebuild_policy(architecture)
            if misfits := _misfits(built, weights):
                raise InputError(
                    f"{path}: its weights are not those of the default networks of this version of torchrl_spar: "
                    f"{', '.join(misfits[:6])}"
                )
        else:
            built = None if policy is None else policy(facts)
        if built is None:
            raise InputError(
                f"{path}: holds networks of your own, which only your code can build: give load_policy an actor of "
                "the same structure as policy=..."
            )
        built.load_state_dict(weights, assign=built is not policy)  # in its own types
        return built.to(device or "cpu").eval(), facts
    except (RuntimeError, TypeError, KeyError, AttributeError, EOFError, OSError, pickle.UnpicklingError) as err:
        raise InputError(f"{path}: damaged, or not a policy file: {first_line(err)}") from None


def rebuild_policy(architecture: dict[str, Any]) -> SPARActor:
    """An untrained policy of default networks, or a mean of some, from its ``architecture``."""
    if "mean_of" in architecture:
        return unchecked_mean([rebuild_policy(each) for each in architecture["mean_of"]])
    return rebuild_actor(**architecture)


def _is_default(policy: TensorDictModuleBase) -> bool:
    """Whether the networks are those that its architecture describes."""
    architecture = getattr(policy, "architecture", None)
    if architecture is None:
        return False
    default = rebuild_policy(architecture)
    kinds, own = ([(name, type(part)) for name, part in actor.named_modules()] for actor in (default, policy))
    return kinds == own and not _misfits(default, policy.state_dict())


def _misfits(policy: TensorDictModuleBase, weights: dict[str, torch.Tensor]) -> list[str]:
    """Names of entries that are missing on one side, or of another shape."""
    own = {name: tensor.shape for name, tensor in policy.state_dict().items()}
    given = {name: tensor.shape for name, tensor in weights.items()}
    return [name for name in {**own, **given} if own.get(name) != given.get(name)]


def _rounded(policy: TensorDictModuleBase, weights: dict[str, torch.Tensor]) -> list[str]:
    """Names of entries that the policy's own types cannot hold, with the type that they need."""
    own = policy.state_dict()
    needed = {name: torch.promote_types(own[name].dtype, tensor.dtype) for name, tensor in weights.items()}
    return [f"{name} of type {kind}" for name, kind in needed.items() if kind != own[name].dtype]


def _is_plain(value: Any) -> bool:
    """Whether the value can be read again without executing code."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except (pickle.PickleError, TypeError, AttributeError):
        return False
    return True
