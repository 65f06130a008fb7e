"""SPAR (Support-Preserving Action Rectification) for offline reinforcement learning, as TorchRL components."""

from torchrl_spar.anchor import FrozenAnchor
from torchrl_spar.build import make_anchor, make_spar_loss
from torchrl_spar.chunks import chunk_actions
from torchrl_spar.data import OfflineReplayBuffer, load_offline_dataset
from torchrl_spar.diagnostics import gradient_cosine, normal_share, support_distance, tangent_normal_split
from torchrl_spar.errors import InputError, NonFiniteError
from torchrl_spar.evaluation import environment_sizes, evaluate, make_env
from torchrl_spar.evaluator import BackgroundEvaluator
from torchrl_spar.health import HealthCheck, check_finite
from torchrl_spar.objective import SPARLoss
from torchrl_spar.observations import flatten_observation
from torchrl_spar.policy import load_policy, save_policy
from torchrl_spar.progress import Progress
from torchrl_spar.residual import ResidualHead, ResidualVAE, SPARActor
from torchrl_spar.sampling import BatchSampler, with_anchor_actions
from torchrl_spar.scores import normalized_score, reference_returns
from torchrl_spar.seeds import StackedSPARLoss
from torchrl_spar.training import (
    SPARUpdate,
    fit_anchor,
    fit_residual,
    fit_value,
    measure_residual_scale,
    returns_to_go,
)

__all__ = [
    "BackgroundEvaluator",
    "BatchSampler",
    "FrozenAnchor",
    "HealthCheck",
    "InputError",
    "NonFiniteError",
    "OfflineReplayBuffer",
    "Progress",
    "ResidualHead",
    "ResidualVAE",
    "SPARActor",
    "SPARLoss",
    "SPARUpdate",
    "StackedSPARLoss",
    "check_finite",
    "chunk_actions",
    "environment_sizes",
    "evaluate",
    "fit_anchor",
    "fit_residual",
    "fit_value",
    "flatten_observation",
    "gradient_cosine",
    "load_offline_dataset",
    "load_policy",
    "make_anchor",
    "make_env",
    "make_spar_loss",
    "measure_residual_scale",
    "normal_share",
    "normalized_score",
    "reference_returns",
    "returns_to_go",
    "save_policy",
    "support_distance",
    "tangent_normal_split",
    "with_anchor_actions",
]
