"""What methods make of the data: a part of it, other rewards, the action that came next."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_spar import InputError, OfflineReplayBuffer

# D4RL's longest episode, to which IQL's rewards are scaled.
EPISODE_STEPS = 1000


def keep_rows(data: OfflineReplayBuffer, rows: TensorDictBase, keep: Tensor, **changes: Any) -> OfflineReplayBuffer:
    """The rows to keep; the statistics of networks stay those of the whole data set."""
    return data.with_rows(rows[keep], source_rows=data.source_rows[keep.to(data.source_rows.device)], **changes)


def keep_best_episodes(data: OfflineReplayBuffer, share: float) -> OfflineReplayBuffer:
    """The rows of the given share of episodes with the highest returns, at least one episode."""
    if not 0 < share <= 1:
        raise InputError(f"method.share={share}: must be above 0, up to 1")
    returns = data.episode_returns
    best = returns.argsort(descending=True, stable=True)[: max(1, int(share * len(returns)))]
    rows = data[:]
    return keep_rows(data, rows, torch.isin(rows["episode"], best.to(rows["episode"].device)))


def return_scale(data: OfflineReplayBuffer) -> float:
    """1000 over the range of the episodes' returns."""
    spread = (data.episode_returns.max() - data.episode_returns.min()).item()
    if spread <= 0:
        raise InputError(f"{data.name}: all episodes have one return; give by_return_range=false under method")
    return EPISODE_STEPS / spread


def transform_rewards(
    data: OfflineReplayBuffer, *, by_return_range: bool = False, scale: float = 1.0, shift: float = 0.0
) -> OfflineReplayBuffer:
    """Rewards ``scale * r + shift``, first multiplied by 1000 over the range of the returns if asked for.

    ``r`` is the source's reward: what `end_at_success` has added is not added twice. The data stays as it is where
    nothing is asked for.

    A reward that every method's paper scales on some tasks only: IQL's advantage weights and CQL's penalty have units.
    """
    if by_return_range:
        scale *= return_scale(data)
    if (scale, shift) == (1.0, 0.0):
        return data
    rows = data[:].clone()
    rows["next", "reward"] = scale * (rows["next", "reward"] - data.reward_shift) + shift
    return data.with_rows(rows, reward_shift=shift)


def add_next_actions(data: OfflineReplayBuffer, *, batch_size: int | None = None) -> OfflineReplayBuffer:
    """With the data's own ``("next", "action")``; a row that was cut off before it is dropped.

    A terminated row keeps its own action there: nothing is bootstrapped from it. `batch_size`: another one than the
    data's.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"method.batch_size={batch_size}: must be at least 1, or null")
    rows = data[:].clone(False)
    action, episode = rows["action"], rows["episode"]
    follows = torch.zeros_like(episode, dtype=torch.bool)
    follows[:-1] = episode[1:] == episode[:-1]
    rows["next"] = rows["next"].clone(False)
    rows["next", "action"] = torch.where(follows.unsqueeze(-1), action.roll(-1, 0), action)
    known = follows | rows["next", "terminated"].squeeze(-1)
    if not known.any():
        raise InputError(f"{data.name}: no step is followed by another in its episode; ReBRAC needs the next action")
    return keep_rows(data, rows, known, batch_size=batch_size or data.batch_size)
