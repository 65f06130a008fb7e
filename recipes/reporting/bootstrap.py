"""Statistics of few runs on several data sets, with bootstrap intervals.

After Agarwal et al., Deep RL at the Edge of the Statistical Precipice (https://arxiv.org/abs/2108.13264); draw by draw
the numbers of their library rliable 1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

# Pairs up to which all changes of sign are tried; beyond it as many are drawn.
EXACT_PAIRS = 16


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half of all scores ``[..., seeds, data sets]``."""
    ordered = np.sort(scores.reshape(*scores.shape[:-2], -1))
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def probability_of_improvement(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """That a run of the one scores higher on a data set than one of the other, both ``[..., seeds, data sets]``."""
    return (1 + np.sign(better[..., :, None, :] - worse[..., None, :, :]).mean((-3, -2, -1))) / 2


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of all scores ``[..., seeds, data sets]`` above each threshold ``[T]``."""
    return (scores[..., None] > thresholds).mean((-3, -2))


def intervals(
    samples: Mapping[str, tuple[np.ndarray, ...]], statistic: Callable[..., np.ndarray], *, repetitions: int
) -> dict[str, np.ndarray]:
    """The 95 % intervals ``[2, ...]`` of a statistic, by percentiles of a bootstrap that is stratified by data set.

    Args:
        samples: by name, what the statistic takes: scores ``[seeds, data sets]``.
        statistic: of scores like these, with any axes before.
        repetitions: how often the seeds of each data set are drawn anew.
    """
    random = np.random.RandomState(0)

    def drawn(arrays: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        # One repetition after the other, as rliable draws.
        seeds = [[random.randint(len(scores), size=scores.shape) for scores in arrays] for _ in range(repetitions)]
        return [np.take_along_axis(scores[None], np.stack(chosen), 1) for scores, chosen in zip(arrays, zip(*seeds))]

    return {name: np.percentile(statistic(*drawn(arrays)), [2.5, 97.5], axis=0) for name, arrays in samples.items()}


def mean_lead(differences: Sequence[np.ndarray]) -> float:
    """Mean of paired differences, an array of seeds for each data set; each set counts the same."""
    return float(np.mean([values.mean() for values in differences]))


def lead_interval(differences: Sequence[np.ndarray], *, repetitions: int) -> tuple[float, float]:
    """The 95 % interval of `mean_lead`, by a bootstrap that draws the data sets anew and, in each, the seeds."""
    random = np.random.RandomState(0)
    counts = np.array([len(values) for values in differences])
    filled = np.zeros((len(counts), counts.max()))
    for row, values in zip(filled, differences):
        row[: len(values)] = values
    sets = random.choice(len(counts), (repetitions, len(counts)))
    count = counts[sets][..., None]
    seeds = (random.random_sample((*sets.shape, counts.max())) * count).astype(int)
    drawn = filled[sets[..., None], seeds] * (np.arange(counts.max()) < count)  # as many as the set has
    low, high = np.percentile((drawn.sum(-1) / count[..., 0]).mean(-1), [2.5, 97.5])
    return float(low), float(high)


def sign_test(differences: Sequence[np.ndarray]) -> float:
    """How often a `mean_lead` as high as this comes about where neither method is better (paired permutation test).

    Then the two scores of a (data set, seed) pair can change places: this is the share of all changes of sign, this one
    included, whose mean lead is at least the one found.
    """
    terms = np.concatenate([values / len(values) for values in differences])
    count = len(terms)
    if count <= EXACT_PAIRS:
        signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    else:
        signs = np.random.RandomState(0).choice([-1, 1], (2**EXACT_PAIRS, count))
        signs[0] = 1
    return float((signs @ terms >= terms.sum() - 1e-9 * np.abs(terms).sum()).mean())
