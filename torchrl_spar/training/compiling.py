"""torch.compile, with one clear error where it cannot work."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import TypeVar

import torch
import torch._dynamo

from torchrl_spar.errors import InputError, first_line

R = TypeVar("R")


def compiled(function: Callable[..., R]) -> Callable[..., R]:
    """Compiles a function, with the gradients it takes as part of one program."""
    # Dynamo keeps at most eight programs of one code object, which all closures of a function share, then it is eager.
    own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    program = torch.compile(own)
    # Before torch 2.13, and by default, loss and gradients are separate programs, with autograd in between.
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return program
    traced = torch._dynamo.config.patch(trace_autograd_ops=True)

    def run(*args: object) -> R:
        with traced:
            return program(*args)

    return run


@cache
def check_compiler(device: torch.device) -> None:
    """Compiles a trivial function (some seconds, once a process), so that a missing compiler shows before any work.

    Raises:
        InputError: where ``torch.compile`` does not work: on a CPU it needs a C++ compiler, on a GPU Triton.

    Source: ours.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as err:  # of many types: Dynamo's, the backend's, the compiler's own
        raise InputError(
            f"compile=True: torch.compile does not work here on {device} ({first_line(err)}); "
            "install a C++ compiler, for a GPU Triton too, or leave compile off"
        ) from err
