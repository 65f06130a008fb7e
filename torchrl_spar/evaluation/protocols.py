"""D4RL's protocols, for tasks whose rewards or ends are others in today's environments."""

from __future__ import annotations

import re
from typing import Any

_ADROIT = re.compile(r"(?:gymnasium_robotics:)?AdroitHand(Door|Hammer|Pen|Relocate)(?:Dense|Sparse)?-v\d+")
_ANTMAZE = re.compile(r"(?:gymnasium_robotics:)?AntMaze_\w+-v\d+")
_KITCHEN = re.compile(r"(?:gymnasium_robotics:)?FrankaKitchen-v\d+")
_ADROIT_STEPS = {"Door": 200, "Hammer": 200, "Pen": 100, "Relocate": 200}
_ADROIT_WRAPPER = {"name": "D4RLAdroit", "entry_point": "torchrl_spar.evaluation.adroit:D4RLAdroit", "kwargs": {}}


def d4rl_protocol(env_id: str) -> dict[str, Any]:
    """Arguments of :func:`make_env` that turn an environment of gymnasium-robotics into D4RL's task.

    - Adroit: D4RL's horizon (pen 100 steps, the others 200), and :class:`~torchrl_spar.evaluation.adroit.D4RLAdroit`.
    - AntMaze: the episode ends at the goal.
    - Kitchen: each task is rewarded once, the last one ends the episode.

    Args:
        env_id: a Gymnasium environment.

    Returns:
        The arguments; none for an environment that counts as D4RL's does, or that is not known here.

    Source: D4RL (https://arxiv.org/abs/2004.07219, and its code).

    Examples:
        >>> d4rl_protocol("AntMaze_UMaze-v5"), d4rl_protocol("Hopper-v5")
        ({'continuing_task': False}, {})
        >>> d4rl_protocol("AdroitHandPen-v1")["max_episode_steps"]
        100
    """
    if match := _ADROIT.fullmatch(env_id):
        return {"max_episode_steps": _ADROIT_STEPS[match[1]], "additional_wrappers": [dict(_ADROIT_WRAPPER)]}
    if _ANTMAZE.fullmatch(env_id):
        return {"continuing_task": False}
    if _KITCHEN.fullmatch(env_id):
        return {"remove_task_when_completed": True, "terminate_on_tasks_completed": True}
    return {}
