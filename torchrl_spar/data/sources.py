"""What readers share: missing packages, damaged files and missing arrays as one-line errors."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchrl_spar.errors import InputError, first_line


def missing_array(key: str, present: list[str]) -> InputError:
    more = f", ... ({len(present)} in all)" if len(present) > 12 else ""
    return InputError(f"no array {key}; there are: {', '.join(present[:12]) or 'none'}{more}")


def require(module: str, extra: str = "recipes") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"reading it needs {module}: pip install 'torchrl-spar[{extra}]'") from None


@contextmanager
def readable(what: str = "") -> Iterator[None]:
    """Whatever a library raises on a damaged source becomes one :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as err:
        reason = f"{type(err).__name__}: {first_line(err)}"
        raise InputError(f"{what}cannot be read ({reason})") from err


@contextmanager
def environment_variable(variable: str, value: str) -> Iterator[None]:
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
