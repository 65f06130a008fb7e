"""Whether a file still holds the rows that a run was trained on."""

from __future__ import annotations

import hashlib
from typing import Any
from weakref import WeakKeyDictionary

from torchrl_spar import InputError, OfflineReplayBuffer

_LEAVES = ("observation", "action", *(("next", name) for name in ("observation", "reward", "terminated", "truncated")))
# Actions may be rescaled for an environment after they were read.
_DIGESTS: WeakKeyDictionary[OfflineReplayBuffer, str] = WeakKeyDictionary()


def digest_of(data: OfflineReplayBuffer) -> str:
    """SHA-256 of the rows, their episodes included, as they were when it was first asked for."""
    if data not in _DIGESTS:
        _DIGESTS[data] = _digest(data)
    return _DIGESTS[data]


def _digest(data: OfflineReplayBuffer) -> str:
    digest, rows = hashlib.sha256(), data[:].cpu()
    for key in (*_LEAVES, "episode"):
        if rows.get(key, None) is not None:
            digest.update(rows[key].contiguous().numpy())
    return digest.hexdigest()


def check_same(name: str, found: str, trained_on: str | None) -> None:
    """Refuses rows of another digest than those of the training, where it is known."""
    if trained_on not in (None, found):
        raise InputError(
            f"dataset={name}: holds other rows than those that were trained on, or they are read in another way; "
            "restore the file, or train anew"
        )


class SameRows:
    """The digest of a run's rows in its checkpoints: a run does not resume with other rows."""

    def __init__(self, name: str, data: OfflineReplayBuffer) -> None:
        self.name, self.digest = name, digest_of(data)

    def state_dict(self) -> dict[str, Any]:
        return {"digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_same(self.name, self.digest, state["digest"])
