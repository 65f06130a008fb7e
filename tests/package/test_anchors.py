"""Every kind of policy as the anchor: its own mode is played, and it stays what it was."""

from __future__ import annotations

import io

import pytest
import torch
from helpers import ACTION, OBSERVATION, make_batch, total
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.utils import step_mdp
from torchrl.modules import (
    MLP,
    DiffusionActor,
    LSTMModule,
    NormalParamExtractor,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
    set_recurrent_mode,
)
from torchrl.modules.models import ACTModel
from torchrl.objectives import BCLoss, DiffusionBCLoss, IQLLoss, SoftUpdate

from torchrl_spar import (
    BatchSampler,
    InputError,
    SPARUpdate,
    evaluate,
    fit_critics,
    fit_vae,
    make_anchor,
    make_spar_loss,
    with_anchor_actions,
)

LOW, HIGH = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 1.0, 3.0])
SPEC = Bounded(LOW, HIGH, (ACTION,))


def gaussian() -> ProbabilisticActor:
    network = nn.Sequential(MLP(OBSERVATION, 2 * ACTION, num_cells=[8]), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"], distribution_class=TanhNormal, distribution_kwargs={"low": LOW, "high": HIGH},
        spec=SPEC, return_log_prob=True,
    )  # fmt: skip


def squashed(loc: torch.Tensor) -> torch.Tensor:
    return LOW + (loc.tanh() + 1) / 2 * (HIGH - LOW)


def gaussian_mode(actor: ProbabilisticActor, observation: torch.Tensor) -> torch.Tensor:
    return squashed(actor[0].module[0](observation)[..., :ACTION])


def train_batch() -> TensorDict:
    batch = make_batch(12)
    return batch.set("action", LOW + (batch["action"] + 1) / 2 * (HIGH - LOW))


def with_zero_residual(loss):
    for params in (loss.actor_network_params, loss.target_params("actor_network")):
        for key, tensor in params.get("head").items(True, True):
            if key[-1] in ("weight", "bias"):
                tensor.data.zero_()
    return loss


def check(actor, mode, batch, spec=SPEC) -> None:
    """What every anchor must do: `mode` is its action on the batch's observations, worked out without it."""
    trained = {name: parameter.requires_grad for name, parameter in actor.named_parameters()}
    loss = make_spar_loss(OBSERVATION, spec, anchor=actor, hidden=[8])
    low, high = loss.actor_network_params.get("low"), loss.actor_network_params.get("high")
    assert {name: parameter.requires_grad for name, parameter in actor.named_parameters()} == trained
    before = {key: value.clone() for key, value in loss.anchor.state_dict().items()}
    assert any(key.endswith("weight") for key in before)

    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    updater = SoftUpdate(loss, tau=0.5)
    for _ in range(2):
        total(loss(batch.clone())).backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
    loss.reset_parameters_recursive()
    loss.train()
    head = loss.actor_network_params.get("head")
    loss.actor_loss(batch)[0].backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in head.values(True, True) if tensor.requires_grad)
    for key, value in loss.anchor.state_dict().items():
        assert torch.equal(value, before[key]), key

    # Twice: the second call draws other random numbers, if it draws any.
    for _ in range(2):
        torch.testing.assert_close(loss.anchor(batch.clone())["action"], mode)
    torch.testing.assert_close(with_zero_residual(loss).actor(batch.clone())["action"], mode.clamp(low, high))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------- TorchRL's actors


def test_gaussian():
    actor, batch = gaussian(), train_batch()
    check(actor, gaussian_mode(actor, batch["observation"]).detach(), batch)


def test_diffusion_denoises_from_zero_without_noise():
    actor, batch = DiffusionActor(ACTION, OBSERVATION, num_steps=4), train_batch()
    optimizer, cloning = torch.optim.Adam(actor.parameters(), lr=1e-3), DiffusionBCLoss(actor)
    cloning(batch)["loss_diffusion_bc"].backward()
    optimizer.step()
    betas = torch.linspace(1e-4, 0.02, 4)
    alphas = 1 - betas
    action = torch.zeros(12, ACTION)
    with torch.no_grad():
        for t in (3, 2, 1, 0):  # the mean of each reverse step (DDPM, algorithm 2)
            inputs = torch.cat((action, batch["observation"], torch.full((12, 1), float(t))), -1)
            noise = actor.module.score_network(inputs)
            action = (action - betas[t] / (1 - alphas[: t + 1].prod()).sqrt() * noise) / alphas[t].sqrt()
    check(actor, action, batch)


