"""The benchmark's own arithmetic, and that the script runs: no test depends on time."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import stages, updates
from benchmarks.flops import update_flops
from benchmarks.matmul import MatmulTrace
from benchmarks.updates import ACTION_DIM, BLOCK, OBSERVATION_DIM, make_data, make_losses, spar
from helpers import compose_recipe

from torchrl_spar import InputError

pytest.importorskip("hydra")
import benchmark

CPU = torch.device("cpu")


def test_trace_counts_products():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    with MatmulTrace() as trace:
        a @ b
        torch.nn.functional.linear(a, b.t(), torch.zeros(7))
        torch.randn(2, 3, 5) @ torch.randn(2, 5, 4)
    assert trace.flops() == 2 * (2 * 3 * 5 * 7) + 2 * (2 * 3 * 5 * 4)
    trace.replay(torch.float32, CPU)()


@pytest.mark.parametrize(
    "sizes", [{}, {"num_candidates": 5}, {"num_qvalue_nets": 2}, {"hidden": [12, 20, 8]}], ids=lambda sizes: str(sizes)
)
def test_needed_flops_are_what_the_update_does(sizes):
    sizes = {"hidden": [24, 16], "num_candidates": 8, "num_qvalue_nets": 4, **sizes}
    hidden = sizes.pop("hidden")
    step = spar(make_losses([0], hidden, CPU, **sizes), make_data(32, CPU))
    with MatmulTrace() as trace:
        step()
    needed = update_flops(OBSERVATION_DIM, ACTION_DIM, hidden, batch_size=32, **sizes)
    assert trace.flops() / BLOCK == needed


def test_benchmark_writes_its_keys(tmp_path, monkeypatch):
    for module in (benchmark, stages, updates):
        monkeypatch.setattr(module, "BLOCK", 4)  # updates in a block: fewer take less
    monkeypatch.setattr(updates.spar, "__kwdefaults__", {**updates.spar.__kwdefaults__, "block": 4})
    monkeypatch.setattr(benchmark, "IMPORTED", ("json",))
    out = tmp_path / "benchmark.json"
    options = "rounds=1 window=0.01 hidden=[8] batch_size=8 seeds=[2] load_steps=2000 stage_steps=2 env=Pendulum-v1"
    options = [*options.split(), "device=cpu", f"out={out}"]
    benchmark.main(compose_recipe("benchmark", *options))
    results = json.loads(out.read_text())
    assert {"fp32", "bf16"} <= set(results["matmul_gflops"])
    rivals = "torchrl_iql", "torchrl_td3bc", "compare_iql", "compare_td3_bc"
    for name in ("spar", "spar_plain_loop", *rivals, "spar_2_seeds"):
        assert results[name]["updates_per_cpu_second"] > 0
    assert {"mflop_per_update", "share_of_matmul"} <= set(results["spar"])
    assert {"steps_per_second", "bare_gymnasium"} <= set(results["evaluation"])
    assert "rows_per_second" in results["load"] and results["machine"]
    assert results["checkpoint"]["bytes"] > 0 and 0 < results["checkpoint"]["share_of_run"] < 1
    phases = {"import", "loading", "anchor", "vae", "critics", "targets", "updates", "updates of the head alone"}
    assert {*phases, "evaluation"} <= set(results["stages"]) and min(results["stages"].values()) > 0
    with pytest.raises(InputError, match="exists; give another file"):
        benchmark.main(compose_recipe("benchmark", *options))
    with pytest.raises(InputError, match=r"seeds=\[0, 1\]: numbers of runs"):
        benchmark.main(compose_recipe("benchmark", *options[:-1], "seeds=[0,1]", f"out={tmp_path / 'other.json'}"))
