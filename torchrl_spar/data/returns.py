"""Returns-to-go of a data set, and where its episodes end."""

from __future__ import annotations

import math

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.objectives.value.functional import reward2go


def returns_to_go(
    data: TensorDictBase,
    gamma: float,
    *,
    reward_key: NestedKey = "reward",
    done_key: NestedKey = "done",
    terminated_key: NestedKey = "terminated",
) -> Tensor:
    """Discounted return from each row to the end of its episode, ``[N, 1]``.

    An episode that was cut off rather than terminated goes on with the mean return-to-go of the
    rows that lie at least three horizons, ``3 / (1 - gamma)`` steps, before such a cut (of
    all rows where there are none).

    Args:
        data: ``[N]`` rows in TED form, episodes in order.
        gamma: discount.
        reward_key: the reward's key under ``"next"``.
        done_key: likewise.
        terminated_key: likewise.

    Returns:
        Returns in the rewards' units.

    Source: ours.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> ended = torch.tensor([[False], [True]])
        >>> data = TensorDict({"next": {"reward": torch.ones(2, 1), "done": ended, "terminated": ended}}, [2])
        >>> returns_to_go(data, 0.5)
        tensor([[1.5000],
                [1.0000]])
    """
    reward, terminated = data["next"][reward_key], data["next"][terminated_key]
    end = episode_ends(data, done_key=done_key)
    cut = end & ~terminated
    returns = reward2go(reward, end, gamma)
    if not cut.any():
        return returns
    left = reward2go(torch.ones_like(reward), end, 1.0)
    before_cut = reward2go(cut.to(reward), end, 1.0) > 0
    settled = before_cut & (left > (3 / (1 - gamma) if gamma < 1 else math.inf))
    beyond = returns[settled].mean() if settled.any() else returns.mean()
    return reward2go(reward + gamma * beyond * cut, end, gamma)


def episode_ends(data: TensorDictBase, *, done_key: NestedKey = "done") -> Tensor:
    """Whether a row is the last of its episode, ``[N, 1]``, for TED rows ``[N]`` in order.

    Source: ours.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([[True], [False], [False]])
        >>> episode_ends(TensorDict({"next": {"done": done}, "episode": torch.tensor([0, 1, 2])}, [3])).flatten()
        tensor([True, True, True])
    """
    end = data["next"][done_key].clone()
    if "episode" in data.keys():
        end[:-1] |= (data["episode"][1:] != data["episode"][:-1]).view(-1, 1)
    end[-1] = True
    return end
