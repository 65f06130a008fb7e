"""SPARLoss beside other TorchRL losses: which networks they share, and the sum that one optimiser minimises."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from rivals.models import Networks
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import MLP, TanhModule, ValueOperator
from torchrl.objectives import CQLLoss, IQLLoss
from torchrl.objectives.common import LossModule

from torchrl_spar import ResidualHead, ResidualVAE, SPARActor, SPARLoss, share_critics
from torchrl_spar.training.pretrain import cloning_loss

# CQL's loss for its actor while it warms up by cloning; it would pull against the other one.
LEFT_OUT = ("loss_actor_bc",)


@dataclass
class Mix:
    """SPARLoss, the losses beside it by name, and an encoder of the observation where there is one."""

    spar: SPARLoss
    beside: dict[str, LossModule] = field(default_factory=dict)
    encoder: TensorDictModule | None = None

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Every term on one batch, as ``spar.loss_qvalue``, ``iql.loss_actor``, ...; they are to be summed."""
        batch = batch.clone(False)
        if self.encoder is not None:
            batch = self.encoder(batch)
            with torch.no_grad():
                batch["next"] = self.encoder(batch["next"].clone(False))
            # As in SAC+AE and DrQ: the critics train the encoder, the head reads what they made of it. Nothing
            # bootstraps from the state value.
            terms = {
                "spar.loss_qvalue": self.spar.qvalue_loss(batch)[0],
                "spar.loss_actor": self.spar.actor_loss(batch.detach())[0],
            }
        else:
            terms = losses_of("spar", self.spar, batch)
        for name, loss in self.beside.items():
            terms |= losses_of(name, loss, batch)
        return terms

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, shared ones once."""
        modules = [self.spar, *self.beside.values(), *([] if self.encoder is None else [self.encoder])]
        found = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
        return [parameter for parameter in found if parameter.requires_grad]

    @property
    def policy(self) -> TensorDictModuleBase:
        return self.spar.actor if self.encoder is None else TensorDictSequential(self.encoder, self.spar.actor)


def losses_of(name: str, loss: LossModule, batch: TensorDictBase) -> dict[str, Tensor]:
    # On a copy: TorchRL's losses write into what they are given.
    out = loss(batch.clone(False))
    return {f"{name}.{key}": out[key] for key in out.keys() if key.startswith("loss_") and key not in LEFT_OUT}


def critics_like(spar: SPARLoss) -> list[TensorDictModule]:
    return [deepcopy(spar.qvalue_network) for _ in range(spar.num_qvalue_nets)]


def add_iql(mix: Mix, networks: Networks, *, temperature: float) -> None:
    """IQL's critics and state value are SPAR's: in-sample targets beside those of SPAR's policy."""
    spar = mix.spar
    loss = IQLLoss(
        networks.gaussian_actor(), critics_like(spar), deepcopy(spar.value_network),
        num_qvalue_nets=spar.num_qvalue_nets, loss_function="l2", temperature=temperature, expectile=spar.expectile,
        deactivate_vmap=True,
    )  # fmt: skip
    loss.make_value_estimator(gamma=float(spar.value_estimator.gamma))
    mix.beside["iql"] = share_critics(spar, loss)


def add_cql(mix: Mix, networks: Networks, *, min_q_weight: float, num_random: int) -> None:
    """CQL's critics are SPAR's: its penalty, and its targets from an actor of its own, beside SPAR's."""
    spar = mix.spar
    loss = CQLLoss(
        networks.squashed_actor(), critics_like(spar), loss_function="l2", action_spec=networks.action_spec,
        min_q_weight=min_q_weight, num_random=num_random, deactivate_vmap=True,
    )  # fmt: skip
    loss.make_value_estimator(gamma=float(spar.value_estimator.gamma))
    mix.beside["cql"] = share_critics(spar, loss)


def add_encoder(mix: Mix, networks: Networks, *, features: int, **options: Any) -> None:
    """Head and critics read one encoder's features; anchor and VAE, fitted before, the observation.

    `options` are SPARLoss's.
    """
    spar, size = mix.spar, networks.action_dim

    def body(inputs: int, outputs: int, *, layer_norm: bool = False) -> MLP:
        width = networks.hidden[-1]
        norm = {"norm_class": nn.LayerNorm, "norm_kwargs": {"normalized_shape": width}} if layer_norm else {}
        return MLP(inputs, outputs, num_cells=[width], activation_class=nn.ReLU, **norm)  # type: ignore[arg-type]

    mix.encoder = TensorDictModule(networks.body(0, features), ["observation"], ["features"])
    head = ResidualHead(body(features + size, size), ["features", "anchor_action"])
    critics = [
        ValueOperator(body(features + size, 1, layer_norm=True), in_keys=["features", "action"])
        for _ in range(spar.num_qvalue_nets)
    ]
    vae = ResidualVAE(deepcopy(spar.residual_vae.encoder), deepcopy(spar.residual_vae.decoder))
    loss = SPARLoss(
        SPARActor(spar.anchor, head, action_spec=networks.action_spec, residual_scale=spar.residual_scale), critics,
        vae, ValueOperator(body(features, 1, layer_norm=True), in_keys=["features"]),
        **options,
    )  # fmt: skip
    loss.residual_vae_params.data.copy_(spar.residual_vae_params.data)
    loss.make_value_estimator(gamma=float(spar.value_estimator.gamma))
    mix.spar = loss


def add_aux(mix: Mix, networks: Networks, *, features: int, **options: Any) -> None:
    """BCLoss on the shared encoder: its features must tell the data's action, too."""
    add_encoder(mix, networks, features=features, **options)
    decoder = TensorDictSequential(
        TensorDictModule(nn.Linear(features, networks.action_dim), ["features"], ["action"]),
        TanhModule(in_keys=["action"], low=networks.low, high=networks.high),
    )
    mix.beside["bc"] = cloning_loss(decoder)
