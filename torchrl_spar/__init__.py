"""SPAR (Support-Preserving Action Rectification) for offline reinforcement learning, as TorchRL components."""

from torchrl_spar.anchor import FrozenAnchor
from torchrl_spar.build import make_anchor, make_spar_loss
from torchrl_spar.data.buffer import OfflineReplayBuffer, load_offline_dataset
from torchrl_spar.data.chunks import chunk_actions
from torchrl_spar.data.observations import flatten_observation
from torchrl_spar.data.returns import returns_to_go
from torchrl_spar.data.toy import make_toy_data
from torchrl_spar.diagnostics import gradient_cosine, normal_share, support_distance, tangent_normal_split
from torchrl_spar.errors import InputError, NonFiniteError
from torchrl_spar.evaluation.background import BackgroundEvaluator
from torchrl_spar.evaluation.environments import environment_sizes, make_env
from torchrl_spar.evaluation.guard import GuardedActor, SupportDetector, fit_detector
from torchrl_spar.evaluation.policy_file import load_policy, save_policy
from torchrl_spar.evaluation.reference_scores import normalized_score, reference_returns
from torchrl_spar.evaluation.rollouts import evaluate
from torchrl_spar.mean_actor import mean_actor
from torchrl_spar.objective import SPARLoss
from torchrl_spar.ope.estimate import estimate_value
from torchrl_spar.ope.fit import fit_fqe, fit_fqe_each
from torchrl_spar.ope.fqe_loss import FQELoss
from torchrl_spar.ope.select import residual_family, select_policy
from torchrl_spar.residual import GaussianEncoder, ResidualHead, ResidualVAE, SPARActor
from torchrl_spar.sharing import share_critics
from torchrl_spar.training.health import HealthCheck, check_finite
from torchrl_spar.training.members import make_member
from torchrl_spar.training.pretrain import fit_anchor, fit_critics, fit_vae, measure_residual_scale, pretrain
from torchrl_spar.training.progress import Progress
from torchrl_spar.training.sampling import BatchSampler, with_anchor_actions, with_member_weights, with_value_targets
from torchrl_spar.training.stacked import StackedSPARLoss
from torchrl_spar.training.update import SPARUpdate

__version__ = "0.1.0"

__all__ = [
    "BackgroundEvaluator",
    "BatchSampler",
    "FQELoss",
    "FrozenAnchor",
    "GaussianEncoder",
    "GuardedActor",
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
    "SupportDetector",
    "check_finite",
    "chunk_actions",
    "environment_sizes",
    "estimate_value",
    "evaluate",
    "fit_anchor",
    "fit_critics",
    "fit_detector",
    "fit_fqe",
    "fit_fqe_each",
    "fit_vae",
    "flatten_observation",
    "gradient_cosine",
    "load_offline_dataset",
    "load_policy",
    "make_anchor",
    "make_env",
    "make_member",
    "make_spar_loss",
    "make_toy_data",
    "mean_actor",
    "measure_residual_scale",
    "normal_share",
    "normalized_score",
    "pretrain",
    "reference_returns",
    "residual_family",
    "returns_to_go",
    "save_policy",
    "select_policy",
    "share_critics",
    "support_distance",
    "tangent_normal_split",
    "with_anchor_actions",
    "with_member_weights",
    "with_value_targets",
]
