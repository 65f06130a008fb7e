"""Rows put in order and told apart into episodes, by flags, ids and the next observations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from torchrl_spar.data.horizon import has_fixed_horizon
from torchrl_spar.data.jumps import FEWEST, find_jumps, go_on, is_disordered
from torchrl_spar.data.order import Links, are_unrelated, chained, equal_rows, find_links, is_cut

# Rows are put in a new order only if it leaves at most this share of their links broken.
MOSTLY_CUT = 0.25
# Repeated rows are dropped, and gaps cut episodes, only if at most this share of the rows has them. A `step` that is
# irregular in more of the rows is a time, not a count.
SOME_GAPS = 0.1
# Ids that are used again are told apart only if at least this share of the steps within an id is smooth.
SMOOTH = 0.75
# Where `step` is a time, a gap is longer than this many usual steps: less is jitter of the clock.
PAUSE = 3.0
# A clock was set back if it falls in at most this share of the rows, by more than this many usual steps, and is still
# behind after as many rows.
SET_BACK, STAYS = 0.01, 5
# The loader warns if times fall in more than this share of the rows.
FALLING = 0.9
# Ids are used again for other episodes if more than this share of the stretches of rows begins at its id's first step.
AGAIN = 0.9
# `step` is ignored if sorting by it makes neighbouring observations differ this many times as much.
ROUGHER = 1.2


def arrange(fields: dict[str, Any], *, sequence: np.ndarray | None = None) -> dict[str, Any]:
    """Puts rows in order and tells their episodes apart, by flags, labels and the next observations.

    Args:
        fields: what :func:`clean` returns, emptied here. ``next_observation`` may be missing, ``episode`` (any labels)
            and ``step`` (a number that grows within a label) may be there.
        sequence: a number for each row; an episode ends where it changes.

    Returns:
        The fields of :class:`Steps` less ``action_bounds``.
    """
    n = len(fields["action"])
    stop = fields["truncated"].copy()  # an end that nothing goes beyond
    if sequence is not None:
        stop[:-1] |= sequence[1:] != sequence[:-1]
    label, step = fields.pop("episode", None), fields.pop("step", None)
    if label is not None:
        label = np.unique(label, return_inverse=True)[1].reshape(-1)
    given = "next_observation" in fields
    notes: list[str] = []
    once = np.ones(n, dtype=bool)
    if label is not None and step is not None:
        once = _once(fields, label, step, notes)
        if not once.all():
            fields |= {name: array[once] for name, array in fields.items()}
            stop, label, step, n = stop[once], label[once], step[once], int(once.sum())
    fields["row"] = np.flatnonzero(once)
    if label is not None and step is not None:
        label, step = _clocked(fields, label, step, notes)

    def take(order: np.ndarray) -> None:
        nonlocal stop, label
        for name, array in fields.items():
            fields[name] = array[order]
        stop, label = stop[order], None if label is None else label[order]

    def links() -> Links:
        ends = torch.from_numpy(stop | fields["terminated"])
        observation, following = (torch.from_numpy(fields[name]) for name in ("observation", "next_observation"))
        return find_links(observation, following, ends, None if label is None else torch.from_numpy(label))

    if label is not None and step is None and not given:
        label = _told_apart(fields, label, stop, notes)
    order = _by_label(label, step)
    if not given:
        if order is not None:
            take(order)
        if step is not None and label is not None:
            now, ended = step if order is None else step[order], stop | fields["terminated"]
            stop[:-1] |= _gaps(label, now, ended, fields["row"], notes)
    ordered, cut = True, np.zeros(n, dtype=bool)
    if given:
        found = links()
        if order is not None:
            kept = int(found.linked.sum())
            before, inverse = found, np.argsort(order)
            take(order)
            found = links()
            if step is None and int(found.linked.sum()) <= kept:  # the same ids, used again
                take(inverse)
                found = before
        elsewhere = int(found.continued.sum())
        if elsewhere:
            chain = chained(found).numpy()
            take(chain)
            found = links()
            broken = int((found.open & found.same)[:-1].sum())
            ordered = broken <= MOSTLY_CUT * (broken + int(found.linked.sum()))
            if not ordered:  # as given, so that whoever asks for returns sees it
                take(np.argsort(chain))
                found = links()
            what = f"{elsewhere} of {n} rows go on in rows elsewhere (shuffled, interleaved, or a ring buffer's): "
            notes.append(
                what + "they have been put in the order that the next observations tell"
                if ordered
                else what + "episodes cannot be put together again, so there are no returns; give ids of episodes or "
                "whole episodes"
            )
        elif n >= FEWEST and are_unrelated(found):
            notes.append(
                "hardly any next observation is another row's observation, so flags and ids alone tell where episodes "
                "end"
            )
        cut = is_cut(found).numpy()
    fields |= _episodes(fields, stop, label, cut, notes)
    return fields | {"ordered": ordered, "notes": tuple(notes)}


def _once(fields: dict[str, Any], label: np.ndarray, step: np.ndarray, notes: list[str]) -> np.ndarray:
    """Rows less those that repeat another one, of the same label and step, where only few do, bool ``[n]``."""
    once = np.ones(len(label), dtype=bool)
    order = np.lexsort((step, label))
    again = np.flatnonzero((np.diff(label[order]) == 0) & (np.diff(step[order]) == 0))
    first, second = order[again], order[again + 1]
    if not len(again) or len(again) > SOME_GAPS * len(label):
        return once
    if all((array[first] == array[second]).all() for array in fields.values()):
        once[second] = False
        notes.append(f"{len(again)} rows are there twice, first row {second.min()}: the second of each is left out")
    return once


def _clocked(
    fields: dict[str, Any], label: np.ndarray, step: np.ndarray, notes: list[str]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels told apart where they are used again, and the steps; None where these do not tell an order."""
    by_step = np.lexsort((step, label))
    same = np.diff(label[by_step]) == 0
    if (same & (np.diff(step[by_step]) == 0)).any():
        begins = np.concatenate([[True], (label[1:] != label[:-1]) | (step[1:] < step[:-1])])
        first = step[by_step][np.concatenate([[True], ~same])]  # of each label, which are 0, 1, ...
        if (step[begins] == first[label[begins]]).mean() > AGAIN:
            return np.cumsum(begins) - 1, step
    inside, falls = label[1:] == label[:-1], np.diff(step) < 0
    if "next_observation" not in fields:  # which tell more
        back = _set_back(label, step)
        if back.any():
            row = fields["row"][back.argmax()]
            notes.append(f"the clock is set back {back.sum()} times, first after row {row}: episodes are cut there")
            return np.cumsum(np.concatenate([[True], back | ~inside])) - 1, step
        if falls[inside].sum() > FALLING * max(1, inside.sum()):
            notes.append(
                "the steps or times fall from row to row, and rows are put in the order in which they grow: if they "
                "count what is left of an episode, give the data without them"
            )
    order = np.argsort(label, kind="stable")
    if ((np.diff(label[order]) == 0) & (np.diff(step[order]) < 0)).any():
        spread = np.maximum(fields["observation"].std(axis=0), 1e-12)
        given, sorted_ = (
            np.median((np.abs(np.diff(fields["observation"][rows], axis=0)) / spread).mean(axis=1))
            for rows in (order, by_step)
        )
        if sorted_ > ROUGHER * given:
            notes.append(
                "the steps or times neither grow along the episodes nor count their rows, so these stay in order"
            )
            return label, None
    return label, step


