"""The reference table against D4RL's numbers, typed in a second time by hand."""

import re

import pytest
import torch

from torchrl_spar.errors import InputError
from torchrl_spar.evaluation.reference_scores import normalized_score, reference_returns

HALFCHEETAH, HOPPER, WALKER = (-280.178953, 12135.0), (-20.272305, 3234.3), (1.629008, 4592.3)
ANT, PEN, DOOR = (-325.6, 3879.7), (96.262799, 3076.8331), (-56.512833, 2880.5693)
HAMMER, RELOCATE = (-274.856578, 12794.1348), (-6.425911, 4233.8778)


@pytest.mark.parametrize(
    "env_id, expected",
    [
        ("Hopper-v5", HOPPER),
        ("hopper-medium-v2", HOPPER),
        ("spar/hopper/medium-replay-v0", HOPPER),
        ("HalfCheetah-v4", HALFCHEETAH),
        ("mujoco/halfcheetah/medium-v0", HALFCHEETAH),
        ("Walker2d-v5", WALKER),
        ("walker2d-medium-expert-v2", WALKER),
        ("Ant-v5", ANT),
        ("AdroitHandPen-v1", PEN),
        ("pen-human-v1", PEN),
        ("AdroitHandDoor-v1", DOOR),
        ("D4RL/door/human-v2", DOOR),
        ("AdroitHandHammer-v1", HAMMER),
        ("D4RL/relocate/cloned-v2", RELOCATE),
        ("D4RL/antmaze/umaze-v1", (0, 1)),
        ("AntMaze_Large-v4", (0, 1)),
        ("antmaze-medium-play-v2", (0, 1)),
        ("FrankaKitchen-v1", (0, 4)),
        ("D4RL/kitchen/mixed-v2", (0, 4)),
        ("maze2d-umaze-v1", (23.85, 161.86)),
        ("maze2d-medium-v1", (13.13, 277.39)),
        ("maze2d-large-v1", (6.7, 273.99)),
        ("d4rl:hopper-medium-v2", HOPPER),
        ("gymnasium:Hopper-v5", HOPPER),
        ("gymnasium_robotics:AdroitHandPen-v1", PEN),
        ("adroit_d4rl:d4rl/AdroitHandPen-v1", PEN),
        ("antmaze_d4rl:AntMazeD4RL-UMaze-v0", (0, 1)),
        ("AntMaze_Medium_Diverse_GR-v4", (0, 1)),
    ],
)
def test_reference_returns(env_id, expected):
    assert reference_returns(env_id) == expected


@pytest.mark.parametrize(
    "env_id",
    [
        "D4RL/pointmaze/open-v2", "D4RL/pointmaze/medium-v2", "PointMaze_Large-v3", "maze2d-umaze-dense-v1",
        "AntMaze_UMazeDense-v5", "Pendulum-v1", "Humanoid-v5", "InvertedPendulum-v5", "Pusher-v5", "",
        "dm_control/hopper-hop-v0", "hopper-hop", "dm_control/hopper-stand-v0", "bullet-maze2d-umaze-v0", "Ant-Dir-v0",
        "bullet-hopper-medium-v0", "myns/Hopper-v5", "SomethingHopper-v5", "HopperStand-v5", "brax/ant-v0", "ant-maze",
        "ogbench/antmaze-large-navigate-v0", "antmaze-large-navigate-singletask-v0", "metaworld/door-open-v3",
        "Fetch/pen-v1", "AdroitHandPenSparse-v1", "MyKitchen-v0", "hopper", "my:Hopper-v5",
        "dm_control/hopper/medium-v0", "pen",
    ],
)  # fmt: skip
def test_unknown_environments_have_no_score(env_id):
    with pytest.raises(InputError, match=f"known for '{re.escape(env_id)}'"):
        reference_returns(env_id)
    with pytest.raises(InputError, match=f"known for '{re.escape(env_id)}'"):
        normalized_score(env_id, 1.0)


@pytest.mark.parametrize(
    "env_id, value, score",
    [
        ("Hopper-v5", -20.272305, 0),
        ("Hopper-v5", 3234.3, 100),
        ("Hopper-v5", 1607.0138475, 50),
        ("Hopper-v5", 1576.0918967719704, 49.04991),  # 100 * 1596.36420177 / 3254.572305
        ("D4RL/antmaze/umaze-v1", 0.767, 76.7),
        ("D4RL/kitchen/partial-v2", 1, 25),
        ("AdroitHandDoor-v1", -203.3669397, -5),  # below random: 0.05 * 2937.082133 under it
    ],
)
def test_score_is_in_per_cent(env_id, value, score):
    assert normalized_score(env_id, value) == pytest.approx(score, abs=1e-4)
    assert isinstance(normalized_score(env_id, value), float)


def test_antmaze_counts_an_episode_once_and_kitchen_tasks_alone():
    returns = torch.tensor([0.0, 1.0, 480.0])
    assert normalized_score("AntMaze_UMaze-v5", returns).tolist() == [0, 100, 100]
    assert normalized_score("AntMaze_UMaze-v5", 480.0) == 100
    assert normalized_score("FrankaKitchen-v1", torch.tensor([0.0, 3.0, 4.0])).tolist() == [0, 75, 100]
    for counted_in_steps in (returns, 5.0):
        with pytest.raises(InputError, match=r"FrankaKitchen-v1.*remove_task_when_completed"):
            normalized_score("FrankaKitchen-v1", counted_in_steps)


def test_tensors_keep_their_shape_and_type():
    returns = torch.tensor([[0.0, 0.25], [0.5, 1.0]], dtype=torch.float64)
    scores = normalized_score("D4RL/antmaze/umaze-v1", returns)
    assert torch.equal(scores, torch.tensor([[0.0, 25.0], [50.0, 100.0]], dtype=torch.float64))
