"""Random offline data in D4RL's arrays, ways to spoil it, and what its rows must be, by a loop."""

from __future__ import annotations

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
    return st.just([]) | st.lists(pairs, min_size=1, max_size=2, unique_by=lambda pair: pair[1])


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


def expected_rows(arrays: dict[str, np.ndarray], episode: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The rows of a file (without ``episode``) or of a source that knows its episodes, one step at a time."""
    n = len(arrays["observations"])
    terminals, timeouts = (np.asarray(arrays.get(key, np.zeros(n))).reshape(-1) != 0 for key in FLAGS)
    following = arrays.get("next_observations")
    rows: list[dict[str, Any]] = []
    returns, number = [], 0
    for i in range(n):
        last = i == n - 1 or terminals[i] or timeouts[i]
        if episode is not None:
            last = i == n - 1 or episode[i + 1] != episode[i]
        reward = float(np.asarray(arrays["rewards"]).reshape(-1)[i])
        if len(returns) == number:
            returns.append(0.0)
        returns[number] += reward
        if following is not None or terminals[i] or not last:
            after = following[i] if following is not None else arrays["observations"][i if last else i + 1]
            rows.append(
                {
                    "observation": arrays["observations"][i], "next_observation": after,
                    "action": arrays["actions"][i], "reward": reward, "episode": number,
                    "terminated": terminals[i], "truncated": timeouts[i],
                }
            )  # fmt: skip
        number += last
    columns = {key: np.array([row[key] for row in rows]) for key in (rows[0] if rows else ())}
    return columns | {"returns": np.array(returns)}
