"""An actor's actions in every state of a data set, checked: what is wrong with them is named before anything trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from torchrl_spar.errors import InputError, first_line
from torchrl_spar.objective import ROWS_PER_CALL


@torch.no_grad()
def actions_of(
    name: str,
    act: Callable[[TensorDictBase], Tensor],
    in_keys: Sequence[NestedKey],
    rows: TensorDictBase,
    like: Tensor,
    *,
    if_missing: str = "",
    if_random: str | None = None,
) -> Tensor:
    """The actions ``[*B, action_dim]`` that an actor writes for rows ``[*B]``, in the type of the data's.

    Args:
        name: of the actor, such as ``"the anchor"``.
        act: gives the actions of some of the rows.
        in_keys: what it reads.
        rows: the states.
        like: the data's actions, whose shape the actor's must have.
        if_missing: what to do where an entry is missing.
        if_random: what to do where the same state gets another action; None allows it.

    Raises:
        InputError: if the rows lack an entry, or the actor fails on them, writes actions of another shape, NaN or
            infinity, or, with ``if_random``, draws its actions.

    Examples:
        >>> from tensordict import TensorDict
        >>> rows = TensorDict({"observation": torch.zeros(4, 3)}, [4])
        >>> actions_of("the policy", lambda part: part["observation"], ["observation"], rows, torch.zeros(4, 2))
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: the policy writes actions of shape (3,) a row; the data's are of shape (2,)
    """
    if missing := [key for key in in_keys if key not in rows.keys(True)]:
        raise InputError(f"the data lacks {missing}, which {name} reads{if_missing}")
    rows = rows.select(*in_keys)
    try:
        actions = torch.cat([act(part) for part in rows.split(ROWS_PER_CALL)]).to(like.dtype)
        first, again = (act(rows[:1]) for _ in range(2))
    except RuntimeError as err:
        kinds = {key: f"{list(rows[key].shape[1:])} {rows[key].dtype} {rows[key].device}" for key in in_keys}
        raise InputError(f"{name} cannot take the data, which holds {kinds}: {first_line(err)}") from err
    if actions.shape != like.shape:
        raise InputError(
            f"{name} writes actions of shape {tuple(actions.shape[1:])} a row; the data's are of shape "
            f"{tuple(like.shape[1:])}"
        )
    finite = actions.flatten(1).isfinite().all(-1)
    if not finite.all():
        raise InputError(
            f"{name} writes NaN or infinity for {int((~finite).sum())} of {len(finite)} rows, the first is row "
            f"{int((~finite).nonzero()[0])}"
        )
    if if_random is not None and not torch.equal(first, again):
        raise InputError(f"{name}'s action is random: asked again, it gives another one to the same state{if_random}")
    return actions
