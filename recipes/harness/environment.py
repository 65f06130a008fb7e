"""The data and the environment of a run, checked against each other: sizes, action bounds, step limit."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_method
from omegaconf import DictConfig, ListConfig, OmegaConf
from torchrl.data import Bounded

from harness.launch import RECIPES, RESERVED
from harness.same_rows import digest_of
from torchrl_spar import InputError, OfflineReplayBuffer, environment_sizes, load_offline_dataset, make_env
from torchrl_spar.data.buffer import ActionError
from torchrl_spar.data.tables import SUFFIXES
from torchrl_spar.errors import first_line
from torchrl_spar.evaluation.protocols import d4rl_protocol
from torchrl_spar.paths import user_path

EMBEDDED = "torchrl-spar/hopper/medium-v0"
# The value of `env` for no environment.
NO_ENV = "none"
LOG_OPTIONS = ("dataset", "columns", "encoder", "action_bounds", "clip_actions", "end_at_success")
# Bounds that differ by less are the same in float32.
TOLERANCE = 1e-5


def dataset_name(cfg: DictConfig) -> str:
    return EMBEDDED if cfg.dataset == "embedded" else str(cfg.dataset)


def load(cfg: DictConfig, device: torch.device) -> tuple[OfflineReplayBuffer, str, dict[str, Any]]:
    """The data, the environment and its arguments, checked against each other."""
    data = read_episodes(cfg, device)
    return data, *match(cfg, data)


def load_any(cfg: DictConfig, device: torch.device) -> tuple[OfflineReplayBuffer, str | None, dict[str, Any]]:
    """Like `load`, but the environment is None where there is none."""
    data = read_episodes(cfg, device)
    return (data, None, {}) if has_no_environment(cfg, cfg.dataset, data.env_id) else (data, *match(cfg, data))


def read_episodes(cfg: DictConfig, device: torch.device) -> OfflineReplayBuffer:
    data = read(cfg, batch_size=cfg.batch_size, device=device)
    if not len(data.episode_returns):
        raise InputError(f"dataset={cfg.dataset}: its rows are in no order of time, and the critics start from returns")
    return data


def has_no_environment(cfg: DictConfig, source: str, known: str | None) -> bool:
    """Whether there is no environment: as asked for, or because nothing names one, which is printed."""
    if cfg.env is None and known is None:
        print(f"{source} names no environment: policies are judged from the log alone (env=NAME evaluates them)")
    elif cfg.env != NO_ENV:
        return False
    for name in ("env_kwargs", "action_scale"):
        if cfg.get(name) is not None:
            raise InputError(f"{name}={cfg[name]}: needs an environment, and there is none (env={cfg.env})")
    return True


def read(cfg: DictConfig, **options: Any) -> OfflineReplayBuffer:
    """Reads the data, with no environment but the one it records."""
    action_spec = None
    if cfg.action_bounds is not None or (cfg.env not in (None, NO_ENV) and not records_bounds(cfg)):
        action_spec = accepted_bounds(cfg)
    columns: Any = cfg.columns
    if not (columns is None or isinstance(columns, DictConfig)):
        raise InputError(f"columns={columns}: must be names and values, e.g. columns={{observation:[x,v],action:[u]}}")
    options |= {
        "action_spec": action_spec, "end_at_success": cfg.end_at_success, "clip_actions": cfg.clip_actions,
        "columns": None if columns is None else OmegaConf.to_container(columns, resolve=True),
        "encoder": None if cfg.encoder is None else function_at(cfg.encoder),
    }  # fmt: skip
    try:
        data = load_offline_dataset(source_of(cfg), **options)
        digest_of(data)  # before actions are rescaled
        return data
    except ActionError as err:
        if action_spec is None:
            raise
        given = f"env={cfg.env}" if cfg.action_bounds is None else f"action_bounds={cfg.action_bounds}"
        raise InputError(f"{err} (the bounds are those of {given})") from None


def function_at(path: str, name: str = "encoder") -> Any:
    """The object at a dotted path, the value of option `name`."""
    try:
        return get_method(path)
    except Exception as err:  # of the module that it imports, any
        raise InputError(f"{name}={path}: no function is found there ({first_line(err)})") from None


def log_options(cfg: DictConfig) -> dict[str, Any]:
    """The options that read this log again."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    return {name: plain[name] for name in LOG_OPTIONS}


