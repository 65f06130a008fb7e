"""A safe choice of a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.envs.utils import ExplorationType

from torchrl_spar.errors import InputError, check_options, check_policy
from torchrl_spar.ope.estimate import (
    EpisodeTerms,
    ValueEstimate,
    bootstrap,
    check_densities,
    episode_terms,
    estimates_of_critics,
    with_interval,
)
from torchrl_spar.ope.fit import FQEFit, fit_fqe, fit_fqe_each
from torchrl_spar.residual import SPARActor

SCALES = (0.25, 0.5, 0.75, 1.0)


class Selection(NamedTuple):
    """What :func:`select_policy` chose, and why.

    Attributes:
        name: of the chosen candidate, ``"anchor"`` where none is surely better.
        policy: the chosen policy.
        gains: by name, the estimated value less the anchor's, with joint bounds.
        values: by name, ``"anchor"`` among them, the estimated value; each bound holds for itself.
        members: likewise, every critic's own estimate ``[E]``; how far they agree.
        behaviour: critics of the data's own policy, where all fits began, and the held-out rows.
    """

    name: str
    policy: TensorDictModuleBase
    gains: dict[str, ValueEstimate]
    values: dict[str, ValueEstimate]
    members: dict[str, Tensor]
    behaviour: FQEFit


def residual_family(
    actor: SPARActor | Mapping[str, SPARActor], scales: Sequence[float] = SCALES
) -> dict[str, TensorDictModuleBase]:
    """The policies ``clamp(a_b + c * rho * Delta, low, high)`` for c in ``scales``, named ``"c=0.5"``.

    Args:
        actor: the policy; not changed. Or several by name, such as checkpoints of a run on the same anchor, whose
            policies are named ``"c=0.5 of step 8000"``.
        scales: c, between 0 and 1; 0 gives the anchor itself.

    Raises:
        InputError: for a scale out of range, or another actor.

    Source: ours.

    Examples:
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import make_spar_loss, residual_family
        >>> sorted(residual_family(make_spar_loss(3, Bounded(-1, 1, (2,))).actor, [0.5, 1]))
        ['c=0.5', 'c=1']
    """
    family: dict[str, TensorDictModuleBase] = {}
    actors = {f" of {name}": each for name, each in actor.items()} if isinstance(actor, Mapping) else {"": actor}
    for each in actors.values():
        if not isinstance(each, SPARActor):
            raise InputError(f"actor: a {type(each).__name__} has no residual; give a SPARActor, or several by name")
    for scale in scales:
        check_options((0 <= scale <= 1, "scales", scale, "between 0 and 1"))
        for suffix, each in actors.items():
            scaled = deepcopy(each)
            scaled.residual_scale.mul_(scale)
            family[f"c={scale:g}{suffix}"] = scaled if scale else scaled.anchor
    return family


def select_policy(
    candidates: SPARActor | Mapping[str, TensorDictModuleBase],
    data: ReplayBuffer,
    *,
    anchor: TensorDictModuleBase | None = None,
    behaviour: TensorDictModuleBase | None = None,
    confidence: float = 0.95,
    draws: int = 2_000,
    seed: int = 0,
    **options: Any,
) -> Selection:
    """The candidate whose lower bound on its gain over the anchor is highest; the anchor where none is above zero.

    All policies are evaluated by :func:`fit_fqe` from the same start, with the same seed, on the same held-out
    episodes, so that what they share cancels in the differences. The bounds hold for all candidates together:
    adding candidates does not make a lucky one more likely. They hold as far as those of
    :func:`~torchrl_spar.estimate_value` do.

    Args:
        candidates: policies by name, such as the :func:`residual_family` of several checkpoints; or a
            :class:`~torchrl_spar.SPARActor`, whose family is taken and whose anchor is the anchor.
        data: see :func:`fit_fqe`.
        anchor: the policy to fall back to; needed with a mapping.
        behaviour: see :func:`~torchrl_spar.estimate_value`.
        confidence: that no candidate's gain is below its lower bound.
        draws: number of bootstrap draws.
        seed: of everything random.
        **options: of :func:`fit_fqe`.

    Returns:
        :class:`Selection`.

    Raises:
        InputError: without candidates or an anchor, or as :func:`~torchrl_spar.estimate_value`.
        NonFiniteError: as :func:`fit_fqe`.

    Source: high-confidence policy improvement, Thomas et al. 2015 (https://proceedings.mlr.press/v37/thomas15.html);
    falling back to the behaviour, SPIBB (https://arxiv.org/abs/1712.06924); paired FQE and joint bounds are ours.

    Examples:
        >>> from torchrl_spar import make_spar_loss, make_toy_data, select_policy
        >>> data = make_toy_data()
        >>> small = {"warm_steps": 2, "steps": 2, "slice_len": 4, "hidden": [8]}
        >>> choice = select_policy(make_spar_loss(data).actor, data, **small)
        >>> choice.name in choice.values, list(choice.gains)
        (True, ['c=0.25', 'c=0.5', 'c=0.75', 'c=1'])
    """
    if isinstance(candidates, SPARActor):
        anchor = candidates.anchor if anchor is None else anchor
        candidates = residual_family(candidates)
    if not isinstance(candidates, (Mapping, torch.nn.ModuleDict)):
        raise InputError(f"candidates: a {type(candidates).__name__}; give a SPARActor, or policies by name")
    if anchor is None or not candidates:
        raise InputError("select_policy needs at least one candidate, and with a mapping anchor=... to fall back to")
    if "anchor" in candidates:
        raise InputError("candidates: 'anchor' is the name of the policy to fall back to; name the candidate otherwise")
    check_options(
        (0 < confidence < 1, "confidence", confidence, "between 0 and 1, exclusive"),
        (draws >= 2, "draws", draws, "at least 2"),
    )
    if behaviour is not None:
        check_densities(anchor, *candidates.values(), behaviour)
        options.setdefault("exploration_type", ExplorationType.RANDOM)
    policies = {"anchor": anchor, **candidates}
    for name, policy in policies.items():
        check_policy(f"the policy {name!r}", policy)  # before anything is fitted
    terms, start = evaluate_each(policies, data, behaviour=behaviour, seed=seed, **options)
    name, gains, values = choose(terms, confidence=confidence, draws=draws, seed=seed)
    members = {name: estimates_of_critics(each) for name, each in terms.items()}
    return Selection(name, policies[name], gains, values, members, start)


def evaluate_each(
    policies: Mapping[str, TensorDictModuleBase],
    data: ReplayBuffer,
    *,
    behaviour: TensorDictModuleBase | None,
    seed: int,
    **options: Any,
) -> tuple[dict[str, EpisodeTerms], FQEFit]:
    """The terms of policies on the same held-out episodes, and the fit of the data's own policy where all begin."""
    first, *_ = policies.values()
    start = fit_fqe(first, data, seed=seed, **{**options, "steps": 0})
    options = {**options, "seed": seed, "start": start.loss}
    if options.get("exploration_type", ExplorationType.DETERMINISTIC) is ExplorationType.DETERMINISTIC:
        fits = fit_fqe_each(policies, data, **options)
    else:
        fits = {name: fit_fqe(policy, data, **options) for name, policy in policies.items()}
    return {name: episode_terms(fit, policies[name], behaviour) for name, fit in fits.items()}, start


def choose(
    terms: Mapping[str, EpisodeTerms], *, confidence: float, draws: int, seed: int
) -> tuple[str, dict[str, ValueEstimate], dict[str, ValueEstimate]]:
    """Name, gains and values of :class:`Selection`, from the terms of policies; the first is ``"anchor"``."""
    means, drawn = bootstrap([*terms.values()], draws, seed)
    values = {name: with_interval(means[i], drawn[i], confidence) for i, name in enumerate(terms)}
    gain, drawn = means[1:] - means[0], drawn[1:] - drawn[0]
    spread = drawn.std(1).clamp_min(torch.finfo(torch.float64).tiny)
    # One multiple of the spreads that bounds all candidates at once.
    excess = ((drawn - gain[:, None]) / spread[:, None]).amax(0)
    reach = torch.quantile(excess, confidence) * spread
    gains = {
        name: ValueEstimate(mean, (mean - far, mean + far))
        for name, mean, far in zip([*terms][1:], gain.tolist(), reach.tolist())
    }
    best = max(gains, key=lambda name: gains[name].interval[0])
    return best if gains[best].interval[0] > 0 else "anchor", gains, values
