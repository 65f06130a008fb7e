"""Evaluates a saved policy from raw observations, in an environment or from a log alone.

python recipes/evaluate.py policy=outputs/.../policy.pt episodes=20
python recipes/evaluate.py policy=policy.pt env=Hopper-v5 episodes=1 video=hopper.gif
python recipes/evaluate.py policy=policy.pt env=none dataset=log.npz      # from a log alone, by FQE
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import torch
from harness.actors import ACTOR, FACT, POLICY, load_actor
from harness.data_options import DataOptions
from harness.environment import (
    LOG_OPTIONS,
    choose_environment,
    has_no_environment,
    is_same,
    of_another_log,
    read,
    say_what_differs,
    shown,
    step_limit_of,
)
from harness.launch import best_device, describe, run_recipe, summarize
from harness.log_values import Support, estimate_any, estimate_spar
from harness.options import option, recipe_options
from harness.output import whole_file
from harness.printing import show_estimates
from harness.same_rows import check_same, digest_of
from harness.spar_options import OPE
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Bounded

from torchrl_spar import InputError, OfflineReplayBuffer, SPARActor, environment_sizes, evaluate, make_env
from torchrl_spar.networks import ObservationNorm

FRAMES_PER_SECOND = 30
# A log this many standard deviations away from the training data may be in another unit.
FAR = 10
# Rows of a batch of FQE, as in training.
BATCH_SIZE = 128
OWN = "own"
# Values of a log's options that mean "not given".
UNSAID = (None, False, OWN)


def check_video(path: Path) -> None:
    """Refuses a film that could not be written, before anything runs."""
    if path.exists():
        raise InputError(f"video={path}: exists already")
    if path.suffix not in (".gif", ".mp4"):
        raise InputError(f"video={path}: must end in .gif or .mp4")
    if path.suffix == ".mp4" and find_spec("imageio_ffmpeg") is None:
        raise InputError(f"video={path}: an .mp4 needs 'pip install imageio-ffmpeg'; .gif does not")
    if not path.resolve().parent.is_dir():
        raise InputError(f"video={path}: there is no directory {path.parent}")


def follow(env: Any) -> None:
    """Films with the model's camera named "track", if there is one: Gymnasium 1.4's default camera stands still."""
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None:
        import mujoco

        camera = mujoco.mj_name2id(env.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        if camera >= 0:
            renderer.camera_id = camera


def film(policy: TensorDictModuleBase, env: str, seed: int, path: Path, **env_kwargs: Any) -> None:
    """One episode in real time, about 30 frames a second; the file appears whole or not at all."""
    with closing(make_env(env, **env_kwargs)) as probe:
        speed = probe.metadata.get("render_fps") or FRAMES_PER_SECOND
    stride = max(1, round(speed / FRAMES_PER_SECOND))
    frames: list[np.ndarray] = []
    step = count()

    def keep(envs: list[Any]) -> None:
        now = next(step)
        if now == 0:
            follow(envs[0])
        if now % stride == 0:
            frames.append(envs[0].render())

    try:
        evaluate(policy, env, 1, seed, on_step=keep, **{**env_kwargs, "render_mode": "rgb_array"})
        options: dict[str, Any] = {"loop": 0} if path.suffix == ".gif" else {}
        with whole_file(path) as partial:
            imageio.imwrite(partial, np.stack(frames), extension=path.suffix, fps=speed / stride, **options)
    except Exception as err:  # rendering fails in as many ways as there are drivers
        raise InputError(f"video={path}: cannot be rendered here: {err} (a server needs MUJOCO_GL=egl)") from err


@recipe_options("evaluate")
@dataclass
class Options(DataOptions):
    policy: str | None = option(None, POLICY)
    actor: str | None = option(None, ACTOR)
    dataset: str = option(
        OWN,
        "With env=none, the log, as in spar_d4rl.py; own: the one the policy was trained on. Its columns, bounds and "
        "the like hold for another log, too, unless they are given.",
    )
    env: str | None = option(
        None, "Gymnasium environment; null: the one the policy was trained for; none: it is judged from a log alone."
    )
    ope: OPE = option(OPE(), "Off-policy evaluation, without an environment.")
    env_kwargs: Any = option(
        None,
        "Arguments of gymnasium.make beside those the policy was trained for, e.g. env_kwargs={continuing_task:false}.",
    )
    episodes: int = option(20, "Number of episodes.", least=1)
    seed: int = option(0, "Seed of the first episode; each next one adds 1.", least=0)
    device: str | None = option(None, "cpu, cuda, ...; null: cuda if there is one, else cpu.")
    video: str | None = option(
        None, "Also film the first episode into this file (.gif, or .mp4 where imageio's ffmpeg plugin is installed)."
    )
    threads: int = option(1, "Torch threads (one is fastest for small networks).", least=1)


def check_actions(policy: TensorDictModuleBase, facts: dict[str, Any], name: str, env: str, spec: Bounded) -> None:
    """Refuses an environment whose action bounds differ from the policy's, where the policy or its file has bounds."""
    network = facts.get(FACT, {})
    low, high = (
        torch.tensor(network[side]) if side in network else getattr(policy, side, None) for side in ("low", "high")
    )
    if low is None or high is None or low.shape != spec.shape:
        return
    own = Bounded(low.cpu(), high.cpu(), low.shape, dtype=torch.float32)
    if not is_same(own, spec):
        raise InputError(
            f"{name}: its actions are {shown(own)}, those of env={env} are {shown(spec)}; evaluate it in its "
            "own environment, or train it for this one (action_scale=env)"
        )


