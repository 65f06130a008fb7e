"""What TorchRL expects of a loss, in combinations of options that hold every possible pair of them."""

from __future__ import annotations

import pickle
from copy import deepcopy
from itertools import combinations, product

import pytest
import torch
from helpers import make_batch, total
from pairwise import pairwise
from torchrl.objectives import HardUpdate, SoftUpdate

from torchrl_spar import InputError

OPTIONS = {
    "head": ["residual", "latent"], "bound": ["lcb", "min"], "candidates": ["prior", "policy"],
    "value_mix": [0.0, 0.5, 1.0], "joint_vae": [True, False], "lsi_coeff": [1.0, 0.0], "trust_coeff": [1.0, 0.0],
    "with_value": [True, False], "reduction": ["mean", "sum", "none"], "candidate_dtype": [None, torch.bfloat16],
    # of the batch and the call
    "shape": [(12,), (4, 3)], "mask": [False, True], "weights": [False, True],
    "dtype": [torch.float32, torch.float64],
}  # fmt: skip
OF_THE_BATCH = ("shape", "mask", "weights", "dtype")
OWN = {
    "loss_vae": ("residual_vae", ()),
    "loss_value": ("value_network", ()),
    "loss_qvalue": ("qvalue_network", ()),
    "loss_actor": ("actor_network", ("head",)),
}
MASK, WEIGHT = ("collector", "mask"), "priority_weight"


def possible(row):
    return not (row.get("lsi_coeff") == 0 and row.get("trust_coeff") == 0)


ROWS = pairwise(OPTIONS, possible)


def test_the_rows_hold_every_possible_pair():
    for first, second in combinations(OPTIONS, 2):
        found = {(row[first], row[second]) for row in ROWS}
        pairs = set(product(OPTIONS[first], OPTIONS[second]))
        assert found == {(one, two) for one, two in pairs if possible({first: one, second: two})}, (first, second)
    assert all(possible(row) for row in ROWS)


def name_of(row):
    return "-".join(str(row[option]).removeprefix("torch.") for option in OPTIONS)


@pytest.fixture(params=ROWS, ids=name_of)
def row(request):
    return request.param


@pytest.fixture
def build(make_loss, row):
    """The loss of a row, and its batch."""

    def build(seed=0):
        options = {name: value for name, value in row.items() if name not in OF_THE_BATCH}
        loss = make_loss(seed=seed, hidden=[8, 8], **options).to(row["dtype"])
        batch = make_batch(*row["shape"], dtype=row["dtype"])
        if row["mask"]:
            batch[MASK] = (torch.arange(12).view(*row["shape"], 1) % 4) != 1
        if row["weights"]:
            batch[WEIGHT] = torch.linspace(0.1, 2, 12, dtype=row["dtype"]).view(row["shape"])
        return loss, batch

    return build


def run(loss, batch):
    torch.manual_seed(0)
    return loss(batch.clone())


def sums(out):
    return {key: out[key].sum() for key in out.keys() if key.startswith("loss_")}


def gradients(loss, value):
    """By name, and None where nothing arrives."""
    names, parameters = zip(*loss.named_parameters())
    return dict(zip(names, torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)))


