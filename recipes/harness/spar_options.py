"""The options of SPAR, shared by the recipes that train it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from harness.data_options import DataOptions
from harness.options import option, recipe_options


@dataclass
class Phase:
    """A phase of pre-training."""

    steps: int = option(20_000, "Gradient steps; 0 leaves the phase out.", least=0)
    lr: float = option(1e-3, "Initial learning rate of Adam (cosine to zero).", least=0)


@dataclass
class Loss:
    """Options of make_spar_loss and SPARLoss, whose docstrings tell their source."""

    hidden: list[int] = option([128, 128], "Widths of the hidden layers of every network.", least=1)
    head: str = option("residual", "What the head writes (head A or B).", choices=("residual", "latent"))
    latent_dim: int | None = option(None, "Size of the latent; null: twice the action's.", least=1)
    gamma: float = option(0.99, "Discount.", least=0, most=1)
    num_qvalue_nets: int = option(4, "Number of critics.", least=1)
    bound: str = option("lcb", "Lower bound of the critics.", choices=("lcb", "min"))
    kappa: float = option(1.0, "Standard deviations that the bound lcb takes off the mean.", least=0)
    value_mix: float = option(
        0.0, "Share of the in-sample value in the bootstrapped one; the rest is the policy's.", least=0, most=1
    )
    expectile: float = option(0.7, "Expectile of the in-sample value, below 1.", above=0, most=1)
    lmbda: float = option(1.0, "Decay of the traces along the data; 0: one-step targets.", least=0, most=1)
    cut_margin: float = option(0.1, "Advantage below which a trace is cut, in scaled returns.", least=0)
    cut_temperature: float = option(0.1, "How fast a trace falls beyond it, likewise.", above=0)
    policy_noise: float = option(0.2, "Noise on the action of one-step targets, in half action ranges.", least=0)
    noise_clip: float = option(0.5, "Bound of that noise.", least=0)
    loss_function: str = option("l2", "Regression loss of the critics.", choices=("l1", "l2", "smooth_l1"))
    kl_coeff: float = option(0.1, "Weight of the KL in the VAE's loss.", least=0)
    joint_vae: bool = option(False, "Whether the VAE is trained in the main phase, too.")
    num_candidates: int = option(8, "Candidates for each state.", least=2)
    candidates: str = option("prior", "Centre of the candidates in the latent.", choices=("prior", "policy"))
    latent_std: float = option(1.0, "Spread of the candidates in the latent.", above=0)
    latent_bound: float = option(2.0, "Candidates are clamped to plus and minus this.", above=0)
    candidate_dtype: str | None = option(
        None, "What the critics' hidden layers compute in while they score candidates, e.g. bfloat16; null: float32."
    )
    temperature: float = option(0.3, "Temperature of the candidates' weights; small is greedy.", above=0)
    evidence_scale: float | None = option(
        0.02,
        "Spread of the candidates' values, in scaled returns, at which self-imitation weighs lsi_coeff, or less where "
        "the data's advantages differ little; null: always lsi_coeff.",
        above=0,
    )
    lsi_coeff: float = option(1.0, "Weight of Latent Self-Imitation; 0 leaves it out.", least=0)
    trust_coeff: float = option(1.0, "Weight of the advantage-weighted fit to the data; 0 leaves it out.", least=0)


@dataclass
class SharedOptions(DataOptions):
    """What recipes that train on a data set have in common."""

    seed: int = option(0, "Seed of networks, sampling and evaluation.", least=0)
    device: str | None = option(None, "cpu, cuda, ...; null: cuda if there is one, else cpu.")
    threads: int = option(1, "Torch threads (one is fastest for small networks).", least=1)
    batch_size: int = option(128, "Transitions in a batch, in every phase.", least=1)
    resume: bool = option(
        False, "Whether to resume the run in `out` from its last checkpoint, with the options it was started with."
    )
    anchor: Phase = option(Phase(), "The behaviour policy that is cloned and frozen.")
    vae: Phase = option(Phase(), "The residuals' VAE, trained before the main phase.")
    critics: Phase = option(Phase(3_000), "The critics' warm start on the data's returns-to-go.")
    episode_share: float = option(0.5, "Share of the episodes that each critic learns from.", above=0, most=1)


@dataclass
class Spar:
    """The main phase."""

    updates: int = option(24_000, "Updates of the critics, of each member.", least=1)
    members: int = option(
        3,
        "Policies that are trained on one anchor, each with critics of its own; the mean of their residuals is the "
        "policy. Each costs a start of the critics and a main phase.",
        least=1,
    )
    qvalue_lr: float = option(5e-4, "Learning rate of the critics.", least=0)
    actor_lr: float = option(1e-3, "Learning rate of the residual head.", least=0)
    target_rate: float = option(0.01, "Polyak rate of all targets, the deployed head included.", least=0, most=1)
    target_interval: int | None = option(
        2_000,
        "Updates between two renewals of the critics' targets, which take a pass over the data; null: one-step.",
        least=1,
    )
    policy_interval: int = option(2, "Updates of the critics for one of the head.", least=1)
    decay: bool = option(True, "Whether both learning rates fall to zero along a cosine.")
    critic_share: float = option(
        0.5,
        "Part of the updates after which the critics stay as they are and the head alone is trained; needs decay.",
        above=0,
        most=1,
    )
    compile: bool = option(
        False,
        "Whether updates go through torch.compile, which needs a C++ compiler (on a GPU Triton): minutes to start, "
        "some seconds once torch has cached it, then faster. On a GPU they are CUDA graphs anyway.",
    )
    loss: Loss = option(Loss(), "Options of the loss.")


@dataclass
class Eval:
    background: bool = option(
        True, "Evaluate in a process of its own, beside training; false: in line. The numbers are the same."
    )
    interval: int = option(2_000, "Updates between two evaluations of the curve.", least=1)
    episodes: int = option(10, "Episodes of each evaluation of the curve.", least=1)
    final_episodes: int = option(20, "Episodes of the final evaluation of anchor and SPAR (the results).", least=1)


@dataclass
class OPE:
    """Fitted Q Evaluation at the end: always without an environment, else with select=ope."""

    steps: int = option(20_000, "Gradient steps of each policy's critics.", least=0)
    warm_steps: int = option(3_000, "Gradient steps of their start on the returns-to-go.", least=0)
    num_qvalue_nets: int = option(5, "Critics.", least=1)
    held_out: float = option(0.2, "Share of the episodes that these critics do not see.", above=0, most=0.5)
    confidence: float = option(0.95, "Confidence of each bound of an interval.", above=0.5, most=0.999)
    gamma: float | None = option(
        None, "Discount of the estimated values; null: the one the policy was trained with.", least=0, most=1
    )


@dataclass
class CheckpointOptions:
    seconds: float = option(
        60.0,
        "Seconds of training between two checkpoints: the most that a kill costs. A checkpoint takes about 0.1 s; "
        "checkpoints are removed when the run is finished.",
        least=0,
    )


@dataclass
class Logger:
    backend: str = option(
        "csv",
        "metrics.csv is always written; beside it: csv (nothing more), tensorboard (into out/log), wandb, mlflow "
        "(into out/mlflow.db, or to MLFLOW_TRACKING_URI) or trackio. A resumed run starts a new one there.",
    )
    interval: int = option(100, "Updates between two rows.", least=1)


@recipe_options("spar_d4rl")
@dataclass
class Options(SharedOptions):
    """Unless another source is named, a default is this project's choice. Presets are in config/preset/.

    Sizes and steps are those of the quick job, which takes minutes on a CPU; preset=d4rl has the field's.
    """

    seeds: list[int] | None = option(
        None,
        "Several seeds at once, e.g. [0,1,2], each in a directory seed_<n> of out: a process for each core, or one "
        "stack on a GPU.",
    )
    out: str | None = option(
        "outputs/spar_d4rl/${now:%Y-%m-%d_%H-%M-%S}", "Output directory; a used one is refused without resume=true."
    )
    spar: Spar = option(Spar(), "The main phase.")
    eval: Eval = option(Eval(), "Evaluations.")
    ope: OPE = option(OPE(), "Off-policy evaluation, from the log alone.")
    select: str | None = option(
        None,
        "ope: estimates the values of the policies anchor + c * residual from the log, and saves the policy whose gain "
        "over the anchor is surest, or the anchor; null: saves the policy as it is.",
        choices=("ope",),
    )
    select_from: int = option(
        1,
        "With select=ope, at how many evaluations of the curve, evenly spaced up to the last one, the policy is a "
        "candidate; each but the last adds four policies to evaluate.",
        least=1,
    )
    keep_policies: int = option(
        1,
        "At how many evaluations of the curve, evenly spaced up to the last one, the policy is kept: the last as "
        "policy.pt, the others as policy_<updates>.pt, which ope_study.py reads, too.",
        least=1,
    )
    checkpoint: CheckpointOptions = option(CheckpointOptions(), "Checkpoints.")
    logger: Logger = option(Logger(), "Logs.")
    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"preset": None}])
