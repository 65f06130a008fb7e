"""Returns-to-go of a data set, and where its episodes end."""

from __future__ import annotations

import math

import torch
from tensordict import NestedKey, TensorDictBase, is_tensor_collection
from torch import Tensor

from torchrl_spar.data.order import find_links, is_cut
from torchrl_spar.data.rows import under_next
from torchrl_spar.errors import InputError, check_bool, check_present


class OrderError(InputError):
    """Returns need rows in order of time, and these are not."""


def returns_to_go(
    data: TensorDictBase,
    gamma: float,
    *,
    reward_key: NestedKey = "reward",
    done_key: NestedKey = "done",
    terminated_key: NestedKey = "terminated",
    observation_key: NestedKey = "observation",
) -> Tensor:
    """Discounted return from each row to the end of its episode, ``[N, 1]``.

    What follows a cut (an end that is no termination) is not in the data. It counts as the mean return-to-go of the
    rows at least three horizons, ``3 / (1 - gamma)`` steps, before a cut; without such rows, as the mean of all rows,
    which includes what follows their own cuts unless ``gamma`` is 1.

    Args:
        data: ``[N]`` rows in TED form, episodes in order; they end where :func:`episode_ends` says.
        gamma: discount, 0 to 1.
        reward_key: the reward's key under ``"next"``.
        done_key: likewise.
        terminated_key: likewise.
        observation_key: the observation's, at the root and under ``"next"``; not needed.

    Returns:
        Returns in the rewards' units and type, summed in float64.

    Raises:
        InputError: if ``gamma`` is not within 0 to 1, or the rows are out of order or of several steps
            (``"steps_to_next_obs"``).

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
    if not is_tensor_collection(data):
        raise InputError(f"data: a {type(data).__name__}; give rows as a TensorDict, of a replay buffer by buffer[:]")
    if not 0 <= gamma <= 1:
        raise InputError(f"gamma={gamma}: must be between 0 and 1")
    if "steps_to_next_obs" in data.keys():
        raise InputError(
            "the data's rewards are sums of several steps ('steps_to_next_obs'): give the data of single steps, or "
            "their returns (returns_to_go) as 'return_to_go'"
        )
    check_present(data, [under_next(key) for key in (reward_key, done_key, terminated_key)])
    end = episode_ends(data, done_key=done_key, observation_key=observation_key).reshape(-1)
    reward, terminated = data["next"][reward_key], check_bool(data["next"][terminated_key], terminated_key)
    if not reward.numel() == terminated.numel() == len(end) == len(data):
        shapes = f"{tuple(reward.shape)} and {tuple(terminated.shape)}"
        raise InputError(f"{reward_key!r} and {terminated_key!r} have shapes {shapes}; both must be [{len(data)}, 1]")
    terminated = terminated.reshape(-1)
    returns = discounted_sums(reward.reshape(-1).double(), gamma * (~end).double())
    cut = end & ~terminated
    if cut.any():
        row = torch.arange(len(returns), device=returns.device)
        ends = end.nonzero().squeeze(-1)
        last = ends[torch.searchsorted(ends, row)]
        left = last - row + 1
        before_cut = cut[last]
        settled = before_cut & (left > (3 / (1 - gamma) if gamma < 1 else math.inf))
        share = before_cut * torch.pow(torch.tensor(gamma, dtype=torch.float64), left.cpu()).to(returns)
        lasting = 1 - share.mean() if gamma < 1 else 1.0
        beyond = returns[settled].mean() if settled.any() else returns.mean() / lasting
        returns += share * beyond
    return returns.to(reward.dtype).view_as(reward)


def episode_ends(
    data: TensorDictBase, *, done_key: NestedKey = "done", observation_key: NestedKey = "observation"
) -> Tensor:
    """Whether a row is the last of its episode, ``[N, 1]``, for TED rows ``[N]`` in order.

    It is where it is done, where ``"episode"`` changes, and where its next observation is not the following row's
    observation (unless that holds for nearly all rows, whose next observations then say nothing of order).

    Args:
        data: the rows.
        done_key: under ``"next"``.
        observation_key: at the root and under ``"next"``; where it is missing, the flags alone decide.

    Raises:
        InputError: if the next observations are those of other rows, so that the rows are shuffled or interleaved, or
            of another shape; if there is no ``done`` of type bool, or the rows are sequences ``[B, T]``.

    Examples:
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([[True], [False], [False]])
        >>> episode_ends(TensorDict({"next": {"done": done}, "episode": torch.tensor([0, 1, 2])}, [3])).flatten()
        tensor([True, True, True])
    """
    if data.ndim != 1:
        raise InputError(f"episodes are those of rows [N] in order, not of {tuple(data.shape)}")
    check_present(data, [under_next(done_key)])
    done = check_bool(data["next"][done_key], done_key)
    end = done.reshape(-1).clone()
    if "episode" in data.keys():
        episode = data["episode"].reshape(len(end), -1)[:, 0]
        end[:-1] |= episode[1:] != episode[:-1]
    observation, following = data.get(observation_key, None), data["next"].get(observation_key, None)
    if isinstance(observation, Tensor) and isinstance(following, Tensor):
        if observation.shape != following.shape:
            shapes = f"{tuple(observation.shape)} and {tuple(following.shape)}"
            raise InputError(f"{observation_key!r} and the next ones are of different shapes, {shapes}")
        links = find_links(observation, following, end)
        if links.continued.any():
            raise OrderError(
                f"{int(links.continued.sum())} of {len(end)} rows go on in rows elsewhere, so the data is shuffled or "
                "interleaved, and returns of episodes are unknown: load it by load_offline_dataset, which orders it, "
                "with ids of its episodes as 'episode'; or give the returns as 'return_to_go'"
            )
        end |= is_cut(links)
    end[-1:] = True
    return end.view_as(done)


def discounted_sums(values: Tensor, factors: Tensor) -> Tensor:
    """``x_t = values_t + factors_t x_{t+1}``, ``[N]``, in float64: a loop, linear in N.

    Args:
        values: ``[N]``.
        factors: ``[N]``; 0 where a row is the last of its episode.

    Examples:
        >>> discounted_sums(torch.ones(3), torch.tensor([0.5, 0.0, 0.5]))
        tensor([1.5000, 1.0000, 1.0000])
    """
    sums, total = [], 0.0
    for value, factor in zip(reversed(values.tolist()), reversed(factors.tolist())):
        total = value + factor * total
        sums.append(total)
    return torch.tensor(sums[::-1], dtype=values.dtype, device=values.device)
