"""Critics that learn from their own halves of the episodes: the draw, the loss, and what it is for."""

from __future__ import annotations

import pytest
import torch
from helpers import buffer_of, build_loss, make_batch
from tensordict import TensorDict

from torchrl_spar import BatchSampler, InputError, SPARUpdate, load_offline_dataset, pretrain, with_member_weights
from torchrl_spar.data.returns import episode_ends


def lucky_data(episodes=60, length=5):
    """Every episode of its own length and place; its return is luck alone, the same for all actions."""
    generator = torch.Generator().manual_seed(0)
    rows = episodes * length
    observation = torch.randn(rows + 1, 3, generator=generator)
    luck = torch.randn(episodes, 1, generator=generator).repeat_interleave(length, 0)
    terminated = torch.arange(rows).unsqueeze(-1) % length == length - 1
    step = {"reward": luck * terminated, "terminated": terminated, "done": terminated}
    action = torch.rand(rows, 2, generator=generator) * 2 - 1
    return TensorDict(
        {"observation": observation[:-1], "action": action, "next": {"observation": observation[1:], **step}}, [rows]
    )


@pytest.mark.parametrize(
    ("members", "share", "each"), [(4, 0.5, 2), (3, 0.5, 2), (2, 0.5, 1), (5, 0.2, 1), (4, 0.01, 1)]
)
def test_every_episode_is_in_the_same_number_of_critics(members, share, each):
    data = make_batch(200)
    loss = build_loss(num_qvalue_nets=members)
    rows = with_member_weights(loss, buffer_of(data), share=share, seed=3)[:]
    weight = rows["member_weight"]
    assert weight.shape == (200, members)
    assert ((weight > 0).sum(-1) == each).all()
    assert torch.allclose(weight[weight > 0], torch.tensor(members / each))
    ends = episode_ends(data).flatten()
    assert torch.equal(weight[1:][~ends[:-1]], weight[:-1][~ends[:-1]])  # one draw an episode
    assert len(weight.unique(dim=0)) > 1


def test_the_draw_depends_on_its_seed_alone():
    loss, buffer = build_loss(), buffer_of(make_batch(200))
    first = with_member_weights(loss, buffer, seed=1)[:]["member_weight"]
    torch.manual_seed(99)
    assert torch.equal(first, with_member_weights(loss, buffer, seed=1)[:]["member_weight"])
    assert not torch.equal(first, with_member_weights(loss, buffer, seed=2)[:]["member_weight"])


def test_nothing_is_shared_out_where_a_critic_would_lack_data():
    buffer = buffer_of(make_batch(200))
    assert with_member_weights(build_loss(num_qvalue_nets=1), buffer) is buffer
    assert with_member_weights(build_loss(), buffer, share=1.0) is buffer
    few = buffer_of(make_batch(12))  # 6 episodes for four critics
    assert with_member_weights(build_loss(), few) is few
    with pytest.raises(InputError, match="share"):
        with_member_weights(build_loss(), buffer, share=0.0)


@pytest.mark.parametrize("method", ["qvalue_loss", "qvalue_regression"])
def test_a_critic_learns_from_its_rows_alone(method):
    """Its gradient is that of the batch without the other rows."""
    loss, batch = build_loss(num_qvalue_nets=2), make_batch(8)
    batch["value_target"] = torch.randn(8, 1)
    weight = torch.tensor([[2.0, 0.0]] * 4 + [[0.0, 2.0]] * 4)

    def gradients(batch):
        loss.zero_grad()
        target = () if method == "qvalue_loss" else (batch["value_target"].squeeze(-1),)
        value = getattr(loss, method)(batch, *target)[0]
        value.backward()
        return [param.grad.clone() for param in loss.qvalue_network_params.parameters()]

    whole = gradients(batch.clone().set("member_weight", weight))
    for member, part in enumerate((batch[:4], batch[4:])):
        for ours, alone in zip(whole, gradients(part)):
            torch.testing.assert_close(ours[member], alone[member])


def test_weights_of_another_ensemble_are_refused():
    with pytest.raises(InputError, match="member_weight"):
        build_loss(num_qvalue_nets=2)(make_batch(8).set("member_weight", torch.ones(8, 3)))


def test_critics_disagree_about_luck():
    """Of returns that say nothing of actions, critics with the same episodes learn the same."""

    def spread(share):
        torch.manual_seed(0)
        data = load_offline_dataset(lucky_data(), batch_size=64)
        phase = {"steps": 20}
        loss, rows = pretrain(data, anchor=phase, vae=phase, critics=phase, episode_share=share, hidden=[32])
        update, sampler = SPARUpdate(loss, qvalue_lr=3e-3), BatchSampler(loss, rows, length=500, seed=0)
        update.run(next(sampler))
        rows = rows[:]
        values = loss._qvalue(rows, rows["action"], loss.qvalue_network_params)
        return values.std(0).mean().item()

    assert spread(0.5) > 2 * spread(1.0)
