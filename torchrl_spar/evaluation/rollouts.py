"""Fast rollouts of a policy: plain Gymnasium environments, one batched policy call a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase

from torchrl_spar.data.observations import flatten_observation
from torchrl_spar.errors import InputError, check_policy
from torchrl_spar.evaluation.environments import make_env
from torchrl_spar.evaluation.fast_policy import action_function

# Where an environment has no step limit: an episode this long will not end by itself.
LONGEST_EPISODE = 5_000


def evaluate(
    policy: TensorDictModuleBase,
    env_id: str,
    episodes: int = 10,
    seed: int = 0,
    *,
    gamma: float = 1.0,
    on_step: Callable[[list[Any]], None] | None = None,
    **env_kwargs: Any,
) -> torch.Tensor:
    """Returns of a policy, undiscounted by default, all episodes side by side.

    Episode ``i`` runs in an environment of its own, seeded with ``seed + i``; each step is
    one call of the policy on the episodes that still run, under ``no_grad`` in the exploration
    type in force (TorchRL's default: deterministic).

    Args:
        policy: a module that reads ``"observation"`` ``[n, observation_dim]`` (raw units,
            dictionaries flattened by :func:`flatten_observation`) and writes ``"action"``.
        env_id: a Gymnasium environment. One without a step limit must end its episodes itself, within 5,000 steps.
        episodes: how many episodes.
        seed: the first episode's seed.
        gamma: discount of a step.
        on_step: called with the list of environments after every step, to record frames.
        **env_kwargs: as for :func:`make_env`, ``max_episode_steps`` among them.

    Returns:
        Returns in the environment's reward units, float64 ``[episodes]``.

    Raises:
        InputError: if ``episodes`` is below 1, the policy is not an actor, the environment is missing or does not end,
            the policy does not accept its observations or its actions do not fit, or the policy reads more than the
            observation (a recurrent one its state).

    Source: ours.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> idle = TensorDictModule(lambda s: 0 * s[..., :1], ["observation"], ["action"])
        >>> evaluate(idle, "Pendulum-v1", episodes=2).shape
        torch.Size([2])
    """
    if episodes < 1:
        raise InputError(f"episodes={episodes}: at least one episode is needed")
    check_policy("policy", policy, "action")
    if more := [key for key in policy.in_keys if key != "observation"]:
        raise InputError(
            f"the policy reads {more}, and evaluate gives it the observation alone; "
            "roll it out in a TorchRL environment (of an LSTM: with InitTracker and its make_tensordict_primer())"
        )
    state = [*policy.parameters(), *policy.buffers()]
    device = state[0].device if state else torch.device("cpu")
    # What a policy was trained on in float64, float32 is too coarse for.
    dtype = np.float64 if any(tensor.dtype == torch.float64 for tensor in state) else np.float32
    types = {tensor.dtype for tensor in state if tensor.is_floating_point()}
    own = types.pop() if len(types) == 1 else None  # as of a policy in bfloat16
    act = action_function(policy)
    envs = [make_env(env_id, **env_kwargs) for _ in range(episodes)]
    try:
        space = envs[0].action_space
        returns = [0.0] * episodes
        with _named(env_id, "reset"):
            observations = [flatten_observation(env.reset(seed=seed + i)[0], dtype=dtype) for i, env in enumerate(envs)]
        running = list(range(episodes))
        limit = getattr(envs[0].spec, "max_episode_steps", None) or LONGEST_EPISODE
        for step in range(limit):
            batch = np.empty((len(running), *observations[0].shape), dtype)
            for row, observation in enumerate(observations):
                batch[row] = observation
            _check_finite(env_id, step, "an observation", batch)
            actions = _act(act, torch.from_numpy(batch).to(device, own), env_id, space)
            still_running, observations = [], []
            for i, action in zip(running, actions):
                with _named(env_id, "step"):
                    observation, reward, terminated, truncated, _ = envs[i].step(action)
                    reward = np.asarray(reward, np.float64).item()
                _check_finite(env_id, step, "a reward", reward)
                returns[i] += gamma**step * reward
                if not (terminated or truncated):
                    still_running.append(i)
                    observations.append(flatten_observation(observation, dtype=dtype))
            running = still_running
            if on_step is not None:
                on_step(envs)
            if not running:
                break
        else:
            raise InputError(
                f"environment {env_id!r} has not ended {len(running)} of {episodes} episodes after {limit} steps: give "
                "a step limit, max_episode_steps=... (in recipes env_kwargs={max_episode_steps:...})"
            )
        return torch.tensor(returns, dtype=torch.float64)
    finally:
        for env in envs:
            env.close()


@contextmanager
def _named(env_id: str, call: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as err:  # of any type: the environment is not ours
        raise InputError(f"environment {env_id!r} fails in {call}(): {type(err).__name__}: {err}") from err


def _check_finite(env_id: str, step: int, what: str, value: float | np.ndarray) -> None:
    if not np.isfinite(value).all():
        raise InputError(f"environment {env_id!r} gives {what} that is NaN or infinite, after {step} steps")


@torch.no_grad()
def _act(act: Callable[[torch.Tensor], torch.Tensor], observation: torch.Tensor, env_id: str, space: Any) -> np.ndarray:
    try:
        action = act(observation)
    except RuntimeError as err:
        kind = f"{str(observation.dtype).removeprefix('torch.')} on {observation.device}"
        raise InputError(
            f"the policy fails on {env_id!r}'s observations of size {observation.shape[-1]}, {kind}: {err}"
        ) from None
    if action.shape[1:] != space.shape:
        raise InputError(f"the policy's actions have shape {tuple(action.shape[1:])}, {env_id!r} takes {space.shape}")
    sent = action.cpu().double().numpy()  # numpy has no bfloat16
    if hasattr(space, "low"):  # a bound in float64 that float32 rounds outwards
        within = np.clip(sent, space.low, space.high)
        rounding = 1e-6 * np.maximum(np.abs(space.low), np.abs(space.high))
        sent = np.where(np.abs(sent - within) <= rounding, within, sent)
    return sent.astype(space.dtype)
