"""Claim 4, support: do the policy's actions stay where the data has some, and where do TD3+BC's and ReBRAC's go?

On the embedded data, on states of held-out episodes: the distance of (state, action) to the nearest rows of the other
episodes, and the density of the action under a model trained on those rows alone, which no policy ever sees. The
data's own held-out actions give the measure. TD3+BC is TorchRL's, ReBRAC the one of compare.py; both from the same
anchor and the same start of the critics, with the same networks, learning rates and number of updates.

python recipes/claim.py support
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from harness.options import option, recipe_options
from harness.plots import DATA, OTHERS, SPAR, TD3_BC, plt
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rivals.batches import add_next_actions
from rivals.td3 import BehaviorRegularizedLoss
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.modules import MLP
from torchrl.objectives import SoftUpdate, TD3BCLoss

from claims.claim_tools import finding, grade
from claims.small_spar import SmallOptions, clone_behaviour, fit_manifold, improve, load_embedded, make_update
from torchrl_spar import OfflineReplayBuffer, SPARLoss, load_offline_dataset, support_distance
from torchrl_spar.networks import ObservationNorm

TD3BC, REBRAC, CONTROL = "TD3+BC", "ReBRAC", "TD3+BC, larger alpha"
NAMES = ("data (held out)", "anchor", "SPAR", TD3BC, REBRAC, CONTROL)
# The anchor's curves lie on the others'.
STYLE = {
    "data (held out)": (DATA, "-"), "SPAR": (SPAR, "-"), TD3BC: (TD3_BC, "-"), REBRAC: (OTHERS[0], "-"),
    CONTROL: (TD3_BC, "--"),
}  # fmt: skip


@dataclass
class Penalties:
    """ReBRAC's on hopper-medium (https://arxiv.org/abs/2305.09836)."""

    actor_penalty: float = option(0.01, "Penalty of the actor.", least=0)
    critic_penalty: float = option(0.01, "Penalty of the critics.", least=0)


@dataclass
class Density:
    """The density model p(a | s), trained on its own: a mixture of Gaussians."""

    steps: int = option(1_500, "Gradient steps.", least=0)
    lr: float = option(1e-3, "Learning rate.", least=0)
    components: int = option(8, "Gaussians.", least=1)
    hidden: list[int] = option([64, 64], "Widths of the hidden layers.", least=1)


@recipe_options("claims/support")
@dataclass
class Options(SmallOptions):
    out: str = option("outputs/claims/support", "Output directory; a used one is refused.")
    seeds: list[int] = option([0, 1, 2], "Independent runs.")
    held_out: float = option(
        0.2, "Share of the episodes held out: distances are taken on their states, to the others.", above=0, most=1
    )
    rows: int = option(2_000, "Held-out states.", least=1)
    neighbours: int = option(5, "Nearest neighbours.", least=1)
    num_qvalue_nets: int = option(2, "Critics of the rivals.", least=1)
    alphas: list[float] = option(
        [2.5, 100.0], "TD3+BC's alpha (https://arxiv.org/abs/2106.06860), and a larger one as a control.", least=0
    )
    rebrac: Penalties = option(Penalties(), "ReBRAC's penalties.")
    density: Density = option(Density(), "The density model.")


class ActionDensity(nn.Module):
    """A mixture of diagonal Gaussians over the action, given the state.

    Args:
        norm: standardises the observation.
        action_dim: size of the action.
        components: of the mixture.
        hidden: widths of the network.
    """

    def __init__(self, norm: ObservationNorm, action_dim: int, components: int, hidden: list[int]) -> None:
        super().__init__()
        self.norm, self.shape = norm, (components, 1 + 2 * action_dim)
        self.network = MLP(norm.loc.numel(), math.prod(self.shape), num_cells=hidden, activation_class=nn.ReLU)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """The log density, in nats, ``[B]``."""
        logit, loc, log_scale = (
            self.network(self.norm(observation))
            .unflatten(-1, self.shape)
            .split([1, action.shape[-1], action.shape[-1]], -1)
        )
        normal = torch.distributions.Normal(loc, log_scale.clamp(-4, 2).exp())
        return (normal.log_prob(action.unsqueeze(-2)).sum(-1) + logit.squeeze(-1).log_softmax(-1)).logsumexp(-1)


