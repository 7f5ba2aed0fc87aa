"""Settings of a training run: what there is to set, what each is without a preset, and which values make no sense.

    settings = Settings(train=TrainSettings(lr=1e-3))
    check_settings(settings, "sft")

:mod:`stkit.train.reading` reads them from YAML.
"""

import math
from dataclasses import asdict, dataclass, field

from ..bench.schema import ORDERS, SPLITS, TASKS
from ..runtime import BadUse
from ..sampling import SAMPLINGS, sample_indices
from ..vlm.endpoint import Endpoint
from ..vlm.prompts import STYLES
from ..vlm.video import READERS

STAGES = ("sft", "grpo")
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adamw_8bit")
PRECISIONS = ("auto", "no", "bf16", "fp16")
FORMS = ("timeline", "checked", "paper", "solution", "answer")
VARIANTS = ("grpo", "dr_grpo", "dapo", "gspo")
ESTIMATORS = ("k1", "k2", "k3")
TRACKERS = ("none", "tensorboard", "wandb")


@dataclass(frozen=True)
class ModelSettings:
    """How the model is loaded: see :func:`stkit.load_model`. adapter: merged into the base before training starts."""

    four_bit: bool | None = None
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    adapter: str | None = None


@dataclass(frozen=True)
class LoraSettings:
    """rank 0 trains all weights. targets: last parts of module names, in the language model."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class VideoSettings:
    """Which frames are shown; None for what the benchmark records (see :func:`stkit.evaluate`)."""

    sampling: str | None = None
    frames: int | None = None
    fps: float | None = None
    max_pixels: int | None = None
    reader: str = "auto"


@dataclass(frozen=True)
class DataSettings:
    """Which questions are learned from. per_clip: questions of a clip in one tree (None: all). prompt: its style."""

    split: str | None = "train"
    tasks: tuple[str, ...] = TASKS
    orders: tuple[str, ...] = ORDERS
    limit: int | None = None
    per_clip: int | None = None
    prompt: str = "stkit"


@dataclass(frozen=True)
class TrainSettings:
    """The loop. An update takes ``batch`` clips ``accumulation`` times; at most ``max_tokens`` are computed at once.

    steps: updates; None: ``epochs``. warmup: part of the steps in which the rate rises. tower, projector: trained or
    frozen. save_every, keep: checkpoints. eval_every: updates between scores of ``eval_split`` (0: never), on at most
    eval_limit questions, with answers of at most eval_tokens. Clips of an update are those of all processes together.
    """

    steps: int | None = None
    epochs: float = 1.0
    lr: float = 1e-5
    schedule: str = "cosine"
    warmup: float = 0.1
    batch: int = 1
    accumulation: int = 1
    max_tokens: int = 16_384
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    clip_norm: float = 1.0
    precision: str = "auto"
    checkpointing: bool = False
    tower: bool = False
    projector: bool = False
    save_every: int = 50
    keep: int = 2
    eval_every: int = 0
    eval_split: str = "dev"
    eval_limit: int | None = 64
    eval_tokens: int = 256
    seed: int = 0
    tracker: str = "none"


@dataclass(frozen=True)
class SftSettings:
    """form: what is learned to be written: the time line and what follows from it ("timeline", "checked"), the paper's
    text ("thinking reverse first"), the row's own solution, or the answer alone."""

    form: str = "timeline"


@dataclass(frozen=True)
class GrpoSettings:
    """The algorithm: see :mod:`stkit.train.losses`.

    group: rollouts a question. updates: optimiser steps on one batch of rollouts. kl: estimator of the penalty beta
    times KL to the reference. max_kl: mean KL at which the run stops (None: never). refills: times that dapo draws new
    questions for groups of equal reward. overlong: tokens before the limit over which dapo's penalty rises. patience:
    updates with all rewards equal before a warning. recorded: a rollouts.jsonl to learn from instead of sampling.
    endpoint: URL of an OpenAI-compatible server that draws the rollouts, of the model that it calls ``served``, at most
    ``concurrency`` at a time.
    """

    variant: str = "grpo"
    group: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 256
    think_budget: int | None = None
    beta: float = 0.04
    kl: str = "k3"
    clip_low: float = 0.2
    clip_high: float = 0.2
    updates: int = 1
    max_kl: float | None = None
    refills: int = 3
    overlong: int = 0
    patience: int = 10
    recorded: str | None = None
    endpoint: str | None = None
    served: str | None = None
    concurrency: int = 4


@dataclass(frozen=True)
class Settings:
    """All of it. ``rewards``: weight of each, by name; 0 leaves one out."""

    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    video: VideoSettings = VideoSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    sft: SftSettings = SftSettings()
    grpo: GrpoSettings = GrpoSettings()
    rewards: dict[str, float] = field(default_factory=lambda: {"correct": 1.0, "format": 0.2})

    def to_dict(self) -> dict:
        """Plain values, as they stand in config.yaml."""
        return asdict(self)


