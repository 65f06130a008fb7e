"""Batches for the update, drawn ahead: the data's rows, and the noise that the loss would draw itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data import ImmutableDatasetWriter, RandomSampler, ReplayBuffer, TensorDictReplayBuffer, TensorStorage

from torchrl_spar.conventions import check_spar_loss
from torchrl_spar.data.buffer import OfflineReplayBuffer
from torchrl_spar.data.returns import episode_ends
from torchrl_spar.data.rows import check_buffer, under_next, valid_mask, whole_of
from torchrl_spar.errors import InputError, check_options, check_present
from torchrl_spar.objective import SPARLoss
from torchrl_spar.training.asking import actions_of

# What the data holds beside the loss's in_keys: see fit_critics and chunk_actions.
BESIDE = ("episode", "return_to_go", "steps_to_next_obs")
# Steps and seed -> the batches of a fit from there on.
Batches = Callable[[int, int], Iterator[TensorDictBase]]
# Batches that a fit draws at once, and the most that they may fill.
FIT_BLOCK, FIT_BLOCK_BYTES = 100, 2**24


@torch.no_grad()
def with_anchor_actions(loss: SPARLoss, replay_buffer: ReplayBuffer) -> TensorDictReplayBuffer:
    """What the loss reads of a data set, with the anchor's actions computed once.

    The anchor is frozen, so asking it again in every update would be wasted.

    Args:
        loss: with the trained anchor.
        replay_buffer: the data; ``rb[:]`` gives all of it.

    Returns:
        A read-only buffer of the given one's kind and batch size, with uniform sampling and shared memory: the
        loss's ``in_keys``, of ``"episode"``, ``"return_to_go"``, ``"steps_to_next_obs"``, masks, weights and targets
        what there is, and ``anchor_action`` ``[N, action_dim]`` at the root and under ``"next"``.

    Raises:
        InputError: if the data lacks what the anchor reads, or the anchor cannot take it, writes actions of another
            shape, NaN or infinity, or draws its actions.

    Source: ours.

    Examples:
        >>> from torchrl_spar import make_spar_loss, make_toy_data, with_anchor_actions
        >>> data = make_toy_data()
        >>> with_anchor_actions(make_spar_loss(data), data).sample()["next", "anchor_action"].shape
        torch.Size([8, 2])
    """
    check_spar_loss("loss", loss)
    anchor, keys = loss.anchor, loss.tensor_keys
    optional = (keys.member_weight, keys.priority_weight, keys.value_target, keys.advantage_std, *loss.mask_keys)
    rows = whole_of(replay_buffer).select(*loss.in_keys, *BESIDE, *optional, strict=False)
    key = keys.action
    check_present(rows, [key, "next"])
    for state in (rows, rows["next"]):
        actions = actions_of(
            "the anchor", lambda part: anchor(part)[key], anchor.in_keys, state, rows[key],
            if_missing=": put its actions into the data as 'anchor_action' and ('next', 'anchor_action'); a recurrent "
            "one is to be run along each episode, see FrozenAnchor",
            if_random=", even under ExplorationType.DETERMINISTIC; fix its noise, see FrozenAnchor",
        )  # fmt: skip
        state.set(keys.anchor_action, actions)
    return _fixed_buffer(rows, replay_buffer)


def with_value_targets(loss: SPARLoss, replay_buffer: ReplayBuffer) -> TensorDictReplayBuffer:
    """The data with the critics' targets along its trajectories, see :meth:`SPARLoss.value_targets`.

    They age as the critics and the policy move: call it again every two thousand updates or so. Targets that are never
    renewed improve the policy on the data's own returns alone. :class:`BatchSampler` does all this itself.

    Args:
        loss: of which the target critics and the moving average of the policy are asked.
        replay_buffer: the data in order, with the anchor's actions (:func:`with_anchor_actions`).

    Returns:
        The given buffer, updated in place, if it holds ``value_target`` and ``advantage_std`` ``[N, 1]`` already and
        reading it makes no copy (as lists, ensembles and transforms do). Otherwise a new buffer with uniform sampling
        that shares its memory and holds them beside.

    Raises:
        InputError: if the rows are out of order, steps of several (``"steps_to_next_obs"``), padded or sequences, or
            if the loss has ``lmbda=0``.

    Source: ours.

    Examples:
        >>> from torchrl_spar import make_toy_data, pretrain, with_value_targets
        >>> few = {"steps": 2}
        >>> loss, rows = pretrain(make_toy_data(), anchor=few, vae=few, critics=few)
        >>> for step in range(3):
        ...     if step % 2 == 0:
        ...         rows = with_value_targets(loss, rows)
        ...     losses = loss(rows.sample())
    """
    check_spar_loss("loss", loss)
    rows = whole_of(replay_buffer)
    if not has_trajectories(loss, replay_buffer):
        raise InputError("targets along trajectories need lmbda > 0 and rows [N] of single steps, without a mask")
    ends = ends_of(loss, rows)
    with _explained(loss, rows):
        found = loss.value_targets(rows, ends)
    keys, read_again = found.keys(True, True), whole_of(replay_buffer)
    if all(key in rows.keys(True) and _is_kept(rows[key], read_again[key], found[key]) for key in keys):
        rows.update_(found)
        return replay_buffer
    return _fixed_buffer(rows.copy().update(found), replay_buffer)


def _is_kept(tensor: torch.Tensor, read_again: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether what is written to a tensor stays in the buffer.

    Not where reading makes a copy, as a list does, which stacks its rows, nor in a placeholder of another kind. Both
    reads must be alive at once, as arguments are: a copy that is gone leaves its address to the next one.
    """
    fits = tensor.shape == found.shape and tensor.dtype == found.dtype and tensor.is_contiguous()
    return fits and tensor.data_ptr() == read_again.data_ptr()


