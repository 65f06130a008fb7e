"""Our Minari reader behind TorchRL's ``load_dataset``: importing this module registers ``"minari-exact:<id>"``.

``import torchrl_spar`` leaves it out: TorchRL's registry imports all of its data set classes, a fortieth more time.
"""

from __future__ import annotations

from typing import Any

from torchrl.data.datasets import register_dataset

from torchrl_spar.data.buffer import OfflineReplayBuffer, load_offline_dataset


def load_minari(dataset_id: str, **options: Any) -> OfflineReplayBuffer:
    """A Minari data set by its id: what ``load_dataset("minari-exact:<id>", **options)`` calls.

    TorchRL's own ``"minari:<id>"`` returns zeros (0.11.0 to 0.14.1), and has more options.

    Args:
        dataset_id: e.g. ``"D4RL/pen/human-v2"``; downloaded when it is not there.
        **options: of :func:`~torchrl_spar.load_offline_dataset`, such as ``batch_size``, ``root``, ``sampler``.

    Returns:
        See :func:`~torchrl_spar.load_offline_dataset`.

    Raises:
        InputError: likewise.

    Source: ours.

    Examples:
        >>> import torchrl_spar.data.registry
        >>> from torchrl.data.datasets import load_dataset
        >>> load_dataset("minari-exact:D4RL/pen/human-v2", batch_size=0)
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: batch_size=0: at least one row is needed
    """
    return load_offline_dataset(f"minari:{dataset_id}", **options)


register_dataset("minari-exact", f"{__name__}:{load_minari.__name__}")
