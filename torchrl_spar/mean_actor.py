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


def mean_actor(actors: Sequence[SPARActor]) -> SPARActor:
    """The mean of several runs of SPAR as one policy: ``pi(s) = mean_i pi_i(s)``, on the mean of their anchors.

    What a run ends at depends on where its critics happen to err. Runs of other seeds err elsewhere, so their mean
    varies less than one of them; where they choose different modes, it may lie in neither. Its anchor and its residual
    are those of any :class:`~torchrl_spar.SPARActor`: what scales the residual or falls back to the anchor takes it.

    Args:
        actors: two or more, of one data set; copied.

    Returns:
        The policy. Its ``residual_scale`` is the mean of theirs.

    Raises:
        InputError: for fewer than two actors, one that is no SPARActor or has a recurrent anchor, and actors that
            differ in type, device, bounds or action key.

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
    scale = torch.stack([actor.residual_scale for actor in actors]).mean(0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # 0: no member leaves its anchor, but anchors differ
    anchor_key, residual_key = first.anchor_action_key, first.residual_key
    head = TensorDictSequential(
        MeanAction(actors, first.action_key, MEAN),
        TensorDictModule(ScaledDifference(scale), [MEAN, anchor_key], [residual_key]),
    )
    spec = Bounded(first.low, first.high, first.low.shape, dtype=first.low.dtype, device=first.low.device)
    mean = SPARActor(
        MeanAction([actor.anchor for actor in actors], first.action_key, first.action_key), head,
        action_spec=spec, anchor_action_key=anchor_key, residual_key=residual_key,
    )  # fmt: skip
    # In the members' type: a SPARActor reads bounds in torch's default one.
    mean.low, mean.high, mean.residual_scale = first.low.clone(), first.high.clone(), scale.clone()
    if all(actor.architecture for actor in actors):
        mean.architecture = {"mean_of": [actor.architecture for actor in actors]}
    return mean


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


class MeanAction(TensorDictModuleBase):
    """Writes the mean of the actions of several actors, ``[*B, action_dim]``."""

    def __init__(self, actors: Sequence[TensorDictModuleBase], action_key: NestedKey, out_key: NestedKey) -> None:
        super().__init__()
        self.actors = nn.ModuleList(actors)
        self.action_key = action_key
        self.in_keys = list(dict.fromkeys(key for actor in actors for key in actor.in_keys))
        self.out_keys = [out_key]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Asks each actor on a copy."""
        actions = [actor(tensordict.select(*self.in_keys)).get(self.action_key) for actor in self.actors]
        return tensordict.set(self.out_keys[0], torch.stack(actions).mean(0))


class ScaledDifference(nn.Module):
    """``(action - a_b) / rho``: the residual that leads from the anchor's action to another."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.clone())

    def forward(self, action: Tensor, anchor_action: Tensor) -> Tensor:
        return (action - anchor_action) / self.scale
