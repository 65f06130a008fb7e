"""Few combinations of many options that hold every pair of values together at least once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]


def pairs_of(row: Row) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(combinations(sorted(row.items(), key=lambda item: item[0]), 2))


def pairwise(options: Mapping[str, Sequence[Any]], possible: Callable[[Row], bool]) -> list[Row]:
    """Greedily: each row starts from a pair not yet held, then takes the values that add most.

    ``possible`` says whether a row, complete or not, makes sense.
    """
    left = [
        {first: one, second: two}
        for first, second in combinations(sorted(options), 2)
        for one in options[first]
        for two in options[second]
        if possible({first: one, second: two})
    ]
    missing = {pair for row in left for pair in pairs_of(row)}
    rows = []
    while missing:
        row = dict(next(pair for pair in left if pairs_of(pair) <= missing))
        for name in sorted(options, key=lambda name: -len(options[name])):
            if name not in row:
                choices = [{**row, name: value} for value in options[name] if possible({**row, name: value})]
                row = max(choices, key=lambda choice: len(pairs_of(choice) & missing))
        missing -= pairs_of(row)
        rows.append(row)
    return rows
