"""One policy of several on one anchor: the mean of their residuals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential, dispatch
from torch import nn
from torchrl.data import Bounded

from torchrl_spar.errors import InputError
from torchrl_spar.residual import SPARActor

if TYPE_CHECKING:
    from torchrl_spar.objective import SPARLoss


def mean_actor(actors: Sequence[SPARActor]) -> SPARActor:
    """The policy of several members: ``pi(s) = clamp(a_b + rho * mean_i Delta_i(s, a_b), low, high)``.

    Where a training ends depends on where its critics happen to err. Others err elsewhere, so the mean varies less than
    one of them; where they choose different modes, it may lie in none.

    Args:
        actors: two or more with the same anchor, as members of one pre-training have
            (:func:`~torchrl_spar.make_member`); copied.

    Returns:
        The policy. It asks the anchor once; what scales the residual or falls back to the anchor takes it.

    Raises:
        InputError: for fewer than two actors, one that is no SPARActor or has a recurrent anchor, and actors that
            differ in their anchor, residual scale, bounds, type, device or keys.

    Source: ours; means of predictors are bagging, Breiman 1996 (https://doi.org/10.1007/BF00058655).

    Examples:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import make_anchor, make_spar_loss, mean_actor
        >>> spec = Bounded(-1, 1, (2,))
        >>> anchor = make_anchor(3, spec)
        >>> one, other = (make_spar_loss(3, spec, anchor=anchor).actor for _ in range(2))
        >>> x = torch.randn(5, 3)
        >>> mean = (one(observation=x) + other(observation=x)) / 2  # here nothing is clamped
        >>> torch.allclose(mean_actor([one, other])(observation=x), mean, atol=1e-6)
        True
    """
    if isinstance(actors, nn.Module) or not isinstance(actors, Iterable):
        raise InputError(f"actors: one {type(actors).__name__}; give a list of two or more")
    actors = [deepcopy(actor) for actor in actors]
    _check(actors)
    return unchecked_mean(actors)


def policy_of(losses: Sequence[SPARLoss]) -> SPARActor:
    """What is deployed of one loss, or of several members."""
    actors = [loss.actor for loss in losses]
    return mean_actor(actors) if len(actors) > 1 else actors[0]


def unchecked_mean(actors: Sequence[SPARActor]) -> SPARActor:
    """`mean_actor` with the anchor of the first, whatever the others have, and without copies."""
    first = actors[0]
    heads = [TensorDictSequential(actor.head, *filter(None, [actor.decoder])) for actor in actors]
    mean = SPARActor(
        first.anchor, MeanOutput(heads, first.residual_key),
        action_spec=Bounded(first.low, first.high, first.low.shape, dtype=first.low.dtype, device=first.low.device),
        anchor_action_key=first.anchor_action_key, residual_key=first.residual_key,
    )  # fmt: skip
    # The members' type: a SPARActor converts bounds to torch's default one.
    mean.low, mean.high, mean.residual_scale = first.low, first.high, first.residual_scale
    if all(actor.architecture for actor in actors):
        mean.architecture = {"mean_of": [actor.architecture for actor in actors]}
    return mean


def _check(actors: Sequence[SPARActor]) -> None:
    if len(actors) < 2:
        raise InputError(f"actors: {len(actors)} given; a mean needs at least two")
    for i, actor in enumerate(actors):
        if not isinstance(actor, SPARActor):
            raise InputError(f"actors[{i}]: a {type(actor).__name__}; give SPARActors")
        if actor.out_keys != [actor.action_key]:
            raise InputError(f"actors[{i}] writes {actor.out_keys}; a mean is of actors that write an action alone")
        for name in ("action_key", "anchor_action_key", "residual_key"):
            if getattr(actor, name) != getattr(actors[0], name):
                raise InputError(f"actors[{i}]: its {name} is not that of actors[0]")
        for name in ("low", "high", "residual_scale"):
            mine, first = getattr(actor, name), getattr(actors[0], name)
            if (mine.dtype, mine.device) != (first.dtype, first.device):
                raise InputError(f"actors[{i}]: of {mine.dtype} on {mine.device}, which are not those of actors[0]")
            if not torch.equal(mine, first):
                raise InputError(f"actors[{i}]: its {name} is not that of actors[0]")
        if not same_weights(actor.anchor, actors[0].anchor):
            raise InputError(f"actors[{i}]: its anchor is not that of actors[0]; members come from make_member")


def same_weights(one: TensorDictModuleBase, other: TensorDictModuleBase) -> bool:
    """Whether two modules have the same parameters and buffers, by name and value."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class MeanOutput(TensorDictModuleBase):
    """Writes the mean of what several modules write at a key, ``[*B, action_dim]``."""

    def __init__(self, members: Sequence[TensorDictModuleBase], key: NestedKey) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.in_keys = list(dict.fromkeys(key for member in members for key in member.in_keys))
        self.out_keys = [key]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Asks each member on a copy."""
        [key] = self.out_keys
        outputs = [member(tensordict.select(*self.in_keys)).get(key) for member in self.members]
        return tensordict.set(key, torch.stack(outputs).mean(0))
