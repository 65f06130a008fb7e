"""Fast rollouts of a policy: plain Gymnasium environments, one batched policy call a step."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Bounded

from torchrl_spar.data.observations import flatten_observation
from torchrl_spar.errors import InputError, check_bounds
from torchrl_spar.evaluation.fast_policy import action_function


def make_env(env_id: str, **kwargs: Any) -> Any:
    """``gymnasium.make`` that knows gymnasium-robotics and names what is missing.

    Args:
        env_id: a registered Gymnasium environment.
        **kwargs: passed to ``gymnasium.make``.

    Returns:
        The Gymnasium environment, wrappers of its registration included.

    Raises:
        InputError: if Gymnasium or the environment is missing, or it does not take an argument.

    Source: ours.

    Examples:
        >>> make_env("NoSuchRobot-v0")
        Traceback (most recent call last):
            ...
        torchrl_spar.errors.InputError: environment 'NoSuchRobot-v0' cannot be made: ...
    """
    try:
        import gymnasium
    except ImportError:
        raise InputError("evaluation needs gymnasium: pip install 'torchrl-spar[recipes]'") from None
    if env_id not in gymnasium.registry and importlib.util.find_spec("gymnasium_robotics") is not None:
        gymnasium.register_envs(importlib.import_module("gymnasium_robotics"))
    try:
        return gymnasium.make(env_id, **kwargs)
    except Exception as err:  # a constructor fails on a wrong argument in any way it likes
        given = f" with env_kwargs={kwargs}" if kwargs else ""
        raise InputError(f"environment {env_id!r} cannot be made{given}: {err}") from None


def environment_sizes(env_id: str, **env_kwargs: Any) -> tuple[int, Bounded]:
    """What an environment expects of a policy.

    Args:
        env_id: a registered Gymnasium environment with a bounded continuous action.
        **env_kwargs: passed to ``gymnasium.make``.

    Returns:
        The size of the flattened observation, and the action spec (float32).

    Raises:
        InputError: if the environment is missing or its action is not a bounded box.

    Source: ours.

    Examples:
        >>> size, spec = environment_sizes("Pendulum-v1")
        >>> size, spec.shape, spec.space.high
        (3, torch.Size([1]), tensor([2.]))
    """
    env = make_env(env_id, **env_kwargs)
    try:
        observation, _ = env.reset(seed=0)
        space = env.action_space
        if not hasattr(space, "low") or len(space.shape) != 1:
            raise InputError(f"environment {env_id!r} has the action space {space}; SPAR needs a bounded 1-d Box")
        check_bounds(f"environment {env_id!r}: its action space", space.low, space.high)
        low, high = torch.as_tensor(space.low).float(), torch.as_tensor(space.high).float()
        return flatten_observation(observation).shape[-1], Bounded(low, high, low.shape, dtype=torch.float32)
    finally:
        env.close()


def evaluate(
    policy: TensorDictModuleBase,
    env_id: str,
    episodes: int = 10,
    seed: int = 0,
    *,
    on_step: Callable[[list[Any]], None] | None = None,
    **env_kwargs: Any,
) -> torch.Tensor:
    """Undiscounted returns of a policy, all episodes side by side.

    Episode ``i`` runs in an environment of its own, seeded with ``seed + i``; each step is
    one call of the policy on the episodes that still run, under ``no_grad`` in the exploration
    type in force (TorchRL's default: deterministic).

    Args:
        policy: a module that reads ``"observation"`` ``[n, observation_dim]`` (raw units,
            dictionaries flattened by :func:`flatten_observation`) and writes ``"action"``.
        env_id: a registered Gymnasium environment.
        episodes: how many episodes.
        seed: the first episode's seed.
        on_step: called with the list of environments after every step, to record frames.
        **env_kwargs: passed to ``gymnasium.make``.

    Returns:
        Returns in the environment's reward units, float64 ``[episodes]``.

    Raises:
        InputError: if ``episodes`` is below 1, the environment is missing, the policy's sizes do not fit it, or the
            policy reads more than the observation (a recurrent one its state).

    Source: ours.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> idle = TensorDictModule(lambda s: 0 * s[..., :1], ["observation"], ["action"])
        >>> evaluate(idle, "Pendulum-v1", episodes=2).shape
        torch.Size([2])
    """
    if episodes < 1:
        raise InputError(f"episodes={episodes}: at least one episode is needed")
    if more := [key for key in policy.in_keys if key != "observation"]:
        raise InputError(
            f"the policy reads {more}, and evaluate gives it the observation alone; "
            "roll it out in a TorchRL environment (of an LSTM: with InitTracker and its make_tensordict_primer())"
        )
    state = [*policy.parameters(), *policy.buffers()]
    device = state[0].device if state else torch.device("cpu")
    # What a policy was trained on in float64, float32 is too coarse for.
    dtype = np.float64 if any(tensor.dtype == torch.float64 for tensor in state) else np.float32
    act = action_function(policy)
    envs = [make_env(env_id, **env_kwargs) for _ in range(episodes)]
    try:
        space = envs[0].action_space
        returns = [0.0] * episodes
        observations = [flatten_observation(env.reset(seed=seed + i)[0], dtype=dtype) for i, env in enumerate(envs)]
        running = list(range(episodes))
        while running:
            batch = np.empty((len(running), *observations[0].shape), dtype)
            for row, observation in enumerate(observations):
                batch[row] = observation
            actions = _act(act, torch.from_numpy(batch).to(device), env_id, space)
            still_running, observations = [], []
            for i, action in zip(running, actions):
                observation, reward, terminated, truncated, _ = envs[i].step(action)
                returns[i] += float(reward)
                if not (terminated or truncated):
                    still_running.append(i)
                    observations.append(flatten_observation(observation, dtype=dtype))
            running = still_running
            if on_step is not None:
                on_step(envs)
        return torch.tensor(returns, dtype=torch.float64)
    finally:
        for env in envs:
            env.close()


@torch.no_grad()
def _act(act: Callable[[torch.Tensor], torch.Tensor], observation: torch.Tensor, env_id: str, space: Any) -> np.ndarray:
    try:
        action = act(observation)
    except RuntimeError as err:
        raise InputError(
            f"the policy does not accept {env_id!r}'s observations of size {observation.shape[-1]}: {err}"
        ) from None
    if action.shape[1:] != space.shape:
        raise InputError(f"the policy's actions have shape {tuple(action.shape[1:])}, {env_id!r} takes {space.shape}")
    return action.cpu().numpy().astype(space.dtype, copy=False)
