"""Readers of tables: Parquet, Arrow and CSV files with named columns, and LeRobot's data sets."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_spar.data.arrange import arrange
from torchrl_spar.data.images import Encoder, encode_images
from torchrl_spar.data.sources import missing_array, readable, require
from torchrl_spar.data.steps import Steps, clean, unit_bounds
from torchrl_spar.errors import InputError
from torchrl_spar.paths import user_path

SUFFIXES = (".parquet", ".arrow", ".feather", ".csv")
Columns = Mapping[str, str | Sequence[str]]
_VECTORS = ("observation", "action", "next_observation")
_NEEDED = ("observation", "action", "reward")
FIELDS = (*_VECTORS, "reward", "terminated", "truncated", "done", "episode", "step")
_CAMERAS = ("image", "video")
_AS_FEATURES = "encode the frames yourself, and give the features as 'observation' of a TensorDict in TED form"
_STATE, _ENVIRONMENT_STATE = "observation.state", "observation.environment_state"


def read_table(path: Path, columns: Columns | None) -> Steps:
    """A ``.parquet``, ``.arrow``, ``.feather`` or ``.csv`` file; ``columns`` names each field's columns."""
    if path.is_dir():
        raise InputError("a directory, not a file: join its files into one table")
    if not path.is_file():
        raise InputError("no such file")
    columns = _check_columns(columns)
    arrow = _arrow()
    with readable():
        if path.suffix.lower() == ".parquet":
            table = arrow.parquet.read_table(path)
        elif path.suffix.lower() == ".csv":
            table = arrow.csv.read_csv(path)
        else:
            table = _read_arrow(path)
        table.column_names  # noqa: B018 - decoded when they are asked for
    return _read(table, columns)


def _read_arrow(path: Path) -> Any:
    """Reads Arrow's file format, or its stream format, which Hugging Face's data sets have."""
    arrow = _arrow()
    try:
        return arrow.feather.read_table(path)
    except arrow.ArrowInvalid:
        with arrow.memory_map(str(path)) as source:
            return arrow.ipc.open_stream(source).read_all()


def find_lerobot(name: str, root: str | os.PathLike[str] | None) -> Path:
    """The directory of a LeRobot data set by its path or id, downloaded without its videos if it is not there."""
    if name.startswith(("/", ".", "~")) or user_path(name).is_dir():
        return user_path(name)
    home = user_path(root or os.environ.get("HF_LEROBOT_HOME") or "~/.cache/huggingface/lerobot")
    path = home / name
    if not (path / "meta" / "info.json").is_file():
        hub = require("huggingface_hub")
        try:
            hub.snapshot_download(name, repo_type="dataset", local_dir=path, allow_patterns=["meta/*", "data/*"])
        except Exception as err:  # requests', huggingface_hub's own: any of them means "not here"
            raise InputError(
                f"not found as a directory nor under {home}, and the download failed ({err!r}). Download it on a "
                "machine with network, or give the path of a local copy as 'lerobot:<path>'"
            ) from err
    return path


