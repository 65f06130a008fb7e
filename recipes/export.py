"""Writes a saved policy, its normalisation included, as files that need neither this package nor TorchRL.

python recipes/export.py policy=outputs/.../policy.pt out=deployed
python recipes/export.py policy=outputs/.../policy.pt out=deployed guard=0.999   # the anchor acts far from the data

deployed/policy.pt2     torch.export.load("policy.pt2").module()(observation)
deployed/policy.onnx    onnxruntime.InferenceSession("policy.onnx").run(["action"], {"observation": observation})[0]
deployed/export.json    SHA-256 of policy.pt and of the files made of it

Observations are raw, float32 `[n, observation_dim]` for any n, or float64 where float32 is too coarse for the data, as
for Unix times: what is printed last says so. Actions are `[n, action_dim]` in the environment's units.
With a guard there is a second output, `fallback` `[n]`: whether the action is the anchor's.
"""

from __future__ import annotations

import logging
import shutil
import timeit
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness.actors import ACTOR, POLICY, load_actor
from harness.checkpoints import named_error, sha256
from harness.environment import LOG_OPTIONS, of_another_log, read
from harness.launch import run_recipe
from harness.options import option, recipe_options
from harness.output import check_unused, write_json
from harness.same_rows import check_same, digest_of
from harness.sensor_faults import shares_of_faults
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from torchrl_spar import GuardedActor, InputError, SPARActor, fit_detector
from torchrl_spar.errors import first_line
from torchrl_spar.networks import ObservationNorm

NEEDED = {"pt2": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
COMPARED_ROWS, TIMED_CALLS = 1000, 2000
# Standard deviations of observations that are unlike the data.
FAR = 10
# The largest error of an output, relative to the largest output, that another order of sums can explain.
ROUNDING = 1e-5

Outputs = Tensor | tuple[Tensor, ...]
Act = Callable[[Tensor], Outputs]


class Deployed(nn.Module):
    """A function of one tensor, `observation [n, observation_dim] -> action [n, action_dim]`, and with a guard
    `fallback [n]`."""

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: Tensor) -> Outputs:
        return self.policy(observation=observation)


def norm_of(policy: TensorDictModuleBase, observation_dim: int | None, name: str) -> ObservationNorm:
    """The scale of the policy's observations; for networks of your own only their size is known."""
    found = next((module for module in policy.modules() if isinstance(module, ObservationNorm)), None)
    if found is not None and observation_dim in (None, len(found.loc)):
        return found
    if observation_dim is None:
        raise InputError(f"observation_dim: must be given, the size of the observation that {name} reads")
    kind = next((x.dtype for x in policy.state_dict().values() if x.is_floating_point()), torch.float32)
    return ObservationNorm(torch.zeros(observation_dim, dtype=kind), torch.ones(observation_dim, dtype=kind))


def guarded(
    cfg: DictConfig, policy: TensorDictModuleBase, facts: dict[str, Any], norm: ObservationNorm, name: str
) -> tuple[GuardedActor, Tensor]:
    """The policy with a guard fitted to the data it was trained on, or to the data that is given; observations of both
    its branches ``[N, observation_dim]``."""
    if not isinstance(policy, SPARActor):
        raise InputError(f"guard={cfg.guard}: {name} has no anchor to fall back to; leave guard out")
    log = dict(facts.get("log") or {})
    if cfg.dataset is None and not log:
        raise InputError(f"guard={cfg.guard}: {name} does not say how its data is read; give dataset=...")
    source = dict.fromkeys(LOG_OPTIONS) | {"clip_actions": False, "end_at_success": False} | log
    source = of_another_log(source, {} if cfg.dataset is None else {"dataset": cfg.dataset})
    source |= {"env": facts.get("env"), "env_kwargs": facts.get("env_kwargs") or None}
    data = read(OmegaConf.create(source))
    if cfg.dataset is None:
        check_same(source["dataset"], digest_of(data), facts.get("rows_sha256"))
    observation = data[:]["observation"]
    if (found := observation.shape[1]) != (own := len(norm.loc)):
        raise InputError(f"dataset={source['dataset']}: its observations have size {found}, the policy's have {own}")
    actor = GuardedActor(policy, fit_detector(data, quantile=cfg.guard))
    unlike = torch.cat([actor.detector(chunk) for chunk in observation.split(COMPARED_ROWS)])
    share = unlike.double().mean().item()
    print(f"guard: the anchor acts for {share:.2%} of the {len(observation)} observations in {source['dataset']}")
    shares = shares_of_faults(actor.detector, observation, data.observation_scale)
    print("with wrong sensors: " + ", ".join(f"{fault} {share:.1%}" for fault, share in shares.items()))
    like = observation[~unlike]
    like = like[torch.randperm(len(like))[:COMPARED_ROWS]]
    return actor, torch.cat([like.to(norm.loc), drawn(norm, FAR)])


