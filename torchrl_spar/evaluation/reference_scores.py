"""D4RL's reference returns and the normalised score."""

from __future__ import annotations

import re
from typing import TypeVar

import torch

from torchrl_spar.errors import InputError

Returns = TypeVar("Returns", float, torch.Tensor)

# Return of a random policy, return of an expert, from D4RL's infos.py. Those of maze2d are not PointMaze's.
_REFERENCE_RETURNS: dict[str, tuple[float, float]] = {
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "pen": (96.262799, 3076.8331),
    "hammer": (-274.856578, 12794.1348),
    "relocate": (-6.425911, 4233.8778),
    "door": (-56.512833, 2880.5693),
}
# Whole ids, in lower case and without a version: other environments have such words in their names, too
# (dm_control's hopper-hop, bullet-maze2d, OGBench's antmaze-large-navigate).
_LOCOMOTION, _ADROIT = "halfcheetah|hopper|walker2d|ant", "pen|hammer|relocate|door"
_LEVELS = "random|simple|medium|expert|medium-replay|medium-expert|full-replay"
_MAZES = "umaze|umaze-diverse|medium-play|medium-diverse|large-play|large-diverse|ultra-play|ultra-diverse"
_IDS = tuple(
    re.compile(pattern)
    for pattern in (
        # Gymnasium's, gymnasium-robotics', and other makers' of D4RL's tasks (adroit_d4rl:d4rl/AdroitHandPen-v1)
        f"(?:gymnasium:)?(?P<task>{_LOCOMOTION})",
        rf"(?:gymnasium_robotics:|(?:[\w.]+:)?d4rl/)?adroithand(?P<task>{_ADROIT})",
        "(?:gymnasium_robotics:)?(?P<task>antmaze)_(?:umaze|open|medium|large)(?:_diverse_gr?)?",
        "(?:gymnasium_robotics:)?franka(?P<task>kitchen)",
        r"(?:[\w.]+:)?(?P<task>antmaze)d4rl-\w+",
        # D4RL's
        f"(?:d4rl:)?(?P<task>{_LOCOMOTION})-(?:{_LEVELS})",
        f"(?:d4rl:)?(?P<task>{_ADROIT})-(?:human|cloned|expert)(?:-longhorizon)?",
        f"(?:d4rl:)?(?P<task>antmaze)-(?:{_MAZES})",
        "(?:d4rl:)?(?P<task>kitchen)-(?:complete|partial|mixed)",
        "(?:d4rl:)?(?P<task>maze2d-(?:umaze|medium|large))",
        # Minari's data sets, and this project's
        f"(?:mujoco|spar|torchrl-spar)/(?P<task>{_LOCOMOTION})/(?:{_LEVELS})",
        f"d4rl/(?P<task>{_ADROIT})/(?:human|cloned|expert)",
        f"d4rl/(?P<task>antmaze)/(?:{_MAZES})",
        "d4rl/(?P<task>kitchen)/(?:complete|partial|mixed)",
    )
)


def _task_of(env_id: str) -> str | None:
    """D4RL's task that an id stands for."""
    name, version, _ = re.split(r"(-v\d+$|$)", env_id.lower(), maxsplit=1)
    return next((match["task"] for pattern in _IDS if version and (match := pattern.fullmatch(name))), None)


def reference_returns(env_id: str) -> tuple[float, float]:
    """The returns that D4RL scores as 0 (random policy) and 100 (expert).

    Args:
        env_id: an environment of Gymnasium or gymnasium-robotics (``"Hopper-v5"``), a Minari id
            (``"D4RL/door/human-v2"``) or a D4RL id (``"hopper-medium-v2"``), whole: an environment of somebody else's
            with such a word in its name is another task.

    Raises:
        InputError: for an environment that D4RL gives no reference returns for.

    Source: D4RL (https://arxiv.org/abs/2004.07219), ``infos.py``.

    Examples:
        >>> reference_returns("AdroitHandDoor-v1")
        (-56.512833, 2880.5693)
    """
    if isinstance(env_id, str) and (task := _task_of(env_id)):  # a log's env_id is None
        return _REFERENCE_RETURNS[task]
    raise InputError(
        f"no D4RL reference returns are known for {env_id!r}, so its score cannot be normalised: "
        "report raw returns instead"
    )


def normalized_score(env_id: str, returns: Returns) -> Returns:
    """D4RL's normalised score, ``100 (return - random) / (expert - random)``.

    AntMaze's is the success rate: an episode that goes on at the goal and is rewarded there again counts once.
    Kitchen's is the share of the four tasks done.

    Args:
        env_id: see :func:`reference_returns`.
        returns: undiscounted returns, a number or a tensor of any shape; for AntMaze of single episodes, not a mean.

    Returns:
        The score in per cent, of the type and shape of ``returns``.

    Raises:
        InputError: for an environment that D4RL gives no reference returns for, or returns above 4 in the kitchen:
            they count steps, not tasks, as in Minari's data sets.

    Source: D4RL; counting once is ours, D4RL's own AntMaze ends at the goal.

    Examples:
        >>> round(normalized_score("Hopper-v5", 3234.3), 1)
        100.0
        >>> normalized_score("AntMaze_UMaze-v5", torch.tensor([0.0, 1.0, 260.0]))
        tensor([  0., 100., 100.])
    """
    low, high = reference_returns(env_id)
    task = _task_of(env_id)
    if task == "antmaze":
        returns = returns.clamp(max=high) if isinstance(returns, torch.Tensor) else min(returns, high)
    elif task == "kitchen" and torch.as_tensor(returns > high).any():
        raise InputError(
            f"{env_id!r}: returns above 4 count the steps after a task, not the tasks, so there is no score; evaluate "
            "with env_kwargs={remove_task_when_completed: true}"
        )
    return 100.0 * (returns - low) / (high - low)
