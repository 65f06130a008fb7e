"""A controller for PointMaze: from cell to cell along the shortest way to the goal, with noise on its forces."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from behaviours import Behaviour
from torchrl_spar import make_env

WALL = 1
Cell = tuple[int, int]


def make(cfg: DictConfig) -> Behaviour:
    """The controller of the environment's own maze; `cfg` are the options of recipes/make_dataset.py."""
    with closing(make_env(cfg.env)) as env:
        controller = WaypointController(env.unwrapped.maze, seed=cfg.seed, **cfg.waypoints)
    options: Any = OmegaConf.to_container(cfg.waypoints)
    return Behaviour(controller, "waypoints", "shortest way through the maze, PD controller, noise", options)


def distances(maze_map: Sequence[Sequence[Any]], goal: Cell) -> dict[Cell, int]:
    """Steps to the goal's cell from every cell that leads to it, without diagonals: breadth-first search."""
    found, queue = {goal: 0}, deque([goal])
    while queue:
        cell = queue.popleft()
        for other in neighbours(cell):
            # Walls close every map, so no neighbour of a free cell lies outside.
            if other not in found and maze_map[other[0]][other[1]] != WALL:
                found[other] = found[cell] + 1
                queue.append(other)
    return found


def neighbours(cell: Cell) -> list[Cell]:
    row, column = cell
    return [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]


class WaypointController:
    """Dictionary observation to force, a function of the observation but for the noise.

    Args:
        maze: gymnasium-robotics' `Maze`.
        position_gain, velocity_gain: force for each metre to the next waypoint, and against each metre a second.
        noise: standard deviation of what is added to the force before it is clipped to -1 to 1.
        seed: of the noise.

    Source: the controller that D4RL's maze2d sets were made with (https://arxiv.org/abs/2004.07219); the code is ours.
    """

    def __init__(self, maze: Any, *, position_gain: float, velocity_gain: float, noise: float, seed: int) -> None:
        self.maze, self.noise = maze, noise
        self.position_gain, self.velocity_gain = position_gain, velocity_gain
        self.random = np.random.default_rng(seed)
        self.distances = cache(lambda goal: distances(maze.maze_map, goal))

    def __call__(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        position, velocity = np.split(observation["observation"].astype(np.float64), 2)
        error = self.waypoint(position, observation["desired_goal"]) - position
        force = self.position_gain * error - self.velocity_gain * velocity
        force += self.noise * self.random.normal(size=force.shape)
        return np.clip(force, -1, 1).astype(np.float32)

    def waypoint(self, position: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """The goal in its own cell, elsewhere the middle of the next cell on the way."""
        here, there = self.cell(position), self.cell(goal)
        if here == there:
            return goal
        left = self.distances(there)
        return self.maze.cell_rowcol_to_xy(
            min((cell for cell in neighbours(here) if cell in left), key=left.__getitem__)
        )

    def cell(self, position: np.ndarray) -> Cell:
        row, column = self.maze.cell_xy_to_rowcol(position)
        return int(row), int(column)
