"""SPAR (Support-Preserving Action Rectification, https://arxiv.org/abs/2605.27877) as one TorchRL loss.

A behaviour policy ``a_b = pi_b(s)``, the anchor, is cloned from the data and frozen. The policy adds a residual to it:

    pi(s) = clamp(a_b + rho * Delta(s, a_b), low, high)

Three parts train it; ``r = (a - a_b) / rho`` is the data's residual, ``Delta`` the policy's.

1. ``vae_loss``: a conditional VAE learns the data's residuals, so that its latent space covers the corrections that
   the data supports:  ``|g(s, a_b, z) - r|^2 + beta KL``.
2. ``qvalue_loss``: critics learn what the data's trajectories earn, up to where the data errs, and from there a lower
   bound of the slowly moving policy's own action, never an unconstrained maximum:
   ``G_t = r_t + gamma ((1 - c_{t+1}) LCB_e Q_e(s_{t+1}, pi(s_{t+1})) + c_{t+1} G_{t+1})``.
   Each critic learns from its own half of the episodes, so that what all of them say is no luck of one episode.
3. ``actor_loss``: Latent Self-Imitation. Candidates ``z_k`` are drawn in the latent space, weighted by their
   conservative value relative to the policy's own residual, and regressed onto:
   ``|Delta - sum_k w_k g(s, a_b, z_k)|^2``. No gradient of a critic with respect to an action is ever taken.
   A trust term (ours) fits ``Delta`` to the data's residuals, the better ones first: ``u(A) |Delta - r|^2``.

Each method's docstring says what is the paper's and what is our choice. How the networks are called, keys, masks and
targets are in conventions.py.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor

from torchrl_spar.conventions import SPARLossBase, check_shape, masked_mean
from torchrl_spar.data.returns import discounted_sums
from torchrl_spar.data.rows import under_next
from torchrl_spar.ensemble import Bound, lower_bound, spread
from torchrl_spar.errors import InputError, check_options
from torchrl_spar.functional import dtype_of
from torchrl_spar.residual import ResidualVAE, SPARActor

# The weights lie between exp(-5) and exp(2.3) = 10 before they are divided by their mean.
TRUST_LOG_WEIGHT_RANGE = (-5.0, 2.3)
# Self-imitation counts by this power of the evidence, and at most this many times. The evidence is the spread of the
# candidates' values, measured in this share of the spread of the data's advantages where that is the smaller unit.
EVIDENCE_POWER, EVIDENCE_CEILING, ADVANTAGE_SHARE = 6, 8.0, 0.5
TINY = 1e-8
# Rows of a data set that networks are given at once.
ROWS_PER_CALL = 16_384


class SPARLoss(SPARLossBase):
    """SPAR: a residual on a frozen anchor, improved by Latent Self-Imitation.

    The sum of the ``loss_*`` entries can be given to one optimiser: each term reaches its own
    parameters alone. Targets (of the critics and of the actor; the latter is the policy to
    deploy, :attr:`actor`) follow by TorchRL's ``SoftUpdate``. ``gamma`` is set by
    :meth:`make_value_estimator`. :func:`~torchrl_spar.make_spar_loss` builds all networks.

    Batches ``[*B]`` are in TED form, in raw units: ``observation [*B, observation_dim]``, ``action [*B, action_dim]``
    and, under ``"next"``, ``observation``, ``reward``, ``done`` and ``terminated`` ``[*B, 1]``; :attr:`in_keys` lists
    them, ``set_keys`` renames them. If the batch holds the ``anchor_action`` of its states, or of the following ones
    under ``"next"``, it is used instead of calling the anchor: it is frozen, so it may be computed once for a data set.
    Padding, which counts in no term but must be finite, is where ``"mask"`` or ``("collector", "mask")`` ``[*B]`` or
    ``[*B, 1]`` is False; TorchRL's ``loss.loss_mask_key`` names another entry.

    Args:
        actor_network: the policy, with its anchor and head.
        qvalue_network: one critic, copied ``num_qvalue_nets`` times and drawn anew (TorchRL's
            rule), or a list of critics that keep their own initialisation. Reads the
            observation and the action, writes ``state_action_value`` ``[*B, 1]``.
        residual_vae: the conditional VAE over residuals.
        value_network: reads the observation, writes ``state_value`` ``[*B, 1]``; needed where ``value_mix`` is
            positive. Where there is none, there is no ``loss_value``.

    Keyword Args:
        num_qvalue_nets: number of critics E (ours: 4).
        bound: ``"lcb"`` (mean minus ``kappa`` standard deviations) or ``"min"`` (ours: lcb).
        kappa: pessimism of the lower confidence bound (ours: 1).
        expectile: of ``state_value`` (ours: 0.7; 0.9 for sparse mazes; IQL,
            https://arxiv.org/abs/2110.06169).
        value_mix: share of ``state_value`` in the bootstrapped value, between 0 (the
            policy's lower bound alone) and 1 (in-sample value alone) (ours: 0).
        lmbda: decay of the traces that :meth:`value_targets` follows; 0 gives one-step targets (ours: 1).
        cut_margin: how far, in scaled units, the data's action may be below the policy's before its trace is cut
            (ours: 0.1 standard deviations of the returns-to-go).
        cut_temperature: how fast the trace falls beyond it (ours: 0.1, likewise).
        policy_noise: standard deviation of the noise on the bootstrapped action of one-step targets,
            in half action ranges (TD3's 0.2, https://arxiv.org/abs/1802.09477).
        noise_clip: bound of that noise (TD3's 0.5).
        loss_function: TorchRL's name of the critics' regression loss (ours: ``"l2"``).
        reward_scale: factor on the rewards inside the loss, so that learning rates mean the same
            on every data set; :func:`~torchrl_spar.fit_critics` sets it. All values are in scaled units.
        kl_coeff: beta, the weight of the KL in the VAE's loss (ours: 0.1).
        joint_vae: whether ``forward`` adds ``loss_vae``. Set it to ``False`` when the VAE was
            trained before, by :func:`~torchrl_spar.fit_vae`, and is to stay as it is.
        num_candidates: candidates K for each state, the policy's own included (ours: 8).
        candidates: centre of the candidates in the latent space: ``"prior"``, the origin, so that they are drawn
            from the residuals that the data supports, or ``"policy"``, the policy's own latent (ours: prior).
        latent_std: sigma, the spread of the candidates in the latent (ours: 1, that of the prior).
        latent_bound: candidates are clamped to +- this (ours: 2).
        candidate_dtype: what the hidden layers of the default critics compute in while they score
            candidates, such as ``torch.bfloat16`` or ``"bfloat16"``; by default the parameters' own type. Weights
            and gradients are not touched.
        temperature: tau of the candidates' weights; small is greedy (ours: 0.3).
        evidence_scale: the spread of the candidates' values, in scaled units, at which self-imitation weighs
            ``lsi_coeff``, see :meth:`self_imitation`; with None it always does (ours: 0.02 standard deviations of the
            returns-to-go).
        lsi_coeff: weight of self-imitation, a buffer that can be scheduled (ours: 1). 0 removes the term for good,
            for the ablation; a schedule must start above 0.
        trust_coeff: lambda, the weight of the advantage-weighted fit to the data's own residuals; likewise (ours: 1).
        reduction: ``"mean"`` (also by None), ``"sum"`` or ``"none"`` (the batch's shape).
        use_prioritized_weights: see TorchRL's losses.

    Raises:
        InputError: for an option out of range, networks that do not fit together, or a batch that lacks an entry or
            has noise of another shape; it names the culprit.

    Source: the paper's parts (https://arxiv.org/abs/2605.27877) as far as each method says so; the rest is ours.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_spar import make_spar_loss
        >>> loss = make_spar_loss(3, Bounded(-1, 1, (2,)))
        >>> updater = SoftUpdate(loss, tau=0.01)
        >>> optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
        >>> batch = TensorDict({
        ...     "observation": torch.randn(32, 3), "action": torch.rand(32, 2) * 2 - 1,
        ...     "next": {"observation": torch.randn(32, 3), "reward": torch.randn(32, 1),
        ...              "done": torch.zeros(32, 1, dtype=torch.bool),
        ...              "terminated": torch.zeros(32, 1, dtype=torch.bool)}}, [32])
        >>> losses = loss(batch)
        >>> sorted(key for key in losses.keys() if key.startswith("loss_"))
        ['loss_actor', 'loss_qvalue', 'loss_vae']
        >>> sum(losses[key] for key in losses.keys() if key.startswith("loss_")).backward()
        >>> optimizer.step(); updater.step()
        >>> loss.actor(observation=torch.zeros(1, 3)).shape
        torch.Size([1, 2])
    """

    # What self_imitation reports.
    lsi_metrics: tuple[str, ...] = (
        "candidate_spread", "effective_sample_size", "candidate_diversity", "lsi_advantage", "candidate_value_std",
    )  # fmt: skip
    _schedulable_buffers = frozenset({"lsi_coeff", "trust_coeff", "reward_scale"})

    reward_scale: Tensor
    lsi_coeff: Tensor
    trust_coeff: Tensor

    def __init__(
        self,
        actor_network: SPARActor,
        qvalue_network: TensorDictModuleBase | list[TensorDictModuleBase],
        residual_vae: ResidualVAE,
        value_network: TensorDictModuleBase | None = None,
        *,
        num_qvalue_nets: int = 4,
        bound: Bound = "lcb",
        kappa: float = 1.0,
        expectile: float = 0.7,
        value_mix: float = 0.0,
        lmbda: float = 1.0,
        cut_margin: float = 0.1,
        cut_temperature: float = 0.1,
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
        candidate_dtype: torch.dtype | str | None = None,
        temperature: float = 0.3,
        evidence_scale: float | None = 0.02,
        lsi_coeff: float = 1.0,
        trust_coeff: float = 1.0,
        reduction: Literal["mean", "sum", "none"] | None = None,
        use_prioritized_weights: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(
            actor_network, qvalue_network, residual_vae, value_network, num_qvalue_nets=num_qvalue_nets,
            reduction=reduction, use_prioritized_weights=use_prioritized_weights,
        )  # fmt: skip
        self.bound: Bound = bound
        self.kappa = kappa
        self.expectile = expectile
        self.value_mix = value_mix
        self.lmbda = lmbda
        self.cut_margin = cut_margin
        self.cut_temperature = cut_temperature
        self.policy_noise = policy_noise
        self.noise_clip = noise_clip
        self.loss_function = loss_function
        self.kl_coeff = kl_coeff
        self.joint_vae = joint_vae
        self.num_candidates = num_candidates
        self.candidates = candidates
        self.latent_std = latent_std
        self.latent_bound = latent_bound
        self.candidate_dtype = dtype_of(candidate_dtype)
        self.temperature = temperature
        self.evidence_scale = evidence_scale
        self.has_lsi, self.has_trust = lsi_coeff > 0, trust_coeff > 0
        device = self._default_device
        self.register_coeff_buffer("reward_scale", float(reward_scale), device=device)
        self.register_coeff_buffer("lsi_coeff", float(lsi_coeff), device=device)
        self.register_coeff_buffer("trust_coeff", float(trust_coeff), device=device)
        self.register_load_state_dict_post_hook(_check_terms)
        _check_options(self, float(reward_scale), float(lsi_coeff), float(trust_coeff))
        self.out_keys = self._list_out_keys()
        # Built now: a state dict loads into a fresh loss only if nothing is lazy.
        self.make_value_estimator(self.default_value_estimator)

    def __setattr__(self, name: str, value: Any) -> None:
        """Schedules a coefficient; an :class:`~torchrl_spar.InputError` below 0, or above it for a term left out."""
        if name in ("lsi_coeff", "trust_coeff") and isinstance(value, (int, float)):
            check_options((value >= 0, name, value, "at least 0"))
            _check_term(self, name, value, f"set to {value}")
        elif name == "reward_scale" and isinstance(value, (int, float)):
            check_options((value > 0, name, value, "positive"))
        super().__setattr__(name, value)

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
        latent = loc + log_std.exp() * self._noise(tensordict, self.tensor_keys.latent_noise, loc)
        error = (self._decode(state, latent) - residual).pow(2).mean(-1)
        kl = (0.5 * (loc.pow(2) + (2 * log_std).exp() - 1) - log_std).mean(-1)
        mask = self._valid(tensordict, error)
        metadata = {
            "reconstruction_error": masked_mean(error.detach(), mask),
            "kl": masked_mean(kl.detach(), mask),
        }
        return self._reduce(error + self.kl_coeff * kl, tensordict), metadata

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """(ii) Conservative value: regression of all critics on the batch's ``value_target``.

        The target comes from :meth:`value_targets`, which looks along the data's trajectories. Without it a batch is
        regressed onto one step, ``r + gamma (1 - terminated) V(s')`` with ``V(s) = LCB_e Q_e(s, pi(s) + noise)``, the
        policy's moving average and the target critics. Reaches the critics alone; summed over them. Each critic's
        errors count by its ``member_weight``: critics that have seen the same episodes agree on what is luck in them,
        and their lower bound does not warn (:func:`~torchrl_spar.with_member_weights`).

        Returns:
            The loss and ``td_error`` (largest squared error of the critics, ``[*B]``), ``pred_value`` and
            ``target_value`` (means).

        Source: conservative values are the paper's; bound, noise (TD3), targets and weights are ours.
        """
        key = self.tensor_keys.value_target
        target = tensordict.get(key, None)
        if target is None:
            target = self._one_step_target(tensordict)
        else:
            check_shape(target, (*tensordict.batch_size, 1), key)
        return self.qvalue_regression(tensordict, target.squeeze(-1))

    @torch.no_grad()
    def value_targets(self, rows: TensorDictBase, ends: Tensor) -> TensorDict:
        """Targets of a whole data set along its trajectories: Watkins's Q(lambda) with soft cuts.

        ``G_t = r_t + gamma ((1 - c_{t+1}) V(s_{t+1}) + c_{t+1} G_{t+1})`` with ``V(s) = LCB_e Q_e(s, pi(s))``. The
        trace ``c_t = lmbda min(1, exp((A_t + cut_margin) / cut_temperature))`` follows the data while its action is
        about as good as the policy's, ``A_t = mean_e [Q_e(s_t, a_t) - Q_e(s_t, pi(s_t))]``, and bootstraps where the
        data errs. Nothing follows a terminated row; the last row of an episode that was cut off bootstraps.

        One-step targets repeat what the critics believe. Along a trajectory the critics hear what came of an action:
        where all of them are wrong alike, they are corrected before the policy follows them.

        Args:
            rows: the data ``[N]``, episodes in order: what the actor and the critics read.
            ends: whether a row is the last of its episode, ``[N, 1]``.

        Returns:
            A TensorDict ``[N]`` to be stored beside the data: the targets, ``value_target [N, 1]`` in scaled reward
            units, and ``advantage_std [N, 1]``, the standard deviation over all rows of
            ``LCB_e Q_e(s, a) - LCB_e Q_e(s, pi(s))`` in each of them. They age as the critics and the policy move;
            :class:`~torchrl_spar.BatchSampler` renews them.

        Source: ours. Cuts at the data's mistakes are Watkins's (1989); uncorrected traces for conservative values are
            those of Peng's Q(lambda) (https://arxiv.org/abs/2605.14779).
        """
        keys = self.tensor_keys
        values, traces, advantages = [], [], []
        for part in rows.split(ROWS_PER_CALL):
            state, action = self._policy_action(part)
            actions = torch.stack((part[keys.action], action))
            data, policy = self._qvalue(state, actions, self.target_params("qvalue_network")).unbind(1)
            data_bound, policy_bound = self._lower_bound(data), self._lower_bound(policy)
            values.append(self._mixed_value(part, policy_bound))
            advantages.append(data_bound - policy_bound)
            traces.append((((data - policy).mean(0) + self.cut_margin) / self.cut_temperature).exp().clamp(max=1.0))
        outcome, ends = self._outcome(rows), ends.squeeze(-1)
        following = torch.cat(values).roll(-1)  # of all rows but the last of each episode
        following[ends] = torch.cat([self._policy_value(part) for part in rows["next"][ends].split(ROWS_PER_CALL)])
        trace = (self.lmbda * torch.cat(traces).roll(-1)).masked_fill(ends, 0.0)
        reward, terminated = (outcome[under_next(key)].squeeze(-1) for key in (keys.reward, keys.terminated))
        gamma = float(self.value_estimator.gamma) * (~terminated).to(reward)
        targets = discounted_sums(reward + gamma * (1 - trace) * following, gamma * trace)
        advantage_std = spread(torch.cat(advantages)).expand_as(targets).clone()
        found = {keys.value_target: targets, keys.advantage_std: advantage_std}
        return TensorDict({key: value.unsqueeze(-1) for key, value in found.items()}, rows.batch_size)

    @torch.no_grad()
    def _one_step_target(self, tensordict: TensorDictBase) -> Tensor:
        keys = self.tensor_keys
        noise = self._noise(tensordict, keys.action_noise, tensordict[keys.action])
        next_value = self._policy_value(tensordict["next"], noise)
        outcome = self._outcome(tensordict).set(under_next(keys.value), next_value.unsqueeze(-1))
        return self.value_estimator.value_estimate(outcome)

    def _policy_value(self, tensordict: TensorDictBase, noise: Tensor | None = None) -> Tensor:
        """``V(s)``: the lower bound of the moving average's action, ``[*B]``; with noise, of actions near it."""
        if self.value_mix == 1:
            return self._value(tensordict)
        state, action = self._policy_action(tensordict)
        if noise is not None:
            low, high = self.actor_network_params.get("low"), self.actor_network_params.get("high")
            noise = (noise * self.policy_noise).clamp(-self.noise_clip, self.noise_clip)
            action = (action + noise * (high - low) / 2).clamp(low, high)
        value = self._lower_bound(self._qvalue(state, action, self.target_params("qvalue_network")))
        return self._mixed_value(tensordict, value)

    def _mixed_value(self, tensordict: TensorDictBase, value: Tensor) -> Tensor:
        return value.lerp(self._value(tensordict), self.value_mix) if self.value_mix > 0 else value

    def _policy_action(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, Tensor]:
        """What the critics read of the state, and the action of the policy's moving average."""
        state = self._anchored(tensordict, *self._rectifiers, self.qvalue_network)
        return state, self._compose(state.get(self.tensor_keys.anchor_action), self._rectify(state, target=True)[1])

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
            advantage_std = tensordict.get(self.tensor_keys.advantage_std, None)
            imitation, diagnostics = self.self_imitation(state, residual, latent, mask, noise, advantage_std)
            loss = loss + self.lsi_coeff * imitation
            metadata.update(diagnostics)
        if self.has_trust:
            weight, diagnostics = self.trust_weight(tensordict, state, residual, mask)
            loss = loss + self.trust_coeff * weight * (residual - data_residual).pow(2).mean(-1)
            metadata.update(diagnostics)
        size = masked_mean(residual.detach().pow(2).mean(-1), mask)
        data_size = masked_mean(data_residual.pow(2).mean(-1), mask)
        metadata["residual_ratio"] = (size / data_size.clamp_min(TINY)).sqrt()
        return self._reduce(loss, tensordict), metadata

    def self_imitation(
        self,
        state: TensorDictBase,
        residual: Tensor,
        latent: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
        advantage_std: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared distance of the residual (head B: the latent) to :meth:`self_imitation_target`, ``[*B]``.

        It counts by the evidence: times ``(S / unit)^6``, at most eight times, where S is how much the candidates'
        values differ. The unit is ``evidence_scale``, or half of ``advantage_std`` where that is smaller: where all
        values are alike, candidates count if they differ as the data's own actions do. Where they differ less, the
        best of them is the critics' noise: self-imitation fades, and the trust term alone moves the policy.

        A mean over dimensions; arguments as there, and ``advantage_std`` ``[*B, 1]`` of :meth:`value_targets`, without
        which the unit is ``evidence_scale``. This is the step that improves the policy: a subclass may put another in
        its place, with :attr:`lsi_metrics` as the names of what it reports.

        Source: the regression onto the candidates is the paper's; the weight by evidence is ours.
        """
        target, diagnostics = self.self_imitation_target(state, residual, latent, mask, noise)
        prediction = residual if latent is None else latent
        imitation = (prediction - target).pow(2).mean(-1)
        if self.evidence_scale is not None:
            unit: float | Tensor = self.evidence_scale
            if advantage_std is not None:
                check_shape(advantage_std, (*residual.shape[:-1], 1), self.tensor_keys.advantage_std)
                unit = (ADVANTAGE_SHARE * masked_mean(advantage_std.squeeze(-1), mask)).clamp(TINY, self.evidence_scale)
            evidence = (diagnostics["candidate_spread"] / unit).pow(EVIDENCE_POWER)
            imitation = imitation * evidence.clamp(max=EVIDENCE_CEILING)
        return imitation, diagnostics

    @torch.no_grad()
    def self_imitation_target(
        self,
        state: TensorDictBase,
        residual: Tensor,
        latent: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Regression target of the head: the value-weighted mean of its candidates.

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
            noise: standard normal ``[*B, K - 1, latent_dim]`` for all candidates but the first; drawn by default.

        Returns:
            The target (residual, or latent where ``latent`` is given), without gradient,
            and ``candidate_spread`` (S), ``effective_sample_size``, ``candidate_diversity`` (rms distance of the
            candidates to the first), ``lsi_advantage`` (weighted mean of ``A_k``), ``candidate_value_std``.

        Source: latent candidates weighted by their conservative value are the paper's; where they are drawn, the
        paired advantages and the scale are ours.
        """
        centre = self._encode(state, residual)[0] if latent is None else latent
        others = self.num_candidates - 1
        if noise is None:
            noise = centre.new_empty(others, *centre.shape).normal_()
        else:
            shape = (*centre.shape[:-1], others, centre.shape[-1])
            noise = check_shape(noise, shape, self.tensor_keys.candidate_noise).movedim(-2, 0)
        drawn = self.latent_std * noise
        latents = torch.cat((centre.unsqueeze(0), drawn if self.candidates == "prior" else centre + drawn))
        latents = latents.clamp(-self.latent_bound, self.latent_bound)
        residuals = self._decode(state, latents)
        actions = self._compose(state.get(self.tensor_keys.anchor_action), residuals)
        qvalue = self._qvalue(state, actions, self.qvalue_network_params, dtype=self.candidate_dtype)
        difference = qvalue - qvalue[:, :1]
        advantage = self._lower_bound(difference)
        scale = masked_mean(spread(difference.mean(0)), mask).clamp_min(TINY)
        weight = (advantage / (self.temperature * scale)).softmax(0)
        target = (weight.unsqueeze(-1) * (residuals if latent is None else latents)).sum(0)
        metadata = {
            "candidate_spread": scale,
            "effective_sample_size": masked_mean(1 / weight.pow(2).sum(0), mask),
            "candidate_diversity": masked_mean((residuals - residuals[:1]).pow(2).mean((0, -1)), mask).sqrt(),
            "lsi_advantage": masked_mean((weight * advantage).sum(0), mask),
            "candidate_value_std": masked_mean(spread(qvalue).mean(0), mask),
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
        mean = masked_mean(advantage, mask)
        std = masked_mean((advantage - mean).pow(2), mask).sqrt()
        weight = (advantage / std.clamp_min(TINY)).clamp(*TRUST_LOG_WEIGHT_RANGE).exp()
        metadata = {
            "trust_advantage": mean,
            "data_value_std": masked_mean(spread(qvalue[:, 0]), mask),
        }
        # In a batch of padding alone the mean is 0.
        return weight / masked_mean(weight, mask).clamp_min(TINY), metadata

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """All terms on one batch ``[*B]``; see the class for what to do with them.

        Returns:
            A TensorDict of scalars (``loss_*`` of shape ``[*B]`` with ``reduction="none"``): the losses and the
            diagnostics of all terms, named in ``out_keys``.
        """
        self.check_entries(tensordict)
        batch, anchor_key = tensordict.clone(False), self.tensor_keys.anchor_action
        out: dict[str, Tensor] = {}
        terms = {"vae": self.vae_loss} if self.joint_vae else {}
        terms |= {"value": self.value_loss} if self.has_value else {}
        terms |= {"qvalue": self.qvalue_loss, "actor": self.actor_loss}
        try:
            # Every term needs the anchor's action: ask once.
            batch.set(anchor_key, self._anchored(batch).get(anchor_key))
            for name, term in terms.items():
                out[f"loss_{name}"], metadata = term(batch)
                out |= metadata
        except (RuntimeError, KeyError):
            self.explain(batch)
            raise
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
        shapes: dict[NestedKey, tuple[int, ...]] = {}
        if keys.value_target not in tensordict.keys(True):
            shapes[keys.action_noise] = (action,)
        if self.has_lsi:
            shapes[keys.candidate_noise] = (self.num_candidates - 1, latent)
        if self.joint_vae:
            shapes[keys.latent_noise] = (latent,)
        return shapes

    def _lower_bound(self, values: Tensor) -> Tensor:
        return lower_bound(values, bound=self.bound, kappa=self.kappa)

    def _list_out_keys(self) -> list[str]:
        fit = ["loss_vae", "reconstruction_error", "kl"] if self.joint_vae else []
        value = ["loss_value"] if self.has_value else []
        value += ["loss_qvalue", "pred_value", "target_value"]
        trust = ["trust_advantage", "data_value_std"]
        return [
            *fit, *value, "loss_actor",
            *(self.lsi_metrics if self.has_lsi else ()), *(trust if self.has_trust else []), "residual_ratio",
        ]  # fmt: skip


def _check_terms(loss: SPARLoss, _: Any) -> None:
    for name in ("lsi_coeff", "trust_coeff"):
        _check_term(loss, name, getattr(loss, name), "positive in the state dict")


def _check_term(loss: SPARLoss, name: str, value: float | Tensor, what: str) -> None:
    has = {"lsi_coeff": loss.has_lsi, "trust_coeff": loss.has_trust}
    if value > 0 and not has[name]:
        raise InputError(f"{name}: {what}, but this loss was built with {name}=0")


def _check_options(loss: SPARLoss, scale: float, lsi: float, trust: float) -> None:
    # Not from the buffers, which may be on the meta device.
    check_options(
        (loss.bound in ("lcb", "min"), "bound", loss.bound, "'lcb' or 'min'"),
        (loss.kappa >= 0, "kappa", loss.kappa, "at least 0"),
        (0 < loss.expectile < 1, "expectile", loss.expectile, "between 0 and 1, exclusive"),
        (0 <= loss.value_mix <= 1, "value_mix", loss.value_mix, "between 0 and 1"),
        (0 <= loss.lmbda <= 1, "lmbda", loss.lmbda, "between 0 and 1"),
        (loss.cut_margin >= 0, "cut_margin", loss.cut_margin, "at least 0"),
        (loss.cut_temperature > 0, "cut_temperature", loss.cut_temperature, "positive"),
        (loss.policy_noise >= 0, "policy_noise", loss.policy_noise, "at least 0"),
        (loss.noise_clip >= 0, "noise_clip", loss.noise_clip, "at least 0"),
        (loss.loss_function in ("l1", "l2", "smooth_l1"), "loss_function", loss.loss_function, "l1, l2 or smooth_l1"),
        (scale > 0, "reward_scale", scale, "positive"),
        (loss.kl_coeff >= 0, "kl_coeff", loss.kl_coeff, "at least 0"),
        (loss.num_candidates >= 2, "num_candidates", loss.num_candidates, "at least 2 (lsi_coeff=0 turns LSI off)"),
        (loss.candidates in ("prior", "policy"), "candidates", loss.candidates, "'prior' or 'policy'"),
        (loss.latent_std > 0, "latent_std", loss.latent_std, "positive"),
        (loss.latent_bound > 0, "latent_bound", loss.latent_bound, "positive"),
        (loss.temperature > 0, "temperature", loss.temperature, "positive"),
        (loss.evidence_scale is None or loss.evidence_scale > 0, "evidence_scale", loss.evidence_scale, "positive"),
        (lsi >= 0, "lsi_coeff", lsi, "at least 0"),
        (trust >= 0, "trust_coeff", trust, "at least 0"),
        (lsi + trust > 0, "trust_coeff", trust, "positive where lsi_coeff is 0"),
        (loss.has_value or loss.value_mix == 0, "value_mix", loss.value_mix, "0 without a value_network"),
    )
