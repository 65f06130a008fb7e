"""Roll-outs of a fixed horizon that terminals do not end, as in D4RL's AntMaze."""

from __future__ import annotations

import numpy as np


def has_fixed_horizon(terminated: np.ndarray, truncated: np.ndarray) -> bool:
    """Whether roll-outs continue after terminals, up to a time limit: only timeouts end them.

    That holds where all timeouts are equally far apart and most terminals are followed by another one, as while a robot
    stays at its goal. After a real end the length would vary, and no second terminal would follow.

    Args:
        terminated: bool ``[n]``, in order.
        truncated: likewise.

    Source: ours; D4RL's (https://arxiv.org/abs/2004.07219) AntMaze files are such.

    Examples:
        >>> timeout = np.array([0, 0, 0, 1, 0, 0, 0, 1], bool)
        >>> has_fixed_horizon(np.array([0, 1, 1, 0, 0, 0, 0, 0], bool), timeout)
        True
        >>> has_fixed_horizon(np.array([0, 1, 0, 0, 0, 1, 0, 0], bool), timeout)
        False
    """
    lengths = np.diff(np.flatnonzero(truncated), prepend=-1)
    full = lengths[:-1] if len(lengths) > 2 else lengths  # a file may end before its last roll-out does
    if len(full) < 2 or (full != full[0]).any() or lengths[-1] > full[0]:
        return False
    terminals = int((terminated & ~truncated).sum())
    return terminals > 0 and 2 * int((terminated[:-1] & terminated[1:] & ~truncated[:-1]).sum()) >= terminals
