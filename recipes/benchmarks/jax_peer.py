"""SPARUpdate's numbers in JAX: the same work in another library, as a peer for its speed (extra `peers`).

Covers what benchmark.py measures: head A, a frozen VAE, candidates of the prior, one-step targets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax
from torchrl.data import ReplayBuffer

from torchrl_spar import SPARLoss, with_anchor_actions
from torchrl_spar.objective import EVIDENCE_CEILING, EVIDENCE_POWER, TINY, TRUST_LOG_WEIGHT_RANGE

# SPARUpdate's, torch's Adam's and LayerNorm's defaults.
LEARNING_RATES, TARGET_RATE, POLICY_INTERVAL = {"critics": 5e-4, "head": 1e-3}, 0.01, 2
BETA1, BETA2, ADAM_EPS, NORM_EPS = 0.9, 0.999, 1e-8, 1e-5
# A hidden layer's activations while candidates are scored: what stays in a core's cache.
CACHE_BYTES = 2**19
# What an update reads of a row, side by side in one array: one gather a batch.
COLUMNS = (
    "observation", "action", "anchor_action", ("next", "observation"), ("next", "anchor_action"),
    ("next", "reward"), ("next", "terminated"),
)  # fmt: skip
Layers = list[dict[str, Any]]


def start(device: torch.device, threads: int) -> bool:
    """Readies JAX for a device; False where it has none of the kind. Call it before anything else of JAX."""
    os.environ["NPROC"] = str(threads)  # the size of XLA's thread pool on a CPU
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # else JAX takes most of a GPU's memory
    jax.config.update("jax_platforms", device.type)
    jax.config.update("jax_default_matmul_precision", "float32")  # else TF32 on a GPU
    try:
        return bool(jax.devices())
    except RuntimeError:
        return False


class JaxUpdate:
    """The update of a loss that :func:`benchmarks.updates.make_losses` made, from its parameters and options."""

    def __init__(self, loss: SPARLoss) -> None:
        self.loss, self.gamma = loss, float(loss.value_estimator.gamma)

    def initial(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the update changes, and what it only reads."""
        loss = self.loss
        actor, vae = loss.network_params("actor_network"), loss.network_params("residual_vae")
        params, targets = (
            {
                "critics": [_layers(member["module"]) for member in of("qvalue_network").unbind(0)],
                "head": _layers(of("actor_network")["head", "module"]),
            }
            for of in (loss.network_params, loss.target_params)
        )
        moments = {name: (_zeros(network), _zeros(network)) for name, network in params.items()}
        steps = {name: jnp.zeros(()) for name in params}
        norm = vae["decoder", "module", "norm"]
        fixed = {
            "encoder": _layers(vae["encoder", "module", "network"]),
            "decoder": _layers(vae["decoder", "module"]),
            **{name: _array(actor[name]) for name in ("low", "high", "residual_scale")},
            **{name: _array(norm[name]) for name in ("loc", "scale")},
            **{name: _array(getattr(loss, name)) for name in ("reward_scale", "lsi_coeff", "trust_coeff")},
        }
        return {"params": params, "targets": targets, "moments": moments, "steps": steps}, fixed

    def step(
        self, state: dict[str, Any], fixed: dict[str, Any], batch: Mapping[Any, Any], action_noise: Any, latents: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """One update; with latents ``[K - 1, B, latent_dim]``, standard normal, of the head, too."""
        params, targets = state["params"], state["targets"]
        target = self.one_step_target(targets, fixed, batch, action_noise)
        gradients: dict[str, Any] = {}
        losses = jax.value_and_grad(self.qvalue_loss, has_aux=True)
        (_, metrics), gradients["critics"] = losses(params["critics"], fixed, batch, target)
        if latents is not None:
            losses = jax.value_and_grad(self.actor_loss, has_aux=True)
            (_, more), gradients["head"] = losses(params["head"], params["critics"], fixed, batch, latents)
            metrics |= more
        params, moments, steps = dict(params), dict(state["moments"]), dict(state["steps"])
        for name, gradient in gradients.items():
            steps[name] = steps[name] + 1
            params[name], moments[name] = _adam(
                params[name], gradient, moments[name], steps[name], LEARNING_RATES[name]
            )
        targets = jax.tree.map(lambda slow, fast: slow + TARGET_RATE * (fast - slow), targets, params)
        return {"params": params, "targets": targets, "moments": moments, "steps": steps}, metrics

    def one_step_target(self, targets: Any, fixed: Any, batch: Any, noise: Any) -> Any:
        observation, anchor = _standard(fixed, batch["next", "observation"]), batch["next", "anchor_action"]
        action = _compose(fixed, anchor, _mlp(targets["head"], observation, anchor))
        noise = jnp.clip(noise * self.loss.policy_noise, -self.loss.noise_clip, self.loss.noise_clip)
        low, high = fixed["low"], fixed["high"]
        action = jnp.clip(action + noise * (high - low) / 2, low, high)
        value = self._bound(_qvalues(targets["critics"], observation, action))
        alive = 1 - batch["next", "terminated"][..., 0]
        return fixed["reward_scale"] * batch["next", "reward"][..., 0] + self.gamma * alive * value

    def qvalue_loss(self, critics: Any, fixed: Any, batch: Any, target: Any) -> tuple[Any, dict[str, Any]]:
        values = _qvalues(critics, _standard(fixed, batch["observation"]), batch["action"])
        loss = jnp.square(values - target).sum(0).mean()
        return loss, {"loss_qvalue": loss, "pred_value": values.mean(), "target_value": target.mean()}

    def actor_loss(self, head: Any, critics: Any, fixed: Any, batch: Any, latents: Any) -> tuple[Any, dict[str, Any]]:
        observation, anchor = _standard(fixed, batch["observation"]), batch["anchor_action"]
        residual = _mlp(head, observation, anchor)
        data_residual = (batch["action"] - anchor) / fixed["residual_scale"]
        policy = lax.stop_gradient(residual)
        target, scale, metrics = self._self_imitation(critics, fixed, observation, anchor, policy, latents)
        evidence = jnp.minimum((scale / self.loss.evidence_scale) ** EVIDENCE_POWER, EVIDENCE_CEILING)
        weight, more = self._trust(critics, fixed, observation, batch["action"], _compose(fixed, anchor, policy))
        terms = fixed["lsi_coeff"] * evidence * jnp.square(residual - target).mean(-1)
        terms += fixed["trust_coeff"] * weight * jnp.square(residual - data_residual).mean(-1)
        data_size = jnp.maximum(jnp.square(data_residual).mean(), TINY)
        ratio = jnp.sqrt(jnp.square(policy).mean() / data_size)
        loss = terms.mean()
        return loss, {"loss_actor": loss, **metrics, **more, "residual_ratio": ratio}

    def _self_imitation(
        self, critics: Any, fixed: Any, observation: Any, anchor: Any, policy: Any, latents: Any
    ) -> tuple[Any, Any, dict[str, Any]]:
        loss = self.loss
        centre = jnp.split(_mlp(fixed["encoder"], observation, anchor, policy), 2, -1)[0]
        latents = jnp.concatenate([centre[None], loss.latent_std * latents])
        latents = jnp.clip(latents, -loss.latent_bound, loss.latent_bound)
        residuals = _mlp(fixed["decoder"], observation, anchor, latents)
        actions = _compose(fixed, anchor, residuals)
        at_once = len(actions)
        if jax.default_backend() == "cpu":
            width = max(layer["bias"].size for layer in critics[0])
            at_once = max(1, min(at_once, CACHE_BYTES // (4 * width * len(anchor))))
        parts = [actions[first : first + at_once] for first in range(0, len(actions), at_once)]
        values = jnp.concatenate([_qvalues(critics, observation, part) for part in parts], 1)
        difference = values - values[:, :1]
        advantage = self._bound(difference)
        scale = jnp.maximum(_spread(difference.mean(0)).mean(), TINY)
        weight = jax.nn.softmax(advantage / (loss.temperature * scale), 0)
        return (weight[..., None] * residuals).sum(0), scale, {
            "candidate_spread": scale,
            "effective_sample_size": (1 / jnp.square(weight).sum(0)).mean(),
            "candidate_diversity": jnp.sqrt(jnp.square(residuals - residuals[:1]).mean()),
            "lsi_advantage": (weight * advantage).sum(0).mean(),
            "candidate_value_std": _spread(values).mean(),
        }  # fmt: skip

    def _trust(self, critics: Any, fixed: Any, observation: Any, data: Any, policy: Any) -> tuple[Any, dict[str, Any]]:
        values = _qvalues(critics, observation, jnp.stack([data, policy]))
        data_bound, policy_bound = self._bound(values)
        advantage = data_bound - policy_bound
        weight = jnp.exp(jnp.clip(advantage / jnp.maximum(advantage.std(), TINY), *TRUST_LOG_WEIGHT_RANGE))
        metrics = {"trust_advantage": advantage.mean(), "data_value_std": _spread(values[:, 0]).mean()}
        return weight / weight.mean(), metrics

    def _bound(self, values: Any) -> Any:
        return values.mean(0) - self.loss.kappa * _spread(values)


def jax_spar(loss: SPARLoss, data: ReplayBuffer, *, block: int) -> Callable[[], object]:
    """`block` updates a call, as one program that draws its own batches and noise."""
    update = JaxUpdate(loss)
    interval, batch_size = POLICY_INTERVAL, data.batch_size
    rows = with_anchor_actions(loss, data)[:]
    table = jnp.concatenate([_array(rows[key].float()) for key in COLUMNS], 1)
    ends = [sum(rows[key].shape[-1] for key in COLUMNS[: last + 1]) for last in range(len(COLUMNS) - 1)]
    shapes = loss.noise_shapes(rows[:1])
    candidates, latent_dim = shapes["candidate_noise"]
    noise_shapes = (interval, batch_size, *shapes["action_noise"]), (candidates, batch_size, latent_dim)

    def few(carry: tuple[Any, Any], _: None, fixed: Any, table: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
        state, key = carry
        key, *drawn = jax.random.split(key, 4)
        index = jax.random.randint(drawn[0], (interval, batch_size), 0, len(table))
        action_noise, latents = map(jax.random.normal, drawn[1:], noise_shapes)
        metrics: dict[str, Any] = {}
        for i in range(interval):
            parts = jnp.split(table.at[index[i]].get(mode="promise_in_bounds"), ends, -1)
            batch = dict(zip(COLUMNS, parts))
            state, new = update.step(state, fixed, batch, action_noise[i], latents if i == interval - 1 else None)
            metrics |= new
        return (state, key), metrics

    @partial(jax.jit, donate_argnums=0)
    def run(carry: Any, fixed: Any, table: Any) -> tuple[Any, dict[str, Any]]:
        carry, metrics = lax.scan(partial(few, fixed=fixed, table=table), carry, length=block // interval)
        return carry, jax.tree.map(lambda values: values[-1], metrics)

    state, fixed = update.initial()
    carry = state, jax.random.key(0, impl="rbg")

    def call() -> object:
        nonlocal carry
        carry, metrics = run(carry, fixed, table)
        return jax.block_until_ready(metrics)

    return call


def _array(tensor: torch.Tensor) -> Any:
    return jnp.array(tensor.detach().cpu().numpy())


def _layers(params: Any) -> Layers:
    """The layers of a StateMLP: each linear layer and, where one follows, its LayerNorm."""
    layers: Layers = []
    entries = params["mlp"]
    for index in sorted(entries.keys(), key=int):
        weight, bias = (_array(entries[index, name]) for name in ("weight", "bias"))
        if weight.ndim == 2:
            layers.append({"weight": weight.T, "bias": bias})
        else:
            layers[-1] |= {"gain": weight, "shift": bias}
    return layers


def _mlp(layers: Layers, *inputs: Any) -> Any:
    """A StateMLP on inputs ``[B, n]`` and ``[L, B, n]``; the first layer's share of the former is computed once."""
    rank = max(part.ndim for part in inputs)
    out, column = layers[0]["bias"], 0
    for parts in ([x for x in inputs if x.ndim < rank], [x for x in inputs if x.ndim == rank]):
        if parts:
            joined = jnp.concatenate(parts, -1)
            out = out + joined @ layers[0]["weight"][column : column + joined.shape[-1]]
            column += joined.shape[-1]
    for layer, following in pairwise(layers):
        if "gain" in layer:
            mean = out.mean(-1, keepdims=True)
            variance = jnp.square(out).mean(-1, keepdims=True) - jnp.square(mean)
            out = (out - mean) * (lax.rsqrt(variance + NORM_EPS) * layer["gain"]) + layer["shift"]
        out = jax.nn.relu(out) @ following["weight"] + following["bias"]
    return out


def _qvalues(critics: list[Layers], observation: Any, action: Any) -> Any:
    return jnp.stack([_mlp(critic, observation, action)[..., 0] for critic in critics])


def _standard(fixed: Any, observation: Any) -> Any:
    return (observation - fixed["loc"]) / fixed["scale"]


def _compose(fixed: Any, anchor: Any, residual: Any) -> Any:
    return jnp.clip(anchor + fixed["residual_scale"] * residual, fixed["low"], fixed["high"])


def _spread(values: Any) -> Any:
    return jnp.sqrt(jnp.square(values - values.mean(0)).mean(0))


def _zeros(network: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, network)


def _adam(params: Any, gradient: Any, moments: tuple[Any, Any], step: Any, rate: float) -> tuple[Any, tuple[Any, Any]]:
    first = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, moments[0], gradient)
    second = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, moments[1], gradient)
    size, correction = rate / (1 - BETA1**step), lax.rsqrt(1 - BETA2**step)
    move = lambda p, m, v: p - size * m / (jnp.sqrt(v) * correction + ADAM_EPS)  # noqa: E731
    return jax.tree.map(move, params, first, second), (first, second)
