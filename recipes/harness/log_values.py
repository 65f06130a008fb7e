"""What a log alone says about a policy: its value by Fitted Q Evaluation, and its distance to the data."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_spar import (
    OfflineReplayBuffer,
    SPARActor,
    estimate_value,
    fit_fqe,
    residual_family,
    select_policy,
    support_distance,
)
from torchrl_spar.objective import ROWS_PER_CALL
from torchrl_spar.ope.estimate import DRAWS, ValueEstimate, episode_terms, estimates_of_critics, value_of
from torchrl_spar.ope.fit import FQEFit, episodes_of, split_episodes
from torchrl_spar.training.sampling import batch_size_of

# Held-out rows whose distance is taken, the rows of the other episodes it is taken to, and how many of the nearest.
PROBES, REFERENCE, NEIGHBOURS = 1_000, 20_000, 5
# The least standard deviation of an action, as a share of its range: a nearly constant one would dominate distances.
LEAST_WIDTH = 0.01
# Groups of equal size in which predicted and true returns are compared.
BINS = 10
# Rows of an episode in a piece of FQE's batch.
SLICE = 16


class Support:
    """Distances of states and actions, both standardised, from the episodes that are held out to the others.

    Args:
        data: whole.
        held_out: share of the episodes, the same ones as FQE's.
        seed: of the split and of the rows that are taken.
    """

    def __init__(self, data: OfflineReplayBuffer, held_out: float, seed: int) -> None:
        rows = episodes_of(data, 0.0).cpu()
        first = torch.searchsorted(rows["episode"], rows["episode"].unique())
        rows.update({"row": data.source_rows, "number": rows["episode"]})
        rows.set("step", torch.arange(len(rows)) - first[rows["episode"]])
        others, held = split_episodes(rows, held_out, seed)
        generator = torch.Generator().manual_seed(seed)
        self.loc, self.scale = data.observation_loc.cpu(), data.observation_scale.cpu()
        space = data.action_spec.space
        self.width = others["action"].std(0).maximum(LEAST_WIDTH * (space.high - space.low).cpu())
        self.probes = held[torch.randperm(len(held), generator=generator)[:PROBES].sort().values]
        taken = others[torch.randperm(len(others), generator=generator)[:REFERENCE]]
        self.reference = self.joined(taken["observation"], taken["action"])
        self.of_data = self.distance(self.probes["action"])

    def distance(self, action: Tensor) -> Tensor:
        """Mean distance of each probe, with this action, to its nearest rows ``[N]``."""
        return support_distance(self.joined(self.probes["observation"], action), self.reference, k=NEIGHBOURS)

    def of_policy(self, policy: TensorDictModuleBase) -> float:
        """Mean distance of the policy's actions, over that of the data's own."""
        return (self.distance(actions_of(policy, self.probes)).mean() / self.of_data.mean()).item()

    def joined(self, observation: Tensor, action: Tensor) -> Tensor:
        return torch.cat([((observation - self.loc) / self.scale).float(), action / self.width], -1)


@torch.no_grad()
def actions_of(policy: TensorDictModuleBase, rows: TensorDictBase) -> Tensor:
    """The policy's actions, on the CPU."""
    device = next((tensor.device for tensor in policy.state_dict().values()), torch.device("cpu"))
    chunks = rows.select(*policy.in_keys).split(ROWS_PER_CALL)
    return torch.cat([policy(chunk.to(device).clone())["action"].cpu() for chunk in chunks]).to(rows["action"])


def estimate_any(policy: TensorDictModuleBase, data: OfflineReplayBuffer, options: dict[str, Any]) -> dict[str, Any]:
    """Estimated values of any policy and of the data, as results.json keeps them; `options` are `fqe_options`.

    Its critics are paired with those that `estimate_spar` fits to the anchor with the same seed: they see the same
    episodes, and start alike.
    """
    of_fit = {name: option for name, option in options.items() if name != "confidence"}
    terms = episode_terms(fit_fqe(policy, data, slice_len=slice_length(data), **of_fit), policy)
    value = value_of(terms, options["confidence"], DRAWS, options["seed"])
    return of_data(data, options) | {"policy": {**plain(value), "critics": estimates_of_critics(terms).tolist()}}