def check_settings(settings: Settings, stage: str) -> None:
    """Refuse values that make no sense, by name.

    Raises:
        BadUse: the first of them.
    """
    if stage not in STAGES:
        raise BadUse(f"stage {stage!r} is unknown: use {' or '.join(STAGES)}")
    train, grpo, data = settings.train, settings.grpo, settings.data
    chosen = (
        ("train.schedule", train.schedule, SCHEDULES), ("train.optimizer", train.optimizer, OPTIMIZERS),
        ("train.precision", train.precision, PRECISIONS), ("train.tracker", train.tracker, TRACKERS),
        ("train.eval_split", train.eval_split, SPLITS), ("data.split", data.split, (*SPLITS, None)),
        ("video.sampling", settings.video.sampling, (*SAMPLINGS, None)),
        ("video.reader", settings.video.reader, READERS),
        ("data.prompt", data.prompt, STYLES), ("sft.form", settings.sft.form, FORMS),
        ("grpo.variant", grpo.variant, VARIANTS), ("grpo.kl", grpo.kl, ESTIMATORS),
    )  # fmt: skip
    for name, value, known in chosen:
        if value not in known:
            raise BadUse(f"{name}={value!r} is unknown: use {', '.join(k for k in known if k)}")
    for name, values, known in (("data.tasks", data.tasks, TASKS), ("data.orders", data.orders, ORDERS)):
        if not values or not set(values) <= set(known):
            raise BadUse(f"{name}={list(values)!r}: give some of {', '.join(known)}")
    if settings.lora.rank and not settings.lora.targets:
        raise BadUse("lora.targets=[]: name the modules that get an adapter, or set lora.rank=0 to train all weights")
    _check_numbers(settings)
    if settings.lora.dropout:
        raise BadUse(
            f"lora.dropout={settings.lora.dropout}: branches of a tree share their prefix's mask, so that dropout "
            "would not be exact: set it to 0 (weight_decay regularises)"
        )
    if stage == "grpo" and grpo.group < 2:
        raise BadUse(
            f"grpo.group={grpo.group}: a group of one has no advantage, nothing would be learned: give 2 or more"
        )
    if grpo.endpoint and not grpo.served:
        raise BadUse("grpo.endpoint without grpo.served: give the name by which the server calls the model")
    if grpo.endpoint:
        Endpoint(grpo.endpoint, grpo.served)  # refuses a URL that holds a key, before it is written anywhere
    if grpo.recorded and grpo.endpoint:
        raise BadUse(
            f"grpo.recorded={grpo.recorded!r} and grpo.endpoint={grpo.endpoint!r} both give rollouts: leave one out"
        )
    if stage == "grpo" and not any(settings.rewards.values()):
        raise BadUse(f"rewards={settings.rewards}: every weight is 0, nothing would be learned: give one a weight")


def _check_numbers(settings: Settings) -> None:
    train, grpo, lora, video = settings.train, settings.grpo, settings.lora, settings.video
    positive = {
        "train.lr": train.lr, "train.epochs": train.epochs, "train.steps": train.steps, "train.batch": train.batch,
        "train.accumulation": train.accumulation, "train.max_tokens": train.max_tokens,
        "train.clip_norm": train.clip_norm, "train.save_every": train.save_every, "train.keep": train.keep,
        "train.eval_limit": train.eval_limit, "train.eval_tokens": train.eval_tokens,
        "lora.alpha": lora.alpha, "grpo.group": grpo.group, "grpo.temperature": grpo.temperature,
        "grpo.max_new_tokens": grpo.max_new_tokens, "grpo.updates": grpo.updates, "grpo.max_kl": grpo.max_kl,
        "grpo.patience": grpo.patience, "grpo.concurrency": grpo.concurrency, "data.limit": settings.data.limit, "data.per_clip": settings.data.per_clip,
        "video.fps": video.fps, "video.max_pixels": video.max_pixels,
    }  # fmt: skip
    for name, value in positive.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BadUse(f"{name}={value!r}: give a number above 0")
    least = {
        "train.weight_decay": train.weight_decay, "train.warmup": train.warmup, "train.eval_every": train.eval_every,
        "train.seed": train.seed, "lora.rank": lora.rank, "lora.dropout": lora.dropout, "grpo.beta": grpo.beta,
        "grpo.clip_low": grpo.clip_low, "grpo.clip_high": grpo.clip_high, "grpo.refills": grpo.refills,
        "grpo.overlong": grpo.overlong, "grpo.think_budget": grpo.think_budget,
    }  # fmt: skip
    for name, value in least.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise BadUse(f"{name}={value!r}: give 0 or more")
    for name, value in (("train.warmup", train.warmup), ("grpo.clip_low", grpo.clip_low)):
        if value >= 1:
            raise BadUse(f"{name}={value!r}: give a number below 1")
    if len(train.betas) != 2 or not all(0 <= b < 1 for b in train.betas):
        raise BadUse(f"train.betas={list(train.betas)!r}: give two numbers of at least 0, below 1")
    if bad := [name for name, weight in settings.rewards.items() if not math.isfinite(weight)]:
        raise BadUse(f"rewards.{bad[0]}={settings.rewards[bad[0]]!r}: give a number")
    if grpo.overlong >= grpo.max_new_tokens:
        raise BadUse(f"grpo.overlong={grpo.overlong}: give less than grpo.max_new_tokens={grpo.max_new_tokens}")
    if grpo.think_budget is not None and grpo.think_budget >= grpo.max_new_tokens:
        raise BadUse(f"grpo.think_budget={grpo.think_budget}: give less than grpo.max_new_tokens={grpo.max_new_tokens}")
    if video.frames is not None:
        sample_indices(1, 1.0, "uniform", n=video.frames)  # refuses what it could not sample
