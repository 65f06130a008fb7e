"""Readers of Minari sets and of files with D4RL's arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_spar.data.arrange import arrange
from torchrl_spar.data.environment import recorded_environment
from torchrl_spar.data.observations import flatten_observation
from torchrl_spar.data.sources import environment_variable, missing_array, readable, require
from torchrl_spar.data.steps import Steps, check_continuous, check_numbers, clean, columns_in_need, unit_bounds
from torchrl_spar.errors import InputError
from torchrl_spar.paths import user_path

# Each field's names in a file, D4RL's first.
_FILE_KEYS = {
    "observation": ("observations",),
    "action": ("actions",),
    "reward": ("rewards",),
    "terminated": ("terminals", "terminations"),
    "truncated": ("timeouts", "truncations"),
    "next_observation": ("next_observations",),
}
_OPTIONAL = ("truncated", "next_observation")
# Names that may mean something else: they count where there is one for each row.
_ID_KEYS = {
    "episode": ("episode", "episode_id", "episode_ids", "episode_index", "traj_id", "traj_ids"),
    "step": ("step", "step_count", "timestep", "timesteps"),
}

# Gymnasium's wrappers whose running statistics change what is seen or earned.
_WITH_STATISTICS = ("NormalizeObservation", "NormalizeReward")


def find_minari(dataset_id: str, root: str | os.PathLike[str] | None) -> Path:
    """The directory of a Minari data set, downloaded if it is not there."""
    minari = require("minari")
    base = user_path(root or os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets")
    if not (base / dataset_id / "data").exists():
        with environment_variable("MINARI_DATASETS_PATH", str(base)):  # the only way to tell Minari where
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
                "it holds no data/metadata.json, which Minari has written since 0.5. Download the data set again with "
                "today's Minari; one from before can be read with 'minari<0.5', and its arrays given as a .npz file"
            )
        if (directory / "meta" / "info.json").is_file():
            raise InputError("the directory is a LeRobot set: give it as lerobot:<path>")
        raise InputError("the directory is no Minari data set: it holds no data/metadata.json")
    minari = require("minari")
    with readable():
        dataset = minari.MinariDataset(directory / "data")
    space = dataset.action_space
    if not hasattr(space, "low") or space.dtype.kind != "f":
        raise InputError(f"the action space is {space}; SPAR needs continuous actions")
    with readable(), np.errstate(over="ignore"):  # what overflows float32 is reported as infinity
        for dtype in (np.float32, np.float64):  # the second where the first is too coarse for a column
            arrays, lengths, is_fine = _stack(_minari_episodes(dataset, with_success), dataset.total_steps, dtype)
            if is_fine:
                break
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
    fields = clean({name: (label, arrays.pop(label)) for name, label in labels.items()})
    spec = dataset._eval_env_spec or dataset.env_spec  # what the authors mean to evaluate in, if they say so
    env_id, env_kwargs = recorded_environment(spec)
    return Steps(
        **fields,
        known=np.ones(sum(lengths), dtype=bool),
        episode=np.repeat(np.arange(len(lengths)), lengths),
        action_bounds=(space.low, space.high),
        env_id=env_id,
        env_kwargs=env_kwargs,
        notes=_of_wrappers(env_kwargs),
    )


def _of_wrappers(env_kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Tells of wrappers with statistics of their own, which the set does not hold."""
    names = [wrapper["name"] for wrapper in env_kwargs.get("additional_wrappers", ())]
    return tuple(
        f"its environment has the wrapper {name}, whose running statistics are not in the set: evaluated there, they "
        "start anew, so scores tell little; record the set without it"
        for name in names
        if name in _WITH_STATISTICS
    )


