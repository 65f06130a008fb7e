"""The reports' statistics against slow loops and what is counted out."""

from __future__ import annotations

from functools import partial
from itertools import product
from statistics import mean

import numpy as np
import pytest
from reporting import bootstrap
from reporting.bootstrap import (
    interquartile_mean,
    intervals,
    lead_interval,
    mean_lead,
    performance_profile,
    probability_of_improvement,
    sign_test,
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


def slow_interquartile_mean(scores):
    ordered = sorted(score for row in scores for score in row)
    cut = len(ordered) // 4
    return mean(ordered[cut : len(ordered) - cut])


def slow_improvement(better, worse):
    wins = {True: 1.0, False: 0.0, None: 0.5}
    return mean(wins[None if x == y else x > y] for one, other in product(better, worse) for x, y in zip(one, other))


def slow_profile(scores):
    return [mean(float(score > threshold) for row in scores for score in row) for threshold in THRESHOLDS]


@pytest.mark.parametrize(
    ("ours", "slow"),
    [
        (interquartile_mean, slow_interquartile_mean),
        (probability_of_improvement, slow_improvement),
        (partial(performance_profile, thresholds=THRESHOLDS), slow_profile),
    ],
)
def test_points_and_intervals_are_those_of_loops(ours, slow, scores):
    samples = {name: (values,) for name, values in scores.items()}
    if slow is slow_improvement:
        samples = {name: (scores["a"], scores[name]) for name in ("b", "c")}
    found = intervals(samples, ours, repetitions=50)
    draw = np.random.RandomState(0).randint
    for name, arrays in samples.items():
        np.testing.assert_allclose(ours(*arrays), slow(*arrays), rtol=1e-12)
        values = []
        for _ in range(50):
            # The seeds of each data set are drawn by themselves.
            chosen = [draw(len(runs), size=runs.shape) for runs in arrays]
            drawn = [
                [[runs[seed, column] for column, seed in enumerate(row)] for row in seeds]
                for runs, seeds in zip(arrays, chosen)
            ]
            values.append(slow(*drawn))
        np.testing.assert_allclose(found[name], np.percentile(values, [2.5, 97.5], axis=0), rtol=1e-12)


PAIRS = [np.array([3.0, -1.0, 2.0]), np.array([0.5, 0.5]), np.array([4.0])]


def test_sign_test_counts_every_exchange_of_a_pair():
    found = mean_lead(PAIRS)
    assert found == pytest.approx((4 / 3 + 0.5 + 4) / 3)
    leads = []
    for signs in product([1, -1], repeat=6):
        first, second, third = np.split(np.array(signs), [3, 5])
        leads.append(mean_lead([first * PAIRS[0], second * PAIRS[1], third * PAIRS[2]]))
    assert sign_test(PAIRS) == pytest.approx(np.mean([lead >= found - 1e-9 for lead in leads]))
    # All twelve pairs in favour: one case of 4096. Two methods with the same scores: every case.
    assert sign_test([np.ones(3)] * 4) == pytest.approx(2**-12)
    assert sign_test([np.zeros(3)] * 2) == 1


def test_many_pairs_are_drawn_instead(monkeypatch):
    pairs = [np.random.default_rng(seed).normal(0.4, 1, 4) for seed in range(3)]
    exact = sign_test(pairs)
    monkeypatch.setattr(bootstrap, "EXACT_PAIRS", 11)
    assert 0.02 < exact < 0.98 and sign_test(pairs) == pytest.approx(exact, abs=4 * 0.5 / 2**5.5)
    assert sign_test([np.full(40, 9.0)]) == 2**-11  # the one found itself


def test_lead_interval_draws_sets_and_seeds():
    # Of two sets without spread: the mean is 0, 5 or 10 with chances 1/4, 1/2, 1/4.
    assert lead_interval([np.zeros(3), np.full(2, 10.0)], repetitions=400) == (0, 10)
    # Of one set: its seeds' mean, whose standard error is known.
    values = np.random.default_rng(0).normal(0, 3, 400)
    low, high = lead_interval([values], repetitions=2_000)
    assert np.array([low, high]) == pytest.approx(values.mean() + 1.96 * 3 / 20 * np.array([-1, 1]), abs=0.06)
