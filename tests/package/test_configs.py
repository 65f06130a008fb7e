"""SPAR in TorchRL's structured configs: the same trainer YAML with loss=iql and loss=spar."""

from __future__ import annotations

import inspect
import subprocess
import sys
from copy import deepcopy
from dataclasses import fields

import pytest
import torch
from helpers import RECIPES, assert_one_line, compose_recipe, run
from tensordict import TensorDict

from torchrl_spar import SPARLoss
from torchrl_spar.configs import SPARLossConfig, register_configs

pytest.importorskip("hydra")
pytest.importorskip("gymnasium")
import hydra
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import OmegaConf

TINY = ["collector.total_frames=80", "collector.frames_per_batch=20", "collector.init_random_frames=20"]
TINY += ["replay_buffer.batch_size=8", "trainer.optim_steps_per_batch=2", "trainer.progress_bar=false"]
SPAR = ["loss=spar", *TINY]
LATENT = ["models.actor.head.out_keys=[latent]", "models.actor.head.network.out_features=2"]
LATENT += ["models.actor.residual_vae=${models.residual_vae}"]


@pytest.fixture(scope="module", autouse=True)
def groups():
    """TorchRL's groups for this file alone: they change what env=... means to other recipes' tests."""
    repo = ConfigStore.instance().repo
    before = set(repo)
    register_configs()
    added = set(repo) - before
    yield
    for group in added:
        del repo[group]


def compose(*overrides):
    return compose_recipe("iql_trainer", *overrides)


def test_config_has_the_losss_keywords_and_defaults():
    expected = {name: p.default for name, p in inspect.signature(SPARLoss).parameters.items()}
    found = {field.name: field.default for field in fields(SPARLossConfig)}
    networks = ("actor_network", "qvalue_network", "value_network", "residual_vae")
    hydras = {"gamma": None, "_partial_": False, "_target_": found["_target_"]}
    assert found == {**expected, **dict.fromkeys(networks), **hydras}


def test_only_the_loss_and_its_networks_differ():
    iql, spar = (OmegaConf.to_container(compose(f"loss={name}")) for name in ("iql", "spar"))
    assert {key for key in iql.keys() | spar.keys() if iql.get(key) != spar.get(key)} == {"loss", "models"}


@pytest.mark.parametrize("options", [["loss=iql", *TINY], SPAR, [*SPAR, *LATENT]], ids=["iql", "spar", "spar_latent"])
def test_trainer_trains_either_loss(options):
    torch.manual_seed(0)
    trainer = instantiate(compose(*options).trainer)
    loss, policy = trainer.loss_module, trainer.collector.policy
    before = deepcopy(loss.state_dict())
    trainer.train()
    after = loss.state_dict()
    assert trainer.collected_frames == 80 and len(trainer.replay_buffer) == 80
    trained = {param.data_ptr() for param in loss.parameters()}
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            source = after[name.replace("target_", "")]
            assert torch.equal(value, after[name]) != (source.data_ptr() in trained), name
    # The collector's policy follows the loss's.
    followed = loss.actor_network_params.flatten_keys(".")
    for name, value in TensorDict.from_module(policy).flatten_keys(".").items():
        assert torch.equal(value, followed[name]), name


def test_head_b_has_the_vaes_decoder():
    loss = instantiate(compose(*SPAR, *LATENT).loss)
    assert loss.actor_network.is_latent
    own = loss.residual_vae_params["decoder"].flatten_keys(".")
    for name, param in loss.actor_network_params["decoder"].flatten_keys(".").items():
        assert param.data_ptr() == own[name].data_ptr()


def test_partial_loss_takes_the_trainers_networks():
    partial = {"actor_network": None, "qvalue_network": None, "value_network": None, "_partial_": True}
    whole = compose(*SPAR, "loss.kappa=0.25", "loss.candidate_dtype=bfloat16").loss
    networks = {name: instantiate(whole[name]) for name in partial if name != "_partial_"}
    loss = instantiate(OmegaConf.merge(whole, partial))(**networks)
    assert isinstance(loss, SPARLoss) and (loss.kappa, loss.candidate_dtype) == (0.25, torch.bfloat16)
    assert loss.value_estimator.gamma == pytest.approx(0.99)


@pytest.mark.parametrize(
    "option, message",
    [
        ("loss.residual_vae=null", "loss: spar needs residual_vae"),
        ("loss.candidate_dtype=halves", "candidate_dtype=halves: must be a floating type"),
        ("loss.kappa=-1", "kappa=-1.0: must be at least 0"),
        ("models.actor.low=[2]", "low < high"),
        ("models.actor.low=-2", r"low=-2, high=\[2.0\]: give lists"),
        ("models.actor.low=[-2,-2]", r"low=\[-2, -2\], high=\[2.0\]: give lists"),
        ("+loss.kapa=1", "loss.kapa: no such option, did you mean loss.kappa?"),
        ("+loss.gama=0.9", "loss.gama: no such option, did you mean loss.gamma?"),
        ("+models.actor.hed=1", "spar_actor.hed: no such option, did you mean spar_actor.head?"),
        (
            "+models.actor.head.init_scal=1",
            "residual_head.init_scal: no such option, did you mean residual_head.init_scale",
        ),
        ("+models.residual_vae.in_key=1", "residual_vae.in_key: no such option, did you mean residual_vae.in_keys?"),
    ],
)
def test_a_wrong_option_is_named(option, message):
    with pytest.raises(hydra.errors.InstantiationException, match=message):
        instantiate(compose(*SPAR, option).loss)


@pytest.mark.parametrize("option", ["+loss.kapa=1", "loss.kapa=1"])
def test_the_recipe_names_an_unknown_option_in_one_line(option):
    done = run("iql_trainer", "loss=spar", option, cwd=RECIPES)
    assert_one_line(done, "loss.kapa: no such option, did you mean loss.kappa?")
    assert "Error executing job" not in done.stderr


def test_the_recipes_help_has_every_option_of_the_loss():
    done = run("iql_trainer", "--help", cwd=RECIPES)
    assert done.returncode == 0 and "\n  loss.kappa=1\n      Standard deviations that" in done.stdout
    for name, keyword in inspect.signature(SPARLoss).parameters.items():
        assert (f"\n  loss.{name}=" in done.stdout) == (keyword.kind is keyword.KEYWORD_ONLY), name
    assert "\n  loss.gamma=" in done.stdout and "_target_" not in done.stdout.partition("Options of loss=spar")[2]


def test_import_needs_no_hydra():
    code = "import sys, torchrl_spar.configs, torchrl_spar.data.registry; assert 'hydra' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
