"""Checks of a running training: finite numbers, values within their bound, a policy that stays with the data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torchrl.data import ReplayBuffer

from torchrl_spar.conventions import check_spar_loss
from torchrl_spar.data.rows import under_next, whole_of
from torchrl_spar.errors import InputError, NonFiniteError, check_present
from torchrl_spar.objective import SPARLoss
from torchrl_spar.training.shift import CoherentShift

# Steps between two checks of the fits and of SPARUpdate. NaN stays, so checking each step would find no more.
CHECK_INTERVAL = 100
# Checks in a row that must fail before a warning: the metrics are those of a single batch.
PATIENCE = 5
# The policy's residual over the data's (rms). Above this, policies were seen to leave the data.
RESIDUAL_RATIO_LIMIT = 0.7
# Metrics of a batch that are checked.
CHECKED = "pred_value", "residual_ratio"
# Updates between two looks at the coherent shift, and the standard deviations above which policies were seen to fall.
SHIFT_INTERVAL, SHIFT_LIMIT = 2_000, 5.0


def check_finite(step: int, losses: Mapping[str, Tensor], parameters: Mapping[str, Sequence[Tensor]]) -> None:
    """Raises where a loss or a parameter is NaN or infinite. Waits for the device once.

    The fits and :class:`~torchrl_spar.SPARUpdate` call it every 100 steps.

    Args:
        step: for the error.
        losses: name -> values of any shape.
        parameters: name of the loss that moves them -> parameters.

    Raises:
        NonFiniteError: which names the step and every loss that is not finite; where all are, the loss whose
            parameters are not.

    Source: ours.

    Examples:
        >>> import torch
        >>> check_finite(100, {"loss_qvalue": torch.tensor(1.0)}, {"loss_qvalue": [torch.ones(2)]})
        >>> check_finite(200, {"loss_qvalue": torch.tensor(float("nan"))}, {})
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.NonFiniteError: step 200: NaN or infinity in loss_qvalue; ...
    """
    # The largest entry, which is NaN where one is.
    sizes = {name: get_total_norm(tensors, float("inf")) for name, tensors in parameters.items()}
    values = [*losses.values(), *sizes.values()]
    finite = torch.stack([value.isfinite().all() for value in values]).tolist()
    if all(finite):
        return
    names = [*losses, *(f"a parameter of {name}" for name in sizes)]
    culprits = [name for name, good in zip(names, finite) if not good]
    # All parameters follow their loss within a step: then they tell nothing.
    culprits = [name for name in culprits if name in losses] or culprits
    raise NonFiniteError(
        f"step {step}: NaN or infinity in {', '.join(culprits)}; lower the learning rate, "
        "or look for outliers in the data"
    )


class HealthCheck:
    """Warns when SPAR's critics diverge or its policy leaves the data, and names the remedy. Call it with the metrics.

    * No policy's value leaves ``[r_min, r_max] / (1 - gamma)`` (with zero in the interval, for what ends). Means of
      the critics (``pred_value``) beyond it, by a tenth of its width, are divergence.
    * ``residual_ratio`` above 0.7 is how policies that left the data were seen to look; some that gained most, on data
      that mixes good and bad behaviour, did, too.
    * ``coherent_shift`` (:class:`~torchrl_spar.training.shift.CoherentShift`) above 5 was seen in policies that fell,
      although each single action was near the data. It is measured every 2,000 steps.

    One batch tells little, so the first two warn when five checks in a row fail; each problem is named once.

    Args:
        losses: the loss, or several members whose mean is deployed. ``gamma`` and ``reward_scale`` are read now: after
            :func:`~torchrl_spar.fit_critics`.
        replay_buffer: the data, whose rewards bound the values.

    Returns:
        Of a call: what it measured itself, ``coherent_shift`` or nothing, to be logged beside the metrics.

    Raises:
        InputError: without a SPARLoss; the data has no rewards.

    Source: ours; the bound is the geometric series.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import HealthCheck, load_offline_dataset, make_spar_loss
        >>> step = {"reward": torch.ones(8, 1), "terminated": torch.zeros(8, 1, dtype=torch.bool)}
        >>> data = TensorDict({"observation": torch.randn(8, 3), "action": torch.full((8, 2), 0.5),
        ...                    "next": {"observation": torch.randn(8, 3), **step}}, [8])
        >>> check = HealthCheck(make_spar_loss(3, Bounded(-1, 1, (2,))), load_offline_dataset(data))
        >>> tuple(round(bound) for bound in check.value_range)
        (0, 100)
        >>> check(100, {"pred_value": torch.tensor(50.0), "residual_ratio": torch.tensor(0.4)})
        {}
    """

    def __init__(self, losses: SPARLoss | Sequence[SPARLoss], replay_buffer: ReplayBuffer) -> None:
        losses = list(losses) if isinstance(losses, Iterable) else [losses]
        if not losses:
            raise InputError("losses: none given; give the loss that is trained, or its members")
        check_spar_loss("losses", *losses)
        loss = losses[0]
        rows, key = whole_of(replay_buffer), under_next(loss.tensor_keys.reward)
        check_present(rows, [key])
        reward = loss.reward_scale * rows[key]
        horizon = 1 / max(1 - float(loss.value_estimator.gamma), torch.finfo(torch.float32).tiny)
        low, high = min(0.0, float(reward.min())) * horizon, max(0.0, float(reward.max())) * horizon
        #: Bounds of a value, in the loss's units.
        self.value_range = low, high
        self._shift = CoherentShift(losses, replay_buffer)
        self._found: dict[str, list[int]] = {}
        self._checked: int | None = None

    def __call__(self, step: int, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Checks ``pred_value`` and ``residual_ratio`` of one batch, where they are given.

        Args:
            step: of the training.
            metrics: scalars, or ``[M]`` of several members.
        """
        low, high = self.value_range
        # A tenth of a unit for data without rewards.
        slack = 0.1 * (high - low) + 0.1
        values, ratios = (
            torch.as_tensor(metrics[name]).reshape(-1).tolist() if name in metrics else [] for name in CHECKED
        )
        if due := self._due("pred_value", [not low - slack <= value <= high + slack for value in values]):
            warnings.warn(
                f"the critics{_of(due, values)} diverge: at step {step} their mean value is {values[due[0]]:.3g}, "
                f"beyond the bound [{low:.3g}, {high:.3g}] of this data's rewards; lower qvalue_lr, or raise kappa "
                "(where values are too low: lower kappa)",
                stacklevel=2,
            )
        if due := self._due("residual_ratio", [ratio > RESIDUAL_RATIO_LIMIT for ratio in ratios]):
            warnings.warn(
                f"the policy{_of(due, ratios)} goes far from its anchor: at step {step} its residual is "
                f"{ratios[due[0]]:.2f} of the data's, where 0.3 to 0.5 is usual, and about 1 where the data mixes good "
                "and bad behaviour; if it is worse than the anchor, raise trust_coeff, or lower lsi_coeff",
                stacklevel=2,
            )
        checked, self._checked = self._checked, step
        # A multiple of the interval lies between this call and the last; the first may be that of a run that resumes.
        is_due = step // SHIFT_INTERVAL > (step - 1 if checked is None else checked) // SHIFT_INTERVAL
        if not is_due or (shift := self._shift()) is None:
            return {}
        if self._due("coherent_shift", [float(shift) > SHIFT_LIMIT], patience=1):
            warnings.warn(
                f"the policy leaves the data's trajectories: at step {step} its actions are shifted in one direction "
                f"by {float(shift):.1f} standard deviations of the data's, where up to 4.7 was seen in good runs; "
                "lower lsi_coeff, or evaluate an earlier checkpoint",
                stacklevel=2,
            )
        return {"coherent_shift": shift}

    def _due(self, name: str, found: list[bool], patience: int = PATIENCE) -> list[int]:
        """Of which members the problem has now been found often enough; each once."""
        counts, due = self._found.setdefault(name, []), []
        counts.extend([0] * (len(found) - len(counts)))
        for i, is_found in enumerate(found):
            if counts[i] < patience:  # not warned of yet
                counts[i] = counts[i] + 1 if is_found else 0
                due += [i] if counts[i] == patience else []
        return due


def _of(due: list[int], values: list[float]) -> str:
    if len(values) == 1:
        return ""
    return f" of member{'s' * (len(due) > 1)} {', '.join(map(str, due))}"
