"""The three phases of training: clone the anchor, fit the residual manifold, improve."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.objectives import BCLoss, SoftUpdate

from torchrl_spar.objective import SPARLoss

Report = Callable[[int, dict[str, Tensor]], None]
# In half action ranges: a dimension the anchor reproduces exactly still gets a usable scale.
RESIDUAL_SCALE_FLOOR = 1e-2
ROWS_PER_CALL = 16_384


def fit_anchor(
    actor: TensorDictModuleBase,
    replay_buffer: ReplayBuffer,
    *,
    steps: int = 5_000,
    lr: float = 1e-3,
    report: Report | None = None,
) -> TensorDictModuleBase:
    """Behaviour cloning with TorchRL's ``BCLoss`` (squared error for a deterministic actor).

    The learning rate falls to zero along a cosine.

    Args:
        actor: ``observation -> action``; trained in place.
        replay_buffer: the data; its ``sample()`` gives TED batches.
        steps: gradient steps.
        lr: initial learning rate of Adam.
        report: called as ``report(step, {"loss_bc": ...})`` after every step.

    Returns:
        The same actor, to be given to :func:`~torchrl_spar.make_spar_loss` as the anchor.

    Source: pure behaviour cloning is the paper's; optimiser and schedule are ours.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import fit_anchor, load_offline_dataset, make_anchor
        >>> step = {"reward": torch.zeros(8, 1), "terminated": torch.zeros(8, 1, dtype=torch.bool)}
        >>> data = TensorDict({"observation": torch.randn(8, 3), "action": torch.full((8, 2), 0.5),
        ...                    "next": {"observation": torch.randn(8, 3), **step}}, [8])
        >>> buffer = load_offline_dataset(data, batch_size=8)
        >>> actor = fit_anchor(make_anchor(3, Bounded(-1, 1, (2,))), buffer, steps=200)
        >>> bool((actor(data.select("observation"))["action"] - 0.5).abs().max() < 0.1)
        True
    """
    loss = BCLoss(actor)
    optimizer = torch.optim.Adam(loss.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        loss_bc = loss(replay_buffer.sample())["loss_bc"]
        _descend(loss_bc, optimizer)
        schedule.step()
        if report is not None:
            report(step, {"loss_bc": loss_bc.detach()})
    return actor


def fit_residual(
    loss: SPARLoss,
    replay_buffer: ReplayBuffer,
    *,
    steps: int = 5_000,
    lr: float = 1e-3,
    report: Report | None = None,
) -> SPARLoss:
    """Measures the data's residual scale and fits the VAE to the scaled residuals.

    Args:
        loss: its ``residual_scale`` and VAE are trained in place; build it with
            ``joint_fit=False`` to leave them alone afterwards.
        replay_buffer: the data; ``rb[:]`` gives all of it.
        steps: gradient steps.
        lr: initial learning rate of Adam, falling to zero along a cosine.
        report: called as ``report(step, metrics)`` after every step.

    Returns:
        The same loss.

    Source: fitting the residual manifold first is ours (the paper's part (i)).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import fit_residual, load_offline_dataset, make_spar_loss
        >>> step = {"reward": torch.zeros(8, 1), "terminated": torch.zeros(8, 1, dtype=torch.bool)}
        >>> data = TensorDict({"observation": torch.randn(8, 3), "action": torch.full((8, 2), 0.5),
        ...                    "next": {"observation": torch.randn(8, 3), **step}}, [8])
        >>> loss = make_spar_loss(3, Bounded(-1, 1, (2,)), joint_fit=False)
        >>> fit_residual(loss, load_offline_dataset(data, batch_size=8), steps=1).residual_scale.shape
        torch.Size([2])
    """
    loss.residual_scale = measure_residual_scale(loss, replay_buffer)
    optimizer = torch.optim.Adam(loss.residual_vae_params.values(True, True), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        loss_fit, metadata = loss.fit_loss(replay_buffer.sample())
        _descend(loss_fit, optimizer)
        schedule.step()
        if report is not None:
            report(step, {"loss_fit": loss_fit.detach(), **metadata})
    return loss


@torch.no_grad()
def measure_residual_scale(loss: SPARLoss, replay_buffer: ReplayBuffer) -> Tensor:
    """Root mean square of ``a - a_b`` over the data, for each action dimension ``[action_dim]``.

    At least one hundredth of half the action's range, so that an exactly cloned dimension
    does not divide by zero. Source: ours.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import load_offline_dataset, make_spar_loss
        >>> step = {"reward": torch.zeros(8, 1), "terminated": torch.zeros(8, 1, dtype=torch.bool)}
        >>> data = TensorDict({"observation": torch.randn(8, 3), "action": torch.full((8, 2), 0.5),
        ...                    "next": {"observation": torch.randn(8, 3), **step}}, [8])
        >>> measure_residual_scale(make_spar_loss(3, Bounded(-1, 1, (2,))), load_offline_dataset(data)).shape
        torch.Size([2])
    """
    anchor, action_key = loss.anchor, loss.tensor_keys.action
    data = replay_buffer[:]
    total = torch.zeros((), dtype=torch.float64)
    for rows in data.split(ROWS_PER_CALL):
        difference = rows.get(action_key) - anchor(rows.select(*anchor.in_keys)).get(action_key)
        total = total.to(difference.device) + difference.double().pow(2).sum(0)
    params = loss.actor_network_params
    floor = RESIDUAL_SCALE_FLOOR * (params.get("high") - params.get("low")) / 2
    return (total / len(data)).sqrt().to(floor).maximum(floor)


class SPARUpdate:
    """One gradient update of SPAR: critics every time, the head every ``policy_interval`` times.

    The value network is left alone where nothing bootstraps from it (``value_mix=0``), and
    the VAE unless the loss was built with ``joint_fit=True``.

    Args:
        loss: the loss; trained in place.
        qvalue_lr: learning rate of the critics and the value network (ours: 5e-4).
        actor_lr: learning rate of the head and, if it is trained jointly, the VAE (ours: 1e-3).
        target_rate: Polyak rate of all targets, the deployed head included (ours: 0.005).
        policy_interval: updates of the critics for one of the head (ours: 2, after TD3).

    Source: ours.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import SPARUpdate, make_spar_loss
        >>> step = {"reward": torch.zeros(8, 1), "terminated": torch.zeros(8, 1, dtype=torch.bool)}
        >>> data = TensorDict({"observation": torch.randn(8, 3), "action": torch.full((8, 2), 0.5),
        ...                    "next": {"observation": torch.randn(8, 3), "done": step["terminated"], **step}}, [8])
        >>> update = SPARUpdate(make_spar_loss(3, Bounded(-1, 1, (2,)), joint_fit=False))
        >>> metrics = [update(data), update(data)]
        >>> "loss_residual" in metrics[0], "loss_residual" in metrics[1]
        (False, True)
    """

    def __init__(
        self,
        loss: SPARLoss,
        *,
        qvalue_lr: float = 5e-4,
        actor_lr: float = 1e-3,
        target_rate: float = 0.005,
        policy_interval: int = 2,
    ) -> None:
        self.loss = loss
        self.policy_interval = policy_interval
        self.steps = 0
        self.critic_terms = {"loss_qvalue": loss.qvalue_loss}
        critic_params = list(loss.qvalue_network_params.values(True, True))
        if loss.value_mix > 0:
            self.critic_terms["loss_value"] = loss.value_loss
            critic_params += loss.value_network_params.values(True, True)
        self.actor_terms = {"loss_residual": loss.residual_loss}
        actor_params = list(loss.actor_network_params.get("head").values(True, True))
        if loss.joint_fit:
            self.actor_terms["loss_fit"] = loss.fit_loss
            actor_params += loss.residual_vae_params.values(True, True)
        self.critic_optimizer = torch.optim.Adam(_trainable(critic_params), lr=qvalue_lr)
        self.actor_optimizer = torch.optim.Adam(_trainable(actor_params), lr=actor_lr)
        self.target_updater = SoftUpdate(loss, tau=target_rate)

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Updates on one batch ``[*B]``; returns the losses and diagnostics, detached."""
        self.steps += 1
        metrics = self._minimize(self.critic_terms, self.critic_optimizer, batch)
        if self.steps % self.policy_interval == 0:
            metrics |= self._minimize(self.actor_terms, self.actor_optimizer, batch)
        self.target_updater.step()
        return metrics

    @staticmethod
    def _minimize(
        terms: Mapping[str, Callable[[TensorDictBase], tuple[Tensor, dict[str, Tensor]]]],
        optimizer: torch.optim.Optimizer,
        batch: TensorDictBase,
    ) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        values = []
        for name, term in terms.items():
            value, metadata = term(batch)
            values.append(value)
            metrics |= {name: value.detach(), **metadata}
        _descend(torch.stack(values).sum(), optimizer)
        metrics.pop("td_error", None)
        return metrics


def _trainable(params: list[Tensor]) -> list[Tensor]:
    return [param for param in params if param.requires_grad]


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
