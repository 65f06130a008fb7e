"""The reports' statistics are those of rliable, draw by draw."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from reporting.bootstrap import (
    interquartile_mean,
    intervals,
    performance_profile,
    probability_of_improvement,
)

THRESHOLDS = np.array([20.0, 55.0, 70.0])


@pytest.fixture
def scores():
    random = np.random.default_rng(1)
    # Of six, four and six runs on three sets; with ties.
    return {name: random.normal(60, 20, (runs, 3)).round(-1) for name, runs in (("a", 6), ("b", 4), ("c", 6))}


def test_interquartile_mean_leaves_a_quarter_out_at_both_ends():
    assert interquartile_mean(np.array([[9.0, 1.0, 100.0], [5.0, -7.0, 3.0]])) == (1 + 3 + 5 + 9) / 4
    assert interquartile_mean(np.array([[4.0, 8.0]])) == 6


def test_a_tie_is_half_an_improvement():
    assert (
        probability_of_improvement(np.array([[1.0], [2.0]]), np.array([[1.0], [0.0], [3.0]])) == (0.5 + 1 + 1 + 1) / 6
    )


@pytest.mark.parametrize("statistic", ["iqm", "improvement", "profile"])
def test_points_and_intervals_are_rliables(statistic, scores):
    library, metrics = (pytest.importorskip(f"rliable.{name}", exc_type=ImportError) for name in ("library", "metrics"))
    ours, theirs = {
        "iqm": (interquartile_mean, metrics.aggregate_iqm),
        "improvement": (probability_of_improvement, metrics.probability_of_improvement),
        "profile": (
            partial(performance_profile, thresholds=THRESHOLDS),
            lambda values: library.score_distributions(values, THRESHOLDS),
        ),
    }[statistic]
    samples = {name: (values,) for name, values in scores.items()}
    if statistic == "improvement":
        samples = {name: (scores["a"], scores[name]) for name in ("b", "c")}
    np.random.seed(0)  # rliable draws from numpy's global generator
    points, bounds = library.get_interval_estimates(
        {name: arrays if len(arrays) > 1 else arrays[0] for name, arrays in samples.items()},
        lambda *arrays: np.atleast_1d(theirs(*arrays)),
        reps=100,
    )
    found = intervals(samples, ours, repetitions=100)
    for name, arrays in samples.items():
        np.testing.assert_allclose(np.atleast_1d(ours(*arrays)), points[name], rtol=1e-12)
        np.testing.assert_allclose(found[name].reshape(2, -1), bounds[name], rtol=1e-12)
