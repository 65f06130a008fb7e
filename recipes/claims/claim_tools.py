"""What every claim shares: the recipes' modules, one JSON and one figure in a directory of its own, graded findings."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness.launch import run_recipe
from harness.output import new_directory, rounded, whole_file, write_json
from harness.run import versions
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.console import Console
from rich.table import Table

EXACT = 1e-9


def grade(error: float, tolerance: float) -> str:
    """ "exactly" up to round-off, "approximately" up to the tolerance, else "no"."""
    return "exactly" if error <= EXACT else "approximately" if error <= tolerance else "no"


def finding(statement: str, holds: str | bool, **numbers: Any) -> dict[str, Any]:
    """One line of a verdict: what was asked, whether it holds (yes, no, exactly, approximately), the numbers."""
    if isinstance(holds, bool):
        holds = "yes" if holds else "no"
    return {"statement": statement, "holds": holds, **numbers}


def run_claim(
    name: str, measure: Callable[[DictConfig], dict[str, Any]], draw: Callable[[dict[str, Any]], Figure]
) -> None:
    """Runs a claim under Hydra with its module's Options; writes <name>.json and <name>.png.

    Args:
        name: of the claim.
        measure: its options to its result, which holds at least a list of ``findings``.
        draw: its result to its figure.
    """

    def main(cfg: DictConfig) -> None:
        start = time.perf_counter()
        torch.set_num_threads(cfg.threads)
        out = Path(cfg.out)
        new_directory(out)
        result = measure(cfg)
        options = {key: value for key, value in OmegaConf.to_container(cfg, resolve=True).items() if key != "out"}  # type: ignore[union-attr]
        facts = {
            "claim": name, **rounded(result, 5), "options": options,
            # Beside other jobs the wall shows their load, too.
            "wall_seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time(), 1),
            "versions": versions(),
        }  # fmt: skip
        save_small(draw(facts), out / f"{name}.png")
        write_json(out / f"{name}.json", facts)
        show(facts, out)

    run_recipe(main, f"claims/{name}")


def save_small(figure: Figure, path: Path) -> None:
    """Writes a figure that appears whole or not at all; 256 colours take a third of the space."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
        with Image.open(partial) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(partial, format="png", optimize=True)


def show(facts: dict[str, Any], out: Path) -> None:
    """The verdict as a table."""
    table = Table("finding", "holds", "numbers", title=f"claim: {facts['claim']}")
    for row in facts["findings"]:
        rest = {key: value for key, value in row.items() if key not in ("statement", "holds")}
        numbers = ", ".join(f"{key} {_short(value)}" for key, value in rest.items())
        table.add_row(row["statement"], row["holds"], numbers)
    console = Console()
    console.print(table)
    console.print(f"{facts['wall_seconds']:.0f} s in all; files in {out}")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(part)}" for key, part in value.items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
