"""Images of a table, encoded by a network of the user's."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import torch

from torchrl_spar.data.sources import readable, require
from torchrl_spar.errors import InputError

Encoder = Callable[[torch.Tensor], torch.Tensor]
# Images that the encoder gets at once.
BATCH = 64


@torch.no_grad()
def encode_images(column: Any, name: str, encoder: Encoder) -> np.ndarray:
    """The features of a column of images, float32 ``[n, k]``.

    Args:
        column: Arrow's, of encoded files: structures with ``bytes``, as LeRobot and Hugging Face write them.
        name: for the errors.
        encoder: from uint8 ``[b, 3, h, w]`` to ``[b, k]``, b up to 64.

    Raises:
        InputError: if there is no image in a row, or the encoder's result is not ``[b, k]``.
    """
    image = require("PIL.Image")
    parts: list[np.ndarray] = []
    for start in range(0, len(column), BATCH):
        rows = column.slice(start, BATCH).to_pylist()
        frames = []
        for number, row in enumerate(rows, start):
            content = row.get("bytes") if isinstance(row, dict) else row
            if not isinstance(content, bytes):
                raise InputError(f"{name}: row {number} holds no bytes of an image")
            with readable(f"{name}: row {number} "):
                frames.append(np.array(image.open(BytesIO(content)).convert("RGB")))
        if len({frame.shape for frame in frames}) > 1:
            raise InputError(f"{name}: images of different sizes, {sorted({frame.shape for frame in frames})}")
        features = encoder(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2))
        if not (isinstance(features, torch.Tensor) and features.ndim == 2 and len(features) == len(rows)):
            shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise InputError(f"{name}: the encoder gives {shape} of {len(rows)} images, expected [{len(rows)}, k]")
        parts.append(features.float().cpu().numpy())
    return np.concatenate(parts)
