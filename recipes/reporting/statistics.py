"""Runs of several methods by data set: their table, and statistics over all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import mean, stdev

import numpy as np
from harness.output import data_score

from reporting.bootstrap import (
    interquartile_mean,
    intervals,
    lead_interval,
    mean_lead,
    performance_profile,
    probability_of_improvement,
    sign_test,
)
from reporting.names import in_order, label, method_of, parts_of, row, score_of
from reporting.runs import Run, check_comparable
from torchrl_spar import InputError

REFERENCE = "spar"  # with members where there is none without
# Points below its anchor that count as a loss: evaluations of one policy differ by about as much.
MARGIN = 3.0
REPETITIONS = 2_000
PROFILE_REPETITIONS = 500
LEAD_REPETITIONS = 20_000


@dataclass
class Interval:
    """A point estimate and its 95 % interval, NaN where there is one seed: it says nothing of the spread."""

    point: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.point:.2f} " + ("(one seed)" if np.isnan(self.low) else f"[{self.low:.2f}, {self.high:.2f}]")


class Comparison:
    """All runs by method and data set.

    Args:
        runs: results, in any order.

    Raises:
        InputError: if a run is there twice, or runs of one data set are not comparable.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs: dict[tuple[str, str], dict[int, Run]] = defaultdict(dict)
        check_comparable(runs)
        for run in runs:
            method, dataset, seed = method_of(run), run["dataset"], run["seed"]
            if seed in self.runs[method, dataset]:
                raise InputError(f"{method} on {dataset} with seed {seed} is there twice; remove one of them")
            self.runs[method, dataset][seed] = run
        self.methods = in_order({method for method, _ in self.runs})
        self.of_spar = [method for method in self.methods if parts_of(method)[0] == REFERENCE]
        self.reference = next(iter(self.of_spar), REFERENCE)
        self.datasets = sorted({run["dataset"] for run in runs})

    def seeds(self, method: str) -> list[int]:
        """The seeds that a method has on every data set."""
        return sorted(set.intersection(*({*self.runs[method, dataset]} for dataset in self.datasets)))

    def scores(self) -> dict[str, np.ndarray]:
        """``[seeds, data sets]`` of every method that has a seed on every data set."""
        return {
            method: np.array(
                [[score_of(self.runs[method, dataset][seed]) for dataset in self.datasets] for seed in seeds]
            )
            for method in self.methods
            if (seeds := self.seeds(method))
        }

    def left_out(self) -> list[str]:
        """The runs that the statistics leave out, since their method lacks the seed on another data set."""
        found: dict[str, list[str]] = defaultdict(list)
        for dataset in self.datasets:
            for method in self.methods:
                if seeds := sorted(self.runs[method, dataset].keys() - set(self.seeds(method))):
                    found[f"{dataset} (seed {', '.join(map(str, seeds))})"].append(label(method))
        return [f"{where}: {', '.join(methods)}" for where, methods in found.items()]

    def interquartile_means(self) -> dict[str, Interval]:
        """IQM over all runs and data sets, by method."""
        return _estimate({method: (scores,) for method, scores in self.scores().items()}, interquartile_mean)

    def improvements(self) -> dict[str, Interval]:
        """Probability that a run of SPAR is better than one of the method, by method."""
        scores = self.scores()
        if self.reference not in scores:
            return {}
        ours = scores.pop(self.reference)
        pairs = {method: (ours, other) for method, other in scores.items()}
        return _estimate(pairs, probability_of_improvement)

    def differences(self, method: str) -> list[np.ndarray]:
        """SPAR's score less the method's, for each data set an array over the seeds that both have there."""
        found = []
        for dataset in self.datasets:
            ours, theirs = (self.runs.get((name, dataset), {}) for name in (self.reference, method))
            seeds = sorted(ours.keys() & theirs.keys())
            found.append(np.array([score_of(ours[seed]) - score_of(theirs[seed]) for seed in seeds]))
        return found

    def leads(self) -> list[str]:
        """SPAR's lead by seed over each method that shares one on every data set, and how likely it is by chance."""
        lines = [row(f"{label(self.reference)} less", *self.datasets, "mean of the sets", "p")]
        lines.append(row(*["---"] * (len(self.datasets) + 3)))
        for method in self.methods:
            differences = self.differences(method)
            if method != self.reference and all(map(len, differences)):
                bounds = lead_interval(differences, repetitions=LEAD_REPETITIONS)
                if min(map(len, differences)) < 2:  # the noise of a seed is not known
                    bounds = float("nan"), float("nan")
                lead = Interval(mean_lead(differences), *bounds)
                chance = f"{sign_test(differences):.2g}"
                lines.append(row(label(method), *(_spread(x.tolist()) for x in differences), str(lead), chance))
        return lines if len(lines) > 2 else []

    def profiles(self, thresholds: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Share of runs above each threshold ``[T]``, and its interval ``[2, T]``, by method."""
        scores = self.scores()
        shares = {method: performance_profile(values, thresholds) for method, values in scores.items()}
        samples = {method: (values,) for method, values in scores.items()}
        profile = partial(performance_profile, thresholds=thresholds)
        return shares, intervals(samples, profile, repetitions=PROFILE_REPETITIONS)

    def curves(self, dataset: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Updates ``[T]`` and scores ``[seeds, T]`` of the evaluations during training, by method."""
        found = {}
        for method in self.methods:
            curves = [run["curve"] for run in self.runs[method, dataset].values()]
            if curves:
                steps = np.array([row["step"] for row in curves[0]])
                found[method] = steps, np.array([[row["normalized"] for row in curve] for curve in curves])
        return found

    def anchors(self, dataset: str) -> list[float]:
        """The scores of SPAR's anchors."""
        return [run["anchor"]["normalized"] for run in self._of(self.reference, dataset)]

    def below_anchor(self, method: str) -> tuple[list[str], int]:
        """SPAR's runs that end more than MARGIN points below their own anchor, and the number of its runs."""
        runs = [(dataset, run) for dataset in self.datasets for run in self._of(method, dataset)]
        below = [
            f"{dataset}, seed {run['seed']} ({anchor:.1f} to {score_of(run):.1f})"
            for dataset, run in runs
            if score_of(run) < (anchor := run["anchor"]["normalized"]) - MARGIN
        ]
        return below, len(runs)

    def markdown(self) -> str:
        """One table of scores and, of several data sets, statistics, a row a method, and what it leaves out."""
        several = len(self.datasets) > 1
        title = f"P({label(self.reference)} is better)"
        lines = [row("method", *self.datasets, *(["IQM", title] if several else []))]
        lines.append(row(*["---"] * lines[0].count(" | "), "---"))
        empty = ["", ""] if several else []
        runs = [[run for method in self.methods for run in self._of(method, dataset)] for dataset in self.datasets]
        lines.append(row("the data", *map(data_score, runs), *empty))
        anchors = [self.anchors(dataset) for dataset in self.datasets]
        if any(anchors):
            lines.append(row("SPAR's anchor", *map(_spread, anchors), *empty))
        means, improvements = (self.interquartile_means(), self.improvements()) if several else ({}, {})
        for method in self.methods:
            scores = [[score_of(run) for run in self._of(method, dataset)] for dataset in self.datasets]
            statistics = [str(means.get(method, "-")), str(improvements.get(method, "-"))] if several else []
            lines.append(row(label(method), *map(_spread, scores), *statistics))
        if several and (leads := self.leads()):
            lines += ["", *leads]
        for method in self.of_spar:
            below, count = self.below_anchor(method)
            who = "SPAR" if method == REFERENCE else f"{label(method)} members"
            listed = f": {'; '.join(below)}" if below else ""
            lines += [
                "",
                f"{who} ends more than {MARGIN:.0f} points below its anchor in {len(below)} of {count} runs{listed}.",
            ]
        if several and (left_out := self.left_out()):
            lines += ["", f"Not in IQM and P, for want of the seed on every data set: {'; '.join(left_out)}."]
        return "\n".join(lines)

    def best(self, count: int) -> list[str]:
        """The methods other than SPAR's own with the highest scores, each data set counting the same."""
        means = {
            method: mean(mean(map(score_of, self._of(method, dataset))) for dataset in self.datasets)
            for method in self.methods
            if not method.startswith(REFERENCE) and all(self._of(method, dataset) for dataset in self.datasets)
        }
        return sorted(means, key=lambda method: -means[method])[:count]

    def _of(self, method: str, dataset: str) -> list[Run]:
        return list(self.runs[method, dataset].values()) if (method, dataset) in self.runs else []


def _estimate(
    samples: Mapping[str, tuple[np.ndarray, ...]], statistic: Callable[..., np.ndarray]
) -> dict[str, Interval]:
    bounds = intervals(samples, statistic, repetitions=REPETITIONS)
    for name, arrays in samples.items():
        if min(map(len, arrays)) < 2:
            bounds[name][:] = np.nan
    return {name: Interval(float(statistic(*arrays)), *map(float, bounds[name])) for name, arrays in samples.items()}


def _spread(scores: list[float]) -> str:
    if len(scores) < 2:
        return f"{scores[0]:.1f} (1)" if scores else "-"
    return f"{mean(scores):.1f} +- {stdev(scores):.1f} ({len(scores)})"