def estimate_spar(
    actor: SPARActor,
    data: OfflineReplayBuffer,
    options: dict[str, Any],
    *,
    select: bool = False,
    checkpoints: Mapping[str, SPARActor] | None = None,
) -> tuple[dict[str, Any], SPARActor]:
    """The same of SPAR and its anchor, and the policy to deploy.

    Args:
        actor: the policy.
        data: the log.
        options: `fqe_options`.
        select: whether smaller residuals are tried, too.
        checkpoints: with ``select``, earlier policies of the run that are tried, by name.

    Returns:
        Estimates with gains over the anchor, what FQE chooses and how far its critics can be believed; and the actor,
        with ``select`` what was chosen (its residual scaled by zero where that is the anchor).
    """
    family: dict[str, Any] = {**residual_family(actor, [0.25, 0.5, 0.75] if select else []), "spar": actor}
    family |= residual_family(checkpoints or {})
    choice = select_policy(family, data, anchor=actor.anchor, slice_len=slice_length(data), **options)
    chosen = actor
    if select and choice.name == "anchor":
        chosen = deepcopy(actor)
        chosen.residual_scale.zero_()
    elif select:
        chosen = family[choice.name]
    return of_data(data, options) | {
        **{name: {**plain(value), "critics": choice.members[name].tolist()} for name, value in choice.values.items()},
        "gains": {name: plain(gain) for name, gain in choice.gains.items()},
        "choice": choice.name,
        "calibration": calibration(choice.behaviour),
    }, chosen


def fqe_options(cfg: DictConfig) -> dict[str, Any]:
    """FQE's options: the run's sizes, and its discount where no other is given."""
    gamma = cfg.spar.loss.gamma if cfg.ope.get("gamma") is None else cfg.ope.gamma  # runs of old have no ope.gamma
    return {"hidden": list(cfg.spar.loss.hidden), "seed": cfg.seed, **cfg.ope, "gamma": gamma}


def slice_length(data: OfflineReplayBuffer) -> int:
    return min(SLICE, batch_size_of(data))


def of_data(data: OfflineReplayBuffer, options: dict[str, Any]) -> dict[str, Any]:
    """What estimates say of the data itself, and by which measure."""
    gamma, confidence = options["gamma"], options["confidence"]
    split = {name: options[name] for name in ("gamma", "held_out", "seed")}
    value = estimate_value(None, data, confidence=2 * confidence - 1, **split)
    return {"gamma": gamma, "confidence": confidence, "data": plain(value)}


def plain(value: ValueEstimate) -> dict[str, float]:
    return {"mean": value.mean, "low": value.interval[0], "high": value.interval[1]}


@torch.no_grad()
def calibration(fit: FQEFit) -> dict[str, Any]:
    """Predicted against true returns-to-go of held-out rows, for the behaviour, whose returns the log has.

    Rows are grouped by what the critics predict (their mean), each group with as many rows.
    """
    loss, rows = fit
    # As if the data's own actions were the policy's.
    rows = rows.clone(False).set("policy_action", rows["action"])
    chunks = rows.split(ROWS_PER_CALL)
    predicted = torch.cat([loss.state_value(chunk).mean(0) for chunk in chunks]).double().cpu()
    true = rows["return_to_go"].squeeze(-1).double().cpu()
    groups = predicted.argsort().chunk(BINS)
    error = predicted - true
    return {
        "predicted": [predicted[group].mean().item() for group in groups],
        "true": [true[group].mean().item() for group in groups],
        "bias": error.mean().item(),
        "rmse": error.pow(2).mean().sqrt().item(),
        "spread_of_returns": true.std(correction=0).item(),
        "rows": len(rows),
    }
