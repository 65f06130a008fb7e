"""The policy files of rivals and ablations: the trained actions to the bit, in every recipe that reads them."""

from __future__ import annotations

import json
import os
import signal
from copy import deepcopy

import pytest
import torch
from helpers import TINY, compose_recipe
from tensordict import TensorDict
from torchrl.data import Bounded
from torchrl.envs.utils import ExplorationType, set_exploration_type

import torchrl_spar
from torchrl_spar import InputError, SPARActor, save_policy

pytest.importorskip("hydra")
pytest.importorskip("gymnasium")
import compare
import deployment_report
import evaluate
import export
from harness.actors import read_actor
from harness.scores import RESULT_SEED
from kill_test import fork, outcome, start_run
from rivals.models import ACTORS, Networks

LOW, HIGH = torch.tensor([-1.0, -0.3]), torch.tensor([2.0, 0.7])
SEED = 3


def make_actor(kind, low=LOW, high=HIGH):
    """As if trained; its first observation needs float64."""
    torch.manual_seed(0)
    stats = torch.tensor([1e8, 0.0, 1.0], dtype=torch.float64), torch.tensor([0.1, 2.0, 3.0])
    actor = ACTORS[kind](Networks.of(3, Bounded(low, high, low.shape), stats=stats, hidden=[8, 4]))
    for param in actor.parameters():
        param.data += 0.5 * torch.randn_like(param)
    return actor


@pytest.mark.parametrize("kind", ACTORS)
def test_a_loaded_actor_acts_as_the_saved_one_to_the_bit(kind, tmp_path):
    actor = make_actor(kind)
    save_policy(actor, tmp_path / "policy.pt", compare_network=actor.network)
    state = torch.random.get_rng_state()
    policy, _ = read_actor(tmp_path / "policy.pt")
    assert torch.equal(torch.random.get_rng_state(), state)
    observation = torch.tensor([1e8, 0.0, 1.0], dtype=torch.float64) + torch.randn(50, 3).double()
    for exploration in (ExplorationType.DETERMINISTIC, ExplorationType.RANDOM):
        with torch.no_grad(), set_exploration_type(exploration):
            torch.manual_seed(1)
            expected = actor(TensorDict({"observation": observation}, [50]))["action"]
            torch.manual_seed(1)
            assert torch.equal(policy(observation=observation), expected)
    assert expected.std(0).min() > 0.01


# One for each kind of networks, and one whose critics are SPAR's.
METHODS = ["bc", "cql", "iql", "rebrac", "spar_iql", "ablation/no_anchor"]


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tmp_path_factory):
    """A run's directory, and the policy that it had at its end."""
    out, kept = tmp_path_factory.mktemp("run") / "out", []

    def keep(policy, *args, **facts):
        kept.append(deepcopy(policy))
        save_policy(policy, *args, **facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.run.save_policy", keep)
        compare.start(compose_recipe("compare", *TINY, "batch_size=32", f"method={request.param}"), SEED, out)
    return out, kept[-1]


def test_a_run_leaves_its_last_policy(finished, capsys):
    out, trained = finished
    policy, facts = read_actor(out / "policy.pt")
    assert (facts["env"], facts["seed"], facts["log"]["dataset"]) == ("Hopper-v5", SEED, "embedded")
    assert not isinstance(policy, SPARActor)  # none has an anchor
    observation = torch.randn(50, 11)
    with torch.no_grad():
        assert torch.equal(policy(observation=observation), trained(TensorDict({"observation": observation}))["action"])
    results = json.loads((out / "results.json").read_text())
    row = results.get("policy") or results["spar"]
    seed = RESULT_SEED + 100_000 * SEED
    assert torchrl_spar.evaluate(policy, "Hopper-v5", 2, seed).mean().item() == row["return_mean"]
    evaluate.main(compose_recipe("evaluate", f"policy={out / 'policy.pt'}", "episodes=2", f"seed={seed}"))
    assert f"return {row['return_mean']:.1f} " in capsys.readouterr().out


@pytest.mark.parametrize("finished", ["cql", "iql", "ablation/no_anchor"], indirect=True)
def test_it_is_judged_from_its_log_and_exported(finished, tmp_path, capsys):
    out, trained = finished
    few = ["ope.steps=2", "ope.warm_steps=2", "ope.num_qvalue_nets=2"]
    evaluate.main(compose_recipe("evaluate", f"policy={out / 'policy.pt'}", "env=none", *few))
    assert "values from the log" in " ".join(capsys.readouterr().out.split())  # a title that is wrapped
    options = [f"policy={out / 'policy.pt'}", f"out={tmp_path / 'out'}", "formats=[pt2]"]
    export.main(compose_recipe("export", *options))
    observation = torch.randn(50, 11)
    found = torch.export.load(tmp_path / "out" / "policy.pt2").module()(observation)
    with torch.no_grad():
        expected = trained(TensorDict({"observation": observation}))["action"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="has no anchor to fall back to"):
        export.main(compose_recipe("export", *options[:1], f"out={tmp_path / 'guarded'}", "guard=0.9"))
    with pytest.raises(InputError, match="policy has no anchor to be compared with"):
        deployment_report.main(compose_recipe("deployment_report", f"run={out}"))


def test_a_run_that_is_killed_before_its_results_goes_on(tmp_path, monkeypatch):
    start_run("iql", tmp_path / "undisturbed")
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr("harness.run.write_json", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        pid = fork(lambda: start_run("iql", out), tmp_path / "log")
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, (tmp_path / "log").read_text()
    assert (out / "policy.pt").exists() and not (out / "results.json").exists()
    start_run("iql", out)
    assert outcome(out) == outcome(tmp_path / "undisturbed")


def test_other_action_bounds_are_refused(tmp_path):
    actor = make_actor("squashed", LOW[:1], -LOW[:1])
    save_policy(actor, tmp_path / "policy.pt", env="Mine-v0", compare_network=actor.network)
    with pytest.raises(InputError, match="its actions are -1 to 1, those of env=Pendulum-v1 are -2 to 2"):
        evaluate.main(compose_recipe("evaluate", f"policy={tmp_path / 'policy.pt'}", "env=Pendulum-v1"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "diffusion"}, r"policy\.pt: of networks 'diffusion'; this version knows no_anchor, deterministic"),
        ({"hidden": [8]}, r"policy\.pt: damaged"),
        ({"width": 8}, r"policy\.pt: damaged"),
        ({"low": None}, r"policy\.pt: damaged"),
    ],
)
def test_a_file_of_unknown_networks_is_named(tmp_path, change, message):
    actor = make_actor("gaussian")
    save_policy(actor, tmp_path / "policy.pt", compare_network=actor.network | change)
    with pytest.raises(InputError, match=message):
        read_actor(tmp_path / "policy.pt")
    save_policy(actor, tmp_path / "policy.pt")
    with pytest.raises(InputError, match=r"policy\.pt: holds networks of your own"):
        read_actor(tmp_path / "policy.pt")
