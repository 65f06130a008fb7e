"""SPARLoss against a slow reference, and what TorchRL expects of a loss."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from helpers import ACTION, OBSERVATION, make_batch, total
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate, ValueEstimators

from torchrl_spar import (
    InputError,
    SPARLoss,
    SPARUpdate,
    fit_vae,
    load_offline_dataset,
    make_spar_loss,
    make_toy_data,
    pretrain,
)

HEADS = ("residual", "latent")
TERMS = ("vae_loss", "value_loss", "qvalue_loss", "actor_loss")


# ---------------------------------------------------------------- a slow reference


def mlp(weights, x, layer_norm=False):
    """The default network by hand: linear, (LayerNorm), ReLU, ..., linear."""
    layers = sorted({int(key[0]) for key in weights.keys(True, True)})
    for layer in layers:
        weight, bias = weights[str(layer), "weight"], weights[str(layer), "bias"]
        if weight.ndim == 1:
            centred = x - x.mean(-1, keepdim=True)
            x = (centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias).relu()
        else:
            x = x @ weight.T + bias
            if layer != layers[-1] and not layer_norm:
                x = x.relu()
    return x


class Reference:
    """Every network of a loss as a plain function on plain tensors."""

    def __init__(self, loss):
        self.loss = loss
        data = {name: loss._modules[name].data for name in loss._modules if name.endswith("_params")}
        self.critics = [data["qvalue_network_params"]["module", "mlp"][e] for e in range(loss.num_qvalue_nets)]
        self.targets = [data["target_qvalue_network_params"]["module", "mlp"][e] for e in range(loss.num_qvalue_nets)]
        self.value_weights = data["value_network_params"]["module", "mlp"]
        self.actor, self.target_actor = data["actor_network_params"], data["target_actor_network_params"]
        self.encoder = data["residual_vae_params"]["encoder", "module", "network", "mlp"]
        self.decoder = data["residual_vae_params"]["decoder", "module", "mlp"]
        self.rho = torch.tensor([0.3, 0.5, 0.8], dtype=self.decoder["0", "weight"].dtype)

    def q(self, s, a, critics):
        return torch.stack([mlp(c, torch.cat([s, a], -1), layer_norm=True)[..., 0] for c in critics])

    def lcb(self, q):
        mean = sum(q) / len(q)
        return mean - self.loss.kappa * (sum((x - mean) ** 2 for x in q) / len(q)).sqrt()

    def anchor(self, s):
        return mlp(self.actor["anchor", "actor", "module", "0", "module", "mlp"], s).tanh()

    def encode(self, s, a_b, r):
        loc, log_std = mlp(self.encoder, torch.cat([s, a_b, r], -1)).chunk(2, -1)
        return loc, log_std.clamp(-4, 4)

    def decode(self, s, a_b, z, weights=None):
        return mlp(self.decoder if weights is None else weights, torch.cat([s, a_b, z], -1))

    def head(self, s, a_b, actor):
        """(latent or None, residual)"""
        out = mlp(actor["head", "module", "mlp"], torch.cat([s, a_b], -1))
        if not self.loss.actor_network.is_latent:
            return None, out
        return out, self.decode(s, a_b, out, actor["decoder", "module", "mlp"])

    def act(self, a_b, residual):
        return (a_b + self.rho * residual).clamp(-1, 1)


@pytest.fixture(params=HEADS)
def case(request, make_loss):
    loss = make_loss(head=request.param).double()
    return loss, Reference(loss), make_batch(12, dtype=torch.float64)


def test_vae_loss_matches_reference(case):
    loss, ref, batch = case
    torch.manual_seed(1)
    value, metadata = loss.vae_loss(batch)
    torch.manual_seed(1)
    s, a_b = batch["observation"], ref.anchor(batch["observation"])
    r = (batch["action"] - a_b) / ref.rho
    loc, log_std = ref.encode(s, a_b, r)
    posterior = torch.distributions.Normal(loc, log_std.exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    error = (ref.decode(s, a_b, loc + log_std.exp() * torch.randn_like(loc)) - r).pow(2).mean()
    torch.testing.assert_close(value, error + 0.1 * kl)
    torch.testing.assert_close(metadata["kl"], kl)


def test_value_loss_matches_reference(case):
    loss, ref, batch = case
    s, a = batch["observation"], batch["action"]
    target = ref.lcb(ref.q(s, a, ref.targets))
    difference = target - mlp(ref.value_weights, s, layer_norm=True)[..., 0]
    expected = sum((0.7 if d > 0 else 0.3) * d**2 for d in difference) / len(difference)
    torch.testing.assert_close(loss.value_loss(batch)[0], expected)


@pytest.mark.parametrize("value_mix", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("gamma", [0.99, 0.9])
def test_qvalue_loss_matches_reference(case, value_mix, gamma):
    loss, ref, batch = case
    loss.value_mix = value_mix
    loss.reward_scale = 0.5
    loss.make_value_estimator(gamma=gamma)
    loss.double()
    torch.manual_seed(2)
    value, metadata = loss.qvalue_loss(batch)
    torch.manual_seed(2)
    s, following = batch["observation"], batch["next", "observation"]
    policy_value = torch.zeros(12, dtype=torch.float64)
    if value_mix < 1:
        a_b = ref.anchor(following)
        action = ref.act(a_b, ref.head(following, a_b, ref.target_actor)[1])
        action = (action + (0.2 * torch.randn_like(action)).clamp(-0.5, 0.5)).clamp(-1, 1)
        policy_value = ref.lcb(ref.q(following, action, ref.targets))
    in_sample = mlp(ref.value_weights, following, layer_norm=True)[..., 0]
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(12):
        bootstrap = (1 - value_mix) * policy_value[i] + value_mix * in_sample[i]
        # A truncated but not terminated position must bootstrap.
        alive = 0.0 if batch["next", "terminated"][i] else 1.0
        target = 0.5 * batch["next", "reward"][i, 0] + gamma * alive * bootstrap
        expected += sum((q[i] - target) ** 2 for q in ref.q(s, batch["action"], ref.critics)) / 12
    torch.testing.assert_close(value, expected)
    assert metadata["td_error"].shape == (12,)


@pytest.mark.parametrize("candidates", ["prior", "policy"])
@pytest.mark.parametrize("bound", ["lcb", "min"])
@pytest.mark.parametrize("evidence_scale", [0.002, 0.05, 5.0])  # at the weight's ceiling, within, and at nothing
@pytest.mark.parametrize("advantage_std", [None, 0.09, 20.0])
def test_actor_loss_matches_reference(case, bound, candidates, evidence_scale, advantage_std):
    loss, ref, batch = case
    loss.evidence_scale = evidence_scale
    if advantage_std is not None:
        batch = batch.copy().set("advantage_std", torch.full((12, 1), advantage_std, dtype=torch.float64))
    unit = min(evidence_scale, (advantage_std or 100.0) / 2)
    loss.bound, loss.candidates, loss.latent_std = bound, candidates, 0.5
    bound_of = ref.lcb if bound == "lcb" else (lambda q: torch.stack(list(q)).min(0).values)
    torch.manual_seed(3)
    value, metadata = loss.actor_loss(batch)
    torch.manual_seed(3)
    s, a = batch["observation"], batch["action"]
    a_b = ref.anchor(s)
    latent, residual = ref.head(s, a_b, ref.actor)
    if latent is not None:
        residual = ref.decode(s, a_b, latent)
    centre = ref.encode(s, a_b, residual)[0] if latent is None else latent
    noise = torch.randn(7, *centre.shape, dtype=torch.float64)
    around = centre if candidates == "policy" else 0
    latents = [(around + 0.5 * noise[k - 1] if k else centre).clamp(-2, 2) for k in range(8)]
    residuals = [ref.decode(s, a_b, z) for z in latents]
    q = [ref.q(s, ref.act(a_b, r), ref.critics) for r in residuals]
    advantage = torch.stack([bound_of(q_k - q[0]) for q_k in q])
    scale = torch.stack([(q_k - q[0]).mean(0) for q_k in q]).std(0, correction=0).mean()
    expected = torch.zeros((), dtype=torch.float64)
    adv = bound_of(ref.q(s, a, ref.critics)) - bound_of(ref.q(s, ref.act(a_b, residual), ref.critics))
    u = (adv / adv.std(correction=0)).clamp(-5, 2.3).exp()
    sizes = []
    for i in range(12):
        raw = [torch.exp((advantage[k, i] - advantage[:, i].max()) / (0.3 * scale)) for k in range(8)]
        weights = [x / sum(raw) for x in raw]
        sizes.append(1 / sum(w**2 for w in weights))
        candidates = residuals if latent is None else latents
        target = sum(w * c[i] for w, c in zip(weights, candidates))
        prediction = residual[i] if latent is None else latent[i]
        expected += ((scale / unit) ** 6).clamp(max=8) * (prediction - target).pow(2).mean()
        expected += u[i] / u.mean() * (residual[i] - (a[i] - a_b[i]) / ref.rho).pow(2).mean()
    torch.testing.assert_close(value, expected / 12)
    torch.testing.assert_close(metadata["effective_sample_size"], sum(sizes) / 12)
    torch.testing.assert_close(metadata["candidate_spread"], scale)
    ratio = residual.pow(2).mean() / ((a - a_b) / ref.rho).pow(2).mean()
    torch.testing.assert_close(metadata["residual_ratio"], ratio.sqrt())


def test_forward_is_the_four_terms(case):
    loss, _, batch = case
    torch.manual_seed(4)
    out = loss(batch)
    torch.manual_seed(4)
    for term in TERMS:
        torch.testing.assert_close(out[f"loss_{term.removesuffix('_loss')}"], getattr(loss, term)(batch)[0])


@pytest.mark.parametrize("head", HEADS)
def test_given_noise_replaces_the_drawn(make_loss, head):
    loss, batch = make_loss(head=head), make_batch(12)
    keys = ["action_noise", "candidate_noise", "latent_noise"]
    torch.manual_seed(0)
    noisy = batch.clone()
    noisy["latent_noise"] = torch.randn(12, 2 * ACTION)
    noisy["action_noise"] = torch.randn(12, ACTION)
    noisy["candidate_noise"] = torch.randn(7, 12, 2 * ACTION).movedim(0, 1)
    torch.manual_seed(0)
    expected = loss(batch)
    found = loss(noisy)
    torch.testing.assert_close(found, expected)
    for key, term in zip(keys, ("loss_qvalue", "loss_actor", "loss_vae")):
        assert loss(noisy.clone().set(key, noisy[key] + 1))[term] != found[term]


def test_candidates_in_bfloat16_are_close_and_leave_weights_and_gradients_in_float32(make_loss):
    plain, rounded = make_loss(evidence_scale=None), make_loss(evidence_scale=None, candidate_dtype="bfloat16")
    rounded.load_state_dict(plain.state_dict())
    batch = make_batch(64)
    values = []
    for loss in (plain, rounded):
        torch.manual_seed(0)
        value, metadata = loss.actor_loss(batch)
        value.backward()
        values.append((value, metadata))
    (value, metadata), (near, near_metadata) = values
    assert near != value and near.dtype == torch.float32  # it does round
    torch.testing.assert_close(near, value, rtol=0.02, atol=0)
    torch.testing.assert_close(near_metadata["trust_advantage"], metadata["trust_advantage"], rtol=0, atol=0)
    assert all(p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == p.dtype) for p in rounded.parameters())


# ---------------------------------------------------------------- gradients


def _minimize(term, params, batch, steps):
    optimizer = torch.optim.Adam(params.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        term(batch)[0].backward()
        optimizer.step()


def test_no_action_gradient_of_the_critic_is_used(make_loss):
    """A critic through which no gradient can pass improves the head all the same."""

    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, observation, action):
            return action.detach().mean(-1, keepdim=True) + self.bias

    reference = make_loss(trust_coeff=0.0)
    critic = ValueOperator(Opaque(), in_keys=["observation", "action"])
    loss = SPARLoss(
        reference.get_stateful_net("actor_network"), critic, reference.get_stateful_net("residual_vae"),
        num_qvalue_nets=1, trust_coeff=0.0,
    )  # fmt: skip
    batch = make_batch(64)
    _minimize(loss.vae_loss, loss.residual_vae_params, batch, 300)
    before = loss.actor_network(batch.copy())["action"].mean()
    _minimize(loss.actor_loss, loss.actor_network_params, batch, 150)
    after = loss.actor_network(batch.copy())["action"].mean()
    assert after > before + 0.1


# ---------------------------------------------------------------- TorchRL's conventions


def test_time_batch_equals_flat_batch(make_loss):
    loss, batch = make_loss(), make_batch(4, 6)
    torch.manual_seed(0)
    grid = loss(batch.copy())
    torch.manual_seed(0)
    flat = loss(batch.reshape(-1).copy())
    for key in grid.keys():
        torch.testing.assert_close(grid[key], flat[key])


@pytest.mark.parametrize("value_type", [ValueEstimators.TD1, ValueEstimators.TDLambda])
def test_multi_step_targets(make_loss, value_type):
    loss, batch = make_loss(), make_batch(4, 6)
    one_step = loss.qvalue_loss(batch)[1]["target_value"]
    loss.make_value_estimator(value_type, gamma=0.9)
    value, metadata = loss.qvalue_loss(batch)
    assert value.isfinite() and metadata["target_value"] != one_step


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("joint_vae", [False, True])
def test_a_copy_trains_as_the_original_does(make_loss, head, joint_vae):
    loss = make_loss(head=head, joint_vae=joint_vae)
    copy = deepcopy(loss)
    start = loss.state_dict()["residual_vae_params.decoder.module.mlp.0.weight"].clone()
    for one in (loss, copy):
        torch.manual_seed(0)
        fit_vae(one, load_offline_dataset(make_batch(32), batch_size=8), steps=3)
        update = SPARUpdate(one)
        for _ in range(4):
            update(make_batch(12))
    assert all(torch.equal(copy.state_dict()[key], value) for key, value in loss.state_dict().items())
    assert not torch.equal(start, copy.state_dict()["residual_vae_params.decoder.module.mlp.0.weight"])
    assert len(list(copy.parameters())) == len(list(loss.parameters()))
    observation = torch.randn(7, OBSERVATION)
    torch.testing.assert_close(copy.actor(observation=observation), loss.actor(observation=observation))


@pytest.mark.parametrize("name", ["lsi_coeff", "trust_coeff"])
def test_a_term_that_was_left_out_is_not_brought_back(make_loss, name):
    state = make_loss().state_dict()
    with pytest.raises(InputError, match=f"{name}: positive in the state dict"):
        make_loss(**{name: 0.0}).load_state_dict(state)
    make_loss().load_state_dict(make_loss(**{name: 0.0}).state_dict())


def test_coefficients_live_where_the_networks_do():
    class Unmoved(SPARLoss):
        def to(self, *args, **kwargs):
            return self

    anchor = TensorDictModule(nn.Linear(3, 2, device="meta"), ["observation"], ["action"])
    loss = make_spar_loss(3, Bounded(-1, 1, (2,)), anchor=anchor, device="meta", loss_class=Unmoved)
    assert {buffer.device.type for buffer in (loss.reward_scale, loss.lsi_coeff, loss.trust_coeff)} == {"meta"}


@pytest.mark.parametrize("head", HEADS)
def test_deployed_actor_follows_the_moving_average(make_loss, head):
    loss = make_loss(head=head)
    updater = SoftUpdate(loss, tau=0.5)
    policy, observation = loss.actor, torch.randn(7, OBSERVATION)
    before = policy(observation=observation)
    with torch.no_grad():
        for p in loss.actor_network_params.parameters():
            p += torch.randn_like(p)
    torch.testing.assert_close(policy(observation=observation), before)
    updater.step()
    assert not torch.allclose(policy(observation=observation), before)
    torch.testing.assert_close(policy(observation=observation), loss.actor(observation=observation))
    assert not any(tensor.requires_grad for tensor in policy.state_dict(keep_vars=True).values())
    assert not any(module.training for module in policy.modules())


def test_train_mode_leaves_the_anchor_in_eval(make_loss):
    loss = make_loss()
    loss.train()
    assert not any(module.training for module in loss.anchor.modules())
    assert not any(module.training for module in loss.actor_network.train().anchor.modules())


def test_done_does_not_mask_the_bootstrap(make_loss):
    loss, batch = make_loss(), make_batch(12)
    batch["next", "terminated"].zero_()
    torch.manual_seed(0)
    expected = loss.qvalue_loss(batch)[0]
    batch["next", "done"].fill_(True)
    torch.manual_seed(0)
    torch.testing.assert_close(loss.qvalue_loss(batch)[0], expected)


def test_dispatch(make_loss):
    loss, batch = make_loss(), make_batch(12)
    loss.select_out_keys("loss_qvalue", "loss_actor")
    torch.manual_seed(0)
    out = loss(**{"_".join(k) if isinstance(k, tuple) else k: batch[k] for k in loss.in_keys})
    loss.reset_out_keys()
    torch.manual_seed(0)
    expected = loss(batch)
    torch.testing.assert_close(out, (expected["loss_qvalue"], expected["loss_actor"]))


def test_given_anchor_actions_replace_the_call(make_loss):
    loss, batch = make_loss(), make_batch(12)
    torch.manual_seed(0)
    expected = total(loss(batch.copy()))
    batch["anchor_action"] = loss.anchor(batch.copy())["action"]
    batch["next", "anchor_action"] = loss.anchor(batch["next"].copy())["action"]
    torch.manual_seed(0)
    torch.testing.assert_close(total(loss(batch.copy())), expected)
    for entry in ("anchor_action", ("next", "anchor_action")):
        changed = batch.clone()
        changed[entry] += 0.1
        torch.manual_seed(0)
        assert total(loss(changed)) != expected


def test_schedulable_coefficients(make_loss):
    loss, batch = make_loss(), make_batch(12)
    torch.manual_seed(0)
    both = loss.actor_loss(batch)[0]
    loss.lsi_coeff = 0.0
    torch.manual_seed(0)
    trust = loss.actor_loss(batch)[0]
    loss.lsi_coeff, loss.trust_coeff = 1.0, 0.0
    torch.manual_seed(0)
    torch.testing.assert_close(loss.actor_loss(batch)[0] + trust, both)
    with pytest.raises(InputError, match=r"reward_scale=-1\.0: must be positive"):
        loss.reward_scale = -1.0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bound", "mean"), ("kappa", -1), ("expectile", 1.0), ("value_mix", 2),
        ("policy_noise", -1), ("noise_clip", -1),
        ("loss_function", "huber"), ("reward_scale", 0),
        ("kl_coeff", -1), ("num_candidates", 1), ("candidates", "data"), ("latent_std", 0), ("latent_bound", 0),
        ("temperature", 0), ("lsi_coeff", -1), ("trust_coeff", -1), ("reduction", "avg"),
        ("num_qvalue_nets", 0), ("head", "C"), ("gamma", 1.1), ("latent_dim", 0),
        ("temprature", 1), ("candidate_dtype", 16), ("candidate_dtype", "int8"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(option, value):
    with pytest.raises(InputError, match=option):
        make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), **{option: value})


def test_an_unknown_option_is_told_from_one_of_another_kind():
    with pytest.raises(InputError, match=r"^temprature: no such option, did you mean temperature\?$"):
        make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), temprature=0.1)
    with pytest.raises(InputError, match=r"^hiden: no such option, did you mean hidden\?$"):
        make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), hiden=[8])
    with pytest.raises(InputError, match=r"^vae\.stepz: no such option, did you mean vae\.steps\?$"):
        pretrain(make_toy_data(), anchor={"steps": 1}, vae={"stepz": 2})
    with pytest.raises(TypeError, match="'>=' not supported"):
        make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), kappa="a")


def test_a_subclass_may_pass_options_on():
    class Own(SPARLoss):
        def __init__(self, *networks, **options):
            self_made = options.pop("own")
            super().__init__(*networks, **options)
            self.own = self_made

    spec = Bounded(-1, 1, (ACTION,))
    loss = make_spar_loss(OBSERVATION, spec, loss_class=Own, own=3, kappa=0.5)
    assert (loss.own, loss.kappa) == (3, 0.5)
    with pytest.raises(InputError, match=r"^kapa: no such option, did you mean kappa\?$"):
        make_spar_loss(OBSERVATION, spec, loss_class=Own, own=3, kapa=0.5)


def test_wrong_specs_and_statistics_are_named():
    with pytest.raises(InputError, match="action_spec"):
        make_spar_loss(OBSERVATION, Bounded(-1, float("inf"), (ACTION,)))
    with pytest.raises(InputError, match="observation_stats"):
        make_spar_loss(OBSERVATION, Bounded(-1, 1, (ACTION,)), observation_stats=(torch.zeros(2), torch.ones(2)))
    with pytest.raises(InputError, match="SPARActor"):
        SPARLoss(nn.Linear(1, 1), None, None)


def test_a_latent_head_needs_the_vaes_own_decoder(make_loss):
    loss = make_loss(head="latent")
    networks = [loss.get_stateful_net(name) for name in ("actor_network", "qvalue_network")]
    with pytest.raises(InputError, match=r"decoder of a latent head .* must be residual_vae\.decoder"):
        SPARLoss(*networks, deepcopy(loss.get_stateful_net("residual_vae")))
