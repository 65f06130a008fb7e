"""Pre-training: clone the anchor, fit the VAE, warm-start the critics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.nn.functional import mse_loss
from torchrl.data import ImmutableDatasetWriter, ReplayBuffer, TensorDictReplayBuffer, TensorStorage
from torchrl.modules import TanhModule
from torchrl.objectives import BCLoss

from torchrl_spar.build import make_anchor, make_spar_loss
from torchrl_spar.conventions import check_spar_loss, masked_mean
from torchrl_spar.data.buffer import OfflineReplayBuffer
from torchrl_spar.data.returns import returns_to_go
from torchrl_spar.data.rows import check_buffer, rows_of, valid_mask
from torchrl_spar.errors import InputError, check_names, check_options, check_policy, check_present
from torchrl_spar.objective import SPARLoss
from torchrl_spar.training.asking import actions_of
from torchrl_spar.training.compiling import check_compiler
from torchrl_spar.training.health import CHECK_INTERVAL, check_finite
from torchrl_spar.training.optimization import Term, adam, cosine, descent, set_lr
from torchrl_spar.training.progress import Progress
from torchrl_spar.training.sampling import (
    Batches,
    batch_size_of,
    batches_of,
    has_trajectories,
    uniform_batches,
    with_anchor_actions,
    with_member_weights,
    with_state,
    with_value_targets,
)

Report = Callable[[int, dict[str, Tensor]], None]
# In half action ranges: a dimension the anchor reproduces exactly still gets a usable scale.
RESIDUAL_SCALE_FLOOR = 1e-2
# Mean over spread of the returns. At 860 the critics of FQE learnt both, far beyond they were wrong by a factor of 6.
LARGEST_OFFSET = 1_000
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def pretrain(
    data: OfflineReplayBuffer,
    *,
    anchor: TensorDictModuleBase | Mapping[str, Any] = NO_OPTIONS,
    vae: Mapping[str, Any] = NO_OPTIONS,
    critics: Mapping[str, Any] | None = NO_OPTIONS,
    episode_share: float = 0.5,
    report: Callable[[str], Report | None] | None = None,
    progress: Progress | None = None,
    keep: Callable[[str, Any], Any] = lambda name, part: part,
    compile: bool = False,
    **options: Any,
) -> tuple[SPARLoss, TensorDictReplayBuffer]:
    """Pre-training in three phases: clones the anchor, fits the VAE to its residuals, warm-starts the critics.

    The numbers are those of :func:`make_anchor`, :func:`fit_anchor`, :func:`make_spar_loss`,
    :func:`with_anchor_actions`, :func:`fit_vae` and :func:`fit_critics`, called in this order.

    Args:
        data: the data set, as :func:`~torchrl_spar.load_offline_dataset` returns it.
        anchor: options of :func:`fit_anchor`; or a behaviour policy that is trained already, which is not cloned.
        vae: options of :func:`fit_vae`.
        critics: options of :func:`fit_critics`; None leaves the critics as they are.
        episode_share: of the episodes, what each critic learns from after its start, which is on all of them; see
            :func:`~torchrl_spar.with_member_weights`. The draw depends on ``torch.manual_seed``.
        report: ``report(phase)``, with phase ``"anchor"``, ``"vae"`` or ``"critics"``, gives the ``report`` of its fit.
        progress: where to resume, see :class:`~torchrl_spar.Progress`.
        keep: called as ``keep(name, part)`` with the new ``"anchor"`` and ``"loss"`` before they are trained, and
            returns them: the place to load a checkpoint.
        compile: whether the fits go through ``torch.compile``.
        **options: of :func:`~torchrl_spar.make_spar_loss`; ``joint_vae`` is False by default: the VAE is trained here.

    Returns:
        The loss, and the data with the anchor's actions (:func:`~torchrl_spar.with_anchor_actions`) and, if the critics
        are started and the rows are single steps in order, each critic's episodes
        (:func:`~torchrl_spar.with_member_weights`) and their first targets (:func:`~torchrl_spar.with_value_targets`).

    Raises:
        InputError: for an unknown or impossible option, or data that is not loaded or lacks an entry.
        NonFiniteError: within 100 steps of a loss or parameter that is NaN or infinite.

    Source: the order of the phases is ours.

    Examples:
        >>> from torchrl_spar import SPARUpdate, make_toy_data, pretrain
        >>> few = {"steps": 2}
        >>> loss, rows = pretrain(make_toy_data(), anchor=few, vae=few, critics=few)
        >>> "loss_qvalue" in SPARUpdate(loss)(rows.sample())
        True
    """
    check_buffer(data, OfflineReplayBuffer)
    progress = progress or Progress()

    def part(name: str, phase: Mapping[str, Any], fit: Callable[..., Any]) -> dict[str, Any]:
        check_options_of(name, phase, fit)
        return {"compile": compile, **phase, "progress": progress, "report": report and report(name)}

    if not isinstance(anchor, TensorDictModuleBase):
        if not isinstance(anchor, Mapping):
            raise InputError(f"anchor: a {type(anchor).__name__}; give a TensorDictModule, or options of fit_anchor")
        sizes = {name: options[name] for name in ("hidden", "device") if name in options}
        anchor = fit_anchor(keep("anchor", make_anchor(data, **sizes)), data, **part("anchor", anchor, fit_anchor))
    loss = keep("loss", make_spar_loss(data, anchor=anchor, **{"joint_vae": False, **options}))
    rows = with_anchor_actions(loss, data)
    fit_vae(loss, rows, **part("vae", vae, fit_vae))
    if critics is not None:
        fit_critics(loss, rows, **part("critics", critics, fit_critics))
        rows = with_own_episodes(loss, rows, share=episode_share, seed=torch.initial_seed())
    return loss, rows


def check_options_of(name: str, phase: Mapping[str, Any], fit: Callable[..., Any]) -> None:
    """Refuses what is no option of the fit, and what is given once for all of them."""
    check_names(phase, fit, prefix=f"{name}.")
    for option in ("progress", "report"):
        if option in phase:
            raise InputError(f"{name}.{option}: give it as {option}=..., beside {name}")


def with_own_episodes(
    loss: SPARLoss, rows: TensorDictReplayBuffer, *, share: float, seed: int
) -> TensorDictReplayBuffer:
    """The data with each critic's episodes and its first targets; as it is where there are no trajectories."""
    if not has_trajectories(loss, rows):
        return rows
    return with_value_targets(loss, with_member_weights(loss, rows, share=share, seed=seed))


