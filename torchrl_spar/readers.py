"""Readers of offline data: Minari, D4RL-style files, TensorDicts, all to the same clean arrays."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from torchrl_spar.errors import InputError
from torchrl_spar.observations import flatten_observation

# Each field's names in a file, D4RL's first.
_FILE_KEYS = {
    "observation": ("observations",),
    "action": ("actions",),
    "reward": ("rewards",),
    "terminated": ("terminals", "terminations"),
    "truncated": ("timeouts", "truncations"),
    "next_observation": ("next_observations",),
}
_TED_KEYS = {
    "observation": "observation",
    "action": "action",
    "reward": ("next", "reward"),
    "terminated": ("next", "terminated"),
    "truncated": ("next", "truncated"),
    "done": ("next", "done"),
    "next_observation": ("next", "observation"),
    "episode": "episode",
}


@dataclass
class Steps:
    """A source's ``n`` steps, checked, its episodes one after the other.

    ``known`` says where the next observation is known; elsewhere ``next_observation`` is a
    placeholder. Rewards keep the source's precision, for the returns.
    """

    observation: np.ndarray  # float32 [n, observation_dim]
    action: np.ndarray  # float32 [n, action_dim]
    reward: np.ndarray  # float64 [n]
    terminated: np.ndarray  # bool [n]
    truncated: np.ndarray  # bool [n]
    next_observation: np.ndarray  # float32 [n, observation_dim]
    known: np.ndarray  # bool [n]
    episode: np.ndarray  # int64 [n], from 0
    action_bounds: tuple[np.ndarray, np.ndarray]  # low and high [action_dim]
    env_id: str | None = None


def find_minari(dataset_id: str, root: str | os.PathLike[str] | None) -> Path:
    """The directory of a Minari data set, downloaded if it is not there."""
    minari = _require("minari")
    default = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
    base = Path(root or default).expanduser()
    if not (base / dataset_id / "data").exists():
        with _environment("MINARI_DATASETS_PATH", str(base)):  # the only way to tell Minari where
            try:
                minari.download_dataset(dataset_id)
            except Exception as err:  # requests', huggingface_hub's, Minari's own: any of them means "not here"
                raise InputError(
                    f"not found under {base}, and the download failed ({err!r}). Run `minari download {dataset_id}` "
                    "on a machine with network and set MINARI_DATASETS_PATH (or root) to that directory, or give the "
                    "path of a local file"
                ) from err
    return base / dataset_id


def read_minari(directory: Path) -> Steps:
    """A Minari data set; every step has its next observation."""
    if not (directory / "data" / "metadata.json").is_file():
        raise InputError("the directory is no Minari data set: it holds no data/metadata.json")
    minari = _require("minari")
    with _readable():
        dataset = minari.MinariDataset(directory / "data")
        episodes = [_minari_episode(episode) for episode in dataset.iterate_episodes() if len(episode.rewards)]
    if not episodes:
        raise InputError("the data set holds no step")
    space = dataset.action_space
    if not hasattr(space, "low") or space.dtype.kind != "f":
        raise InputError(f"the action space is {space}; SPAR needs continuous actions")

    def join(name: str, rows: slice = slice(None)) -> tuple[str, np.ndarray]:
        with _readable():
            return name, np.concatenate([episode[name][rows] for episode in episodes])

    fields = _clean(
        {
            "observation": join("observations", slice(None, -1)),
            "next_observation": ("observations (as next)", join("observations", slice(1, None))[1]),
            "action": join("actions"),
            "reward": join("rewards"),
            "terminated": join("terminations"),
            "truncated": join("truncations"),
        }
    )
    lengths = [len(episode["rewards"]) for episode in episodes]
    return Steps(
        **fields,
        known=np.ones(sum(lengths), dtype=bool),
        episode=np.repeat(np.arange(len(lengths)), lengths),
        action_bounds=(space.low, space.high),
        env_id=dataset.env_spec.id if dataset.env_spec is not None else None,
    )


def read_file(path: Path) -> Steps:
    """A ``.hdf5``, ``.h5`` or ``.npz`` file with D4RL's arrays."""
    if not path.is_file():
        raise InputError("no such file")
    load = _load_npz if path.suffix.lower() == ".npz" else _load_hdf5
    with _readable():
        arrays, present = load(path, [key for keys in _FILE_KEYS.values() for key in keys])
    raw = {}
    for field, keys in _FILE_KEYS.items():
        key = next((key for key in keys if key in arrays), None)
        if key is not None:
            raw[field] = (key, arrays[key])
        elif field not in ("truncated", "next_observation"):
            raise _missing(" or ".join(repr(key) for key in keys), present)
    if "truncated" not in raw and "next_observation" not in raw:
        warnings.warn(f"{path}: no 'timeouts', so episodes are taken to end at 'terminals' alone", stacklevel=4)
    fields = _clean(raw)
    terminated, truncated, observation = fields["terminated"], fields["truncated"], fields["observation"]
    ends = terminated | truncated
    ends[-1] = True
    known = np.ones_like(ends)
    if "next_observation" not in fields:
        fields["next_observation"] = np.concatenate([observation[1:], observation[-1:]])
        fields["next_observation"][ends] = observation[ends]  # never the next episode's
        known = ~ends | terminated  # a terminal's next observation is masked, so any will do
    return Steps(**fields, known=known, episode=_count(ends), action_bounds=_unit_bounds(fields))


