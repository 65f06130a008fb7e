"""Options: kinds, ranges, unknown names and the help, on a recipe of their own and on all of ours."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, fields
from importlib import import_module

import pytest
from helpers import RECIPES, compose_recipe

pytest.importorskip("hydra")
from harness import options
from harness.options import checked, explain, option
from harness.spar_options import Loss
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchrl_spar import InputError, SPARLoss, make_spar_loss

SCRIPTS = (
    "benchmark",
    "compare",
    "deployment_report",
    "drop_in_trainer",
    "evaluate",
    "export",
    "inspect_dataset",
    "make_dataset",
)
SCRIPTS += ("mix_objectives", "ope_study", "spar_d4rl", "spar_offline_to_online")
CLAIMS = ("bootstrapping", "drift", "gradient_conflict", "search_space", "suboptimal_anchors", "support")


@dataclass
class Part:
    share: float = option(0.5, "A share.", least=0, most=1)
    sizes: list[int] = option([1], "Sizes.", least=1)


@dataclass
class Toy:
    count: int = option(3, "A count.", least=1)
    spread: float | None = option(None, "A spread.", above=0)
    kind: str = option("a", "A kind.", choices=("a", "b"))
    flag: bool = option(True, "A flag.")
    given: str = option("x", "Text.")
    part: Part = option(Part(), "A part.")


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(options.OPTIONS, "toy", Toy)


def configure(**changes):
    return OmegaConf.merge(OmegaConf.structured(Toy), OmegaConf.create(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count=0: must be a number from 1 on"),
        ({"spread": 0}, "spread=0: must be a number above 0"),
        ({"spread": float("nan")}, "spread=nan: must be a number above 0"),
        ({"spread": float("inf")}, "spread=inf: must be a number above 0"),
        ({"kind": "c"}, "kind=c: must be one of a, b"),
        ({"part": {"share": 1.5}}, "part.share=1.5: must be a number from 0 to 1"),
        ({"part": {"sizes": [4, 0]}}, "part.sizes=[4, 0]: must be a number from 1 on"),
        ({"given": ""}, "given=: is empty; give a value, or leave the option out"),
    ],
)
def test_a_value_out_of_range_is_named(changes, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        checked(configure(**changes), "toy")


def test_values_at_the_bounds_pass():
    changes = {"count": 1, "spread": None, "kind": "b", "part": {"share": 1, "sizes": []}}
    found = OmegaConf.to_container(checked(configure(**changes), "toy"))
    assert found == {**changes, "flag": True, "given": "x"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 1.5}, "count=1.5: must be a whole number"),
        ({"count": None}, "count=None: must be a whole number"),
        ({"spread": "wide"}, "spread=wide: must be a number"),
        ({"flag": "maybe"}, "flag=maybe: must be true or false"),
        ({"part": {"sizes": 3}}, "part.sizes=3: must be a list, each a whole number"),
        ({"part": {"shar": 0.1}}, "part.shar: no such option, did you mean part.share?"),
        ({"xyzzy": 1}, "xyzzy: no such option, --help lists all"),
    ],
)
def test_a_wrong_kind_or_name_is_named(changes, message):
    with pytest.raises(OmegaConfBaseException) as caught:
        configure(**changes)
    assert explain(caught.value, "toy") == message


def test_what_a_plus_has_added_is_refused():
    cfg = configure()
    OmegaConf.update(cfg, "part.shar", 0.1, force_add=True)
    with pytest.raises(InputError, match=re.escape("part.shar: no such option, did you mean part.share?")):
        checked(cfg, "toy")


@pytest.mark.parametrize("name", [*SCRIPTS, *(f"claims/{name}" for name in CLAIMS)])
def test_every_option_has_a_meaning_in_the_help_and_a_default_that_passes(name, capsys):
    compose_recipe(
        name,
        *{
            "evaluate": ["policy=x"],
            "export": ["policy=x"],
            "deployment_report": ["run=x"],
            "ope_study": ["runs=[x]"],
        }.get(name, []),
    )
    options.print_help(name, "About.")
    printed = capsys.readouterr().out.splitlines()
    for path, entry, _ in options.walk(options.OPTIONS[name]):
        (line,) = [i for i, text in enumerate(printed) if re.fullmatch(rf"  {re.escape(path)}(=.*)?", text)]
        assert entry.metadata["meaning"] and printed[line + 1].strip().startswith(entry.metadata["meaning"])


def test_all_scripts_with_options_are_checked_here():
    found = {path.stem for path in RECIPES.glob("*.py") if "@recipe_options" in path.read_text()} | {"spar_d4rl"}
    assert found == set(SCRIPTS)
    assert {path.stem for path in RECIPES.glob("claims/*.py") if "@recipe_options" in path.read_text()} == set(CLAIMS)
    for name in CLAIMS:
        assert hasattr(import_module(f"claims.{name}"), "Options")


def test_options_of_the_loss_are_all_there_with_its_defaults():
    signatures = [inspect.signature(f).parameters for f in (SPARLoss, make_spar_loss)]
    known = {name: p.default for parameters in signatures for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    ours = OmegaConf.to_container(OmegaConf.structured(Loss))
    # What the recipes set themselves, or decide otherwise: the VAE is trained before, small networks are for a CPU.
    set_elsewhere = {"reward_scale", "reduction", "use_prioritized_weights", "anchor", "observation_stats", "device"}
    set_elsewhere |= {"loss_class", "with_value"}
    assert known.keys() - set_elsewhere == ours.keys() == {entry.name for entry in fields(Loss)}
    assert {name for name, value in ours.items() if value != known[name]} == {"hidden", "joint_vae"}
