"""Readers of offline data: Minari, D4RL-style files, TensorDicts, all to the same clean arrays."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from torchrl_spar.data.environment import recorded_environment
from torchrl_spar.data.horizon import has_fixed_horizon
from torchrl_spar.data.observations import flatten_observation
from torchrl_spar.errors import InputError, first_line
from torchrl_spar.paths import user_path

# Beyond it the squares and sums of training overflow float32; no unit of measurement needs it.
LARGEST = 1e15
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
    env_kwargs: Mapping[str, Any] | None = None  # of gymnasium.make
    success: np.ndarray | None = None  # bool [n], where the source records it and was asked for it
    note: str | None = None  # what the user is warned of


def find_minari(dataset_id: str, root: str | os.PathLike[str] | None) -> Path:
    """The directory of a Minari data set, downloaded if it is not there."""
    minari = _require("minari")
    base = user_path(root or os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets")
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


def read_minari(directory: Path, *, with_success: bool = False) -> Steps:
    """A Minari data set; every step has its next observation. ``with_success``: also its ``infos["success"]``."""
    if not (directory / "data" / "metadata.json").is_file():
        if (directory / "data" / "main_data.hdf5").is_file():
            raise InputError(
                "a data set from before Minari 0.5: it has no data/metadata.json. Download it again with today's "
                "Minari, or read it with the Minari that wrote it (pip install 'minari<0.5') and give its arrays as a "
                ".npz file"
            )
        raise InputError("the directory is no Minari data set: it holds no data/metadata.json")
    minari = _require("minari")
    with _readable():
        dataset = minari.MinariDataset(directory / "data")
    space = dataset.action_space
    if not hasattr(space, "low") or space.dtype.kind != "f":
        raise InputError(f"the action space is {space}; SPAR needs continuous actions")
    with _readable(), np.errstate(over="ignore"):  # what overflows float32 is reported as infinity
        arrays, lengths = _stack(_minari_episodes(dataset, with_success), dataset.total_steps)
    if not lengths:
        raise InputError("the data set holds no step")
    labels = {
        "observation": "observations",
        "next_observation": "observations (as next)",
        "action": "actions",
        "reward": "rewards",
        "terminated": "terminations",
        "truncated": "truncations",
    }
    if "success" in arrays:
        labels["success"] = "success"
    fields = _clean({name: (label, arrays.pop(label)) for name, label in labels.items()})
    spec = dataset._eval_env_spec or dataset.env_spec  # what the authors mean to evaluate in, if they say so
    env_id, env_kwargs = recorded_environment(spec)
    return Steps(
        **fields,
        known=np.ones(sum(lengths), dtype=bool),
        episode=np.repeat(np.arange(len(lengths)), lengths),
        action_bounds=(space.low, space.high),
        env_id=env_id,
        env_kwargs=env_kwargs,
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
        found = [key for key in keys if key in arrays]
        if len(found) > 1 and not np.array_equal(arrays[found[0]], arrays[found[1]]):
            raise InputError(f"{found[0]!r} and {found[1]!r} mean the same and differ: keep one of them")
        if found:
            raw[field] = (found[0], arrays.pop(found[0]))
        elif field not in ("truncated", "next_observation"):
            raise _missing(" or ".join(repr(key) for key in keys), present)
    guessed = "truncated" not in raw and "next_observation" not in raw
    fields = _clean(raw)
    terminated, truncated, observation = fields["terminated"], fields["truncated"], fields["observation"]
    ends = terminated | truncated
    ends[-1] = True
    known = np.ones_like(ends)
    if "next_observation" not in fields:
        fields["next_observation"] = np.concatenate([observation[1:], observation[-1:]])
        fields["next_observation"][ends] = observation[ends]  # never the next episode's
        known = ~ends | terminated  # a terminal's next observation is masked, so any will do
    if has_fixed_horizon(terminated, truncated):
        ends = truncated.copy()
        ends[-1] = True
    return Steps(
        **fields,
        known=known,
        episode=_count(ends),
        action_bounds=_unit_bounds(fields),
        note="no 'timeouts', so episodes are taken to end at 'terminals' alone" if guessed else None,
    )


def read_tensordict(data: TensorDictBase) -> Steps:
    """A TensorDict in TED form, ``[n]`` or, with time last, ``[..., T]``."""
    if not data.ndim:
        raise InputError("the batch size is empty; it must be [n] or [B, T]")
    raw = {}
    for field, key in _TED_KEYS.items():
        with _readable(f"{key!r} "):
            value = data.get(key, None)
        if value is None and field not in ("truncated", "done", "episode"):
            raise _missing(repr(key), sorted(map(str, data.keys(True, True))))
        if value is not None:
            if not isinstance(value, torch.Tensor):
                raise InputError(f"{key!r} is a {type(value).__name__}, not a tensor")
            with _readable(f"{key!r} "):
                rows = value.detach().cpu().flatten(0, data.ndim - 1)
                rows = rows.float() if rows.dtype == torch.bfloat16 else rows  # which numpy does not have
                raw[field] = (repr(key), rows.numpy().copy())  # a copy: the source's memory stays its own
    fields = _clean(raw)
    fields["truncated"] = fields["truncated"] | (fields.pop("done", False) & ~fields["terminated"])
    ends = fields["terminated"] | fields["truncated"]
    ends[data.shape[-1] - 1 :: data.shape[-1]] = True
    if "episode" in fields:
        episode = fields.pop("episode")
        ends[:-1] |= episode[1:] != episode[:-1]
    return Steps(**fields, known=np.ones_like(ends), episode=_count(ends), action_bounds=_unit_bounds(fields))


def _minari_episodes(dataset: Any, with_success: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every episode's number and its arrays by Minari's names, checked for their lengths."""
    names = ("rewards", "observations", "actions", "terminations", "truncations")
    infos = ("success",) if with_success else ()
    if dataset.storage.FORMAT == "hdf5" and _is_plain(dataset.observation_space):
        path = dataset.storage.data_path / "main_data.hdf5"
        episodes = _hdf5_episodes(path, dataset.total_episodes, names, infos)
    else:
        episodes = ((data.id, _arrays_of(data, names, infos)) for data in dataset.iterate_episodes())
    has_success = None
    for number, episode in episodes:
        steps = len(episode["rewards"])
        if not steps and not any(len(episode[name]) for name in names[2:]):
            continue
        episode["observations"] = flatten_observation(episode["observations"])
        for name in names[1:]:
            expected = steps + 1 if name == "observations" else steps
            if len(episode[name]) != expected:
                raise InputError(
                    f"episode {number} has {steps} rewards and {len(episode[name])} {name}, not {expected}"
                )
        if has_success is None:
            has_success = "success" in episode
        success = episode.pop("success", None)
        if has_success:
            # Minari's collector begins with the success at the reset; sets made from buffers may not.
            if success is None or len(success) not in (steps, steps + 1):
                found = "no" if success is None else len(success)
                raise InputError(f"episode {number} has {steps} rewards and {found} infos['success']")
            episode["success"] = success[-steps:]
        yield number, episode


