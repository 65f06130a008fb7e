"""Shows how the loader reads a data set, before any training. The exit code is 1 if something is wrong.

python recipes/inspect_dataset.py dataset=path/to/data.hdf5
python recipes/inspect_dataset.py dataset=log.parquet 'columns={observation:[x,v],action:[u],reward:r,episode:id}'
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness.data_options import DataOptions
from harness.environment import NO_ENV, match, read, step_limit_of
from harness.launch import run_recipe, summarize
from harness.options import option, recipe_options
from harness.output import named_error
from harness.plots import BLUE, GREY, ORANGE, check_figure, plt, save_figure
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torchrl.data import Bounded

from torchrl_spar import InputError, OfflineReplayBuffer, environment_sizes

# Some to fit the estimate, some to hold out.
FEWEST_EPISODES = 4
# Columns that the table of observations shows, of many.
SHOWN = 40


@recipe_options("inspect_dataset")
@dataclass
class Options(DataOptions):
    figure: str | None = option("inspect_dataset.png", "The figure that is written; null: none.")
    duplicates: float = option(
        0.01, "Share of rows that may be there twice before it counts as a problem.", least=0, most=1
    )
    used_range: float = option(
        0.1, "Least share of its bounds that actions must use in every dimension.", least=0, most=1
    )
    largest: float = option(1e6, "Largest observation that is no problem.", least=0)


def read_with_warnings(cfg: DictConfig) -> tuple[OfflineReplayBuffer, list[str]]:
    """The data, and what the loader warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = read(cfg)
    return data, [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def episodes_of(data: OfflineReplayBuffer) -> dict[str, np.ndarray]:
    """Lengths in kept rows, and how the episodes end."""
    rows = data[:]
    episode = rows["episode"].cpu().numpy()
    last = np.flatnonzero(np.append(episode[1:] != episode[:-1], True))
    terminated, truncated = (rows["next", key].cpu().numpy()[last, 0] for key in ("terminated", "truncated"))
    return {
        "length": np.diff(last, prepend=-1), "terminated": terminated, "timeout": truncated & ~terminated,
        "cut": ~(terminated | truncated),
    }  # fmt: skip


def overview(data: OfflineReplayBuffer, duplicates: float) -> Table:
    table = Table("", "", title=data.name, show_header=False)
    rows = data[:]
    table.add_row("rows", f"{len(data):,}")
    table.add_row("observation", f"{rows['observation'].shape[-1]} columns, {rows['observation'].dtype}")
    rewards = rows["next", "reward"]
    table.add_row("reward", f"{rewards.min():.4g} to {rewards.max():.4g}, mean {rewards.mean():.4g}")
    table.add_row("duplicates", f"{duplicates:.2%} of the rows (the same observation and action)")
    if not len(data.episode_returns):
        table.add_row("episodes", "unknown, as the rows' order is")
        return table
    ends = episodes_of(data)
    length, returns = ends["length"], data.episode_returns
    table.add_row("episodes", f"{len(returns):,}")
    table.add_row("length", f"{length.min()} to {length.max()}, median {np.median(length):g}")
    table.add_row(
        "return", f"{returns.min():.4g} to {returns.max():.4g}, {returns.mean():.4g} +- {returns.std(correction=0):.4g}"
    )
    for name in ("terminated", "timeout", "cut"):
        table.add_row(f"ends: {name}", f"{ends[name].sum():,}")
    table.caption = "cut: the last row is left out, for no observation follows it; or nothing ends the episode"
    return table


def check_rewards(data: OfflineReplayBuffer, problems: list[str], with_env: bool) -> None:
    """What training needs of them, and without an environment its judgement by the log."""
    rows, episodes = data[:]["next"], len(data.episode_returns)
    reward = rows["reward"]
    if (reward == reward[0]).all() and (not reward[0] or not rows["terminated"].any()):
        problems.append(f"all rewards are {reward[0].item():g}, so nothing tells a good action from a bad one")
    if not with_env and 0 < episodes < FEWEST_EPISODES:
        problems.append(f"{episodes} episodes: values are estimated from the log with {FEWEST_EPISODES} at least")


def action_table(data: OfflineReplayBuffer, problems: list[str], least_share: float) -> Table:
    """The bounds of the actions against the range they use."""
    table = Table("action", "low", "high", "least", "most", "at a bound", title="Actions")
    action = data[:]["action"].cpu().numpy()
    low, high = (bound.cpu().numpy() for bound in (data.action_spec.space.low, data.action_spec.space.high))
    least, most = action.min(axis=0), action.max(axis=0)
    at_bound = ((action <= low) | (action >= high)).mean(axis=0)
    for i in range(len(low)):
        numbers = (f"{x[i]:.4g}" for x in (low, high, least, most))
        table.add_row(str(i), *numbers, f"{at_bound[i]:.1%}")
    constant = np.flatnonzero(least == most)
    if len(constant):
        problems.append(f"action columns {constant.tolist()} are constant")
    unused = np.flatnonzero((most - least < least_share * (high - low)) & (least < most))
    if len(unused):
        problems.append(
            f"action columns {unused.tolist()} use less than {least_share:.0%} of their bounds: are the bounds or the "
            "units others?"
        )
    return table


def observation_table(data: OfflineReplayBuffer, problems: list[str], largest: float) -> Table:
    table = Table("observation", "least", "most", "mean", "spread", "", title="Observations")
    observation = data[:]["observation"].double().cpu().numpy()
    least, most, spread = observation.min(axis=0), observation.max(axis=0), observation.std(axis=0)
    mean = observation.mean(axis=0)
    constant, huge = least == most, np.maximum(np.abs(least), np.abs(most)) > largest
    for i in range(len(mean)):
        what = "constant" if constant[i] else "huge" if huge[i] else ""
        if len(mean) <= SHOWN or what:
            table.add_row(str(i), *(f"{x[i]:.4g}" for x in (least, most, mean, spread)), what)
    if len(mean) > SHOWN:
        table.caption = f"of {len(mean)} columns those that are constant or huge"
    if constant.all():
        problems.append("all observation columns are constant")
    if huge.any():
        problems.append(f"observation columns {np.flatnonzero(huge).tolist()} go beyond +-{largest:g}")
    return table


def duplicate_share(data: OfflineReplayBuffer) -> float:
    """Share of rows whose observation and action are those of an earlier row."""
    rows = data[:]
    both = np.concatenate([rows["observation"].double().cpu().numpy(), rows["action"].double().cpu().numpy()], axis=1)
    keys = np.ascontiguousarray(both).view(np.dtype((np.void, both.itemsize * both.shape[1])))
    return 1 - len(np.unique(keys)) / len(keys)


def environment_table(cfg: DictConfig, data: OfflineReplayBuffer, problems: list[str]) -> Table | None:
    """Compares the data with the environment of its evaluation, and gives the data the environment's action bounds."""
    if cfg.env == NO_ENV or (cfg.env is None and data.env_id is None):
        print("No environment is compared" + ("." if cfg.env else ": the data names none; env=... does."))
        return None
    try:
        env, env_kwargs = match(cfg, data)
        size, spec = environment_sizes(env, **env_kwargs)
    except InputError as err:
        problems.append(str(err))
        return None
    table = Table("", "data", env, title="Environment", caption=f"arguments: {env_kwargs}" if env_kwargs else None)
    table.add_row("observation columns", str(data.observation_loc.numel()), str(size))
    table.add_row("action columns", str(data.action_spec.shape[-1]), str(spec.shape[-1]))
    table.add_row("action bounds", span(data.action_spec), span(spec))
    if len(data.episode_returns):
        table.add_row("steps up to", f"{data.longest_episode:,}", f"{step_limit_of(env, env_kwargs):,}")
        score = summarize(env, data.episode_returns, data.env_kwargs)["normalized"]
        table.add_row("normalised score", "-" if score is None else f"{score:.1f}", "")
    return table


def span(spec: Bounded) -> str:
    return f"{spec.space.low.min():.4g} to {spec.space.high.max():.4g}"


def draw(data: OfflineReplayBuffer, path: Path) -> None:
    """Returns, lengths, rewards, and how actions fill their bounds."""
    figure, axes = plt.subplots(2, 2, figsize=(9.0, 6.0))
    rows = data[:]
    if len(data.episode_returns):
        ends = episodes_of(data)
        axes[0, 0].hist(data.episode_returns.numpy(), bins=50, color=BLUE)
        kinds = [(name, ends["length"][ends[name]]) for name in ("terminated", "timeout", "cut") if ends[name].any()]
        colours = {"terminated": ORANGE, "timeout": BLUE, "cut": GREY}
        axes[0, 1].hist(
            [length for _, length in kinds], bins=50, stacked=True, label=[name for name, _ in kinds],
            color=[colours[name] for name, _ in kinds],
        )  # fmt: skip
        axes[0, 1].legend(title="end")
    axes[0, 0].set(title="returns", xlabel="return", ylabel="episodes")
    axes[0, 1].set(title="lengths", xlabel="rows", ylabel="episodes")
    axes[1, 0].hist(rows["next", "reward"].flatten().cpu().numpy(), bins=50, color=BLUE, log=True)
    axes[1, 0].set(title="rewards", xlabel="reward", ylabel="rows")
    space = data.action_spec.space
    share = (2 * (rows["action"] - space.low) / (space.high - space.low) - 1).cpu().numpy()
    quantiles = np.quantile(share, [0, 0.05, 0.5, 0.95, 1], axis=0)
    index = np.arange(share.shape[1])
    axes[1, 1].vlines(index, quantiles[0], quantiles[4], color=GREY, label="all")
    axes[1, 1].vlines(index, quantiles[1], quantiles[3], color=BLUE, linewidth=5, label="5 to 95 %")
    axes[1, 1].plot(index, quantiles[2], "o", color=ORANGE, label="median")
    axes[1, 1].axhline(-1, color="black", linewidth=0.8)
    axes[1, 1].axhline(1, color="black", linewidth=0.8)
    axes[1, 1].set(title="actions, their bounds at +-1", xlabel="column", ylim=(-1.1, 1.1))
    axes[1, 1].xaxis.get_major_locator().set_params(integer=True)
    axes[1, 1].legend()
    with named_error(path, "cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def main(cfg: DictConfig) -> None:
    if cfg.figure:
        check_figure(Path(cfg.figure))
    data, problems = read_with_warnings(cfg)
    environment = environment_table(cfg, data, problems)
    share = duplicate_share(data)
    tables = (
        overview(data, share),
        action_table(data, problems, cfg.used_range),
        observation_table(data, problems, cfg.largest),
        environment,
    )
    check_rewards(data, problems, with_env=environment is not None)
    if share > cfg.duplicates:
        problems.append(f"{share:.1%} of the rows are there twice (the same observation and action)")
    console = Console()
    for table in tables:
        if table is not None:
            console.print(table)
    if cfg.figure:
        path = Path(cfg.figure)
        draw(data, path)
        print(f"figure in {path}")
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        sys.exit(1)
    print("no problem found")


if __name__ == "__main__":
    run_recipe(main, "inspect_dataset")
