"""A guard at run time: where an observation is unlike the data, the anchor acts instead of the policy."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn
from torchrl.data import ReplayBuffer

from torchrl_spar.data.buffer import OfflineReplayBuffer
from torchrl_spar.data.rows import check_buffer
from torchrl_spar.errors import InputError, check_options, check_policy
from torchrl_spar.networks import ObservationNorm
from torchrl_spar.ope.fit import episodes_of, split_episodes
from torchrl_spar.residual import SPARActor

# Standardised observations from here on are no measurements.
ABSURD = 1e6

# Rows that the Gaussians are fitted to, and rounds of k-means.
ROWS, ROUNDS = 50_000, 5
# Least share of the pooled covariance in each Gaussian's own, and variance added to it.
SHRINKAGE, VARIANCE = 0.01, 1e-3


class SupportDetector(nn.Module):
    """Tells observations that are unlike the data: ``min_k |W_k (z - c_k)|^2 + b_k > threshold``, z standardised.

    That is, of K Gaussians, -2 log of the largest share times density, up to a constant. NaN and infinity count as
    unlike. :func:`fit_detector` makes one.

    Args:
        norm: standardises the observation.
        centre: means of the Gaussians, ``[K, observation_dim]``, standardised.
        whitening: ``W``, ``W_k^T W_k`` their inverse covariances, ``[K, observation_dim, observation_dim]``.
        offset: ``b``, ``[K]``.
        threshold: the largest distance that counts as like the data.

    Source: ours.

    Examples:
        >>> import torch
        >>> from torchrl_spar.networks import ObservationNorm
        >>> norm = ObservationNorm(torch.zeros(2), torch.ones(2))
        >>> detector = SupportDetector(norm, torch.zeros(1, 2), torch.eye(2)[None], torch.zeros(1), threshold=9.0)
        >>> detector(torch.tensor([[0.0, 2.9], [3.1, 0.0]]))
        tensor([False,  True])
    """

    weight: Tensor
    shift: Tensor
    offset: Tensor
    threshold: Tensor

    def __init__(
        self, norm: ObservationNorm, centre: Tensor, whitening: Tensor, offset: Tensor, threshold: float
    ) -> None:
        super().__init__()
        self.norm = norm
        # One product for all Gaussians.
        self.register_buffer("weight", whitening.flatten(0, 1).T.contiguous())
        self.register_buffer("shift", torch.einsum("kij,kj->ki", whitening, centre))
        self.register_buffer("offset", offset)
        self.register_buffer("threshold", torch.tensor(threshold, dtype=offset.dtype, device=offset.device))

    def distance(self, observation: Tensor) -> Tensor:
        """The distance of raw observations ``[*B, observation_dim]`` to the data, ``[*B]``."""
        white = (self.norm(observation) @ self.weight).unflatten(-1, self.shift.shape) - self.shift
        return (white.square().sum(-1) + self.offset).amin(-1)

    def forward(self, observation: Tensor) -> Tensor:
        """Whether each of ``[*B, observation_dim]`` is unlike the data, bool ``[*B]``."""
        return ~(self.distance(observation) <= self.threshold)


class GuardedActor(TensorDictModuleBase):
    """A policy that leaves the action to the anchor where the observation is unlike the data.

    Writes what the actor writes, and ``"fallback"`` ``[*B]``: whether the action is the anchor's. With a
    :class:`SupportDetector` the anchor reads the data's mean in place of NaN and infinity.

    Args:
        actor: the policy.
        detector: tells from ``"observation"`` ``[*B, observation_dim]`` where to fall back.
        anchor: the policy to fall back to; None for the actor's own.

    Raises:
        InputError: if actor or anchor is not an actor, the detector is not a function, or the anchor does not write
            the action.

    Source: ours; falling back to the behaviour where the data says too little is SPIBB's idea
    (https://arxiv.org/abs/1712.06924).

    Examples:
        >>> import torch
        >>> from torchrl_spar import GuardedActor, fit_detector, make_spar_loss, make_toy_data
        >>> data = make_toy_data()
        >>> policy = GuardedActor(make_spar_loss(data).actor, fit_detector(data))
        >>> action, fallback = policy(observation=torch.full((4, 3), 100.0))
        >>> action.shape, fallback
        (torch.Size([4, 2]), tensor([True, True, True, True]))
    """

    def __init__(
        self, actor: TensorDictModuleBase, detector: nn.Module, anchor: TensorDictModuleBase | None = None
    ) -> None:
        super().__init__()
        check_policy("actor", actor)
        check_options((callable(detector), "detector", detector, "what fit_detector returns, or a function"))
        anchor = actor.anchor if anchor is None and isinstance(actor, SPARActor) else anchor
        if anchor is None:
            raise InputError(f"a guard falls back to an anchor, and {type(actor).__name__} has none: give anchor=...")
        self.action_key = getattr(actor, "action_key", "action")
        check_policy("anchor", anchor, self.action_key)
        self.actor, self.detector, self.anchor = actor, detector, anchor
        self.in_keys = list(dict.fromkeys([*actor.in_keys, *anchor.in_keys, "observation"]))
        self.out_keys = [*actor.out_keys, "fallback"]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action, per observation the actor's or the anchor's, and ``"fallback"``."""
        fallback = self.detector(tensordict["observation"])
        state = tensordict.select(*self.anchor.in_keys)
        if isinstance(self.detector, SupportDetector) and "observation" in state.keys():
            seen, norm = state["observation"], self.detector.norm
            # A broken sensor's NaN, infinity or largest number would be the anchor's, too.
            state.set("observation", torch.where(norm(seen).abs() < ABSURD, seen, norm.loc))
        safe = self.anchor(state)[self.action_key]
        if isinstance(self.actor, SPARActor):  # which clamps an anchor that leaves the bounds
            safe = safe.clamp(self.actor.low, self.actor.high)
        tensordict = self.actor(tensordict)
        action = torch.where(fallback.unsqueeze(-1), safe, tensordict[self.action_key])
        return tensordict.set(self.action_key, action).set("fallback", fallback)


@torch.no_grad()
def fit_detector(
    data: ReplayBuffer,
    *,
    quantile: float = 0.999,
    num_gaussians: int = 64,
    held_out: float = 0.2,
    seed: int = 0,
) -> SupportDetector:
    """A detector of observations that are unlike the data's.

    K-means splits the observations, each cluster has a Gaussian, its covariance shrunk to that of all clusters. The
    threshold is a quantile over episodes that are held out, so that about a share of ``1 - quantile`` of the data's
    own observations falls beyond it.

    Args:
        data: as :func:`~torchrl_spar.load_offline_dataset` returns it, with vector observations.
        quantile: of the held-out observations' distances, above 0.
        num_gaussians: K, at most; a cluster has four rows a dimension or more in the mean.
        held_out: share of the episodes.
        seed: of the split and of k-means.

    Returns:
        :class:`SupportDetector`, on the CPU.

    Raises:
        InputError: for an option out of range, other data, or data of fewer than four episodes.

    Source: ours.

    Examples:
        >>> from torchrl_spar import fit_detector, make_toy_data
        >>> data = make_toy_data()
        >>> bool(fit_detector(data, quantile=1.0)(data[:]["observation"]).float().mean() < 0.2)
        True
    """
    check_options(
        (0 < quantile <= 1, "quantile", quantile, "above 0, at most 1"),
        (num_gaussians >= 1, "num_gaussians", num_gaussians, "at least 1"),
    )
    check_buffer(data, OfflineReplayBuffer)
    norm = ObservationNorm(data.observation_loc, data.observation_scale).cpu()
    others, held = split_episodes(episodes_of(data, 0.0).select("observation", "episode").cpu(), held_out, seed)
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:ROWS]
    rows = norm(others["observation"][order]).double()
    size = rows.shape[1]
    centre = rows[: max(1, min(num_gaussians, len(rows) // (4 * size)))]
    for _ in range(ROUNDS):
        nearest = torch.cdist(rows, centre).argmin(1)
        centre = torch.stack([rows[nearest == k].mean(0) for k in nearest.unique()])
    nearest = torch.cdist(rows, centre).argmin(1)
    deviation = rows - centre[nearest]
    pooled = deviation.T @ deviation / len(rows) + VARIANCE * torch.eye(size, dtype=rows.dtype)
    count = nearest.bincount(minlength=len(centre))
    covariance = torch.stack(
        [
            torch.lerp(own.T @ own / max(1, len(own)), pooled, max(SHRINKAGE, size / (len(own) + size)))
            for own in (deviation[nearest == k] for k in range(len(centre)))
        ]
    )
    root = torch.linalg.cholesky(covariance)
    whitening = torch.linalg.solve_triangular(root, torch.eye(size, dtype=rows.dtype), upper=False)
    offset = torch.logdet(covariance) - 2 * ((count + 1) / len(rows)).log()
    detector = SupportDetector(norm, centre.float(), whitening.float(), offset.float(), torch.inf)
    distances = torch.cat([detector.distance(chunk) for chunk in held["observation"].split(4_096)])
    detector.threshold.fill_(torch.quantile(distances.double(), quantile).item())
    return detector
