"""Gymnasium environments by their id, or as a data set records them: arguments, step limit, wrappers, entry point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torchrl.data import Bounded

from torchrl_spar.data.environment import register_robotics
from torchrl_spar.data.observations import flatten_observation
from torchrl_spar.errors import InputError, check_bounds


def make_env(env_id: str, **kwargs: Any) -> Any:
    """``gymnasium.make`` that knows gymnasium-robotics and the specifications of data sets, and names what is missing.

    Args:
        env_id: a Gymnasium environment; ``"module:id"`` imports the module that registers it.
        **kwargs: passed to ``gymnasium.make`` (``max_episode_steps`` among them), but for two parts of a
            recorded specification: ``entry_point="module:Class"`` makes the environment of an id that nothing
            registers here, and ``additional_wrappers`` are put around it, in order: Gymnasium's wrapper
            specifications, as a list of dictionaries with ``name``, ``entry_point`` and ``kwargs``.

    Returns:
        The Gymnasium environment, wrappers of its registration included.

    Raises:
        InputError: if Gymnasium, the environment or a module that it names is missing, a wrapper was recorded without
            its arguments, or the environment does not take an argument.

    Source: ours; the two parts are those of Gymnasium's ``EnvSpec``.

    Examples:
        >>> make_env("NoSuchRobot-v0")
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: environment 'NoSuchRobot-v0' cannot be made: ...
        >>> halved = {"min_action": -0.5, "max_action": 0.5}
        >>> wrapper = {"name": "", "entry_point": "gymnasium.wrappers:RescaleAction", "kwargs": halved}
        >>> make_env("Pendulum-v1", additional_wrappers=[wrapper]).action_space
        Box(-0.5, 0.5, (1,), float32)
    """
    try:
        import gymnasium
    except ImportError:
        raise InputError("evaluation needs gymnasium: pip install 'torchrl-spar[recipes]'") from None
    register_robotics(env_id)
    arguments = dict(kwargs)
    entry_point, wrappers = arguments.pop("entry_point", None), arguments.pop("additional_wrappers", None)
    try:
        return gymnasium.make(_specification(env_id, entry_point, wrappers or ()), **arguments)
    except ModuleNotFoundError as err:  # also of the module that an entry point or "module:id" names
        name = err.name or env_id.partition(":")[0]
        raise InputError(
            f"environment {env_id!r} needs the module {name!r}, which is not installed here: install the package "
            "that has it, or put its folder on PYTHONPATH"
        ) from None
    except Exception as err:  # a constructor fails on a wrong argument in any way it likes
        given = f" with env_kwargs={kwargs}" if kwargs else ""
        remedy = ""
        if lost := [wrapper["name"] for wrapper in wrappers or () if wrapper["kwargs"] is None]:
            remedy = f". Register an environment that contains {', '.join(lost)}, and name it (env=...)"
        if isinstance(err, gymnasium.error.NameNotFound) and ":" not in env_id:
            remedy = f" If a module of yours registers it, name it, too: 'module:{env_id}'"
        raise InputError(f"environment {env_id!r} cannot be made{given}: {err}{remedy}") from None


def _specification(env_id: str, entry_point: str | None, wrappers: Iterable[Mapping[str, Any]]) -> Any:
    """What ``gymnasium.make`` takes: a specification, or the id where nothing else is known."""
    import gymnasium
    from gymnasium.envs.registration import EnvSpec, WrapperSpec

    if entry_point is None and not wrappers:
        return env_id
    around = tuple(WrapperSpec(wrapper["name"], wrapper["entry_point"], wrapper["kwargs"]) for wrapper in wrappers)
    if entry_point is None:
        module, _, name = env_id.rpartition(":")
        if module:
            import_module(module)  # it registers the environment; gymnasium.spec, unlike make, does not import it
        spec = gymnasium.spec(name)
    else:
        spec = EnvSpec(env_id, entry_point)
    return replace(spec, additional_wrappers=(*spec.additional_wrappers, *around))


def environment_sizes(env_id: str, **env_kwargs: Any) -> tuple[int, Bounded]:
    """The sizes that an environment expects of a policy.

    Args:
        env_id: a Gymnasium environment with a bounded continuous action.
        **env_kwargs: as for :func:`make_env`.

    Returns:
        The size of the flattened observation, and the action spec (float32).

    Raises:
        InputError: if the environment is missing, its observation is no vector, or its action no bounded box of floats.

    Source: ours.

    Examples:
        >>> size, spec = environment_sizes("Pendulum-v1")
        >>> size, spec.shape, spec.space.high
        (3, torch.Size([1]), tensor([2.]))
    """
    env = make_env(env_id, **env_kwargs)
    try:
        observation = flatten_observation(env.reset(seed=0)[0])
        if observation.ndim != 1:
            raise InputError(
                f"environment {env_id!r} has observations of shape {observation.shape}; SPAR reads vectors"
            )
        space = _bounded_actions(env)
        if not hasattr(space, "low") or len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
            raise InputError(f"environment {env_id!r} has the action space {space}; SPAR needs a 1-d Box of floats")
        check_bounds(f"environment {env_id!r}: its action space", space.low, space.high)
        low, high = torch.as_tensor(space.low).float(), torch.as_tensor(space.high).float()
        return len(observation), Bounded(low, high, low.shape, dtype=torch.float32)
    finally:
        env.close()


def _bounded_actions(env: Any) -> Any:
    """The action space; under Gymnasium's ClipAction, which makes it infinite, the bounds it clips to."""
    from gymnasium import Wrapper
    from gymnasium.wrappers import ClipAction

    layer = env
    while isinstance(layer, Wrapper) and (isinstance(layer, ClipAction) or layer._action_space is None):
        layer = layer.env
    return layer.action_space
