"""Several policies on one anchor, whose mean is deployed: the others of a pre-trained one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from numbers import Integral
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer, TensorDictReplayBuffer

from torchrl_spar.conventions import check_spar_loss
from torchrl_spar.errors import InputError, check_options
from torchrl_spar.objective import SPARLoss
from torchrl_spar.training.pretrain import NO_OPTIONS, Report, check_options_of, fit_critics, with_own_episodes
from torchrl_spar.training.progress import Progress
from torchrl_spar.training.sampling import without_own_entries


def make_member(
    loss: SPARLoss,
    data: ReplayBuffer,
    *,
    seed: int,
    critics: Mapping[str, Any] | None = NO_OPTIONS,
    episode_share: float = 0.5,
    report: Report | None = None,
    progress: Progress | None = None,
    keep: Callable[[SPARLoss], SPARLoss] = lambda member: member,
    compile: bool = False,
) -> tuple[SPARLoss, TensorDictReplayBuffer]:
    """Another policy on the anchor and the VAE of a pre-trained one, with a head and critics of its own.

    Where a training ends depends on where its critics happen to err. Train each member as if it were alone and deploy
    their mean, ``mean_actor([member.actor for member in members])``: it varies less than one of them.

    Args:
        loss: pre-trained, see :func:`~torchrl_spar.pretrain`; not changed. It may be trained already.
        data: the rows that came with it. Their critics' episodes and targets are not used.
        seed: of the new parameters, which the networks' ``reset_parameters`` draw, and of the critics' episodes. The
            state of torch's generator is left as it is. Parameters of the loss that do not require gradients
            are the first's; of a single critic, which SPARLoss copies and draws anew, all require them.
        critics: options of :func:`~torchrl_spar.fit_critics`; None leaves the new critics as they are.
        episode_share: of the episodes, what each critic learns from after its start; see
            :func:`~torchrl_spar.with_member_weights`.
        report: called as ``report(step, metrics)`` after every step of the critics' start.
        progress: where to resume, see :class:`~torchrl_spar.Progress`; one of its own for each member.
        keep: called with the new loss before it is trained, and returns it: the place to load a checkpoint.
        compile: whether the critics' start goes through ``torch.compile``.

    Returns:
        The member, and rows for it as :func:`~torchrl_spar.pretrain` returns them.

    Raises:
        InputError: for an unknown or impossible option, or networks that cannot be reset.
        NonFiniteError: within 100 steps of a loss or parameter that is NaN or infinite.

    Source: ours.

    Examples:
        >>> import torch
        >>> from torchrl_spar import SPARUpdate, make_member, make_toy_data, mean_actor, pretrain
        >>> few = {"steps": 2}
        >>> first = pretrain(make_toy_data(), anchor=few, vae=few, critics=few)
        >>> members = [first, make_member(*first, seed=1, critics=few), make_member(*first, seed=2, critics=few)]
        >>> for loss, rows in members:
        ...     metrics = SPARUpdate(loss)(rows.sample())
        >>> policy = mean_actor([loss.actor for loss, _ in members])
        >>> policy(observation=torch.zeros(3)).shape
        torch.Size([2])
    """
    check_spar_loss("loss", loss)
    is_whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    check_options((is_whole and 0 <= seed < 2**63, "seed", seed, "a whole number from 0 to 2**63 - 1"))
    seed = int(seed)
    member, device, data = deepcopy(loss), loss.residual_scale.device, without_own_entries(loss, data)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        member.reset_parameters_recursive()
        member.residual_vae_params.data.update_(loss.residual_vae_params.data)  # head B's decoder with it
        _keep_frozen(loss, member)
        member.sync_targets()
        _check_new(loss, member)
        member = keep(member)
        if critics is not None:
            check_options_of("critics", critics, fit_critics)
            options = {"compile": compile, **critics, "progress": progress or Progress(), "report": report}
            fit_critics(member, data, **options)
            data = with_own_episodes(member, data, share=episode_share, seed=seed)
    return member, data


def _networks(loss: SPARLoss) -> dict[str, TensorDictBase]:
    """What is a member's own."""
    value = {"the value network": loss.value_network_params} if loss.has_value else {}
    return {"the head": loss.actor_network_params["head"], "a critic": loss.qvalue_network_params, **value}


@torch.no_grad()
def _keep_frozen(loss: SPARLoss, member: SPARLoss) -> None:
    """Layers that are not trained, such as features of images, are not drawn anew."""
    for old, new in zip(_networks(loss).values(), _networks(member).values()):
        for key, tensor in old.items(True, True):
            if not tensor.requires_grad:
                new[key].data.copy_(tensor)


def _check_new(loss: SPARLoss, member: SPARLoss) -> None:
    """Refuses weights that no module resets: they would be those of the first."""
    new = _networks(member)
    for name, params in _networks(loss).items():
        for key, tensor in params.items(True, True):
            is_constant = (tensor == tensor.flatten()[0]).all()  # as a layer norm starts
            if tensor.requires_grad and torch.equal(tensor, new[name][key]) and not is_constant:
                raise InputError(f"{name}: no reset_parameters() of its modules draws {key} anew; give it one")
