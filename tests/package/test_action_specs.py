"""What SPAR cannot act in is refused, with the reason."""

from __future__ import annotations

import pytest
import torch
from torchrl.data import Binary, Bounded, Categorical, Composite, MultiCategorical, MultiOneHot, OneHot, Unbounded

from torchrl_spar import InputError, make_anchor, make_spar_loss

DISCRETE = [
    Categorical(4), OneHot(4), MultiCategorical([3, 2]), MultiOneHot([3, 2]), Binary(4),
    Bounded(0, 3, (2,), dtype=torch.int64),
]  # fmt: skip


@pytest.mark.parametrize("make", [make_anchor, make_spar_loss])
@pytest.mark.parametrize("spec", DISCRETE, ids=lambda spec: type(spec).__name__)
def test_discrete_actions(make, spec):
    for given in (spec, Composite(action=spec)):
        with pytest.raises(InputError, match="discrete actions cannot carry"):
            make(3, given)


def test_bounds_of_another_float_type_become_the_networks():
    loss = make_spar_loss(3, Bounded(-1, 1, (2,), dtype=torch.float64), hidden=[4])
    assert loss.actor(observation=torch.zeros(1, 3)).dtype == torch.float32


@pytest.mark.parametrize("make", [make_anchor, make_spar_loss])
def test_actions_without_bounds(make):
    with pytest.raises(InputError, match=r"Unbounded: .*Bounded with the least and the largest action"):
        make(3, Unbounded((2,)))
    with pytest.raises(InputError, match=r"finite bounds"):
        make(3, Bounded(-torch.inf, 1, (2,)))
    with pytest.raises(InputError, match=r"no 'action'; its keys are \['move'\]"):
        make(3, Composite(move=Bounded(-1, 1, (2,))))
