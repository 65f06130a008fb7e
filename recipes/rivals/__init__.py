"""The methods SPAR is compared with, one file each: a function `build` that returns a `Rival`.

All take the same data, network sizes and number of updates; their own options are in `config/method/`.
"""

from __future__ import annotations

from collections.abc import Callable

from rivals import bc, cql, iql, rebrac, spar_iql, td3_bc
from rivals.base import Rival

BUILDERS: dict[str, Callable[..., Rival]] = {
    "bc": bc.build,
    "cql": cql.build,
    "iql": iql.build,
    "rebrac": rebrac.build,
    "spar_iql": spar_iql.build,
    "td3_bc": td3_bc.build,
}