def read_lerobot(directory: Path, columns: Columns | None = None, encoder: Encoder | None = None) -> Steps:
    """A data set in LeRobot's layout v3 or v2: ``meta/info.json`` and Parquet files below ``data``."""
    info_path = directory / "meta" / "info.json"
    if not info_path.is_file():
        raise InputError("the directory is no LeRobot data set: it holds no meta/info.json")
    arrow = _arrow()
    with readable("meta/info.json "):
        info = json.loads(info_path.read_text())
        features, version = dict(info["features"]), str(info.get("codebase_version", "v3.0"))
    if wrong := [name for name, feature in features.items() if not isinstance(feature, dict)]:
        raise InputError(
            f"meta/info.json: its feature {wrong[0]!r} is {features[wrong[0]]!r}, expected its dtype and shape"
        )
    if not version.startswith(("v2", "v3")):
        raise InputError(f"LeRobot's layout {version}: convert it to v3.0 with LeRobot's own scripts")
    images, videos = ([name for name in sorted(features) if features[name].get("dtype") == kind] for kind in _CAMERAS)
    observation = [name for name in (_STATE, _ENVIRONMENT_STATE) if name in features]
    observation = [name for name in observation if name not in (*images, *videos)]
    if encoder is not None and not images:
        what = (
            f"its cameras are videos ({', '.join(videos)}), which are not decoded: {_AS_FEATURES}"
            if videos
            else "it has no images"
        )
        raise InputError(f"encoder: {what}")
    if not observation and not (columns and "observation" in columns) and encoder is None:
        if not (images or videos):
            raise InputError(f"it has no {_STATE!r}; name its columns, columns={{'observation': ...}}")
        how = "encoder=... makes vectors of them" if images else _AS_FEATURES
        raise InputError(f"its observations are images ({', '.join(images + videos)}), and SPAR reads vectors: {how}")
    named: dict[str, str | Sequence[str]] = {
        "observation": observation, "action": "action", "episode": "episode_index", "step": "frame_index",
    }  # fmt: skip
    ends = {"reward": "next.reward", "done": "next.done", "truncated": "next.truncated"}
    named |= {field: name for field, name in ends.items() if name in features} | dict(columns or {})
    named = _check_columns(named, needed=("action",) if encoder is not None else ("observation", "action"))
    files = sorted((directory / "data").rglob("*.parquet"))
    if not files:
        raise InputError("the directory holds no Parquet file below data")
    success = "next.success" if "next.success" in features and "terminated" not in named else None
    encoded = images if encoder is not None else []
    wanted = [name for names in named.values() for name in _names(names)] + ([success] if success else []) + encoded
    wanted = list(dict.fromkeys(wanted))
    with readable():
        present = arrow.parquet.read_schema(files[0]).names
        for name in wanted:
            if name not in present:
                raise missing_array(repr(name), present)
        table = arrow.concat_tables([arrow.parquet.read_table(file, columns=wanted) for file in files])
    total = info.get("total_frames")
    if isinstance(total, int) and len(table) < total:
        raise InputError(
            f"meta/info.json tells of {total} frames, the Parquet files below data hold {len(table)}: some are "
            "missing; copy or download the set again"
        )
    notes = []
    if unseen := [name for name in images + videos if name not in encoded]:
        sees = ", ".join([*_names(named["observation"]), *encoded])
        notes.append(f"images are left out ({', '.join(unseen)}): the policy sees {sees} alone")
    if encoder is not None:
        for name in encoded:
            vectors = list(encode_images(table.column(name), name, encoder))
            table = table.set_column(table.column_names.index(name), name, arrow.array(vectors))
        named |= {"observation": [*_names(named["observation"]), *encoded]}
    if success:  # an end without success is a time limit
        succeeded = _column(table, success, "done")[:, 0].astype(bool)
        if "done" not in named:
            episode = _column(table, str(named["episode"]), "episode")[:, 0]
            table = table.append_column("done", arrow.array(np.append(episode[1:] != episode[:-1], True)))
            named |= {"done": "done"}
        done = _column(table, str(named["done"]), "done")[:, 0].astype(bool)
        named |= {"truncated": "truncated"}
        table = table.append_column("truncated", arrow.array(done & ~succeeded))
    if "reward" not in named:
        remedy = f"; columns={{'reward': '{success}'}} rewards success" if success else ""
        notes.append(f"no 'next.reward', so all rewards are 0: that clones the behaviour, and improves nothing{remedy}")
        named |= {"reward": "reward"}
        table = table.append_column("reward", arrow.array(np.zeros(len(table))))
    return _read(table, named, notes)


def _read(table: Any, columns: Columns, notes: Sequence[str] = ()) -> Steps:
    notes = list(notes)
    raw = {}
    for field, names in columns.items():
        parts = [_column(table, name, field) for name in _names(names)]
        array = np.require(parts[0], requirements="W") if len(parts) == 1 else np.concatenate(parts, axis=1)
        label = ", ".join(_names(names))
        raw[field] = (label, array if field in _VECTORS else array[:, 0] if array.shape[1:] == (1,) else array)
    if "terminated" not in raw:
        if "done" in raw:
            label, array = raw.pop("done")
            raw["terminated"] = (label, array)
            if "truncated" not in raw:
                notes.append(
                    f"{label} is taken for the end of a task: where it is a time limit, name a 'truncated' column"
                )
        else:
            raw["terminated"] = ("terminated", np.zeros(len(table), dtype=bool))
    fields = clean(raw)
    if "done" in columns and "terminated" not in columns:
        fields["terminated"] = fields["terminated"] & ~fields["truncated"]
    fields = arrange(fields)
    low, high = unit_bounds(fields)
    least, most = fields["action"].min(axis=0), fields["action"].max(axis=0)
    is_guess = bool((least < low).any() or (most > high).any())
    if is_guess:
        size = np.maximum(np.abs(least), np.abs(most))
        low, high = least, np.where(most - least > 1e-6 * size, most, least + 1e-3 * np.maximum(1, size))
    fields["notes"] = (*notes, *fields["notes"])
    return Steps(**fields, action_bounds=(low, high), bounds_are_guessed=is_guess)


