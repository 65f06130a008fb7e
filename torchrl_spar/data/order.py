"""The order of rows, told by their next observations: which row continues in which."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# If more than this share of the rows continues in no other row, next observations say nothing about order: they are
# noise, or all rows are single transitions.
UNRELATED = 0.9
# A next observation equals the following observation up to float32 rounding and this share of a column's spread.
TOLERANCE = 1e-5
# Rows that tell a column's spread well enough.
SAMPLED = 20_000
# Odd numbers below 2^63 by which bits are mixed (multiples of 2^64 over the golden ratio).
_MIX = (0x1E3779B97F4A7C15, 0x3C6EF372FE94F82B)


class Links(NamedTuple):
    """Where ``n`` rows continue.

    ``linked``: in the following row. ``successor``: the row elsewhere in which an open row continues, -1 for none.
    ``open``: neither linked nor at an end that is told. ``same``: the following row has the same label.
    """

    linked: Tensor
    open: Tensor
    successor: Tensor
    same: Tensor

    @property
    def continued(self) -> Tensor:
        """Rows that continue elsewhere, ``[n]``."""
        return self.successor >= 0


def find_links(observation: Tensor, following: Tensor, end: Tensor, label: Tensor | None = None) -> Links:
    """The row in which each row continues.

    Only an open row's next observation is looked for elsewhere, and only among rows that follow none themselves; one
    that is there twice tells nothing. So states that recur do not count as order.

    Args:
        observation: ``[n, ...]``.
        following: the next observations, likewise.
        end: rows after which an episode is told to end, bool ``[n]``.
        label: a number for each row's episode, ``[n]``: rows continue within their own.

    Examples:
        >>> x = torch.tensor([[2.0], [0.0], [3.0], [1.0]])  # a shuffled episode 0, 1, 2, 3
        >>> find_links(x, x + 1, torch.zeros(4, dtype=torch.bool)).successor
        tensor([ 2,  3, -1,  0])
    """
    n = len(observation)
    observation, following = observation.reshape(n, -1), following.reshape(n, -1).to(observation.dtype)
    same = torch.ones_like(end)
    if label is not None:
        same[:-1] = label[1:] == label[:-1]
    linked = torch.zeros_like(end)
    linked[:-1] = equal_rows(following[:-1], observation[1:]) & same[:-1] & ~end[:-1]
    is_open = ~(linked | end)
    successor = torch.full((n,), -1, device=end.device)
    starts = torch.ones_like(end)
    starts[1:] = ~linked[:-1]
    rows, heads = is_open.nonzero().squeeze(-1), starts.nonzero().squeeze(-1)
    if len(rows):
        keys, order = _hashes(observation[heads], None if label is None else label[heads]).sort()
        sought = _hashes(following[rows], None if label is None else label[rows])
        place = torch.searchsorted(keys, sought).clamp_max(len(keys) - 1)
        alone = torch.ones_like(keys, dtype=torch.bool)
        alone[1:] &= keys[1:] != keys[:-1]
        alone[:-1] &= keys[1:] != keys[:-1]
        found = heads[order[place]]
        piece = starts.cumsum(0)
        good = (keys[place] == sought) & alone[place] & (piece[found] != piece[rows])
        claims = torch.bincount(place[good], minlength=len(keys))[place]
        good &= claims == 1
        successor[rows[good]] = found[good]
    return Links(linked, is_open, successor, same)


def is_cut(links: Links) -> Tensor:
    """Rows that end an episode though no flag says so, bool ``[n]``: none where next observations are unrelated.

    Examples:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [7.0], [8.0]])
        >>> is_cut(find_links(x, x + 1, torch.zeros(5, dtype=torch.bool)))
        tensor([False, False,  True, False, False])
    """
    broken = links.open & links.same
    broken[-1:] = False
    return broken & (not are_unrelated(links))


def are_unrelated(links: Links) -> bool:
    """Whether the rows' next observations are nearly all unlike any other row's observation.

    Examples:
        >>> x = torch.randn(100, 3)
        >>> are_unrelated(find_links(x, torch.randn(100, 3), torch.zeros(100, dtype=torch.bool)))
        True
    """
    broken = int((links.open & links.same)[:-1].sum())
    return broken > UNRELATED * (broken + int(links.linked.sum()))


def chained(links: Links) -> Tensor:
    """The rows' indices, ``[n]``, so that each continues in the following one wherever that is known.

    Examples:
        >>> x = torch.tensor([[2.0], [0.0], [3.0], [1.0]])
        >>> chained(find_links(x, x + 1, torch.zeros(4, dtype=torch.bool)))
        tensor([1, 3, 0, 2])
    """
    device = links.linked.device
    n = len(links.linked)
    stops = (~links.linked).nonzero().squeeze(-1)
    starts = torch.cat([stops.new_zeros(1), stops[:-1] + 1])
    after = links.successor[stops]
    piece = torch.searchsorted(starts, after)  # the piece that begins with the successor
    later = torch.where(after < 0, -1, piece).tolist()
    first = torch.ones(len(starts), dtype=torch.bool, device=device)
    first[piece[after >= 0]] = False
    walk: list[int] = []
    seen = [False] * len(later)
    for head in [*first.nonzero().squeeze(-1).tolist(), *range(len(later))]:  # the second part: circles
        while head >= 0 and not seen[head]:
            seen[head] = True
            walk.append(head)
            head = later[head]
    pieces = torch.tensor(walk, device=device)
    lengths = (stops - starts + 1)[pieces]
    begin = lengths.cumsum(0) - lengths
    return torch.arange(n, device=device) + (starts[pieces] - begin).repeat_interleave(lengths)


def equal_rows(left: Tensor, right: Tensor) -> Tensor:
    """Whether two rows are the same but for rounding, bool ``[n]`` of ``[n, d]``.

    Examples:
        >>> equal_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0000001], [1.9]]))
        tensor([ True, False])
    """
    equal = (left == right).all(-1)
    rows = (~equal).nonzero().squeeze(-1)
    if len(rows) and left.is_floating_point():
        some = right[:: max(1, len(right) // SAMPLED)].double()
        spread = some.std(0, correction=0).to(right.dtype) if len(some) > 1 else right.new_zeros(1)
        difference = (left[rows] - right[rows]).abs()
        equal[rows] = (difference <= TOLERANCE * spread + 1e-6 * right[rows].abs()).all(-1)
    return equal


def _hashes(rows: Tensor, label: Tensor | None) -> Tensor:
    """A number for each row's exact values and label, int64 ``[n]``."""
    if not rows.is_floating_point():
        rows = rows.double()
    rows = (rows + 0.0).contiguous()  # -0 becomes 0
    bits = rows.view(
        torch.int64 if rows.dtype == torch.float64 else torch.int32 if rows.element_size() == 4 else torch.int16
    )
    total = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for column in bits.unbind(-1):
        total = (total ^ column.long()) * _MIX[0] + _MIX[1]
        total ^= total >> 29
    return total if label is None else (total ^ label.long()) * _MIX[0]
