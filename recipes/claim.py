"""One claim of the paper, measured: graded findings as JSON, and a figure.

python recipes/claim.py drift      # also bootstrapping, gradient_conflict, search_space, suboptimal_anchors, support
python recipes/claim.py drift seed=1        # drift --help lists the options
"""

from __future__ import annotations

import sys
from importlib import import_module

from claims.claim_tools import run_claim

NAMES = ("bootstrapping", "drift", "gradient_conflict", "search_space", "suboptimal_anchors", "support")


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name in ("--help", "-h"):
        print(__doc__)
        return
    if name not in NAMES:
        sys.exit(f"error: {name or 'no name'}: give one of {', '.join(NAMES)}")
    claim = import_module(f"claims.{name}")
    run_claim(name, claim.measure, claim.draw)


if __name__ == "__main__":
    main()
