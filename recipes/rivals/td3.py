"""What TD3+BC and ReBRAC share: TD3's order of updates, and TorchRL's TD3BCLoss with decoupled penalties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from harness.run import Run
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives import TD3BCLoss

from rivals.base import Problem, Rival
from rivals.models import output_of_body, squash
from rivals.terms import td_target
from torchrl_spar import OfflineReplayBuffer, fit_critics
from torchrl_spar.ensemble import Bound, lower_bound
from torchrl_spar.functional import call_ensemble


class BehaviorRegularizedLoss(TD3BCLoss):
    """ReBRAC (https://arxiv.org/abs/2305.09836): TD3+BC with a penalty of its own for the actor and for the critics.

    Networks, targets, noise and bounds are TorchRL's TD3BCLoss; both penalties are squared distances, summed over the
    action's dimensions. The lower bound of the critics is SPAR's, its ``"min"`` the paper's. SPAR's ``fit_critics``
    can start the critics; it scales rewards, and the penalties keep their size beside them.

    Args:
        actor_network: deterministic, observation -> action, a network and a TanhModule.
        qvalue_network: a list of critics.
        actor_penalty: weight of ``|pi(s) - a|^2`` in the actor's loss (beta_1).
        critic_penalty: weight of ``|a' - a'_data|^2`` that is taken off the bootstrapped value (beta_2).
        value_weight: of the value over its mean size in the actor's loss (TD3+BC's alpha).
        first_critic: whether the actor follows the first critic (TD3, TD3+BC), not the critics' bound.
        bound: of the critics, ``"min"`` or ``"lcb"``.
        kappa: standard deviations of the latter.
        **options: TD3BCLoss's.
    """

    def __init__(
        self,
        actor_network: Any,
        qvalue_network: list[Any],
        *,
        actor_penalty: float,
        critic_penalty: float,
        value_weight: float = 1.0,
        first_critic: bool = False,
        bound: Bound = "min",
        kappa: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(actor_network, qvalue_network, num_qvalue_nets=len(qvalue_network), **options)
        self.actor_penalty, self.critic_penalty = actor_penalty, critic_penalty
        self.value_weight, self.first_critic = value_weight, first_critic
        self.bound: Bound = bound
        self.kappa = kappa
        # Read and set by fit_critics.
        self.value_mix = 0.0
        self.register_buffer("reward_scale", torch.ones((), device=self._default_device))

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """``beta_1 |pi(s) - a|^2 - weight * Q(s, pi(s)) / mean |Q|``; reaches the actor alone."""
        action = self._act(tensordict, self.actor_network_params)
        params = self.qvalue_network_params.data
        value = self._value(tensordict, action, params[:1] if self.first_critic else params)
        penalty = (action - tensordict[self.tensor_keys.action]).pow(2).sum(-1)
        loss = self.actor_penalty * penalty - self.value_weight * value / value.abs().mean().detach()
        return loss.mean(), {"bc_loss": penalty.detach().mean() / action.shape[-1]}

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """The critics regress on ``r + gamma (1 - terminated) (Q(s', a') - beta_2 |a' - a'_data|^2)``; summed."""
        key, following = self.tensor_keys.action, tensordict["next"]
        noise = torch.randn_like(tensordict[key]) * self.policy_noise
        with torch.no_grad():
            action = self._act(following, self.target_actor_network_params)
            action = (action + noise.clamp(-self.noise_clip, self.noise_clip)).clamp(self.min_action, self.max_action)
            next_value = self._value(following, action, self.target_qvalue_network_params)
            if self.critic_penalty:
                penalty = (action - following[key]).pow(2).sum(-1)
                next_value -= self.reward_scale * self.critic_penalty * penalty
            target = td_target(self, tensordict, next_value, scale=self.reward_scale)
        return self.qvalue_regression(tensordict, target)

    def qvalue_regression(self, tensordict: TensorDictBase, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """All critics at the data's actions against ``target [B]``; summed."""
        value = self._values(tensordict, tensordict[self.tensor_keys.action], self.qvalue_network_params)
        error = (value - target).pow(2)
        metadata = {"td_error": error.detach(), "pred_value": value.detach().mean(), "target_value": target.mean()}
        return error.mean(1).sum(0), metadata

    def sync_targets(self, name: str) -> None:
        """Copies a network into its target."""
        targets, params = (getattr(self, f"{prefix}{name}_params").data for prefix in ("target_", ""))
        targets.copy_(params)

    def _act(self, state: TensorDictBase, params: TensorDictBase) -> Tensor:
        return squash(output_of_body(self.actor_network, params, state), self.min_action, self.max_action)

    def _values(self, state: TensorDictBase, action: Tensor, params: TensorDictBase) -> Tensor:
        keys = self.tensor_keys
        out_key = keys.state_action_value
        return call_ensemble(self.qvalue_network, params, state, {keys.action: action}, out_key=out_key).squeeze(-1)

    def _value(self, state: TensorDictBase, action: Tensor, params: TensorDictBase) -> Tensor:
        return lower_bound(self._values(state, action, params), bound=self.bound, kappa=self.kappa)


