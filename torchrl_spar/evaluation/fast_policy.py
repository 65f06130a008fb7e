"""A policy as a function of one tensor: for environments of 40 us a step, tensordicts and module calls are slow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import TanhModule

from torchrl_spar.anchor import FrozenAnchor
from torchrl_spar.mean_actor import MeanOutput
from torchrl_spar.networks import StateMLP, functional_of
from torchrl_spar.residual import SPARActor

Entries = dict[NestedKey, Tensor]
# Adds its outputs to the entries.
Stage = Callable[[Entries], None]


def action_function(policy: TensorDictModuleBase) -> Callable[[Tensor], Tensor]:
    """``observation [n, observation_dim] -> action [n, action_dim]``, the policy's own to the last bit.

    The default networks are called without tensordicts and modules; any other policy, or one
    with hooks, as the TensorDictModule it is.

    Args:
        policy: reads ``"observation"``, writes ``"action"``. Its tensors are looked up here: later
            changes in place are seen, a later replacement is not.

    Examples:
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import make_spar_loss
        >>> policy = make_spar_loss(3, Bounded(-1, 1, (2,))).actor
        >>> x = torch.randn(5, 3)
        >>> torch.equal(action_function(policy)(x), policy(observation=x))
        True
    """
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in policy.modules())
    stage = None if hooked else _stage(policy)
    if stage is None or policy.in_keys != ["observation"] or "action" not in policy.out_keys:
        return lambda observation: policy(
            TensorDict({"observation": observation}, observation.shape[:1], device=observation.device)
        ).get("action")

    def act(observation: Tensor) -> Tensor:
        entries: Entries = {"observation": observation}
        stage(entries)
        return entries["action"]

    return act


def _stage(module: nn.Module) -> Stage | None:
    """The module as a function on a dict of tensors; None if it may do more than this file knows of."""
    if type(module) is SPARActor:
        return _actor(module)
    if type(module) is FrozenAnchor:
        return _stage(module.actor)
    if type(module) is MeanOutput:
        return _mean(module)
    if type(module) is TensorDictSequential and isinstance(module.module, nn.ModuleList):
        return _sequence(*module.module)
    if type(module) is TanhModule:
        return _squash(module)
    if isinstance(module, TensorDictModule) and type(module).forward is TensorDictModule.forward:
        return _network(module)
    return None


def _sequence(*modules: nn.Module) -> Stage | None:
    stages = [stage for stage in map(_stage, modules) if stage is not None]
    if len(stages) < len(modules):
        return None

    def run(entries: Entries) -> None:
        for stage in stages:
            stage(entries)

    return run


def _mean(module: MeanOutput) -> Stage | None:
    stages = [stage for stage in map(_stage, module.members) if stage is not None]
    if len(stages) < len(module.members):
        return None

    def run(entries: Entries) -> None:
        [key], copies = module.out_keys, [dict(entries) for _ in stages]
        for stage, copy in zip(stages, copies):
            stage(copy)
        entries[key] = torch.stack([copy[key] for copy in copies]).mean(0)

    return run


def _actor(actor: SPARActor) -> Stage | None:
    last = [] if actor.decoder is None else [actor.decoder]
    anchor, residual = _stage(actor.anchor), _sequence(actor.head, *last)
    if anchor is None or residual is None:
        return None

    def run(entries: Entries) -> None:
        scratch = dict(entries)
        anchor(scratch)
        state = {**entries, actor.anchor_action_key: scratch[actor.action_key]}
        residual(state)
        entries[actor.action_key] = actor.compose(scratch[actor.action_key], state[actor.residual_key])

    return run


def _squash(module: TanhModule) -> Stage | None:
    """TorchRL's tanh to the action bounds, without its optional clamp."""
    if module.clamp or module.in_keys != ["action"] or module.out_keys != ["action"]:
        return None
    low, span = module.action_low, module.action_high - module.action_low

    def run(entries: Entries) -> None:
        entries["action"] = torch.tanh(entries["action"]).add_(1).mul_(span).div_(2).add_(low)

    return run


def _network(module: TensorDictModule) -> Stage | None:
    """A network that can be called with its parameters as a dict."""
    functional = functional_of(module.module) if type(module.module) is StateMLP else None
    if functional is None:
        return None
    call, keys = partial(functional, TensorDict.from_module(module.module).to_dict()), module.in_keys

    def run(entries: Entries) -> None:
        entries[module.out_keys[0]] = call(*(entries[key] for key in keys))

    return run
