"""A small data set of random numbers, for examples and first tries."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from torchrl_spar.data.buffer import OfflineReplayBuffer, load_offline_dataset


def make_toy_data(episodes: int = 8, steps: int = 5, *, batch_size: int = 8) -> OfflineReplayBuffer:
    """Episodes of random states, with actions that can be cloned and rewards of 0, 1, 2, ...

    Args:
        episodes: how many; each ends in a terminal state.
        steps: steps of each.
        batch_size: rows that ``sample()`` returns.

    Returns:
        As of :func:`~torchrl_spar.load_offline_dataset`: ``observation [N, 3]`` from torch's global generator,
        ``action [N, 2]``, the tanh of its first two columns.

    Source: ours.

    Examples:
        >>> from torchrl_spar import make_toy_data
        >>> data = make_toy_data(episodes=2, steps=3, batch_size=4)
        >>> data[:].shape, data.sample().shape, data.episode_returns
        (torch.Size([6]), torch.Size([4]), tensor([3., 3.], dtype=torch.float64))
    """
    states = torch.randn(episodes, steps + 1, 3)
    terminated = torch.zeros(episodes, steps, 1, dtype=torch.bool)
    terminated[:, -1] = True
    reward = torch.arange(float(steps)).expand(episodes, steps).unsqueeze(-1)
    step = {"observation": states[:, 1:], "reward": reward, "terminated": terminated}
    rows = {"observation": states[:, :-1], "action": states[:, :-1, :2].tanh(), "next": step}
    return load_offline_dataset(TensorDict(rows, [episodes, steps]), batch_size=batch_size)
