"""Default networks from the sizes of a task: the anchor, and the whole loss around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torchrl.data import TensorSpec
from torchrl.modules import TanhModule, ValueOperator

from torchrl_spar.errors import InputError, check_options
from torchrl_spar.networks import ObservationNorm, StateMLP
from torchrl_spar.objective import SPARLoss
from torchrl_spar.residual import GaussianEncoder, ResidualHead, ResidualVAE, SPARActor, action_bounds

HIDDEN = (256, 256)
ObservationStats = tuple[torch.Tensor, torch.Tensor]


def make_anchor(
    observation_dim: int,
    action_spec: TensorSpec,
    *,
    observation_stats: ObservationStats | None = None,
    hidden: Sequence[int] = HIDDEN,
    device: torch.device | str | None = None,
) -> TensorDictSequential:
    """A deterministic behaviour policy, untrained: an MLP and a tanh to the action bounds.

    Args:
        observation_dim: size of the observation.
        action_spec: bounded action spec ``[action_dim]``.
        observation_stats: mean and standard deviation ``[observation_dim]`` that standardise the
            observation inside the network; none by default.
        hidden: widths of the hidden layers.
        device: where the weights live.

    Returns:
        A module ``observation -> action``; train it with :func:`~torchrl_spar.fit_anchor`.

    Raises:
        InputError: if the spec is not bounded, or the statistics are not of the observation's size.

    Source: ours.

    Examples:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> make_anchor(3, Bounded(-1, 1, (2,)))(observation=torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    low, high = (bound.to(device) for bound in action_bounds(action_spec))
    norm = _observation_norm(observation_dim, observation_stats, device)
    network = StateMLP(norm, observation_dim, low.numel(), hidden=hidden, device=device)
    squash = TanhModule(in_keys=["action"], low=low, high=high)
    return TensorDictSequential(TensorDictModule(network, ["observation"], ["action"]), squash)


def make_spar_loss(
    observation_dim: int,
    action_spec: TensorSpec,
    *,
    device: torch.device | str | None = None,
    anchor: TensorDictModuleBase | None = None,
    observation_stats: ObservationStats | None = None,
    head: Literal["residual", "latent"] = "residual",
    latent_dim: int | None = None,
    hidden: Sequence[int] = HIDDEN,
    num_qvalue_nets: int = 4,
    gamma: float = 0.99,
    loss_class: type[SPARLoss] = SPARLoss,
    **options: Any,
) -> SPARLoss:
    """:class:`~torchrl_spar.SPARLoss` with default networks for vector observations.

    Args:
        observation_dim: size of the observation.
        action_spec: bounded action spec ``[action_dim]``, e.g. ``env.action_spec``.
        device: where everything lives.
        anchor: a trained behaviour policy ``observation -> action``; an untrained one of
            :func:`make_anchor` by default.
        observation_stats: mean and standard deviation ``[observation_dim]``, e.g. those of
            :func:`~torchrl_spar.load_offline_dataset`; every network standardises by them.
        head: ``"residual"`` (head A) or ``"latent"`` (head B).
        latent_dim: size of the latent; ``2 * action_dim`` by default.
        hidden: widths of every network's hidden layers.
        num_qvalue_nets: number of critics, each with its own initialisation and LayerNorm.
        gamma: discount.
        loss_class: a subclass of ``SPARLoss`` to build instead.
        **options: every keyword of :class:`~torchrl_spar.SPARLoss`.

    Returns:
        The loss; ``loss.actor`` is the policy to deploy, ``loss.anchor`` the frozen one.

    Raises:
        InputError: for an unknown or impossible option.

    Source: sizes and LayerNorm critics are ours.

    Examples:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import make_spar_loss
        >>> loss = make_spar_loss(3, Bounded(-1, 1, (2,)), head="latent", kappa=0.5)
        >>> loss.actor(observation=torch.zeros(5, 3)).shape, loss.anchor(observation=torch.zeros(5, 3)).shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """
    check_options(
        (head in ("residual", "latent"), "head", head, "'residual' (head A) or 'latent' (head B)"),
        (latent_dim is None or latent_dim >= 1, "latent_dim", latent_dim, "at least 1"),
        (0 <= gamma <= 1, "gamma", gamma, "between 0 and 1"),
    )
    low, high = action_bounds(action_spec)
    action_dim = low.numel()
    latent_dim = 2 * action_dim if latent_dim is None else latent_dim
    state_dim = observation_dim + action_dim

    def network(in_features: int, out_features: int, layer_norm: bool = False) -> StateMLP:
        norm = _observation_norm(observation_dim, observation_stats, device)
        return StateMLP(norm, in_features, out_features, hidden=hidden, layer_norm=layer_norm, device=device)

    state = ["observation", "anchor_action"]
    vae = ResidualVAE(
        TensorDictModule(
            GaussianEncoder(network(state_dim + action_dim, 2 * latent_dim)),
            [*state, "residual"],
            ["latent_loc", "latent_log_std"],
        ),
        TensorDictModule(network(state_dim + latent_dim, action_dim), [*state, "latent"], ["residual"]),
    )
    is_latent = head == "latent"
    if anchor is None:
        anchor = make_anchor(
            observation_dim, action_spec, observation_stats=observation_stats, hidden=hidden, device=device
        )
    actor = SPARActor(
        anchor,
        ResidualHead(
            network(state_dim, latent_dim if is_latent else action_dim), state, ["latent" if is_latent else "residual"]
        ),
        action_spec=action_spec,
        decoder=vae.decoder if is_latent else None,
    ).to(device)
    qvalue = [
        ValueOperator(network(state_dim, 1, layer_norm=True), in_keys=["observation", "action"])
        for _ in range(num_qvalue_nets)
    ]
    value = ValueOperator(network(observation_dim, 1, layer_norm=True), in_keys=["observation"])
    try:
        loss = loss_class(actor, qvalue, value, vae, num_qvalue_nets=num_qvalue_nets, **options)
    except TypeError as err:
        raise InputError(f"unknown option for SPARLoss: {err}") from None
    loss.make_value_estimator(gamma=gamma)
    # What save_policy needs to rebuild the actor.
    loss.architecture = {
        "observation_dim": observation_dim, "low": low.tolist(), "high": high.tolist(),
        "head": head, "latent_dim": latent_dim, "hidden": list(hidden),
    }  # fmt: skip
    return loss.to(device)


def _observation_norm(
    observation_dim: int, stats: ObservationStats | None, device: torch.device | str | None
) -> ObservationNorm:
    loc, scale = stats or (torch.zeros(observation_dim), torch.ones(observation_dim))
    if loc.shape != (observation_dim,) or scale.shape != (observation_dim,):
        raise InputError(
            f"observation_stats have shapes {tuple(loc.shape)} and {tuple(scale.shape)}; "
            f"both must be [{observation_dim}]"
        )
    return ObservationNorm(loc.to(device), scale.to(device))
