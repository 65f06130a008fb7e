"""Mazes of a fixed horizon: turns successes, which their data does not mark as ends, into ends."""

from __future__ import annotations

from torchrl_spar.data.steps import Steps
from torchrl_spar.errors import InputError

# The field adds this to the sparse rewards of mazes: a step costs 1, the one that succeeds nothing.
REWARD_SHIFT = -1.0


def end_at_success(steps: Steps) -> None:
    """Makes every successful step terminal and takes 1 from all rewards, in place.

    Nothing is bootstrapped across a success; the steps after it stay, as a new piece of their episode. A success is
    ``steps.success`` where the source records it, else a reward of 1.

    Args:
        steps: ``n`` steps with rewards of 0 and 1. ``terminated``, ``reward`` and ``known`` are replaced.

    Raises:
        InputError: if a reward is neither 0 nor 1.

    Source: the field's convention for AntMaze (D4RL's ``terminals``, https://arxiv.org/abs/2004.07219; the shift by
    IQL, https://arxiv.org/abs/2110.06169, and CORL, https://arxiv.org/abs/2210.07105).

    Examples:
        >>> import numpy as np
        >>> x, no = np.ones((3, 2), np.float32), np.zeros(3, bool)
        >>> steps = Steps(x, x, np.array([0.0, 1.0, 1.0]), no, no, x, ~no, np.zeros(3, int), (-x[0], x[0]))
        >>> end_at_success(steps)
        >>> steps.terminated, steps.reward
        (array([False,  True,  True]), array([-1.,  0.,  0.]))
    """
    strange = (steps.reward != 0) & (steps.reward != 1)
    if strange.any():
        row = strange.argmax()
        raise InputError(
            f"end_at_success: {strange.sum()} rewards are neither 0 nor 1, the first in row {row} is "
            f"{steps.reward[row]:g}. The option is for sparse rewards alone: turn it off"
        )
    success = steps.reward > 0 if steps.success is None else steps.success
    steps.terminated = steps.terminated | success
    steps.known = steps.known | success  # a terminal's next observation is masked
    steps.reward = steps.reward + REWARD_SHIFT
