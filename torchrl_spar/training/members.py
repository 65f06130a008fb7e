"""Several policies on one anchor, whose mean is deployed: the others of a pre-trained one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torchrl.data import ReplayBuffer, TensorDictReplayBuffer

from torchrl_spar.errors import check_names
from torchrl_spar.objective import SPARLoss
from torchrl_spar.training.pretrain import NO_OPTIONS, fit_critics, with_own_episodes
from torchrl_spar.training.progress import Progress
from torchrl_spar.training.sampling import without_own_entries


def make_member(
    loss: SPARLoss,
    data: ReplayBuffer,
    *,
    seed: int,
    critics: Mapping[str, Any] | None = NO_OPTIONS,
    episode_share: float = 0.5,
    progress: Progress | None = None,
    keep: Callable[[SPARLoss], SPARLoss] = lambda member: member,
    compile: bool = False,
) -> tuple[SPARLoss, TensorDictReplayBuffer]:
    """Another policy on the anchor and the VAE of a pre-trained one, with a head and critics of its own.

    Where a training ends depends on where its critics happen to err. Train each member as if it were alone and deploy
    their mean, ``mean_actor([member.actor for member in members], one_anchor=True)``: it errs less than most of them.

    Args:
        loss: pre-trained, see :func:`~torchrl_spar.pretrain`; not changed. It may be trained already.
        data: the rows that came with it.
        seed: of the new parameters and the critics' episodes. The state of torch's generator is left as it is.
        critics: options of :func:`~torchrl_spar.fit_critics`; None leaves the new critics as they are.
        episode_share: of the episodes, what each critic learns from after its start; see
            :func:`~torchrl_spar.with_member_weights`.
        progress: where to resume, see :class:`~torchrl_spar.Progress`; one of its own for each member.
        keep: called with the new loss before it is trained, and returns it: the place to load a checkpoint.
        compile: whether the critics' start goes through ``torch.compile``.

    Returns:
        The member, and rows for it as :func:`~torchrl_spar.pretrain` returns them.

    Raises:
        InputError: for an unknown or impossible option.
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
        >>> policy = mean_actor([loss.actor for loss, _ in members], one_anchor=True)
        >>> policy(observation=torch.zeros(3)).shape
        torch.Size([2])
    """
    member = deepcopy(loss)
    with torch.random.fork_rng(devices=[data[:1].device] if data[:1].device.type == "cuda" else []):
        torch.manual_seed(seed)
        member.reset_parameters_recursive()
        member.residual_vae_params.data.update_(loss.residual_vae_params.data)  # head B's decoder with it
        member.sync_targets()
        member = keep(member)
        if critics is not None:
            check_names(critics, fit_critics, prefix="critics.")
            data = without_own_entries(loss, data)
            fit_critics(member, data, **{"compile": compile, **critics, "progress": progress or Progress()})
            data = with_own_episodes(member, data, share=episode_share, seed=seed)
    return member, data
