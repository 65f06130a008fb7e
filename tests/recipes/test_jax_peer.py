"""The peer in JAX does the update's work: the same metrics and parameters along a few updates."""

from __future__ import annotations

import math

import pytest
import torch

from torchrl_spar import BatchSampler, SPARUpdate

jax = pytest.importorskip("jax")
from benchmarks import jax_peer  # noqa: E402
from benchmarks.updates import make_data, make_losses  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def started():
    assert jax_peer.start(CPU, threads=1)


def loss_off_its_start():
    """Targets apart from what they follow, a head that is not near zero, coefficients that count."""
    loss = make_losses([0], [16, 12], CPU, num_candidates=5, num_qvalue_nets=3, lsi_coeff=0.7, trust_coeff=1.3)[0]
    generator = torch.Generator().manual_seed(1)
    for params in (loss.network_params, loss.target_params):
        for name in ("actor_network", "qvalue_network"):
            for key, leaf in params(name).items(True, True):
                if key[-1] in ("weight", "bias"):
                    leaf.data += 0.05 * torch.randn(leaf.shape, generator=generator)
    loss.residual_scale = torch.tensor([0.3, 0.5, 0.8])
    loss.reward_scale.fill_(0.7)
    return loss


def test_updates_give_the_packages_numbers():
    loss = loss_off_its_start()
    peer = jax_peer.JaxUpdate(loss)

    @jax.jit
    def step(state, fixed, columns, noise, latents):
        return peer.step(state, fixed, dict(zip(jax_peer.COLUMNS, columns)), noise, latents)

    state, fixed = peer.initial()
    update = SPARUpdate(loss)
    block = next(BatchSampler(loss, make_data(32, CPU), length=4, seed=0, target_interval=None))
    block["next", "terminated"] = torch.rand(4, 32, 1, generator=torch.Generator().manual_seed(2)) < 0.3
    for index, batch in enumerate(block):
        columns = [jax_peer._array(batch[key].float()) for key in jax_peer.COLUMNS]
        noise = jax_peer._array(batch["action_noise"])
        latents = jax_peer._array(batch["candidate_noise"].movedim(-2, 0))
        state, found = step(state, fixed, columns, noise, latents if index % 2 else None)
        expected = update(batch)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    # In the parameters' own memory, which the update has changed in place.
    after, _ = peer.initial()
    for name in ("params", "targets"):
        for found, expected in zip(jax.tree.leaves(state[name]), jax.tree.leaves(after[name]), strict=True):
            assert abs(found - expected).max() < 1e-5


def test_block_draws_and_updates_by_itself():
    call = jax_peer.jax_spar(make_losses([0], [8], CPU)[0], make_data(16, CPU), block=4)
    first, second = ({name: float(value) for name, value in call().items()} for _ in range(2))
    assert first != second and all(map(math.isfinite, second.values()))