def _arrays_of(data: Any, names: Iterable[str], infos: Iterable[str]) -> dict[str, Any]:
    """The arrays of an episode that Minari has read, infos where there are any."""
    found = data.infos or {}
    return {name: getattr(data, name) for name in names} | {name: found[name] for name in infos if name in found}


def _is_plain(space: Any) -> bool:
    """Whether Minari stores a space as it is: vectors and dictionaries of them, no images, texts or tuples."""
    if isinstance(getattr(space, "spaces", None), Mapping):
        return all(map(_is_plain, space.spaces.values()))
    return space.shape is not None and len(space.shape) == 1


def _hdf5_episodes(
    path: Path, count: int, names: Iterable[str], infos: Iterable[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Minari's HDF5 episodes by h5py's low level, several times as fast as Minari's reader (which decodes infos).

    Infos come where there are any.
    """
    h5py = _require("h5py")

    def read(group: Any, name: bytes) -> Any:
        item = h5py.h5o.open(group, name)
        if isinstance(item, h5py.h5g.GroupID):
            return {key.decode(): read(item, key) for key in item}
        array = np.empty(item.shape, item.dtype)
        item.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
        return array

    with h5py.File(path, "r") as file:
        # By default HDF5 keeps tens of kB of metadata for each episode, in all more than many a data set's size.
        config = file.id.get_mdc_config()
        config.set_initial_size, config.initial_size, config.min_size, config.max_size = True, *3 * (2**20,)
        file.id.set_mdc_config(config)
        for number in range(count):
            group = h5py.h5g.open(file.id, b"episode_%d" % number)
            episode = {name: read(group, name.encode()) for name in names}
            present = h5py.h5g.open(group, b"infos") if infos and b"infos" in group else ()
            yield number, episode | {name: read(present, name.encode()) for name in infos if name.encode() in present}


def _stack(episodes: Iterator[tuple[int, dict[str, Any]]], rows: int) -> tuple[dict[str, np.ndarray], list[int]]:
    """All episodes in arrays of float32 (rewards: float64), allocated once if ``rows`` is right, and their lengths."""
    arrays: dict[str, np.ndarray] = {}
    lengths: list[int] = []
    start = 0
    for number, episode in episodes:
        stop = start + len(episode["rewards"])
        observations = episode.pop("observations")
        episode |= {"observations": observations[:-1], "observations (as next)": observations[1:]}
        for name, values in episode.items():
            part = np.asarray(values)
            (_check_continuous if name == "actions" else _check_numbers)(name, part)
            if name not in arrays:
                arrays[name] = np.empty((rows, *part.shape[1:]), np.float64 if name == "rewards" else np.float32)
            array = arrays[name]
            if part.shape[1:] != array.shape[1:]:  # numpy would repeat a row of length one
                raise ValueError(f"episode {number} has {name} of shape {part.shape}, others {array.shape[1:]} a row")
            if stop > len(array):
                array.resize((max(stop, len(array) * 3 // 2), *array.shape[1:]), refcheck=False)
            array[start:stop] = part
        lengths.append(stop - start)
        start = stop
    for array in arrays.values():
        array.resize((start, *array.shape[1:]), refcheck=False)
    return arrays, lengths


def _load_npz(path: Path, wanted: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    with np.load(path, allow_pickle=False) as file:  # a pickle could run code
        present = list(file.files)
        twice = [key for key in wanted if present.count(key) > 1]
        if twice:
            raise InputError(f"it holds {twice[0]!r} {present.count(twice[0])} times: keep one of them")
        return {key: np.asarray(file[key]) for key in wanted if key in present}, present


def _load_hdf5(path: Path, wanted: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    h5py = _require("h5py")
    with h5py.File(path, "r") as file:
        present = [key if isinstance(file.get(key), h5py.Dataset) else f"{key}/" for key in file]
        return {key: np.asarray(file[key][()]) for key in wanted if key in present}, present


def _clean(raw: dict[str, tuple[str, np.ndarray]]) -> dict[str, Any]:
    """Checks ``field -> (its name in the source, array)`` and casts to the types of :class:`Steps`.

    Empties ``raw``, so that a large set is not in memory twice.
    """
    labels = {field: label for field, (label, _) in raw.items()}
    for label, array in raw.values():
        if not array.ndim:
            raise InputError(f"{label}: a single value of type {array.dtype}, expected an array with a row a step")
    lengths = {label: len(array) for label, array in raw.values()}
    if len(set(lengths.values())) > 1:
        raise InputError("arrays of different lengths: " + ", ".join(f"{key} {n}" for key, n in lengths.items()))
    if not all(lengths.values()):
        raise InputError("the data set holds no step")
    fields = {field: _CASTS[field](*raw.pop(field)) for field in labels}
    width, next_width = (fields.get(key, fields["observation"]).shape[1] for key in ("observation", "next_observation"))
    if width != next_width:
        raise InputError(f"{labels['observation']}: {width} dimensions, {labels['next_observation']}: {next_width}")
    for field in ("observation", "action"):
        if not fields[field].any():
            raise InputError(
                f"{labels[field]}: all {len(fields[field])} rows are exactly zero. TorchRL's MinariExperienceReplay "
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
    _check_continuous(label, array)
    return _vectors(label, array)


def _scalars(label: str, array: np.ndarray) -> np.ndarray:
    _check_scalars(label, array)
    return array.reshape(-1).astype(np.float64, copy=False)


def _flags(label: str, array: np.ndarray) -> np.ndarray:
    _check_scalars(label, array)
    values = array.reshape(-1)
    strange = (values != 0) & (values != 1)
    if strange.any():
        raise InputError(f"{label}: {strange.sum()} values are neither 0 nor 1, the first in row {strange.argmax()}")
    return values.astype(bool)


def _labels(label: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "iub":
        return _scalars(label, array)
    _check_column(label, array)
    return array.reshape(-1)  # as they are: floats would merge large ids


def _check_scalars(label: str, array: np.ndarray) -> None:
    _check_column(label, array)
    _check_finite(label, array)


def _check_column(label: str, array: np.ndarray) -> None:
    if array.shape not in ((len(array),), (len(array), 1)):
        raise InputError(f"{label}: shape {array.shape}, expected [n] or [n, 1]")


def _check_numbers(label: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "fiub":
        raise InputError(f"{label}: type {array.dtype}, expected numbers")


def _check_continuous(label: str, array: np.ndarray) -> None:
    if array.dtype.kind in "iub":
        raise InputError(f"{label}: type {array.dtype}; SPAR needs continuous actions, as floats")
    _check_numbers(label, array)


def _check_finite(label: str, array: np.ndarray) -> None:
    _check_numbers(label, array)
    if float(array.min()) >= -LARGEST and float(array.max()) <= LARGEST:
        return  # NaN passes through both: the rest only finds where it is
    bad = ~(np.abs(array.astype(np.float64, copy=False)) <= LARGEST)
    row = np.argwhere(bad)[0, 0]
    raise InputError(f"{label}: {bad.sum()} values are NaN or infinite or beyond +-{LARGEST:g}, the first in row {row}")


_CASTS: dict[str, Callable[[str, np.ndarray], np.ndarray]] = {
    "observation": _vectors,
    "next_observation": _vectors,
    "action": _actions,
    "reward": _scalars,
    "terminated": _flags,
    "truncated": _flags,
    "done": _flags,
    "success": _flags,
    "episode": _labels,
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
def _readable(what: str = "") -> Iterator[None]:
    """Whatever a library raises on a damaged source becomes one :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as err:
        reason = f"{type(err).__name__}: {first_line(err)}"
        raise InputError(f"{what}cannot be read, it may be damaged ({reason})") from err


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
