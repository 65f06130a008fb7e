"""What the rivals' losses compute without tensordicts: values, one-step targets, a Gaussian's log density."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives.common import LossModule


def td_target(loss: LossModule, batch: TensorDictBase, next_value: Tensor, *, scale: Any = 1.0) -> Tensor:
    """``scale * r + gamma (1 - terminated) next_value`` for next values ``[B]``; TorchRL's TD(0)."""
    keys, following = loss.tensor_keys, batch["next"]
    alive = following[keys.terminated].squeeze(-1).logical_not()
    return scale * following[keys.reward].squeeze(-1) + loss.value_estimator.gamma * alive * next_value


def normal_log_prob(noise: Tensor, log_scale: Tensor) -> Tensor:
    """Log density, summed over the last dimension, of what lies `noise` scales from the mean."""
    return (-noise.pow(2) / 2 - log_scale - math.log(2 * math.pi) / 2).sum(-1)


def tanh_log_slope(raw: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Log of the slope of a tanh to the bounds, summed over the last dimension; stable where it is flat."""
    slope = 2 * (math.log(2) - raw - torch.nn.functional.softplus(-2 * raw))
    return (slope + ((high - low) / 2).log()).sum(-1)