def check_sizes(cfg: DictConfig, name: str, policy: TensorDictModuleBase, data: OfflineReplayBuffer) -> None:
    """Refuses a log of other sizes than the policy's."""
    norm = next((module for module in policy.modules() if isinstance(module, ObservationNorm)), None)
    pairs = (
        ("observations", None if norm is None else norm.loc, data.observation_loc),
        ("actions", getattr(policy, "low", None), data.action_spec.space.low),
    )
    for what, own, given in pairs:
        if own is not None and own.numel() != given.numel():
            raise InputError(
                f"{name}: does not fit dataset={cfg.dataset}: its {what} have size {own.numel()}, the "
                f"log's {given.numel()}"
            )
    try:
        action = policy(data[:1].select("observation"))["action"]
    except RuntimeError as err:
        size = data.observation_loc.numel()
        raise InputError(f"{name}: fails on dataset={cfg.dataset}'s observations of size {size} ({err})") from err
    if (own := action.shape[-1]) != (given := data.action_spec.shape[-1]):
        raise InputError(f"{name}: does not fit dataset={cfg.dataset}: its actions have size {own}, the log's {given}")
    if norm is not None:
        loc, scale = norm.loc.cpu(), norm.scale.cpu()
        far = torch.maximum((data.observation_loc.cpu() - loc).abs(), data.observation_scale.cpu()) > FAR * scale
        if columns := far.nonzero().flatten().tolist():
            warnings.warn(
                f"dataset={cfg.dataset}: columns {columns} of its observations lie more than {FAR} standard deviations "
                f"of {name}'s training data from their mean: they may be in another unit",
                stacklevel=2,
            )


def judge(
    cfg: DictConfig, policy: TensorDictModuleBase, facts: dict[str, Any], name: str, device: torch.device
) -> None:
    """Prints the value of the policy, estimated from a log."""
    if cfg.video:
        raise InputError(f"video={cfg.video}: needs an environment")
    own = dict(facts.get("log") or {})
    trained_with = own.pop("gamma", 0.99)
    if cfg.dataset == OWN and not own:
        raise InputError(f"{name}: names no log; give one as dataset=...")
    given = {name: cfg[name] for name in LOG_OPTIONS if cfg[name] not in UNSAID}
    cfg = OmegaConf.create({**{str(name): value for name, value in cfg.items()}, **of_another_log(own, given)})
    data = read(cfg, batch_size=BATCH_SIZE, device=device)
    if "dataset" not in given:
        check_same(cfg.dataset, digest_of(data), facts.get("rows_sha256"))
    options = {"seed": cfg.seed, **cfg.ope, "gamma": trained_with if cfg.ope.gamma is None else cfg.ope.gamma}
    check_sizes(cfg, name, policy, data)
    distance = Support(data, cfg.ope.held_out, cfg.seed).of_policy(policy)
    is_spar = isinstance(policy, SPARActor)
    estimates = estimate_spar(policy, data, options)[0] if is_spar else estimate_any(policy, data, options)
    distances = {"data": {"support_distance": 1.0}, "spar" if is_spar else "policy": {"support_distance": distance}}
    show_estimates(Console(), f"{name} on {cfg.dataset}", estimates, distances)


def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    device = best_device(cfg.device)
    policy, facts, name = load_actor(cfg, device)
    if has_no_environment(cfg, name, facts.get("env")):
        judge(cfg, policy, facts, name, device)
        return
    unread = {name: cfg[name] for name in (*LOG_OPTIONS, "action_scale") if cfg[name] not in UNSAID}
    unread |= {f"ope.{name}": value for name, value in cfg.ope.items() if value != getattr(OPE(), name)}
    for name, value in unread.items():
        raise InputError(f"{name}={value}: read only where the policy is judged from a log: env=none")
    env, env_kwargs = choose_environment(cfg, name, facts.get("env"), facts.get("env_kwargs", {}))
    if cfg.video:
        check_video(Path(cfg.video))
        if sys.platform == "linux" and "DISPLAY" not in os.environ:
            os.environ.setdefault("MUJOCO_GL", "egl")  # Gymnasium's own choice needs a screen
    say_what_differs("the policy", facts.get("env"), facts.get("env_kwargs", {}), env, env_kwargs)
    _, action_spec = environment_sizes(env, **env_kwargs)
    if env != facts.get("env"):
        check_actions(policy, facts, name, env, action_spec)
    returns = evaluate(policy, env, cfg.episodes, cfg.seed, **env_kwargs)
    row = summarize(env, returns, env_kwargs)
    print(f"{env}: {describe(row, cfg.episodes, step_limit_of(env, env_kwargs))}")
    if cfg.video:
        film(policy, env, cfg.seed, Path(cfg.video), **env_kwargs)
        print(f"filmed into {cfg.video}")


if __name__ == "__main__":
    run_recipe(main, "evaluate")