def _set_back(label: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Rows after which a clock starts again below what it showed and stays there, at few places, bool ``[n - 1]``."""
    inside, grows = label[1:] == label[:-1], np.diff(step)
    falls = inside & (grows < 0)
    if not falls.any() or falls.sum() > SET_BACK * inside.sum():
        return np.zeros_like(falls)
    rows = np.flatnonzero(falls)
    after = np.minimum(rows + STAYS, len(step) - 1)  # single rows that were logged late are followed by later ones
    far = grows[rows] < -STAYS * np.median(np.abs(grows[inside]))
    return falls if (far & (step[after] < step[rows]) & (label[after] == label[rows])).all() else np.zeros_like(falls)


def _told_apart(fields: dict[str, Any], label: np.ndarray, stop: np.ndarray, notes: list[str]) -> np.ndarray:
    """Labels that differ where one is used again by rows whose observations do not continue its earlier ones."""
    begins = np.concatenate([[0], 1 + np.flatnonzero(label[1:] != label[:-1])])
    last = np.append(begins[1:], len(label)) - 1
    by_label = np.argsort(label[begins], kind="stable")
    sorted_ = label[begins][by_label]
    again = sorted_[1:] == sorted_[:-1]
    rows, to = last[by_label[:-1][again]], begins[by_label[1:][again]]
    ended = stop | fields["terminated"]
    rows, to = rows[~ended[rows]], to[~ended[rows]]
    within = np.flatnonzero((label[1:] == label[:-1]) & ~ended[:-1])
    if not len(rows) or not len(within):
        return label
    goes_on, usual = (go_on(fields["observation"], *pair).mean() for pair in ((rows, to), (within, within + 1)))
    if usual < SMOOTH or goes_on >= 0.5:
        return label
    notes.append(
        f"ids of episodes are used again {len(rows)} times, first in row {fields['row'][to.min()]}, by rows that do "
        "not go on where the id's earlier ones ended: these are taken for other episodes"
    )
    return np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(label))))


def _gaps(label: np.ndarray, step: np.ndarray, ended: np.ndarray, row: np.ndarray, notes: list[str]) -> np.ndarray:
    """Rows whose following step is missing: steps that grow by more than nearly everywhere else."""
    grows = np.diff(step)
    inside = (label[1:] == label[:-1]) & ~ended[:-1]
    if not inside.any():
        return inside
    usual = np.median(grows[inside])
    off = np.abs(grows[inside] - usual)
    is_steady = (off > 1e-3 * usual).mean() <= SOME_GAPS
    gaps = inside & (grows > (1.5 if is_steady else PAUSE) * usual)  # at least one is missing; rounding is less
    if not usual or not gaps.any() or (off > 0.5 * usual).mean() > SOME_GAPS:
        return np.zeros_like(inside)
    notes.append(
        f"steps are missing after {gaps.sum()} rows, first after row {row[gaps.argmax()]}, or a clock paused: episodes "
        "are cut there"
    )
    return gaps


def _by_label(label: np.ndarray | None, step: np.ndarray | None) -> np.ndarray | None:
    """The order in which every label's rows are together and sorted by step; None if they are in order."""
    if label is None:
        return None
    runs = 1 + np.count_nonzero(label[1:] != label[:-1])
    together = runs == label.max() + 1
    if step is None:
        return None if together else np.argsort(label, kind="stable")
    falls = (label[1:] == label[:-1]) & (step[1:] < step[:-1])
    return None if together and not falls.any() else np.lexsort((step, label))


def _episodes(
    fields: dict[str, Any], stop: np.ndarray, label: np.ndarray | None, cut: np.ndarray, notes: list[str]
) -> dict[str, np.ndarray]:
    """The rows' episodes and next observations, once the rows are in order."""
    observation, terminated = fields["observation"], fields["terminated"]
    told = stop | cut
    if label is not None:
        told[:-1] |= label[1:] != label[:-1]
    told[-1] = True
    again = _staying(observation, terminated, told)
    if "next_observation" in fields:
        linked = np.zeros_like(told)
        pair = (fields["next_observation"][:-1], observation[1:])
        linked[:-1] = equal_rows(*map(torch.from_numpy, pair)).numpy()
        ends = told | (terminated & ~(again & linked))
        notes.extend(_logged_resets(fields["reward"], ends & linked, ends, fields["row"]))
        return {"episode": _count(ends), "known": np.ones_like(told)}
    if len(told) > 1 and label is None and not (told[:-1].any() or terminated.any() or stop[-1]):
        notes.append(f"nothing tells where episodes end, so all {len(observation)} rows are taken for one episode")
    jumps = find_jumps(observation, told | terminated)
    disordered = is_disordered(observation, told | terminated)
    again &= not disordered
    if has_fixed_horizon(terminated, stop):
        again = terminated & ~told
    ends = told | (terminated & ~again)
    if disordered:
        notes.append(
            "consecutive observations are as unlike as any two, so the rows seem to be shuffled or interleaved, and "
            "their next observations, taken from the following rows, wrong: give the rows in order of time, or with "
            "their next observations"
        )
    elif jumps.any():
        notes.append(
            f"the observation jumps {jumps.sum()} times as at a reset where no episode is told to end, first after row "
            f"{fields['row'][jumps.argmax()]}: give those ends as 'timeouts', or the next observations"
        )
    following = np.concatenate([observation[1:], observation[-1:]])
    masked = ends | terminated
    following[masked] = observation[masked]  # never the next episode's
    return {"episode": _count(ends), "known": ~ends | terminated, "next_observation": following}


def _staying(observation: np.ndarray, terminated: np.ndarray, told: np.ndarray) -> np.ndarray:
    """Terminals that are followed by another one of their episode, as while a robot stays at its goal, bool ``[n]``.

    Episodes of one step are terminals in a row, too; but some of their observations are alike by chance alone.
    """
    again = np.zeros_like(told)
    again[:-1] = terminated[:-1] & terminated[1:] & ~told[:-1]
    rows = np.flatnonzero(again)
    if not len(rows):
        return again
    alike = go_on(observation, rows)
    again[rows] = alike & (alike.mean() >= 0.5) & (not terminated.all())
    return again


def _logged_resets(reward: np.ndarray, led_on: np.ndarray, ends: np.ndarray, row: np.ndarray) -> list[str]:
    """A note where the rows after ends begin where those ended, and none of them earns what other rows do."""
    rows = 1 + np.flatnonzero(led_on[:-1])
    others = np.setdiff1d(np.flatnonzero(reward != 0), rows)
    if (
        2 * len(rows) < ends.sum() - 1
        or len(rows) < 3
        or reward[rows].any()
        or 2 * len(others) < len(reward) - len(rows)
    ):
        return []
    return [
        f"after {len(rows)} of {ends.sum()} ends the next row starts at the last one's next observation, with a "
        f"reward of 0, first row {row[rows[0]]}: so Gymnasium's vector environments log their resets; leave these "
        "rows out, or collect with AutoresetMode.SAME_STEP or DISABLED"
    ]


def _count(ends: np.ndarray) -> np.ndarray:
    """Each row's episode, from the flags of the episodes' last rows."""
    return np.cumsum(ends) - ends
