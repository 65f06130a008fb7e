"""Errors for bad input and for a failed training."""

from __future__ import annotations

from typing import Any


class InputError(ValueError):
    """Bad input: data, option, file or key. The message names the culprit and what to do.

    Recipes print it as one line and exit; everything else that is raised is a bug and
    keeps its traceback.

    Source: ours.

    Examples:
        >>> from torchrl_spar import InputError
        >>> raise InputError("data.npz: no array 'actions'")
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: data.npz: no array 'actions'
    """


class NonFiniteError(InputError):
    """A loss or a parameter has become NaN or infinite: the data or a learning rate is to blame.

    Source: ours.

    Examples:
        >>> from torchrl_spar import NonFiniteError
        >>> raise NonFiniteError("step 300: NaN or infinity in loss_qvalue")
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.NonFiniteError: step 300: NaN or infinity in loss_qvalue
    """


def first_line(err: BaseException) -> str:
    """The first line of an error's text, for a message of one line.

    Examples:
        >>> first_line(KeyError("a")), first_line(EOFError())
        ("'a'", 'EOFError')
    """
    return next(iter(str(err).splitlines()), type(err).__name__)


def check_options(*checks: tuple[bool, str, Any, str]) -> None:
    """Raises an :class:`InputError` for the first of (whether it is valid, name, value, what it must be) that is not.

    Examples:
        >>> check_options((False, "kappa", -1, "at least 0"))
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: kappa=-1: must be at least 0
    """
    for valid, name, value, expected in checks:
        if not valid:
            raise InputError(f"{name}={value!r}: must be {expected}")
