"""One policy of several: the mean of what they do."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, dispatch
from torch import Tensor, nn
from torchrl.data import Bounded

from torchrl_spar.errors import InputError
from torchrl_spar.residual import SPARActor

MEAN = "mean_action"


def mean_actor(actors: Sequence[SPARActor], *, one_anchor: bool = False) -> SPARActor:
    """The mean of several policies of SPAR as one: ``pi(s) = mean_i pi_i(s)``, on the mean of their anchors.

    What a training ends at depends on where its critics happen to err. Others err elsewhere, so their mean
    varies less than one of them; where they choose different modes, it may lie in neither. Its anchor and its residual
    are those of any :class:`~torchrl_spar.SPARActor`: what scales the residual or falls back to the anchor takes it.

    Args:
        actors: two or more, of one data set; copied.
        one_anchor: whether they share their anchor, as members of one pre-training do
            (:func:`~torchrl_spar.make_member`). It is then kept once, and the residuals are averaged:
            ``pi(s) = clamp(a_b + rho * mean_i Delta_i(s, a_b), low, high)``.

    Returns:
        The policy. Its ``residual_scale`` is the mean of theirs.

    Raises:
        InputError: for fewer than two actors, one that is no SPARActor or has a recurrent anchor, and actors that
            differ in type, device, bounds or action key; with ``one_anchor``, in their anchor or residual scale.

    Source: ours. Averages over seeds are bagging, Breiman 1996 (https://doi.org/10.1007/BF00058655).

    Examples:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import make_spar_loss, mean_actor
        >>> one, other = (make_spar_loss(3, Bounded(-1, 1, (2,))).actor for _ in range(2))
        >>> x = torch.randn(5, 3)
        >>> mean = (one(observation=x) + other(observation=x)) / 2
        >>> torch.allclose(mean_actor([one, other])(observation=x), mean, atol=1e-6)
        True
    """
    actors = [deepcopy(actor) for actor in actors]
    _check(actors)
    first = actors[0]
    if one_anchor:
        _check_one_anchor(actors)
        heads = [
            actor.head if actor.decoder is None else TensorDictSequential(actor.head, actor.decoder) for actor in actors
        ]
        anchor: TensorDictModuleBase = first.anchor
        head: TensorDictModuleBase = MeanOutput(heads, first.residual_key, first.residual_key)
        scale = first.residual_scale
    else:
        anchor = MeanOutput([actor.anchor for actor in actors], first.action_key, first.action_key)
        scale = torch.stack([actor.residual_scale for actor in actors]).mean(0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # 0: no member leaves its anchor
        head = TensorDictSequential(
            MeanOutput(actors, first.action_key, MEAN),
            TensorDictModule(ScaledDifference(scale), [MEAN, first.anchor_action_key], [first.residual_key]),
        )
    spec = Bounded(first.low, first.high, first.low.shape, dtype=first.low.dtype, device=first.low.device)
    keys = {"anchor_action_key": first.anchor_action_key, "residual_key": first.residual_key}
    mean = SPARActor(anchor, head, action_spec=spec, **keys)
    # In the members' type: a SPARActor reads bounds in torch's default one.
    mean.low, mean.high, mean.residual_scale = first.low.clone(), first.high.clone(), scale.clone()
    if all(actor.architecture for actor in actors):
        mean.architecture = {"mean_of": [actor.architecture for actor in actors], "one_anchor": one_anchor}
    return mean


def rebuild_mean(actors: Sequence[SPARActor], one_anchor: bool) -> SPARActor:
    """A mean of untrained actors, whose anchors differ although those of a saved mean did not."""
    for actor in actors[1:] if one_anchor else ():
        actor.anchor = actors[0].anchor
    return mean_actor(actors, one_anchor=one_anchor)


def _check(actors: Sequence[SPARActor]) -> None:
    if len(actors) < 2:
        raise InputError(f"actors: {len(actors)} given; a mean needs at least two")
    for i, actor in enumerate(actors):
        if not isinstance(actor, SPARActor):
            raise InputError(f"actors[{i}]: a {type(actor).__name__}; give SPARActors")
        if actor.out_keys != actors[0].out_keys or actor.out_keys != [actor.action_key]:
            raise InputError(f"actors[{i}] writes {actor.out_keys}; all must write the same key, and only that")
        low, high = actor.low, actor.high
        if (low.dtype, low.device) != (actors[0].low.dtype, actors[0].low.device):
            raise InputError(f"actors[{i}]: of {low.dtype} on {low.device}, which are not those of actors[0]")
        if not torch.equal(low, actors[0].low) or not torch.equal(high, actors[0].high):
            raise InputError(f"actors[{i}]: its action bounds are not those of actors[0]")


def _check_one_anchor(actors: Sequence[SPARActor]) -> None:
    for i, actor in enumerate(actors):
        if not same_weights(actor.anchor, actors[0].anchor):
            raise InputError(f"one_anchor=True: the anchor of actors[{i}] has other weights than that of actors[0]")
        if not torch.equal(actor.residual_scale, actors[0].residual_scale):
            raise InputError(f"one_anchor=True: the residual_scale of actors[{i}] is not that of actors[0]")
        if (actor.residual_key, actor.anchor_action_key) != (actors[0].residual_key, actors[0].anchor_action_key):
            raise InputError(f"one_anchor=True: the keys of actors[{i}] are not those of actors[0]")


def same_weights(one: TensorDictModuleBase, other: TensorDictModuleBase) -> bool:
    """Whether two modules have the same parameters and buffers, by name and value."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class MeanOutput(TensorDictModuleBase):
    """Writes the mean of what several modules write at a key, ``[*B, action_dim]``."""

    def __init__(self, members: Sequence[TensorDictModuleBase], key: NestedKey, out_key: NestedKey) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.key = key
        self.in_keys = list(dict.fromkeys(key for member in members for key in member.in_keys))
        self.out_keys = [out_key]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Asks each member on a copy."""
        outputs = [member(tensordict.select(*self.in_keys)).get(self.key) for member in self.members]
        return tensordict.set(self.out_keys[0], torch.stack(outputs).mean(0))


class ScaledDifference(nn.Module):
    """``(action - a_b) / rho``: the residual that leads from the anchor's action to another."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.clone())

    def forward(self, action: Tensor, anchor_action: Tensor) -> Tensor:
        return (action - anchor_action) / self.scale
