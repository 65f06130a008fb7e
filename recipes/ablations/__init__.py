"""SPAR with one part replaced, for `compare.py method=ablation/...`. The ablations that are options need no code."""

from __future__ import annotations

from harness.spar_run import SPARRun

from ablations.action_space import ActionSpaceRun
from ablations.no_anchor import UnanchoredRun
from ablations.value_gradient import ValueGradientRun

RUNS: dict[str, type[SPARRun]] = {
    "spar_value_gradient": ValueGradientRun,
    "spar_action_space": ActionSpaceRun,
    "spar_unanchored": UnanchoredRun,
}
