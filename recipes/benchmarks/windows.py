"""Rates of several contenders, measured in windows taken in turn, so that a machine's slow minute slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def measure_rates(
    contenders: Mapping[str, tuple[Callable[[], object], int]],
    *,
    rounds: int,
    window: float,
    device: torch.device,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Units per second of each contender, one value a round.

    Args:
        contenders: a call, and how many units (updates, rows) it does.
        rounds: windows of each.
        window: seconds of a window on ``clock``.
        device: waited for at both ends of a window.
        clock: CPU seconds by default; take ``time.perf_counter`` for a GPU.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for call, _ in contenders.values():  # warm up: compile, capture, fill caches
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, (call, units) in contenders.items():
            _wait(device)
            start, calls = clock(), 0
            while clock() - start < window:
                call()
                calls += 1
            _wait(device)
            rates[name].append(calls * units / (clock() - start))
    return rates


def median_ratio(rates: Mapping[str, list[float]], name: str, reference: str) -> float:
    """Median over the rounds of one rate by another of the same round."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[reference]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
