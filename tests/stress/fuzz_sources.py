"""Random offline data in D4RL's arrays, ways to spoil it, and what its rows must be, by a loop."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import h5py
import numpy as np
from hypothesis import strategies as st

VECTORS = ("observations", "next_observations", "actions")
FLAGS = ("terminals", "timeouts")
KEYS = (*VECTORS, "rewards", *FLAGS)
OPTIONAL = ("next_observations", "timeouts")
TWINS = {"terminals": "terminations", "timeouts": "truncations"}
# What a loader may be given and must refuse, and the keys that it can happen to.
DEFECTS = {
    "nan": KEYS,
    "inf": KEYS,
    "-inf": KEYS,
    "beyond": KEYS,
    "overflow": KEYS,
    "half": FLAGS,
    "outside": ("actions",),
    "integer": ("actions",),
    "zeros": ("observations", "actions"),
    "missing": KEYS,
    "shorter": KEYS,
    "longer": KEYS,
    "scalar": KEYS,
    "axis": KEYS,
    "flat": VECTORS,
    "narrow": VECTORS,
    "columns": ("rewards", *FLAGS),
    "wider": ("observations", "next_observations"),
    "text": KEYS,
    "complex": KEYS,
    "empty": KEYS,
    "twin": FLAGS,
}
VALUES = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "beyond": 1e16, "overflow": 1e300, "half": 0.5, "outside": 1.5}


@st.composite
def draw_arrays(draw: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """D4RL's arrays of some episodes, all six of them, and each row's episode."""
    lengths = draw(st.lists(st.integers(0, 6), max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width, action_width = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    spread, rewards = (draw(st.sampled_from(["plain", "constant", "huge"])) for _ in range(2))
    observation_type = draw(st.sampled_from(["f4", "f8", "f2", "i8", "u1"]))
    reward_type = draw(st.sampled_from(["f4", "f8", "f2", "i4", "?"]))
    action_type = draw(st.sampled_from(["f4", "f8", "f2"]))
    flag_type = draw(st.sampled_from(["?", "u1", "i8", "f4"]))
    ending = draw(st.sampled_from(["neither", "terminals", "timeouts", "both", "mixed"]))
    column = draw(st.booleans())
    n = sum(lengths)

    def numbers(shape: tuple[int, ...], kind: str, dtype: str) -> np.ndarray:
        values = np.full(shape, 3.0) if kind == "constant" else rng.normal(size=shape)
        info = None if dtype == "?" else np.finfo(dtype) if dtype[0] == "f" else np.iinfo(dtype)
        if kind == "huge" and info is not None:
            values = rng.choice([-1, -0.5, 1], shape) * min(9.9e14, float(info.max))
        if info is not None and dtype[0] != "f":
            values = np.clip(np.round(values), info.min, info.max)
        return values.astype(dtype)

    observations, following, flags = [], [], {key: np.zeros(n, bool) for key in FLAGS}
    end = 0
    for length in lengths:
        states = numbers((length + 1, width), spread, observation_type)
        states[0, 0] = 1  # data of zeros alone is refused
        observations.append(states[:-1])
        following.append(states[1:])
        end += length
        if length:
            which = rng.choice(["neither", "terminals", "timeouts", "both"]) if ending == "mixed" else ending
            for key in FLAGS:
                flags[key][end - 1] = which in (key, "both")
    actions = rng.uniform(-1, 1, size=(n, action_width))
    actions[rng.random(actions.shape) < 0.2] = 1
    actions[:1] = -1
    empty = np.zeros((0, width), observation_type)
    arrays = {
        "observations": np.concatenate([empty, *observations]),
        "next_observations": np.concatenate([empty, *following]),
        "actions": actions.astype(action_type),
        "rewards": numbers((n,), rewards, reward_type),
        **{key: flag.astype(flag_type) for key, flag in flags.items()},
    }
    if column:
        arrays |= {key: arrays[key][:, None] for key in ("rewards", *FLAGS)}
    return arrays, np.repeat(np.arange(len(lengths)), lengths)


def draw_defects(*without: str) -> st.SearchStrategy[list[tuple[str, str]]]:
    """At most two defects of different keys; half of the data has none."""
    kinds = st.sampled_from([kind for kind in DEFECTS if kind not in without])
    pairs = kinds.flatmap(lambda kind: st.tuples(st.just(kind), st.sampled_from(DEFECTS[kind])))
    # Twice "wider" would be a good set again.
    unique = (lambda pair: pair[1], lambda pair: pair[0] == "wider" or pair[1])
    return st.just([]) | st.lists(pairs, min_size=1, max_size=2, unique_by=unique)


def spoil(arrays: dict[str, Any], kind: str, key: str, row: int) -> bool:
    """Does one defect to the arrays; returns whether they must now be refused."""
    array = arrays.get(key)
    if array is None:
        return False
    row = min(row, len(array) - 1)
    if kind in VALUES:
        if row < 0:
            return False
        array = array.astype(np.float64)
        array[row] = VALUES[kind]
    elif kind == "integer":
        array = np.ones(array.shape, np.int32)
    elif kind == "zeros":
        array = np.zeros_like(array)
    elif kind == "missing":
        del arrays[key]
        return key not in OPTIONAL
    elif kind in ("shorter", "longer"):
        array = array[:-1] if kind == "shorter" else np.concatenate([array, array[-1:]])
        if len(array) == len(arrays[key]):
            return False
    elif kind == "scalar":
        array = np.float32(1)
    elif kind == "axis":
        array = array[..., None, None]
    elif kind == "flat":
        array = array[:, 0]
    elif kind == "narrow":
        array = array[:, :0]
    elif kind == "columns":
        array = np.stack([array.reshape(-1)] * 2, axis=1)
    elif kind == "wider":
        array = np.concatenate([array, array], axis=1)
        # without next observations of its own, a wider observation is as good as any
        other = arrays.get("next_observations" if key == "observations" else "observations")
        arrays[key] = array
        return other is not None
    elif kind == "text":
        array = np.full(array.shape, b"x")
    elif kind == "complex":
        array = array.astype(np.complex64)
    elif kind == "empty":
        array = h5py.Empty("f4")
    elif kind == "twin":
        arrays[TWINS[key]] = 1 - array.astype("i4")
        return len(array) > 0
    arrays[key] = array
    return True


def tell_episodes(arrays: dict[str, np.ndarray], label: np.ndarray, stop: np.ndarray) -> tuple[Any, Any, bool]:
    """The order of rows, which are the last of an episode, and whether there is an order; one row at a time.

    Args:
        arrays: D4RL's, of equal lengths.
        label: each row's; the rows of one lie together.
        stop: rows that end an episode beside the timeouts.
    """
    n = len(arrays["observations"])
    terminal, timeout = (np.asarray(arrays.get(key, np.zeros(n))).reshape(-1) != 0 for key in FLAGS)
    stop = stop | timeout
    states, following = arrays["observations"].tolist(), arrays.get("next_observations")
    order = list(range(n))
    if following is None:
        return order, _ends_by_flags(arrays["observations"], terminal, stop, label), True
    after = following.tolist()

    def is_linked(i: int, j: int) -> bool:
        return label[i] == label[j] and after[i] == states[j]

    def cuts() -> tuple[list[int], list[int]]:
        pairs = list(pairwise(order))
        linked = [i for i, j in pairs if is_linked(i, j) and not stop[i] and not terminal[i]]
        cut = [i for i, j in pairs if label[i] == label[j] and not stop[i] and not terminal[i] and not is_linked(i, j)]
        return linked, cut

    linked, cut = cuts()
    heads = [j for j in range(n) if j == 0 or j - 1 not in linked]
    piece = {j: sum(head <= j for head in heads) for j in range(n)}
    goes_on: dict[int, int] = {}  # in the one head that has the observation
    for i in [i for i in range(n) if not (i in linked or stop[i] or terminal[i])]:
        alike = [j for j in heads if is_linked(i, j)]
        if len(alike) == 1 and piece[alike[0]] != piece[i]:
            goes_on[i] = alike[0]
    goes_on = {i: j for i, j in goes_on.items() if list(goes_on.values()).count(j) == 1}
    if goes_on:
        order = []
        for head in [*(head for head in heads if head not in goes_on.values()), *heads]:
            i: int | None = head
            while i is not None and i not in order:
                order.append(i)
                i = i + 1 if i in linked else goes_on.get(i)
        linked, cut = cuts()
        if len(cut) > 0.25 * (len(cut) + len(linked)):
            return range(n), [], False
    if len(cut) > 0.9 * (len(cut) + len(linked)):
        cut = []  # the next observations are noise
    last = []
    for i, j in zip(order, [*order[1:], -1]):
        stays = j >= 0 and terminal[i] and terminal[j] and is_linked(i, j)
        last.append(j < 0 or stop[i] or label[i] != label[j] or i in cut or (terminal[i] and not stays))
    return order, last, True


def _ends_by_flags(observations: np.ndarray, terminal: np.ndarray, stop: np.ndarray, label: np.ndarray) -> list[bool]:
    """Without next observations: terminals in a row are one episode if the steps between them are small."""
    n = len(observations)
    timeouts = [i for i in range(n) if stop[i]]
    lengths = [j - i for i, j in zip([-1, *timeouts], timeouts)]
    full = lengths[:-1] if len(lengths) > 2 else lengths
    on = [i for i in range(n - 1) if terminal[i] and terminal[i + 1] and not stop[i]]
    same = len(full) > 1 and len({*full}) == 1 and lengths[-1] <= full[0]
    count = sum(terminal & ~stop)
    rolls_out = same and count > 0 and 2 * len(on) >= count  # to a fixed horizon, as AntMaze
    rows = observations.astype(np.float64)
    columns = [c for c in rows.T if c.std() > 1e-6 * max(1, abs(c.mean()))]

    def is_small(i: int) -> bool:
        return not columns or np.mean([min(abs(c[i + 1] - c[i]) / c.std(), 2) for c in columns]) < 0.5

    last = []
    for i in range(n):
        stays = terminal[i] and (rolls_out or (i in on and is_small(i)))
        last.append(bool(i == n - 1 or stop[i] or label[i] != label[i + 1] or (terminal[i] and not stays)))
    return last


def expected_sequences(arrays: dict[str, np.ndarray], label: np.ndarray | None, length: int) -> dict[str, Any]:
    """The rows of a source ``[B, T]``, whose time is the first dimension where rows go on along that one alone."""
    n = len(arrays["observations"])
    states, after = arrays["observations"].tolist(), arrays["next_observations"].tolist()

    def goes_on(pairs: list[tuple[int, int]]) -> bool:
        return 2 * sum(after[i] == states[j] for i, j in pairs) > len(pairs)

    if not goes_on([(i, i + 1) for i in range(n) if i % length < length - 1]) and goes_on(
        [(i, i + length) for i in range(n - length)]
    ):
        order = np.arange(n).reshape(-1, length).T.reshape(-1)
        arrays, length = {key: array[order] for key, array in arrays.items()}, n // length
        label = None if label is None else label[order]
    return expected_rows(arrays, label=label, sequence=np.arange(n) // length)


def expected_rows(
    arrays: dict[str, np.ndarray],
    *,
    episode: np.ndarray | None = None,
    label: np.ndarray | None = None,
    sequence: np.ndarray | None = None,
) -> dict[str, Any]:
    """The rows of a source, one step at a time.

    Args:
        arrays: D4RL's.
        episode: each row's, from a source that knows them; else :func:`tell_episodes` finds them.
        label, sequence: numbers for each row; an episode ends where one changes.
    """
    n = len(arrays["observations"])
    terminals, timeouts = (np.asarray(arrays.get(key, np.zeros(n))).reshape(-1) != 0 for key in FLAGS)
    following = arrays.get("next_observations")
    order, ordered = range(n), True
    if episode is not None:
        last = [i == n - 1 or episode[i + 1] != episode[i] for i in range(n)]
    else:
        label, sequence = (np.zeros(n, int) if numbers is None else numbers for numbers in (label, sequence))
        order, last, ordered = tell_episodes(arrays, label, np.append(sequence[1:] != sequence[:-1], False))
    rows: list[dict[str, Any]] = []
    returns: list[float] = []
    number, earns = 0, True
    for place, i in enumerate(order):
        ends = ordered and last[place]
        reward = float(np.asarray(arrays["rewards"]).reshape(-1)[i])
        if len(returns) == number:
            returns.append(0.0)
        returns[number] += reward * earns
        earns = ends or (earns and not terminals[i])  # nothing after the first terminal of an episode
        if following is not None or terminals[i] or not ends:
            stays = ends or terminals[i]
            after = following[i] if following is not None else arrays["observations"][i if stays else i + 1]
            rows.append(
                {
                    "observation": arrays["observations"][i], "next_observation": after,
                    "action": arrays["actions"][i], "reward": reward, "episode": number,
                    "terminated": terminals[i], "truncated": timeouts[i],
                }
            )  # fmt: skip
        number += ends
    columns = {key: np.array([row[key] for row in rows]) for key in (rows[0] if rows else ())}
    return columns | {"returns": np.array(returns if ordered else []), "ordered": ordered}
