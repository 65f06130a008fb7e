"""The matrix products of a computation: their FLOPs, and how fast this machine does them alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Layout = tuple[torch.Size, tuple[int, ...]]  # shape and strides of one operand
PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.bmm.default: 0, torch.ops.aten.addmm.default: 1}


class MatmulTrace(TorchDispatchMode):
    """Counts the matrix products that run inside it by the layouts of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[Layout, Layout]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = PRODUCTS.get(func)
        if first is not None:
            left, right = ((operand.shape, operand.stride()) for operand in args[first : first + 2])
            self.products[left, right] += 1
        return func(*args, **(kwargs or {}))

    def flops(self) -> int:
        """Two for each multiply and add."""
        return sum(2 * left[0].numel() * right[0][-1] * count for (left, right), count in self.products.items())

    def replay(self, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
        """All products again, one after the other, on operands of the same layouts and with nothing in between."""
        plan = []
        for operands, count in self.products.items():
            left, right = (
                torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_() for shape, stride in operands
            )
            plan.append((left, right, count))

        def run() -> None:
            for left, right, count in plan:
                for _ in range(count):
                    torch.matmul(left, right)

        return run
