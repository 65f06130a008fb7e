"""Offline data, checked, as a TorchRL replay buffer in TED form (a row a step, the outcome under "next")."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from torchrl.data import (
    Bounded,
    ImmutableDatasetWriter,
    ReplayBuffer,
    TensorDictReplayBuffer,
    TensorSpec,
    TensorStorage,
)

from torchrl_spar.data import notes
from torchrl_spar.data.images import Encoder
from torchrl_spar.data.readers import find_minari, read_file, read_minari
from torchrl_spar.data.rows import whole_of
from torchrl_spar.data.steps import Steps
from torchrl_spar.data.success import REWARD_SHIFT
from torchrl_spar.data.success import end_at_success as relabel
from torchrl_spar.data.tables import SUFFIXES, Columns, find_lerobot, read_lerobot, read_table
from torchrl_spar.data.tensordicts import read_tensordict
from torchrl_spar.errors import InputError, check_bounds, check_device
from torchrl_spar.paths import user_path

# Float32 rounding and simulators leave actions this far outside their bounds.
ACTION_TOLERANCE = 1e-6
# A spread below this, relative to max(1, |mean|), is float32 rounding: the dimension is constant.
SCALE_FLOOR = 1e-6
# The same for a mean in float64.
WIDE_SCALE_FLOOR = 1e-12


class ActionError(InputError):
    """Actions leave their bounds."""


class OfflineReplayBuffer(TensorDictReplayBuffer):
    """A whole data set as a read-only :class:`~torchrl.data.TensorDictReplayBuffer`.

    Made by :func:`load_offline_dataset`. ``buffer[:]`` is the data set, ``buffer.sample()`` a
    uniform batch (with TorchRL's ``"index"`` of the sampled rows), and
    ``buffer.set_sampler(SliceSampler(traj_key="episode", slice_len=...))`` samples sequences.

    Args:
        data: ``[N]`` rows in TED form, see :func:`load_offline_dataset`.
        action_spec: the actions' finite bounds, float32 ``[action_dim]``.
        episode_returns: undiscounted return of every episode in the source's rewards, float64 ``[episodes]``.
        name: where the data comes from.
        env_id: the Gymnasium environment that the data comes from, if known.
        env_kwargs: what ``gymnasium.make`` takes beside it, such as a maze's map.
        reward_shift: what was added to the source's rewards.
        source_rows: each row's number in the source, from 0, int64 ``[N]``; 0 to N - 1 by default.
        longest_episode: steps of the source's longest episode, dropped ones included; by default that of the rows.
        device: where data and statistics live; the CPU by default.
        **kwargs: passed to ``TensorDictReplayBuffer``, such as ``batch_size``.

    Attributes:
        observation_loc: mean of ``"observation"`` over the rows, after a ``transform``, float32
            ``[observation_dim]``, computed in float64.
        observation_scale: standard deviation (divided by N), likewise. It is ``max(1, 1e-6 |mean|)`` where it is
            below ``1e-6 max(1, |mean|)``, so that constant dimensions are not blown up.
        action_spec, episode_returns, name, env_id, env_kwargs, reward_shift, source_rows, longest_episode: as given;
            ``"episode"`` indexes ``episode_returns``.

    Source: ours.

    Examples:
        >>> from torchrl.data import SliceSampler
        >>> from torchrl_spar import OfflineReplayBuffer, make_toy_data
        >>> data = make_toy_data(episodes=4)
        >>> known = {"action_spec": data.action_spec, "episode_returns": data.episode_returns[:2]}
        >>> buffer = OfflineReplayBuffer(data[:10], **known, name="the first two episodes", batch_size=4)
        >>> sampler = buffer.set_sampler(SliceSampler(slice_len=2, traj_key="episode"))
        >>> buffer.sample().shape
        torch.Size([4])
    """

    def __init__(
        self,
        data: TensorDictBase,
        *,
        action_spec: Bounded,
        episode_returns: torch.Tensor,
        name: str,
        env_id: str | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
        reward_shift: float = 0.0,
        source_rows: torch.Tensor | None = None,
        longest_episode: int | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        device = torch.device(device or "cpu")
        storage = TensorStorage(data.to(device), device=device)
        super().__init__(storage=storage, writer=ImmutableDatasetWriter(), **kwargs)
        # A transform may change what networks read.
        read = whole_of(self) if len(self.transform) else data
        loc, scale = _observation_statistics(read.get("observation", data["observation"]))
        self.observation_loc, self.observation_scale = loc.to(device), scale.to(device)
        self.action_spec = action_spec.to(device)
        self.episode_returns = episode_returns
        self.env_id = env_id
        self.env_kwargs = dict(env_kwargs or {})
        self.reward_shift = reward_shift
        self.source_rows = torch.arange(len(data)) if source_rows is None else source_rows
        if longest_episode is None and "episode" in data.keys():
            longest_episode = int(data["episode"].unique_consecutive(return_counts=True)[1].max())
        self.longest_episode = longest_episode
        self.name = name

    def with_rows(self, rows: TensorDictBase, **changes: Any) -> OfflineReplayBuffer:
        """The same data set with other entries, such as the anchor's actions; uniform sampling.

        ``changes`` are arguments that differ, such as ``source_rows`` where rows are left out.
        """
        facts = (
            "action_spec", "episode_returns", "name", "env_id", "env_kwargs", "reward_shift", "source_rows",
            "longest_episode", "batch_size",
        )  # fmt: skip
        known = {name: getattr(self, name) for name in facts}
        return OfflineReplayBuffer(rows, **known | changes, device=rows.device)


def load_offline_dataset(
    source: str | os.PathLike[str] | TensorDictBase | Sequence[TensorDictBase] | ReplayBuffer,
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    root: str | os.PathLike[str] | None = None,
    action_spec: TensorSpec | None = None,
    end_at_success: bool = False,
    columns: Columns | None = None,
    clip_actions: bool = False,
    encoder: Encoder | None = None,
    **kwargs: Any,
) -> OfflineReplayBuffer:
    """Reads and checks a data set, whole, into a replay buffer.

    Args:
        source: one of

            - ``"minari:<id>"``: looked up under ``root``, downloaded when it is not there;
            - the directory of a Minari data set (it holds ``data/metadata.json``);
            - a ``.hdf5``, ``.h5`` or ``.npz`` file with D4RL's arrays: ``observations [n, d]``,
              ``actions [n, a]``, ``rewards [n]``, ``terminals [n]``, if there are any
              ``timeouts [n]`` and ``next_observations [n, d]``. ``terminations`` and
              ``truncations`` do as well. ``episode [n]`` (or ``episode_id``, ``traj_id``), numbers or texts, tells
              episodes apart, ``step [n]`` their rows' order;
            - a ``.parquet``, ``.arrow``, ``.feather`` or ``.csv`` table, with ``columns``;
            - ``"lerobot:<id or path>"``: a LeRobot set (layout v3 or v2): ``observation.state``, ``action`` and, where
              there are any, ``next.reward``, ``next.done``, ``next.success``; images go through ``encoder``. Without
              one they are left out with a warning, or refused where there is nothing else; videos always;
            - a TensorDict ``[n]`` or ``[B, T]`` with ``observation``, ``action`` and, under
              ``"next"``, ``observation``, ``reward``, ``terminated``, if there are any ``truncated``
              and ``done``; a change of the integer ``episode`` (or a collector's ``traj_ids``), if given, ends an
              episode too. What ``"mask"`` or ``("collector", "mask")`` calls padding is left out;
            - a list or a lazy stack of such TensorDicts, of any lengths, or a replay buffer of them.
        batch_size: rows that ``sample()`` returns.
        device: where the data set lives; the CPU by default.
        root: Minari's directory; by default ``MINARI_DATASETS_PATH``, else ``~/.minari/datasets``.
        action_spec: the actions' bounds, a ``Bounded [a]``. By default Minari's action space, and
            -1 to 1 for files and TensorDicts.
        end_at_success: for mazes with rewards of 0 and 1 whose episodes go on after a success (AntMaze and PointMaze
            of Minari): the successful steps become ``terminated`` and ``done``, and 1 is taken from all rewards. The
            steps after a success stay as they are, under the same ``episode``. Success is Minari's
            ``infos["success"]``, where there is none a reward of 1.
        columns: of a table, the columns' names: ``observation``, ``action`` (lists of names, or one that holds lists),
            ``reward``, of ``terminated``, ``truncated``, ``done``, ``episode`` at least one, and ``step`` and
            ``next_observation`` if there are any. Of a LeRobot set, those that differ from its own.
        clip_actions: whether actions beyond their bounds are clipped to them, with a warning that counts them: right
            where the environment clipped them, too. Otherwise they are refused.
        encoder: a network of yours for the images of a LeRobot set, stored as such: it gets uint8 ``[b, 3, h, w]`` and
            gives ``[b, k]``, of every camera in alphabetical order. The features follow the state in the observation;
            what acts later gives them likewise.
        **kwargs: passed to ``TensorDictReplayBuffer``, such as ``sampler`` or ``transform``.

    Returns:
        A buffer of N rows, raw units: ``observation [N, d]``, ``action [N, a]``,
        ``("next", "observation") [N, d]`` and ``("next", "reward") [N, 1]`` in float32; ``done``,
        ``terminated`` and ``truncated`` ``[N, 1]`` in bool, under ``"next"`` as recorded with
        ``done = terminated | truncated``, at the root False; ``episode [N]`` in int64, the
        source's episodes in order, those without a step left out.

        Only ``terminated`` masks bootstrapping. Where a file has no ``next_observations``, the next
        row of the same episode gives it: a terminal row keeps its own observation there (masked),
        and any other last row of an episode is dropped, though its reward counts in
        ``episode_returns``. The row before it is then the episode's last without being ``done``:
        tell episodes apart by ``"episode"``. A file without ``timeouts`` ends its episodes at ``terminals`` alone
        (a warning says so when that decides the next observations).

        Where next observations are given, a row whose next observation is not the following row's observation ends an
        episode. Rows whose next observations are elsewhere in the data (shuffled, of several environments in turn, of
        a ring buffer) are put in order, with a warning. Where that cannot be done, a warning says so,
        ``episode_returns`` is empty and there is no ``episode``. Without next observations a warning tells of jumps as
        at a reset, of disorder, and of data in which nothing ends; an episode is cut, with a warning, where the numbers
        of its steps leave one out, and rows that are there twice count once. Steps or times that tell no order are left
        alone. Terminals in a row of states that are alike are one episode, whose return ends at the first of them.

        Observations stay in float64 where the source's are and float32 would lose a column's values (1e5 +- 0.05);
        :func:`~torchrl_spar.make_spar_loss` standardises them before the cast.

        Dictionary observations of Minari are joined by :func:`flatten_observation`. ``env_id`` and ``env_kwargs`` are
        those of the environment that a Minari set names for evaluation, else of the one it was collected in.
        ``episode_returns`` are in the source's rewards, whatever ``reward_shift`` has been added to the rows'.

    Raises:
        InputError: if the source is missing, damaged or of no known form, an array is missing, has
            the wrong shape, length or type, is there twice, holds NaN, infinity or a number beyond +-1e15,
            all observations or all actions are zero, actions leave their bounds by more than 1e-6 of them,
            rewards are not 0 and 1 with ``end_at_success``, ``encoder`` gives no features, the device is not here, a
            download fails, or h5py or minari is not installed.

    Source: Minari's episodes and D4RL's (https://arxiv.org/abs/2004.07219) arrays; ``end_at_success`` is the field's
    habit for AntMaze (IQL, CORL); which rows are dropped, the checks and the default bounds are ours.

    Examples:
        >>> data = TensorDict({
        ...     "observation": torch.rand(4, 3), "action": torch.rand(4, 2),
        ...     "next": {"observation": torch.rand(4, 3), "reward": torch.ones(4, 1),
        ...              "terminated": torch.tensor([0, 1, 0, 0]).bool()},
        ... }, [4])
        >>> buffer = load_offline_dataset(data, batch_size=2)
        >>> buffer[:]["episode"], buffer.episode_returns
        (tensor([0, 0, 1, 1]), tensor([2., 2.], dtype=torch.float64))
        >>> buffer.sample()["next", "reward"].shape
        torch.Size([2, 1])
    """
    check_device(device)
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: at least one row is needed")
    in_memory = is_tensor_collection(source) or isinstance(source, (list, tuple, ReplayBuffer))
    is_path = isinstance(source, (str, os.PathLike))
    name = "TensorDict" if is_tensor_collection(source) else str(source) if is_path else type(source).__name__
    try:
        if isinstance(source, OfflineReplayBuffer):
            raise InputError(
                "it is loaded already: use it as it is; for another device or batch_size, load its source again; for "
                "a part of its rows, see OfflineReplayBuffer"
            )
        given = None if action_spec is None else _bounds(action_spec)
        if in_memory:
            if columns or encoder:
                raise InputError("columns and encoder are of tables and LeRobot sets; give the rows by their TED keys")
            steps = read_tensordict(source)
        else:
            path, read = _find(source, root, end_at_success, columns, encoder)
            steps = read(path)
        content = _check(steps, given, end_at_success, clip_actions)
    except InputError as err:
        raise type(err)(f"{name}: {err}") from err.__cause__
    for note in steps.notes:
        warnings.warn(f"{name}: {note}", stacklevel=2)
    return OfflineReplayBuffer(**content, name=name, device=device, batch_size=batch_size, **kwargs)


def _find(
    source: Any,
    root: str | os.PathLike[str] | None,
    with_success: bool,
    columns: Columns | None,
    encoder: Encoder | None,
) -> tuple[Path, Callable[[Path], Steps]]:
    """The path of the source, and its reader."""
    minari = partial(read_minari, with_success=True) if with_success else read_minari
    if isinstance(source, str) and source.startswith("minari:"):
        return find_minari(source.removeprefix("minari:"), root), minari
    if isinstance(source, str) and source.startswith("d4rl:"):
        raise InputError("D4RL's ids are not downloaded: give the path of the data set's .hdf5 file instead")
    if isinstance(source, str) and source.startswith("lerobot:"):
        lerobot = partial(read_lerobot, columns=columns, encoder=encoder)
        return find_lerobot(source.removeprefix("lerobot:"), root), lerobot
    if encoder is not None:
        raise InputError("encoder: only of the images of LeRobot sets (lerobot:<id or path>)")
    if isinstance(source, (str, os.PathLike)):
        path = user_path(source)
        if path.suffix.lower() in SUFFIXES:
            return path, partial(read_table, columns=columns)
        if columns:
            raise InputError(f"columns: only of tables ({', '.join(SUFFIXES)}) and LeRobot sets")
        if path.is_dir():
            return path, minari
        if path.suffix.lower() in (".hdf5", ".h5", ".npz"):
            return path, read_file
    what = "no such directory, or no known form of source"
    if not isinstance(source, (str, os.PathLike)):
        what = "no known form of source (arrays: write them with np.savez, or put them into a TensorDict)"
    raise InputError(
        f"{what}. Accepted are 'minari:<id>', the directory of a Minari data "
        "set, a .hdf5, .h5 or .npz file with D4RL's arrays, a .parquet, .arrow, .feather or .csv table, "
        "'lerobot:<id or path>', and a TensorDict in TED form, a list or a replay buffer of such ones"
    )


def _check(
    steps: Steps, given: tuple[torch.Tensor, torch.Tensor] | None, end_at_success: bool, clip_actions: bool
) -> dict[str, Any]:
    """The rows in TED form and all that belongs to them, as the buffer takes it."""
    low, high = given or tuple(torch.as_tensor(bound, dtype=torch.float32) for bound in steps.action_bounds)
    if given is None and steps.bounds_are_guessed:
        steps.notes += (
            "actions go beyond +-1, so their least and largest values are their bounds: action_spec sets others",
        )
    _check_actions(steps, low, high, clip_actions)
    if given is not None or not steps.bounds_are_guessed:
        notes.narrow_actions(steps, low.numpy(), high.numpy())
    notes.rewards(steps)
    notes.ends(steps)
    returns = torch.from_numpy(_returns(steps))
    longest = int(np.bincount(steps.episode).max()) if steps.ordered else None
    if end_at_success:
        relabel(steps)
    notes.lost_rewards(steps)
    notes.tiny_columns(steps, SCALE_FLOOR)
    row = np.arange(len(steps.reward)) if steps.row is None else steps.row
    return {
        "source_rows": torch.from_numpy(row[steps.known]),
        "longest_episode": longest,
        "data": _to_ted(steps),
        "action_spec": Bounded(low, high, low.shape, dtype=torch.float32),
        "episode_returns": returns,
        "env_id": steps.env_id,
        "env_kwargs": steps.env_kwargs,
        "reward_shift": REWARD_SHIFT if end_at_success else 0.0,
    }


def _returns(steps: Steps) -> np.ndarray:
    """Every episode's return up to its first terminal: what a robot earns at its goal afterwards does not count."""
    if not steps.ordered:
        return np.zeros(0)
    after = np.zeros(len(steps.episode), dtype=bool)
    after[1:] = steps.terminated[:-1] & (steps.episode[1:] == steps.episode[:-1])
    starts = np.flatnonzero(np.diff(steps.episode, prepend=-1))
    ended = np.cumsum(after)
    counts = ended == ended[starts][steps.episode]
    # bincount sums in float64 whatever the rewards' type
    return np.bincount(steps.episode, weights=np.where(counts, steps.reward, 0))


def _bounds(spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(spec, Bounded):
        raise InputError(f"action_spec must be a torchrl.data.Bounded, not {type(spec).__name__}")
    return spec.space.low.float().cpu(), spec.space.high.float().cpu()


def _check_actions(steps: Steps, low: torch.Tensor, high: torch.Tensor, clip: bool) -> None:
    shape = steps.action.shape[1:]
    if low.shape != shape:
        raise InputError(f"actions are of shape {tuple(shape)}, their bounds of shape {tuple(low.shape)}")
    check_bounds("the action space", low, high)
    least, most = low.numpy(), high.numpy()
    extremes = np.maximum(least - steps.action.min(axis=0), steps.action.max(axis=0) - most)
    tolerance = ACTION_TOLERANCE * np.maximum(np.abs(least), np.abs(most))
    if not (extremes > tolerance).any():
        return
    outside = np.maximum(least - steps.action, steps.action - most) > tolerance
    if clip:
        steps.action = steps.action.clip(least, most)
        steps.notes += (
            f"{outside.sum()} of {outside.size} components of actions ({outside.mean():.1%}) went up to "
            f"{extremes.max():.3g} beyond their bounds and have been clipped",
        )
        return
    row, column = np.argwhere(outside)[0]
    raise ActionError(
        f"{outside.any(axis=1).sum()} of {len(outside)} actions leave their bounds, the first in row {row}: "
        f"component {column} is {steps.action[row, column]:.6g}, its bounds are {least[column]:.6g} to "
        f"{most[column]:.6g}. If the environment clipped them, clip_actions=True does (in recipes clip_actions=true); "
        "else give the true bounds, action_spec=Bounded(low, high, shape) (in recipes action_bounds=[low,high])"
    )


def _to_ted(steps: Steps) -> TensorDict:
    """The rows whose next observation is known; ``steps`` is empty afterwards, so that no row is in memory twice."""
    known = steps.known
    if not known.any():
        raise InputError("no step has a known next observation, so no row is left")
    fields = vars(steps)
    labels = ("episode",) if steps.ordered else ()

    def rows(name: str) -> torch.Tensor:
        array = fields.pop(name)
        return torch.from_numpy(array if known.all() else array[known])

    count = int(known.sum())
    root = {flag: torch.zeros(count, 1, dtype=torch.bool) for flag in ("done", "terminated", "truncated")}
    outcome = {name: rows(name).unsqueeze(-1) for name in ("terminated", "truncated")}
    outcome["done"] = outcome["terminated"] | outcome["truncated"]
    outcome["reward"] = rows("reward").float().unsqueeze(-1)
    outcome["observation"] = rows("next_observation")
    return TensorDict(
        {
            "observation": rows("observation"),
            "action": rows("action"),
            **{name: rows(name) for name in labels},
            **root,
            "next": TensorDict(outcome, [count]),
        },
        [count],
    )


def _observation_statistics(observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # A dimension at a time in one buffer: a float64 copy of all of a large set would cost more than the set.
    buffer = torch.empty_like(observation[:, 0], dtype=torch.float64)
    moments = [torch.std_mean(buffer.copy_(column), correction=0) for column in observation.unbind(-1)]
    scale, loc = (torch.stack(values) for values in zip(*moments))
    rounding = (SCALE_FLOOR if observation.dtype == torch.float32 else WIDE_SCALE_FLOOR) * loc.abs()
    scale = torch.where(scale < rounding.clamp(min=SCALE_FLOOR), rounding.clamp(min=1), scale)
    return loc.to(observation.dtype), scale.float()
