"""Action chunks: the next actions of a data set as one action, for a policy that plays several at once."""

from __future__ import annotations

import torch
from torchrl.data import ImmutableDatasetWriter, ReplayBuffer, TensorDictReplayBuffer, TensorStorage

from torchrl_spar.data.returns import episode_ends, returns_to_go
from torchrl_spar.data.rows import rows_of
from torchrl_spar.errors import InputError, check_present


def chunk_actions(replay_buffer: ReplayBuffer, length: int, *, gamma: float = 0.99) -> TensorDictReplayBuffer:
    """The data with each row's next ``length`` actions as its action, for a residual on a whole chunk.

    A chunk is an action of size ``length * action_dim``, so nothing else changes: build the loss with
    bounds of that size and the ``gamma`` of a single step; critics bootstrap ``gamma ** length`` from the state after
    the chunk. The anchor writes chunks: one of :func:`~torchrl_spar.make_anchor`, or TorchRL's ``ACTModel``
    followed by ``nn.Flatten(-2)``. TorchRL's ``MultiAction`` has an environment play ``[length, action_dim]``
    a call: put ``nn.Unflatten(-1, (length, action_dim))`` after the policy.

    Args:
        replay_buffer: TED rows ``[N]`` in order, with one ``"action"`` ``[N, action_dim]`` each; ``rb[:]`` gives all of
            it. Episodes are told apart by ``("next", "done")`` and, if there is one, ``"episode"``.
        length: actions in a chunk.
        gamma: discount of a single step.

    Returns:
        A read-only buffer with the batch size of the given one. ``"action"`` is ``[n, length * action_dim]``; under
        ``"next"`` is what follows the chunk, and the discounted sum of its rewards; ``"steps_to_next_obs"`` ``[n, 1]``
        is what TorchRL's estimators raise ``gamma`` to, ``"return_to_go"`` ``[n, 1]`` what
        :func:`~torchrl_spar.fit_critics` starts the critics from. A chunk that a terminal state cuts short repeats
        its last action; one that the end of the recording cuts short is left out.

    Raises:
        InputError: for a length below 1, data with no whole chunk, or rows of several steps already.

    Source: ours; critics on chunks with rewards of several steps are those of Q-chunking
    (https://arxiv.org/abs/2507.07969). TorchRL's ``ActionChunkTransform`` and ``MultiStep`` do the same on
    ``[B, T]``, but ``MultiStep`` keeps the end flags of the first step.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_spar import chunk_actions, load_offline_dataset
        >>> step = {"reward": torch.ones(4, 1), "terminated": torch.tensor([[0], [0], [0], [1]], dtype=torch.bool)}
        >>> data = TensorDict({"observation": torch.randn(4, 3), "action": torch.arange(4.0).unsqueeze(-1) / 4,
        ...                    "next": {"observation": torch.randn(4, 3), **step}}, [4])
        >>> rows = chunk_actions(load_offline_dataset(data, batch_size=2), 2, gamma=0.5)[:]
        >>> rows["action"]
        tensor([[0.0000, 0.2500],
                [0.2500, 0.5000],
                [0.5000, 0.7500],
                [0.7500, 0.7500]])
        >>> rows["next", "reward"].flatten(), rows["steps_to_next_obs"].flatten()
        (tensor([1.5000, 1.5000, 1.5000, 1.0000]), tensor([2, 2, 2, 1]))
    """
    if length < 1:
        raise InputError(f"length={length}: a chunk has at least 1 action")
    data = rows_of(replay_buffer)
    returns = returns_to_go(data, gamma)
    check_present(data, ["action"])
    if data["action"].ndim != 2:
        raise InputError(f"'action' has shape {tuple(data['action'].shape)}; it must be [N, action_dim]")
    row = torch.arange(len(data), device=data.device)
    ends = episode_ends(data).squeeze(-1).nonzero().squeeze(-1)
    last = ends[torch.searchsorted(ends, row)]
    final = (row + length - 1).minimum(last)
    steps = (final - row + 1).unsqueeze(-1)
    offset = torch.arange(length, device=data.device)
    chunks = (row.unsqueeze(-1) + offset).minimum(last.unsqueeze(-1))
    rows = data.clone(False)
    rows["action"] = data["action"][chunks].flatten(-2)
    rows["steps_to_next_obs"] = steps
    rows["return_to_go"] = returns
    rows["next"] = data["next"][final]
    rewards = data["next", "reward"].squeeze(-1)[chunks]
    rows["next", "reward"] = (rewards * gamma**offset * (offset < steps)).sum(-1, keepdim=True)
    rows = rows[((steps == length) | rows["next", "terminated"]).squeeze(-1)]
    if not len(rows):
        raise InputError(f"length={length}: no episode of the data is that long")
    storage = TensorStorage(rows, device=rows.device)
    return TensorDictReplayBuffer(storage=storage, writer=ImmutableDatasetWriter(), batch_size=replay_buffer.batch_size)