def of_another_log(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """How another log is read: as a policy's own, but for what is given; columns are of tables and LeRobot sets."""
    options = {**own, **given}
    source = str(options["dataset"])
    if "columns" not in given and not (source.startswith("lerobot:") or Path(source).suffix.lower() in SUFFIXES):
        options["columns"] = None
    return options


def match(cfg: DictConfig, data: OfflineReplayBuffer) -> tuple[str, dict[str, Any]]:
    """The data's environment and its arguments; gives the data the environment's action bounds, in place.

    Raises:
        InputError: if sizes, action bounds or arguments do not fit.
    """
    env, env_kwargs = choose_environment(cfg, cfg.dataset, data.env_id, data.env_kwargs)
    say_what_differs(cfg.dataset, data.env_id, data.env_kwargs, env, env_kwargs)
    observation_dim, action_spec = environment_sizes(env, **env_kwargs)
    for name, found, expected in (
        ("observations", data.observation_loc.numel(), observation_dim),
        ("actions", data.action_spec.shape[-1], action_spec.shape[-1]),
    ):
        if found != expected:
            raise InputError(f"dataset={cfg.dataset}: {name} have size {found}, env={env} has {expected}")
    settle_actions(cfg, data, env, action_spec, is_recorded=records_bounds(cfg))
    if step_limit_of(env, env_kwargs) is None and len(data.episode_returns):
        env_kwargs["max_episode_steps"] = data.longest_episode
        print(f"env={env}: has no step limit; episodes end after {data.longest_episode} steps, the data's longest")
    return env, env_kwargs


def source_of(cfg: DictConfig) -> Any:
    return RECIPES / "data" / EMBEDDED if cfg.dataset == "embedded" else cfg.dataset


def records_bounds(cfg: DictConfig) -> bool:
    """Whether a source is a Minari set, which records its action bounds."""
    source = str(source_of(cfg))
    return source.startswith("minari:") or (not source.startswith("lerobot:") and user_path(source).is_dir())


def accepted_bounds(cfg: DictConfig) -> Bounded:
    """Bounds within which actions are accepted: `action_bounds`, else the union of the environment's and -1 to 1."""
    asked, low, high = cfg.action_bounds, None, None
    if isinstance(asked, ListConfig):
        try:
            low, high = (torch.tensor(bound, dtype=torch.float32) for bound in list(asked))
        except (TypeError, ValueError):
            raise InputError(f"action_bounds={asked}: must be two numbers or two lists of numbers, or env") from None
        if low.ndim and low.shape == high.shape:
            return Bounded(low, high, low.shape, dtype=torch.float32)
    elif asked not in (None, "env"):
        raise InputError(f"action_bounds={asked}: must be env, two numbers or two lists of numbers")
    if cfg.env in (None, NO_ENV):
        raise InputError(f"action_bounds={asked}: needs env=NAME too, or a list with a number for each component")
    env, env_kwargs = choose_environment(cfg, cfg.dataset, None, {})
    _, spec = environment_sizes(env, **env_kwargs)
    if low is not None and high is not None:
        low, high = low.expand(spec.shape), high.expand(spec.shape)
    elif asked == "env":
        return spec
    else:
        low, high = spec.space.low.clamp(max=-1), spec.space.high.clamp(min=1)
    return Bounded(low.clone(), high.clone(), spec.shape, dtype=torch.float32)


def settle_actions(cfg: DictConfig, data: OfflineReplayBuffer, env: str, spec: Bounded, *, is_recorded: bool) -> None:
    """Gives the data the environment's action bounds, in place; rescales its actions if asked for.

    Args:
        cfg: its ``action_bounds`` and ``action_scale``.
        data: its bounds are the source's or `accepted_bounds`.
        env: for the errors.
        spec: the environment's actions.
        is_recorded: whether the source records its bounds.

    Raises:
        InputError: if the bounds differ and nothing says in which units the actions are.
    """
    spec = spec.to(data.action_spec.device)
    low, high = spec.space.low, spec.space.high
    action = data[:]["action"]
    least, most = action.amin(0), action.amax(0)
    source = data.action_spec
    if cfg.action_bounds is None and not is_recorded:
        source = bounds_of_file(cfg, least, most, spec)
    if is_same(source, spec):
        data.action_spec = spec
    elif cfg.action_scale == "env":
        rescale(action, source, spec)
        data.action_spec = spec
    elif cfg.action_bounds is not None and within(source.space.low, source.space.high, low, high):
        data.action_spec = source  # a part of the environment's, as the user says
    else:
        whose = "recorded bounds" if is_recorded else "bounds"
        raise InputError(
            f"dataset={cfg.dataset}: its actions' {whose} are {shown(source)}, those of env={env} are {shown(spec)}. "
            "action_scale=env rescales the actions from the one to the other; if they are in the environment's units, "
            "give action_bounds=env"
        )


def bounds_of_file(cfg: DictConfig, least: torch.Tensor, most: torch.Tensor, spec: Bounded) -> Bounded:
    """The environment's bounds where its units show, else -1 to 1; `least` and `most` are the actions' extremes."""
    low, high = spec.space.low, spec.space.high
    one = torch.ones_like(low)
    # No action in units of -1 to 1 goes beyond them, or ends exactly where the environment's do.
    ends_there = (is_near(least, low) & ~is_near(low, -one)) | (is_near(most, high) & ~is_near(high, one))
    within_unit = within(least, most, -one, one)
    if not within_unit and not within(least, most, low, high):
        raise InputError(
            f"dataset={cfg.dataset}: its actions go from {least.min():.4g} to {most.max():.4g}, beyond -1 to 1 and "
            f"beyond those of env={cfg.env}, {shown(spec)}: give their bounds as action_bounds=[low,high]"
        )
    if not within_unit or (ends_there.any() and cfg.action_scale is None):
        return spec
    return Bounded(-one, one, one.shape, dtype=torch.float32)


def rescale(action: torch.Tensor, source: Bounded, target: Bounded) -> None:
    """Maps actions from one box to another, in place."""
    (low, high), (to_low, to_high) = ((x.space.low.double(), x.space.high.double()) for x in (source, target))
    scaled = to_low + (action.double() - low) * ((to_high - to_low) / (high - low))
    action.copy_(scaled.clamp(to_low, to_high))


def is_near(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one - other).abs() <= TOLERANCE * torch.maximum(one.abs(), other.abs())


def is_same(one: Bounded, other: Bounded) -> bool:
    return bool((is_near(one.space.low, other.space.low) & is_near(one.space.high, other.space.high)).all())


def within(least: torch.Tensor, most: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> bool:
    tolerance = TOLERANCE * torch.maximum(low.abs(), high.abs())
    return bool(((least >= low - tolerance) & (most <= high + tolerance)).all())


def shown(spec: Bounded) -> str:
    """Bounds in a few words, however many components there are."""
    pairs = {(f"{low:.4g}", f"{high:.4g}") for low, high in zip(spec.space.low.tolist(), spec.space.high.tolist())}
    low, high = sorted(pairs)[0]
    return f"{low} to {high}" + (f" in the first of {len(pairs)} kinds of components" if len(pairs) > 1 else "")


def choose_environment(
    cfg: DictConfig, source: str, known: str | None, kwargs: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The environment that is asked for, else the source's own with its arguments.

    `protocol` and `env_kwargs` add to the arguments, the latter last.
    """
    env = cfg.env or known
    if env == NO_ENV:
        raise InputError(f"env={NO_ENV}: not here, where policies act in an environment; give one, e.g. env=Hopper-v5")
    if env is None:
        raise InputError(f"env: {source} does not name its environment; give one, e.g. env=Hopper-v5")
    if cfg.get("protocol") not in (None, "d4rl"):
        raise InputError(f"protocol={cfg.get('protocol')}: must be d4rl or null")
    asked = cfg.env_kwargs
    if not (asked is None or isinstance(asked, DictConfig)):
        raise InputError(f"env_kwargs={asked}: must be names and values, e.g. env_kwargs={{continuing_task:false}}")
    added: Any = {} if asked is None else OmegaConf.to_container(asked, resolve=True)
    for name in added:
        if not isinstance(name, str) or name in RESERVED:
            raise InputError(f"env_kwargs: {name!r} is no argument of an environment that can be set here")
    protocol = d4rl_protocol(env)
    chosen = dict(kwargs) if env == known else {}
    if cfg.get("protocol") == "d4rl":
        recorded, ours = (part.get("additional_wrappers", []) for part in (chosen, protocol))
        # Data that was made by the protocol has its wrappers already.
        wrappers = [*recorded, *(wrapper for wrapper in ours if wrapper not in recorded)]
        chosen |= protocol | ({"additional_wrappers": wrappers} if wrappers else {})
    return env, {**chosen, **added}


def say_what_differs(
    source: str, known: str | None, kwargs: Mapping[str, Any], env: str, env_kwargs: Mapping[str, Any]
) -> None:
    """Prints a line if the environment is not the source's, and one if it is not D4RL's task."""
    changed = {name: value for name, value in env_kwargs.items() if name not in kwargs or kwargs[name] != value}
    if known is not None and env != known:
        print(f"env={env}{in_words(env_kwargs)}: {source} is of {known}{in_words(kwargs)}")
    elif known is not None and changed:
        of_source = {name: kwargs[name] for name in changed if name in kwargs}
        print(f"{env}{in_words(changed)}: of {source} it is made{in_words(of_source) or ' without'}")
    protocol = d4rl_protocol(env)
    ours = protocol.get("additional_wrappers", [])
    found = {**env_kwargs, "additional_wrappers": [x for x in env_kwargs.get("additional_wrappers", []) if x in ours]}
    if not all(found.get(name) == value for name, value in protocol.items()):
        print(f"{env}: D4RL's scores are of another protocol{in_words(protocol)}; protocol=d4rl evaluates by it")


def in_words(kwargs: Mapping[str, Any]) -> str:
    return f" with {dict(kwargs)}" if kwargs else ""


def step_limit_of(env: str, env_kwargs: Mapping[str, Any]) -> int | None:
    """Steps after which the environment cuts its episodes; None where its specification has no limit."""
    with closing(make_env(env, **env_kwargs)) as made:
        return getattr(made.spec, "max_episode_steps", None)
