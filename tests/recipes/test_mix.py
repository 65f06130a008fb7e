"""SPARLoss mixed with TorchRL's losses: which parameters each term reaches, one optimiser, the recipe end to end."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from helpers import ACTION, OBSERVATION, compose_recipe, make_batch
from torchrl.data import Bounded
from torchrl.objectives import SoftUpdate

from torchrl_spar import InputError, load_offline_dataset, make_spar_loss

pytest.importorskip("hydra")
import mix_objectives
from mixing import joint_loss as mixes
from rivals.models import Networks

HEAD, CRITICS, VALUE = "actor_network_params", "qvalue_network_params", "value_network_params"
# Whose parameters each term must reach, and no others. SPAR's own are by network, those beside it by loss.
OWN = {"spar.loss_actor": {HEAD}, "spar.loss_qvalue": {CRITICS}, "spar.loss_value": {VALUE}}
SHARED = {"spar.loss_actor": {HEAD}, "spar.loss_qvalue": {CRITICS, "encoder"}}
REACHED = {
    "none": OWN,
    "iql": {**OWN, "iql.loss_qvalue": {CRITICS}, "iql.loss_value": {VALUE}, "iql.loss_actor": {"iql"}},
    "cql": {
        **OWN, "cql.loss_qvalue": {CRITICS}, "cql.loss_cql": {CRITICS}, "cql.loss_actor": {"cql"},
        "cql.loss_alpha": {"cql"},
    },
    "encoder": SHARED,
    "aux": {**SHARED, "bc.loss_bc": {"bc", "encoder"}},
}  # fmt: skip


@pytest.fixture(params=REACHED)
def mix(request):
    torch.manual_seed(0)
    data = load_offline_dataset(make_batch(12), action_spec=Bounded(-1, 1, (ACTION,)))
    networks = Networks.of(data, hidden=[8])
    options = {"hidden": [8], "num_qvalue_nets": 2, "joint_vae": False, "reward_scale": 0.5, "with_value": True}
    made = mixes.Mix(make_spar_loss(OBSERVATION, data.action_spec, **options))
    add = mix_objectives.adders(compose_recipe("mix_objectives"))[request.param]
    if add is not None:
        add(made, networks)
    made.name = request.param
    return made


def owners(mix):
    """The owner of every trained parameter: a network of SPAR's, else the loss beside it, else the encoder."""
    found = {id(p): name for name, loss in mix.beside.items() for p in loss.parameters()}
    found |= {id(p): "encoder" for p in (mix.encoder.parameters() if mix.encoder is not None else ())}
    found |= {id(p): name for name in (HEAD, CRITICS, VALUE) for p in getattr(mix.spar, name).parameters()}
    return [(p, found[id(p)]) for p in mix.parameters() if id(p) in found]


def test_each_term_reaches_its_networks_alone(mix):
    terms, parameters = mix(make_batch(12)), owners(mix)
    assert terms.keys() == REACHED[mix.name].keys()
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, [p for p, _ in parameters], allow_unused=True, retain_graph=True)
        reached = {
            owner
            for (_, owner), gradient in zip(parameters, gradients)
            if gradient is not None and gradient.abs().sum()
        }
        assert reached == REACHED[mix.name][name], name


def test_shared_networks_get_the_sum_of_all_terms(mix):
    """The sum's gradient is the sum of the terms' gradients: no term is lost, none counts twice."""
    parameters = mix.parameters()
    assert len({id(p) for p in parameters}) == len(parameters)
    torch.manual_seed(1)
    terms = list(mix(make_batch(12)).values())
    each = [torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
            for term in terms]  # fmt: skip
    torch.stack(terms).sum().backward()
    for parameter, *gradients in zip(parameters, *each):
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, sum(gradients))


