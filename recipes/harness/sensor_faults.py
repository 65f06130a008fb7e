"""How often a guard acts where sensors are wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 10_000  # at most


@torch.no_grad()
def shares_of_faults(
    detector: Callable[[Tensor], Tensor], observation: Tensor, std: Tensor, seed: int = 0
) -> dict[str, float]:
    """By fault, the share of observations that the detector finds unlike the data, in the mean over the sensors.

    Args:
        detector: observations to bool ``[N]``.
        observation: of the data, ``[N, observation_dim]``.
        std: of each of its components, ``[observation_dim]``.
        seed: of the rows, the values of stuck sensors and the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    observation = observation[torch.randperm(len(observation), generator=generator)[:ROWS]]
    size = observation.shape[1]
    stuck = observation[torch.randint(len(observation), (size,), generator=generator)].diagonal()
    noise = torch.randn(observation.shape, generator=generator).to(std)

    def share(change: Callable[[Tensor, int], object]) -> float:
        found = []
        for sensor in range(size):
            wrong = observation.clone()
            change(wrong, sensor)
            found.append(detector(wrong).double().mean())
        return torch.stack(found).mean().item()

    def offset(by: float) -> Callable[[Tensor, int], object]:
        return lambda rows, i: rows[:, i].add_(by * std[i])

    def swap(rows: Tensor, i: int) -> None:
        pair = [i, (i + 1) % size]
        rows[:, pair] = rows[:, pair[::-1]]

    return {
        "one off by 3 std": share(offset(3)),
        "one off by 5 std": share(offset(5)),
        "one swapped with the next": share(swap),
        "one stuck": share(lambda rows, i: rows[:, i].fill_(stuck[i])),
        "noise of 1 std on all": detector(observation + noise * std).double().mean().item(),
    }
