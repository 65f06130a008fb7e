"""Paths as users type them."""

from __future__ import annotations

import os
from pathlib import Path

from torchrl_spar.errors import InputError


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path with ``~`` expanded.

    Raises:
        InputError: if nobody knows the home directory, as in a container whose user has none.

    Examples:
        >>> user_path("data.npz")
        PosixPath('data.npz')
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: there is no such home directory here; give the whole path") from None
