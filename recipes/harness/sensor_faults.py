"""How often a guard acts where sensors are wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Of each fault, over all sensors; and of a call, for a detector's distances to many Gaussians take memory.
ROWS, ROWS_PER_CALL = 50_000, 1_000
LEAST_ROWS = 100  # of a sensor


@torch.no_grad()
def shares_of_faults(
    detector: Callable[[Tensor], Tensor], observation: Tensor, std: Tensor, seed: int = 0
) -> dict[str, float]:
    """By fault, the share of observations that the detector finds unlike the data, in the mean over the sensors.

    Args:
        detector: observations to bool ``[N]``.
        observation: of the data, ``[N, observation_dim]``.
        std: of each of its components, ``[observation_dim]``.
        seed: of the rows, the moments at which sensors got stuck, and the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    size = observation.shape[1]
    count = max(LEAST_ROWS, ROWS // size)
    seen = observation[torch.randperm(len(observation), generator=generator)[:count]]
    other = seen[torch.randperm(len(seen), generator=generator)]
    noise = std * torch.randn(seen.shape, generator=generator).to(std)

    def share(rows: Tensor) -> float:
        return torch.cat([detector(part) for part in rows.split(ROWS_PER_CALL)]).double().mean().item()

    def of_each(change: Callable[[Tensor, int], object]) -> float:
        wrong = seen.repeat(size, 1, 1)
        for sensor, rows in enumerate(wrong):
            change(rows, sensor)
        return share(wrong.flatten(0, 1))

    def offset(by: float) -> float:
        return of_each(lambda rows, i: rows[:, i].add_(by * std[i]))

    def swap(rows: Tensor, i: int) -> None:
        pair = [i, (i + 1) % size]
        rows[:, pair] = rows[:, pair[::-1]]

    return {
        "one off by 3 std": offset(3),
        "one off by 5 std": offset(5),
        **({"one swapped with the next": of_each(swap)} if size > 1 else {}),
        "one stuck": of_each(lambda rows, i: rows[:, i].copy_(other[:, i])),  # in the mean over when
        "noise of 1 std on all": share(seen + noise),
    }
