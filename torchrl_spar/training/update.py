"""The main phase: one gradient update of SPAR."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from torchrl_spar.conventions import check_spar_loss
from torchrl_spar.errors import InputError, check_options
from torchrl_spar.objective import SPARLoss
from torchrl_spar.training.compiling import check_compiler
from torchrl_spar.training.health import CHECK_INTERVAL, check_finite
from torchrl_spar.training.optimization import Term, adam, cosine, descent, set_lr
from torchrl_spar.training.stacked import StackedSPARLoss

Program = Callable[[TensorDictBase], dict[str, Tensor]]
_OPTIMIZERS = ("critic_optimizer", "actor_optimizer")


class SPARUpdate:
    """One gradient update of SPAR: critics every time until they settle, the head every ``policy_interval`` times.

    All terms are computed at the same parameters, so the numbers are those of the plain loop: sum of
    the losses, ``torch.optim.Adam``, TorchRL's ``SoftUpdate``. A value network is trained only where
    targets bootstrap from it (``value_mix > 0``), the VAE only with ``joint_vae=True``. No ``td_error`` is written: a
    prioritised buffer needs the plain loop.

    Args:
        loss: the loss, trained in place, or a :class:`~torchrl_spar.StackedSPARLoss` of several seeds.
        qvalue_lr: learning rate of the critics and the value network (ours: 5e-4).
        actor_lr: learning rate of the head and, if it is trained jointly, the VAE (ours: 1e-3).
        target_rate: Polyak rate of all targets, the deployed head included (ours: 0.01).
        policy_interval: updates of the critics for one of the head (ours: 2, after TD3).
        decay_steps: updates over which both learning rates fall to zero along a cosine; constant rates by default.
        critic_share: of ``decay_steps``, in which the critics' rate (and the value network's) falls to zero. From the
            next block on they stay as they are and are not reported; head, VAE and targets still move (ours: 0.5). With
            constant rates they never stop.
        compile: whether losses and gradients go through ``torch.compile``: one to three minutes to start, then faster.
        cudagraph: whether updates are captured as a CUDA graph and replayed; batches must keep their
            shape, and the next call overwrites the metrics.

    Raises:
        InputError: for an option out of range, ``cudagraph`` with a loss that is not on a CUDA device, or ``compile``
            where ``torch.compile`` does not work.

    Source: ours.

    Examples:
        >>> from torchrl_spar import SPARUpdate, make_spar_loss, make_toy_data
        >>> data = make_toy_data()
        >>> update = SPARUpdate(make_spar_loss(data, joint_vae=False))
        >>> metrics = [update(data.sample()), update(data.sample())]
        >>> "loss_actor" in metrics[0], "loss_actor" in metrics[1]
        (False, True)
    """

    def __init__(
        self,
        loss: SPARLoss | StackedSPARLoss,
        *,
        qvalue_lr: float = 5e-4,
        actor_lr: float = 1e-3,
        target_rate: float = 0.01,
        policy_interval: int = 2,
        decay_steps: int | None = None,
        critic_share: float = 0.5,
        compile: bool = False,
        cudagraph: bool = False,
    ) -> None:
        if not isinstance(loss, StackedSPARLoss):
            check_spar_loss("loss", loss)
        trained = {"loss_qvalue": _leaves(loss.network_params("qvalue_network"))}
        device = trained["loss_qvalue"][0].device
        check_options(
            (qvalue_lr >= 0, "qvalue_lr", qvalue_lr, "at least 0"),
            (actor_lr >= 0, "actor_lr", actor_lr, "at least 0"),
            (0 <= target_rate <= 1, "target_rate", target_rate, "between 0 and 1"),
            (policy_interval >= 1, "policy_interval", policy_interval, "at least 1"),
            (decay_steps is None or decay_steps >= 1, "decay_steps", decay_steps, "at least 1, or None"),
            (0 < critic_share <= 1, "critic_share", critic_share, "above 0, at most 1"),
            (not cudagraph or device.type == "cuda", "cudagraph", cudagraph, f"False for a loss on {device}"),
        )
        if compile:
            check_compiler(device)
        self.loss = loss
        self.policy_interval = policy_interval
        self.decay_steps, self.critic_share = decay_steps, critic_share
        self.steps = 0
        critic_terms: dict[str, Term] = {"loss_qvalue": loss.qvalue_loss}
        if loss.value_mix > 0:
            critic_terms["loss_value"] = loss.value_loss
            trained["loss_value"] = _leaves(loss.network_params("value_network"))
        actor_terms: dict[str, Term] = {"loss_actor": loss.actor_loss}
        trained["loss_actor"] = _leaves(loss.network_params("actor_network").get("head"))
        if loss.joint_vae:
            actor_terms["loss_vae"] = loss.vae_loss
            trained["loss_vae"] = _leaves(loss.network_params("residual_vae"))
        self.qvalue_lr, self.actor_lr = qvalue_lr, actor_lr
        critic_params, actor_params = (
            chain(*(trained[name] for name in terms)) for terms in (critic_terms, actor_terms)
        )
        self.critic_optimizer = adam(critic_params, qvalue_lr, capturable=cudagraph)
        self.actor_optimizer = adam(actor_params, actor_lr, capturable=cudagraph)
        self._trained, self._checked = trained, 0
        sources, targets = _trained_with_targets(loss)
        follow = get_ema_multi_avg_fn(1 - target_rate)

        def program(terms: Mapping[str, Term], *optimizers: torch.optim.Optimizer) -> Program:
            descend = descent(terms, *optimizers, compile=compile)

            def update(batch: TensorDictBase) -> dict[str, Tensor]:
                metrics = descend(batch)
                follow(targets, sources, 0)
                return metrics

            return update

        def average(batch: TensorDictBase) -> dict[str, Tensor]:
            follow(targets, sources, 0)
            return {}

        critics = program(critic_terms, self.critic_optimizer)
        everything = program(critic_terms | actor_terms, self.critic_optimizer, self.actor_optimizer)
        actor = program(actor_terms, self.actor_optimizer)

        @lru_cache(maxsize=4 * policy_interval)
        def sequence(offset: int, length: int, settled: bool) -> Callable[[TensorDictBase], TensorDict]:
            between, at_interval = (average, actor) if settled else (critics, everything)

            def run(block: TensorDictBase) -> TensorDict:
                metrics: dict[str, Tensor] = {}
                for step, batch in enumerate(block.unbind(0), start=offset + 1):
                    metrics |= (between if step % policy_interval else at_interval)(batch)
                return TensorDict(metrics)

            return CudaGraphModule(run) if cudagraph else run

        self._sequence = sequence

    def run(self, block: TensorDictBase) -> dict[str, Tensor]:
        """Updates on every batch of a block ``[n, *B]`` in turn, with ``cudagraph`` as one graph.

        The learning rates are those at the block's start.

        Returns:
            The losses and diagnostics of the last update that has them, detached.

        Raises:
            NonFiniteError: within 100 updates of a loss or parameter that is NaN or infinite.
        """
        settled = False
        if self.decay_steps is not None:
            critic_steps = max(1, round(self.critic_share * self.decay_steps))
            settled = self.steps >= critic_steps
            set_lr(self.critic_optimizer, self.qvalue_lr * cosine(self.steps, critic_steps))
            set_lr(self.actor_optimizer, self.actor_lr * cosine(self.steps, self.decay_steps))
        update = self._sequence(self.steps % self.policy_interval, len(block), settled)
        self.steps += len(block)
        metrics = dict(update(block).items())
        if self.steps >= self._checked + CHECK_INTERVAL:
            losses = {name: value for name, value in metrics.items() if name in self._trained}
            check_finite(self.steps, losses, self._trained)
            self._checked = self.steps
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """``steps``, ``critic_optimizer`` and ``actor_optimizer``; the networks are in the loss's own ``state_dict``.

        Of a stack: call :meth:`StackedSPARLoss.copy_back` and save the losses.
        """
        return {"steps": self.steps, **{name: getattr(self, name).state_dict() for name in _OPTIMIZERS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a :meth:`state_dict`; restoring loss and sampler as well makes the resume bit-exact.

        Learning rates and ``cudagraph`` stay those of this object.
        """
        for name in _OPTIMIZERS:
            optimizer = getattr(self, name)
            own = [{key: group[key] for key in ("lr", "capturable")} for group in optimizer.param_groups]
            optimizer.load_state_dict(state[name])
            for group, options in zip(optimizer.param_groups, own):
                group.update(options)
        self.steps = self._checked = state["steps"]
        self._sequence.cache_clear()  # a captured graph reads the old state

    def __deepcopy__(self, memo: dict[int, Any]) -> SPARUpdate:
        raise InputError("a copy of SPARUpdate would train the loss of the first: copy the loss, and make it an update")

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """One update on a batch ``[*B]`` (``[S, B]`` for S seeds); see :meth:`run`."""
        try:
            return self.run(batch.unsqueeze(0))
        except (RuntimeError, KeyError):
            self.loss.explain(batch)
            raise


def _leaves(params: TensorDictBase) -> list[Tensor]:
    """The parameters without buffers such as BatchNorm's counter."""
    return [leaf for leaf in params.values(True, True) if leaf.requires_grad]


def _trained_with_targets(loss: SPARLoss | StackedSPARLoss) -> tuple[list[Tensor], list[Tensor]]:
    """Every trained parameter that has a target, and the targets in the same order."""
    pairs = []
    for name in ("actor_network", "qvalue_network"):
        params, targets = loss.network_params(name), loss.target_params(name)
        pairs += [(param, targets.get(key).data) for key, param in params.items(True, True) if param.requires_grad]
    return [param for param, _ in pairs], [target for _, target in pairs]
