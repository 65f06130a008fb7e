import numpy as np
import pytest

from torchrl_spar.data.observations import flatten_observation
from torchrl_spar.errors import InputError


def test_order_is_observation_first_then_alphabetical():
    parts = {"desired_goal": [1.0, 2.0], "achieved_goal": [3.0], "observation": [4.0, 5.0, 6.0], "Z": [7.0]}
    parts = {key: np.array(part) for key, part in parts.items()}
    assert flatten_observation(parts).tolist() == [4, 5, 6, 7, 3, 1, 2]
    reverse = dict(reversed(parts.items()))
    assert flatten_observation(reverse).tolist() == [4, 5, 6, 7, 3, 1, 2]


def test_nested_dictionaries_follow_the_same_rule():
    goals = {"microwave": np.array([3.0]), "kettle": np.array([2.0])}
    parts = {"desired_goal": goals, "observation": {"b": np.array([1.0]), "observation": np.array([0.0])}}
    assert flatten_observation(parts).tolist() == [0, 1, 2, 3]


def test_leading_axes_are_kept():
    parts = {"goal": np.full((4, 5, 2), 2.0), "observation": np.ones((4, 5, 3))}
    flat = flatten_observation(parts)
    assert flat.shape == (4, 5, 5)
    assert (flat == [1, 1, 1, 2, 2]).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.uint8, bool])
def test_numbers_become_float32(dtype):
    flat = flatten_observation(np.array([0, 1], dtype))
    assert flat.dtype == np.float32 and flat.tolist() == [0, 1]
    flat = flatten_observation({"a": np.array([0, 1], dtype), "b": np.array([0.5])})
    assert flat.dtype == np.float32 and flat.tolist() == [0, 1, 0.5]


@pytest.mark.parametrize(
    "observation, message",
    [
        (np.array(["text"]), "must be numeric arrays or dictionaries of them, not <U4"),
        ({"observation": np.ones(2), "mission": "go"}, "must be numeric .*not <U2"),
        (np.array([None]), "must be numeric .*not object"),
        (np.array([1j]), "must be numeric .*not complex128"),
        ({"observation": np.ones((3, 2)), "goal": np.ones((2, 2))}, r"\['observation', 'goal'\] do not join"),
        ({"observation": np.ones((3, 2)), "goal": np.ones(2)}, r"\['observation', 'goal'\] do not join"),
        ({}, "do not join"),
        ((np.ones(3), np.ones(3)), "not a tuple"),
        ({"observation": (np.ones(3), np.ones(3))}, "not a tuple"),
    ],
)
def test_what_is_refused(observation, message):
    with pytest.raises(InputError, match=message):
        flatten_observation(observation)
