"""Whether a policy leaves the data's trajectories although each of its actions is near the data's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from torchrl_spar.data.returns import OrderError
from torchrl_spar.data.rows import valid_mask, whole_of
from torchrl_spar.mean_actor import policy_of
from torchrl_spar.objective import SPARLoss
from torchrl_spar.training.sampling import ends_of

# Rows in a window; ages that are looked at; windows of an age that tell what is usual, and the most that are kept.
LENGTH, AGES, FEWEST, MOST = 32, 20, 20, 100
# The least standard deviation between windows, in units of the residual scale: less is rounding.
LEAST_STD = 0.1


class CoherentShift:
    """How far the policy moves all actions of a stretch of steps in one direction.

    A residual may lie well within the data's noise in each step. But noise averages out along a trajectory, and a
    shift in one direction does not: policies were seen to fall at the same step of every episode. So the policy's
    residuals are averaged over windows of 32 consecutive rows, and over windows of one age, which begin as many steps
    after the start of their episode. The unit is how much the data's own residuals, averaged likewise, vary from
    window to window: ``max |mean_w mean_t [pi(s) - a_b]| / std_w mean_t [a - a_b]``, over ages and action dimensions.

    Args:
        losses: one, whose :attr:`~torchrl_spar.SPARLoss.actor` is measured, or several members, whose
            :func:`~torchrl_spar.mean_actor` is; with a trained anchor.
        replay_buffer: the data in order. Up to 100 windows of each of the first 20 ages are kept.

    Returns:
        Of a call: the shift, a scalar in standard deviations; None where no age has 20 windows, or the rows are
        sequences or out of order.

    Source: ours.

    Examples:
        >>> from torchrl_spar import make_spar_loss, make_toy_data
        >>> from torchrl_spar.training.shift import CoherentShift
        >>> data = make_toy_data(episodes=20, steps=32)
        >>> loss = make_spar_loss(data)
        >>> bool(CoherentShift(loss, data)() < 0.1)  # a new head hardly moves
        True
    """

    @torch.no_grad()
    def __init__(self, losses: SPARLoss | Sequence[SPARLoss], replay_buffer: ReplayBuffer) -> None:
        self.losses = [losses] if isinstance(losses, SPARLoss) else list(losses)
        loss = self.losses[0]
        self.windows: list[tuple[TensorDictBase, Tensor, Tensor]] = []
        rows, key = whole_of(replay_buffer), loss.tensor_keys.action
        for index in _windows(rows, loss):
            state = rows[index].select(*loss.actor.in_keys)
            anchor = loss.anchor(state.clone(False))[key]
            usual = (rows[key][index] - anchor).mean(1).std(0)
            self.windows.append((state, anchor, usual.maximum(LEAST_STD * loss.residual_scale)))

    @torch.no_grad()
    def __call__(self) -> Tensor | None:
        policy, key = policy_of(self.losses), self.losses[0].tensor_keys.action
        shifts = [
            ((policy(state.clone(False))[key] - anchor).mean((0, 1)).abs() / usual).max()
            for state, anchor, usual in self.windows
        ]
        return torch.stack(shifts).max() if shifts else None


def _windows(rows: TensorDictBase, loss: SPARLoss) -> list[Tensor]:
    """The rows of the windows of each age, ``[W, 32]``, evenly spread over the episodes."""
    if rows.ndim > 1 or valid_mask(rows, loss.mask_keys) is not None:
        return []
    try:
        end = ends_of(loss, rows).flatten()
    except OrderError:
        return []
    after = end.nonzero().flatten() + 1
    begin = torch.cat((after.new_zeros(1), after[:-1]))
    found = []
    for age in range(AGES):
        starts = begin[after - begin >= (age + 1) * LENGTH] + age * LENGTH
        if len(starts) < FEWEST:
            break
        spread = torch.linspace(0, len(starts) - 1, min(len(starts), MOST), device=starts.device).long()
        found.append(starts[spread].unsqueeze(-1) + torch.arange(LENGTH, device=starts.device))
    return found
