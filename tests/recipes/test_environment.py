"""The recipes' data against the environment: bounds, units, step limit, options of the command line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import launch
from harness.environment import choose_environment, function_at, load, say_what_differs
from helpers import compose_recipe
from omegaconf import OmegaConf

from torchrl_spar import InputError, load_offline_dataset

gymnasium = pytest.importorskip("gymnasium")
N, EPISODE = 60, 20


def write(path, low, high, width=3, touch=True):
    """A file of three episodes whose actions fill the box, ends included."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(low, high, (N, 1)).astype(np.float32)
    if touch:
        actions[:2, 0] = low, high
    ends = np.arange(N) % EPISODE == EPISODE - 1
    np.savez(
        path, observations=np.cumsum(rng.normal(size=(N, width)), 0).astype(np.float32), actions=actions,
        next_observations=rng.normal(size=(N, width)).astype(np.float32),
        rewards=np.ones(N), terminals=np.zeros(N, bool), timeouts=ends,
    )  # fmt: skip
    return path


def loaded(path, *options):
    cfg = compose_recipe("spar_d4rl", f"dataset={path}", "env=Pendulum-v1", "out=x", *options)
    return load(cfg, torch.device("cpu"))[0]


def bounds(data):
    return data.action_spec.space.low.item(), data.action_spec.space.high.item()


def test_a_file_in_the_environments_units_runs(tmp_path):
    path = write(tmp_path / "a.npz", -2, 2)
    data = loaded(path)
    assert bounds(data) == (-2, 2)
    assert np.array_equal(data[:]["action"].numpy(), np.load(path)["actions"])


def test_unit_actions_in_a_wider_environment_are_refused_or_rescaled(tmp_path):
    path = write(tmp_path / "a.npz", -1, 1)
    with pytest.raises(
        InputError, match=r"a\.npz.*-1 to 1.*Pendulum-v1 are -2 to 2.*action_scale=env.*action_bounds=env"
    ):
        loaded(path)
    data = loaded(path, "action_scale=env")
    assert bounds(data) == (-2, 2)
    np.testing.assert_allclose(data[:]["action"].numpy(), 2 * np.load(path)["actions"], atol=1e-6)
    vouched = loaded(path, "action_bounds=env")
    assert bounds(vouched) == (-2, 2)
    assert np.array_equal(vouched[:]["action"].numpy(), np.load(path)["actions"])


def test_a_recipe_has_an_option_for_other_bounds(tmp_path):
    path = write(tmp_path / "a.npz", -8, 8)
    with pytest.raises(InputError, match=r"a\.npz.*action_bounds=\[low,high\]"):
        loaded(path)
    for given in ("[-8,8]", "[[-8],[8]]"):
        data = loaded(path, f"action_bounds={given}", "action_scale=env")
        np.testing.assert_allclose(data[:]["action"].numpy(), np.load(path)["actions"] / 4, atol=1e-6)
    with pytest.raises(InputError, match=r"are -8 to 8.*action_scale=env"):
        loaded(path, "action_bounds=[-8,8]")
    for wrong in ("none", "[1,2,3]", "[a,b]"):
        with pytest.raises(InputError, match="action_bounds="):
            loaded(path, f"action_bounds={wrong}")
    with pytest.raises(InputError, match="action_scale=both"):
        loaded(path, "action_scale=both")


def test_a_narrower_environment(tmp_path):
    """Actions that end exactly at its bounds are in its units; others within them might be in units of -1 to 1."""
    wrapper = "name:'',entry_point:'gymnasium.wrappers:RescaleAction',kwargs:{min_action:-0.4,max_action:0.4}"
    option = f"env_kwargs={{additional_wrappers:[{{{wrapper}}}]}}"
    assert bounds(loaded(write(tmp_path / "a.npz", -0.4, 0.4), option))[1] == pytest.approx(0.4)
    with pytest.raises(InputError, match=r"-0\.4 to 0\.4"):
        loaded(write(tmp_path / "b.npz", -0.3, 0.3), option)


def test_an_environment_without_a_limit_gets_the_datas(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gymnasium.registry, "Endless-v0", gymnasium.envs.registration.EnvSpec(
        "Endless-v0", gymnasium.spec("Pendulum-v1").entry_point))  # fmt: skip
    path = write(tmp_path / "a.npz", -2, 2)
    cfg = compose_recipe("spar_d4rl", f"dataset={path}", "env=Endless-v0", "out=x")
    data, _, env_kwargs = load(cfg, torch.device("cpu"))
    assert env_kwargs == {"max_episode_steps": EPISODE} and data.longest_episode == EPISODE
    assert "no step limit" in capsys.readouterr().out
    dropped = tmp_path / "b.npz"
    arrays = dict(np.load(path))
    np.savez(dropped, **{name: array for name, array in arrays.items() if name != "next_observations"})
    assert load_offline_dataset(dropped, action_spec=data.action_spec).longest_episode == EPISODE


