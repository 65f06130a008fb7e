"""Checked data sets as memory maps on disk, so that the next start need not read its source again.

``<cache>/<source and options>/<version of the source>/`` holds a TensorDict's own memory maps and a record of every
file's size and checksum. An entry appears by one rename and never changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

# Part of every key: raise it whenever what load_offline_dataset makes of a source changes.
FORMAT = 5
_RECORD = "record.json"
_BLOCK = 2**20

Content = tuple[TensorDict, dict[str, Any]]


def load_cached(source: Path, options: Any, cache: Path, build: Callable[[], Content]) -> Content:
    """What ``build()`` returns, from the cache if the source is as it was when it was written there.

    A cache that is damaged or cannot be written costs a warning and the time of ``build()``, nothing else. Processes
    may load the same source at once.

    Args:
        source: the file, or the directory with all its files, that ``build`` reads. It is as it was if its resolved
            path and all files' sizes and times (modification and inode change, in ns) are.
        options: whatever else decides the content, as JSON.
        cache: directory, made when it is missing. It is trusted: it must not be another user's.
        build: makes the content, a TensorDict of CPU tensors (at most nested) and facts that JSON can hold.

    Returns:
        The content. From the cache its tensors map the files copy-on-write: what is written to them never gets there.
    """
    try:
        version = _version(source)
    except OSError:
        return build()  # which says what is wrong with the source
    entry = cache / _digest([FORMAT, str(source.resolve()), options]) / _digest(version)
    try:
        return _read(entry)
    except (FileNotFoundError, NotADirectoryError):
        damaged = entry.exists()
        if damaged:
            _warn(f"{entry}: the cached data is damaged (files are missing), so the source is read again")
    except Exception as err:  # whatever a library makes of garbage
        damaged = True
        _warn(f"{entry}: the cached data is damaged ({err!r}), so the source is read again")
    content = build()
    try:
        if _version(source) == version:
            _write(entry, content, source, replace=damaged)
    except (OSError, RuntimeError, ImportError) as err:  # RuntimeError: torch's
        _warn(f"{cache}: the data cannot be cached here ({err!r}), so the next start reads the source again")
    return content


def _version(source: Path) -> list[list[Any]]:
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    stats = [(str(path.relative_to(source)), path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats]


def _read(entry: Path) -> Content:
    envelope = json.loads((entry / _RECORD).read_bytes())
    record = envelope["record"]
    if envelope["crc32"] != _crc32_of_json(record):
        raise ValueError(f"the checksum of {_RECORD} is wrong")
    for name, expected in record["files"].items():
        if _size_and_crc32(entry / name) != expected:
            raise ValueError(f"size or checksum of {name} is wrong")
    maps = TensorDict.load_memmap(entry / "data", allow_pickle=False)
    # tensordict's own maps write to the file; private maps cannot harm the cache and sample as fast as memory.
    return maps.apply(_map_privately), record["facts"]


def _map_privately(tensor: Any) -> torch.Tensor:
    flat = torch.from_file(str(tensor.filename), shared=False, size=tensor.numel(), dtype=tensor.dtype)
    return flat.view(tensor.shape)


def _write(entry: Path, content: Content, source: Path, replace: bool) -> None:
    import fcntl  # POSIX alone; elsewhere nothing is cached

    home = entry.parent
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees a killed process's lock
        except BlockingIOError:
            return  # another process is writing this very source
        if entry.exists() and not replace:
            return  # another process was faster
        for old in home.iterdir():  # other versions of the source, and what killed processes left
            if old.name != "lock":
                shutil.rmtree(old, ignore_errors=True)
        partial = home / "partial"
        try:
            _write_files(partial, content, source)
            os.replace(partial, entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write_files(directory: Path, content: Content, source: Path) -> None:
    data, facts = content
    maps = data.memmap_like(directory / "data")  # names, metadata and empty files
    for key, tensor in data.items(True, True):
        with open(maps.get(key).filename, "r+b") as file:
            # Not through the map: there a full disk kills the process, and its pages count as the process's memory.
            file.write(tensor.contiguous().numpy())
    files = [path for path in (directory / "data").rglob("*") if path.is_file()]
    record = {
        "source": str(source.resolve()),
        "facts": facts,
        "files": {str(path.relative_to(directory)): _size_and_crc32(path) for path in files},
    }
    (directory / _RECORD).write_text(json.dumps({"crc32": _crc32_of_json(record), "record": record}, indent=1))


def _size_and_crc32(path: Path) -> list[int]:
    size = crc = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _crc32_of_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
