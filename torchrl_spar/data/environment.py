"""The environment that a Minari set records, as arguments that make it again."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

# Their environments are registered wherever a recorded one is made.
_KNOWN = ("gymnasium", "gymnasium_robotics")
# How the collector looked on is no property of the task.
_ONLOOKERS = ("HumanRendering", "RecordVideo", "RenderCollection")


def recorded_environment(spec: Any) -> tuple[str | None, dict[str, Any]]:
    """The id and the arguments for :func:`~torchrl_spar.make_env` that make what a specification describes.

    Step limit and entry point are given only where the installed Gymnasium or gymnasium-robotics does not register
    the id with the same ones.

    Args:
        spec: Gymnasium's ``EnvSpec``, or None.

    Returns:
        The id, None if there is no specification, and arguments that JSON can hold.

    Examples:
        >>> import gymnasium
        >>> env = gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1", g=9.0, max_episode_steps=50), -1, 1)
        >>> env_id, arguments = recorded_environment(env.spec)
        >>> env_id, arguments["g"], arguments["max_episode_steps"]
        ('Pendulum-v1', 9.0, 50)
        >>> arguments["additional_wrappers"][0]["entry_point"], arguments["additional_wrappers"][0]["kwargs"]
        ('gymnasium.wrappers.transform_action:RescaleAction', {'min_action': -1, 'max_action': 1})
    """
    if spec is None:
        return None, {}
    arguments = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
    limit, registered = None, _registered(spec.id)
    if registered is not None and registered.entry_point == spec.entry_point:
        limit = registered.max_episode_steps
    else:
        arguments["entry_point"] = spec.entry_point
    if spec.max_episode_steps != limit:
        # Gymnasium's word for none is -1.
        arguments["max_episode_steps"] = -1 if spec.max_episode_steps is None else spec.max_episode_steps
    wrappers = [wrapper for wrapper in spec.additional_wrappers if wrapper.name not in _ONLOOKERS]
    if wrappers:
        arguments["additional_wrappers"] = [
            {"name": wrapper.name, "entry_point": wrapper.entry_point, "kwargs": wrapper.kwargs} for wrapper in wrappers
        ]
    return spec.id, arguments


def register_robotics(env_id: str) -> None:
    """Registers the environments of gymnasium-robotics, if it is installed and the id is not known yet."""
    import gymnasium

    if env_id not in gymnasium.registry and importlib.util.find_spec("gymnasium_robotics") is not None:
        gymnasium.register_envs(importlib.import_module("gymnasium_robotics"))


def _registered(env_id: str) -> Any:
    """The specification of an id that Gymnasium or gymnasium-robotics registers; None for any other."""
    import gymnasium

    register_robotics(env_id)
    spec = gymnasium.registry.get(env_id)
    is_known = spec is not None and str(spec.entry_point).partition(":")[0].split(".")[0] in _KNOWN
    return spec if is_known else None