def with_state(loss: Any, rows: TensorDictBase) -> tuple[TensorDictBase, NestedKey]:
    """The rows, and the key by which the following row is told: the observation's, or of all that the networks read."""
    keys, parts = loss.tensor_keys, (rows, rows.get("next", None))
    read = [key for key in loss.in_keys if key not in (keys.action, keys.anchor_action) and key[0] != "next"]
    found = [key for key in read if all(part is not None and part.get(key, None) is not None for part in parts)]
    if "observation" in found or not found:
        return rows, "observation"
    if len(found) == 1:
        return rows, found[0]
    joined = rows.copy().set("next", rows["next"].copy())
    for part in (joined, joined["next"]):
        part.set("state of all entries", torch.cat([part[key].reshape(len(rows), -1) for key in found], -1))
    return joined, "state of all entries"


def ends_of(loss: Any, rows: TensorDictBase) -> torch.Tensor:
    """:func:`episode_ends` by the loss's keys."""
    rows, key = with_state(loss, rows)
    return episode_ends(rows, done_key=loss.tensor_keys.done, observation_key=key)


def with_member_weights(
    loss: SPARLoss, replay_buffer: ReplayBuffer, *, share: float = 0.5, seed: int = 0
) -> ReplayBuffer:
    """The data with ``member_weight``: each critic learns from a share of the episodes, drawn for it.

    Critics that learn from the same episodes agree on what was luck in them, and the lower bound of an ensemble that
    agrees warns of nothing. Every episode is in the same number of critics, ``share * E``, rounded.

    Args:
        loss: of which ``num_qvalue_nets`` and the keys are read.
        replay_buffer: the data in order.
        share: of the episodes that a critic learns from, above 0; 1 gives all of them (ours: 0.5).
        seed: of the draw.

    Returns:
        A buffer that shares the memory of the given one and holds ``member_weight`` ``[N, E]`` beside, 0 or one over
        the share; the given one where nothing is to be shared out: with one critic, a share of 1, sequences
        ``[N, T]``, or fewer than two episodes for each critic.

    Raises:
        InputError: if the share is not within 0 to 1, or the rows are out of order.

    Source: bootstrapped ensembles (https://arxiv.org/abs/1602.04621); halves of the episodes are ours.

    Examples:
        >>> from torchrl_spar import make_spar_loss, make_toy_data, with_member_weights
        >>> data = make_toy_data(episodes=16, steps=2)
        >>> rows = with_member_weights(make_spar_loss(data), data)[:]
        >>> rows["member_weight"].shape, rows["member_weight"].sum(-1).unique()
        (torch.Size([32, 4]), tensor([4.]))
    """
    check_spar_loss("loss", loss)
    check_options((0 < share <= 1, "share", share, "above 0, at most 1"))
    rows, members = whole_of(replay_buffer), loss.num_qvalue_nets
    count = max(1, round(share * members))
    if count == members or rows.ndim > 1:
        return replay_buffer
    ends = ends_of(loss, rows).reshape(-1)
    if ends.sum() < 2 * members:
        return replay_buffer
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(int(ends.sum()), members, generator=generator).argsort(-1).argsort(-1)
    weight = (order < count).to(ends.device, torch.get_default_dtype()) * members / count
    rows = rows.copy().set(loss.tensor_keys.member_weight, weight[ends.cumsum(0) - ends.long()])
    return _fixed_buffer(rows, replay_buffer)


