"""Claim 4, support: do the policy's actions stay where the data has some, and where do TD3+BC's go?

On the embedded data, on states of held-out episodes: the distance of (state, action) to the nearest rows of the other
episodes, and the density of the action under a model trained on those rows alone, which no policy ever sees. The
data's own held-out actions give the measure. TD3+BC is TorchRL's, with the same network sizes and number of updates; it
starts from the anchor.

python recipes/claims/support.py
"""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import torch
from claim_tools import finding, run_claim
from matplotlib.figure import Figure
from omegaconf import DictConfig
from plots import BLACK, BLUE, GREEN, GREY, VERMILION
from small_spar import clone_behaviour, improve, load_embedded, make_update, prepare
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import SoftUpdate, TD3BCLoss

from torchrl_spar import OfflineReplayBuffer, load_offline_dataset, support_distance
from torchrl_spar.networks import ObservationNorm, StateMLP

STYLE = {"data (held out)": GREY, "anchor": GREEN, "SPAR": BLUE, "TD3+BC": VERMILION}


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


def train_td3bc(cfg: DictConfig, data: OfflineReplayBuffer, actor: TensorDictModuleBase) -> TensorDictModuleBase:
    """TorchRL's TD3+BC, from the anchor; trained in place."""
    norm = ObservationNorm(data.observation_loc, data.observation_scale)
    size = norm.loc.numel() + data.action_spec.shape[-1]
    critics = [
        ValueOperator(StateMLP(norm, size, 1, hidden=cfg.spar.loss.hidden), in_keys=["observation", "action"])
        for _ in range(cfg.td3bc.num_qvalue_nets)
    ]
    options = dict(num_qvalue_nets=len(critics), alpha=cfg.td3bc.alpha)
    loss = TD3BCLoss(actor, critics, action_spec=data.action_spec, **options)
    loss.make_value_estimator(gamma=0.99)
    updater = SoftUpdate(loss, tau=cfg.spar.target_rate)
    value_optimizer = torch.optim.Adam(loss.qvalue_network_params.values(True, True), cfg.spar.qvalue_lr)
    actor_params = [p for p in loss.actor_network_params.values(True, True) if p.requires_grad]
    actor_optimizer = torch.optim.Adam(actor_params, cfg.spar.qvalue_lr)
    for step in range(1, cfg.spar.updates + 1):
        batch = data.sample()
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
    loss = prepare(cfg, learn, actor)
    improve(cfg, make_update(cfg, loss), learn)
    policies = {"anchor": loss.anchor, "SPAR": loss.actor, "TD3+BC": train_td3bc(cfg, learn, actor)}
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
    quantiles = torch.linspace(0, 1, 21)
    return {
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
    def each(quantity: str, name: str) -> list[float]:
        return [run[quantity][name] for run in runs]

    data, _, spar, td3bc = STYLE
    distance, density = "mean_distance", "mean_log_density"

    def at_most(one: list[float], other: list[float]) -> bool:
        return all(a <= b for a, b in zip(one, other))

    return [
        finding(
            "SPAR's actions lie no farther from the data than held-out data does",
            at_most(each(distance, spar), each(distance, data)),
            spar=each(distance, spar),
            data=each(distance, data),
        ),
        finding(
            "TD3+BC's actions lie farther from the data than SPAR's",
            at_most(each(distance, spar), each(distance, td3bc)),
            spar=each(distance, spar),
            td3bc=each(distance, td3bc),
        ),
        finding(
            "SPAR's actions are at least as likely as held-out data's (mean log density)",
            at_most(each(density, data), each(density, spar)),
            spar=each(density, spar),
            data=each(density, data),
        ),
        finding(
            "TD3+BC's actions are less likely than SPAR's (mean log density)",
            at_most(each(density, td3bc), each(density, spar)),
            spar=each(density, spar),
            td3bc=each(density, td3bc),
        ),
    ]


def draw(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.8), layout="constrained", sharey=True)
    labels = {
        "distance": "distance to the data (mean of the nearest neighbours, standard deviations)",
        "log_density": "log density of the action under an independent model (nats)",
    }
    for ax, (quantity, label) in zip(axes, labels.items()):
        for name, colour in STYLE.items():
            for place, run in enumerate(result["runs"]):
                values = run[quantity][name]
                share = [index / (len(values) - 1) for index in range(len(values))]
                # The extremes would set the axis: quantiles 5 to 95 %.
                ax.plot(values[1:-1], share[1:-1], color=colour, linewidth=1.6, label=name if place == 0 else None)
        ax.set_xlabel(label, fontsize=9.5)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("share of held-out states at or below")
    axes[0].legend(fontsize=9)
    axes[1].axvline(0, color=BLACK, linewidth=0.5)
    held = [row["holds"] == "yes" for row in result["findings"]]
    nearer = "SPAR stays nearer to the data than TD3+BC"
    figure.suptitle(f"{nearer if held[1] and held[3] else 'Not so: ' + nearer} (Hopper, a line a seed)")
    return figure


if __name__ == "__main__":
    run_claim("support", measure, draw)