def _column(table: Any, name: str, field: str) -> np.ndarray:
    """A column as ``[n, k]``: numbers, or lists of them of one length.

    An episode's texts become their index, a step's times what has passed since the first.
    """
    if name not in table.column_names:
        raise missing_array(repr(name), table.column_names)
    if (count := table.column_names.count(name)) > 1:
        raise InputError(f"it holds the column {name!r} {count} times: keep one of them")
    arrow = _arrow()
    column = table.column(name).combine_chunks()
    if isinstance(column, arrow.ChunkedArray):
        column = arrow.concat_arrays(column.chunks) if column.num_chunks else arrow.array([], column.type)
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise InputError(f"{name}: {column.null_count} values are missing, the first in row {row}")
    kind = column.type
    if arrow.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if field == "episode" and (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        column = column.dictionary_encode().indices
    elif field == "step" and (
        arrow.types.is_timestamp(kind) or arrow.types.is_date(kind) or arrow.types.is_duration(kind)
    ):
        times = column.to_numpy(zero_copy_only=False)
        return (times - times[:1]).astype(np.float64)[:, None]
    elif arrow.types.is_list(kind) or arrow.types.is_large_list(kind) or arrow.types.is_fixed_size_list(kind):
        values = column.flatten()
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        if len(lengths) and (lengths != lengths[0]).any():
            raise InputError(f"{name}: lists of {lengths.min()} to {lengths.max()} numbers, expected one length")
        if not len(values):
            raise InputError(f"{name}: empty lists, expected numbers")
        if values.null_count:
            raise InputError(f"{name}: {values.null_count} numbers within its lists are missing")
        if not _is_number(values.type):
            raise InputError(f"{name}: lists of type {values.type}, expected numbers")
        return values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    elif not _is_number(kind):
        text = arrow.types.is_string(kind) or arrow.types.is_large_string(kind)
        wrong = [row for row, value in enumerate(column.to_pylist()) if not _reads_as_number(value)] if text else []
        where = f", such as {column[wrong[0]].as_py()!r} in row {wrong[0]}" if wrong else ""
        raise InputError(f"{name}: type {kind}{where}, expected numbers or lists of them")
    return column.to_numpy(zero_copy_only=False)[:, None]


def _reads_as_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_number(kind: Any) -> bool:
    types = _arrow().types
    return types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind)


def _check_columns(columns: Columns | None, needed: Sequence[str] = _NEEDED) -> dict[str, str | Sequence[str]]:
    if not columns:
        raise InputError(
            'a table needs columns={"observation": [...], "action": [...], "reward": "...", "terminated": "...", '
            '"episode": "..."}, the names of its columns'
        )
    for field in columns:
        if field not in FIELDS:
            raise InputError(f"columns: {field!r} is none of {', '.join(FIELDS)}")
        if not all(isinstance(name, str) for name in _names(columns[field])):
            raise InputError(f"columns: {field!r} is {columns[field]!r}, expected a column's name or a list of names")
    for field in needed:
        if not _names(columns.get(field, ())):
            raise InputError(f"columns: {field!r} must be named")
    if both := [name for name in _names(columns.get("action", ())) if name in _names(columns.get("observation", ()))]:
        raise InputError(f"columns: {both[0]!r} is named in 'observation' and in 'action': the action would be known")
    if not {"terminated", "truncated", "done", "episode"} & set(columns):
        raise InputError("columns: name one of 'episode', 'terminated', 'truncated', 'done', which tell episodes apart")
    return dict(columns)


def _names(names: str | Sequence[str]) -> list[str]:
    return list(names) if isinstance(names, Sequence) and not isinstance(names, str) else [names]


def _arrow() -> Any:
    arrow = require("pyarrow", "tables")
    for part in ("parquet", "csv", "feather"):
        require(f"pyarrow.{part}", "tables")
    return arrow