def test_act_plays_the_prior_mean_of_its_latent():
    length = 2
    model = ACTModel(
        OBSERVATION, ACTION, length, hidden_dim=16, nheads=2, num_encoder_layers=1, num_decoder_layers=1, latent_dim=4
    )
    actor = TensorDictSequential(
        TensorDictModule(model, ["observation"], ["chunk", "mu", "log_var"]),
        TensorDictModule(nn.Flatten(-2), ["chunk"], ["action"]),
    )
    batch = train_batch()
    batch["action"] = batch["action"].repeat(1, length)
    mode = model.eval()(batch["observation"])[0].flatten(-2).detach()
    model.train()  # with its dropout
    check(actor, mode, batch, Bounded(LOW.repeat(length), HIGH.repeat(length), (length * ACTION,)))


@pytest.mark.filterwarnings("ignore")  # IQLLoss has no target updater here
def test_from_a_checkpoint_of_a_torchrl_loss():
    def build() -> IQLLoss:
        critic = ValueOperator(MLP(OBSERVATION + ACTION, 1, num_cells=[8]), in_keys=["observation", "action"])
        loss = IQLLoss(gaussian(), critic, ValueOperator(nn.Linear(OBSERVATION, 1), in_keys=["observation"]))
        loss.make_value_estimator(gamma=0.9)  # else a state dict with its buffer does not load
        return loss

    old, batch = build(), train_batch()
    optimizer = torch.optim.Adam(old.parameters(), lr=0.1)
    old.actor_loss(batch.clone())[0].backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(old.state_dict(), file)
    file.seek(0)
    new = build()
    new.load_state_dict(torch.load(file, weights_only=True))
    with old.actor_network_params.to_module(old.actor_network):
        mode = gaussian_mode(old.actor_network, batch["observation"]).detach()
    check(new.actor_network, mode, batch)


# ---------------------------------------------------------------- Stable-Baselines3's policies


@pytest.fixture
def sb3():
    pytest.importorskip("stable_baselines3")
    import numpy as np
    from gymnasium.spaces import Box
    from stable_baselines3 import common, sac, td3

    spaces = Box(-np.inf, np.inf, (OBSERVATION,)), Box(LOW.numpy(), HIGH.numpy())
    policies = {"sac": sac.MlpPolicy, "td3": td3.MlpPolicy, "ppo": common.policies.ActorCriticPolicy}

    def build(name):
        """A policy, and its weights as a zip file of Stable-Baselines3 holds them (policy.pth)."""
        policy = policies[name](*spaces, lambda _: 1e-3)
        with torch.no_grad():  # its last layers start at almost zero
            for parameter in policy.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return policy, policy.state_dict()

    return build


def predicted(policy, batch):
    return torch.from_numpy(policy.predict(batch["observation"].numpy(), deterministic=True)[0])


def load(network: nn.Module, weights: dict[str, torch.Tensor], names: dict[str, str]) -> nn.Module:
    """Takes from a state dict what lies under the given names."""
    found = {
        key.replace(old, new, 1): value
        for old, new in names.items() for key, value in weights.items() if key.startswith(f"{old}.")
    }  # fmt: skip
    network.load_state_dict(found)
    return network