def read_tensordict(data: TensorDictBase) -> Steps:
    """A TensorDict in TED form, ``[n]`` or, with time last, ``[..., T]``."""
    if not data.ndim:
        raise InputError("the batch size is empty; it must be [n] or [B, T]")
    raw = {}
    for field, key in _TED_KEYS.items():
        value = data.get(key, None)
        if value is None and field not in ("truncated", "done", "episode"):
            raise _missing(repr(key), sorted(map(str, data.keys(True, True))))
        if value is not None:
            if not isinstance(value, torch.Tensor):
                raise InputError(f"{key!r} is a {type(value).__name__}, not a tensor")
            with _readable():
                raw[field] = (repr(key), value.detach().cpu().flatten(0, data.ndim - 1).numpy())
    fields = _clean(raw)
    fields["truncated"] = fields["truncated"] | (fields.pop("done", False) & ~fields["terminated"])
    ends = fields["terminated"] | fields["truncated"]
    ends[data.shape[-1] - 1 :: data.shape[-1]] = True
    if "episode" in fields:
        episode = fields.pop("episode")
        ends[:-1] |= episode[1:] != episode[:-1]
    return Steps(**fields, known=np.ones_like(ends), episode=_count(ends), action_bounds=_unit_bounds(fields))


def _minari_episode(episode: Any) -> dict[str, np.ndarray]:
    steps = len(episode.rewards)
    with np.errstate(over="ignore"):  # what overflows float32 is reported as infinity
        arrays = {"observations": flatten_observation(episode.observations)}
    arrays |= {name: np.asarray(getattr(episode, name)) for name in ("actions", "terminations", "truncations")}
    for name, array in arrays.items():
        expected = steps + 1 if name == "observations" else steps
        if len(array) != expected:
            raise InputError(f"episode {episode.id} has {steps} rewards and {len(array)} {name}, not {expected}")
    return {**arrays, "rewards": episode.rewards}


