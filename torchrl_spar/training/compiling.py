"""torch.compile with one clear error where it cannot work."""

from __future__ import annotations

from functools import cache

import torch

from torchrl_spar.errors import InputError, first_line


@cache
def check_compiler(device: torch.device) -> None:
    """Compiles a trifle (some seconds, once a process), so that what is missing is known before any work is done.

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