def assert_same(left, right):
    """The same losses, metrics and gradients of two (loss, batch)."""
    outs = [run(*pair) for pair in (left, right)]
    torch.testing.assert_close(outs[0], outs[1])
    both = [gradients(pair[0], total(sums(out))) for pair, out in zip((left, right), outs)]
    for name, grad in both[0].items():
        assert (grad is None) == (both[1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, both[1][name], msg=lambda text, name=name: f"{name}: {text}")


def test_every_term_reaches_exactly_its_own_parameters(build, row):
    loss, batch = build()
    out = sums(run(loss, batch))
    has = {"loss_vae": row["joint_vae"], "loss_value": row["with_value"] or row["value_mix"] > 0}
    assert out.keys() == {name for name in OWN if has.get(name, True)}
    for term, value in out.items():
        network, part = OWN[term]
        params = loss.network_params(network)
        own = set(map(id, (params.get(part) if part else params).values(True, True)))
        grads = gradients(loss, value)
        for name, parameter in loss.named_parameters():
            assert (grads[name] is not None) == (id(parameter) in own), (term, name)
        assert any(grad.abs().sum() > 0 for grad in grads.values() if grad is not None), term


def test_the_batch_is_left_as_it_was_but_for_the_priority(build):
    loss, batch = build()
    given, before = batch.clone(), batch.clone()
    torch.manual_seed(0)
    out = loss(given)
    assert set(given.keys(True, True)) == set(before.keys(True, True)) | {"td_error"}
    assert (given.select(*before.keys(True, True)) == before).all()
    assert not any(tensor.requires_grad for tensor in given.values(True, True))
    assert given["td_error"].shape == batch.shape
    assert all(value.requires_grad == key.startswith("loss_") for key, value in out.items())
    assert set(out.keys()) == set(loss.out_keys)
    locked = batch.clone().lock_()
    torch.testing.assert_close(run(loss, locked), out)
    torch.manual_seed(0)
    torch.testing.assert_close(loss(locked), out)
    assert set(locked.keys(True, True)) == set(before.keys(True, True))


def test_reductions_agree(build, row):
    loss, batch = build()
    out = {}
    for reduction in ("none", "mean", "sum"):
        loss.reduction = reduction
        out[reduction] = run(loss, batch)
    count = batch[MASK].squeeze(-1).to(row["dtype"]) if row["mask"] else torch.ones(row["shape"], dtype=row["dtype"])
    if row["weights"]:
        count = count * batch[WEIGHT]
    for key in sums(out["none"]):
        each = out["none"][key]
        assert each.shape == row["shape"] and each.dtype == row["dtype"]
        assert not each[count == 0].any()
        torch.testing.assert_close(out["sum"][key], each.sum())
        torch.testing.assert_close(out["mean"][key], each.sum() / count.sum())


def test_masked_positions_do_not_matter(build, row):
    loss, batch = build()
    if not row["mask"]:
        batch[MASK] = (torch.arange(12).view(*row["shape"], 1) % 4) != 1
    other, off = batch.clone(), ~batch[MASK].squeeze(-1)
    for key in batch.exclude("collector").keys(True, True):
        other[key][off] = ~batch[key][off] if batch[key].dtype == torch.bool else batch[key][off] * 3 + 40
    assert_same((loss, batch), (loss, other))


def test_copies_give_the_same_numbers(build):
    loss, batch = build()
    loss.make_value_estimator(gamma=0.9)
    loss.to(batch["action"].dtype)
    fresh = build(seed=5)[0]
    assert not torch.equal(run(fresh, batch)["residual_ratio"], run(loss, batch)["residual_ratio"])
    fresh.load_state_dict(loss.state_dict())
    copies = fresh, deepcopy(loss), pickle.loads(pickle.dumps(loss))
    for other in copies:
        assert_same((loss, batch), (other, batch))
    expected = run(loss, batch)
    for other in copies:  # which share nothing with it
        for parameter in other.parameters():
            parameter.data.zero_()
    torch.testing.assert_close(run(loss, batch), expected)


def test_in_keys_are_exactly_what_is_read(build):
    loss, batch = build()
    optional = [key for key in (MASK, WEIGHT) if key in batch.keys(True, True)]
    assert_same((loss, batch), (loss, batch.select(*loss.in_keys, *optional)))
    expected = total(sums(run(loss, batch)))
    for key in loss.in_keys:
        with pytest.raises(InputError, match=key if isinstance(key, str) else key[-1]):
            run(loss, batch.exclude(key))
        spoiled = batch.clone()
        spoiled[key] = ~spoiled[key] if spoiled[key].dtype == torch.bool else spoiled[key] + 10
        if key != ("next", "done"):  # TorchRL's estimators ask for it; terminated alone masks
            assert total(sums(run(loss, spoiled))) != expected, key


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_updaters_leave_the_frozen_parts_alone(build, kind):
    loss, _ = build()
    updater = SoftUpdate(loss, tau=0.25) if kind == "soft" else HardUpdate(loss, value_network_update_interval=1)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter += torch.randn_like(parameter)
    names = ["actor_network", "qvalue_network", "residual_vae", *(["value_network"] if loss.has_value else [])]
    sources = {name: loss.network_params(name).data.clone() for name in names}
    targets = {name: loss.target_params(name).data.clone() for name in names[:2]}
    trained = {name: {key for key, value in loss.network_params(name).items(True, True) if value.requires_grad}
               for name in names}  # fmt: skip
    for _ in range(1 if kind == "soft" else 2):  # HardUpdate copies at its second call
        updater.step()
    for name in names:
        assert (loss.network_params(name).data == sources[name]).all()
    for name, old in targets.items():
        for key, value in loss.target_params(name).data.items(True, True):
            rate = (0.25 if kind == "soft" else 1.0) if key in trained[name] else 0.0
            torch.testing.assert_close(value, old[key].lerp(sources[name][key], rate))
    assert not any("anchor" in key for key in trained["actor_network"])


def test_reset_leaves_the_anchor_and_what_was_measured(build):
    loss, batch = build()
    before = loss.network_params("actor_network").data.clone()
    old = {name: parameter.detach().clone() for name, parameter in loss.named_parameters()}
    loss.reset_parameters_recursive()
    after = loss.network_params("actor_network").data
    assert (after["anchor"] == before["anchor"]).all()
    for key in ("residual_scale", "low", "high"):
        assert torch.equal(after[key], before[key])
    for name, parameter in loss.named_parameters():
        if name.endswith("weight") and parameter.ndim - ("qvalue" in name) == 2:
            assert not torch.equal(parameter, old[name]), name
            # PyTorch's own initialisation, whose bound is one over the root of the fan-in.
            bound = parameter.shape[-1] ** -0.5
            assert parameter.abs().max() <= bound and parameter.std() > (0.001 if "head" in name else 0.2) * bound
    members = loss.qvalue_network_params["module", "mlp", "0", "weight"]
    assert not torch.equal(members[0], members[1])
    for name in ("actor_network", "qvalue_network"):
        assert (loss.target_params(name).data == loss.network_params(name).data).all()
    if not loss.actor_network.is_latent:
        policy = loss.actor(batch.clone())["action"]
        torch.testing.assert_close(policy, loss.anchor(batch.clone())["action"], atol=0.02, rtol=0)
    assert all(value.isfinite().all() for value in run(loss, batch).values())


@pytest.mark.parametrize("row", ROWS[::6], indirect=True, ids=name_of)  # seconds each
def test_compiles_to_one_graph(build):
    loss, batch = build()
    SoftUpdate(loss, tau=0.1)
    expected = run(loss, batch)
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(loss, fullgraph=True, backend="eager"), batch), expected)
