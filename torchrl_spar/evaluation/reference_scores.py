"""D4RL's reference returns and the normalised score."""

from __future__ import annotations

import re
from typing import TypeVar

import torch

from torchrl_spar.errors import InputError

Returns = TypeVar("Returns", float, torch.Tensor)

# (pattern in the lower-case id, return of a random policy, return of an expert), from D4RL's infos.py.
# Those of maze2d are not PointMaze's, whose returns differ.
_ANTMAZE, _KITCHEN = r"ant_?maze(?!.*dense)", r"kitchen"
_REFERENCE_RETURNS: tuple[tuple[str, float, float], ...] = (
    (_ANTMAZE, 0.0, 1.0),
    (_KITCHEN, 0.0, 4.0),
    (r"maze2d-umaze\b(?!-dense)", 23.85, 161.86),
    (r"maze2d-medium\b(?!-dense)", 13.13, 277.39),
    (r"maze2d-large\b(?!-dense)", 6.7, 273.99),
    (r"(^|[/:])halfcheetah\b", -280.178953, 12135.0),
    (r"(^|[/:])hopper\b", -20.272305, 3234.3),
    (r"(^|[/:])walker2d\b", 1.629008, 4592.3),
    (r"(^|[/:])ant\b", -325.6, 3879.7),
    (r"(^|[/:]|adroithand)pen\b", 96.262799, 3076.8331),
    (r"(^|[/:]|adroithand)hammer\b", -274.856578, 12794.1348),
    (r"(^|[/:]|adroithand)relocate\b", -6.425911, 4233.8778),
    (r"(^|[/:]|adroithand)door\b", -56.512833, 2880.5693),
)


def reference_returns(env_id: str) -> tuple[float, float]:
    """The returns that D4RL scores as 0 (random policy) and 100 (expert).

    Args:
        env_id: a Gymnasium environment (``"Hopper-v5"``), a Minari id
            (``"D4RL/door/human-v2"``) or a D4RL id (``"hopper-medium-v2"``).

    Raises:
        InputError: for an environment that D4RL gives no reference returns for.

    Source: D4RL (https://arxiv.org/abs/2004.07219), ``infos.py``.

    Examples:
        >>> reference_returns("AdroitHandDoor-v1")
        (-56.512833, 2880.5693)
    """
    for pattern, low, high in _REFERENCE_RETURNS:
        if re.search(pattern, env_id.lower()):
            return low, high
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
    if re.search(_ANTMAZE, env_id.lower()):
        returns = returns.clamp(max=high) if isinstance(returns, torch.Tensor) else min(returns, high)
    elif re.search(_KITCHEN, env_id.lower()) and torch.as_tensor(returns > high).any():
        raise InputError(
            f"{env_id!r}: returns above 4 count the steps after a task, not the tasks, so there is no score; evaluate "
            "with env_kwargs={remove_task_when_completed: true}"
        )
    return 100.0 * (returns - low) / (high - low)