def test_weights_of_sb3s_sac(sb3):
    """actor.latent_pi.*, actor.mu: a ReLU network, a tanh to the bounds."""
    (policy, weights), batch = sb3("sac"), train_batch()
    names = {"actor.latent_pi.0": "0.0", "actor.latent_pi.2": "0.2", "actor.mu": "1", "actor.log_std": "2"}

    class Head(nn.Sequential):
        def forward(self, observation):
            body, loc, log_std = self
            features = body(observation).relu()
            return loc(features), log_std(features).clamp(-20, 2).exp()

    network = Head(
        MLP(OBSERVATION, 256, num_cells=[256], activation_class=nn.ReLU), nn.Linear(256, ACTION), nn.Linear(256, ACTION)
    )
    actor = ProbabilisticActor(
        TensorDictModule(load(network, weights, names), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"], distribution_class=TanhNormal, distribution_kwargs={"low": LOW, "high": HIGH},
    )  # fmt: skip
    check(actor, predicted(policy, batch), batch)


def test_weights_of_sb3s_ppo(sb3):
    """mlp_extractor.policy_net.*, action_net: a tanh network whose output is cut off at the bounds."""
    (policy, weights), batch = sb3("ppo"), train_batch()
    names = {"mlp_extractor.policy_net.0": "0", "mlp_extractor.policy_net.2": "2", "action_net": "4"}
    network = load(MLP(OBSERVATION, ACTION, num_cells=[64, 64], activation_class=nn.Tanh), weights, names)
    mode = network(batch["observation"]).detach()
    torch.testing.assert_close(mode.clamp(LOW, HIGH), predicted(policy, batch))
    check(TensorDictModule(network, ["observation"], ["action"]), mode, batch)


def test_sb3s_own_module(sb3):
    """A deterministic one (TD3's answers in -1 to 1) is taken as it is; one that samples is refused."""
    (policy, _), batch = sb3("td3"), train_batch()
    unit = Bounded(-1, 1, (ACTION,))
    mode = 2 * (predicted(policy, batch) - LOW) / (HIGH - LOW) - 1
    batch["action"] = 2 * (batch["action"] - LOW) / (HIGH - LOW) - 1
    check(TensorDictModule(policy.actor, ["observation"], ["action"]), mode, batch, unit)
    sampling = TensorDictModule(sb3("sac")[0].actor, ["observation"], ["action"])
    with pytest.raises(InputError, match="anchor's action is random"):
        with_anchor_actions(make_spar_loss(OBSERVATION, unit, anchor=sampling, hidden=[8]), buffer(batch))


# ---------------------------------------------------------------- recurrent actors


def recurrent(**options) -> TensorDictSequential:
    lstm = LSTMModule(OBSERVATION, 4, in_key="observation", out_key="features", **options)
    return TensorDictSequential(lstm, TensorDictModule(nn.Linear(4, ACTION), ["features"], ["action"]))


def along(actor, observation):
    """The action at every step of sequences ``[B, T]`` that begin an episode, and both states after it."""
    actions, hidden, cell, state = [], [], [], None
    for x in observation.unbind(1):
        out, state = actor[0].lstm(x.unsqueeze(1), state)
        actions.append(actor[1].module(out.squeeze(1)))
        hidden.append(state[0].transpose(0, 1))
        cell.append(state[1].transpose(0, 1))
    return tuple(torch.stack(parts, 1).detach() for parts in (actions, hidden, cell))


def sequences():
    """Batch ``[4, 6]`` of episodes' beginnings, and observations ``[4, 7]``."""
    batch = make_batch(4, 6)
    observation = torch.randn(4, 7, OBSERVATION)
    batch["observation"], batch["next", "observation"] = observation[:, :-1], observation[:, 1:]
    return batch, observation


def recorded(actor):
    """As a collector records it: the recurrent state at the root and under next, and is_init."""
    batch, observation = sequences()
    actions, hidden, cell = along(actor, observation)
    for name, states in (("h", hidden), ("c", cell)):
        before = torch.cat((torch.zeros_like(states[:, :1]), states[:, :-1]), 1)
        batch[f"recurrent_state_{name}"] = before[:, :-1]
        batch["next", f"recurrent_state_{name}"] = states[:, :-1]
    batch["is_init"] = torch.zeros(4, 6, 1, dtype=torch.bool)
    batch["is_init"][:, 0] = True
    batch["next", "is_init"] = torch.zeros(4, 6, 1, dtype=torch.bool)
    return batch, actions


def test_lstm_on_sequences():
    actor = recurrent(default_recurrent_mode=True)
    batch, actions = recorded(actor)
    check(actor, actions[:, :-1], batch, Bounded(-9, 9, (ACTION,)))


def test_lstm_anchor_on_sequences_on_rows_and_beforehand_are_the_same():
    actor = recurrent()
    batch, actions = recorded(actor)
    loss = make_spar_loss(OBSERVATION, Bounded(-9, 9, (ACTION,)), anchor=actor, hidden=[8])

    def value(batch):
        torch.manual_seed(0)
        out = loss(batch)
        return torch.stack([out[key] for key in sorted(out.keys()) if key.startswith("loss_")])

    with set_recurrent_mode(True):
        expected = value(batch.clone())
    torch.testing.assert_close(value(batch.clone()), expected)  # step by step, each from its recorded state
    plain = sequences()[0].update(batch.select("observation", ("next", "observation")))
    plain["anchor_action"], plain["next", "anchor_action"] = actions[:, :-1], actions[:, 1:]
    torch.testing.assert_close(value(plain.clone()), expected)
    assert not torch.allclose(value(plain.set("anchor_action", 0 * plain["anchor_action"])), expected)
    for key in ("anchor_action", ("next", "anchor_action")):
        with pytest.raises(InputError, match="recurrent_state_h"):
            loss(plain.exclude(key))


def test_lstm_policy_keeps_its_state_when_it_is_played():
    actor = recurrent()
    loss = make_spar_loss(OBSERVATION, Bounded(-9, 9, (ACTION,)), anchor=actor, hidden=[8])
    policy = with_zero_residual(loss).actor
    with pytest.raises(InputError, match=r"reads \['recurrent_state_h', .*InitTracker"):
        evaluate(policy, "Pendulum-v1")
    assert policy.out_keys == ["action", ("next", "recurrent_state_h"), ("next", "recurrent_state_c")]
    observation = torch.randn(4, 5, OBSERVATION)
    state = TensorDict({"is_init": torch.ones(4, 1, dtype=torch.bool)}, [4])
    state["recurrent_state_h"] = state["recurrent_state_c"] = torch.zeros(4, 1, 4)
    for step, expected in enumerate(along(actor, observation)[0].unbind(1)):
        state = policy(state.set("observation", observation[:, step]))
        torch.testing.assert_close(state["action"], expected)
        state["next", "observation"] = observation[:, step]
        state = step_mdp(state).set("is_init", torch.zeros(4, 1, dtype=torch.bool))


def test_lstm_policy_in_a_torchrl_environment():
    pytest.importorskip("gymnasium")
    from torchrl.envs import GymEnv, InitTracker, TransformedEnv

    lstm = LSTMModule(3, 4, in_key="observation", out_key="features")
    actor = TensorDictSequential(lstm, TensorDictModule(nn.Linear(4, 1), ["features"], ["action"]))
    policy = with_zero_residual(make_spar_loss(3, Bounded(-9, 9, (1,)), anchor=actor, hidden=[8])).actor
    env = TransformedEnv(GymEnv("Pendulum-v1"), InitTracker()).append_transform(lstm.make_tensordict_primer())
    rollout = env.rollout(5, policy)
    torch.testing.assert_close(rollout["action"], along(actor, rollout["observation"].unsqueeze(0))[0][0])


def buffer(batch):
    data = batch.reshape(-1)
    storage = LazyTensorStorage(len(data))
    memory = TensorDictReplayBuffer(storage=storage, batch_size=4)
    memory.extend(data)
    return memory


def test_lstm_anchor_through_all_phases():
    actor = recurrent(default_recurrent_mode=True)
    batch, observation = sequences()
    loss = make_spar_loss(OBSERVATION, Bounded(-9, 9, (ACTION,)), anchor=actor, hidden=[8], joint_vae=False)
    with pytest.raises(
        InputError, match=r"lacks \['recurrent_state_h', 'recurrent_state_c', 'is_init'\].*anchor_action"
    ):
        fit_vae(loss, buffer(batch), steps=1)
    actions = along(actor, observation)[0]
    batch["anchor_action"], batch["next", "anchor_action"] = actions[:, :-1], actions[:, 1:]
    data = buffer(batch)
    fit_critics(fit_vae(loss, data, steps=1), data, steps=1)
    expected = (batch["action"] - actions[:, :-1]).pow(2).mean((0, 1)).sqrt()
    torch.testing.assert_close(loss.residual_scale, expected)
    metrics = SPARUpdate(loss, policy_interval=1)(next(BatchSampler(loss, data, length=1, seed=0))[0])
    assert all(value.isfinite().all() for value in metrics.values())


# ---------------------------------------------------------------- refused


def test_random_anchors_are_refused():
    class Noisy(nn.Linear):
        def forward(self, observation):
            return super().forward(observation + torch.randn_like(observation))

    actor = TensorDictModule(Noisy(OBSERVATION, ACTION), ["observation"], ["action"])
    loss = make_spar_loss(OBSERVATION, SPEC, anchor=actor, hidden=[8])
    with pytest.raises(InputError, match="random"):
        fit_vae(loss, buffer(train_batch()), steps=1)


def test_cloned_by_torchrls_loss():
    """make_anchor's own network is an actor of BCLoss; the frozen copy is not what is trained on."""
    actor, batch = make_anchor(OBSERVATION, SPEC, hidden=[8]), train_batch()
    loss = make_spar_loss(OBSERVATION, SPEC, anchor=actor, hidden=[8])
    before = loss.anchor(batch.clone())["action"]
    cloning = BCLoss(actor)
    cloning(batch)["loss_bc"].backward()
    torch.optim.SGD(cloning.parameters(), lr=1.0).step()
    assert not torch.allclose(actor(batch.clone())["action"], before)
    torch.testing.assert_close(loss.anchor(batch.clone())["action"], before)