def has_trajectories(loss: SPARLoss, replay_buffer: ReplayBuffer) -> bool:
    """Whether targets can follow the data: rows ``[N]`` of single steps, and a loss that asks for them."""
    rows = whole_of(replay_buffer)
    is_whole = rows.ndim == 1 and valid_mask(rows, loss.mask_keys) is None
    return loss.lmbda > 0 and is_whole and "steps_to_next_obs" not in rows.keys()


def without_own_entries(loss: SPARLoss, replay_buffer: ReplayBuffer) -> TensorDictReplayBuffer:
    """The data without what belongs to one loss along its trajectories: its critics' episodes and targets."""
    if not has_trajectories(loss, replay_buffer):
        return replay_buffer
    keys = loss.tensor_keys
    rows = whole_of(replay_buffer).exclude(keys.member_weight, keys.value_target, keys.advantage_std)
    return _fixed_buffer(rows, replay_buffer)


@contextmanager
def _explained(loss: SPARLoss, rows: TensorDictBase) -> Iterator[None]:
    """Names what a network cannot take, or what the data lacks."""
    try:
        yield
    except (RuntimeError, KeyError):
        loss.explain(rows.exclude(loss.tensor_keys.value_target, loss.tensor_keys.advantage_std))
        raise


def _fixed_buffer(rows: TensorDictBase, like: ReplayBuffer) -> TensorDictReplayBuffer:
    if isinstance(like, OfflineReplayBuffer) and "observation" in rows.keys() and rows.batch_size == (len(like),):
        return like.with_rows(rows)
    storage = TensorStorage(rows, device=rows.device)
    return TensorDictReplayBuffer(storage=storage, writer=ImmutableDatasetWriter(), batch_size=like.batch_size)


def batch_size_of(replay_buffer: ReplayBuffer) -> int:
    """Rows in a batch, which TorchRL's buffers may leave open."""
    check_buffer(replay_buffer)
    if replay_buffer.batch_size is None:
        raise InputError("the replay buffer has no batch_size: build it with batch_size=...")
    return replay_buffer.batch_size


def batches_of(replay_buffer: ReplayBuffer) -> Batches:
    """What a fit reads of a buffer: uniform batches drawn in blocks, or what a sampler of another kind gives."""
    check_buffer(replay_buffer)
    plain = type(replay_buffer) in (OfflineReplayBuffer, TensorDictReplayBuffer)
    plain = plain and type(replay_buffer.storage) is TensorStorage and type(replay_buffer.sampler) is RandomSampler
    if plain and not len(replay_buffer.transform) and replay_buffer.batch_size is not None:
        rows = replay_buffer[:]
        if rows.ndim == 1:
            return partial(uniform_batches, rows.exclude("next"), replay_buffer.batch_size)

    def sampled(step: int, seed: int) -> Iterator[TensorDictBase]:
        while True:
            yield replay_buffer.sample()

    return sampled


