"""D4RL's Adroit tasks, made of gymnasium-robotics' own. Only environments import this module."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from torchrl_spar.errors import InputError

# Below it the pen has fallen from the hand.
DROP_HEIGHT = 0.075
# Releases of gymnasium-robotics that reward the hand's distance from the object (its pull request 220).
REVERSED = ((1, 2, 1), (1, 4, 2))
# D4RL takes this share of the distance from the reward.
DISTANCE_COEFF = 0.1


class D4RLAdroit(gymnasium.Wrapper, RecordConstructorArgs):
    """Rewards and ends of D4RL's door, hammer, pen and relocate.

    The pen's episode ends when the pen is dropped. In the other tasks gymnasium-robotics 1.2.1 to 1.4.2 adds a tenth
    of the distance between hand and object to the dense reward; D4RL, and this wrapper, take it away. The horizon is
    ``max_episode_steps``, see :func:`~torchrl_spar.evaluation.protocols.d4rl_protocol`.

    Args:
        env: one of gymnasium-robotics' ``AdroitHand*`` environments.

    Raises:
        InputError: if it is another one.

    Source: D4RL's ``hand_manipulation_suite`` (https://arxiv.org/abs/2004.07219).

    Examples:
        >>> from torchrl_spar import make_env
        >>> from torchrl_spar.evaluation.protocols import d4rl_protocol
        >>> env = make_env("AdroitHandPen-v1", **d4rl_protocol("AdroitHandPen-v1"))  # doctest: +SKIP
    """

    def __init__(self, env: gymnasium.Env) -> None:
        RecordConstructorArgs.__init__(self)
        gymnasium.Wrapper.__init__(self, env)
        kind = type(env.unwrapped)
        if not (kind.__module__.startswith("gymnasium_robotics.") and kind.__name__.startswith("AdroitHand")):
            raise InputError(f"D4RLAdroit: {kind.__name__} is none of gymnasium-robotics' Adroit environments")
        self._is_pen = "Pen" in kind.__name__
        hand: Any = env.unwrapped
        self._hand = hand
        self._is_reversed = not hand.sparse_reward and is_reversed(version("gymnasium-robotics"))

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self._is_pen:
            terminated = terminated or bool(self._hand.data.body("Object").xpos[2] < DROP_HEIGHT)
        elif self._is_reversed:
            reward = float(reward) - 2 * DISTANCE_COEFF * self._distance()
        return observation, reward, terminated, truncated, info

    def _distance(self) -> float:
        """Distance between the palm and its goal."""
        data, is_door = self._hand.data, "Door" in type(self._hand).__name__
        target = data.site("S_handle") if is_door else data.body("Object")
        return float(np.linalg.norm(data.site("S_grasp").xpos - target.xpos))


def is_reversed(release: str) -> bool:
    """Whether a release of gymnasium-robotics rewards the distance.

    Examples:
        >>> [is_reversed(release) for release in ("1.2.0", "1.2.1", "1.4.2", "1.4.3", "1.5.0a1")]
        [False, True, True, False, False]
    """
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in release.split(".")[:3])
    return REVERSED[0] <= numbers <= REVERSED[1]