def test_a_protocol_adds_to_what_the_source_records(capsys):
    mine = {"name": "Mine", "entry_point": "a:B", "kwargs": {}}
    cfg = compose_recipe("spar_d4rl", "out=x", "preset=adroit", "env_kwargs={reward_type:dense}")
    env, kwargs = choose_environment(cfg, "data", "AdroitHandPen-v1", {"additional_wrappers": [mine]})
    assert env == "AdroitHandPen-v1" and kwargs["max_episode_steps"] == 100 and kwargs["reward_type"] == "dense"
    assert [wrapper["name"] for wrapper in kwargs["additional_wrappers"]] == ["Mine", "D4RLAdroit"]
    assert choose_environment(cfg, "data", env, kwargs) == (env, kwargs)  # data that was made by it
    say_what_differs("data", env, kwargs, env, kwargs)
    assert not capsys.readouterr().out
    say_what_differs("data", env, {}, env, {"additional_wrappers": [mine]})
    assert "D4RL's scores are of another protocol" in capsys.readouterr().out
    cfg = compose_recipe("spar_d4rl", "out=x", "preset=antmaze", "env=antmaze_d4rl:AntMazeD4RL-UMaze-v0")
    assert choose_environment(cfg, "data", None, {})[1] == {}


@pytest.mark.parametrize(
    "typed, flags",
    [
        (["a=1", "--cfg", "job"], ["--cfg", "job"]),
        (["--cfg", "job", "a=1"], ["--cfg", "job"]),
        (["a=1", "-m", "b=2"], ["-m"]),
        (["a=1,2", "--multirun"], ["--multirun"]),
        (["a=1", "--cfg", "job", "--resolve", "b=2"], ["--cfg", "job", "--resolve"]),
    ],
)
def test_hydras_flags_stand_anywhere(typed, flags):
    overrides = [argument for argument in typed if "=" in argument]
    assert launch.with_overrides(typed, ["own=1"]) == [*overrides, "own=1", *flags]


@pytest.mark.parametrize(
    "typed, value",
    [
        ("out=~/x", "~/x"),
        ("out='~/x'", "~/x"),
        ("out=~", "~"),
        ("dataset=lerobot:~/x", "lerobot:~/x"),
        ("policies=[~/a,b,~/c d]", ["~/a", "b", "~/c d"]),
        ("+deep.root=~someone/x-1.npz", "~someone/x-1.npz"),
        ("dataset=minari:a/b-v0", "minari:a/b-v0"),
    ],
)
def test_hydra_takes_a_home_without_quotes(typed, value):
    parser = pytest.importorskip("hydra.core.override_parser.overrides_parser").OverridesParser.create()
    assert parser.parse_override(launch.quote(typed)).value() == value
    sweep = parser.parse_override(launch.quote("dataset=~/a,b,~/c"))
    assert list(sweep.sweep_string_iterator()) == ["'~/a'", "b", "'~/c'"]
    assert parser.parse_override(launch.quote("~trainer")).is_delete()


def test_home_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = OmegaConf.create({"out": "~/x", "dataset": "minari:a", "deep": {"root": "~"}, "n": 1})
    launch.expand_home(cfg)
    assert cfg == {
        "out": f"{tmp_path}/x",
        "dataset": "minari:a",
        "deep": {"root": str(tmp_path)},
        "n": 1,
    }
    with pytest.raises(InputError, match="out=~nobody_here/x: there is no such home directory"):
        launch.expand_home(OmegaConf.create({"out": "~nobody_here/x"}))


def test_an_encoder_is_found_by_its_path():
    assert function_at("torch.Tensor.float") is torch.Tensor.float
    for path in ("no_such_module.encode", "torch.no_such_function", "torch.pi"):
        with pytest.raises(InputError, match=f"encoder={path}: no function is found there"):
            function_at(path)


def test_a_source_that_names_no_environment_differs_from_none(capsys):
    say_what_differs("log.npz", None, {}, "LunarLander-v3", {"continuous": True})
    assert capsys.readouterr().out == ""
    say_what_differs("log", "LunarLander-v3", {}, "LunarLander-v3", {"continuous": True})
    assert "LunarLander-v3 with {'continuous': True}: of log it is made without" in capsys.readouterr().out
