"""Networks of one's own in the recipes that take a policy: evaluate.py and export.py."""

from __future__ import annotations

import importlib
import warnings

import evaluate
import pytest
import torch
from helpers import compose_recipe

import torchrl_spar
from torchrl_spar import InputError, load_offline_dataset, make_spar_loss, make_toy_data, save_policy

pytest.importorskip("hydra")
pytest.importorskip("gymnasium")

# Pendulum's sizes; it writes more than the action.
CODE = """
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential


def make():
    torch.manual_seed(3)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5))
    body = TensorDictModule(layers, ["observation"], ["hidden"])
    return TensorDictSequential(body, TensorDictModule(torch.nn.Linear(8, 1), ["hidden"], ["action"]))


def other_key():
    return TensorDictModule(torch.nn.Linear(3, 1), ["pixels"], ["action"])


def plain():
    return torch.nn.Linear(3, 1)


def broken():
    raise ValueError("no weights here")


def small():
    return TensorDictModule(torch.nn.Linear(3, 1), ["observation"], ["action"])
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The user's module, and a policy of its networks whose weights are others than it makes."""
    (tmp_path / "my_networks.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    import my_networks

    importlib.reload(my_networks)
    policy = my_networks.make()
    for param in policy.parameters():
        param.data += 0.1
    save_policy(policy, "mine.pt", env="Pendulum-v1")
    return policy.select_out_keys("action").eval()


def start(recipe, *options):
    importlib.import_module(recipe).main(compose_recipe(recipe, *options))


def test_the_exported_file_gives_its_actions(own, tmp_path):
    start("export", "actor=my_networks.make", "policy=mine.pt", "observation_dim=3", "out=out", "formats=[pt2]")
    observation = 10 * torch.randn(7, 3)
    found = torch.export.load(tmp_path / "out" / "policy.pt2").module()(observation)
    torch.testing.assert_close(found, own(observation=observation), rtol=0, atol=1e-6)


def test_it_is_evaluated_with_the_weights_of_the_file_or_its_own(own, capsys):
    returns = {}
    for name, options in {"file": ["policy=mine.pt"], "own": ["env=Pendulum-v1"]}.items():
        start("evaluate", "actor=my_networks.make", "episodes=2", "seed=7", *options)
        returns[name] = capsys.readouterr().out
    import my_networks

    for name, policy in {"file": own, "own": my_networks.make().eval()}.items():
        assert f"return {torchrl_spar.evaluate(policy, 'Pendulum-v1', 2, seed=7).mean():.1f} " in returns[name]
    assert returns["file"] != returns["own"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["policy=mine.pt"], "mine.pt: holds networks of your own"),
        ([], "policy: must be given, as policy=..., or actor=module.function"),
        (["actor=my_networks.absent"], "actor=my_networks.absent: no function is found there"),
        (["actor=my_networks.broken"], r"actor=my_networks.broken: it fails, .*\(no weights here\)"),
        (["actor=my_networks.plain"], "must return a TensorDictModule, and returns a Linear"),
        (["actor=my_networks.other_key"], "must lead from observation to action, and leads from pixels to action"),
        (["actor=my_networks.small", "policy=mine.pt"], "mine.pt: does not fit the policy that was given"),
    ],
)
@pytest.mark.parametrize("recipe", ["evaluate", "export"])
def test_what_does_not_fit_is_named(own, recipe, options, message):
    with pytest.raises(InputError, match=message):
        start(recipe, *options)


def test_a_log_of_other_sizes_is_named(own):
    with pytest.raises(InputError, match="fails on dataset=embedded's observations of size 11"):
        start("evaluate", "actor=my_networks.make", "env=none", "dataset=embedded")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "observation_dim: must be given, the size of the observation that actor=my_networks.make reads"),
        (["observation_dim=4"], "torch.export does not take it with observation_dim=4"),
    ],
)
def test_an_export_needs_the_size_of_the_observation(own, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        start("export", "actor=my_networks.make", "out=out", "formats=[pt2]", *options)
    assert not (tmp_path / "out").exists()


def test_an_environment_must_be_named_where_no_file_does(own):
    with pytest.raises(InputError, match=r"actor=my_networks\.make: names no log; give one"):
        start("evaluate", "actor=my_networks.make")


def test_a_log_in_another_unit_is_told():
    data = make_toy_data()
    policy, rows = make_spar_loss(data).actor, data[:].exclude("index")
    same, other = (load_offline_dataset(part, action_spec=data.action_spec) for part in (rows, rows.clone()))
    for part in (other[:], other[:]["next"]):
        part["observation"][:, 1] *= 1000
    other = load_offline_dataset(other[:].exclude("index"), action_spec=data.action_spec)
    cfg = compose_recipe("evaluate", "dataset=log.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate.check_sizes(cfg, "policy.pt", policy, same)
    with pytest.warns(UserWarning, match=r"columns \[1\] of its observations .* policy\.pt's training data"):
        evaluate.check_sizes(cfg, "policy.pt", policy, other)
