"""The state of pre-training, for an exact resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from torchrl_spar.errors import InputError


class Progress:
    """Steps, seeds and optimisers of one training's fits, for an exact resume.

    Give one object to :func:`~torchrl_spar.pretrain`, or to its fits called one by one. Save its ``state_dict`` with
    the networks' and torch's random state. After all three are loaded into new objects, the same calls resume where
    they were saved, on a CPU bit for bit; finished fits are skipped. A fit with another number of steps than the
    loaded one's raises an :class:`~torchrl_spar.InputError`.

    Args:
        on_step: called after every step, when everything is consistent: the place to save.

    Source: ours.

    Examples:
        >>> import torch
        >>> from torchrl_spar import Progress, fit_anchor, make_anchor, make_toy_data
        >>> data = make_toy_data()
        >>> def save():
        ...     if progress.steps("loss_bc") == 3:
        ...         saved.update(actor=actor.state_dict(), progress=progress.state_dict(), rng=torch.get_rng_state())
        ...         raise InterruptedError
        >>> saved, actor, progress = {}, make_anchor(data), Progress(save)
        >>> fit_anchor(actor, data, steps=5, progress=progress)
        Traceback (most recent call last):
            ...
        InterruptedError
        >>> actor, progress = make_anchor(data), Progress()
        >>> actor.load_state_dict(saved["actor"]), progress.load_state_dict(saved["progress"])
        (<All keys matched successfully>, None)
        >>> torch.set_rng_state(saved["rng"])
        >>> _ = fit_anchor(actor, data, steps=5, progress=progress)
        >>> progress.steps("loss_bc")
        5
    """

    def __init__(self, on_step: Callable[[], None] = lambda: None) -> None:
        self.on_step = on_step
        self._parts: dict[str, dict[str, Any]] = {}
        self._running: tuple[str, torch.optim.Optimizer | None] = ("", None)

    def steps(self, name: str) -> int:
        """Number of finished steps of the fit whose loss has this name."""
        return self._parts[name]["step"] if name in self._parts else 0

    def begin(self, name: str, steps: int, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        """Begins a fit: loads its optimiser's state, and returns the steps already made and the seed of its batches.

        Args:
            name: of its loss, such as ``"loss_bc"``.
            steps: that it makes in all.
            optimizer: its optimiser.

        Raises:
            InputError: if the loaded fit has another number of steps.
        """
        part = self._parts.setdefault(name, {"step": 0, "steps": steps})
        if part["steps"] != steps:
            raise InputError(f"steps={steps}: the loaded progress of {name} is of a fit of {part['steps']} steps")
        if "seed" not in part:
            part["seed"] = int(torch.randint(2**62, ()))
        if "optimizer" in part:
            optimizer.load_state_dict(part.pop("optimizer"))
        self._running = (name, optimizer)
        return part["step"], part["seed"]

    def record(self, name: str, step: int) -> None:
        """Records that ``step`` steps of the fit ``name`` are done."""
        self._parts[name]["step"] = step

    def state_dict(self) -> dict[str, Any]:
        """By the loss's name: ``step``, ``steps``, ``seed`` and, for an unfinished fit, ``optimizer``."""
        parts = {name: dict(part) for name, part in self._parts.items()}
        name, optimizer = self._running
        if optimizer is not None and name in parts and parts[name]["step"] < parts[name]["steps"]:
            parts[name]["optimizer"] = optimizer.state_dict()
        return parts

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a :meth:`state_dict`; optimisers get theirs when their fit begins."""
        self._parts = {name: dict(part) for name, part in state.items()}
