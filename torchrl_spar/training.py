"""The phases of training: clone the anchor, fit the residual manifold, start the critics, improve."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule, TensorDictModuleBase
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchrl.data import ReplayBuffer
from torchrl.objectives import BCLoss
from torchrl.objectives.value.functional import reward2go

from torchrl_spar.compiling import check_compiler
from torchrl_spar.errors import InputError, check_options
from torchrl_spar.health import CHECK_INTERVAL, check_finite
from torchrl_spar.objective import SPARLoss
from torchrl_spar.progress import Progress
from torchrl_spar.sampling import batch_size_of, with_anchor_actions
from torchrl_spar.seeds import StackedSPARLoss

Report = Callable[[int, dict[str, Tensor]], None]
Term = Callable[[TensorDictBase], tuple[Tensor, dict[str, Tensor]]]
Program = Callable[[TensorDictBase], dict[str, Tensor]]
# In half action ranges: a dimension the anchor reproduces exactly still gets a usable scale.
RESIDUAL_SCALE_FLOOR = 1e-2
_OPTIMIZERS = ("critic_optimizer", "actor_optimizer")


def fit_anchor(
    actor: TensorDictModuleBase,
    replay_buffer: ReplayBuffer,
    *,
    steps: int = 20_000,
    lr: float = 1e-3,
    report: Report | None = None,
    progress: Progress | None = None,
) -> TensorDictModuleBase:
    """Behaviour cloning with TorchRL's ``BCLoss`` (squared error for a deterministic actor).

    The learning rate falls to zero along a cosine.

    Args:
        actor: ``observation -> action``; trained in place.
        replay_buffer: the data; its ``sample()`` gives TED batches.
        steps: gradient steps.
        lr: initial learning rate of Adam.
        report: called as ``report(step, {"loss_bc": ...})`` after every step.
        progress: where to go on, see :class:`~torchrl_spar.Progress`.

    Returns:
        The same actor, to be given to :func:`~torchrl_spar.make_spar_loss` as the anchor.

    Raises:
        InputError: for ``steps`` or ``lr`` below 0, or a ``progress`` from a fit of another number of steps.
        NonFiniteError: within 100 steps of a loss or parameter that is NaN or infinite.

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
    with warnings.catch_warnings():
        # BCLoss has no target; TorchRL warns that it is not annotated.
        warnings.filterwarnings("ignore", message="The name target_actor_network_params")
        loss = BCLoss(actor)

    def cloning(batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(batch)["loss_bc"], {}

    _fit("loss_bc", cloning, loss, replay_buffer.sample, steps, lr, progress or Progress(), report)
    return actor


def fit_residual(
    loss: SPARLoss,
    replay_buffer: ReplayBuffer,
    *,
    steps: int = 20_000,
    lr: float = 1e-3,
    report: Report | None = None,
    progress: Progress | None = None,
) -> SPARLoss:
    """Measures the data's residual scale and fits the VAE to the scaled residuals.

    Args:
        loss: its ``residual_scale`` and VAE are trained in place, and its targets made equal to what they follow;
            build it with ``joint_fit=False`` to leave the VAE alone afterwards.
        replay_buffer: the data; ``rb[:]`` gives all of it.
        steps: gradient steps.
        lr: initial learning rate of Adam, falling to zero along a cosine.
        report: called as ``report(step, metrics)`` after every step.
        progress: where to go on, see :class:`~torchrl_spar.Progress`.

    Returns:
        The same loss.

    Raises:
        InputError: for ``steps`` or ``lr`` below 0, or a ``progress`` from a fit of another number of steps.
        NonFiniteError: within 100 steps of a loss or parameter that is NaN or infinite.

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
    params, sample = loss.residual_vae_params, replay_buffer.sample
    # Head B's target holds the decoder, too.
    finish = loss.sync_targets
    _fit("loss_fit", loss.fit_loss, params, sample, steps, lr, progress or Progress(), report, finish=finish)
    return loss


def fit_value(
    loss: SPARLoss,
    replay_buffer: ReplayBuffer,
    *,
    steps: int = 3_000,
    lr: float = 1e-3,
    report: Report | None = None,
    progress: Progress | None = None,
) -> SPARLoss:
    """Starts the critics from the behaviour's own value: regression on the data's returns-to-go.

    Bootstrapping from zero takes about ``1 / (target_rate (1 - gamma))`` updates to see as far as
    ``gamma`` does. Until then the values are short-sighted, and a policy that follows them can end
    below its anchor. Sets ``loss.reward_scale`` to one over the standard deviation of the
    returns-to-go, too; where they are all the same, to one over their size.

    Args:
        loss: its critics, their targets and, if it is used, the value network are trained in place.
        replay_buffer: the data, in order; episodes are told apart by ``("next", "done")`` and,
            if there is one, ``"episode"``. Returns that it holds as ``"return_to_go"`` ``[N, 1]`` are taken as they
            are.
        steps: gradient steps.
        lr: initial learning rate of Adam, falling to zero along a cosine.
        report: called as ``report(step, metrics)`` after every step of the critics.
        progress: where to go on, see :class:`~torchrl_spar.Progress`.

    Returns:
        The same loss.

    Raises:
        InputError: for ``steps`` or ``lr`` below 0, a ``progress`` from a fit of another number of steps,
            a buffer without ``batch_size``, or rows of several steps (``"steps_to_next_obs"``) without
            ``"return_to_go"``.
        NonFiniteError: within 100 steps of a loss or parameter that is NaN or infinite.

    Source: ours.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl_spar import fit_value, load_offline_dataset, make_spar_loss
        >>> step = {"reward": torch.randn(8, 1), "terminated": torch.arange(8).unsqueeze(-1) == 7}
        >>> data = TensorDict({"observation": torch.randn(8, 3), "action": torch.full((8, 2), 0.5),
        ...                    "next": {"observation": torch.randn(8, 3), **step}}, [8])
        >>> loss = fit_value(make_spar_loss(3, Bounded(-1, 1, (2,))), load_offline_dataset(data, batch_size=8), steps=1)
        >>> bool(loss.reward_scale != 1)
        True
    """
    data = replay_buffer[:]
    returns = data.get("return_to_go", None)
    if returns is None:
        if "steps_to_next_obs" in data.keys():
            raise InputError(
                "the data's rewards are sums of several steps ('steps_to_next_obs'): give the returns of the single "
                "steps (returns_to_go) as 'return_to_go'"
            )
        keys = {f"{name}_key": getattr(loss.tensor_keys, name) for name in ("reward", "done", "terminated")}
        returns = returns_to_go(data, float(loss.value_estimator.gamma), **keys)
    loss.reward_scale.copy_(1 / _return_spread(returns))
    # Not strict: the anchor is not asked here.
    rows = data.select(*loss.in_keys, strict=False).exclude("next").set("return", returns * loss.reward_scale)

    shape = (batch_size_of(replay_buffer),)

    def sample() -> TensorDictBase:
        return rows[torch.randint(len(rows), shape, device=returns.device)]

    def regression(batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        return loss.qvalue_regression(batch, batch["return"].squeeze(-1))

    progress = progress or Progress()
    params = loss.qvalue_network_params
    finish = partial(loss.sync_targets, "qvalue_network")
    _fit("loss_qvalue", regression, params, sample, steps, lr, progress, report, finish=finish)
    if loss.value_mix > 0:
        _fit("loss_value", loss.value_loss, loss.value_network_params, sample, steps, lr, progress)
    return loss


def _return_spread(returns: Tensor) -> Tensor:
    """Standard deviation; where nothing but rounding varies, the size, which alone is left to scale by."""
    size = returns.double().abs().mean().to(returns)
    spread = returns.std(correction=min(1, len(returns) - 1))  # of a single row: 0, not NaN
    return torch.where(spread > 1e-6 * size, spread, size).clamp_min(1e-6)


def returns_to_go(
    data: TensorDictBase,
    gamma: float,
    *,
    reward_key: NestedKey = "reward",
    done_key: NestedKey = "done",
    terminated_key: NestedKey = "terminated",
) -> Tensor:
    """Discounted return from each row to the end of its episode, ``[N, 1]``.

    An episode that was cut off rather than terminated goes on with the mean return-to-go of the
    rows that lie at least three horizons, ``3 / (1 - gamma)`` steps, before such a cut (of
    all rows where there are none).

    Args:
        data: ``[N]`` rows in TED form, episodes in order.
        gamma: discount.
        reward_key: the reward's key under ``"next"``.
        done_key: likewise.
        terminated_key: likewise.

    Returns:
        Returns in the rewards' units.

    Source: ours.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> ended = torch.tensor([[False], [True]])
        >>> data = TensorDict({"next": {"reward": torch.ones(2, 1), "done": ended, "terminated": ended}}, [2])
        >>> returns_to_go(data, 0.5)
        tensor([[1.5000],
                [1.0000]])
    """
    reward, terminated = data["next"][reward_key], data["next"][terminated_key]
    end = episode_ends(data, done_key=done_key)
    cut = end & ~terminated
    returns = reward2go(reward, end, gamma)
    if not cut.any():
        return returns
    left = reward2go(torch.ones_like(reward), end, 1.0)
    before_cut = reward2go(cut.to(reward), end, 1.0) > 0
    settled = before_cut & (left > (3 / (1 - gamma) if gamma < 1 else math.inf))
    beyond = returns[settled].mean() if settled.any() else returns.mean()
    return reward2go(reward + gamma * beyond * cut, end, gamma)


@torch.no_grad()
def measure_residual_scale(loss: SPARLoss, replay_buffer: ReplayBuffer) -> Tensor:
    """The data's residual scale ``rho``: root mean square of ``a - a_b`` for each action dimension.

    At least one hundredth of half the action's range, so that an exactly cloned dimension
    does not divide by zero.

    Args:
        loss: with the trained anchor; not changed.
        replay_buffer: the data; ``rb[:]`` gives all of it.

    Returns:
        ``rho`` in action units, ``[action_dim]``.

    Source: ours.

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
    action_key, anchor_key = loss.tensor_keys.action, loss.tensor_keys.anchor_action
    data = replay_buffer[:]
    if anchor_key not in data.keys(True):
        data = with_anchor_actions(loss, replay_buffer)[:]
    difference = data[action_key] - data[anchor_key]
    mean_square = torch.stack([column.double().pow(2).mean() for column in difference.unbind(-1)])
    params = loss.actor_network_params
    floor = RESIDUAL_SCALE_FLOOR * (params.get("high") - params.get("low")) / 2
    return mean_square.sqrt().to(floor).maximum(floor)


def episode_ends(data: TensorDictBase, *, done_key: NestedKey = "done") -> Tensor:
    """Whether a row is the last of its episode, ``[N, 1]``, for TED rows ``[N]`` in order.

    Source: ours.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([[True], [False], [False]])
        >>> episode_ends(TensorDict({"next": {"done": done}, "episode": torch.tensor([0, 1, 2])}, [3])).flatten()
        tensor([True, True, True])
    """
    end = data["next"][done_key].clone()
    if "episode" in data.keys():
        end[:-1] |= (data["episode"][1:] != data["episode"][:-1]).view(-1, 1)
    end[-1] = True
    return end


class SPARUpdate:
    """One gradient update of SPAR: critics every time, the head every ``policy_interval`` times.

    All terms are taken at the same parameters, so the numbers are those of the plain loop: sum of
    the losses, ``torch.optim.Adam``, TorchRL's ``SoftUpdate``. The value network is left alone where
    nothing bootstraps from it (``value_mix=0``), and the VAE unless the loss was built with
    ``joint_fit=True``.

    Args:
        loss: the loss, trained in place, or a :class:`~torchrl_spar.StackedSPARLoss` of several seeds.
        qvalue_lr: learning rate of the critics and the value network (ours: 5e-4).
        actor_lr: learning rate of the head and, if it is trained jointly, the VAE (ours: 1e-3).
        target_rate: Polyak rate of all targets, the deployed head included (ours: 0.005).
        policy_interval: updates of the critics for one of the head (ours: 2, after TD3).
        decay_steps: updates over which both learning rates fall to zero along a cosine; never by default.
        compile: whether losses and gradients go through ``torch.compile``: a minute to start, then faster.
        cudagraph: whether updates are captured as a CUDA graph and replayed; batches must keep their
            shape, and the next call overwrites the metrics.

    Raises:
        InputError: for an option out of range, ``cudagraph`` with a loss that is not on a CUDA device, or ``compile``
            where ``torch.compile`` does not work.

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
        loss: SPARLoss | StackedSPARLoss,
        *,
        qvalue_lr: float = 5e-4,
        actor_lr: float = 1e-3,
        target_rate: float = 0.005,
        policy_interval: int = 2,
        decay_steps: int | None = None,
        compile: bool = False,
        cudagraph: bool = False,
    ) -> None:
        trained = {"loss_qvalue": _leaves(loss.network_params("qvalue_network"))}
        device = trained["loss_qvalue"][0].device
        check_options(
            (qvalue_lr >= 0, "qvalue_lr", qvalue_lr, "at least 0"),
            (actor_lr >= 0, "actor_lr", actor_lr, "at least 0"),
            (0 <= target_rate <= 1, "target_rate", target_rate, "between 0 and 1"),
            (policy_interval >= 1, "policy_interval", policy_interval, "at least 1"),
            (decay_steps is None or decay_steps >= 1, "decay_steps", decay_steps, "at least 1, or None"),
            (not cudagraph or device.type == "cuda", "cudagraph", cudagraph, f"False for a loss on {device}"),
        )
        if compile:
            check_compiler(device)
        _keep_scratch_memory()
        self.loss = loss
        self.policy_interval = policy_interval
        self.decay_steps = decay_steps
        self.steps = 0
        critic_terms: dict[str, Term] = {"loss_qvalue": loss.qvalue_loss}
        if loss.value_mix > 0:
            critic_terms["loss_value"] = loss.value_loss
            trained["loss_value"] = _leaves(loss.network_params("value_network"))
        actor_terms: dict[str, Term] = {"loss_residual": loss.residual_loss}
        trained["loss_residual"] = _leaves(loss.network_params("actor_network").get("head"))
        if loss.joint_fit:
            actor_terms["loss_fit"] = loss.fit_loss
            trained["loss_fit"] = _leaves(loss.network_params("residual_vae"))
        self.qvalue_lr, self.actor_lr = qvalue_lr, actor_lr
        critic_params, actor_params = (
            chain(*(trained[name] for name in terms)) for terms in (critic_terms, actor_terms)
        )
        self.critic_optimizer = _adam(critic_params, qvalue_lr, capturable=cudagraph)
        self.actor_optimizer = _adam(actor_params, actor_lr, capturable=cudagraph)
        self._trained, self._checked = trained, 0
        sources, targets = _trained_with_targets(loss)
        follow = get_ema_multi_avg_fn(1 - target_rate)

        def program(terms: Mapping[str, Term], *optimizers: torch.optim.Optimizer) -> Program:
            def losses(batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
                values: list[Tensor] = []
                metrics: dict[str, Tensor] = {}
                for name, term in terms.items():
                    value, metadata = term(batch)
                    values.append(value)
                    metrics |= {name: value.detach(), **metadata}
                metrics.pop("td_error", None)
                return torch.stack(values).sum(), metrics

            # Not the optimisers: they are one fused call each, and what Dynamo adds to that is slower.
            total = torch.compile(losses) if compile else losses

            def update(batch: TensorDictBase) -> dict[str, Tensor]:
                value, metrics = total(batch)
                _descend(value, *optimizers)
                follow(targets, sources, 0)
                return metrics

            return update

        critics = program(critic_terms, self.critic_optimizer)
        everything = program(critic_terms | actor_terms, self.critic_optimizer, self.actor_optimizer)

        @lru_cache(maxsize=2 * policy_interval)
        def sequence(offset: int, length: int) -> Callable[[TensorDictBase], TensorDict]:
            def run(block: TensorDictBase) -> TensorDict:
                metrics: dict[str, Tensor] = {}
                for step, batch in enumerate(block.unbind(0), start=offset + 1):
                    metrics |= (critics if step % policy_interval else everything)(batch)
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
        if self.decay_steps is not None:
            share = 0.5 + 0.5 * math.cos(math.pi * min(1.0, self.steps / self.decay_steps))
            for optimizer, lr in ((self.critic_optimizer, self.qvalue_lr), (self.actor_optimizer, self.actor_lr)):
                _set_lr(optimizer, share * lr)
        update = self._sequence(self.steps % self.policy_interval, len(block))
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
        """Takes a :meth:`state_dict`; with the loss's and the sampler's the updates go on with the same bits.

        The learning rates are this update's own, and so is ``cudagraph``.
        """
        for name in _OPTIMIZERS:
            optimizer = getattr(self, name)
            own = [{key: group[key] for key in ("lr", "capturable")} for group in optimizer.param_groups]
            optimizer.load_state_dict(state[name])
            for group, options in zip(optimizer.param_groups, own):
                group.update(options)
        self.steps = self._checked = state["steps"]
        self._sequence.cache_clear()  # a captured graph reads the old state

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """One update on a batch ``[*B]`` (``[S, B]`` for S seeds); see :meth:`run`."""
        return self.run(batch.unsqueeze(0))


def _keep_scratch_memory() -> None:
    """Has glibc keep the megabytes that an update frees, instead of mapping them anew in the next one.

    Its allocator returns free memory to the system above twice the largest block that it has mapped and freed.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # freed at once


def _leaves(params: TensorDictBase) -> list[Tensor]:
    """The parameters, without buffers such as a BatchNorm's count."""
    return [leaf for leaf in params.values(True, True) if leaf.requires_grad]


def _trained_with_targets(loss: SPARLoss | StackedSPARLoss) -> tuple[list[Tensor], list[Tensor]]:
    """Every trained parameter that has a target, and the targets in the same order."""
    pairs = []
    for name in ("actor_network", "qvalue_network"):
        params, targets = loss.network_params(name), loss.target_params(name)
        pairs += [(param, targets.get(key).data) for key, param in params.items(True, True) if param.requires_grad]
    return [param for param, _ in pairs], [target for _, target in pairs]


def _fit(
    name: str,
    term: Term,
    params: torch.nn.Module,
    sample: Callable[[], TensorDictBase],
    steps: int,
    lr: float,
    progress: Progress,
    report: Report | None = None,
    finish: Callable[[], None] | None = None,
) -> None:
    """Minimises one term with Adam, the learning rate falling to zero along a cosine; `finish` comes last."""
    check_options((steps >= 0, "steps", steps, "at least 0"), (lr >= 0, "lr", lr, "at least 0"))
    optimizer = _adam(params.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(progress.begin(name, steps, optimizer, schedule) + 1, steps + 1):
        value, metadata = term(sample())
        value = value.mean()  # reduction="none" gives one a row
        _descend(value, optimizer)
        schedule.step()
        if finish is not None and step == steps:
            finish()
        if step % CHECK_INTERVAL == 0 or step == steps:
            check_finite(step, {name: value.detach()}, {name: list(params.parameters())})
        progress.record(name, step)
        if report is not None:
            metadata.pop("td_error", None)  # one value a row, not a metric
            report(step, {name: value.detach(), **metadata})
        progress.on_step()


def _adam(params: Iterable[Tensor], lr: float, *, capturable: bool = False) -> torch.optim.Adam:
    # Fused: one call for all parameters, on a CPU too. A captured graph reads its learning rate from a tensor.
    params = [param for param in params if param.requires_grad]
    rate = torch.tensor(lr, device=params[0].device) if capturable else lr
    return torch.optim.Adam(params, lr=rate, fused=True, capturable=capturable)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