def test_an_update_moves_all_that_is_trained_and_no_more(mix):
    batch, optimizer, updater = (
        make_batch(12),
        torch.optim.Adam(mix.parameters(), lr=0.01),
        SoftUpdate(mix.spar, tau=0.5),
    )
    fixed = {key: value.clone() for key, value in mix.spar.anchor.state_dict().items()}
    fixed_vae = mix.spar.residual_vae_params.detach().clone()
    before = [(p, p.detach().clone(), owner) for p, owner in owners(mix)]
    torch.stack(list(mix(batch).values())).sum().backward()
    optimizer.step()
    updater.step()
    moved = {owner for p, old, owner in before if not torch.equal(p, old)}
    assert moved == set.union(*REACHED[mix.name].values())
    for key, value in mix.spar.anchor.state_dict().items():
        assert torch.equal(value, fixed[key])
    assert (mix.spar.residual_vae_params.detach() == fixed_vae).all()
    assert mix.policy(batch.select("observation"))["action"].shape == (12, ACTION)
    assert set(batch.keys()) == {"observation", "action", "next"}
    for name, loss in mix.beside.items():
        if name != "bc":  # the critics and their targets are the same memory
            assert loss.qvalue_network_params is mix.spar.qvalue_network_params
            assert loss._modules["target_qvalue_network_params"] is mix.spar.target_params("qvalue_network")


@pytest.mark.parametrize("mix", ["iql"], indirect=True)
def test_losses_beside_see_spars_scaled_rewards(mix):
    batch, iql = make_batch(12), mix.beside["iql"]
    value = batch["next"].copy()
    with torch.no_grad(), mix.spar.value_network_params.to_module(iql.value_network):
        following = iql.value_network(value)["state_value"]
    target = 0.5 * batch["next", "reward"] + 0.99 * ~batch["next", "terminated"] * following
    expected = 0.0
    for member in mix.spar.qvalue_network_params.data.unbind(0):
        with torch.no_grad(), member.to_module(iql.qvalue_network):
            expected += (iql.qvalue_network(batch.copy())["state_action_value"] - target).pow(2).mean()
    torch.testing.assert_close(mix(batch)["iql.loss_qvalue"].detach(), expected)


SMALL = [
    "anchor.steps=3",
    "vae.steps=3",
    "critics.steps=3",
    "spar.updates=4",
    "spar.loss.hidden=[8]",
    "eval.interval=2",
]
SMALL += ["eval.episodes=1", "eval.final_episodes=1", "cql.num_random=1"]


@pytest.mark.slow
def test_the_recipe_runs_every_mix(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mix_objectives.main(compose_recipe("mix_objectives", *SMALL, "seeds=[3]", f"out={tmp_path / 'result'}"))
    runs = json.loads((tmp_path / "result" / "results.json").read_text())["runs"]
    assert [row["mix"] for row in runs] == list(REACHED)
    assert len({row["anchor"] for row in runs}) == 1  # all start from the same one
    assert all([point["step"] for point in row["curve"]] == [2, 4] for row in runs)
    printed = capsys.readouterr().out
    assert all(name in printed for name in REACHED)


def test_a_wrong_mix_is_named(tmp_path):
    with pytest.raises(InputError, match="mix=sac: must be some of none, iql, cql, encoder, aux, each once"):
        mix_objectives.main(compose_recipe("mix_objectives", "mix=sac", f"out={tmp_path / 'result'}"))
    for options, words in (
        (["mix=cql", "spar.loss.num_qvalue_nets=4"], "mix=cql needs 2"),
        (["mix=[]"], "each once"),
        (["mix=[none,none]"], "each once"),
        (["mix=5"], "each once"),
        (["mix=[none,encoder]", "spar.loss.head=latent"], "head=latent: mix=encoder has networks"),
        (["mix=none", "spar.loss.lmbda=0.5"], "lmbda=0.5: without effect"),
    ):
        with pytest.raises(InputError, match=words):
            mix_objectives.main(compose_recipe("mix_objectives", *options, f"out={tmp_path / 'result'}"))
    assert not (tmp_path / "result").exists()
