"""d3rlpy's Fitted Q Evaluation of our policies: another library's answer to the question of ope_study.py.

d3rlpy pins an older Gymnasium, so it is no extra of this package: `pip install --no-deps d3rlpy` and what it imports.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import structlog
import torch
from d3rlpy import seed as set_seed
from d3rlpy.dataset import MDPDataset
from d3rlpy.logging import NoopAdapterFactory
from d3rlpy.ope import FQE, FQEConfig
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_spar.data.buffer import OfflineReplayBuffer
from torchrl_spar.data.returns import episode_ends
from torchrl_spar.data.rows import rows_of


def fqe_values(
    policies: Mapping[str, TensorDictModuleBase], data: OfflineReplayBuffer, *, steps: int, gamma: float, seed: int
) -> dict[str, float]:
    """The mean value of the data's initial states by d3rlpy's FQE with its defaults, by policy.

    Args:
        policies: deterministic, from ``"observation"`` to ``"action"``, on the CPU.
        data: in the order of time, with vectors as observations; d3rlpy sees all of its episodes.
        steps: gradient steps for each policy.
        gamma: discount.
        seed: of networks and batches, the same for each policy.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    rows = rows_of(data).cpu()
    end = episode_ends(rows).reshape(-1)
    terminated = rows["next", "terminated"].reshape(-1)
    first = torch.cat([end.new_ones(1), end[:-1]])
    dataset = MDPDataset(
        rows["observation"].numpy(),
        rows["action"].numpy(),
        rows["next", "reward"].reshape(-1).numpy(),
        terminated.float().numpy(),
        (end & ~terminated).float().numpy(),
    )
    initial = rows["observation"][first]
    values: dict[str, float] = {}
    for name, policy in policies.items():
        set_seed(seed)
        asked = Asked(policy)
        fqe = FQE(SimpleNamespace(impl=asked), FQEConfig(gamma=gamma))
        fqe.fit(dataset, steps, n_steps_per_epoch=steps, logger_adapter=NoopAdapterFactory(), show_progress=False)
        action = asked.predict_best_action(initial)
        values[name] = float(np.mean(fqe.predict_value(initial.numpy(), action.numpy())))
    return values


class Asked:
    """A policy as the algorithm that d3rlpy evaluates."""

    def __init__(self, policy: TensorDictModuleBase) -> None:
        self.policy = policy

    @torch.no_grad()
    def predict_best_action(self, observation: Tensor) -> Tensor:
        return self.policy(TensorDict({"observation": observation}, observation.shape[:1]))["action"]
