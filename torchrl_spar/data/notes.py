"""Warnings of the loader about data that it accepts, but that looks wrong."""

from __future__ import annotations

import numpy as np

from torchrl_spar.data.jumps import go_on
from torchrl_spar.data.steps import Steps

# Actions that vary by a smaller share of their range are noted: residuals are at least so large.
NARROW = 0.01
# A smaller share is float32 rounding: the component is constant.
ROUNDING = 1e-7
# The loader warns of rows that are left out if they hold more than this share of the rewards, and more than twice
# their share of the rows.
MOST_LOST = 0.05
# A reward so many times as large as nine tenths of all that are not 0 may be a mark for a missing value.
OUTLIER = 1e3
# If more than this share of the rows is terminal, the flags seem inverted: they mark the rows that are not.
MOST_TERMINAL = 0.8
# Numbers below this are a simulator's noise about zero.
NOISE = 1e-12


def narrow_actions(steps: Steps, least: np.ndarray, most: np.ndarray) -> None:
    """Tells of actions that hardly use their bounds."""
    span = (steps.action.max(axis=0) - steps.action.min(axis=0)) / (most - least)
    if (narrow := (span > ROUNDING) & (span < NARROW)).any():
        steps.notes += (
            f"components {np.flatnonzero(narrow).tolist()} of actions vary by less than {NARROW:.0%} of their bounds, "
            "too little to be learnt in this range: give the true bounds, action_spec=Bounded(low, high, shape) "
            "(in recipes action_bounds=[low,high])",
        )


def lost_rewards(steps: Steps) -> None:
    """Tells where rows that are left out hold more than their part of the rewards, as where the last step succeeds."""
    size, out = np.abs(steps.reward), ~steps.known
    lost = size[out].sum()
    if lost > max(MOST_LOST, 2 * out.mean()) * size.sum():
        steps.notes += (
            f"{out.sum()} rows at episodes' ends are left out, for no observation follows them and they are "
            f"not terminated; they hold {lost / size.sum():.0%} of the rewards (in absolute value): give the next "
            "observations, or tell which of them are 'terminals'",
        )


def tiny_columns(steps: Steps, floor: float) -> None:
    """Tells of observations in a unit so large that their numbers look like the rounding of a constant."""
    least, most = steps.observation.min(axis=0), steps.observation.max(axis=0)
    size = np.maximum(np.abs(least), np.abs(most))
    columns = np.flatnonzero((size > NOISE) & (most - least > 0.1 * size) & (most - least < 10 * floor))
    if tiny := [int(i) for i in columns if steps.observation[:, i].std(dtype=np.float64) < floor]:
        steps.notes += (
            f"columns {tiny} of observations vary by less than {floor:g} about zero and are taken for constant: "
            "if they are not, give them in a smaller unit",
        )


def rewards(steps: Steps) -> None:
    """Tells of rewards that teach nothing, and of single ones that drown the others."""
    size = np.abs(steps.reward)
    if not size.any():
        if not any("all rewards are 0" in note for note in steps.notes):
            steps.notes += ("all rewards are 0: training clones the behaviour, and improves nothing",)
        return
    usual, row = np.quantile(size[size > 0], 0.9), int(size.argmax())
    if size[row] > OUTLIER * usual:
        steps.notes += (
            f"the reward of row {row} is {steps.reward[row]:g}, nine tenths of those that are not 0 lie within "
            f"+-{usual:g}: if it stands for a missing value, leave the row out",
        )


def ends(steps: Steps) -> None:
    """Tells of flags and next observations at the ends of episodes that seem to mean something else."""
    inside = np.flatnonzero(steps.terminated[:-1])
    moves = steps.observation.std(axis=0).any()
    if steps.terminated.mean() > MOST_TERMINAL and moves and go_on(steps.observation, inside).mean() > 0.9:
        steps.notes += (
            f"{steps.terminated.mean():.0%} of the rows are terminal, although the observations go on after them: "
            "'terminals' tell where a task ends; if yours tell where it goes on, give 1 - terminals",
        )
    last = np.flatnonzero((np.diff(steps.episode) != 0) & ~steps.terminated[:-1] & steps.known[:-1])
    after = steps.next_observation[last]
    shifted = (after == steps.observation[last + 1]).all(axis=1) & ~go_on(steps.observation, last)
    empty = ~after.any(axis=1) & steps.observation[last].any(axis=1)
    wrong = shifted | empty
    if len(last) and wrong.mean() > 0.5:
        what = "the first ones of the next episode" if shifted.sum() >= empty.sum() else "all zero"
        steps.notes += (
            f"the next observations of {wrong.sum()} rows at the ends of episodes are {what}, so values are learnt "
            "from steps that never happened: leave the next observations out, or give the true ones",
        )
