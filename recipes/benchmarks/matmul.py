"""The matrix products of a computation: their FLOPs, and how fast this machine does them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Layout = tuple[torch.Size, tuple[int, ...]]  # shape and strides of one operand
# Where the first operand stands among the arguments.
PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.bmm.default: 0, torch.ops.aten.addmm.default: 1}


class MatmulTrace(TorchDispatchMode):
    """Records the matrix products that run inside it, in order, by the layouts of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Layout, Layout]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = PRODUCTS.get(func)
        if first is not None:
            left, right = ((operand.shape, operand.stride()) for operand in args[first : first + 2])
            self.products.append((left, right))
        return func(*args, **(kwargs or {}))

    def flops(self) -> int:
        """Two for each multiply and add."""
        return sum(2 * shape.numel() * right[-1] for (shape, _), (right, _) in self.products)

    def replay(self, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
        """The same products in the same order, with nothing in between; operands of one layout are one tensor."""
        layouts = {layout for product in self.products for layout in product}
        operands = {
            (shape, stride): torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()
            for shape, stride in layouts
        }
        plan = [(operands[left], operands[right]) for left, right in self.products]

        def run() -> None:
            for left, right in plan:
                torch.matmul(left, right)

        return run
