"""From offline to online: SPAR is trained on the data set, then in its environment, with Latent Self-Imitation.

python recipes/spar_offline_to_online.py               # SPAR and TD3's warm start, the embedded Hopper data
python recipes/spar_offline_to_online.py method=spar seed=0 collector.backend=process collector.workers=4
python recipes/spar_offline_to_online.py method=spar seed=0 collector.backend=ray   # pip install '.[ray]'

`runs`/<data set>/online.json and online.png hold the curves of all runs in that folder. The same command resumes after
a kill: finished runs are not repeated, an offline phase resumes from its checkpoint, an online phase begins anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import compare
import spar_d4rl
from harness.environment import dataset_name
from harness.launch import run_recipe
from harness.method_options import method_options
from harness.options import option, recipe_options
from harness.spar_run import SPARRun
from omegaconf import DictConfig
from online.curves import report
from online.phase import check, count_updates, go_online
from online.warm_start import check_warm_start, warm_start

from torchrl_spar import InputError, SPARUpdate


@dataclass
class CollectorOptions:
    """How environments are stepped, on the CPU; the policy runs on `device`."""

    backend: str = option("direct", "TorchRL's: direct (this process), process (workers here) or ray (started here).")
    workers: int = option(2, "Workers, each with an environment; without effect with direct.", least=1)
    frames_per_batch: int = option(
        100, "Environment steps of all workers together between two rounds of updates.", least=1
    )


@dataclass
class OfflineShare:
    start: float = option(0.95, "At the first step. 0.999 for both is the data alone: the control.")
    end: float = option(0.5, "At the last step.")


@dataclass
class OnlineRates:
    """Lower than offline, so that the policy starts from where it is; learning rates fall to zero along a cosine."""

    qvalue_lr: float = option(1e-4, "Learning rate of the critics.", least=0)
    actor_lr: float = option(1e-4, "Learning rate of the head.", least=0)
    target_rate: float = option(0.002, "Polyak rate of all targets.", least=0, most=1)


@dataclass
class Online:
    steps: int = option(10_000, "Environment steps.", least=0)
    first_update: int = option(1_000, "Environment steps before the first update, by the offline policy.", least=0)
    updates_per_step: float = option(1.0, "Updates of the critics for each environment step.", least=0)
    offline_share: OfflineShare = option(
        OfflineShare(),
        "Share of a batch that comes from the data set, on a line over the steps. High at first, for the first "
        "transitions are of a few episodes.",
    )
    exploration_noise: float = option(0.1, "Gaussian noise on the actions, in half action ranges.", least=0)
    spar: OnlineRates = option(OnlineRates(), "SPAR's rates; TD3's are in config/method/td3_bc.yaml.")
    eval_interval: int = option(1_000, "Environment steps between two evaluations, without exploration.", least=1)
    eval_episodes: int = option(20, "Episodes of an evaluation.", least=1)


@recipe_options("spar_offline_to_online", stored_as="spar_offline_to_online_options")
@dataclass
class Options(compare.Options):
    """The offline phase has the options of compare.py; method is spar or td3_bc, whose online phase is TD3."""

    runs: str = option(
        "outputs/online",
        "Directory of all runs, <runs>/<data set>/<method>/seed<seed>. A finished run in it is not repeated.",
    )
    collector: CollectorOptions = option(CollectorOptions(), "What steps the environments.")
    online: Online = option(Online(), "The online phase.")


class OnlineSPAR(SPARRun):
    """SPAR. Online, anchor, VAE and scales stay as they are; critics and head are trained further."""

    needs_environment = True

    def go_on(self, results: dict[str, Any]) -> None:
        options = {key: self.cfg.spar[key] for key in ("policy_interval", "compile")}
        options["decay_steps"] = max(1, count_updates(self.cfg))
        # New experience arrives until the end, so the critics learn until then.
        [loss] = self.losses
        update = SPARUpdate(loss, critic_share=1.0, **options, **self.cfg.online.spar)
        results["online"] = go_online(self, loss.actor, update)


class OnlineTD3(compare.RivalRun):
    """TD3+BC offline, TD3 online."""

    needs_environment = True

    def go_on(self, results: dict[str, Any]) -> None:
        td3 = warm_start(self.rival, self.problem, **self.options)
        results["online"] = go_online(self, td3.policy, td3)
        self.deployed = td3.policy


def main(cfg: DictConfig) -> None:
    compare.prepare(cfg)
    check(cfg)
    out = compare.directory_of(cfg)
    if cfg.method.algorithm == "spar":
        spar_d4rl.train(cfg, [cfg.seed], [out], run_class=OnlineSPAR, wait=True)
    elif cfg.method.algorithm == "td3_bc":
        check_warm_start(**method_options(cfg.method, dataset_name(cfg)))
        compare.train(cfg, cfg.seed, out, run_class=OnlineTD3)
    else:
        raise InputError(f"method={cfg.method.name}: only spar and td3_bc go on online")
    report(out)


if __name__ == "__main__":
    run_recipe(main, "spar_offline_to_online", sweeps=compare.SWEEPS)
