"""Fitted Q Evaluation of a fixed policy as a TorchRL loss.

    Q_e(s_t, a_t) -> Q_e(s_t, a_t) + delta_t + gamma c_{t+1} (delta_{t+1} + gamma c_{t+2} (...)),
    delta_t = r_t + gamma (1 - terminated) Q_e(s_{t+1}, pi(s_{t+1})) - Q_e(s_t, a_t)

The right side is of the target networks. With ``lmbda=0`` the traces ``c`` are zero, and this is one-step FQE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from torch import Tensor
from torchrl.envs.utils import ExplorationType

from torchrl_spar.anchor import FrozenAnchor
from torchrl_spar.conventions import Conventions, check_critics, masked_mean
from torchrl_spar.data.rows import under_next
from torchrl_spar.errors import InputError, check_options, check_policy
from torchrl_spar.functional import call, call_ensemble


class FQELoss(Conventions):
    """Fitted Q Evaluation: critics of a fixed policy, each with its own targets.

    No critic sees another's target, so their disagreement says something about their errors; give each its own
    resample of the episodes by ``member_weight``. (Critics that share a bootstrapped target agree on wrong actions.)

    With ``lmbda`` above 0 the target follows the data along the last dimension of the batch ``[*B, T]``: TD errors
    of the policy, weighted by traces ``c_t = lmbda exp(-mean_j ((a_tj - pi_j(s_t)) / trace_width_j)^2 / 2)``. They end
    where the data acts otherwise than the policy, where it is done and at padding. The fixed point is the policy's
    value whatever the traces; they shorten the chain of bootstraps where the data does as the policy would.

    Targets follow by TorchRL's ``SoftUpdate`` or ``HardUpdate``, ``gamma`` is set by ``make_value_estimator``.
    Batches are in TED form and raw units, see :class:`~torchrl_spar.SPARLoss`. If one holds ``policy_action`` of its
    states (needed where ``lmbda`` is above 0), and of the following ones under ``"next"``, the policy is not called.

    Args:
        actor_network: the policy; it is copied and frozen.
        qvalue_network: one critic, copied ``num_qvalue_nets`` times and drawn anew (TorchRL's rule), or a list of
            critics that keep their own initialisation. Writes ``state_action_value`` ``[*B, 1]``.

    Keyword Args:
        num_qvalue_nets: number of critics E.
        lmbda: the largest trace, between 0 and 1.
        trace_width: distance of two actions that the traces call near, in action units, a number or ``[action_dim]``.
        exploration_type: ``DETERMINISTIC`` evaluates the policy's mode, ``RANDOM`` its distribution.
        loss_function: TorchRL's name of the regression loss.
        reward_scale: factor on the rewards inside the loss; :func:`~torchrl_spar.fit_fqe` sets it.
        reduction: ``"mean"`` (also by None), ``"sum"`` or ``"none"`` (the batch's shape).
        use_prioritized_weights: see TorchRL's losses.

    Raises:
        InputError: for an option out of range, what is not an actor, or a batch that lacks an entry.

    Source: FQE, Le et al. 2019 (https://arxiv.org/abs/1903.08738); targets along the data, Harutyunyan et al. 2016
    (https://arxiv.org/abs/1602.04951); the shape of the traces is ours.

    Examples:
        >>> from torchrl.modules import MLP, ValueOperator
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_spar import FQELoss, make_anchor, make_toy_data
        >>> data = make_toy_data()
        >>> critic = ValueOperator(MLP(5, 1), in_keys=["observation", "action"])  # an MLP joins its inputs
        >>> loss = FQELoss(make_anchor(data), critic, num_qvalue_nets=2)
        >>> _ = loss.make_value_estimator(gamma=0.95)
        >>> updater, batch = SoftUpdate(loss, tau=0.01), data.sample()
        >>> loss(batch)["loss_qvalue"].backward()
        >>> loss.state_value(batch).shape
        torch.Size([2, 8])
    """

    @dataclass
    class _AcceptedKeys:
        """Tensordict keys, to be changed by ``set_keys``.

        Attributes:
            action: the data's action, and where the policy writes and the critics read theirs.
            policy_action: the policy's action of a state, computed before.
            member_weight: weight of each row for each critic, ``[*B, E]``, ones where there is none.
            state_action_value: what the critics write.
            value: of the next state, given to the value estimator.
            reward: read under ``"next"``.
            done: read under ``"next"``; ends traces.
            terminated: read under ``"next"``; alone masks the bootstrap.
            priority: where the TD error is written for prioritised buffers (not in a locked batch).
            priority_weight: importance weights of a prioritised buffer, used when present.
        """

        action: NestedKey = "action"
        policy_action: NestedKey = "policy_action"
        member_weight: NestedKey = "member_weight"
        state_action_value: NestedKey = "state_action_value"
        value: NestedKey = "state_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    actor_network: FrozenAnchor
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
    reward_scale: Tensor
    trace_width: Tensor
    # Set where vmap runs the loss of several policies.
    critics_at_once = False

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        qvalue_network: TensorDictModuleBase | Sequence[TensorDictModuleBase],
        *,
        num_qvalue_nets: int = 4,
        lmbda: float = 0.0,
        trace_width: float | Tensor = 1.0,
        exploration_type: ExplorationType = ExplorationType.DETERMINISTIC,
        loss_function: str = "l2",
        reward_scale: float = 1.0,
        reduction: Literal["mean", "sum", "none"] | None = None,
        use_prioritized_weights: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(reduction=reduction, use_prioritized_weights=use_prioritized_weights)
        critics, width = check_critics(qvalue_network, num_qvalue_nets), torch.as_tensor(trace_width)
        check_options(
            (0 <= lmbda <= 1, "lmbda", lmbda, "between 0 and 1"),
            (bool((width > 0).all()), "trace_width", trace_width, "positive"),
            (loss_function in ("l1", "l2", "smooth_l1"), "loss_function", loss_function, "l1, l2 or smooth_l1"),
            (reward_scale > 0, "reward_scale", reward_scale, "positive"),
        )
        check_policy("actor_network", actor_network)
        read, written = critics[0].in_keys, actor_network.out_keys
        action_key = next((key for key in written if key in read), None)
        if action_key is None:
            raise InputError(f"the critic reads {read}, none of what the actor writes: {written}")
        frozen = FrozenAnchor(actor_network, action_key=action_key, exploration_type=exploration_type)
        self.convert_to_functional(frozen, "actor_network")
        self._add_critics(critics, num_qvalue_nets, is_list=qvalue_network is not critics[0])
        self.lmbda = lmbda
        self.loss_function = loss_function
        self.out_keys = ["loss_qvalue", "pred_value", "target_value", "next_state_value"]
        device = self._default_device
        self.register_coeff_buffer("reward_scale", float(reward_scale), device=device)
        self.register_buffer("trace_width", width.detach().clone().to(device))
        # Built now: a state dict loads into a fresh loss only if nothing is lazy.
        self.make_value_estimator(self.default_value_estimator)

    # ------------------------------------------------------------------ the method

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """``loss_qvalue`` and the diagnostics named in ``out_keys``, scalars (but for ``reduction="none"``)."""
        self.check_entries(tensordict)
        value, metadata = self.qvalue_loss(tensordict)
        td_error = metadata.pop("td_error")
        if not tensordict.is_locked:
            tensordict.set(self.tensor_keys.priority, td_error)
        return TensorDict({"loss_qvalue": value, **metadata})

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """All critics regress on their targets; summed over them.

        Returns:
            The loss and ``td_error`` (largest squared error of the critics, ``[*B]``), ``pred_value``,
            ``target_value``, ``next_state_value`` (means, times ``reward_scale``).
        """
        with torch.no_grad():
            params = self.target_params("qvalue_network")
            target, next_value = self._one_step(tensordict, params)
            if self.lmbda > 0:
                qvalue = self._qvalue(tensordict, tensordict[self.tensor_keys.action], params)
                target = qvalue + self._accumulated(tensordict, target - qvalue)
        loss, metadata = self.qvalue_regression(tensordict, target)
        mean = next_value.mean(0)
        return loss, metadata | {"next_state_value": masked_mean(mean, self._valid(tensordict, mean))}

    # ------------------------------------------------------------------ what was learned

    @torch.no_grad()
    def state_value(self, tensordict: TensorDictBase) -> Tensor:
        """``Q_e(s, pi(s))`` of each critic in raw reward units, ``[E, *B]``; reads the root's entries.

        Of one drawn action with ``ExplorationType.RANDOM``.
        """
        action = self.policy_action(tensordict)
        return self._qvalue(tensordict, action, self.qvalue_network_params) / self.reward_scale

    @torch.no_grad()
    def td_residual(self, tensordict: TensorDictBase) -> Tensor:
        """``delta`` of each critic, without its targets, in raw reward units, ``[E, *B]``."""
        params = self.qvalue_network_params
        qvalue = self._qvalue(tensordict, tensordict[self.tensor_keys.action], params)
        return (self._one_step(tensordict, params)[0] - qvalue) / self.reward_scale

    @torch.no_grad()
    def trace(self, tensordict: TensorDictBase) -> Tensor:
        """``c_t`` of each row, ``[*B]``: ``lmbda`` where the data acts as the policy would, less elsewhere."""
        distance = (tensordict[self.tensor_keys.action] - self.policy_action(tensordict)) / self.trace_width
        return self.lmbda * (-0.5 * distance.pow(2).mean(-1)).exp()

    @torch.no_grad()
    def policy_action(self, tensordict: TensorDictBase) -> Tensor:
        """The policy's action ``[*B, action_dim]``: the batch's own, else what the policy writes."""
        action = tensordict.get(self.tensor_keys.policy_action, None)
        if action is None:
            key = self.actor_network.action_key
            action = call(self.actor_network, self.actor_network_params, tensordict, {})[key]
        return action

    # ------------------------------------------------------------------ parts

    def _one_step(self, tensordict: TensorDictBase, params: TensorDictBase) -> tuple[Tensor, Tensor]:
        """One-step targets and next values, ``[E, *B]``, scaled."""
        keys, following = self.tensor_keys, tensordict["next"]
        next_value = self._qvalue(following, self.policy_action(following), params)
        outcome = self._outcome(tensordict)
        outcome = outcome.expand(len(next_value), *outcome.batch_size).clone(False)
        outcome.set(under_next(keys.value), next_value.unsqueeze(-1))
        return self.value_estimator.value_estimate(outcome).squeeze(-1), next_value

    def _accumulated(self, tensordict: TensorDictBase, residual: Tensor) -> Tensor:
        """``delta_t + gamma c_{t+1} (delta_{t+1} + ...)`` along the last dimension, ``[E, *B]``."""
        keys, like = self.tensor_keys, residual[0]
        going = ~(tensordict["next"][keys.done] | tensordict["next"][keys.terminated]).squeeze(-1)
        steps = tensordict.get(self.value_estimator.tensor_keys.steps_to_next_obs, None)
        discount = self.value_estimator.gamma if steps is None else self.value_estimator.gamma ** steps.squeeze(-1)
        trace = self.trace(tensordict)
        mask = self._valid(tensordict, like)
        if mask is not None:
            # Masked positions may hold any number, which would come back through the sum.
            trace, residual = torch.where(mask, trace, 0), torch.where(mask, residual, 0)
        carry = (going * discount)[..., :-1] * trace[..., 1:]
        parts = [residual[..., -1]]
        for step in reversed(range(carry.shape[-1])):
            parts.append(residual[..., step] + carry[..., step] * parts[-1])
        return torch.stack(parts[::-1], -1)

    def _qvalue(self, state: TensorDictBase, action: Tensor, params: TensorDictBase) -> Tensor:
        """All critics, ``[E, *B]``."""
        key = self.tensor_keys.state_action_value
        entries = {self.actor_network.action_key: action}
        values = call_ensemble(self.qvalue_network, params, state, entries, out_key=key, at_once=self.critics_at_once)
        if values.shape[-1] != 1:
            raise InputError(f"a critic writes {key!r} of size {values.shape[-1]}; it must be 1")
        return values.squeeze(-1)

    def _list_in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        state = [key for key in self.qvalue_network.in_keys if key != self.actor_network.action_key]
        policy = list(self.actor_network.in_keys)
        now = [*state, *policy] if self.lmbda > 0 else state
        later = [*state, *policy, keys.reward, keys.done, keys.terminated]
        return [keys.action, *now, *(under_next(key) for key in later)]

    def _needed_keys(self, tensordict: TensorDictBase) -> list[NestedKey]:
        """The in_keys, less what the policy alone reads where its action is given."""
        keys = self.tensor_keys
        alone = {*self.actor_network.in_keys}.difference(self.qvalue_network.in_keys)
        spared: set[NestedKey] = set()
        if tensordict.get(keys.policy_action, None) is not None:
            spared.update(alone)
        if tensordict.get(under_next(keys.policy_action), None) is not None:
            spared.update(under_next(key) for key in alone)
        return [key for key in self.in_keys if key not in spared]