def drawn(norm: ObservationNorm, spread: float = 1.0) -> Tensor:
    """Observations ``[N, observation_dim]`` around the data's mean, in its standard deviations."""
    return norm.loc + spread * norm.scale * torch.randn(COMPARED_ROWS, len(norm.loc), dtype=norm.loc.dtype)


def check_formats(formats: Sequence[str]) -> None:
    for name in formats:
        if name not in NEEDED:
            raise InputError(f"formats: {name!r} is none of {', '.join(NEEDED)}")
        missing = [package for package in NEEDED[name] if find_spec(package) is None]
        if missing:
            raise InputError(
                f"formats: {name} needs {', '.join(missing)}: pip install -e '.[export]'; formats=[pt2] works without"
            )
    if not formats:
        raise InputError(f"formats=[]: give at least one of {', '.join(NEEDED)}")


@torch.no_grad()
def write(
    cfg: DictConfig, policy: TensorDictModuleBase, observation: Tensor, out: Path
) -> tuple[Table, dict[str, dict[str, str]]]:
    """Writes all files and compares them with the policy on these observations, or writes none.

    Returns:
        What `compare` found, and the `checksums`.
    """
    rows = {0: torch.export.Dim("batch")}
    module = Deployed(policy).requires_grad_(False)
    program = torch.export.export(module, (torch.zeros_like(observation[:2]),), dynamic_shapes=(rows,))
    partial = out.with_name(f".{out.name}.partial")
    with named_error(out, "cannot be written"):
        try:
            partial.mkdir(parents=True, exist_ok=True)
            if "pt2" in cfg.formats:
                torch.export.save(program, partial / "policy.pt2")
            if "onnx" in cfg.formats:
                write_onnx(program, ["action", *policy.out_keys[1:]], partial / "policy.onnx")
            table = compare(policy, observation, load(partial, cfg.formats, cfg.threads))
            digests = checksums(cfg.policy, partial)
            write_json(partial / "export.json", digests)
            partial.replace(out)
            return table, digests
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def checksums(policy: str | None, folder: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of the policy's file, if there is one, and of the files in a folder."""
    paths = {"policy": [Path(policy)] if policy else [], "files": sorted(folder.iterdir())}
    return {name: {path.name: sha256(path) for path in each} for name, each in paths.items()}


def write_onnx(program: torch.export.ExportedProgram, outputs: list[str], path: Path) -> None:
    # The exporter warns of torchvision's absence, and torch of what the exporter calls.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
        names: dict[str, Any] = {"input_names": ["observation"], "output_names": outputs}
        torch.onnx.export(program, (), path, **names, external_data=False, verbose=False)


def load(out: Path, formats: Sequence[str], threads: int) -> dict[str, Act]:
    """The written files, loaded as their users load them."""
    calls: dict[str, Act] = {}
    if "pt2" in formats:
        calls["policy.pt2"] = torch.export.load(out / "policy.pt2").module()
    if "onnx" in formats:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(out / "policy.onnx", options)
        calls["policy.onnx"] = lambda x: tuple(map(torch.from_numpy, session.run(None, {"observation": x.numpy()})))
    return calls


@torch.no_grad()
def compare(policy: TensorDictModuleBase, observation: Tensor, calls: dict[str, Act]) -> Table:
    """Milliseconds of a call for one observation, and how far the outputs are from the policy's in each branch.

    Raises:
        InputError: if they are not the policy's up to rounding, as those of a random one.
    """
    expected = as_tuple(policy(observation=observation))
    branches = branches_of(policy, expected)
    table = Table("", "ms", *branches, title="One observation a call, median")
    if isinstance(policy, GuardedActor):
        table.add_row("without the guard", milliseconds(lambda x: policy.actor(observation=x), observation[:1]))
    for name, act in {"the policy itself": lambda x: policy(observation=x), **calls}.items():
        found = as_tuple(act(observation))
        off = [off_by(name, found, expected, rows) for rows in branches.values()]
        table.add_row(name, milliseconds(act, observation[:1]), *(f"{most:.1e}" for most in off))
    return table


def milliseconds(act: Act, observation: Tensor) -> str:
    """Of a call, in the median."""
    return f"{1e3 * median(timeit.repeat(partial(act, observation), number=1, repeat=TIMED_CALLS)):.3f}"


def branches_of(policy: TensorDictModuleBase, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The rows of `outputs` by who acts, under the titles of their columns."""
    if not isinstance(policy, GuardedActor):
        return {"off by at most": torch.ones(len(outputs[0]), dtype=torch.bool)}
    fallback = outputs[-1]
    found = {"policy": ~fallback, "anchor": fallback}
    return {f"the {who} acts in {rows.sum()} rows: off by": rows for who, rows in found.items() if rows.any()}


def off_by(name: str, found: Sequence[Tensor], expected: Sequence[Tensor], rows: Tensor) -> float:
    """How far outputs are from those expected in some rows, at most; an InputError if that is more than rounding."""
    pairs = [(given[rows].double(), own[rows].double()) for given, own in zip(found, expected, strict=True)]
    off = max((given - own).abs().max().item() for given, own in pairs)
    # Rounding may flip the guard where a row's distance is about the threshold.
    shares = [(given - own).abs().reshape(len(own), -1) / size_of(own) for given, own in pairs]
    if not (torch.cat(shares, 1).sum(1) <= ROUNDING).double().mean() > 0.99:
        raise InputError(f"{name}: its outputs are off by {off:.1e}: the policy is random, or its actions not finite")
    return off


def size_of(output: Tensor) -> float:
    """The largest number in it, above 0."""
    return max(output.abs().max().item(), torch.finfo(torch.float32).tiny)


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@recipe_options("export")
@dataclass
class Options:
    policy: str | None = option(None, POLICY)
    actor: str | None = option(None, ACTOR)
    observation_dim: int | None = option(None, "Size of the observation; for networks of your own alone.", least=1)
    out: str = option("outputs/export/${now:%Y-%m-%d_%H-%M-%S}", "Directory of the files; a used one is refused.")
    formats: list[str] = option(
        ["pt2", "onnx"],
        'pt2: torch.export\'s, for plain torch; onnx: for onnxruntime and others (needs the extra "export").',
    )
    guard: float | None = option(
        None,
        "Where an observation is unlike the data the anchor acts: beyond this quantile of held-out observations' "
        "distances, e.g. 0.999; null: no guard.",
        above=0, most=1,
    )  # fmt: skip
    dataset: str | None = option(
        None, "Data that the guard is fitted to, read as the policy's own; null: what the policy was trained on."
    )
    threads: int = option(1, "Threads of the calls that are timed.", least=1)


def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    out = Path(cfg.out)
    check_formats(cfg.formats)
    check_unused(out)
    if cfg.dataset is not None and cfg.guard is None:
        raise InputError(f"dataset={cfg.dataset}: read only for a guard; give guard=..., or leave dataset out")
    policy, facts, name = load_actor(cfg)
    norm = norm_of(policy, cfg.observation_dim, name)
    observation = drawn(norm)
    if cfg.guard is not None:
        policy, observation = guarded(cfg, policy, facts, norm, name)
    try:
        table, digests = write(cfg, policy, observation, out)
    except InputError:
        raise
    except Exception as err:  # of networks that torch.export does not take, any
        what = f"{name}: torch.export does not take it with observation_dim={len(norm.loc)}"
        raise InputError(f"{what} ({first_line(err)})") from err
    Console().print(table)
    print("SHA-256, also in export.json:")
    for files in digests.values():
        print(*(f"{digest}  {file}" for file, digest in files.items()), sep="\n")
    kind = str(norm.loc.dtype).removeprefix("torch.")
    print(f"files in {out}; observations are {kind} [n, {len(norm.loc)}]")


if __name__ == "__main__":
    run_recipe(main, "export")
