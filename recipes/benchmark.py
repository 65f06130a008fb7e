"""How fast everything is, as ratios within one run: SPAR's update, TorchRL's, evaluation, loading, policy latency.

python recipes/benchmark.py                                         # one CPU core
python recipes/benchmark.py device=cuda seeds=[8,32] compile=true   # CUDA graphs, one and many seeds
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks import rollout_speed
from benchmarks.flops import update_flops
from benchmarks.loading import measure_loading
from benchmarks.matmul import MatmulTrace
from benchmarks.saving import measure_saving
from benchmarks.stages import measure_stages
from benchmarks.updates import (
    ACTION_DIM,
    BLOCK,
    OBSERVATION_DIM,
    make_data,
    make_losses,
    rival,
    spar,
    spar_plain_loop,
    torchrl_iql,
    torchrl_td3bc,
)
from benchmarks.windows import measure_rates, median_ratio
from harness.launch import best_device, run_recipe
from harness.options import option, recipe_options
from harness.output import named_error, write_json
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torchrl.data import ReplayBuffer

from torchrl_spar import InputError, SPARLoss, environment_sizes, make_spar_loss

# Timed as a fresh interpreter imports them.
IMPORTED = ("torchrl.objectives", "torchrl_spar")


@recipe_options("benchmark")
@dataclass
class Options:
    device: str | None = option(None, "cpu, cuda, ...; null: cuda if there is one, else cpu.")
    threads: int = option(1, "Torch threads (one is fastest for small networks).", least=1)
    rounds: int = option(7, "Windows of each contender, taken in turn.", least=1)
    window: float = option(1.0, "Length of a window in seconds (CPU time; wall time on a GPU).", above=0)
    out: str = option("outputs/benchmark.json", "Where the JSON goes.")
    hidden: list[int] = option([256, 256], "Widths of the hidden layers of every network.", least=1)
    batch_size: int = option(256, "Transitions in a batch.", least=1)
    num_candidates: int = option(8, "Candidates of each state.", least=2)
    num_qvalue_nets: int = option(4, "Number of critics.", least=1)
    seeds: list[int] | None = option(
        [2], "Numbers of runs trained at once as one stack, beside a single one; null: none. On a GPU: seeds=[8,32]."
    )
    compile: bool = option(
        False,
        "Also the update through torch.compile (minutes to compile; needs a C++ compiler, on a GPU Triton).",
    )
    peers: bool = option(
        True, "Also compare.py's IQL and TD3+BC, and SPAR's update in JAX, where it is installed (extra `peers`)."
    )
    load_steps: int = option(
        1_000_000, "Steps of the Minari set that is written and read; 0 leaves loading out.", least=0
    )
    stage_steps: int = option(
        300, "Steps measured of each stage of a default run of the main job; 0 leaves the stages out.", least=0
    )
    env: str | None = option("Hopper-v5", "Gymnasium environment of the evaluation; null leaves evaluation out.")


def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    device = best_device(cfg.device)
    out = Path(cfg.out)
    if out.exists():
        raise InputError(f"out={out}: exists; give another file or remove it")
    with named_error(out.parent, "cannot be made"):
        out.parent.mkdir(parents=True, exist_ok=True)
    if 0 in (cfg.seeds or ()):
        raise InputError(f"seeds={cfg.seeds}: numbers of runs trained at once, such as [2] or [8,32]")
    if device.type != "cuda":
        print("No CUDA device: the CPU is measured, the figures for CUDA graphs and many seeds on a GPU are left out.")
    results = {
        **measure_updates(cfg, device),
        "policy_latency_ms": measure_latency(cfg, device),
        "checkpoint": measure_saving(
            make_losses([0], cfg.hidden, device)[0], make_data(cfg.batch_size, device), rounds=cfg.rounds
        ),
        "import_seconds": measure_import(),
        "machine": describe_machine(device),
    }
    if cfg.env is not None:
        results["evaluation"] = measure_evaluation(cfg, device)
        if cfg.stage_steps:
            rate = results["evaluation"]["steps_per_second"]
            imported = results["import_seconds"][IMPORTED[-1]]
            results["stages"] = {"import": imported, **measure_stages(cfg.stage_steps, rate, compile=cfg.compile)}
    if cfg.load_steps:
        results["load"] = measure_loading(cfg.load_steps)
        results["load_short_episodes"] = measure_loading(cfg.load_steps, episode_length=125)
    write_json(out, results)
    show(results, out)


def measure_updates(cfg: DictConfig, device: torch.device) -> dict[str, Any]:
    sizes = dict(num_candidates=cfg.num_candidates, num_qvalue_nets=cfg.num_qvalue_nets)
    data = make_data(cfg.batch_size, device)
    on_gpu = device.type == "cuda"

    def losses(count: int, **options: Any) -> list[SPARLoss]:
        return make_losses(range(count), cfg.hidden, device, **sizes, **options)

    traced = spar(losses(1), data)
    with MatmulTrace() as trace:
        traced()
    contenders: dict[str, tuple[Any, int]] = {
        "matmul_fp32": (trace.replay(torch.float32, device), BLOCK),
        "matmul_bf16": (trace.replay(torch.bfloat16, device), BLOCK),
        "spar": (spar(losses(1), data, cudagraph=on_gpu), BLOCK),
        "spar_bf16_candidates": (spar(losses(1, candidate_dtype=torch.bfloat16), data, cudagraph=on_gpu), BLOCK),
        "spar_plain_loop": (spar_plain_loop(losses(1)[0], data), 1),
        "spar_plain_loop_same_work": (spar_plain_loop(losses(1)[0], data, policy_interval=2), 1),
        "torchrl_iql": (torchrl_iql(data, cfg.hidden, device), 1),
        "torchrl_td3bc": (torchrl_td3bc(data, cfg.hidden, device), 1),
        "sampling": (data.sample, 1),
    }
    for name in ("iql", "td3_bc") if cfg.peers else ():
        for compile in (False, True)[: 1 + cfg.compile]:
            contender = rival(name, data, cfg.hidden, device, compile=compile), BLOCK
            contenders[f"compare_{name}" + "_compiled" * compile] = contender
    if cfg.compile:
        contenders["spar_compiled"] = (spar(losses(1), data, compile=True, cudagraph=on_gpu), BLOCK)
    if on_gpu:
        contenders["spar_tf32"] = (in_tf32(spar(losses(1), data, cudagraph=True)), BLOCK)
    for count in cfg.seeds or ():
        contenders[f"spar_{count}_seeds"] = (spar(losses(count), data, cudagraph=on_gpu), BLOCK * count)
        if on_gpu and cfg.compile:
            compiled = spar(losses(count), data, compile=True, cudagraph=True)
            contenders[f"spar_{count}_seeds_compiled"] = (compiled, BLOCK * count)
    if cfg.peers and (peer := jax_contender(losses(1)[0], data, device, cfg.threads)):
        contenders["jax"] = (peer, BLOCK)
    clock = time.perf_counter if on_gpu else time.process_time
    rates = measure_rates(contenders, rounds=cfg.rounds, window=cfg.window, device=device, clock=clock)
    mflop = update_flops(
        OBSERVATION_DIM, ACTION_DIM, cfg.hidden, batch_size=cfg.batch_size, **sizes
    ) / 1e6  # fmt: skip
    unit = "updates_per_second" if on_gpu else "updates_per_cpu_second"
    done = trace.flops() / BLOCK / 1e6
    results: dict[str, Any] = {
        "matmul_gflops": {dtype: median(rates[f"matmul_{dtype}"]) * done / 1e3 for dtype in ("fp32", "bf16")},
        "sampling": {"batches_per_second": median(rates["sampling"])},
    }
    for name in contenders:
        if name.startswith(("spar", "torchrl", "compare", "jax")):
            values = rates[name]
            results[name] = {
                unit: median(values), "lowest": min(values), "highest": max(values),
                "relative_to_spar": median_ratio(rates, name, "spar"),
                **({"relative_to_jax": median_ratio(rates, name, "jax")} if "jax" in contenders else {}),
            }  # fmt: skip
    for name in ("spar", "spar_bf16_candidates", *(["spar_compiled"] if cfg.compile else [])):
        share = median_ratio(rates, name, "matmul_fp32") * mflop / done
        results[name] |= {"mflop_per_update": mflop, "share_of_matmul": share}
    results["spar"]["mflop_done"] = done
    return results


def in_tf32(call: Callable[[], object]) -> Callable[[], object]:
    """The call with matrix products in TF32; a CUDA graph keeps the precision it was captured with."""

    def run() -> object:
        torch.set_float32_matmul_precision("high")
        try:
            return call()
        finally:
            torch.set_float32_matmul_precision("highest")

    return run


def jax_contender(
    loss: SPARLoss, data: ReplayBuffer, device: torch.device, threads: int
) -> Callable[[], object] | None:
    if find_spec("jax") is None:
        return None
    from benchmarks import jax_peer

    if not jax_peer.start(device, threads):
        print(f"JAX has no {device.type} device here: its figures are left out.")
        return None
    return jax_peer.jax_spar(loss, data, block=BLOCK)


def measure_evaluation(cfg: DictConfig, device: torch.device) -> dict[str, Any]:
    """Evaluates a random policy."""
    observation_dim, action_spec = environment_sizes(cfg.env)
    policy = make_spar_loss(observation_dim, action_spec, hidden=list(cfg.hidden), device=device).actor
    return rollout_speed.measure_evaluation(policy, cfg.env, rounds=cfg.rounds)


@torch.no_grad()
def measure_latency(cfg: DictConfig, device: torch.device) -> dict[str, float]:
    """Milliseconds of one call of the deployed policy."""
    policy: Any = make_losses([0], cfg.hidden, device)[0].actor
    latency = {}
    for rows in (1, 1024):
        observation = torch.randn(rows, OBSERVATION_DIM, device=device)
        rates = measure_rates(
            {"policy": (partial(policy, observation=observation), 1)},
            rounds=cfg.rounds, window=min(cfg.window, 0.2), device=device, clock=time.perf_counter,
        )  # fmt: skip
        latency[f"batch_{rows}"] = 1e3 / median(rates["policy"])
    return latency


def measure_import() -> dict[str, float]:
    """CPU seconds of a fresh interpreter that imports each."""
    seconds = {}
    for module in IMPORTED:
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-W", "ignore", "-c", f"import {module}"], check=True)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds[module] = end.ru_utime - start.ru_utime + end.ru_stime - start.ru_stime
    return seconds


def describe_machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    versions = {package: version(package) for package in ("torch", "torchrl", "tensordict")}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "device": name, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
        "peak_rss_mib": memory, **versions,
    }  # fmt: skip


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def show(results: dict[str, Any], out: Path) -> None:
    table = Table(title=f"Updates, {results['machine']['device']}")
    for column in ("", "updates/s", "to SPAR", "to JAX", "of the matmul rate"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in results.items():
        if isinstance(row, dict) and "relative_to_spar" in row:
            rate = row.get("updates_per_second") or row["updates_per_cpu_second"]
            share = f"{row['share_of_matmul']:.0%}" if "share_of_matmul" in row else ""
            peer = f"{row['relative_to_jax']:.2f}" if "relative_to_jax" in row else ""
            table.add_row(name, f"{rate:.1f}", f"{row['relative_to_spar']:.2f}", peer, share)
    console = Console()
    console.print(table)
    for name, seconds in results.get("stages", {}).items():
        console.print(f"a default run of the main job, {name}: {seconds:.1f} CPU seconds", highlight=False)
    console.print(f"matrix products alone: {results['matmul_gflops']['fp32']:.0f} GFLOP/s; everything in {out}")


if __name__ == "__main__":
    run_recipe(main, "benchmark")
