"""What a policy is worth, with an interval."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.envs.utils import ExplorationType

from torchrl_spar.errors import InputError, check_options
from torchrl_spar.objective import ROWS_PER_CALL
from torchrl_spar.ope.fit import FQEFit, episodes_of, fit_fqe, split_episodes

# Draws of a stochastic policy's action in each state, and of the bootstrap.
ACTION_DRAWS, DRAWS = 8, 2_000


class ValueEstimate(NamedTuple):
    """A mean and its interval, both in raw reward units.

    Attributes:
        mean: the estimate.
        interval: lower and upper bound.
    """

    mean: float
    interval: tuple[float, float]


class EpisodeTerms(NamedTuple):
    """What the n held-out episodes of at most T steps say of a policy.

    Attributes:
        initial: value of the first state, ``[E, n]``.
        residual: discounted TD errors along the episode, zero beyond its end, ``[E, n, T]``.
        weight: cumulative weight of each step, ``[n, T]``.
        normalised: whether the weights of a step are to sum to one over the episodes.
    """

    initial: Tensor
    residual: Tensor
    weight: Tensor
    normalised: bool


def estimate_value(
    policy: TensorDictModuleBase | None,
    data: ReplayBuffer,
    *,
    behaviour: TensorDictModuleBase | None = None,
    gamma: float = 0.99,
    confidence: float = 0.9,
    draws: int = DRAWS,
    held_out: float = 0.2,
    seed: int = 0,
    **options: Any,
) -> ValueEstimate:
    """The expected discounted return of a policy from the data's initial states, and an interval.

    ``V = mean_i [V(s_i0) + sum_t gamma^t w_it (r_it + gamma V(s_it+1) - Q(s_it, a_it))]`` over the held-out episodes,
    with values of :func:`fit_fqe`. Without ``behaviour`` the weights are the products of the traces of
    :class:`FQELoss`, 1 at most: where the critics are right, the sum is zero in the mean whatever the weights; where
    they are wrong, it corrects them as far as the data acts like the policy. With ``behaviour`` they are the
    per-decision importance ratios ``pi / mu``, self-normalised (weighted doubly robust); over long episodes few
    episodes then hold all the weight. The interval has the spread over resampled episodes and, as Student's t, that
    of the critics, each trained on its own resample.

    It is no guarantee: where the policy acts as nobody in the data did, all critics extrapolate, and may agree.

    Values are discounted. An undiscounted return over a horizon of H steps is about ``(1 - gamma) H V`` where rewards
    are steady and no episode ends early; otherwise the two can rank policies differently, as ``V`` looks about
    ``1 / (1 - gamma)`` steps ahead of the initial states. Rewards are those of the data (``reward_shift`` included).

    Args:
        policy: any TensorDictModule that writes the action; None for the behaviour that collected the data, whose
            estimate is the mean return-to-go of the initial states.
        data: see :func:`fit_fqe`.
        behaviour: policy with a density (``get_dist``) that collected the data, such as a Gaussian clone. ``policy``
            must have one, too, and is then evaluated as the distribution that it is (``ExplorationType.RANDOM``).
        gamma: discount.
        confidence: of the interval, two-sided.
        draws: number of bootstrap draws.
        held_out: share of the episodes that the critics do not see, on which the estimate is made.
        seed: of everything random.
        **options: of :func:`fit_fqe`.

    Returns:
        :class:`ValueEstimate`: ``mean, (low, high)``.

    Raises:
        InputError: as :func:`fit_fqe`, or if a density is missing, or zero for actions of the data.
        NonFiniteError: as :func:`fit_fqe`.

    Source: FQE, Le et al. 2019; weighted doubly robust, Thomas and Brunskill 2016 (https://arxiv.org/abs/1604.00923);
    bootstrap of episodes, Hanna et al. 2017 (https://arxiv.org/abs/1606.06126); the traces as weights are ours.

    Examples:
        >>> from torchrl_spar import estimate_value, make_anchor, make_toy_data
        >>> data = make_toy_data()
        >>> small = {"warm_steps": 2, "steps": 2, "slice_len": 4, "hidden": [8]}
        >>> mean, (low, high) = estimate_value(make_anchor(data), data, **small)
        >>> low < mean < high
        True
        >>> estimate_value(None, data, gamma=1.0)
        ValueEstimate(mean=10.0, interval=(10.0, 10.0))
    """
    check_options(
        (0 < confidence < 1, "confidence", confidence, "between 0 and 1, exclusive"),
        (draws >= 1, "draws", draws, "at least 1"),
    )
    if policy is None:
        if options:
            raise InputError(f"{next(iter(options))}: nothing is fitted to the data's own value, leave it out")
        terms = behaviour_terms(split_episodes(episodes_of(data, gamma), held_out, seed)[1])
    else:
        if behaviour is not None:
            check_densities(policy, behaviour)
            options.setdefault("exploration_type", ExplorationType.RANDOM)
        fit = fit_fqe(policy, data, gamma=gamma, held_out=held_out, seed=seed, **options)
        terms = episode_terms(fit, policy, behaviour)
    return value_of(terms, (1 + confidence) / 2, draws, seed)


def value_of(terms: EpisodeTerms, confidence: float, draws: int, seed: int) -> ValueEstimate:
    """The estimate of one policy, of which each bound holds with ``confidence``."""
    mean, drawn = bootstrap([terms], draws, seed)
    return with_interval(mean[0], drawn[0], confidence)


def with_interval(mean: Tensor, drawn: Tensor, confidence: float) -> ValueEstimate:
    """A mean and its draws ``[D]`` as an estimate of which each bound holds with ``confidence``."""
    low, high = torch.quantile(drawn, torch.tensor([1 - confidence, confidence], dtype=drawn.dtype)).tolist()
    return ValueEstimate(float(mean), (low, high))


@torch.no_grad()
def episode_terms(
    fit: FQEFit, policy: TensorDictModuleBase, behaviour: TensorDictModuleBase | None = None
) -> EpisodeTerms:
    """The :class:`EpisodeTerms` of a policy; with ``behaviour``, of importance ratios."""
    loss, rows = fit
    repeats = 1 if "policy_action" in rows.keys() else ACTION_DRAWS
    chunks = rows.split(ROWS_PER_CALL)
    first = rows[_starts(rows)]
    initial = torch.stack([loss.state_value(first) for _ in range(repeats)]).double().mean(0)
    residual = torch.cat(
        [torch.stack([loss.td_residual(chunk) for _ in range(repeats)]).double().mean(0) for chunk in chunks], -1
    )
    if behaviour is None:
        log_ratio = torch.cat([loss.trace(chunk) for chunk in chunks]).double().log()
    else:
        log_policy, log_behaviour = (
            torch.cat([log_density(each, chunk) for chunk in chunks]) for each in (policy, behaviour)
        )
        if not (log_behaviour.isfinite().all() and (log_policy < torch.inf).all()):
            raise InputError(
                "behaviour: it gives actions of the data a density of zero, or a density is NaN or infinite, so there "
                "are no importance weights: give the policy that collected the data, or leave behaviour out"
            )
        log_ratio = log_policy - log_behaviour
    at, valid = _grid(rows)
    # After its end an episode keeps its weight.
    log_weight = torch.where(valid, log_ratio[at], 0).cumsum(1)
    if behaviour is not None:
        # It cancels, and nothing overflows; where no episode acts as the policy may, all weights are 0.
        log_weight = log_weight - log_weight.amax(0).clamp_min(torch.finfo(torch.float64).min)
    steps = torch.arange(valid.shape[1], device=valid.device, dtype=torch.float64)
    gamma = loss.value_estimator.gamma.double()
    residual = torch.where(valid, residual[:, at], 0) * gamma**steps
    return EpisodeTerms(initial.cpu(), residual.cpu(), log_weight.exp().cpu(), behaviour is not None)


def behaviour_terms(rows: TensorDictBase) -> EpisodeTerms:
    """The terms of the data's own policy: its returns, as of one critic that knows them."""
    initial = rows["return_to_go"][_starts(rows)].reshape(1, -1).double().cpu()
    none = initial.new_zeros(*initial.shape, 1)
    return EpisodeTerms(initial, none, none[0], False)


def check_densities(*policies: TensorDictModuleBase) -> None:
    """Refuses policies without a density, before anything is fitted."""
    for policy in policies:
        if not hasattr(policy, "get_dist"):
            raise InputError(
                f"{type(policy).__name__} has no density (get_dist), which importance weights need: give a "
                "ProbabilisticActor, or leave behaviour out"
            )


def log_density(policy: TensorDictModuleBase, rows: TensorDictBase) -> Tensor:
    """Log density ``[N]``, in float64, of the data's actions."""
    log_prob = policy.get_dist(rows.select(*policy.in_keys)).log_prob(rows["action"])
    return log_prob.reshape(len(rows), -1).sum(-1).double()


def estimates(terms: EpisodeTerms, counts: Tensor) -> Tensor:
    """Estimates of the critics for resamples: ``counts`` ``[D, n]``, how often an episode is in each, to ``[D, E]``.

    Source: see :func:`~torchrl_spar.estimate_value`.
    """
    size = counts.sum(1, keepdim=True)
    total = size if not terms.normalised else (counts @ terms.weight).clamp_min(torch.finfo(torch.float64).tiny)
    corrections = [(counts @ (terms.weight * residual) / total).sum(1) for residual in terms.residual]
    return counts @ terms.initial.T / size + torch.stack(corrections, 1)


def estimates_of_critics(terms: EpisodeTerms) -> Tensor:
    """Each critic's estimate ``[E]`` on the episodes as they are."""
    return estimates(terms, torch.ones(1, terms.initial.shape[1], dtype=torch.float64))[0]


def bootstrap(policies: list[EpisodeTerms], draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Estimates ``[P]`` of policies evaluated on the same episodes, and joint draws ``[P, D]`` around them.

    Episodes are resampled, the same for all policies; as few of them vary too little in a resample, the draws are
    spread as Student's t is. To that comes Student's t of the critics' own differences with their covariance between
    policies: a critic is another one's copy but for its data and initialisation.
    """
    generator = torch.Generator().manual_seed(seed)
    members, count = policies[0].initial.shape
    drawn = torch.randint(count, (draws, count), generator=generator)
    counts = torch.zeros(draws, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    values = torch.stack([estimates_of_critics(terms) for terms in policies])
    means = values.mean(1)
    resampled = torch.stack([estimates(terms, counts).mean(1) for terms in policies])
    if count > 1:
        students = torch.Generator().manual_seed(seed + 1)
        chi_square = torch.randn(count - 1, draws, generator=students, dtype=torch.float64).pow(2).mean(0)
        resampled = means[:, None] + (resampled - means[:, None]) * (count / (count - 1) / chi_square).sqrt()
    if members == 1:
        return means, resampled
    normal = torch.randn(members, draws, generator=generator, dtype=torch.float64)
    chi_square = torch.randn(members - 1, draws, generator=generator, dtype=torch.float64).pow(2).mean(0)
    noise = (values - means[:, None]) @ normal / ((members - 1) * chi_square).sqrt()
    return means, resampled + noise


def _starts(rows: TensorDictBase) -> Tensor:
    """Index of each episode's first row."""
    return torch.cat([torch.ones_like(rows["episode"][:1]), rows["episode"].diff()]).nonzero().squeeze(-1)


def _grid(rows: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Index ``[n, T]`` of each episode's rows, and which of them are its own."""
    begin, length = _starts(rows), rows["episode"].bincount()
    offset = torch.arange(int(length.max()), device=begin.device)
    valid = offset < length[:, None]
    return (begin[:, None] + offset).clamp_max(len(rows) - 1), valid
