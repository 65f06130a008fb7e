"""Training on a GPU: the CPU's numbers, and CUDA graphs, torch.compile and stacks with those of the plain update."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers import build_loss, make_batch

from torchrl_spar import (
    BatchSampler,
    SPARLoss,
    SPARUpdate,
    StackedSPARLoss,
    load_offline_dataset,
    load_policy,
    pretrain,
    save_policy,
)

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE, GRAPH = torch.device("cuda"), {"cudagraph": True}
# Blocks of odd length start at either half of policy_interval, before and after the critics settle (at half of
# DECAY_STEPS): four graphs, each with warm-up, capture and replay.
LENGTH, BLOCKS, DECAY_STEPS = 3, 16, 48


def make_sampler(loss: SPARLoss, seed: int = 0, device: torch.device = DEVICE) -> BatchSampler:
    data = load_offline_dataset(make_batch(60), batch_size=16, device=device)
    return BatchSampler(loss, data, length=LENGTH, seed=seed, target_interval=2 * LENGTH)


def train(loss: SPARLoss, seed: int = 0, **options: object) -> dict[str, torch.Tensor]:
    update, sampler = SPARUpdate(loss, decay_steps=DECAY_STEPS, **options), make_sampler(loss, seed)
    for _ in range(BLOCKS):
        metrics = update.run(next(sampler))
    return metrics


def assert_same(found: SPARLoss, expected: SPARLoss, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    for name, value in expected.state_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(found.state_dict()[name], value, rtol=rtol, atol=atol, check_device=False)


def test_updates_are_those_of_the_cpu():
    cpu = build_loss(joint_vae=False)
    gpu = deepcopy(cpu).to(DEVICE)
    sampler = make_sampler(cpu, device=torch.device("cpu"))
    updates = SPARUpdate(cpu), SPARUpdate(gpu)
    for _ in range(3):
        block = next(sampler)
        expected, found = (update.run(block.to(device)) for update, device in zip(updates, ("cpu", DEVICE)))
        for name, value in expected.items():
            torch.testing.assert_close(found[name].cpu(), value, rtol=1e-3, atol=1e-4)
    assert_same(gpu, cpu)


@pytest.mark.parametrize(
    ("options", "joint"), [(GRAPH, False), (GRAPH, True), ({**GRAPH, "compile": True}, False)], ids=str
)
def test_graphs_and_compiled_code_are_the_plain_update(options, joint):
    plain = build_loss(joint_vae=joint, value_mix=0.5).to(DEVICE)
    fast = deepcopy(plain)
    expected, found = train(plain), train(fast, **options)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3)
    assert_same(fast, plain)


def test_a_stack_in_one_graph_is_the_single_runs():
    singles = [build_loss(seed, joint_vae=False).to(DEVICE) for seed in range(3)]
    losses = [deepcopy(loss) for loss in singles]
    samplers = [make_sampler(loss, seed) for seed, loss in enumerate(losses)]
    stack = StackedSPARLoss(losses)
    update = SPARUpdate(stack, decay_steps=DECAY_STEPS, **GRAPH)
    for _ in range(BLOCKS):
        stack.copy_back()  # the samplers read the losses where they renew their targets
        update.run(torch.stack([next(sampler) for sampler in samplers], 1))
    stack.copy_back()
    for seed, (loss, single) in enumerate(zip(losses, singles)):
        train(single, seed)
        assert_same(loss, single)


def test_a_resumed_graph_goes_on_as_the_first():
    loss = build_loss(joint_vae=False).to(DEVICE)
    update, sampler = SPARUpdate(loss, **GRAPH), make_sampler(loss)
    for _ in range(BLOCKS):
        update.run(next(sampler))
    states = [deepcopy(part.state_dict()) for part in (loss, update, sampler)]
    again = build_loss(seed=5, joint_vae=False).to(DEVICE)
    again.load_state_dict(states[0])
    other, draws = SPARUpdate(again, **GRAPH), make_sampler(again, seed=5)
    other.load_state_dict(states[1])
    draws.load_state_dict(states[2])
    for _ in range(BLOCKS):
        update.run(next(sampler))
        other.run(next(draws))
    assert_same(again, loss)


def test_a_policy_trained_on_a_gpu_acts_alike_on_a_cpu(tmp_path: Path):
    data = load_offline_dataset(make_batch(60), batch_size=16, device=DEVICE)
    few = {"steps": 3}
    loss, _ = pretrain(data, anchor=few, vae=few, critics=few)
    save_policy(loss, tmp_path / "policy.pt")
    observation = make_batch(8)["observation"]
    expected = loss.actor(observation=observation.to(DEVICE)).cpu()
    policy, _ = load_policy(tmp_path / "policy.pt")
    torch.testing.assert_close(policy(observation=observation), expected, rtol=1e-3, atol=1e-4)
