"""Statistics of few runs on several data sets, with bootstrap intervals.

After Agarwal et al., Deep RL at the Edge of the Statistical Precipice (https://arxiv.org/abs/2108.13264); the tests
compare with their library rliable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np


def interquartile_mean(scores: np.ndarray) -> float:
    """Mean of the middle half of all scores ``[seeds, data sets]``."""
    ordered = np.sort(scores, axis=None)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def probability_of_improvement(better: np.ndarray, worse: np.ndarray) -> float:
    """That a run of the one scores higher on a data set than one of the other, both ``[seeds, data sets]``."""
    return float(1 + np.sign(better[:, None] - worse[None]).mean()) / 2


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of all scores ``[seeds, data sets]`` above each threshold ``[T]``."""
    return (scores[..., None] > thresholds).mean((0, 1))


def intervals(
    samples: Mapping[str, tuple[np.ndarray, ...]], statistic: Callable[..., float | np.ndarray], *, repetitions: int
) -> dict[str, np.ndarray]:
    """The 95 % intervals ``[2, ...]`` of a statistic, by percentiles of a bootstrap that is stratified by data set.

    Args:
        samples: by name, what the statistic takes: scores ``[seeds, data sets]``.
        statistic: of scores like these.
        repetitions: how often the seeds of each data set are drawn anew.
    """
    random = np.random.RandomState(0)

    def drawn(scores: np.ndarray) -> np.ndarray:
        return np.take_along_axis(scores, random.choice(len(scores), scores.shape), 0)

    return {
        name: np.percentile([statistic(*map(drawn, arrays)) for _ in range(repetitions)], [2.5, 97.5], axis=0)
        for name, arrays in samples.items()
    }
