"""Chunks of actions: the rows against loops, the discount of several steps, training and playing on them."""

from __future__ import annotations

import pytest
import torch
from helpers import ACTION, OBSERVATION, buffer_of, make_batch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, TensorDictReplayBuffer
from torchrl.data.datasets import LeRobotExperienceReplay
from torchrl.modules.models import ACTModel

from torchrl_spar import (
    InputError,
    SPARUpdate,
    chunk_actions,
    fit_critics,
    fit_vae,
    load_offline_dataset,
    make_spar_loss,
    with_anchor_actions,
)

LENGTHS, TERMINATED = (5, 2, 7, 3), (True, False, False, True)


def episodes() -> TensorDictReplayBuffer:
    """Episodes of 5, 2, 7 and 3 steps, the second and the third cut off."""
    data = make_batch(sum(LENGTHS))
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    terminated = torch.zeros(len(data), 1, dtype=torch.bool)
    terminated[ends[torch.tensor(TERMINATED)]] = True
    truncated = torch.zeros_like(terminated)
    truncated[ends[1]] = True  # the end of the third is told by "episode" alone
    data["next", "terminated"], data["next", "truncated"] = terminated, truncated
    data["next", "done"] = terminated | truncated
    data["episode"] = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
    return buffer_of(data)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_rows_are_those_of_a_loop(length):
    memory = episodes()
    rows, data, gamma = chunk_actions(memory, length, gamma=0.9)[:], memory[:], 0.9
    expected, start = [], 0
    for size, ended in zip(LENGTHS, TERMINATED):
        for t in range(start, start + size):
            steps = min(length, start + size - t)
            if steps < length and not ended:
                continue
            played = [data["action"][t + min(i, steps - 1)] for i in range(length)]
            reward = sum(gamma**i * data["next", "reward"][t + i] for i in range(steps))
            expected.append((t, torch.cat(played), reward, t + steps - 1, steps))
        start += size
    assert len(rows) == len(expected)
    for row, (t, action, reward, last, steps) in zip(rows, expected):
        assert torch.equal(row["observation"], data["observation"][t])
        assert torch.equal(row["action"], action)
        torch.testing.assert_close(row["next", "reward"], reward)
        for key in ("observation", "done", "terminated"):
            assert torch.equal(row["next", key], data["next", key][last])
        assert row["steps_to_next_obs"].tolist() == [steps]


def test_returns_of_chunks_are_those_of_single_steps():
    data = episodes()[:]
    data["next", "terminated"][6] = data["next", "terminated"][13] = True  # all ends are terminal: no bootstrap
    data["next", "done"] = data["next", "terminated"].clone()
    rows, gamma = chunk_actions(buffer_of(data), 3, gamma=0.9)[:], 0.9
    for index, row in enumerate(data):
        rewards = data["next", "reward"][index:][data["episode"][index:] == row["episode"]]
        expected = sum(gamma**i * reward for i, reward in enumerate(rewards))
        torch.testing.assert_close(rows["return_to_go"][index], expected)


def test_wrong_lengths_are_named():
    for length in (0, 9):
        memory = episodes()
        if length:
            memory = buffer_of(memory[:7].set(("next", "terminated"), torch.zeros(7, 1, dtype=torch.bool)))
        with pytest.raises(InputError, match=f"length={length}"):
            chunk_actions(memory, length)


def test_critics_bootstrap_over_all_steps():
    """gamma to the power of steps_to_next_obs, which TorchRL's MultiStep writes too, as [*B]."""
    gamma, batch = 0.9, make_batch(12)
    steps = torch.arange(12) % 4 + 1
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hidden=[8], gamma=gamma, value_mix=1.0)
    with torch.no_grad(), loss.value_network_params.to_module(loss.value_network):
        following = loss.value_network(batch["next"].copy())["state_value"]
    alive = ~batch["next", "terminated"]
    for given in (steps, steps.unsqueeze(-1)):
        target = batch["next", "reward"] + gamma ** steps.unsqueeze(-1) * alive * following
        metadata = loss.qvalue_loss(batch.clone().set("steps_to_next_obs", given))[1]
        torch.testing.assert_close(metadata["target_value"], target.mean())
        torch.testing.assert_close(loss.qvalue_loss(batch)[1]["target_value"],
                                   (batch["next", "reward"] + gamma * alive * following).mean())  # fmt: skip


