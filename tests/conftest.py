"""Fixtures of all tests; what they share is in helpers.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import build_loss

from torchrl_spar import SPARLoss


@pytest.fixture
def make_loss() -> Callable[..., SPARLoss]:
    return build_loss


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "stress" in item.path.parts:
            item.add_marker("slow")