@dataclass
class ActorCritic(Rival):
    """Critics and an actor; `starts` says whether the critics begin with the data's returns, as SPAR's do."""

    starts: bool = field(default=False, kw_only=True)

    def pretrain(self, run: Run) -> None:
        if self.starts:
            loss: Any = self.loss
            run.keep("critics", loss)
            fit_critics(
                loss, self.data, **run.cfg.critics,
                compile=run.cfg.spar.compile, report=run.phase("critics"), progress=run.progress,
            )  # fmt: skip


def alternate(
    make_loss: Callable[..., Any],
    problem: Problem,
    data: OfflineReplayBuffer,
    *,
    critics: dict[str, Any],
    networks: dict[str, Any],
    policy_noise: float,
    noise_clip: float,
    actor_lr: float,
    qvalue_lr: float,
    policy_interval: int,
    target_rate: float,
    gamma: float,
    start: bool = False,
    decay: bool = False,
    actor_metrics: tuple[str, ...] = ("bc_loss",),
) -> ActorCritic:
    """The critics every time, the actor and all targets every `policy_interval` times.

    Args:
        make_loss: of an actor, a list of critics, the action spec and the noise.
        problem: sizes, statistics, number of updates.
        data: what the loss is trained on: the problem's, or what the method makes of it.
        critics: their `num`, `layer_norm`, `bound` and `kappa`.
        networks: options of `Problem.networks`.
        policy_noise: standard deviation of the noise on the bootstrapped action.
        noise_clip: bound of that noise.
        start: whether the critics start from the data's returns, with the main job's `critics` options.
        decay: whether both learning rates fall to zero along a cosine.
    """
    made = problem.networks(**networks)
    actor = made.deterministic_actor()
    qvalue = made.critics(critics["num"], layer_norm=critics["layer_norm"])
    noise = {"policy_noise": policy_noise, "noise_clip": noise_clip}
    loss = make_loss(actor, qvalue, action_spec=problem.data.action_spec, **noise)
    loss.make_value_estimator(gamma=gamma)
    # TorchRL's loss would bootstrap from the current observation, silently, were the next one missing.
    data[:1].select(*loss.in_keys)

    def step(name: str, lr: float, interval: int, metrics: tuple[str, ...]) -> Any:
        term, params = getattr(loss, f"{name}_loss"), getattr(loss, f"{name}_network_params").parameters()
        return problem.step(f"loss_{name}", term, params, lr, interval=interval, decay=decay, metrics=metrics)

    steps = [
        step("qvalue", qvalue_lr, 1, ("pred_value", "target_value")),
        step("actor", actor_lr, policy_interval, actor_metrics),
    ]
    return ActorCritic(data, actor, steps, loss, target_rate, policy_interval, starts=start)
