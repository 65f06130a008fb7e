"""SPAR in TorchRL's structured configs: after ``register_configs()``, ``loss: spar`` works where ``loss: iql`` does.

TorchRL registers its groups when ``torchrl.trainers.algorithms.configs`` is imported, which needs Hydra, and which
changes what an override such as ``env=...`` means in every Hydra application of the process. So nothing is registered
by an import here, and this module needs no Hydra until ``register_configs()`` is called.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded

from torchrl_spar.errors import InputError, check_names
from torchrl_spar.objective import SPARLoss
from torchrl_spar.residual import GaussianEncoder, ResidualHead, ResidualVAE, SPARActor

# OmegaConf's: to be given.
MISSING: Any = "???"
NETWORKS = ("actor_network", "qvalue_network", "residual_vae", "value_network")


@dataclass
class SPARLossConfig:
    """``loss: spar``: every keyword of :class:`~torchrl_spar.SPARLoss`, and ``gamma``.

    The networks are configs themselves: ``model: spar_actor`` and ``model: residual_vae`` of this module, and for the
    critics what ``loss: iql`` takes, TorchRL's ``model: value``. They may be partial, and with ``_partial_: true`` a
    trainer gives those that it builds itself.

    Examples:
        >>> from torchrl_spar.configs import ResidualHeadConfig, ResidualVAEConfig, SPARActorConfig, SPARLossConfig
        >>> def mlp(inputs, outputs):
        ...     return {"_target_": "torchrl.modules.MLP", "in_features": inputs, "out_features": outputs}
        >>> def module(network, inputs, outputs):
        ...     return {"_target_": "tensordict.nn.TensorDictModule", "module": network,
        ...             "in_keys": inputs, "out_keys": outputs}
        >>> anchor = module(mlp(3, 2), ["observation"], ["action"])
        >>> config = SPARLossConfig(
        ...     actor_network=SPARActorConfig(
        ...         anchor=anchor, head=ResidualHeadConfig(network=mlp(5, 2)), low=[-1, -1], high=[1, 1]),
        ...     qvalue_network=module(mlp(5, 1), ["observation", "action"], ["state_action_value"]),
        ...     residual_vae=ResidualVAEConfig(encoder_network=mlp(7, 8), decoder_network=mlp(9, 2)),
        ...     kappa=0.5, gamma=0.995)
        >>> from hydra.utils import instantiate
        >>> loss = instantiate(config)
        >>> loss.kappa, round(float(loss.value_estimator.gamma), 3)
        (0.5, 0.995)
    """

    actor_network: Any = None
    qvalue_network: Any = None
    residual_vae: Any = None
    value_network: Any = None
    num_qvalue_nets: int = 4
    bound: str = "lcb"
    kappa: float = 1.0
    expectile: float = 0.7
    value_mix: float = 0.0
    lmbda: float = 1.0
    cut_margin: float = 0.1
    cut_temperature: float = 0.1
    policy_noise: float = 0.2
    noise_clip: float = 0.5
    loss_function: str = "l2"
    reward_scale: float = 1.0
    kl_coeff: float = 0.1
    joint_vae: bool = True
    num_candidates: int = 8
    candidates: str = "prior"
    latent_std: float = 1.0
    latent_bound: float = 2.0
    candidate_dtype: str | None = None
    temperature: float = 0.3
    evidence_scale: float | None = 0.02
    lsi_coeff: float = 1.0
    trust_coeff: float = 1.0
    reduction: str | None = None
    use_prioritized_weights: str | bool = "auto"
    gamma: float | None = None
    _target_: str = "torchrl_spar.configs._make_loss"
    _partial_: bool = False


@dataclass
class SPARActorConfig:
    """``model: spar_actor``: a :class:`~torchrl_spar.SPARActor`.

    Attributes:
        anchor: any actor, such as TorchRL's ``model: tanh_normal``; it is frozen.
        head: ``model: residual_head``.
        low: lower bound of the action, a number a dimension.
        high: upper bound, likewise.
        residual_vae: for head B, that of the loss.
    """

    anchor: Any = MISSING
    head: Any = MISSING
    low: Any = MISSING
    high: Any = MISSING
    residual_vae: Any = None
    _target_: str = "torchrl_spar.configs._make_actor"
    _partial_: bool = False


@dataclass
class ResidualHeadConfig:
    """``model: residual_head``: a :class:`~torchrl_spar.ResidualHead`.

    Attributes:
        network: such as TorchRL's ``network: mlp``, from what ``in_keys`` name to the residual or the latent.
        in_keys: by default observation and ``anchor_action``.
        out_keys: by default ``[residual]``, head A; ``[latent]`` is head B.
        init_scale: factor on the last layer.
    """

    network: Any = MISSING
    in_keys: Any = None
    out_keys: Any = None
    init_scale: float = 0.01
    _target_: str = "torchrl_spar.configs._make_head"
    _partial_: bool = False


@dataclass
class ResidualVAEConfig:
    """``model: residual_vae``: a :class:`~torchrl_spar.ResidualVAE` of networks such as ``network: mlp``.

    Attributes:
        encoder_network: from ``in_keys`` and the residual to twice the latent: mean and log standard deviation.
        decoder_network: from ``in_keys`` and the latent to the residual.
        in_keys: by default observation and ``anchor_action``.
    """

    encoder_network: Any = MISSING
    decoder_network: Any = MISSING
    in_keys: Any = None
    _target_: str = "torchrl_spar.configs._make_vae"
    _partial_: bool = False


def register_configs() -> None:
    """Adds ``loss: spar`` and ``model: spar_actor``, ``residual_head``, ``residual_vae`` to TorchRL's config groups.

    Call it before ``hydra.main``; TorchRL's own groups are registered, too. Needs ``pip install hydra-core``.

    Examples:
        >>> from torchrl_spar.configs import register_configs
        >>> register_configs()  # doctest: +SKIP
    """
    import torchrl.trainers.algorithms.configs  # noqa: F401 - registers TorchRL's own
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="loss", name="spar", node=SPARLossConfig)
    store.store(group="model", name="spar_actor", node=SPARActorConfig)
    store.store(group="model", name="residual_head", node=ResidualHeadConfig)
    store.store(group="model", name="residual_vae", node=ResidualVAEConfig)


def _make_loss(*, gamma: float | None, **options: Any) -> SPARLoss:
    networks = {name: _built(options.pop(name)) for name in NETWORKS}
    check_names(options, SPARLoss.__init__, _make_loss, prefix="loss.")
    if missing := [name for name, network in networks.items() if network is None and name != "value_network"]:
        raise InputError(f"loss: spar needs {', '.join(missing)}")
    actor = networks["actor_network"]
    if isinstance(actor, SPARActor) and actor.is_latent:
        # Hydra builds a node anew wherever it is referred to, but there is one decoder.
        actor.decoder = networks["residual_vae"].decoder
    loss = SPARLoss(**networks, **options)
    if gamma is not None:
        loss.make_value_estimator(gamma=gamma)
    return loss


def _make_actor(*, anchor: Any, head: Any, low: Any, high: Any, residual_vae: Any, **unknown: Any) -> SPARActor:
    check_names(unknown, _make_actor, prefix="spar_actor.")
    if isinstance(low, (int, float)) or isinstance(high, (int, float)) or len(low) != len(high):
        raise InputError(f"low={low}, high={high}: give lists, with a number for each dimension of the action")
    bounds = [torch.tensor(list(bound), dtype=torch.get_default_dtype()) for bound in (low, high)]
    spec = Bounded(*bounds, bounds[0].shape, dtype=bounds[0].dtype)
    decoder = None if residual_vae is None else _built(residual_vae).decoder
    return SPARActor(_built(anchor), _built(head), action_spec=spec, decoder=decoder)


def _make_head(*, network: Any, in_keys: Any, out_keys: Any, init_scale: float, **unknown: Any) -> ResidualHead:
    check_names(unknown, _make_head, prefix="residual_head.")
    return ResidualHead(_built(network), _keys(in_keys), _keys(out_keys), init_scale=init_scale)


def _make_vae(*, encoder_network: Any, decoder_network: Any, in_keys: Any, **unknown: Any) -> ResidualVAE:
    check_names(unknown, _make_vae, prefix="residual_vae.")
    state = _keys(in_keys) or ["observation", "anchor_action"]
    encoder, decoder = GaussianEncoder(_built(encoder_network)), _built(decoder_network)
    return ResidualVAE(
        TensorDictModule(encoder, [*state, "residual"], ["latent_loc", "latent_log_std"]),
        TensorDictModule(decoder, [*state, "latent"], ["residual"]),
    )


def _built(network: Any) -> Any:
    return network() if isinstance(network, partial) else network


def _keys(keys: Iterable[Any] | None) -> list[NestedKey] | None:
    """Hydra's lists as TensorDict's keys."""
    return None if keys is None else [key if isinstance(key, str) else tuple(key) for key in keys]