def read_file(path: Path) -> Steps:
    """A ``.hdf5``, ``.h5`` or ``.npz`` file with D4RL's arrays."""
    if not path.is_file():
        raise InputError("no such file")
    load = _load_npz if path.suffix.lower() == ".npz" else _load_hdf5
    with readable():
        arrays, present = load(path, [key for keys in (_FILE_KEYS | _ID_KEYS).values() for key in keys])
    raw = {}
    for field, keys in _FILE_KEYS.items():
        found = [key for key in keys if key in arrays]
        if len(found) > 1 and not np.array_equal(arrays[found[0]], arrays[found[1]]):
            raise InputError(f"{found[0]!r} and {found[1]!r} mean the same and differ: keep one of them")
        if found:
            raw[field] = (found[0], arrays.pop(found[0]))
        elif field not in _OPTIONAL:
            raise missing_array(" or ".join(repr(key) for key in keys), present)
    rows = raw["action"][1].shape[:1]
    for field, keys in _ID_KEYS.items():
        for key in keys:
            if key in arrays and field not in raw and arrays[key].shape in (rows, (*rows, 1)):
                raw[field] = (key, arrays.pop(key))
    guessed = not {"truncated", "next_observation", "episode"} & set(raw)
    fields = arrange(clean(raw))
    if guessed:
        fields["notes"] = ("no 'timeouts', so episodes are taken to end at 'terminals' alone", *fields["notes"])
    return Steps(**fields, action_bounds=unit_bounds(fields))


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
        episode["observations"] = flatten_observation(episode["observations"], dtype=None)
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
    """The arrays of an episode that Minari has read, with its infos if there are any."""
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
    h5py = require("h5py")
    kinds: dict[bytes, tuple[Any, np.dtype]] = {}  # translating HDF5's types takes as long as reading short episodes

    def read(group: Any, name: bytes) -> Any:
        item = h5py.h5o.open(group, name)
        if isinstance(item, h5py.h5g.GroupID):
            return {key.decode(): read(item, key) for key in item}
        kind = item.get_type()
        if name not in kinds or kinds[name][0] != kind:
            kinds[name] = kind, item.dtype
        array = np.empty(item.shape, kinds[name][1])
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


def _stack(
    episodes: Iterator[tuple[int, dict[str, Any]]], rows: int, dtype: type[np.floating]
) -> tuple[dict[str, np.ndarray], list[int], bool]:
    """All episodes in arrays (allocated once if ``rows`` is right), their lengths, whether the type was precise enough.

    Observations are of ``dtype``, rewards float64, all else float32.
    """
    types: dict[str, Any] = {"rewards": np.float64, "observations": dtype, "observations (as next)": dtype}
    arrays: dict[str, np.ndarray] = {}
    lengths: list[int] = []
    extremes: list[np.ndarray] = []
    start = 0
    for number, episode in episodes:
        stop = start + len(episode["rewards"])
        observations = episode.pop("observations")
        if not np.can_cast(observations.dtype, dtype) and observations.ndim == 2:
            extremes += [observations.min(axis=0), observations.max(axis=0)]
        episode |= {"observations": observations[:-1], "observations (as next)": observations[1:]}
        for name, values in episode.items():
            part = np.asarray(values)
            (check_continuous if name == "actions" else check_numbers)(name, part)
            if name not in arrays:
                arrays[name] = np.empty((rows, *part.shape[1:]), types.get(name, np.float32))
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
    is_fine = not extremes or not columns_in_need(np.min(extremes, axis=0), np.max(extremes, axis=0)).any()
    return arrays, lengths, is_fine


def _load_npz(path: Path, wanted: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    with np.load(path, allow_pickle=False) as file:  # a pickle could run code
        present = list(file.files)
        twice = [key for key in wanted if present.count(key) > 1]
        if twice:
            raise InputError(f"it holds {twice[0]!r} {present.count(twice[0])} times: keep one of them")
        return {key: np.asarray(file[key]) for key in wanted if key in present}, present


def _load_hdf5(path: Path, wanted: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    h5py = require("h5py")
    with h5py.File(path, "r") as file:
        present = [key if isinstance(file.get(key), h5py.Dataset) else f"{key}/" for key in file]
        return {key: np.asarray(file[key][()]) for key in wanted if key in present}, present