def uniform_batches(rows: TensorDictBase, size: int, step: int, seed: int) -> Iterator[TensorDictBase]:
    """Endless uniform batches ``[size]`` after the first `step` ones; each block has a generator of its own."""
    batch_bytes = size * max(1, rows[:1].bytes())
    length = max(1, min(FIT_BLOCK, FIT_BLOCK_BYTES // batch_bytes))
    generator = torch.Generator(rows.device or "cpu")
    while True:
        block, made = divmod(step, length)
        generator.manual_seed(seed + block)
        index = torch.randint(len(rows), (length, size), generator=generator, device=generator.device)
        yield from rows[index].unbind(0)[made:]
        step += length - made


class BatchSampler(Iterator[TensorDictBase]):
    """Endless blocks of uniform batches, each with its noise, from one generator; renews the critics' targets.

    One gather for a whole block costs less than one for each batch. The generator is the sampler's own, so a run
    does not depend on what else draws random numbers in the process.

    Args:
        loss: the loss to be trained; decides what is read and how much noise a batch needs.
        replay_buffer: the data; ``rb[:]`` gives all of it, ``rb.batch_size`` is B. Anchor actions are
            computed unless it holds them (:func:`with_anchor_actions`).
        length: batches in a block.
        seed: of the generator.
        target_interval: batches between two renewals of the targets along the trajectories
            (:meth:`SPARLoss.value_targets`), which take one pass over the data. With None, and for rows of several
            steps (``"steps_to_next_obs"``) or sequences ``[B, T]``, targets are those in the data, or one-step ones
            where it has none or ``loss.lmbda`` is 0 (ours: 2,000).

    Returns:
        On ``next(sampler)``, a block ``[length, B]`` on the data's device.

    Raises:
        InputError: for a buffer without ``batch_size``, or data that is not in order.

    Source: ours.

    Examples:
        >>> from torchrl_spar import BatchSampler, make_spar_loss, make_toy_data
        >>> data = make_toy_data(batch_size=4)
        >>> block = next(BatchSampler(make_spar_loss(data), data, length=10, seed=0))
        >>> block.shape, block["candidate_noise"].shape, block["value_target"].shape
        (torch.Size([10, 4]), torch.Size([10, 4, 7, 4]), torch.Size([10, 4, 1]))
    """

    def __init__(
        self,
        loss: SPARLoss,
        replay_buffer: ReplayBuffer,
        *,
        length: int,
        seed: int,
        target_interval: int | None = 2_000,
    ) -> None:
        check_spar_loss("loss", loss)
        keys = loss.tensor_keys
        check_options(
            (target_interval is None or target_interval >= 1, "target_interval", target_interval, "at least 1, or None")
        )
        self.source = None if keys.anchor_action in whole_of(replay_buffer).keys(True) else replay_buffer
        if self.source is not None:
            replay_buffer = with_anchor_actions(loss, replay_buffer)
        self.loss, self.data = loss, whole_of(replay_buffer)
        self.shape = (length, batch_size_of(replay_buffer))
        self.generator = torch.Generator(self.data[keys.action].device).manual_seed(seed)
        self.made = (keys.value_target, keys.advantage_std)
        self.rows = self.data.exclude("episode", "return_to_go", *(self.made if loss.lmbda == 0 else ()))
        self.drawn = self.due = 0
        self.target_interval = target_interval if has_trajectories(loss, replay_buffer) else None
        if self.target_interval is not None:
            self.ends = ends_of(loss, self.data)
            check_present(self.data, [under_next(keys.reward)])
            for key in self.made:
                self.rows.set(key, torch.zeros_like(self.data[under_next(keys.reward)]))
        with _explained(loss, self.data):
            self.noise = loss.noise_shapes(self.rows[:1])

    def __next__(self) -> TensorDictBase:
        if self.target_interval is not None and self.drawn >= self.due:
            with _explained(self.loss, self.data):
                self.rows.update(self.loss.value_targets(self.data, self.ends))
            self.due = self.drawn + self.target_interval
        device = self.generator.device
        index = torch.randint(len(self.rows), self.shape, generator=self.generator, device=device)
        block = self.rows[index]
        for key, shape in self.noise.items():
            block.set(key, torch.randn(*block.shape, *shape, generator=self.generator, device=device))
        self.drawn += len(block)
        return block

    def state_dict(self) -> dict[str, Any]:
        """The generator's state and the targets: the blocks that follow are the same again once it is loaded."""
        state = {"generator": self.generator.get_state(), "drawn": self.drawn, "due": self.due}
        if self.target_interval is not None:
            state["targets"] = self.rows.select(*self.made).to_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a :meth:`state_dict`, after the loss took its own: the anchor is asked again.

        Raises:
            InputError: if it has no targets of the critics, where this sampler has.
        """
        if self.target_interval is not None:
            if "targets" not in state:
                raise InputError("the sampler's state has no targets: it is of another version, or of one-step targets")
            self.rows.update(TensorDict(state["targets"], self.rows.batch_size, device=self.generator.device))
        if self.source is not None:
            anchored, key = with_anchor_actions(self.loss, self.source)[:], self.loss.tensor_keys.anchor_action
            for rows in (self.data, self.rows):
                rows.update({key: anchored[key]}).set(under_next(key), anchored[under_next(key)])
        self.generator.set_state(state["generator"].cpu())
        self.drawn, self.due = state["drawn"], state["due"]
