"""A dataclass per recipe (Hydra's structured configs) states kind, default, meaning and range of each option, once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import field, fields, is_dataclass
from importlib import import_module
from typing import Any, TypeVar, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from torchrl_spar import InputError
from torchrl_spar.configs import NETWORKS, SPARLossConfig
from torchrl_spar.errors import suggestion

T = TypeVar("T")
# The dataclass of each recipe, by the recipe's name.
OPTIONS: dict[str, Any] = {}
PROTOCOL = (
    "d4rl: the environment counts as D4RL's does (Adroit's horizons, rewards and ends; AntMaze ends at the goal; the "
    "kitchen rewards a task once); null: it is left as it is."
)
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def option(
    default: Any, meaning: str, *, least: float = -math.inf, most: float = math.inf, above: float = -math.inf,
    choices: tuple[str, ...] = (),
) -> Any:  # fmt: skip
    """A field: its default, its text in `--help`, and its range (of a list: the range of its items).

    Args:
        default: copied for every configuration; ``"???"`` must be given.
        meaning: one sentence or a few.
        least, most: bounds that are allowed.
        above: bound that is not.
        choices: all that is allowed; beside them null where the kind allows it.
    """
    limits = {"meaning": meaning, "least": least, "most": most, "above": above, "choices": choices}
    return field(default_factory=lambda: deepcopy(default), metadata=limits)


def recipe_options(name: str, *, stored_as: str | None = None) -> Callable[[type[T]], type[T]]:
    """Registers the options of a recipe as its whole configuration, or under `stored_as` for its YAML to build on."""

    def register(options: type[T]) -> type[T]:
        group, _, last = (stored_as or name).rpartition("/")
        ConfigStore.instance().store(name=last, node=options, group=group or None, package="_global_")
        OPTIONS[name] = options
        return options

    return register


def ensure_registered(name: str) -> None:
    """Has a recipe's options known in this process: one of a sweep gets the recipe's code without importing it."""
    if name not in OPTIONS:
        import_module(name.replace("/", "."))


def checked(cfg: DictConfig, name: str) -> DictConfig:
    """The configuration of a recipe as plain values.

    Raises:
        InputError: if an option is missing or out of range.
    """
    if name not in OPTIONS:  # TorchRL's own, which leaves open what it fills in itself
        return cfg
    for missing in sorted(OmegaConf.missing_keys(cfg)):
        raise InputError(f"{missing}: must be given, as {missing}=...")
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    _refuse_unknown(plain, OPTIONS[name])
    for path, entry, _ in walk(OPTIONS[name]):
        _check_range(path, OmegaConf.select(plain, path), entry.metadata)
    OmegaConf.set_struct(plain, True)
    assert isinstance(plain, DictConfig)
    return plain


def walk(options: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, field and kind of every option, groups before what they hold."""
    kinds = get_type_hints(options)
    for entry in fields(options):
        if "meaning" in entry.metadata:
            yield f"{prefix}{entry.name}", entry, kinds[entry.name]
            if is_dataclass(kinds[entry.name]):
                yield from walk(kinds[entry.name], f"{prefix}{entry.name}.")


def explain(err: BaseException, name: str, *, beside: Iterable[str] = ()) -> str:
    """One line for what is wrong with the options of a recipe, which may have others `beside` Hydra's."""
    cause: BaseException | None = err
    while cause is not None and not isinstance(cause, (InputError, OmegaConfBaseException)):
        cause = cause.__cause__
    if isinstance(cause, InputError):  # of what Hydra instantiates, too
        return str(cause)
    known = {path: kind for path, _, kind in walk(OPTIONS[name])} if name in OPTIONS else {}
    option = str(getattr(cause, "full_key", None) or "").split("[")[0]
    if isinstance(cause, ValidationError) and option in known:
        return f"{option}={cause.value}: must be {_describe(known[option])}"
    if isinstance(cause, (AttributeError, KeyError)) and option and option not in known:
        return unknown_option(option, [*(known or _beside(cause, option)), *beside])
    return " ".join(str(err).split())


def _beside(err: OmegaConfBaseException, option: str) -> list[str]:
    """The options where this one was looked for, of a configuration that no dataclass of ours describes."""
    prefix = option[: option.rfind(".") + 1]
    return [f"{prefix}{name!s}" for name in err.parent_node] if isinstance(err.parent_node, DictConfig) else []


def unknown_option(name: str, known: Iterable[str]) -> str:
    """An error's text for an option that does not exist; it suggests the one that is most like it."""
    return f"{name}: no such option{suggestion(name, known) or ', --help lists all'}"


def print_help(name: str, about: str) -> None:
    """Every option with its default, meaning and range."""
    print(f"{about.strip()}\n\nOptions, given as key=value:")
    default = OmegaConf.to_container(OmegaConf.structured(OPTIONS[name]))
    for path, entry, kind in walk(OPTIONS[name]):
        value: Any = default
        for part in path.split("."):
            value = value[part]
        shown = path if is_dataclass(kind) else f"{path}={_text(value)}"
        print(f"  {shown}\n      {_meaning(entry)}")


def help_of_loss(options: Any) -> str:
    """Every option of `loss: spar` with its default; with meaning and range where the dataclass `options` has it."""
    meanings = {entry.name: f"\n      {_meaning(entry)}" for entry in fields(options)}
    given = [each for each in fields(SPARLossConfig) if each.name not in NETWORKS and not each.name.startswith("_")]
    return "\n".join(f"  loss.{each.name}={_text(each.default)}{meanings.get(each.name, '')}" for each in given)


def _meaning(entry: Any) -> str:
    limits = _limits(entry.metadata)
    return f"{entry.metadata['meaning']}{limits and f' Must be {limits}.'}"


def _refuse_unknown(cfg: Any, options: Any, prefix: str = "") -> None:
    """Refuses unknown keys: Hydra adds those given with a plus to any group."""
    known = get_type_hints(options)
    for name, value in cfg.items():
        if name not in known:
            raise InputError(unknown_option(f"{prefix}{name}", [f"{prefix}{other}" for other in known]))
        if is_dataclass(known[name]):
            _refuse_unknown(value, known[name], f"{prefix}{name}.")


def _check_range(option: str, value: Any, limits: Any) -> None:
    if value is None or isinstance(value, DictConfig):
        return
    for part in value if isinstance(value, ListConfig) else [value]:
        if part == "":
            raise InputError(f"{option}={_text(value)}: is empty; give a value, or leave the option out")
        is_number = isinstance(part, (int, float)) and not isinstance(part, bool)
        if limits["choices"] and part not in limits["choices"]:
            break
        if is_number and not (
            math.isfinite(part) and limits["least"] <= part <= limits["most"] and part > limits["above"]
        ):
            break
    else:
        return
    raise InputError(f"{option}={_text(value)}: must be {_limits(limits) or 'a number'}")


def _limits(limits: Any) -> str:
    least, most, above = limits["least"], limits["most"], limits["above"]
    if limits["choices"]:
        return f"one of {', '.join(limits['choices'])}"
    if above > -math.inf:
        return f"a number above {above:g}" + ("" if most == math.inf else f", up to {most:g}")
    if least > -math.inf:
        return f"a number from {least:g} " + ("on" if most == math.inf else f"to {most:g}")
    return ""


def _describe(kind: Any) -> str:
    if is_dataclass(kind):
        return "names and values"
    text = kind.__name__ if isinstance(kind, type) and not str(kind).startswith("list") else str(kind)
    if text.startswith("list"):
        return f"a list, each {KINDS.get(text[5:].split(']')[0], 'value')}"
    return KINDS.get(text.split(" |")[0], text)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)