def test_critics_start_from_returns_of_single_steps():
    loss = make_spar_loss(OBSERVATION, Bounded(-1, 1, (2 * ACTION,)), hidden=[8])
    rows = with_anchor_actions(loss, chunk_actions(episodes(), 2))
    fit_critics(loss, rows, steps=1)
    torch.testing.assert_close(loss.reward_scale, 1 / rows[:]["return_to_go"].std())
    with pytest.raises(InputError, match="return_to_go"):
        fit_critics(loss, buffer_of(rows[:].exclude("return_to_go")), steps=1)


def test_from_lerobot_data_to_a_better_chunk():
    """States are drawn anew, the reward of a step is -(a - 0.5)^2: the best chunk is (0.5, 0.5)."""
    torch.manual_seed(0)
    count, size = 200, 5
    last = torch.arange(count * size) % size == size - 1
    action = 2 * torch.rand(count * size, 1) - 1
    columns = {
        "observation.state": torch.randn(count * size, 3), "action": action,
        "episode_index": torch.arange(count).repeat_interleave(size), "frame_index": torch.arange(size).repeat(count),
        "next.reward": -(action - 0.5).squeeze(-1).pow(2), "next.done": last,
    }  # fmt: skip
    read = LeRobotExperienceReplay.from_columns(columns, rehydrate=True)[:]
    ted = TensorDict(
        {
            "observation": read["observation", "state"], "action": read["action"], "episode": read["episode"],
            "next": {
                # The reader leaves NaN after a last frame; here they are terminal, so nothing reads what follows.
                "observation": read["next", "observation", "state"].nan_to_num(),
                "reward": read["next", "reward"], "terminated": read["next", "done"],
            },
        }, [len(read)],
    )  # fmt: skip
    memory = chunk_actions(load_offline_dataset(ted, batch_size=128), 2, gamma=0.9)

    model = ACTModel(3, 1, 2, hidden_dim=16, nheads=2, num_encoder_layers=1, num_decoder_layers=1, latent_dim=2)
    anchor = TensorDictSequential(
        TensorDictModule(model, ["observation"], ["chunk", "mu", "log_var"]),
        TensorDictModule(nn.Flatten(-2), ["chunk"], ["action"]),
    )
    with torch.no_grad():
        model.action_head.weight.zero_()  # the mean of the data, what cloning would end at
        model.action_head.bias.zero_()
    loss = make_spar_loss(
        3, Bounded(-1, 1, (2,)), anchor=anchor, hidden=[32], joint_vae=False, gamma=0.9, evidence_scale=None
    )
    rows = with_anchor_actions(loss, memory)
    fit_critics(fit_vae(loss, rows, steps=100), rows, steps=100)
    update = SPARUpdate(loss, target_rate=0.02, actor_lr=3e-3, policy_interval=1)
    for _ in range(200):
        update(rows.sample())
    played = loss.actor(observation=torch.randn(256, 3)).mean(0)
    assert (played > 0.15).all() and (played < 0.75).all(), played  # the data and the anchor have 0


def test_a_chunk_is_played_in_order():
    gymnasium = pytest.importorskip("gymnasium")
    from torchrl.envs import GymEnv, MultiAction, TransformedEnv

    torch.manual_seed(0)
    loss = make_spar_loss(3, Bounded(-2, 2, (3,)), hidden=[8])
    policy = TensorDictSequential(loss.actor, TensorDictModule(nn.Unflatten(-1, (3, 1)), ["action"], ["action"]))
    env = TransformedEnv(GymEnv("Pendulum-v1"), MultiAction())
    env.set_seed(0)
    rollout = env.rollout(2, policy)
    plain = gymnasium.make("Pendulum-v1").unwrapped
    plain.reset()
    start = rollout["observation"][0].double()
    plain.state = [torch.atan2(start[1], start[0]).item(), start[2].item()]
    for chunk, expected in zip(rollout["action"], rollout["next", "observation"]):
        for action in chunk:
            observation, *_ = plain.step(action.numpy())
        torch.testing.assert_close(torch.from_numpy(observation), expected, rtol=0, atol=1e-4)
