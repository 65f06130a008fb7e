"""Calls of a module with parameters it does not own: directly for this package's networks, else through tensordict.

Binding parameters with ``to_module`` and passing tensordicts costs more than the work of a small network.
A network with ``functional(params, *inputs)`` is called without either, where that does the same (functional_of).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor
from torch.func import vmap

from torchrl_spar.errors import InputError
from torchrl_spar.networks import functional_of


def call(
    module: TensorDictModuleBase,
    params: TensorDictBase | None,
    state: TensorDictBase,
    entries: Mapping[NestedKey, Tensor],
    *,
    frozen: bool = False,
) -> dict[NestedKey, Tensor]:
    """What ``module`` writes with ``params``, by key.

    Args:
        module: any TensorDictModule.
        params: its parameters and buffers, nested as in the module; None where it has none.
        state: batch ``[*B]``; not changed.
        entries: inputs beside the state's, ``[*L, *B, features]``; the state repeats along ``L``.
        frozen: whether gradients pass through the module and leave ``params`` as they are.

    Examples:
        >>> from tensordict import TensorDict
        >>> linear = TensorDictModule(torch.nn.Linear(3, 2), ["observation"], ["action"])
        >>> params = TensorDict.from_module(linear)
        >>> call(linear, params, TensorDict({"observation": torch.zeros(5, 3)}, [5]), {})["action"].shape
        torch.Size([5, 2])
    """
    network = _direct(module)
    if frozen and params is not None:
        params = params.detach()
    if network is None or params is None:
        return _through_tensordict(module, params, state, entries)
    outputs = network(params.to_dict()["module"], *_inputs(module, state, entries))
    return dict(zip(module.out_keys, outputs if isinstance(outputs, tuple) else (outputs,)))


def dtype_of(name: torch.dtype | str | None) -> torch.dtype | None:
    """The floating type of that name, as ``"bfloat16"``; a type or None stays as it is.

    Examples:
        >>> dtype_of("bfloat16")
        torch.bfloat16
    """
    dtype = getattr(torch, name, name) if isinstance(name, str) else name
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"candidate_dtype={name}: must be a floating type of torch, such as bfloat16")
    return dtype


def call_ensemble(
    module: TensorDictModuleBase,
    params: TensorDictBase,
    state: TensorDictBase,
    entries: Mapping[NestedKey, Tensor],
    *,
    out_key: NestedKey,
    dtype: torch.dtype | None = None,
    at_once: bool = False,
) -> Tensor:
    """One output of every member of an ensemble, ``[E, *L, *B, features]``.

    Args:
        module: one member.
        params: stacked along a first dimension E; a batch of no dimension is one member.
        state: as for :func:`call`.
        entries: as for :func:`call`.
        out_key: the output.
        dtype: what this package's networks compute their hidden layers in, without gradient.
        at_once: whether ``vmap`` runs such a network's members, as pays where ``vmap`` runs the whole call anyway.

    Source: ours. A loop, not ``vmap``, which takes LayerNorm apart and is slower on a CPU.

    Examples:
        >>> from tensordict import TensorDict
        >>> linear = TensorDictModule(torch.nn.Linear(3, 2), ["observation"], ["action"])
        >>> params = TensorDict.from_modules(linear, linear)
        >>> state = TensorDict({"observation": torch.zeros(5, 3)}, [5])
        >>> call_ensemble(linear, params, state, {}, out_key="action").shape
        torch.Size([2, 5, 2])
    """
    check_written(module.out_keys, out_key, "a critic")
    network = _direct(module)
    if network is None:
        members = params.unbind(0) if params.ndim else (params,)
        return torch.stack([_through_tensordict(module, member, state, entries)[out_key] for member in members])
    nested, inputs = params.to_dict()["module"], _inputs(module, state, entries)
    if at_once and params.ndim:
        return vmap(lambda member: network(member, *inputs))(nested)
    dicts = _unbound(nested, params.batch_size[0]) if params.ndim else [nested]
    options = {} if dtype is None else {"dtype": dtype}
    return torch.stack([network(member, *inputs, **options) for member in dicts])


def check_written(out_keys: Collection[NestedKey], key: NestedKey, writer: str) -> None:
    """Raises an :class:`~torchrl_spar.InputError` where a network does not write this entry."""
    if key not in out_keys:
        raise InputError(f"{writer} writes {list(out_keys)}, not {key!r}: tell the loss its keys by set_keys")


def _direct(module: TensorDictModuleBase) -> Any:
    """The network's ``functional``, if the module does nothing but call the network; else None."""
    plain = isinstance(module, TensorDictModule) and type(module).forward is TensorDictModule.forward
    return functional_of(module.module) if plain and not (module._forward_hooks or module._forward_pre_hooks) else None


def _inputs(module: TensorDictModuleBase, state: TensorDictBase, entries: Mapping[NestedKey, Tensor]) -> list[Tensor]:
    return [entries[key] if key in entries else state[key] for key in module.in_keys]


def _through_tensordict(
    module: TensorDictModuleBase,
    params: TensorDictBase | None,
    state: TensorDictBase,
    entries: Mapping[NestedKey, Tensor],
) -> dict[NestedKey, Tensor]:
    scratch = state.select(*(key for key in module.in_keys if key not in entries))
    lead: tuple[int, ...] = ()
    for value in entries.values():
        lead = value.shape[: value.ndim - 1 - state.ndim] or lead
    if lead:
        scratch = scratch.expand(*lead, *state.batch_size)
    for key, value in entries.items():
        scratch.set(key, value)
    # One batch of all candidates: convolutions, attention and BatchNorm would take further dimensions for others.
    merged = scratch.batch_size[: len(lead) + min(state.ndim, 1)] if lead else ()
    if merged:
        scratch = scratch.flatten(0, len(merged) - 1)
    with nullcontext() if params is None else params.to_module(module, preserve_module_state=False):
        out = module(scratch)
    return {key: out[key].unflatten(0, merged) if merged else out[key] for key in module.out_keys}


def _unbound(params: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """Splits one nested dict of stacked tensors into a list of ``size``."""
    members: list[dict[str, Any]] = [{} for _ in range(size)]
    for name, value in params.items():
        parts = value.unbind(0) if isinstance(value, Tensor) else _unbound(value, size)
        for member, part in zip(members, parts):
            member[name] = part
    return members
