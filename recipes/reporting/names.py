"""What the tables call the methods, and which of a run's numbers counts."""

from __future__ import annotations

from collections.abc import Iterable

from reporting.runs import Run

# The order of the report; methods without a name here come after, under their own.
NAMES = {
    "bc": "BC", "bc10": "10%BC", "td3_bc": "TD3+BC", "td3_bc-0.5": "TD3+BC, alpha tuned: 0.5",
    "td3_bc_critics": "TD3+BC, SPAR's critics", "iql": "IQL",
    "cql": "CQL", "cql_torchrl": "CQLLoss (TorchRL)",
    "rebrac": "ReBRAC", "rebrac_tuned": "ReBRAC, penalties tuned for each set",
    "rebrac_small": "ReBRAC, the main job's batch", "rebrac_shared": "ReBRAC's losses, shared networks and batch",
    "rebrac_critics": "ReBRAC, SPAR's critics",
    "spar_iql": "SPAR's critic, IQL's policy", "spar": "SPAR (head A)", "spar_latent": "SPAR (head B)",
    # recipes/config/method/ablation
    "one_step_targets": "one-step targets", "shared_episodes": "critics on all episodes",
    "no_lsi": "no LSI: the trust term alone", "no_trust": "no trust term: LSI alone",
    "uniform_weights": "candidates weigh the same",
    "greedy_weights": "the best candidate alone", "action_space": "candidates in action space",
    "value_gradient": "value gradient for LSI", "candidates_4": "4 candidates", "candidates_16": "16 candidates",
    "narrow": "half the spread", "trust_3": "trust weighs 3",
    "mean_of_critics": "mean of the critics", "min_of_critics": "minimum of the critics", "two_critics": "two critics",
    "in_sample_value": "in-sample expectile value", "no_value_start": "no start from the returns",
    "no_anchor": "no anchor", "bf16_candidates": "candidates scored in bfloat16",
    "compiled": "compiled: the same to rounding",
}  # fmt: skip


def score_of(run: Run) -> float:
    """The normalised score of the last checkpoint."""
    return run["policy" if "policy" in run else "spar"]["normalized"]


def method_of(run: Run) -> str:
    """The method, with the number of members whose mean is its policy, where there are several."""
    name, members = run.get("method", "spar"), run.get("members", 1)
    return name if members == 1 else f"{name} x{members}"


def label(method: str) -> str:
    name, members = parts_of(method)
    return NAMES.get(name, name) + (f", mean of {members}" if members > 1 else "")


def parts_of(method: str) -> tuple[str, int]:
    """The method without its members, and their number."""
    name, _, members = method.partition(" x")
    return name, int(members or 1)


def in_order(methods: Iterable[str]) -> list[str]:
    """As a report lists them."""
    order = [*NAMES]

    def place(method: str) -> tuple[int, str, int]:
        name, members = parts_of(method)
        return order.index(name) if name in order else len(order), name, members

    return sorted(methods, key=place)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
