"""d3rlpy's FQE is asked about the policy we give it: on a problem whose values are known."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_spar import load_offline_dataset

pytest.importorskip("d3rlpy")
from benchmarks.d3rlpy_peer import fqe_values


class Constant(nn.Module):
    def __init__(self, action):
        super().__init__()
        self.action = action

    def forward(self, observation):
        return torch.full_like(observation[..., :1], self.action)


def test_two_steps_of_a_known_reward():
    # Each step earns 1 + a. Nothing in a state tells first steps from last ones, so half of them end: the value of a
    # constant action is v = 1 + a + 0.5 * v / 2.
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(500, 3, 2, generator=generator)
    action = torch.rand(500, 2, 1, generator=generator) * 2 - 1
    terminated = torch.tensor([[False], [True]]).expand(500, 2, 1)
    step = {"observation": states[:, 1:], "reward": 1 + action, "terminated": terminated}
    data = load_offline_dataset(TensorDict({"observation": states[:, :-1], "action": action, "next": step}, [500, 2]))
    policies = {
        str(action): TensorDictModule(Constant(action), in_keys=["observation"], out_keys=["action"])
        for action in (0.5, -0.5)
    }
    values = fqe_values(policies, data, steps=1_500, gamma=0.5, seed=0)
    assert values["0.5"] == pytest.approx(1.5 / 0.75, abs=0.1)
    assert values["-0.5"] == pytest.approx(0.5 / 0.75, abs=0.1)
