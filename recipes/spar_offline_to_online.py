"""From offline to online: SPAR trained on the data set goes on in its environment, Latent Self-Imitation included.

python recipes/spar_offline_to_online.py               # SPAR and TD3's warm start, the embedded Hopper data
python recipes/spar_offline_to_online.py method=spar seed=0 collector.backend=process collector.workers=4
python recipes/spar_offline_to_online.py method=spar seed=0 collector.backend=ray   # pip install '.[ray]'

`runs`/<data set>/online.json and online.png hold the curves of all runs that lie there. The same command goes on after
a kill: finished runs are not repeated, a run's offline phase goes on from its checkpoint, its online phase begins anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compare
import spar_d4rl
from harness.directory import run_directory
from harness.launch import run_recipe
from harness.run import dataset_name
from harness.spar_run import SPARRun
from omegaconf import DictConfig
from online.curves import report
from online.phase import check, count_updates, go_online
from online.td3 import warm_start

from torchrl_spar import InputError, SPARUpdate


class OnlineSPAR(SPARRun):
    """SPAR; online anchor, residuals' manifold and scales stay as they are, critics and head go on."""

    def go_on(self, results: dict[str, Any]) -> None:
        options = {key: self.cfg.spar[key] for key in ("policy_interval", "compile")}
        decay_steps = max(1, count_updates(self.cfg))
        update = SPARUpdate(self.loss, decay_steps=decay_steps, **options, **self.cfg.online.spar)
        results["online"] = go_online(self, self.loss.actor, update)


class OnlineTD3(compare.RivalRun):
    """TD3+BC, online TD3."""

    def go_on(self, results: dict[str, Any]) -> None:
        td3 = warm_start(self.rival, self.problem, **self.options)
        results["online"] = go_online(self, td3.policy, td3)


def main(cfg: DictConfig) -> None:
    check(cfg)
    out = run_directory(Path(cfg.runs), dataset_name(cfg), cfg.method.name, cfg.seed)
    if cfg.method.algorithm == "spar":
        spar_d4rl.train(cfg, [cfg.seed], [out], run_class=OnlineSPAR, wait=True)
    elif cfg.method.algorithm == "td3_bc":
        compare.train(cfg, cfg.seed, out, run_class=OnlineTD3)
    else:
        raise InputError(f"method={cfg.method.name}: only spar and td3_bc go on online")
    report(out.parents[1])


if __name__ == "__main__":
    run_recipe(main, "spar_offline_to_online")
