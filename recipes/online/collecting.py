"""TorchRL's collectors of transitions in the data set's form: in this process, in several, or on Ray."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torchrl.collectors import BaseCollector, Collector
from torchrl.data import Bounded
from torchrl.envs import GymWrapper
from torchrl.modules import AdditiveGaussianModule

from torchrl_spar import InputError, flatten_observation, make_env

BACKENDS = ("direct", "process", "ray")
# A local Ray: a core and little memory for each worker; TorchRL's default asks for 2 GiB each.
RAY_MEMORY = 2**28


def make_torchrl_env(env_id: str, seed: int, kwargs: dict[str, Any]) -> GymWrapper:
    """A Gymnasium environment with the observations that the data has: one float32 vector, raw units."""
    from gymnasium.spaces import Box
    from gymnasium.wrappers import TransformObservation

    gym_env = make_env(env_id, **kwargs)
    shape = flatten_observation(gym_env.observation_space.sample()).shape
    space = Box(-np.inf, np.inf, shape, np.float32)
    env = GymWrapper(TransformObservation(gym_env, flatten_observation, space), device="cpu")
    env.set_seed(seed)
    return env


def start_worker(env_id: str, seed: int, kwargs: dict[str, Any]) -> GymWrapper:
    """A worker's environment. It seeds the worker's exploration noise, too, which would differ from run to run."""
    torch.manual_seed(seed)
    return make_torchrl_env(env_id, seed, kwargs)


def with_noise(policy: TensorDictModuleBase, action_spec: Bounded, noise: float) -> TensorDictSequential:
    """The policy with Gaussian noise on its actions, in half action ranges, clipped; shares its weights."""
    half_range: Any = ((action_spec.space.high - action_spec.space.low) / 2).tolist()
    options: dict[str, Any] = {"sigma_init": float(noise), "sigma_end": float(noise), "std": half_range}
    return TensorDictSequential(
        policy, AdditiveGaussianModule(action_spec, **options, device=action_spec.space.low.device)
    )


def check_collector(cfg: DictConfig) -> None:
    """Refuses options that no collector accepts, before anything is trained."""
    backend, workers, frames = cfg.backend, cfg.workers, cfg.frames_per_batch
    if backend not in BACKENDS:
        raise InputError(f"collector.backend={backend}: must be one of {', '.join(BACKENDS)}")
    if backend == "ray" and find_spec("ray") is None:
        raise InputError("collector.backend=ray: Ray is not installed; pip install 'torchrl-spar[ray]'")
    if backend != "direct" and frames % workers:
        raise InputError(
            f"collector.frames_per_batch={frames}: must be a multiple of collector.workers={workers}, which share it"
        )


def make_collector(
    cfg: DictConfig,
    policy: TensorDictModuleBase,
    env_id: str,
    env_kwargs: dict[str, Any],
    *,
    total_frames: int,
    seed: int,
    device: torch.device,
) -> BaseCollector:
    """TorchRL's `Collector` by its own names of backends; environments on the CPU, the policy on `device`.

    Args:
        cfg: ``backend``, ``workers`` and ``frames_per_batch``.
        policy: observation -> action, exploration included.
        env_id, env_kwargs: see `make_torchrl_env`.
        total_frames: environment steps in all.
        seed: the environments' and the noise's are 1,000 times this and the numbers that follow.
        device: of the policy.
    """
    # Later releases of TorchRL append transforms for recurrent policies.
    options: dict[str, Any] = {"auto_register_policy_transforms": False}
    if cfg.backend == "ray":
        ray = {"num_cpus": cfg.workers, "include_dashboard": False, "log_to_driver": False}
        remote = {"num_cpus": 1, "memory": RAY_MEMORY, "num_gpus": 1 / cfg.workers if device.type == "cuda" else 0}
        options = {"ray_init_config": ray, "remote_configs": remote, "collector_kwargs": options}
    workers = 1 if cfg.backend == "direct" else cfg.workers
    if cfg.backend != "direct":
        options |= {"num_collectors": workers, "sync": True}
    # The collector's set_seed would reset the environments, so that their first transitions began elsewhere.
    envs = [partial(start_worker, env_id, 1_000 * seed + worker, env_kwargs) for worker in range(workers)]
    return Collector(
        envs,
        policy,
        backend=cfg.backend,
        frames_per_batch=cfg.frames_per_batch,
        total_frames=total_frames,
        policy_device=device,
        storing_device="cpu",
        **options,
    )
