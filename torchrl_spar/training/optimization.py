"""Adam and steps of gradient descent as every phase uses them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_spar.training.compiling import compiled

Term = Callable[[TensorDictBase], tuple[Tensor, dict[str, Tensor]]]


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


def cosine(step: int, steps: int) -> float:
    """The share of the initial learning rate that is left after `step` of `steps` steps."""
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))


def descent(
    terms: Mapping[str, Term], *optimizers: torch.optim.Optimizer, compile: bool = False
) -> Callable[[TensorDictBase], dict[str, Tensor]]:
    """A gradient step on the sum of the terms for the optimisers' parameters; returns the losses and metadata."""
    keep_scratch_memory()
    params = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]

    def gradients(batch: TensorDictBase) -> tuple[tuple[Tensor | None, ...], dict[str, Tensor]]:
        values: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for name, term in terms.items():
            value, metadata = term(batch)
            values.append(value.sum() if value.ndim else value)  # of several seeds, each with its own parameters
            metrics |= {name: value.detach(), **metadata}
        metrics.pop("td_error", None)  # one value a row, not a metric
        return torch.autograd.grad(values, params, allow_unused=True), metrics

    # Not the optimisers: they are one fused call each, and what Dynamo adds to that is slower.
    run = compiled(gradients) if compile else gradients

    def step(batch: TensorDictBase) -> dict[str, Tensor]:
        for param in params:
            param.grad = None  # before, so that its memory is used again
        grads, metrics = run(batch)
        for param, grad in zip(params, grads):
            # Fused Adam reads the gradient in the parameter's memory order, whatever its own is.
            if grad is not None and grad.stride() != param.stride():
                grad = torch.empty_like(param).copy_(grad)
            param.grad = grad
        for optimizer in optimizers:
            optimizer.step()
        return metrics

    return step


def keep_scratch_memory() -> None:
    """Makes glibc keep the memory that a step frees, instead of mapping it anew in the next one.

    Its allocator returns free memory to the system above twice the largest block that it has mapped and freed.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # freed at once
