"""Fits FQE critics to a data set, less the episodes that are held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.envs.utils import ExplorationType
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from torchrl_spar.build import HIDDEN, DefaultNetworks
from torchrl_spar.data.buffer import OfflineReplayBuffer
from torchrl_spar.data.returns import episode_ends, returns_to_go
from torchrl_spar.data.rows import rows_of
from torchrl_spar.errors import InputError, check_options, check_policy, first_line
from torchrl_spar.ope.fqe_loss import FQELoss
from torchrl_spar.ope.many_policies import StackedFQELoss
from torchrl_spar.training.asking import actions_of
from torchrl_spar.training.pretrain import Report, _fit, varies, warn_of_offset
from torchrl_spar.training.progress import Progress
from torchrl_spar.training.sampling import Batches, batch_size_of

MASK = ("collector", "mask")
# Least width of a trace, in half ranges of the actions.
LEAST_WIDTH = 1e-3
TINY = torch.finfo(torch.float32).tiny


class FQEFit(NamedTuple):
    """What :func:`fit_fqe` returns.

    Attributes:
        loss: with the trained critics.
        held_out: rows ``[M]`` of the episodes that the critics have not seen, in order, with ``"episode"`` 0, 1, ...
            and ``"return_to_go"``.
    """

    loss: FQELoss
    held_out: TensorDictBase


def fit_fqe(policy: TensorDictModuleBase, data: ReplayBuffer, **options: Any) -> FQEFit:
    """Fitted Q Evaluation of a policy: critics of its value, never those that trained it.

    Args:
        policy: a TensorDictModule that writes the action; copied and frozen.
        data: see :func:`fit_fqe_each`.
        **options: of :func:`fit_fqe_each`, such as ``gamma``, ``steps``, ``hidden`` and ``seed``.

    Returns:
        :class:`FQEFit`: the loss and the held-out rows.

    Raises:
        InputError: as :func:`fit_fqe_each`.
        NonFiniteError: likewise.

    Source: Le et al. 2019 (https://arxiv.org/abs/1903.08738); see :func:`fit_fqe_each` for what is ours.

    Examples:
        >>> from torchrl_spar import fit_fqe, make_anchor, make_toy_data
        >>> data = make_toy_data()
        >>> loss, held_out = fit_fqe(make_anchor(data), data, warm_steps=2, steps=2, slice_len=4, hidden=[8])
        >>> loss.state_value(held_out).shape
        torch.Size([5, 10])
    """
    return fit_fqe_each({"policy": policy}, data, **options)["policy"]


def fit_fqe_each(
    policies: Mapping[str, TensorDictModuleBase],
    data: ReplayBuffer,
    *,
    qvalue_network: Sequence[TensorDictModuleBase] | None = None,
    num_qvalue_nets: int = 5,
    hidden: Sequence[int] = HIDDEN,
    gamma: float = 0.99,
    lmbda: float = 0.9,
    slice_len: int = 16,
    exploration_type: ExplorationType = ExplorationType.DETERMINISTIC,
    warm_steps: int = 3_000,
    steps: int = 20_000,
    lr: float = 5e-4,
    target_rate: float = 0.01,
    held_out: float = 0.2,
    seed: int = 0,
    start: FQELoss | None = None,
    report: Report | None = None,
) -> dict[str, FQEFit]:
    """:func:`fit_fqe` of several policies, side by side: five take 1.5 to 2 times less CPU time than one by one.

    A share of the episodes is held out. Each critic sees its own bootstrap sample of the others, starts from a
    regression on their returns-to-go (the behaviour's value) and bootstraps from its own target. Fits with one seed
    share the split, the samples, the initial critics and the batches, so that their differences are paired. Critics
    of all policies are one stack; each policy's are what they are alone, up to rounding.

    Args:
        policies: by name, TensorDictModules that write the action; copied and frozen.
        data: as :func:`~torchrl_spar.load_offline_dataset` returns it; ``batch_size`` rows a step.
        qvalue_network: critics of your own (copied), for other observations than one vector; their number is E.
        num_qvalue_nets: number of critics E.
        hidden: widths of their hidden layers.
        gamma: discount.
        lmbda: the largest trace, see :class:`FQELoss`; near is within one standard deviation of the data's actions.
        slice_len: rows of an episode in a piece that traces follow; a batch has ``batch_size // slice_len`` pieces.
        exploration_type: whether the mode or, of a single policy, its distribution (``RANDOM``) is evaluated.
        warm_steps: gradient steps on the returns-to-go.
        steps: gradient steps of FQE.
        lr: initial learning rate of Adam in both, falling to zero along a cosine.
        target_rate: of ``SoftUpdate``.
        held_out: share of the episodes that the critics do not see.
        seed: of split, bootstrap, critics and batches.
        start: a loss whose critics these start from, instead of new ones on the returns-to-go.
        report: called as ``report(step, metrics)`` after every step of FQE; of several policies, metrics are ``[P]``.

    Returns:
        By name, :class:`FQEFit`: the loss and the held-out rows.

    Raises:
        InputError: without a policy, for an option out of range, data of fewer than four episodes or out of order,
            or a policy that cannot take the data or writes actions of another shape, NaN or infinity.
        NonFiniteError: within 100 steps of a loss or parameter that is NaN or infinite.

    Source: Le et al. 2019 (https://arxiv.org/abs/1903.08738); the warm start, traces and ensemble are ours.

    Examples:
        >>> from torchrl_spar import fit_fqe_each, make_anchor, make_toy_data
        >>> data = make_toy_data()
        >>> policies = {name: make_anchor(data) for name in ("one", "other")}
        >>> fits = fit_fqe_each(policies, data, warm_steps=2, steps=2, slice_len=4, hidden=[8])
        >>> loss, held_out = fits["other"]
        >>> loss.state_value(held_out).shape
        torch.Size([5, 10])
    """
    batch_size = batch_size_of(data)
    if not isinstance(policies, (Mapping, torch.nn.ModuleDict)):
        raise InputError(f"policies: a {type(policies).__name__}; give policies by name, or one to fit_fqe")
    for name, policy in policies.items():
        check_policy(_called(name, policies), policy)
    if isinstance(qvalue_network, torch.nn.Module) and not isinstance(qvalue_network, torch.nn.ModuleList):
        raise InputError("qvalue_network: one critic; give a list, whose length is the number of critics")
    is_fixed = exploration_type is ExplorationType.DETERMINISTIC
    check_options(
        (len(policies) > 0, "policies", policies, "one at least"),
        (is_fixed or len(policies) == 1, "exploration_type", exploration_type, "DETERMINISTIC for several policies"),
        (num_qvalue_nets >= 1, "num_qvalue_nets", num_qvalue_nets, "at least 1"),
        (start is None or isinstance(start, FQELoss), "start", type(start).__name__, "an FQELoss"),
        (0 <= gamma <= 1, "gamma", gamma, "between 0 and 1"),
        (1 <= slice_len <= batch_size, "slice_len", slice_len, f"between 1 and the batch size {batch_size}"),
        (0 <= target_rate <= 1, "target_rate", target_rate, "between 0 and 1"),
    )
    rows = episodes_of(data, gamma)
    parts = split_episodes(rows, held_out, seed)
    device = rows["episode"].device
    critics = qvalue_network or _critics(data, num_qvalue_nets, hidden, seed)
    options: dict[str, Any] = {"num_qvalue_nets": len(critics), "lmbda": lmbda, "exploration_type": exploration_type}
    width = rows["action"].std(0)
    width = width.maximum((LEAST_WIDTH * _size_of_actions(data, rows["action"])).clamp_min(TINY))
    fits: dict[str, FQEFit] = {}
    trains: list[TensorDictBase] = []
    for name, policy in policies.items():
        # The loss would train the caller's own, and fits of several policies would share them.
        loss = FQELoss(policy, deepcopy([*critics]), trace_width=width, **options).to(device)
        loss.make_value_estimator(gamma=gamma)
        keep = list(dict.fromkeys([*loss.in_keys, "return_to_go", "episode", "steps_to_next_obs"]))
        train, held = (part.select(*keep, strict=False) for part in parts)
        who = _called(name, policies)
        for part in (train, held):
            _add_policy_actions(who, loss, part, is_fixed)
        trains.append(train)
        fits[name] = FQEFit(loss, held)
    losses, train = [fit.loss for fit in fits.values()], trains[0]
    try:
        losses[0].state_value(train[:1])
    except (RuntimeError, KeyError) as err:
        raise InputError(f"qvalue_network: the critics cannot take the data: {first_line(err)}") from err
    if len(losses) > 1:
        for key in ("policy_action", ("next", "policy_action")):
            train.set(key, torch.stack([part[key] for part in trains], 1))

    generator = torch.Generator(device).manual_seed(seed)
    train.set("member_weight", _bootstrap_weights(train["episode"], len(critics), generator))
    batches = _slices(train, batch_size // slice_len, slice_len, generator)

    def drawn(step: int, seed: int) -> Iterator[TensorDictBase]:
        return batches

    if start is None:
        start = losses[0]
        _warm_start(start, train["return_to_go"], drawn, warm_steps, lr)
    for loss in losses:
        _copy_critics(start, loss)
    if len(losses) == 1:
        progress = Progress(SoftUpdate(loss, tau=target_rate).step)
        _fit("loss_qvalue", loss.qvalue_loss, loss.qvalue_network_params, drawn, steps, lr, progress, report)
    else:
        stack = StackedFQELoss(losses, target_rate)
        progress = Progress(stack.update_targets)
        _fit("loss_qvalue", stack.qvalue_loss, stack.qvalue_network_params, drawn, steps, lr, progress, report)
        stack.copy_back()
    return fits


def _called(name: str, policies: Mapping[str, TensorDictModuleBase]) -> str:
    return "the policy" if len(policies) == 1 else f"the policy {name!r}"


def _size_of_actions(data: ReplayBuffer, actions: Tensor) -> Tensor:
    """Half their range, where it is known; else the largest, ``[action_dim]``."""
    if isinstance(data, OfflineReplayBuffer):
        return (data.action_spec.space.high / 2 - data.action_spec.space.low / 2).to(actions)
    return actions.abs().amax(0)


def _warm_start(loss: FQELoss, returns: Tensor, batches: Batches, steps: int, lr: float) -> None:
    """Regression on the returns-to-go, which also give the scale of the rewards."""
    mean, spread = returns.mean().abs(), returns.std()
    if varies(returns):
        warn_of_offset(returns)
    else:
        spread = mean if mean > 0 else torch.ones_like(mean)
    loss.reward_scale.copy_(1 / spread)

    def regression(batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        return loss.qvalue_regression(batch, batch["return_to_go"].squeeze(-1) * loss.reward_scale)

    params = loss.qvalue_network_params
    _fit("warm_start", regression, params, batches, steps, lr, Progress(), finish=loss.sync_targets)


def _copy_critics(start: FQELoss, loss: FQELoss) -> None:
    for name in ("qvalue_network_params", "target_qvalue_network_params", "reward_scale"):
        source, own = (one._modules.get(name, one._buffers.get(name)) for one in (start, loss))
        own.data.copy_(source.data)


def episodes_of(data: ReplayBuffer, gamma: float) -> TensorDictBase:
    """The rows ``[N]`` in order, with their ``"episode"`` ``[N]`` 0, 1, ... and ``"return_to_go"`` ``[N, 1]``.

    Raises:
        InputError: for rows out of order, or ``gamma`` 1 where episodes are cut: those have no value.
    """
    rows = rows_of(data).copy()
    if "return_to_go" not in rows.keys():
        rows.set("return_to_go", returns_to_go(rows, gamma))
    end = episode_ends(rows).reshape(-1)
    cut = int((end & ~rows["next", "terminated"].reshape(-1)).sum())
    if gamma == 1 and cut:
        raise InputError(f"gamma=1: {cut} episodes are cut, not terminated, so their value has no end; give it below 1")
    return rows.set("episode", end.cumsum(0) - end.long())


def split_episodes(rows: TensorDictBase, share: float, seed: int) -> tuple[TensorDictBase, TensorDictBase]:
    """The rows to train on and those held out, a share of the episodes, at least two on each side; ids from 0."""
    check_options((0 < share < 1, "held_out", share, "between 0 and 1, exclusive"))
    episode = rows["episode"]
    count = int(episode[-1]) + 1
    if count < 4:
        raise InputError(
            f"the data holds {count} episodes, and at least 4 are needed, some to be held out: tell where they end "
            "('timeouts' or ids of the 'episode' in a file, 'done' under \"next\" in TED rows)"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[order[: min(max(2, round(share * count)), count - 2)]] = True
    held = chosen.to(episode.device)[episode]
    parts = rows[~held], rows[held]
    return parts[0].set("episode", _renumbered(parts[0])), parts[1].set("episode", _renumbered(parts[1]))


def _renumbered(rows: TensorDictBase) -> Tensor:
    return rows["episode"].unique_consecutive(return_inverse=True)[1]


def _critics(data: ReplayBuffer, count: int, hidden: Sequence[int], seed: int) -> list[ValueOperator]:
    """Default critics, the same for the same seed."""
    if not isinstance(data, OfflineReplayBuffer):
        raise InputError("default critics need data as load_offline_dataset returns it; else give qvalue_network=[...]")
    make = DefaultNetworks.of(data, hidden=hidden, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [make.qvalue() for _ in range(count)]


def _add_policy_actions(name: str, loss: FQELoss, rows: TensorDictBase, is_fixed: bool) -> None:
    """Asks a deterministic policy once for each state; of another, tries the first row alone."""
    if_random = ", even its mode; give exploration_type=ExplorationType.RANDOM" if is_fixed else None
    rows = rows if is_fixed else rows[:1]
    for state in (rows, rows["next"]):
        asked = loss.actor_network.in_keys, state, rows["action"]
        actions = actions_of(name, loss.policy_action, *asked, if_random=if_random)
        if is_fixed:
            state.set("policy_action", actions)


def _bootstrap_weights(episode: Tensor, members: int, generator: torch.Generator) -> Tensor:
    """How often each row's episode is in each critic's resample of the episodes, ``[N, E]``."""
    count = int(episode[-1]) + 1
    drawn = torch.randint(count, (members, count), generator=generator, device=episode.device)
    weight = torch.zeros(members, count, device=episode.device).scatter_add_(1, drawn, torch.ones_like(drawn).float())
    return weight[:, episode].T.contiguous()


def _slices(rows: TensorDictBase, count: int, length: int, generator: torch.Generator) -> Iterator[TensorDictBase]:
    """Endless batches ``[count, length]`` of pieces of episodes that begin anywhere, masked beyond their ends."""
    offset = torch.arange(length, device=generator.device)
    while True:
        begin = torch.randint(len(rows), (count, 1), generator=generator, device=generator.device)
        index = (begin + offset).clamp_max(len(rows) - 1)
        batch = rows[index]
        own = (batch["episode"] == batch["episode"][:, :1]) & (begin + offset < len(rows))
        yield batch.set(MASK, own.unsqueeze(-1))
