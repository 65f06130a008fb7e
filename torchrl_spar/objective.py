"""SPAR (Support-Preserving Action Rectification, https://arxiv.org/abs/2605.27877) as one TorchRL loss.

A behaviour policy ``a_b = pi_b(s)`` is cloned from the data and frozen. The policy adds a
residual to it, ``pi(s) = clamp(a_b + rho * Delta(s, a_b))``, and is improved in three parts:

1. ``vae_loss``: a conditional VAE learns the data's residuals ``r = (a - a_b) / rho``, so
   that its latent space covers the corrections the data supports.
2. ``qvalue_loss`` and ``value_loss``: critics bootstrap from a lower bound of the slowly
   moving policy's own action, never from an unconstrained maximum.
3. ``actor_loss``: Latent Self-Imitation. Candidates are sampled in the latent space, weighted by
   their conservative value beside the policy's own residual, and regressed onto.
   No gradient of a critic with respect to an action is ever taken.

What is the paper's and what is our choice is said in each method's docstring.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from torch import Tensor
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator, distance_loss
from torchrl.objectives.value import ValueEstimatorBase

from torchrl_spar.ensemble import Bound, lower_bound, spread
from torchrl_spar.errors import InputError, check_options
from torchrl_spar.functional import call, call_ensemble
from torchrl_spar.residual import ResidualVAE, SPARActor

# exp(2.3) is about 10: no sample weighs more than ten average ones before normalisation.
TRUST_LOG_WEIGHT_RANGE = (-5.0, 2.3)
TINY = 1e-8


class SPARLoss(LossModule):
    """SPAR: a residual on a frozen anchor, improved by Latent Self-Imitation.

    The sum of the ``loss_*`` entries can be given to one optimiser: each term reaches its own
    parameters alone. Targets (of the critics and of the actor; the latter is the policy to
    deploy, :attr:`actor`) follow by TorchRL's ``SoftUpdate``. ``gamma`` is set by
    :meth:`make_value_estimator`. :func:`~torchrl_spar.make_spar_loss` builds all networks.

    Batches ``[*B]`` are in TED form, in raw units: ``observation [*B, observation_dim]``, ``action [*B, action_dim]``
    and, under ``"next"``, ``observation``, ``reward``, ``done`` and ``terminated`` ``[*B, 1]``; :attr:`in_keys` lists
    them, ``set_keys`` renames them. If the batch holds the ``anchor_action`` of its states, or of the following ones
    under ``"next"``, it is used instead of calling the anchor: it is frozen, so it may be computed once for a data set.

    Args:
        actor_network: the policy, with its anchor and head.
        qvalue_network: one critic, copied ``num_qvalue_nets`` times and drawn anew (TorchRL's
            rule), or a list of critics that keep their own initialisation. Reads the
            observation and the action, writes ``state_action_value`` ``[*B, 1]``.
        value_network: reads the observation, writes ``state_value`` ``[*B, 1]``.
        residual_vae: the conditional VAE over residuals.

    Keyword Args:
        num_qvalue_nets: number of critics E (ours: 4).
        bound: ``"lcb"`` (mean minus ``kappa`` standard deviations) or ``"min"`` (ours: lcb).
        kappa: pessimism of the lower confidence bound (ours: 1).
        expectile: of ``state_value`` (ours: 0.7; 0.9 for sparse mazes; IQL,
            https://arxiv.org/abs/2110.06169).
        value_mix: share of ``state_value`` in the bootstrapped value, between 0 (the
            policy's lower bound alone) and 1 (in-sample value alone) (ours: 0).
        policy_noise: standard deviation of the noise on the bootstrapped action, in half
            action ranges (TD3's 0.2, https://arxiv.org/abs/1802.09477).
        noise_clip: bound of that noise (TD3's 0.5).
        loss_function: TorchRL's name of the critics' regression loss (ours: ``"l2"``).
        reward_scale: factor on the rewards inside the loss, so that learning rates mean the same
            on every data set; :func:`~torchrl_spar.fit_critics` sets it. All values are in scaled units.
        kl_coeff: beta, the weight of the KL in the fit (ours: 0.1).
        joint_vae: whether ``forward`` adds ``loss_vae``. Set it to ``False`` when the VAE was
            trained before by :func:`~torchrl_spar.fit_vae` and is to stay.
        num_candidates: candidates K for each state, the policy's own included (ours: 8).
        candidates: centre of the candidates in the latent: ``"prior"``, its origin, so that they are drawn
            anew from the residuals that the data supports, or ``"policy"``, the policy's own latent (ours: prior).
        latent_std: sigma, the spread of the candidates in the latent (ours: 1, that of the prior).
        latent_bound: candidates are clamped to +- this (ours: 2).
        candidate_dtype: what the hidden layers of the default critics compute in while they score
            candidates, such as ``torch.bfloat16``; by default the parameters' own type. Weights and
            gradients are not touched.
        temperature: tau of the candidates' weights; small is greedy (ours: 0.3).
        lsi_coeff: weight of self-imitation, a buffer that can be scheduled (ours: 1). 0 leaves the term out for good
            (the ablation): a schedule starts above it.
        trust_coeff: lambda, the weight of the advantage-weighted fit to the data's own residuals; likewise (ours: 1).
        latent_reg: head B only, weight of the pull of the latent to its prior (ours: 0).
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (the batch's shape).
        use_prioritized_weights: see TorchRL's losses.

    Raises:
        InputError: for an option out of range, or networks that do not fit together.
        KeyError: when the batch lacks a key, which it names.

    Source: the paper's parts (https://arxiv.org/abs/2605.27877) as far as each method says so; the rest is ours.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_spar import make_spar_loss
        >>> loss = make_spar_loss(3, Bounded(-1, 1, (2,)))
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
        >>> batch = TensorDict({
        ...     "observation": torch.randn(32, 3), "action": torch.rand(32, 2) * 2 - 1,
        ...     "next": {"observation": torch.randn(32, 3), "reward": torch.randn(32, 1),
        ...              "done": torch.zeros(32, 1, dtype=torch.bool),
        ...              "terminated": torch.zeros(32, 1, dtype=torch.bool)}}, [32])
        >>> losses = loss(batch)
        >>> sorted(key for key in losses.keys() if key.startswith("loss_"))
        ['loss_vae', 'loss_qvalue', 'loss_actor', 'loss_value']
        >>> sum(losses[key] for key in losses.keys() if key.startswith("loss_")).backward()
        >>> optimizer.step(); updater.step()
        >>> loss.actor(observation=torch.zeros(1, 3)).shape
        torch.Size([1, 2])
    """

    @dataclass
    class _AcceptedKeys:
        """Tensordict keys, to be changed by ``set_keys``.

        Attributes:
            action: the data's action, and where the actor writes and the critics read theirs.
            anchor_action: the anchor's action.
            action_noise: noise on the bootstrapped action.
            candidate_noise: noise that makes the candidates; the first candidate's is not used.
            latent_noise: the VAE's sample in the fit.
            residual: the scaled residual that the head (A) or decoder (B) writes, the encoder reads.
            latent: the latent that the decoder reads and head B writes.
            latent_loc: the mean that the encoder writes.
            latent_log_std: the log standard deviation that the encoder writes.
            state_action_value: what the critics write.
            value: what the value network writes.
            reward: read under ``"next"``.
            done: read under ``"next"``.
            terminated: read under ``"next"``; alone masks the bootstrap.
            priority: where the TD error is written for prioritised buffers (not in a locked batch).
            priority_weight: importance weights of a prioritised buffer, used when present.
        """

        action: NestedKey = "action"
        anchor_action: NestedKey = "anchor_action"
        action_noise: NestedKey = "action_noise"
        candidate_noise: NestedKey = "candidate_noise"
        latent_noise: NestedKey = "latent_noise"
        residual: NestedKey = "residual"
        latent: NestedKey = "latent"
        latent_loc: NestedKey = "latent_loc"
        latent_log_std: NestedKey = "latent_log_std"
        state_action_value: NestedKey = "state_action_value"
        value: NestedKey = "state_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda)
    # What self_imitation reports.
    lsi_metrics: tuple[str, ...] = (
        "effective_sample_size", "candidate_diversity", "lsi_advantage", "candidate_value_std",
    )  # fmt: skip
    _schedulable_buffers = frozenset({"lsi_coeff", "trust_coeff", "reward_scale"})

    actor_network: SPARActor
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams
    residual_vae: ResidualVAE
    residual_vae_params: TensorDictParams
    target_residual_vae_params: TensorDictParams
    reward_scale: Tensor
    lsi_coeff: Tensor
    trust_coeff: Tensor

    def __init__(
        self,
        actor_network: SPARActor,
        qvalue_network: TensorDictModuleBase | list[TensorDictModuleBase],
        value_network: TensorDictModuleBase,
        residual_vae: ResidualVAE,
        *,
        num_qvalue_nets: int = 4,
        bound: Bound = "lcb",
        kappa: float = 1.0,
        expectile: float = 0.7,
        value_mix: float = 0.0,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        loss_function: str = "l2",
        reward_scale: float = 1.0,
        kl_coeff: float = 0.1,
        joint_vae: bool = True,
        num_candidates: int = 8,
        candidates: Literal["prior", "policy"] = "prior",
        latent_std: float = 1.0,
        latent_bound: float = 2.0,
        candidate_dtype: torch.dtype | None = None,
        temperature: float = 0.3,
        lsi_coeff: float = 1.0,
        trust_coeff: float = 1.0,
        latent_reg: float = 0.0,
        reduction: Literal["mean", "sum", "none"] = "mean",
        use_prioritized_weights: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(actor_network, SPARActor):
            raise InputError(f"actor_network must be a SPARActor, not {type(actor_network).__name__}")
        if actor_network.is_latent and actor_network.decoder is not residual_vae.decoder:
            raise InputError("actor_network: the decoder of a latent head (head B) must be residual_vae.decoder itself")
        check_options(
            (num_qvalue_nets >= 1, "num_qvalue_nets", num_qvalue_nets, "at least 1"),
            (bound in ("lcb", "min"), "bound", bound, "'lcb' or 'min'"),
            (kappa >= 0, "kappa", kappa, "at least 0"),
            (0 < expectile < 1, "expectile", expectile, "between 0 and 1, exclusive"),
            (0 <= value_mix <= 1, "value_mix", value_mix, "between 0 and 1"),
            (policy_noise >= 0, "policy_noise", policy_noise, "at least 0"),
            (noise_clip >= 0, "noise_clip", noise_clip, "at least 0"),
            (loss_function in ("l1", "l2", "smooth_l1"), "loss_function", loss_function, "l1, l2 or smooth_l1"),
            (reward_scale > 0, "reward_scale", reward_scale, "positive"),
            (kl_coeff >= 0, "kl_coeff", kl_coeff, "at least 0"),
            (num_candidates >= 2, "num_candidates", num_candidates, "at least 2 (lsi_coeff=0 turns LSI off)"),
            (candidates in ("prior", "policy"), "candidates", candidates, "'prior' or 'policy'"),
            (latent_std > 0, "latent_std", latent_std, "positive"),
            (latent_bound > 0, "latent_bound", latent_bound, "positive"),
            (temperature > 0, "temperature", temperature, "positive"),
            (lsi_coeff >= 0, "lsi_coeff", lsi_coeff, "at least 0"),
            (trust_coeff >= 0, "trust_coeff", trust_coeff, "at least 0"),
            (lsi_coeff + trust_coeff > 0, "trust_coeff", trust_coeff, "positive where lsi_coeff is 0"),
            (latent_reg == 0 or (latent_reg > 0 and actor_network.is_latent), "latent_reg", latent_reg,
             "0, or positive with a latent head (head B)"),
            (reduction in ("mean", "sum", "none"), "reduction", reduction, "'mean', 'sum' or 'none'"),
        )  # fmt: skip
        self._in_keys: list[NestedKey] | None = None
        self.convert_to_functional(residual_vae, "residual_vae")
        # Head B shares the decoder's parameters with the VAE; the target is then their common average.
        self.convert_to_functional(actor_network, "actor_network", create_target_params=True)
        self.convert_to_functional(value_network, "value_network")
        self.convert_to_functional(qvalue_network, "qvalue_network", num_qvalue_nets, create_target_params=True)
        self.num_qvalue_nets = num_qvalue_nets
        self.bound: Bound = bound
        self.kappa = kappa
        self.expectile = expectile
        self.value_mix = value_mix
        self.policy_noise = policy_noise
        self.noise_clip = noise_clip
        self.loss_function = loss_function
        self.kl_coeff = kl_coeff
        self.joint_vae = joint_vae
        self.num_candidates = num_candidates
        self.candidates = candidates
        self.latent_std = latent_std
        self.latent_bound = latent_bound
        self.candidate_dtype = candidate_dtype
        self.temperature = temperature
        self.latent_reg = latent_reg
        self.has_lsi, self.has_trust = lsi_coeff > 0, trust_coeff > 0
        device = self._default_device
        self.register_coeff_buffer("reward_scale", float(reward_scale), device=device)
        self.register_coeff_buffer("lsi_coeff", float(lsi_coeff), device=device)
        self.register_coeff_buffer("trust_coeff", float(trust_coeff), device=device)
        self.register_load_state_dict_post_hook(_check_terms)
        self.reduction = reduction
        self.use_prioritized_weights = use_prioritized_weights
        self.out_keys = self._list_out_keys()
        # Built now: a state dict loads into a fresh loss only if nothing is lazy.
        self.make_value_estimator(self.default_value_estimator)

    # ------------------------------------------------------------------ the method

    def vae_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """(i) The data's residual manifold: ``|g(z) - r|^2 + beta KL``, means over dimensions.

        Reaches the VAE alone.

        Returns:
            The loss and ``reconstruction_error``, ``kl`` (means, in squared scaled residuals and nats
            a dimension).

        Source: fitting the manifold by residual regression is the paper's, the VAE is ours.
        """
        state = self._anchored(tensordict, self.residual_vae)
        residual = self._data_residual(tensordict, state)
        loc, log_std = self._encode(state, residual)
        noise = tensordict.get(self.tensor_keys.latent_noise, None)
        latent = loc + log_std.exp() * (torch.randn_like(loc) if noise is None else noise)
        error = (self._decode(state, latent) - residual).pow(2).mean(-1)
        kl = (0.5 * (loc.pow(2) + (2 * log_std).exp() - 1) - log_std).mean(-1)
        mask = self._valid(tensordict, error)
        metadata = {
            "reconstruction_error": _masked_mean(error.detach(), mask),
            "kl": _masked_mean(kl.detach(), mask),
        }
        return self._reduce(error + self.kl_coeff * kl, tensordict), metadata

    def value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """In-sample expectile regression of the lower bound at the data's actions.

        Reaches the value network alone.

        Returns:
            The loss, in squared scaled reward units, and no diagnostics.

        Source: IQL (https://arxiv.org/abs/2110.06169); its use here is ours.
        """
        state = tensordict.select(*self._state_keys(self.value_network, self.qvalue_network))
        with torch.no_grad():
            qvalue = self._lower_bound(
                self._qvalue(state, tensordict[self.tensor_keys.action], self.target_params("qvalue_network"))
            )
        difference = qvalue - self._value(state)
        weight = torch.where(difference > 0, self.expectile, 1 - self.expectile)
        return self._reduce(weight * difference.pow(2), tensordict), {}

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """(ii) Conservative value: all critics regress on ``r + gamma (1 - terminated) LCB(s', pi(s') + noise)``.

        The bootstrapped action comes from the moving average of the policy, the bound from
        the target critics. Reaches the critics alone; summed over them.

        Returns:
            The loss and ``td_error`` (largest squared error of the critics, ``[*B]``),
            ``pred_value``, ``target_value``, ``next_state_value`` (means).

        Source: conservative values are the paper's; bound, noise (TD3) and targets are ours.
        """
        with torch.no_grad():
            keys = self.tensor_keys
            next_value = self._next_value(tensordict["next"], tensordict.get(keys.action_noise, None))
            outcome = tensordict.select(*(_under_next(key) for key in (keys.reward, keys.done, keys.terminated)))
            outcome.set(_under_next(keys.reward), self.reward_scale * outcome[_under_next(keys.reward)])
            outcome.set(_under_next(keys.value), next_value.unsqueeze(-1))
            # Written by TorchRL's MultiStep and by chunk_actions: gamma to the power of it.
            steps = self.value_estimator.tensor_keys.steps_to_next_obs
            outcome.update(tensordict.select(steps, strict=False))
            target = self.value_estimator.value_estimate(outcome).squeeze(-1)
        loss, metadata = self.qvalue_regression(tensordict, target)
        return loss, metadata | {"next_state_value": _masked_mean(next_value, self._valid(tensordict, target))}

    def qvalue_regression(self, tensordict: TensorDictBase, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Regression of all critics, at the data's actions, on a target ``[*B]`` in scaled reward units.

        Returns:
            As :meth:`qvalue_loss`, without ``next_state_value``.

        Source: ours; :func:`~torchrl_spar.fit_critics` starts the critics with it.
        """
        qvalue = self._qvalue(tensordict, tensordict[self.tensor_keys.action], self.qvalue_network_params)
        error = distance_loss(qvalue, target.expand_as(qvalue), self.loss_function)
        mask = self._valid(tensordict, target)
        metadata = {
            "td_error": (qvalue.detach() - target).pow(2).amax(0),
            "pred_value": _masked_mean(qvalue.detach().mean(0), mask),
            "target_value": _masked_mean(target, mask),
        }
        return self._reduce(error.sum(0), tensordict), metadata

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """(iii) Latent Self-Imitation, held to the data by an advantage-weighted fit.

        Head A regresses its residual, head B its latent, onto the value-weighted mean of the
        candidates (:meth:`self_imitation_target`); both add the trust term
        ``lambda u |Delta - r|^2`` on the data's own residuals (:meth:`trust_weight`). Reaches the
        head alone.

        Returns:
            The loss and the diagnostics of both parts, see the README's list of metrics.

        Source: regression onto value-weighted latent candidates is the paper's; the
        trust term and the scaling of the weights are ours.
        """
        state = self._anchored(tensordict)
        latent, residual = self._rectify(state)
        data_residual = self._data_residual(tensordict, state)
        mask = self._valid(tensordict, residual[..., 0])
        loss = torch.zeros_like(residual[..., 0])
        metadata: dict[str, Tensor] = {}
        if self.has_lsi:
            noise = tensordict.get(self.tensor_keys.candidate_noise, None)
            imitation, diagnostics = self.self_imitation(state, residual, latent, mask, noise)
            loss = loss + self.lsi_coeff * imitation
            metadata.update(diagnostics)
        if self.has_trust:
            weight, diagnostics = self.trust_weight(tensordict, state, residual, mask)
            loss = loss + self.trust_coeff * weight * (residual - data_residual).pow(2).mean(-1)
            metadata.update(diagnostics)
        if latent is not None and self.latent_reg:
            loss = loss + self.latent_reg * latent.pow(2).mean(-1)
        size = _masked_mean(residual.detach().pow(2).mean(-1), mask)
        data_size = _masked_mean(data_residual.pow(2).mean(-1), mask)
        metadata["residual_ratio"] = (size / data_size.clamp_min(TINY)).sqrt()
        return self._reduce(loss, tensordict), metadata

    def self_imitation(
        self,
        state: TensorDictBase,
        residual: Tensor,
        latent: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared distance of the residual (head B: the latent) to :meth:`self_imitation_target`, ``[*B]``.

        Arguments as there; a mean over dimensions. This is the step that improves the policy: a subclass may put
        another in its place, with :attr:`lsi_metrics` as the names of what it reports.

        Source: the regression onto the candidates is the paper's.
        """
        target, diagnostics = self.self_imitation_target(state, residual, latent, mask, noise)
        prediction = residual if latent is None else latent
        return (prediction - target).pow(2).mean(-1), diagnostics

    @torch.no_grad()
    def self_imitation_target(
        self,
        state: TensorDictBase,
        residual: Tensor,
        latent: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the head should have said: the value-weighted mean of its candidates.

        The first candidate is the policy's own latent ``z_0``; the others are ``z_k = clamp(sigma eps_k)``,
        draws of the prior, or with ``candidates="policy"`` its neighbours ``clamp(z_0 + sigma eps_k)``. They are
        decoded to residuals ``r_k`` and actions, and scored by all critics *relative to the
        first*: what the critics share about the state cancels in
        ``d_{e,k} = Q_e(a_k) - Q_e(a_0)``, and ``A_k = LCB_e(d_{e,k})``. The weights are
        ``softmax(A_k / (tau S))`` with one scale S a batch, so that a state where nothing
        is to be gained keeps flat weights.

        Neighbours make it a local step: along the manifold by ``sigma^2 / (tau S) dQ/dz`` where values are linear,
        but in states that are rare in the data many small steps can lead away from it. Draws of the
        prior do not add up: the target depends on where the policy is through one candidate alone.

        Args:
            state: the observation and the anchor's action, batch ``[*B]``.
            residual: the policy's scaled residual ``[*B, action_dim]``.
            latent: head B's latent ``[*B, latent_dim]``; by default the encoder's mean for ``residual``.
            mask: valid positions ``[*B]``.
            noise: standard normal ``[*B, K, latent_dim]``; drawn by default.

        Returns:
            The target (residual, or latent where ``latent`` is given), without gradient,
            and ``effective_sample_size``, ``candidate_diversity`` (rms distance of the candidates to the
            first), ``lsi_advantage`` (weighted mean of ``A_k``), ``candidate_value_std``.

        Source: latent candidates weighted by their conservative value are the paper's; where they are drawn, the
        paired advantages and the scale are ours.
        """
        centre = self._encode(state, residual)[0] if latent is None else latent
        if noise is None:
            noise = centre.new_empty(self.num_candidates - 1, *centre.shape).normal_()
        else:
            noise = noise.movedim(-2, 0)[1:]
        drawn = self.latent_std * noise
        latents = torch.cat((centre.unsqueeze(0), drawn if self.candidates == "prior" else centre + drawn))
        latents = latents.clamp(-self.latent_bound, self.latent_bound)
        residuals = self._decode(state, latents)
        actions = self._compose(state.get(self.tensor_keys.anchor_action), residuals)
        qvalue = self._qvalue(state, actions, self.qvalue_network_params, dtype=self.candidate_dtype)
        difference = qvalue - qvalue[:, :1]
        advantage = self._lower_bound(difference)
        scale = _masked_mean(spread(difference.mean(0)), mask).clamp_min(TINY)
        weight = (advantage / (self.temperature * scale)).softmax(0)
        target = (weight.unsqueeze(-1) * (residuals if latent is None else latents)).sum(0)
        metadata = {
            "effective_sample_size": _masked_mean(1 / weight.pow(2).sum(0), mask),
            "candidate_diversity": _masked_mean((residuals - residuals[:1]).pow(2).mean((0, -1)), mask).sqrt(),
            "lsi_advantage": _masked_mean((weight * advantage).sum(0), mask),
            "candidate_value_std": _masked_mean(spread(qvalue).mean(0), mask),
        }
        return target, metadata

    @torch.no_grad()
    def trust_weight(
        self, tensordict: TensorDictBase, state: TensorDictBase, residual: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """How much the data's own action is to be trusted over the policy's.

        ``u = exp(clip(adv / std(adv)))`` divided by its mean, with ``adv = LCB(s, a) - LCB(s, pi(s))``.
        Without the division the term would vanish exactly where the policy is overestimated.

        Args:
            tensordict: the batch ``[*B]``; its actions are read.
            state: the observation and the anchor's action, batch ``[*B]``.
            residual: the policy's scaled residual ``[*B, action_dim]``.
            mask: valid positions ``[*B]``.

        Returns:
            The weight ``[*B]``, mean one, and ``trust_advantage``, ``data_value_std`` (means).

        Source: ours.
        """
        actions = torch.stack(
            (tensordict[self.tensor_keys.action], self._compose(state.get(self.tensor_keys.anchor_action), residual))
        )
        qvalue = self._qvalue(state, actions, self.qvalue_network_params)
        data_bound, policy_bound = self._lower_bound(qvalue).unbind(0)
        advantage = data_bound - policy_bound
        mean = _masked_mean(advantage, mask)
        std = _masked_mean((advantage - mean).pow(2), mask).sqrt()
        weight = (advantage / std.clamp_min(TINY)).clamp(*TRUST_LOG_WEIGHT_RANGE).exp()
        metadata = {
            "trust_advantage": mean,
            "data_value_std": _masked_mean(spread(qvalue[:, 0]), mask),
        }
        return weight / _masked_mean(weight, mask), metadata

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """All terms on one batch ``[*B]``; see the class for what to do with them.

        Returns:
            A TensorDict of scalars (``loss_*`` of shape ``[*B]`` with ``reduction="none"``): the losses and the
            diagnostics of all terms, named in ``out_keys``.
        """
        tensordict.select(*self._needed_keys(tensordict))  # a missing key is named here, before any work
        batch = tensordict.clone(False)
        # Every term needs the anchor's action: ask once.
        batch.set(self.tensor_keys.anchor_action, self._anchored(batch).get(self.tensor_keys.anchor_action))
        out: dict[str, Tensor] = {}
        terms = {"vae": self.vae_loss} if self.joint_vae else {}
        terms |= {"value": self.value_loss, "qvalue": self.qvalue_loss, "actor": self.actor_loss}
        for name, term in terms.items():
            out[f"loss_{name}"], metadata = term(batch)
            out |= metadata
        td_error = out.pop("td_error")
        if not tensordict.is_locked:
            tensordict.set(self.tensor_keys.priority, td_error)
        return TensorDict(out)

    @torch.no_grad()
    def noise_shapes(self, tensordict: TensorDictBase) -> dict[NestedKey, tuple[int, ...]]:
        """The noise that the terms draw for a batch like this one: keys, and shapes after the batch's own."""
        keys, state = self.tensor_keys, self._anchored(tensordict, self.residual_vae)
        residual = self._data_residual(tensordict, state)
        action, latent = residual.shape[-1], self._encode(state, residual)[0].shape[-1]
        shapes: dict[NestedKey, tuple[int, ...]] = {keys.action_noise: (action,)}
        if self.has_lsi:
            shapes[keys.candidate_noise] = (self.num_candidates, latent)
        if self.joint_vae:
            shapes[keys.latent_noise] = (latent,)
        return shapes

    # ------------------------------------------------------------------ policies

    @property
    def actor(self) -> SPARActor:
        """The policy to deploy: the moving average of the head on the anchor.

        A module of its own that shares the targets' memory, so it follows training;
        ``deepcopy`` it for a snapshot.
        """
        return _stateful(self.actor_network, self.target_params("actor_network"))

    @property
    def anchor(self) -> TensorDictModuleBase:
        """The frozen behaviour policy, ``observation -> action``."""
        return _stateful(self.actor_network, self.actor_network_params).anchor

    @property
    def residual_scale(self) -> Tensor:
        """``rho``: action units of one unit of residual, ``[action_dim]``."""
        return self.actor_network_params.get("residual_scale")

    @residual_scale.setter
    def residual_scale(self, scale: Tensor) -> None:
        for params in (self.actor_network_params, self.target_params("actor_network")):
            params.get("residual_scale").data.copy_(scale)

    # ------------------------------------------------------------------ calls of the networks

    def network_params(self, name: str) -> TensorDictParams:
        """The parameters of ``"actor_network"``, ``"qvalue_network"``, ``"value_network"`` or ``"residual_vae"``."""
        return self._modules[f"{name}_params"]

    def target_params(self, name: str) -> TensorDictParams:
        """The targets of ``"actor_network"`` or ``"qvalue_network"``."""
        # Not by attribute: TorchRL warns there until an updater exists, which pre-training does not need.
        return self._modules[f"target_{name}_params"]

    def _anchored(self, tensordict: TensorDictBase, *readers: TensorDictModuleBase) -> TensorDictBase:
        """The state entries that the readers (by default all but the anchor) need, with the anchor's action."""
        readers = readers or (*self._rectifiers, self.qvalue_network, self.residual_vae)
        state = tensordict.select(*self._state_keys(*readers))
        action = tensordict.get(self.tensor_keys.anchor_action, None)
        if action is None:
            anchor = self.actor_network.anchor
            action = call(anchor, self.actor_network_params.get("anchor"), tensordict, {})[self.tensor_keys.action]
        return state.set(self.tensor_keys.anchor_action, action)

    def _data_residual(self, tensordict: TensorDictBase, state: TensorDictBase) -> Tensor:
        """``r = (a - a_b) / rho``."""
        difference = tensordict[self.tensor_keys.action] - state.get(self.tensor_keys.anchor_action)
        return difference / self.residual_scale

    def _rectify(self, state: TensorDictBase, *, target: bool = False) -> tuple[Tensor | None, Tensor]:
        """The head's latent (head B, else None) and residual; the moving average's with ``target``."""
        actor = self.actor_network
        params = self.target_params("actor_network") if target else self.actor_network_params
        out = call(actor.head, params.get("head"), state, {})
        if not actor.is_latent:
            return None, out[self.tensor_keys.residual]
        latent = out[self.tensor_keys.latent]
        # The decoder is the VAE's own: the head's gradient passes through it and leaves it as it is.
        decoder = params if target else self.residual_vae_params
        return latent, self._decode(state, latent, decoder, frozen=True)

    def _compose(self, anchor_action: Tensor, residual: Tensor) -> Tensor:
        params = self.actor_network_params
        action = anchor_action + params.get("residual_scale") * residual
        return action.clamp(params.get("low"), params.get("high"))

    def _encode(self, state: TensorDictBase, residual: Tensor) -> tuple[Tensor, Tensor]:
        keys, entries = self.tensor_keys, {self.tensor_keys.residual: residual}
        out = call(self.residual_vae.encoder, self.residual_vae_params.get("encoder"), state, entries)
        return out[keys.latent_loc], out[keys.latent_log_std]

    def _decode(
        self, state: TensorDictBase, latent: Tensor, params: TensorDictBase | None = None, *, frozen: bool = False
    ) -> Tensor:
        """The residual of a latent; latents with more leading dimensions repeat the state along them."""
        keys, params = self.tensor_keys, self.residual_vae_params if params is None else params
        out = call(self.residual_vae.decoder, params.get("decoder"), state, {keys.latent: latent}, frozen=frozen)
        return out[keys.residual]

    def _value(self, state: TensorDictBase) -> Tensor:
        return call(self.value_network, self.value_network_params, state, {})[self.tensor_keys.value].squeeze(-1)

    def _qvalue(
        self, state: TensorDictBase, action: Tensor, params: TensorDictBase, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """All critics, ``[E, *B]``; actions with more leading dimensions repeat the state along them."""
        keys = self.tensor_keys
        entries = {keys.action: action}
        out_key = keys.state_action_value
        return call_ensemble(self.qvalue_network, params, state, entries, out_key=out_key, dtype=dtype).squeeze(-1)

    def _lower_bound(self, values: Tensor) -> Tensor:
        return lower_bound(values, bound=self.bound, kappa=self.kappa)

    def _next_value(self, following: TensorDictBase, noise: Tensor | None) -> Tensor:
        """The bootstrapped value of the next state, ``[*B]``."""
        if self.value_mix == 1:
            return self._value(following)
        state = self._anchored(following, *self._rectifiers, self.qvalue_network)
        action = self._compose(state.get(self.tensor_keys.anchor_action), self._rectify(state, target=True)[1])
        low, high = self.actor_network_params.get("low"), self.actor_network_params.get("high")
        noise = torch.randn_like(action) if noise is None else noise
        noise = (noise * self.policy_noise).clamp(-self.noise_clip, self.noise_clip)
        action = (action + noise * (high - low) / 2).clamp(low, high)
        value = self._lower_bound(self._qvalue(state, action, self.target_params("qvalue_network")))
        if self.value_mix > 0:
            value = value.lerp(self._value(following), self.value_mix)
        return value

    # ------------------------------------------------------------------ TorchRL's conventions

    def make_value_estimator(self, value_type: ValueEstimators | None = None, **hyperparams: Any) -> LossModule | None:
        """Chooses the target, ``gamma`` included: ``loss.make_value_estimator(gamma=0.995)``.

        Args:
            value_type: TD0 (default), TD1 or TDLambda; the latter two for ``[B, T]`` batches.
            **hyperparams: ``gamma`` (0.99 by default), ``lmbda``, and what else TorchRL's estimator takes.
        """
        value_type = value_type or self.default_value_estimator
        if isinstance(value_type, (ValueEstimatorBase, type)):
            return super().make_value_estimator(value_type, **hyperparams)
        hyperparams.setdefault("device", self._default_device)
        dispatch_value_estimator(
            self,
            value_type,
            supported=self.SUPPORTED_VALUE_ESTIMATORS,
            tensor_keys={key: getattr(self.tensor_keys, key) for key in ("value", "reward", "done", "terminated")},
            value_network=None,
            **hyperparams,
        )
        return self

    def reset_parameters_recursive(self) -> None:
        """Draws new parameters for every network but the anchor, and copies them to the targets."""
        for name in ("residual_vae", "actor_network", "value_network", "qvalue_network"):
            module, params = getattr(self, name), getattr(self, f"{name}_params").data
            # One member at a time: initialisers read the fan-in off the weight's shape.
            for member in params.unbind(0) if params.ndim else (params,):
                with member.to_module(module, preserve_module_state=False):
                    module.reset_parameters_recursive()
        self.sync_targets()

    def sync_targets(self, *names: str) -> None:
        """Copies networks into their targets: ``"actor_network"`` and ``"qvalue_network"``, by default both."""
        for name in names or ("actor_network", "qvalue_network"):
            self.target_params(name).data.copy_(self._modules[f"{name}_params"].data)

    def __deepcopy__(self, memo: dict[int, Any]) -> SPARLoss:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(deepcopy(self.__dict__, memo))
        if self.actor_network.is_latent:
            # tensordict copies each set of parameters by itself, but head B's decoder is the VAE's.
            new.actor_network_params.set("decoder", new.residual_vae_params.get("decoder").copy())
        return new

    def _state_keys(self, *modules: TensorDictModuleBase) -> list[NestedKey]:
        """What modules read of the state: their in_keys less what this loss writes itself."""
        keys = self.tensor_keys
        internal = {keys.action, keys.anchor_action, keys.residual, keys.latent, keys.latent_loc, keys.latent_log_std}
        read = []
        for module in modules:
            read += module.in_keys
            if isinstance(module, ResidualVAE):
                read += module.decoder.in_keys
        return [key for key in dict.fromkeys(read) if key not in internal]

    @property
    def in_keys(self) -> list[NestedKey]:
        """Every entry the loss reads."""
        if self._in_keys is None:
            keys = self.tensor_keys
            # The anchor may read an action (a chunk's history, say), so its keys are listed whole.
            now = [
                *self.actor_network.in_keys,
                *self._state_keys(self.residual_vae, self.qvalue_network, self.value_network),
            ]
            later = [*self.actor_network.in_keys, *self._state_keys(self.qvalue_network)]
            if self.value_mix > 0:
                later += self._state_keys(self.value_network)
            later += [keys.reward, keys.done, keys.terminated]
            self._in_keys = list(dict.fromkeys([keys.action, *now, *(_under_next(key) for key in later)]))
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    @property
    def _rectifiers(self) -> list[TensorDictModuleBase]:
        """What makes the residual of a state and the anchor's action."""
        actor = self.actor_network
        return [actor.head] if actor.decoder is None else [actor.head, actor.decoder]

    def _needed_keys(self, tensordict: TensorDictBase) -> list[NestedKey]:
        """The in_keys, less what the anchor alone reads where its action is given."""
        keys = self.tensor_keys
        others = self._state_keys(*self._rectifiers, self.residual_vae, self.qvalue_network, self.value_network)
        anchors = {*self.actor_network.anchor.in_keys}.difference(others, [keys.action])
        spared: set[NestedKey] = set()
        if tensordict.get(keys.anchor_action, None) is not None:
            spared.update(anchors)
        if tensordict.get(_under_next(keys.anchor_action), None) is not None:
            spared.update(_under_next(key) for key in anchors)
        return [key for key in self.in_keys if key not in spared]

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        super()._forward_value_estimator_keys(**kwargs)
        self._in_keys = None

    def _list_out_keys(self) -> list[str]:
        fit = ["loss_vae", "reconstruction_error", "kl"] if self.joint_vae else []
        value = ["loss_value", "loss_qvalue", "pred_value", "target_value", "next_state_value"]
        trust = ["trust_advantage", "data_value_std"]
        return [
            *fit, *value, "loss_actor",
            *(self.lsi_metrics if self.has_lsi else ()), *(trust if self.has_trust else []), "residual_ratio",
        ]  # fmt: skip

    def _valid(self, tensordict: TensorDictBase, like: Tensor) -> Tensor | None:
        """The padding mask in the shape of a per-position tensor, or None."""
        valid = None
        for key in self._loss_mask_keys():
            mask = tensordict.get(key, None)
            if mask is not None:
                mask = self._expand_loss_mask(mask, like)
                valid = mask if valid is None else valid & mask
        return valid

    def _reduce(self, loss: Tensor, tensordict: TensorDictBase) -> Tensor:
        # Not TorchRL's _maybe_get_priority_weight, which fails on a nested key.
        use, key = self.use_prioritized_weights in (True, "auto"), self.tensor_keys.priority_weight
        weights = tensordict.get(key, None) if use else None
        return self._reduce_loss(loss, tensordict=tensordict, weights=weights)


def _check_terms(loss: SPARLoss, _: Any) -> None:
    for term, name in ((loss.has_lsi, "lsi_coeff"), (loss.has_trust, "trust_coeff")):
        if not term and getattr(loss, name) > 0:
            raise InputError(f"{name}: positive in the state dict, but this loss was built with {name}=0")


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)


def _under_next(key: NestedKey) -> NestedKey:
    return ("next", *key) if isinstance(key, tuple) else ("next", key)


def _stateful(module: SPARActor, params: TensorDictBase) -> SPARActor:
    """A copy of the module that shares the memory of `params`, without gradient."""
    module = deepcopy(module).requires_grad_(False)
    params.data.to_module(module)
    return module
