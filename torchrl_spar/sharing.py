"""Another TorchRL loss on SPAR's critics, for both on one optimiser."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Size
from torchrl.objectives.common import LossModule

from torchrl_spar.conventions import check_spar_loss
from torchrl_spar.errors import InputError
from torchrl_spar.objective import SPARLoss

# What the other loss needs of a network of SPAR's.
COPIES = {
    "qvalue_network": "copies of spar.qvalue_network, num_qvalue_nets of them",
    "value_network": "a copy of spar.value_network",
}


def share_critics(spar: SPARLoss, other: LossModule) -> LossModule:
    """Makes another loss train SPAR's critics (and its state value, if both have one) in SPAR's unit of reward.

    The other loss then bootstraps from SPAR's targets, which SPAR's updater moves; it needs none of its own. It sees
    rewards times ``spar.reward_scale`` as it is at each call: without that, critics that
    :func:`~torchrl_spar.fit_critics` has started would be pulled to values of another size. Set its ``gamma`` to
    SPAR's yourself.

    Args:
        spar: the loss whose critics are shared.
        other: such as ``IQLLoss`` or ``CQLLoss``, with critics of the same architecture and number; changed in place.
            Call it with a TensorDict: its ``forward`` and its single terms, called by name, see rewards as they are.

    Returns:
        ``other``.

    Raises:
        InputError: if one of them is no such loss, or ``other`` has no critics, or others than SPAR's.

    Source: ours.

    Examples:
        >>> import torch
        >>> from copy import deepcopy
        >>> from tensordict.nn import NormalParamExtractor, TensorDictModule
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
        >>> from torchrl.objectives import IQLLoss, SoftUpdate
        >>> from torchrl_spar import make_spar_loss, make_toy_data, share_critics
        >>> spar = make_spar_loss(3, Bounded(-1, 1, (2,)), hidden=[8])
        >>> body = torch.nn.Sequential(MLP(3, 4, num_cells=[8]), NormalParamExtractor())
        >>> gaussian = TensorDictModule(body, ["observation"], ["loc", "scale"])
        >>> iql = IQLLoss(
        ...     ProbabilisticActor(gaussian, in_keys=["loc", "scale"], distribution_class=TanhNormal),
        ...     [deepcopy(spar.qvalue_network) for _ in range(4)],
        ...     ValueOperator(MLP(3, 1, num_cells=[8]), in_keys=["observation"]),
        ...     num_qvalue_nets=4, deactivate_vmap=True)
        >>> _ = share_critics(spar, iql)
        >>> both = torch.nn.ModuleList([spar, iql])  # its parameters() gives shared ones once
        >>> optimizer, updater = torch.optim.Adam(both.parameters(), lr=3e-4), SoftUpdate(spar, tau=0.01)
        >>> batch = make_toy_data().sample()
        >>> losses = [*spar(batch).items(), *iql(batch).items()]
        >>> sum(value for name, value in losses if name.startswith("loss_")).backward()
        >>> optimizer.step(); updater.step()
        >>> iql.qvalue_network_params is spar.qvalue_network_params
        True
    """
    check_spar_loss("spar", spar)
    if not isinstance(other, LossModule):
        raise InputError(f"other: a {type(other).__name__}; give a loss of TorchRL's, such as IQLLoss")
    names = ["qvalue_network"]
    if spar.has_value and "value_network_params" in other._modules:
        names.append("value_network")
    for name in names:
        params = other._modules.get(f"{name}_params")
        if params is None:
            raise InputError(f"{type(other).__name__} has no {name} to share")
        if (found := _shapes(params)) != (needed := _shapes(spar.network_params(name))):
            raise InputError(
                f"{name}: the parameters of {type(other).__name__} differ from SPAR's, {found} from {needed}; "
                f"give it {COPIES[name]}"
            )
    for name in names:
        setattr(other, f"{name}_params", spar.network_params(name))
        if (target := f"target_{name}_params") in other._modules and target in spar._modules:
            setattr(other, target, spar.target_params(name))
            other._has_update_associated[name] = True  # SPAR's updater: else TorchRL warns that there is none
    given: list[Any] = []  # the batch of the call, which gets the priorities
    other.register_forward_pre_hook(partial(_scale_rewards, spar, given))
    other.register_forward_hook(partial(_give_priorities, given))
    return other


def _shapes(params: Any) -> dict[Any, Size]:
    return {key: value.shape for key, value in params.items(True, True)}


def _scale_rewards(spar: SPARLoss, given: list[Any], other: LossModule, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not args:
        raise InputError(f"{type(other).__name__} shares SPAR's critics: call it with a TensorDict, not with keywords")
    given[:] = args[:1]
    batch, key = args[0].clone(False), ("next", other.tensor_keys.reward)
    batch["next"] = batch["next"].clone(False)
    return batch.set(key, spar.reward_scale * batch[key]), *args[1:]


def _give_priorities(given: list[Any], other: LossModule, args: tuple[Any, ...], output: Any) -> None:
    """What a loss writes for a prioritised buffer, into the caller's batch: it has seen a copy."""
    key, batch = getattr(other.tensor_keys, "priority", None), given.pop()
    priority = None if key is None else args[0].get(key, None)
    if priority is not None:
        batch.set(key, priority)
