"""Presets: they compose, alone and as a list, and hold nothing that the recipe does not have."""

from pathlib import Path

import pytest
from helpers import compose_recipe
from omegaconf import OmegaConf

from torchrl_spar import load_offline_dataset, make_spar_loss

CONFIG = Path(__file__).resolve().parents[2] / "recipes" / "config"
PRESETS = sorted(path.stem for path in (CONFIG / "preset").glob("*.yaml"))
# Their keys are arguments of environments.
FREE = ("env_kwargs",)


def options(value, prefix=""):
    """All dotted names of a configuration, and their values."""
    if not isinstance(value, dict) or prefix.removesuffix(".") in FREE:
        return {prefix.removesuffix("."): value}
    return {name: x for key, part in value.items() for name, x in options(part, f"{prefix}{key}.").items()}


def composed(*overrides, recipe="spar_d4rl"):
    return options(OmegaConf.to_container(compose_recipe(recipe, "out=x", *overrides)))


def of_file(name):
    """A preset's own values; Hydra's `defaults` are no option."""
    return options({key: x for key, x in OmegaConf.to_container(OmegaConf.load(name)).items() if key != "defaults"})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_only_options_of_the_recipe(name):
    known = composed()
    own = of_file(CONFIG / "preset" / f"{name}.yaml")
    assert own and own.keys() <= known.keys()
    for option, value in own.items():
        if known[option] is not None:
            assert type(value) is type(known[option]), option


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_changes_what_it_names_and_nothing_else(name):
    before, after = composed(), composed(f"preset={name}")
    own = of_file(CONFIG / "preset" / f"{name}.yaml")
    shared = of_file(CONFIG / "preset" / "maze.yaml") if name in ("antmaze", "pointmaze") else {}
    assert after == {**before, **shared, **own}
    assert composed(f"preset={name}", recipe="compare").items() >= {**shared, **own}.items()


def test_of_several_presets_the_last_wins():
    field, smoke, both = (composed(f"preset={name}") for name in ("[d4rl,antmaze]", "[antmaze,smoke]", "[smoke,d4rl]"))
    assert field["spar.updates"] == 1_000_000 and field["eval.interval"] == 50_000
    assert field["end_at_success"] is True and field["eval.final_episodes"] == 100
    assert smoke["spar.updates"] == 120 and smoke["eval.final_episodes"] == 2 and smoke["spar.loss.expectile"] == 0.9
    assert both["spar.updates"] == 1_000_000 and both["eval.final_episodes"] == 10
    mine = composed("preset=[d4rl,antmaze]", "eval.final_episodes=3", "env_kwargs={pay:1}")
    assert mine["eval.final_episodes"] == 3 and mine["protocol"] == "d4rl" and mine["env_kwargs"] == {"pay": 1}


def test_the_readme_has_the_sizes_of_the_quick_job_and_of_d4rl():
    text = " ".join((CONFIG.parent / "README.md").read_text().split())
    quick, field = composed(), composed("preset=d4rl")
    assert quick["anchor.steps"] == quick["vae.steps"]
    starts = f"{quick['anchor.steps']:,} steps each for anchor and VAE, and for each of three members "
    starts += f"{quick['critics.steps']:,} for the start of its critics and "
    assert quick["spar.members"] == 3
    for sizes, shown in ((quick, starts), (field, "")):
        width, other = sizes["spar.loss.hidden"]
        assert width == other
        shown = f"two layers of {width}, batches of {sizes['batch_size']}, {shown}{sizes['spar.updates']:,} updates"
        assert shown in text


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_takes_a_presets_options(name):
    data = load_offline_dataset(CONFIG.parent / "data" / "torchrl-spar" / "hopper" / "medium-v0")
    cfg = compose_recipe("spar_d4rl", "out=x", f"preset={name}", "spar.loss.hidden=[8]")
    loss = make_spar_loss(data, **cfg.spar.loss)
    assert loss.expectile == cfg.spar.loss.expectile and loss.value_mix == cfg.spar.loss.value_mix
