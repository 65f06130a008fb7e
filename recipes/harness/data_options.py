"""The options of every recipe that reads a data set: its source, the units of its actions, its environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.options import PROTOCOL, option


@dataclass
class DataOptions:
    dataset: str = option(
        "embedded",
        "Source: embedded (recipes/data), minari:<id>, lerobot:<id or path>, or the path of a Minari set, a D4RL HDF5 "
        "or NPZ file, or a table (.parquet, .arrow, .feather, .csv).",
    )
    columns: Any = option(
        None,
        "Columns of a table: columns={observation:[x,v],action:[u],reward:r,episode:id}; for a LeRobot set, only those "
        "with other names.",
    )
    env: str | None = option(
        None,
        "Gymnasium environment to evaluate in; null: the data set's own; none: there is none, and policies are judged "
        "from the log alone (as where the data set names none).",
    )
    env_kwargs: Any = option(
        None,
        "Arguments of gymnasium.make beside the data set's own, e.g. env_kwargs={continuing_task:false}; null: no "
        "others.",
    )
    protocol: str | None = option(None, PROTOCOL, choices=("d4rl",))
    action_bounds: Any = option(
        None,
        "Bounds of the data's actions: two numbers or two lists of them, [low,high]; env: the environment's. null: "
        "those that a Minari set records; of a file -1 to 1, or the environment's where they go beyond.",
    )
    action_scale: str | None = option(
        None,
        "env: actions are rescaled from their bounds to the environment's; null: bounds that differ are refused.",
        choices=("env",),
    )
    encoder: str | None = option(
        None, "Of a LeRobot set with images: the dotted path of a function from uint8 [b, 3, h, w] to features [b, k]."
    )
    clip_actions: bool = option(
        False,
        "Whether actions beyond their bounds are clipped, and counted: where the environment clipped them, too. false: "
        "they are refused.",
    )
    end_at_success: bool = option(
        False, "Whether a success ends its episode and 1 is taken from all rewards: for mazes with rewards of 0 and 1."
    )
