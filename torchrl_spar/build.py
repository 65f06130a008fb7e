"""Default networks from a data set or from sizes: the anchor, the policy, and the whole loss."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torchrl.data import Bounded, TensorSpec
from torchrl.modules import TanhModule, ValueOperator

from torchrl_spar.data.buffer import OfflineReplayBuffer
from torchrl_spar.errors import InputError, check_device, check_names, check_options
from torchrl_spar.networks import ActionNorm, ObservationNorm, StateMLP
from torchrl_spar.objective import SPARLoss
from torchrl_spar.residual import GaussianEncoder, ResidualHead, ResidualVAE, SPARActor, action_bounds

# Those of every committed result; the d4rl preset has (256, 256).
HIDDEN = (128, 128)
STATE = ["observation", "anchor_action"]
ObservationStats = tuple[torch.Tensor, torch.Tensor]
Device = torch.device | str | None
N = TypeVar("N", bound="DefaultNetworks")


def make_anchor(
    data: OfflineReplayBuffer | int,
    action_spec: TensorSpec | None = None,
    *,
    observation_stats: ObservationStats | None = None,
    hidden: Sequence[int] = HIDDEN,
    device: Device = None,
) -> TensorDictSequential:
    """A deterministic behaviour policy, untrained: an MLP and a tanh to the action bounds.

    Args:
        data: the data set, which gives sizes, bounds, observation statistics and device; or the size of the
            observation, then with ``action_spec``.
        action_spec: bounded action spec ``[action_dim]``.
        observation_stats: mean and standard deviation ``[observation_dim]`` that standardise the
            observation inside the network; without a data set none by default.
        hidden: widths of the hidden layers.
        device: where the weights live.

    Returns:
        A module ``observation -> action``; train it with :func:`~torchrl_spar.fit_anchor`.

    Raises:
        InputError: if sizes are missing, the spec is not bounded, or the statistics are not of the observation's size.

    Source: ours.

    Examples:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> make_anchor(3, Bounded(-1, 1, (2,)))(observation=torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    return DefaultNetworks.of(data, action_spec, observation_stats, hidden, device).anchor()


def make_spar_loss(
    data: OfflineReplayBuffer | int,
    action_spec: TensorSpec | None = None,
    *,
    device: Device = None,
    anchor: TensorDictModuleBase | None = None,
    observation_stats: ObservationStats | None = None,
    head: Literal["residual", "latent"] = "residual",
    latent_dim: int | None = None,
    hidden: Sequence[int] = HIDDEN,
    num_qvalue_nets: int = 4,
    gamma: float = 0.99,
    value_mix: float = 0.0,
    with_value: bool = False,
    loss_class: type[SPARLoss] = SPARLoss,
    **options: Any,
) -> SPARLoss:
    """:class:`~torchrl_spar.SPARLoss` with default networks for vector observations.

    Args:
        data: the data set, which gives sizes, bounds, observation statistics and device; or the size of the
            observation, then with ``action_spec``.
        action_spec: bounded action spec ``[action_dim]``, e.g. ``env.action_spec``.
        device: where everything lives.
        anchor: a trained behaviour policy ``observation -> action``; an untrained one of
            :func:`make_anchor` by default.
        observation_stats: mean and standard deviation ``[observation_dim]``; every network standardises by them.
        head: ``"residual"`` (head A) or ``"latent"`` (head B).
        latent_dim: size of the latent; ``2 * action_dim`` by default.
        hidden: widths of every network's hidden layers.
        num_qvalue_nets: number of critics, each with its own initialisation and LayerNorm.
        gamma: discount.
        value_mix: see :class:`~torchrl_spar.SPARLoss`; where it is positive, there is a value network.
        with_value: whether there is one in any case, such as for an IQLLoss that shares it.
        loss_class: a subclass of ``SPARLoss`` to build instead.
        **options: every keyword of :class:`~torchrl_spar.SPARLoss`.

    Returns:
        The loss; ``loss.actor`` is the policy to deploy, ``loss.anchor`` the frozen one.

    Raises:
        InputError: for missing sizes, or an unknown or impossible option.

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
    make = DefaultNetworks.of(data, action_spec, observation_stats, hidden, device, latent_dim)
    vae = ResidualVAE(make.encoder(), make.decoder())
    actor = make.actor(head, vae.decoder, anchor)
    qvalue = [make.qvalue() for _ in range(num_qvalue_nets)]
    # Drawn in any case, so that a seed's other numbers do not depend on whether there is one.
    value = make.value()
    options = {"num_qvalue_nets": num_qvalue_nets, "value_mix": value_mix, **options}
    try:
        loss = loss_class(actor, qvalue, vae, value if with_value or value_mix else None, **options)
    except TypeError as err:  # a subclass may pass on what its own signature does not name
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(err)):
            check_names([unknown[1]], make_spar_loss, SPARLoss.__init__, loss_class.__init__)
        raise
    loss.make_value_estimator(gamma=gamma)
    return loss.to(make.device)


def rebuild_actor(
    *, observation_dim: int, low: list[float], high: list[float], head: str, latent_dim: int, hidden: list[int]
) -> SPARActor:
    """A default policy, untrained, from the facts in its ``architecture``; no random number is drawn.

    Examples:
        >>> actor = make_spar_loss(3, Bounded(-1, 1, (2,))).actor
        >>> rebuild_actor(**actor.architecture).load_state_dict(actor.state_dict())
        <All keys matched successfully>
    """
    bounds = torch.tensor(low), torch.tensor(high)
    spec = Bounded(*bounds, bounds[0].shape, dtype=bounds[0].dtype)
    with torch.random.fork_rng(devices=[]):
        make = DefaultNetworks.of(observation_dim, spec, None, hidden, None, latent_dim)
        return make.actor(head, make.decoder() if head == "latent" else None, None)


@dataclass
class DefaultNetworks:
    """The default networks of one task."""

    observation_dim: int
    action_spec: TensorSpec
    stats: ObservationStats
    hidden: Sequence[int]
    device: Device
    latent_dim: int
    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(
        cls: type[N],
        data: OfflineReplayBuffer | int,
        action_spec: TensorSpec | None = None,
        stats: ObservationStats | None = None,
        hidden: Sequence[int] = HIDDEN,
        device: Device = None,
        latent_dim: int | None = None,
    ) -> N:
        if isinstance(data, OfflineReplayBuffer):
            loc, scale = data.observation_loc, data.observation_scale
            size, stats, device = loc.numel(), stats or (loc, scale), device or loc.device
            action_spec = data.action_spec if action_spec is None else action_spec
        elif isinstance(data, int) and action_spec is not None:
            size, stats = data, stats or (torch.zeros(data), torch.ones(data))
        else:
            raise InputError(
                "give the data set, as load_offline_dataset returns it, or the observation's size and an action_spec; "
                f"got {type(data).__name__} and action_spec={action_spec}"
            )
        if any(stat.shape != (size,) for stat in stats):
            shapes = " and ".join(str(tuple(stat.shape)) for stat in stats)
            raise InputError(f"observation_stats have shapes {shapes}; both must be [{size}]")
        loc, scale = stats
        if not (loc.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
            raise InputError("observation_stats: means must be finite, standard deviations finite and above 0")
        check_device(device)
        low, high = (bound.to(device) for bound in action_bounds(action_spec))
        if isinstance(data, OfflineReplayBuffer) and (found := data[:1]["action"].shape[-1]) != low.numel():
            raise InputError(f"action_spec has {low.numel()} dimensions, the data's actions have {found}")
        return cls(size, action_spec, stats, hidden, device, latent_dim or 2 * low.numel(), low, high)

    @property
    def action_dim(self) -> int:
        return self.low.numel()

    def body(self, inputs: int, outputs: int, *, layer_norm: bool = False) -> StateMLP:
        """Reads the observation and `inputs` more numbers, an action first."""
        norm = ObservationNorm(*(stat.to(self.device) for stat in self.stats))
        low, high = action_bounds(self.action_spec)  # ours may be on the meta device
        is_unit = not inputs or bool((low == -1).all() and (high == 1).all())
        return StateMLP(
            norm, self.observation_dim + inputs, outputs, hidden=self.hidden, layer_norm=layer_norm,
            action_norm=None if is_unit else ActionNorm(self.low, self.high), device=self.device,
        )  # fmt: skip

    def anchor(self) -> TensorDictSequential:
        squash = TanhModule(in_keys=["action"], low=self.low, high=self.high)
        return TensorDictSequential(
            TensorDictModule(self.body(0, self.action_dim), ["observation"], ["action"]), squash
        )

    def encoder(self) -> TensorDictModule:
        network = GaussianEncoder(self.body(2 * self.action_dim, 2 * self.latent_dim))
        return TensorDictModule(network, [*STATE, "residual"], ["latent_loc", "latent_log_std"])

    def decoder(self) -> TensorDictModule:
        network = self.body(self.action_dim + self.latent_dim, self.action_dim)
        return TensorDictModule(network, [*STATE, "latent"], ["residual"])

    def actor(self, head: str, decoder: TensorDictModuleBase | None, anchor: TensorDictModuleBase | None) -> SPARActor:
        """The policy; only head B takes the decoder."""
        is_latent = head == "latent"
        anchor = self.anchor() if anchor is None else anchor
        network = self.body(self.action_dim, self.latent_dim if is_latent else self.action_dim)
        actor = SPARActor(
            anchor, ResidualHead(network, STATE, ["latent" if is_latent else "residual"]),
            action_spec=self.action_spec, decoder=decoder if is_latent else None,
        ).to(self.device)  # fmt: skip
        low, high = (bound.tolist() for bound in action_bounds(self.action_spec))  # ours may be on the meta device
        actor.architecture = {
            "observation_dim": self.observation_dim, "low": low, "high": high,
            "head": head, "latent_dim": self.latent_dim, "hidden": list(self.hidden),
        }  # fmt: skip
        return actor

    def qvalue(self) -> ValueOperator:
        return ValueOperator(self.body(self.action_dim, 1, layer_norm=True), in_keys=["observation", "action"])

    def value(self) -> ValueOperator:
        return ValueOperator(self.body(0, 1, layer_norm=True), in_keys=["observation"])