def _load_npz(path: Path, wanted: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    with np.load(path, allow_pickle=False) as file:  # a pickle could run code
        present = list(file.files)
        return {key: file[key] for key in wanted if key in present}, present


def _load_hdf5(path: Path, wanted: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    h5py = _require("h5py")
    with h5py.File(path, "r") as file:
        present = [key if isinstance(file.get(key), h5py.Dataset) else f"{key}/" for key in file]
        return {key: file[key][()] for key in wanted if key in present}, present


def _clean(raw: Mapping[str, tuple[str, np.ndarray]]) -> dict[str, Any]:
    """Checks ``field -> (its name in the source, array)`` and casts to the types of :class:`Steps`."""
    lengths = {label: len(array) if array.ndim else 0 for label, array in raw.values()}
    if len(set(lengths.values())) > 1:
        raise InputError("arrays of different lengths: " + ", ".join(f"{key} {n}" for key, n in lengths.items()))
    if not all(lengths.values()):
        raise InputError("the data set holds no step")
    fields = {field: _CASTS[field](label, array) for field, (label, array) in raw.items()}
    width, next_width = (fields.get(key, fields["observation"]).shape[1] for key in ("observation", "next_observation"))
    if width != next_width:
        raise InputError(f"observations have {width} dimensions, the next ones {next_width}")
    for field in ("observation", "action"):
        if not fields[field].any():
            raise InputError(
                f"{raw[field][0]}: all {len(fields[field])} rows are exactly zero. TorchRL's MinariExperienceReplay "
                "returns such zeros silently; if this data passed through it, load the source itself with "
                "load_offline_dataset"
            )
    fields.setdefault("truncated", np.zeros_like(fields["terminated"]))
    return fields


def _vectors(label: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 2 or not array.shape[1]:
        raise InputError(f"{label}: shape {array.shape}, expected [n, dimensions]")
    _check_finite(label, array)
    return array.astype(np.float32, copy=False)


def _actions(label: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "iub":
        raise InputError(f"{label}: type {array.dtype}; SPAR needs continuous actions, as floats")
    return _vectors(label, array)


def _scalars(label: str, array: np.ndarray) -> np.ndarray:
    if array.shape not in ((len(array),), (len(array), 1)):
        raise InputError(f"{label}: shape {array.shape}, expected [n] or [n, 1]")
    _check_finite(label, array)
    return array.reshape(-1).astype(np.float64)


def _flags(label: str, array: np.ndarray) -> np.ndarray:
    values = _scalars(label, array)
    strange = (values != 0) & (values != 1)
    if strange.any():
        raise InputError(f"{label}: {strange.sum()} values are neither 0 nor 1, the first in row {strange.argmax()}")
    return values.astype(bool)


def _check_finite(label: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "fiub":
        raise InputError(f"{label}: type {array.dtype}, expected numbers")
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(array.astype(np.float32, copy=False))
    if bad.any():
        row = np.argwhere(bad)[0, 0]
        raise InputError(f"{label}: {bad.sum()} values are NaN or infinite in float32, the first in row {row}")


_CASTS: dict[str, Callable[[str, np.ndarray], np.ndarray]] = {
    "observation": _vectors,
    "next_observation": _vectors,
    "action": _actions,
    "reward": _scalars,
    "terminated": _flags,
    "truncated": _flags,
    "done": _flags,
    "episode": _scalars,
}


def _count(ends: np.ndarray) -> np.ndarray:
    """Each row's episode, from the flags of the episodes' last rows."""
    return np.cumsum(ends) - ends


def _unit_bounds(fields: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    bound = np.ones(fields["action"].shape[1], dtype=np.float32)
    return -bound, bound


def _missing(key: str, present: list[str]) -> InputError:
    more = f", ... ({len(present)} in all)" if len(present) > 12 else ""
    return InputError(f"no array {key}; there are: {', '.join(present[:12]) or 'none'}{more}")


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"reading it needs {module}: pip install 'torchrl-spar[recipes]'") from None


@contextmanager
def _readable() -> Iterator[None]:
    """Whatever a library raises on a damaged file becomes one :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as err:
        raise InputError(f"cannot be read, it may be damaged ({err!r})") from err


@contextmanager
def _environment(variable: str, value: str) -> Iterator[None]:
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
