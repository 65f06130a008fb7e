"""Jumps of the observation from row to row, as at a reset: the evidence of order without next observations."""

from __future__ import annotations

import numpy as np

# A jump: columns change by several times what they do in nine of ten steps, and by a good part of their spread. On
# eleven real sets this holds for no step within an episode, and for 90 % of the resets of most. Contacts can do it.
JUMP, SPREADS = 3.0, 0.6
# Steps change most columns by less than two rows of an episode differ, and by less than several steps do. Real sets
# reach 0.70 and 0.87; shuffled ones 1, interleaved ones below 0.6 at the lag of their number.
DISORDER, INTERLEAVED = 0.85, 0.6
# In periodic motion, unlike in interleaved streams, the rows in between are farther off than the next one.
BETWEEN = 1.3
# In a shorter episode any two rows are neighbours: its rows are compared with those of all episodes.
SHORT = 10
LAGS = 64
# Fewer rows say nothing; more than these are not needed for the quantiles (of one lag in many, and of all).
FEWEST, FEW, SAMPLED = 100, 2_000, 20_000
_BLOCK = 65_536
# With at least ten known episodes, a jump to a row unlike their first rows is a contact, not a reset.
FEWEST_BEGINS, BEGINS, ALIKE = 10, 500, 1.5


def find_jumps(observation: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Rows after which the observation jumps though no end is flagged, bool ``[n]``.

    Args:
        observation: ``[n, d]``, in order.
        end: rows after which an episode is told to end, bool ``[n]``.

    Examples:
        >>> t = np.arange(200.0)
        >>> x = np.stack([t % 100, np.sin(t % 100 / 9)], 1)
        >>> np.flatnonzero(find_jumps(x, t < 0))
        array([99])
    """
    jumps = np.zeros(len(observation), dtype=bool)
    inside = np.flatnonzero(~end[:-1])
    live, spread = _live_columns(observation)
    if len(inside) < FEWEST or not live.any():
        return jumps
    steps = _steps(observation, _sample(inside))[:, live]
    usual = np.maximum(np.quantile(steps, 0.9, axis=0), 1e-9 * spread).astype(spread.dtype)
    level = JUMP * np.quantile(np.minimum(steps / usual, 10).mean(axis=1), 0.9)
    for start in range(0, len(inside), _BLOCK):
        rows = inside[start : start + _BLOCK]
        steps = _steps(observation, rows)[:, live]
        far = np.minimum(steps / spread, 2).mean(axis=1) > SPREADS
        jumps[rows[far]] = np.minimum(steps[far] / usual, 10).mean(axis=1) > level
    begins = 1 + np.flatnonzero(end[:-1])
    if jumps.any() and len(begins) >= FEWEST_BEGINS:
        scaled = observation[:, live] / spread
        rows = np.flatnonzero(jumps)
        jumps[rows] = _begin_alike(scaled[rows + 1], scaled[begins])
    return jumps


def _begin_alike(rows: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Whether rows ``[m, d]`` are as near to first rows of episodes as nearly all of these are to each other."""
    begins = begins[_sample(np.arange(len(begins)), BEGINS)]
    among = np.stack([np.sort(np.abs(begins - row).mean(axis=1))[1] for row in begins])
    reach = ALIKE * np.quantile(among, 0.95) + 0.01
    return np.array([np.abs(begins - row).mean(axis=1).min() < reach for row in rows])


def go_on(observation: np.ndarray, rows: np.ndarray, to: np.ndarray | None = None) -> np.ndarray:
    """Whether the given rows step to their followers by less than half a spread in the mean of the columns.

    Args:
        observation: ``[n, d]``.
        rows: indices ``[m]`` below ``n - 1``.
        to: the followers' indices ``[m]``; by default the next rows.

    Examples:
        >>> go_on(np.array([[0.0], [0.1], [3.0]]), np.array([0, 1]))
        array([ True, False])
    """
    live, spread = _live_columns(observation)
    if not live.any():
        return np.ones(len(rows), dtype=bool)
    steps = np.abs(observation[rows + 1 if to is None else to] - observation[rows])
    return np.minimum(steps[:, live] / spread, 2).mean(axis=1) < 0.5


def is_disordered(observation: np.ndarray, end: np.ndarray) -> bool:
    """Whether rows differ from their followers as much as from any row of their episode, or more than from later ones.

    Each is judged in the median row, for most of the columns that vary.

    Args:
        observation: ``[n, d]``.
        end: rows after which an episode is told to end, bool ``[n]``.

    Examples:
        >>> x = np.linspace(0, 1, 1000)[:, None]
        >>> end = np.zeros(1000, bool)
        >>> is_disordered(x, end), is_disordered(np.random.default_rng(0).permutation(x), end)
        (False, True)
    """
    inside = np.flatnonzero(~end[:-1])
    if len(inside) < FEWEST:
        return False
    sample = _sample(inside)
    rng = np.random.default_rng(0)
    begin = np.concatenate([[0], np.flatnonzero(end[:-1]) + 1])
    length = np.diff(begin, append=len(end))
    episode = np.searchsorted(begin, sample, side="right") - 1
    near = begin[episode] + rng.integers(0, length[episode])
    other = np.where(length[episode] < SHORT, rng.permutation(sample), near)
    apart = np.median(np.abs(observation[sample] - observation[other]), axis=0)
    live = apart > 1e-9
    if not live.any():
        return False
    step = np.median(_steps(observation, sample)[:, live], axis=0)
    if np.quantile(step / apart[live], 0.25) > DISORDER:
        return True
    early = sample[sample < len(observation) - LAGS][:: max(1, len(sample) // FEW)]
    if len(early) < FEWEST or not (step > 1e-9).all():
        return False
    between: list[float] = []
    for lag in range(2, LAGS + 1):
        ratio = np.median(_steps(observation, early, lag)[:, live], axis=0) / step
        # Other streams lie between; in a periodic motion the rows between are farther off than the next one.
        if np.quantile(ratio, 0.25) < INTERLEAVED and (lag == 2 or np.median(between) < BETWEEN):
            return True
        between.append(float(np.median(ratio)))
    return False


def _sample(rows: np.ndarray, most: int = SAMPLED) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int)]


def _live_columns(observation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns that are not constant, bool ``[d]``, and the spread of those."""
    rows = observation[_sample(np.arange(len(observation)))].astype(np.float64)
    spread = rows.std(axis=0)
    live = spread > 1e-6 * np.maximum(1, np.abs(rows.mean(axis=0)))
    return live, spread[live].astype(observation.dtype)


def _steps(observation: np.ndarray, rows: np.ndarray, lag: int = 1) -> np.ndarray:
    return np.abs(observation[rows + lag] - observation[rows])
