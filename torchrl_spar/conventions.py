"""TorchRL's conventions in SPARLoss: keys, calls of its networks, masks, targets, copies, state dicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator, distance_loss
from torchrl.objectives.value import ValueEstimatorBase

from torchrl_spar.data.rows import MASK_KEYS, under_next
from torchrl_spar.errors import InputError, check_bool, check_built, check_module, check_options, first_line
from torchrl_spar.functional import call, call_ensemble, check_written
from torchrl_spar.residual import ResidualVAE, SPARActor


class Conventions(LossModule):
    """TorchRL's conventions for losses with an ensemble of critics: keys, masks, weights, the value estimator.

    A subclass has ``tensor_keys`` for ``reward``, ``done``, ``terminated``, ``value``, ``action``, ``member_weight``,
    ``priority_weight``, says in ``_list_in_keys`` what it reads, and calls its critics in ``_qvalue``.

    Source: ours; the conventions are TorchRL's.
    """

    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS: tuple[ValueEstimators, ...] = (ValueEstimators.TD0,)
    use_prioritized_weights: bool | Literal["auto"]
    _in_keys: list[NestedKey] | None = None
    tensor_keys: Any
    qvalue_network_params: TensorDictParams
    num_qvalue_nets: int
    loss_function: str
    # Networks with targets.
    _followed: tuple[str, ...] = ("qvalue_network",)

    def __init__(
        self,
        *,
        reduction: Literal["mean", "sum", "none"] | None,
        use_prioritized_weights: bool | Literal["auto"],
    ) -> None:
        super().__init__()
        check_options((reduction in (None, "mean", "sum", "none"), "reduction", reduction, "'mean', 'sum' or 'none'"))
        self.reduction = reduction or "mean"
        self.use_prioritized_weights = use_prioritized_weights

    def make_value_estimator(self, value_type: ValueEstimators | None = None, **hyperparams: Any) -> LossModule | None:
        """Chooses the target, ``gamma`` included: ``loss.make_value_estimator(gamma=0.995)``.

        Args:
            value_type: TD0 (default) or another that the loss supports; TD1 and TDLambda take ``[B, T]`` batches.
            **hyperparams: ``gamma`` (0.99 by default), ``lmbda``, and what else TorchRL's estimator takes.

        Raises:
            InputError: if ``gamma`` is not within 0 to 1.
        """
        gamma = hyperparams.get("gamma", 0.99)
        check_options((0 <= gamma <= 1, "gamma", gamma, "between 0 and 1"))
        value_type = value_type or self.default_value_estimator
        if isinstance(value_type, (ValueEstimatorBase, type)):
            return super().make_value_estimator(value_type, **hyperparams)
        hyperparams.setdefault("device", self._default_device)
        dispatch_value_estimator(
            self,
            value_type,
            supported=self.SUPPORTED_VALUE_ESTIMATORS,
            tensor_keys={key: getattr(self.tensor_keys, key) for key in ("value", "reward", "done", "terminated")},
            value_network=None,
            **hyperparams,
        )
        return self

    @property
    def in_keys(self) -> list[NestedKey]:
        """Every entry that the loss needs."""
        if self._in_keys is None:
            self._in_keys = list(dict.fromkeys(self._list_in_keys()))
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    def check_entries(self, tensordict: TensorDictBase, *, following: bool = True) -> None:
        """Raises an :class:`~torchrl_spar.InputError` for an empty batch; for a lack of entries, which it names."""
        if 0 in tensordict.shape:
            raise InputError(f"the batch is empty: its shape is {tuple(tensordict.shape)}")
        missing = [key for key in self._needed_keys(tensordict) if tensordict.get(key, None) is None]
        if not following:
            missing = [key for key in missing if not isinstance(key, tuple) or key[0] != "next"]
        if missing:
            raise InputError(f"the batch lacks {missing}; if they have other names, tell the loss by set_keys")

    def qvalue_regression(self, tensordict: TensorDictBase, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Regression of all critics, at the data's actions, on targets ``[*B]`` or ``[E, *B]`` in scaled reward units.

        Where the batch holds ``member_weight`` ``[*B, E]``, a critic's errors count by it.

        Returns:
            The loss, summed over the critics, and ``td_error`` (largest squared error of the critics, ``[*B]``, 0 at
            padding), ``pred_value`` and ``target_value`` (means).

        Source: ours; the weights are those of a bootstrapped ensemble (https://arxiv.org/abs/1602.04621).
        """
        qvalue = self._qvalue(tensordict, tensordict[self.tensor_keys.action], self.qvalue_network_params)
        target = target.expand_as(qvalue)
        error = distance_loss(qvalue, target, self.loss_function)
        weight = tensordict.get(self.tensor_keys.member_weight, None)
        if weight is not None:
            shape = (*tensordict.batch_size, self.num_qvalue_nets)
            error = error * check_shape(weight, shape, self.tensor_keys.member_weight).movedim(-1, 0)
        mask = self._valid(tensordict, error[0])
        td_error = (qvalue.detach() - target).pow(2).amax(0)
        metadata = {
            # Padding has no priority.
            "td_error": td_error if mask is None else torch.where(mask, td_error, 0),
            "pred_value": masked_mean(qvalue.detach().mean(0), mask),
            "target_value": masked_mean(target.mean(0), mask),
        }
        return self._reduce(error.sum(0), tensordict), metadata

    def _add_critics(self, critics: list[TensorDictModuleBase], count: int, *, is_list: bool) -> None:
        """Takes a list of critics, or one, of which it makes `count` and draws them anew; gives them targets."""
        # A list of one gets no dimension E: with it, tensordict calls the parameters buffers, which nothing trains.
        expand = None if is_list and count == 1 else count
        networks = critics if len(critics) > 1 else critics[0]
        self.convert_to_functional(networks, "qvalue_network", expand, create_target_params=True)
        self.num_qvalue_nets = count

    def network_params(self, name: str) -> TensorDictParams:
        """The parameters of ``"actor_network"``, ``"qvalue_network"``, ``"residual_vae"`` or ``"value_network"``."""
        return self._modules[f"{name}_params"]

    def target_params(self, name: str) -> TensorDictParams:
        """The targets of ``"actor_network"`` or ``"qvalue_network"``."""
        # Not by attribute: TorchRL warns there until an updater exists, which pre-training does not need.
        return self._modules[f"target_{name}_params"]

    def reset_parameters_recursive(self) -> None:
        """Draws new parameters for every network but the frozen policy, and copies them to the targets."""
        for name in self._learning:
            module, params = getattr(self, name), self.network_params(name).data
            # One member at a time: initialisers read the fan-in off the weight's shape.
            for member in params.unbind(0) if params.ndim else (params,):
                with member.to_module(module, preserve_module_state=False):
                    module.reset_parameters_recursive()
        self.sync_targets()

    def sync_targets(self, *names: str) -> None:
        """Copies networks into their targets, by default all that have some."""
        for name in names or self._followed:
            self.target_params(name).data.copy_(self.network_params(name).data)

    @property
    def _learning(self) -> list[str]:
        """The networks that a reset draws anew, in this order."""
        return ["qvalue_network"]

    def _qvalue(self, state: TensorDictBase, action: Tensor, params: TensorDictBase) -> Tensor:
        raise NotImplementedError

    def _list_in_keys(self) -> list[NestedKey]:
        raise NotImplementedError

    def _needed_keys(self, tensordict: TensorDictBase) -> list[NestedKey]:
        """The in_keys without those that are not read for this batch."""
        return self.in_keys

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        super()._forward_value_estimator_keys(**kwargs)
        self._in_keys = None

    def _outcome(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the value estimator reads of a batch, rewards times ``reward_scale``."""
        keys = self.tensor_keys
        reward, *flags = (under_next(key) for key in (keys.reward, keys.done, keys.terminated))
        outcome = tensordict.select(reward, *flags)
        for key in (reward, *flags):
            check_shape(outcome[key], (*tensordict.batch_size, 1), key)
        for key in flags:
            check_bool(outcome[key], key)
        # Written by TorchRL's MultiStep and by chunk_actions: gamma to the power of it.
        outcome.update(tensordict.select(self.value_estimator.tensor_keys.steps_to_next_obs, strict=False))
        return outcome.set(reward, self.reward_scale * outcome[reward])

    @property
    def mask_keys(self) -> tuple[NestedKey, ...]:
        """Where padding masks are looked for, in batches and in data sets: see TorchRL's ``loss_mask_key``."""
        return self._loss_mask_keys()

    def _loss_mask_keys(self) -> tuple[NestedKey, ...]:
        # TorchRL's own, and what the functions of data sets take for a mask, too.
        keys = super()._loss_mask_keys()
        return tuple(dict.fromkeys((*keys, *MASK_KEYS))) if self.loss_mask_key == "auto" else keys

    def _valid(self, tensordict: TensorDictBase, like: Tensor) -> Tensor | None:
        """The padding mask in the shape of a per-position tensor, or None."""
        valid = None
        for key in self._loss_mask_keys():
            mask = tensordict.get(key, None)
            if mask is not None:
                mask = _per_position(check_bool(mask, key), like, key)
                valid = mask if valid is None else valid & mask
        return valid

    def _reduce(self, loss: Tensor, tensordict: TensorDictBase) -> Tensor:
        # Not TorchRL's _maybe_get_priority_weight, which fails on a nested key.
        use, key = self.use_prioritized_weights in (True, "auto"), self.tensor_keys.priority_weight
        weights = tensordict.get(key, None) if use else None
        self._valid(tensordict, loss)  # which names a mask that does not fit
        if weights is not None:
            weights = _per_position(weights, loss, key)
        return self._reduce_loss(loss, tensordict=tensordict, weights=weights)


class SPARLossBase(Conventions):
    """The networks of :class:`~torchrl_spar.SPARLoss` and how they are called, without the method.

    Args:
        actor_network: see :class:`~torchrl_spar.SPARLoss`, as for the others.
        qvalue_network: the critics.
        residual_vae: the conditional VAE.
        value_network: the state value, or None.

    Keyword Args:
        num_qvalue_nets: number of critics.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or None, which means ``"mean"``.
        use_prioritized_weights: see TorchRL's losses.

    Raises:
        InputError: for networks that do not fit together.

    Source: ours; the conventions are TorchRL's.
    """

    @dataclass
    class _AcceptedKeys:
        """Tensordict keys, to be changed by ``set_keys``.

        Attributes:
            action: the data's action, and where the actor writes and the critics read theirs.
            anchor_action: the anchor's action.
            action_noise: noise on the bootstrapped action.
            candidate_noise: noise that makes the candidates, all but the first.
            latent_noise: the VAE's sample in its loss.
            residual: the scaled residual that the head (A) or decoder (B) writes, the encoder reads.
            latent: the latent that the decoder reads and head B writes.
            latent_loc: the mean that the encoder writes.
            latent_log_std: the log standard deviation that the encoder writes.
            state_action_value: what the critics write.
            value: what the value network writes.
            reward: read under ``"next"``.
            done: read under ``"next"``.
            terminated: read under ``"next"``; alone masks the bootstrap.
            value_target: of the critics, ``[*B, 1]`` in scaled reward units; one-step targets where it is missing.
            advantage_std: how much the data's advantages over the policy differ, ``[*B, 1]``, the same number in every
                row of a data set; see :meth:`SPARLoss.self_imitation`.
            member_weight: weight of each row for each critic, ``[*B, E]``; ones where it is missing.
            priority: where the TD error is written for prioritised buffers (not in a locked batch).
            priority_weight: importance weights of a prioritised buffer, used when present.
        """

        action: NestedKey = "action"
        anchor_action: NestedKey = "anchor_action"
        action_noise: NestedKey = "action_noise"
        candidate_noise: NestedKey = "candidate_noise"
        latent_noise: NestedKey = "latent_noise"
        residual: NestedKey = "residual"
        latent: NestedKey = "latent"
        latent_loc: NestedKey = "latent_loc"
        latent_log_std: NestedKey = "latent_log_std"
        state_action_value: NestedKey = "state_action_value"
        value: NestedKey = "state_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        value_target: NestedKey = "value_target"
        advantage_std: NestedKey = "advantage_std"
        member_weight: NestedKey = "member_weight"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda)

    actor_network: SPARActor
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    target_qvalue_network_params: TensorDictParams
    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams
    residual_vae: ResidualVAE
    residual_vae_params: TensorDictParams
    target_residual_vae_params: TensorDictParams
    _followed = ("actor_network", "qvalue_network")
    # Set by SPARLoss: whether, and how much, targets bootstrap from the state value.
    value_mix: float

    def __init__(
        self,
        actor_network: SPARActor,
        qvalue_network: TensorDictModuleBase | list[TensorDictModuleBase],
        residual_vae: ResidualVAE,
        value_network: TensorDictModuleBase | None,
        *,
        num_qvalue_nets: int,
        reduction: Literal["mean", "sum", "none"] | None,
        use_prioritized_weights: bool | Literal["auto"],
    ) -> None:
        super().__init__(reduction=reduction, use_prioritized_weights=use_prioritized_weights)
        if not isinstance(actor_network, SPARActor):
            raise InputError(
                f"actor_network must be a SPARActor, not {type(actor_network).__name__}: an actor of your own is the "
                "anchor, as in make_spar_loss(data, anchor=actor) or SPARActor(actor, head, action_spec=...)"
            )
        if not isinstance(residual_vae, ResidualVAE):
            raise InputError(f"residual_vae must be a ResidualVAE, not {type(residual_vae).__name__}")
        if actor_network.is_latent and actor_network.decoder is not residual_vae.decoder:
            raise InputError("actor_network: the decoder of a latent head (head B) must be residual_vae.decoder itself")
        critics = check_critics(qvalue_network, num_qvalue_nets)
        check_built("actor_network", actor_network)
        if not any(parameter.requires_grad for parameter in actor_network.head.parameters()):
            raise InputError(
                "actor_network: its head has no parameter that is trained, as that of loss.actor, which is frozen; "
                "give a copy (copy.deepcopy) after actor.head.requires_grad_(True)"
            )
        check_built("residual_vae", residual_vae)
        self.convert_to_functional(residual_vae, "residual_vae")
        # Head B shares the decoder's parameters with the VAE; the target is then their common average.
        self.convert_to_functional(actor_network, "actor_network", create_target_params=True)
        self.has_value = value_network is not None
        if value_network is not None:
            check_module("value_network", value_network)
            self.convert_to_functional(value_network, "value_network")
        self._add_critics(critics, num_qvalue_nets, is_list=qvalue_network is not critics[0])

    # ------------------------------------------------------------------ policies

    @property
    def actor(self) -> SPARActor:
        """The policy to deploy: the moving average of the head on the anchor.

        A module of its own that shares the targets' memory, so it follows training;
        ``deepcopy`` it for a snapshot.
        """
        return _stateful(self.actor_network, self.target_params("actor_network"))

    @property
    def anchor(self) -> TensorDictModuleBase:
        """The frozen behaviour policy, ``observation -> action``."""
        return _stateful(self.actor_network, self.actor_network_params).anchor

    @property
    def residual_scale(self) -> Tensor:
        """``rho``: action units of one unit of residual, ``[action_dim]``."""
        return self.actor_network_params.get("residual_scale")

    @residual_scale.setter
    def residual_scale(self, scale: Tensor) -> None:
        for params in (self.actor_network_params, self.target_params("actor_network")):
            params.get("residual_scale").data.copy_(scale)

    # ------------------------------------------------------------------ calls of the networks

    def _anchored(self, tensordict: TensorDictBase, *readers: TensorDictModuleBase) -> TensorDictBase:
        """The state entries that the readers (by default all but the anchor) need, with the anchor's action."""
        readers = readers or (*self._rectifiers, self.qvalue_network, self.residual_vae)
        state = tensordict.select(*self._state_keys(*readers))
        action = tensordict.get(self.tensor_keys.anchor_action, None)
        if action is None:
            anchor = self.actor_network.anchor
            out = call(anchor, self.actor_network_params.get("anchor"), tensordict, {})
            action = _written(out, self.tensor_keys.action, "the anchor")
        return state.set(self.tensor_keys.anchor_action, action)

    def _data_residual(self, tensordict: TensorDictBase, state: TensorDictBase) -> Tensor:
        """``r = (a - a_b) / rho``."""
        keys, scale = self.tensor_keys, self.residual_scale
        shape = (*tensordict.batch_size, *scale.shape)  # of size one, either would be repeated along the other
        action = check_shape(tensordict[keys.action], shape, keys.action)
        return (action - check_shape(state.get(keys.anchor_action), shape, keys.anchor_action)) / scale

    def _rectify(self, state: TensorDictBase, *, target: bool = False) -> tuple[Tensor | None, Tensor]:
        """The head's latent (head B, else None) and residual; the moving average's with ``target``."""
        actor = self.actor_network
        params = self.target_params("actor_network") if target else self.actor_network_params
        out = call(actor.head, params.get("head"), state, {})
        if not actor.is_latent:
            return None, self._sized(out, self.tensor_keys.residual, "the head")
        latent = _written(out, self.tensor_keys.latent, "the head")
        # The decoder is the VAE's own: the head's gradient passes through it and leaves it as it is.
        decoder = params if target else self.residual_vae_params
        return latent, self._decode(state, latent, decoder, frozen=True)

    def _compose(self, anchor_action: Tensor, residual: Tensor) -> Tensor:
        params = self.actor_network_params
        action = anchor_action + params.get("residual_scale") * residual
        return action.clamp(params.get("low"), params.get("high"))

    def _encode(self, state: TensorDictBase, residual: Tensor) -> tuple[Tensor, Tensor]:
        keys, entries = self.tensor_keys, {self.tensor_keys.residual: residual}
        out = call(self.residual_vae.encoder, self.residual_vae_params.get("encoder"), state, entries)
        loc = _written(out, keys.latent_loc, "the encoder")
        return loc, self._sized(out, keys.latent_log_std, "the encoder", loc.shape[-1])

    def _decode(
        self, state: TensorDictBase, latent: Tensor, params: TensorDictBase | None = None, *, frozen: bool = False
    ) -> Tensor:
        """The residual of a latent; latents with more leading dimensions repeat the state along them."""
        keys, params = self.tensor_keys, self.residual_vae_params if params is None else params
        out = call(self.residual_vae.decoder, params.get("decoder"), state, {keys.latent: latent}, frozen=frozen)
        return self._sized(out, keys.residual, "the decoder")

    def _value(self, state: TensorDictBase) -> Tensor:
        out = call(self.value_network, self.value_network_params, state, {})
        return self._sized(out, self.tensor_keys.value, "the value network", 1).squeeze(-1)

    def _qvalue(
        self, state: TensorDictBase, action: Tensor, params: TensorDictBase, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """All critics, ``[E, *B]``; actions with more leading dimensions repeat the state along them."""
        keys = self.tensor_keys
        entries = {keys.action: action}
        out_key = keys.state_action_value
        values = call_ensemble(self.qvalue_network, params, state, entries, out_key=out_key, dtype=dtype)
        return self._sized({out_key: values}, out_key, "a critic", 1).squeeze(-1)

    def _sized(self, out: Mapping[NestedKey, Tensor], key: NestedKey, writer: str, size: int | None = None) -> Tensor:
        """An output of the action's size by default; another size is refused, as it would be broadcast silently."""
        size, entry = self.residual_scale.shape[-1] if size is None else size, _written(out, key, writer)
        if entry.shape[-1] != size:
            raise InputError(f"{writer} writes {key!r} of size {entry.shape[-1]}; it must be {size}")
        return entry

    # ------------------------------------------------------------------ TorchRL's conventions

    @property
    def _learning(self) -> list[str]:
        return ["residual_vae", "actor_network", *(["value_network"] if self.has_value else []), "qvalue_network"]

    def __deepcopy__(self, memo: dict[int, Any]) -> SPARLossBase:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(deepcopy(self.__dict__, memo))
        if self.actor_network.is_latent:
            # tensordict copies each set of parameters by itself, but head B's decoder is the VAE's.
            new.actor_network_params.set("decoder", new.residual_vae_params.get("decoder").copy())
        return new

    def _state_keys(self, *modules: TensorDictModuleBase) -> list[NestedKey]:
        """The state entries that modules read: their in_keys without what this loss writes itself."""
        keys = self.tensor_keys
        internal = {keys.action, keys.anchor_action, keys.residual, keys.latent, keys.latent_loc, keys.latent_log_std}
        read = []
        for module in modules:
            read += module.in_keys
            if isinstance(module, ResidualVAE):
                read += module.decoder.in_keys
        return [key for key in dict.fromkeys(read) if key not in internal]

    def _list_in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        # The anchor may read an action (a chunk's history, say), so its keys are listed whole.
        now = [*self.actor_network.in_keys, *self._state_keys(self.residual_vae, self.qvalue_network, *self._values)]
        later = [*self.actor_network.in_keys, *self._state_keys(self.qvalue_network)]
        if self.value_mix > 0:
            later += self._state_keys(*self._values)
        return [keys.action, *now, *(under_next(key) for key in (*later, keys.reward, keys.done, keys.terminated))]

    @property
    def _rectifiers(self) -> list[TensorDictModuleBase]:
        """The module that makes the residual from a state and the anchor's action."""
        actor = self.actor_network
        return [actor.head] if actor.decoder is None else [actor.head, actor.decoder]

    @property
    def _values(self) -> list[TensorDictModuleBase]:
        return [self.value_network] if self.has_value else []

    @torch.no_grad()
    def explain(self, tensordict: TensorDictBase, *, following: bool = True) -> None:
        """After a failure: raises an :class:`~torchrl_spar.InputError` if a network cannot take a row of this batch.

        Args:
            tensordict: the batch.
            following: whether it should hold the outcome of its actions, which pre-training does not read.
        """
        self.check_entries(tensordict, following=following)
        keys, row = self.tensor_keys, tensordict.reshape(-1)[:1]
        self._valid(tensordict, torch.empty(tensordict.batch_size))
        action, like = tensordict[keys.action], self.residual_scale
        check_shape(action, (*tensordict.batch_size, *like.shape), keys.action)

        def attempt(name: str, module: TensorDictModuleBase, run: Callable[[], Any], at: TensorDictBase = row) -> Any:
            try:
                return run()
            except (RuntimeError, ValueError, AssertionError) as err:
                read = dict.fromkeys((*module.in_keys, keys.action))  # residuals have the action's type
                present = {key: at[key] for key in read if at.get(key, None) is not None}
                kinds = {key: f"{list(x.shape[1:])} {x.dtype} {x.device}" for key, x in present.items()}
                batch = "this batch" if at is row else "the next states of this batch"
                raise InputError(f"{name} cannot take {batch}, which holds {kinds}: {first_line(err)}") from err

        vae, head = self.residual_vae, self.actor_network.head
        state = attempt("the anchor", self.actor_network.anchor, lambda: self._anchored(row))
        residual = self._data_residual(row, state)
        latent, _ = attempt("the encoder", vae.encoder, lambda: self._encode(state, residual))
        attempt("the decoder", vae.decoder, lambda: self._decode(state, latent))
        attempt("the head", head, lambda: self._rectify(state))
        critics, params = self.qvalue_network, self.qvalue_network_params
        attempt("a critic", critics, lambda: self._qvalue(state, row[keys.action], params))
        for network in self._values:
            attempt("the value network", network, lambda: self._value(row))
        if following and row.get(keys.value_target, None) is None:
            later, networks = row["next"], "the policy, a critic or the value network"
            attempt(networks, self.actor_network, lambda: self._policy_value(later), later)
        if action.dtype != like.dtype:
            raise InputError(f"{keys.action!r} is of type {action.dtype}; the policy's is of type {like.dtype}")

    def _needed_keys(self, tensordict: TensorDictBase) -> list[NestedKey]:
        """The in_keys, without the anchor's if its action is given and without the outcome if a target is."""
        keys = self.tensor_keys
        others = self._state_keys(*self._rectifiers, self.residual_vae, self.qvalue_network, *self._values)
        anchors = {*self.actor_network.anchor.in_keys}.difference(others, [keys.action])
        spared: set[NestedKey] = set()
        if tensordict.get(keys.anchor_action, None) is not None:
            spared.update(anchors)
        if tensordict.get(under_next(keys.anchor_action), None) is not None:
            spared.update(under_next(key) for key in anchors)
        if tensordict.get(keys.value_target, None) is not None:
            spared.update(key for key in self.in_keys if isinstance(key, tuple) and key[0] == "next")
        return [key for key in self.in_keys if key not in spared]

    def _noise(self, tensordict: TensorDictBase, key: NestedKey, like: Tensor) -> Tensor:
        """The batch's own noise, else standard normal noise of the shape of `like`."""
        noise = tensordict.get(key, None)
        return torch.randn_like(like) if noise is None else check_shape(noise, like.shape, key)


def check_critics(network: Any, count: int) -> list[TensorDictModuleBase]:
    """The critic, of which a loss makes `count`, or each of a list of that many; all are of one architecture.

    Examples:
        >>> check_critics([torch.nn.Linear(3, 1)], 1)
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: qvalue_network: a Linear; give a TensorDictModule, ...
    """
    check_options((count >= 1, "num_qvalue_nets", count, "at least 1"))
    several = isinstance(network, Iterable) and not isinstance(network, TensorDictModuleBase)
    critics = list(network) if several else [network]
    if not critics:
        raise InputError("qvalue_network: an empty list; give one critic at least")
    for critic in critics:
        check_module("qvalue_network", critic)
    if len({id(critic) for critic in critics}) < len(critics):
        raise InputError("qvalue_network: one critic is there twice; give copies of it (copy.deepcopy)")
    owners = Counter(id(one) for critic in critics for one in critic.parameters() if one.requires_grad)
    if any(number > 1 for number in owners.values()):
        raise InputError(
            "qvalue_network: critics share parameters that are trained, such as an encoder's, which the loss would "
            "freeze; give each its own, or freeze the shared ones"
        )
    if several and len(critics) != count:
        raise InputError(f"qvalue_network: a list of {len(critics)} critics, but num_qvalue_nets={count}")
    shapes = [{name: parameter.shape for name, parameter in critic.named_parameters()} for critic in critics]
    if any(each != shapes[0] for each in shapes):
        raise InputError("qvalue_network: the critics differ in their parameters; an ensemble has one architecture")
    return critics


def check_spar_loss(name: str, *losses: Any) -> None:
    """Refuses anything but a SPARLoss; a compiled one is one, too.

    Examples:
        >>> check_spar_loss("loss", torch.nn.Linear(3, 1))
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: loss: a Linear; give the SPARLoss that make_spar_loss or pretrain returns
    """
    for loss in losses:
        if not isinstance(getattr(loss, "_orig_mod", loss), SPARLossBase):
            raise InputError(
                f"{name}: a {type(loss).__name__}; give the SPARLoss that make_spar_loss or pretrain returns"
            )


def check_shape(entry: Tensor, shape: Sequence[int], key: NestedKey) -> Tensor:
    """The entry itself; an :class:`~torchrl_spar.InputError` where it is not of this shape.

    Examples:
        >>> check_shape(torch.zeros(5, 2), (5, 3), "action_noise")
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: 'action_noise' has shape (5, 2); this loss needs (5, 3)
    """
    if entry.shape != torch.Size(shape):
        raise InputError(f"{key!r} has shape {tuple(entry.shape)}; this loss needs {tuple(shape)}")
    return entry


def _per_position(values: Tensor, like: Tensor, key: NestedKey) -> Tensor:
    """Values ``[*B]`` or ``[*B, 1]`` in the shape ``[*B]`` of `like`."""
    return check_shape(values.squeeze(-1) if values.shape == (*like.shape, 1) else values, like.shape, key)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of ``values`` where ``mask`` is True; of all values without a mask.

    Examples:
        >>> masked_mean(torch.tensor([1.0, 5.0]), torch.tensor([True, False]))
        tensor(1.)
    """
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)


def _written(out: Mapping[NestedKey, Tensor], key: NestedKey, writer: str) -> Tensor:
    check_written(out, key, writer)
    return out[key]


def _stateful(module: SPARActor, params: TensorDictBase) -> SPARActor:
    """A copy of the module that shares the memory of `params`, without gradient, as for deployment."""
    module = deepcopy(module).requires_grad_(False).eval()
    params.data.to_module(module)
    return module
