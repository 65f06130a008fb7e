"""The policy that a recipe is given: the file of a method of compare.py, or networks of your own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict.nn import TensorDictModuleBase

from harness.environment import function_at
from torchrl_spar import InputError, load_policy
from torchrl_spar.errors import first_line

# The fact in a policy file that holds kind and sizes of networks other than SPAR's.
FACT = "compare_network"
# The options `policy` and `actor`.
POLICY = "File written by save_policy, e.g. policy.pt of a run; with actor=... the weights of those networks, or null."
ACTOR = (
    "Networks of your own: module.function that returns the policy, a TensorDictModule from observation to action. The "
    "module's folder must be on PYTHONPATH."
)


def read_actor(path: str | Path, device: torch.device | None = None) -> tuple[TensorDictModuleBase, dict[str, Any]]:
    """`load_policy` that also knows the networks of rivals and ablations."""

    def build(facts: dict[str, Any]) -> TensorDictModuleBase | None:
        if FACT not in facts:
            return None
        # Imported only here: they load every method.
        from ablations import no_anchor
        from rivals import models

        builders = {"no_anchor": no_anchor.rebuild} | {kind: partial(models.rebuild, kind) for kind in models.ACTORS}
        sizes = {**facts[FACT]}
        if (kind := sizes.pop("kind")) not in builders:
            raise InputError(f"{path}: of networks {kind!r}; this version knows {', '.join(builders)}")
        with torch.random.fork_rng(devices=[]):
            return builders[kind](**sizes)

    return load_policy(path, policy=build, device=device)


def load_actor(cfg: DictConfig, device: torch.device | None = None) -> tuple[TensorDictModuleBase, dict[str, Any], str]:
    """The policy, the facts that were saved with it, and what to call it in a message.

    Raises:
        InputError: if neither option is given, the function fails or returns something else, or its networks are not
            those of the file.
    """
    if cfg.actor is None:
        if cfg.policy is None:
            raise InputError("policy: must be given, as policy=..., or actor=module.function for your own networks")
        return *read_actor(cfg.policy, device), f"policy={cfg.policy}"
    name = f"actor={cfg.actor}"
    try:
        actor = function_at(cfg.actor, "actor")()
    except InputError:
        raise
    except Exception as err:  # the user's own code
        raise InputError(f"{name}: it fails, called without arguments ({first_line(err)})") from err
    if not isinstance(actor, TensorDictModuleBase):
        raise InputError(f"{name}: must return a TensorDictModule, and returns a {type(actor).__name__}")
    if actor.in_keys != ["observation"] or "action" not in actor.out_keys:
        keys = f"from {', '.join(map(str, actor.in_keys))} to {', '.join(map(str, actor.out_keys))}"
        raise InputError(f"{name}: must lead from observation to action, and leads {keys}")
    if actor.out_keys != ["action"]:
        actor = actor.select_out_keys("action")
    actor.eval()
    if cfg.policy is None:
        return actor.to(device or "cpu"), {}, name
    return *load_policy(cfg.policy, policy=actor, device=device), f"policy={cfg.policy}"
