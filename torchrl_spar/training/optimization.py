"""Adam as every phase uses it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def adam(params: Iterable[Tensor], lr: float, *, capturable: bool = False) -> torch.optim.Adam:
    # Fused: one call for all parameters, on a CPU too. A captured graph reads its learning rate from a tensor.
    params = [param for param in params if param.requires_grad]
    rate = torch.tensor(lr, device=params[0].device) if capturable else lr
    return torch.optim.Adam(params, lr=rate, fused=True, capturable=capturable)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