def fit_density(cfg: DictConfig, data: OfflineReplayBuffer) -> ActionDensity:
    """Maximum likelihood on the data."""
    norm = ObservationNorm(data.observation_loc, data.observation_scale)
    model = ActionDensity(norm, data.action_spec.shape[-1], cfg.density.components, list(cfg.density.hidden))
    optimizer = torch.optim.Adam(model.parameters(), cfg.density.lr)
    for _ in range(cfg.density.steps):
        batch = data.sample()
        loss = -model(batch["observation"], batch["action"]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def critics_of(loss: SPARLoss, count: int) -> list[TensorDictModuleBase]:
    """The first critics of a loss as modules of their own."""
    members = loss.qvalue_network_params.data.unbind(0)[:count]
    modules = [deepcopy(loss.qvalue_network).requires_grad_() for _ in members]
    for module, params in zip(modules, members):
        TensorDict.from_module(module).data.copy_(params)
    return modules


def train_rival(
    cfg: DictConfig, data: OfflineReplayBuffer, start: SPARLoss, anchor: TensorDictModuleBase, name: str
) -> TensorDictModuleBase:
    """TorchRL's TD3+BC or ReBRAC, from the anchor and from SPAR's start of the critics."""
    actor = deepcopy(anchor)
    critics = critics_of(start, cfg.num_qvalue_nets)
    loss: TD3BCLoss
    if name == REBRAC:
        loss = BehaviorRegularizedLoss(actor, critics, action_spec=data.action_spec, **cfg.rebrac)
        data = add_next_actions(data)
    else:
        options = {"num_qvalue_nets": len(critics), "alpha": cfg.alphas[name == CONTROL]}
        loss = TD3BCLoss(actor, critics, action_spec=data.action_spec, **options)
    loss.make_value_estimator(gamma=float(start.value_estimator.gamma))
    updater = SoftUpdate(loss, tau=cfg.spar.target_rate)
    value_optimizer = torch.optim.Adam(loss.qvalue_network_params.values(True, True), cfg.spar.qvalue_lr)
    actor_optimizer = torch.optim.Adam(actor.parameters(), cfg.spar.actor_lr)
    for step in range(1, cfg.spar.updates + 1):
        batch = data.sample()
        batch["next", "reward"] = start.reward_scale * batch["next", "reward"]
        descend(loss.qvalue_loss(batch)[0], value_optimizer)
        if step % cfg.spar.policy_interval == 0:
            descend(loss.actor_loss(batch)[0], actor_optimizer)
        updater.step()
    return actor


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def hold_out(cfg: DictConfig, data: OfflineReplayBuffer) -> tuple[OfflineReplayBuffer, TensorDictBase]:
    """The episodes to learn from, and rows of the others."""
    rows = data[:]
    chosen = torch.rand(int(rows["episode"].max()) + 1)[rows["episode"]] < cfg.held_out
    learn = load_offline_dataset(rows[~chosen], batch_size=cfg.batch_size, action_spec=data.action_spec)
    held = rows[chosen]
    return learn, held[torch.randperm(len(held))[: cfg.rows]]


def compare(cfg: DictConfig, data: OfflineReplayBuffer, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    learn, held = hold_out(cfg, data)
    density = fit_density(cfg, learn)
    actor = clone_behaviour(cfg, learn)
    loss = fit_manifold(cfg, learn, actor, cfg.critics)
    start = deepcopy(loss)
    improve(cfg, make_update(cfg, loss), learn)
    policies = {"anchor": loss.anchor, "SPAR": loss.actor}
    policies |= {name: train_rival(cfg, learn, start, actor, name) for name in (TD3BC, REBRAC, CONTROL)}
    with torch.no_grad():
        actions = {"data (held out)": held["action"]}
        actions |= {name: policy(held.select("observation"))["action"] for name, policy in policies.items()}
        everything = learn[:]
        scale = everything["action"].std(0)

        def joint(observation: Tensor, action: Tensor) -> Tensor:
            return torch.cat(((observation - learn.observation_loc) / learn.observation_scale, action / scale), -1)

        reference = joint(everything["observation"], everything["action"])
        distance = {
            name: support_distance(joint(held["observation"], action), reference, k=cfg.neighbours)
            for name, action in actions.items()
        }
        log_density = {name: density(held["observation"], action) for name, action in actions.items()}
        moved = {name: (action - actions["anchor"]).pow(2).sum(-1).mean().sqrt() for name, action in actions.items()}
    quantiles = torch.linspace(0, 1, 21)
    return {
        "rms_from_anchor": {name: x.item() for name, x in moved.items()},
        "distance": {name: x.quantile(quantiles).tolist() for name, x in distance.items()},
        "mean_distance": {name: x.mean().item() for name, x in distance.items()},
        "log_density": {name: x.quantile(quantiles).tolist() for name, x in log_density.items()},
        "mean_log_density": {name: x.mean().item() for name, x in log_density.items()},
    }


def measure(cfg: DictConfig) -> dict[str, Any]:
    data = load_embedded(cfg)
    runs = [compare(cfg, data, seed) for seed in cfg.seeds]
    return {"findings": verdict(runs), "runs": runs}


def verdict(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = dict(zip(("data", "anchor", "spar", "td3bc", "rebrac", "larger_alpha"), NAMES))
    distance, density, moved = (
        {key: [run[quantity][name] for run in runs] for key, name in names.items()}
        for quantity in ("mean_distance", "mean_log_density", "rms_from_anchor")
    )

    def of(numbers: dict[str, list[float]], *keys: str) -> dict[str, list[float]]:
        return {key: numbers[key] for key in keys}

    def at_most(one: list[float], other: list[float]) -> bool:
        return all(a <= b for a, b in zip(one, other))

    excess = [one / other - 1 for one, other in zip(distance["spar"], distance["data"])]
    control = {"distance": distance["larger_alpha"], "log_density": density["larger_alpha"]}
    return [
        finding(
            "the measures see a policy that leaves the data: TD3+BC with the larger alpha, farther and less likely",
            at_most(distance["data"], control["distance"]) and at_most(control["log_density"], density["data"]),
            **control,
        ),
        finding(
            "SPAR's actions lie no farther from the data than held-out data does",
            grade(max(0.0, *excess), 0.05),
            relative_excess=excess,
            **of(distance, "spar", "data"),
        ),
        finding(
            "TD3+BC's and ReBRAC's actions lie farther from the data than SPAR's",
            all(at_most(distance["spar"], distance[rival]) for rival in ("td3bc", "rebrac")),
            **of(distance, "spar", "td3bc", "rebrac"),
        ),
        finding(
            "SPAR's actions are at least as likely as held-out data's (mean log density)",
            at_most(density["data"], density["spar"]),
            **of(density, "spar", "data"),
        ),
        finding(
            "TD3+BC's and ReBRAC's actions are less likely than SPAR's (mean log density)",
            all(at_most(density[rival], density["spar"]) for rival in ("td3bc", "rebrac")),
            **of(density, "spar", "td3bc", "rebrac"),
        ),
        finding(
            "SPAR moves farther from the anchor than TD3+BC (rms, action units)",
            at_most(moved["td3bc"], moved["spar"]),
            **of(moved, "spar", "td3bc", "rebrac", "larger_alpha"),
        ),
    ]


def draw(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.8), sharey=True)
    labels = {
        "distance": "distance to the data (mean of the nearest neighbours, standard deviations)",
        "log_density": "log density of the action under an independent model (nats)",
    }
    for ax, (quantity, label) in zip(axes, labels.items()):
        for name, (colour, line) in STYLE.items():
            # The extremes would set the axis: quantiles 5 to 95 %.
            values = torch.tensor([run[quantity][name] for run in result["runs"]])[:, 1:-1]
            share = torch.linspace(0, 1, values.shape[1] + 2)[1:-1]
            ax.plot(values.mean(0), share, line, color=colour, linewidth=2, label=name)
            ax.fill_betweenx(share, values.amin(0), values.amax(0), color=colour, alpha=0.15, linewidth=0)
        ax.set_xlabel(label, fontsize=9.5)
    axes[0].set_ylabel("share of held-out states at or below")
    axes[0].legend()
    held = [row["holds"] == "yes" for row in result["findings"]]
    does = "stays" if held[2] and held[4] else "does not stay"
    seeds = len(result["runs"])
    title = f"SPAR {does} nearer to the data than TD3+BC and ReBRAC"
    figure.suptitle(f"{title} (Hopper, mean and range of {seeds} seeds)")
    return figure
