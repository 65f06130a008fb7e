"""FLOPs of the matrix products that one SPAR update needs, counted by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def update_flops(
    observation_dim: int,
    action_dim: int,
    hidden: Sequence[int],
    *,
    batch_size: int,
    num_qvalue_nets: int = 4,
    num_candidates: int = 8,
    policy_interval: int = 2,
) -> float:
    """FLOPs of one update on average: two for each multiply and add, elementwise work not counted.

    Head A, a frozen VAE, anchor actions given. ``f`` is one forward pass of a network for one row; a backward pass
    costs two of them, less the gradient of the first layer's input. The state's part of a first layer is needed
    once for all candidates of a state.
    """
    d, a, m = observation_dim, action_dim, 2 * action_dim

    def f(in_features: int, out_features: int) -> int:
        widths = [in_features, *hidden, out_features]
        return sum(2 * left * right for left, right in pairwise(widths))

    first = 2 * hidden[0]
    critic, head, encoder, decoder = f(d + a, 1), f(d + a, a), f(d + 2 * a, 2 * m), f(d + a + m, a)

    def train(forward: int, in_features: int) -> int:
        return 3 * forward - first * in_features

    bootstrap = head + num_qvalue_nets * critic
    critics = num_qvalue_nets * train(critic, d + a)
    shared = (num_candidates - 1) * first
    candidates = num_candidates * decoder - shared * (d + a)
    scores = num_qvalue_nets * (num_candidates * critic - shared * d)
    trust = num_qvalue_nets * (2 * critic - first * d)
    actor = train(head, d + a) + encoder + candidates + scores + trust
    return batch_size * (bootstrap + critics + actor / policy_interval)