def cloning_loss(actor: TensorDictModuleBase) -> BCLoss:
    """TorchRL's ``BCLoss`` of an actor, without its warning."""
    with warnings.catch_warnings():
        # BCLoss has no target; TorchRL warns that it is not annotated.
        warnings.filterwarnings("ignore", message="The name target_actor_network_params")
        return BCLoss(actor)


def fit_anchor(
    actor: TensorDictModuleBase,
    replay_buffer: ReplayBuffer,
    *,
    steps: int = 20_000,
    lr: float = 1e-3,
    compile: bool = False,
    report: Report | None = None,
    progress: Progress | None = None,
) -> TensorDictModuleBase:
    """Behaviour cloning with TorchRL's ``BCLoss`` (squared error for a deterministic actor).

    That error is in half ranges of the actions, whose bounds are the buffer's ``action_spec`` or those of the actor's
    ``TanhModule``; where there is neither, it is in the actions' own unit.

    The learning rate falls to zero along a cosine. Buffers such as :func:`~torchrl_spar.load_offline_dataset` returns,
    in memory and sampled uniformly, are read in blocks of batches; any other is asked to ``sample()``.

    Args:
        actor: ``observation -> action``; trained in place.
        replay_buffer: the data; its ``sample()`` gives TED batches.
        steps: gradient steps.
        lr: initial learning rate of Adam.
        compile: whether loss and gradients go through ``torch.compile``: some seconds to start, then faster.
        report: called as ``report(step, {"loss_bc": ...})`` after every step.
        progress: where to resume, see :class:`~torchrl_spar.Progress`.

    Returns:
        The same actor, to be given to :func:`~torchrl_spar.make_spar_loss` as the anchor.

    Raises:
        InputError: for ``steps`` or ``lr`` below 0, or a ``progress`` from a fit of another number of steps,
            or ``compile`` where ``torch.compile`` does not work.
        NonFiniteError: within 100 steps of a loss or parameter that is NaN or infinite.

    Source: pure behaviour cloning is the paper's; optimiser and schedule are ours.

    Examples:
        >>> from torchrl_spar import fit_anchor, make_anchor, make_toy_data
        >>> data = make_toy_data()
        >>> actor = fit_anchor(make_anchor(data), data, steps=200)
        >>> rows = data[:]
        >>> bool((actor(observation=rows["observation"]) - rows["action"]).abs().mean() < 0.1)
        True
    """
    check_policy("actor", actor, "action")
    loss = cloning_loss(actor)
    key, writes_action_alone = loss.tensor_keys.action, {*actor.out_keys} == {loss.tensor_keys.action}
    unit = _half_range(actor, replay_buffer, key)

    def cloning(batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        valid = valid_mask(batch)
        valid = valid if valid is None else valid.view(batch.shape)
        if writes_action_alone:  # BCLoss's number, up to the unit
            action = actor(batch.select(*actor.in_keys))[key]
            if action.shape != batch[key].shape:  # would be repeated along the data's
                explain(batch)
            action, own = action / unit, batch[key] / unit
            error = mse_loss(action, own) if valid is None else masked_mean((action - own).pow(2).mean(-1), valid)
            return error, {}
        if valid is not None:  # BCLoss knows the collectors' mask alone
            batch = batch.copy().set(("collector", "mask"), valid)
        return loss(batch)["loss_bc"], {}

    def explain(batch: TensorDictBase) -> None:
        check_present(batch, [key])
        actions_of("the actor", lambda part: actor(part)[key], actor.in_keys, batch, batch[key])

    batches = batches_of(replay_buffer)
    progress = progress or Progress()
    _fit("loss_bc", cloning, actor, batches, steps, lr, progress, report, explain=explain, compile=compile)
    return actor


def _half_range(actor: TensorDictModuleBase, replay_buffer: ReplayBuffer, key: NestedKey) -> Tensor | float:
    """Half ranges of the actions, ``[action_dim]``; 1 where their bounds are unknown."""
    if isinstance(replay_buffer, OfflineReplayBuffer):
        space = replay_buffer.action_spec.space
        return space.high / 2 - space.low / 2
    name = key if isinstance(key, str) else "_".join(key)  # as TanhModule names its buffers
    for module in actor.modules():
        if isinstance(module, TanhModule) and key in module.out_keys:
            return getattr(module, f"{name}_high") / 2 - getattr(module, f"{name}_low") / 2
    return 1.0


def fit_vae(
    loss: SPARLoss,
    replay_buffer: ReplayBuffer,
    *,
    steps: int = 20_000,
    lr: float = 1e-3,
    compile: bool = False,
    report: Report | None = None,
    progress: Progress | None = None,
) -> SPARLoss:
    """Measures the data's residual scale and fits the VAE to the scaled residuals.

    Args:
        loss: its ``residual_scale`` and VAE are trained in place, and its targets made equal to what they follow;
            build it with ``joint_vae=False`` to leave the VAE alone afterwards.
        replay_buffer: the data; ``rb[:]`` gives all of it.
        steps: gradient steps.
        lr: initial learning rate of Adam, falling to zero along a cosine.
        compile: whether loss and gradients go through ``torch.compile``: some seconds to start, then faster.
        report: called as ``report(step, metrics)`` after every step.
        progress: where to resume, see :class:`~torchrl_spar.Progress`.

    Returns:
        The same loss.

    Raises:
        InputError: for ``steps`` or ``lr`` below 0, or a ``progress`` from a fit of another number of steps,
            or ``compile`` where ``torch.compile`` does not work.
        NonFiniteError: within 100 steps of a loss or parameter that is NaN or infinite.

    Source: fitting the residual manifold first is ours (the paper's part (i)).

    Examples:
        >>> from torchrl_spar import fit_vae, make_spar_loss, make_toy_data
        >>> data = make_toy_data()
        >>> fit_vae(make_spar_loss(data, joint_vae=False), data, steps=1).residual_scale.shape
        torch.Size([2])
    """
    loss.residual_scale = measure_residual_scale(loss, replay_buffer)
    params, batches = loss.residual_vae_params, batches_of(replay_buffer)
    # Head B's target holds the decoder, too.
    explain = partial(loss.explain, following=False)
    options: dict[str, Any] = {"finish": loss.sync_targets, "explain": explain, "compile": compile}
    _fit("loss_vae", loss.vae_loss, params, batches, steps, lr, progress or Progress(), report, **options)
    return loss


def fit_critics(
    loss: SPARLoss,
    replay_buffer: ReplayBuffer,
    *,
    steps: int = 3_000,
    lr: float = 1e-3,
    compile: bool = False,
    report: Report | None = None,
    progress: Progress | None = None,
) -> SPARLoss:
    """Warm-starts the critics by regression on the data's returns-to-go, the behaviour's own value.

    Bootstrapping from zero takes about ``1 / (target_rate (1 - gamma))`` updates to see as far as
    ``gamma`` does. Until then the values are short-sighted, and a policy that follows them can end
    below its anchor. Sets ``loss.reward_scale`` to one over the standard deviation of the
    returns-to-go, too; to 1 where they or the rewards are all the same.

    Args:
        loss: its critics and, where ``value_mix`` is positive, its value network are trained in place; the critics'
            targets become equal to them.
        replay_buffer: the data, in order; episodes are told apart by ``("next", "done")`` and,
            if there is one, ``"episode"``. If it holds ``"return_to_go"`` ``[N, 1]``, these returns are used.
        steps: gradient steps.
        lr: initial learning rate of Adam, falling to zero along a cosine.
        compile: whether loss and gradients go through ``torch.compile``: some seconds to start, then faster.
        report: called as ``report(step, metrics)`` after every step of the critics.
        progress: where to resume, see :class:`~torchrl_spar.Progress`.

    Returns:
        The same loss.

    Raises:
        InputError: for ``steps`` or ``lr`` below 0, a ``progress`` from a fit of another number of steps,
            a buffer without ``batch_size``, rows of several steps (``"steps_to_next_obs"``) without
            ``"return_to_go"``, or ``compile`` where ``torch.compile`` does not work.
        NonFiniteError: within 100 steps of a loss or parameter that is NaN or infinite.

    Source: ours.

    Examples:
        >>> from torchrl_spar import fit_critics, make_spar_loss, make_toy_data
        >>> data = make_toy_data()
        >>> loss = fit_critics(make_spar_loss(data), data, steps=1)
        >>> bool(loss.reward_scale != 1)
        True
    """
    is_spar = isinstance(loss, SPARLoss)
    if not all(hasattr(loss, name) for name in ("qvalue_regression", "value_mix")):  # which the recipes' rivals have
        check_spar_loss("loss", loss)
    data = rows_of(replay_buffer, loss.mask_keys) if is_spar else rows_of(replay_buffer)
    returns = data.get("return_to_go", None)
    if returns is None:
        keys = {f"{name}_key": getattr(loss.tensor_keys, name) for name in ("reward", "done", "terminated")}
        rows, keys["observation_key"] = with_state(loss, data) if is_spar else (data, "observation")
        returns = returns_to_go(rows, float(loss.value_estimator.gamma), **keys)
    has_scale = varies(data["next"][loss.tensor_keys.reward]) and varies(returns)
    if has_scale:
        warn_of_offset(returns)
    loss.reward_scale.copy_(1 / returns.std() if has_scale else torch.ones(()))
    # Not strict: the anchor is not asked here.
    rows = data.select(*loss.in_keys, strict=False).exclude("next").set("return", returns * loss.reward_scale)

    batches = partial(uniform_batches, rows, batch_size_of(replay_buffer))

    def regression(batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        return loss.qvalue_regression(batch, batch["return"].squeeze(-1))

    progress = progress or Progress()
    params = loss.qvalue_network_params
    explain = partial(loss.explain, following=False) if is_spar else None
    options: dict[str, Any] = {"explain": explain, "compile": compile}
    finish = partial(loss.sync_targets, "qvalue_network")
    _fit("loss_qvalue", regression, params, batches, steps, lr, progress, report, finish=finish, **options)
    if loss.value_mix > 0:
        params = loss.value_network_params
        _fit("loss_value", loss.value_loss, params, batches, steps, lr, progress, **options)
    return loss


def varies(values: Tensor) -> bool:
    """Whether the values vary by more than rounding: constant rewards have no scale."""
    values = values.double()
    return bool(values.max() - values.min() > 1e-6 * values.abs().mean())


def warn_of_offset(returns: Tensor) -> None:
    """Tells of returns that hardly vary beside their mean: critics reach neither."""
    mean, spread = returns.double().mean().abs(), returns.double().std()
    if mean > LARGEST_OFFSET * spread:
        warnings.warn(
            f"the data's returns vary by {spread / mean:.1g} of their mean, too little for critics to learn: subtract "
            "a constant from the rewards",
            stacklevel=4,
        )


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
        >>> from torchrl_spar import make_spar_loss, make_toy_data, measure_residual_scale
        >>> data = make_toy_data()
        >>> measure_residual_scale(make_spar_loss(data), data).shape
        torch.Size([2])
    """
    check_spar_loss("loss", loss)
    action_key, anchor_key = loss.tensor_keys.action, loss.tensor_keys.anchor_action
    data = rows_of(replay_buffer, loss.mask_keys)
    check_present(data, [action_key])
    if anchor_key not in data.keys(True):
        storage = TensorStorage(data, device=data.device)
        data = with_anchor_actions(loss, TensorDictReplayBuffer(storage=storage, writer=ImmutableDatasetWriter()))[:]
    difference = data[action_key] - data[anchor_key]
    mean_square = torch.stack([column.double().pow(2).mean() for column in difference.unbind(-1)])
    params = loss.actor_network_params
    floor = RESIDUAL_SCALE_FLOOR * (params.get("high") - params.get("low")) / 2
    return mean_square.sqrt().to(floor).maximum(floor)


def _fit(
    name: str,
    term: Term,
    params: torch.nn.Module,
    batches: Batches,
    steps: int,
    lr: float,
    progress: Progress,
    report: Report | None = None,
    *,
    finish: Callable[[], None] | None = None,
    explain: Callable[[TensorDictBase], None] | None = None,
    compile: bool = False,
) -> None:
    """Minimises one term with Adam; the learning rate falls to zero along a cosine. Calls `finish` at the end.

    `explain` is asked, after a failure, which network cannot take the batch.
    """
    check_options((steps >= 0, "steps", steps, "at least 0"), (lr >= 0, "lr", lr, "at least 0"))
    optimizer = adam(params.parameters(), lr)
    if compile:
        check_compiler(optimizer.param_groups[0]["params"][0].device)

    def mean(batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        value, metadata = term(batch)
        return value.mean(), metadata  # reduction="none" gives one a row

    descend = descent({name: mean}, optimizer, compile=compile)
    made, seed = progress.begin(name, steps, optimizer)
    for step, batch in zip(range(made + 1, steps + 1), batches(made, seed)):
        set_lr(optimizer, lr * cosine(step - 1, steps))
        try:
            metrics = descend(batch)
        except (RuntimeError, KeyError):
            if explain is not None:
                explain(batch)
            raise
        if finish is not None and step == steps:
            finish()
        if step % CHECK_INTERVAL == 0 or step == steps:
            check_finite(step, {name: metrics[name]}, {name: list(params.parameters())})
        progress.record(name, step)
        if report is not None:
            report(step, metrics)
        progress.on_step()
