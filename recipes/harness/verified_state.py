"""A state in a checkpoint that is either as it was written or refused, and that never executes anything."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl.checkpoint import CheckpointAdapter, StateDictCheckpointAdapter

from torchrl_spar.errors import first_line

CHECKSUMS = "sha256.json"
# Of TensorDict's archive; a member of any other name could be a pickle.
MEMBER = re.compile(r"meta\.json|tensor_\d{8}\.memmap")


class VerifiedStateAdapter(CheckpointAdapter):
    """TorchRL's adapter of state dicts, with the SHA-256 of each of its files, compared before any of them is read.

    The payload is TensorDict's archive: of the kinds without pickle the only one that is not written through memory
    maps, where a full disk kills the process instead of raising an error.
    """

    adapter_id = "torchrl_spar.verified_state"

    def __init__(self) -> None:
        self.inner = StateDictCheckpointAdapter("archive")
        self.archive, self.files = self.inner.state_archive, (self.inner.state_archive, self.inner.schema_filename)

    def save(self, component: Any, path: Path, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            state = self.inner.save(component, path, args=args, kwargs=kwargs)
        except RuntimeError as err:  # torch's word for a full disk
            raise OSError(first_line(err)) from err
        (path / CHECKSUMS).write_text(json.dumps({name: sha256(path / name) for name in self.files}))
        return state

    def load(self, component: Any, path: Path, **options: Any) -> Any:
        expected = json.loads((path / CHECKSUMS).read_bytes())
        found = {file.name: sha256(file) for file in path.iterdir() if file.name != CHECKSUMS}
        if set(found) != set(self.files) or found != expected:
            raise ValueError("its files are not those that were written")
        with zipfile.ZipFile(path / self.archive) as archive:
            if foreign := [name for name in archive.namelist() if not MEMBER.fullmatch(name)]:
                raise ValueError(f"{self.archive} holds {foreign[0]}, which no checkpoint has")
        return self.inner.load(component, path, **options)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
