"""Settings of a training run: presets in YAML, overrides by ``--set``, every key and value checked before anything runs.

    settings = load_settings("tiny", "sft", {"train.lr": "1e-3"})
    settings.train.lr, settings.grpo.variant

A preset holds the sections below; ``for_sft`` and ``for_grpo`` hold what only that command takes. What a preset leaves
out has the default that stands here.
"""

import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import yaml

from ..bench.schema import ORDERS, SPLITS, TASKS
from ..runs import explain
from ..runtime import BadUse, StkitError
from ..sampling import SAMPLINGS

STAGES = ("sft", "grpo")
PRESETS = Path(__file__).parent / "presets"
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adamw_8bit")
PRECISIONS = ("auto", "no", "bf16", "fp16")
FORMS = ("timeline", "paper", "solution", "answer")
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
    """Which questions are learned from. per_clip: questions of a clip that go into one tree (None: all). prompt: style."""

    split: str | None = "train"
    tasks: tuple[str, ...] = TASKS
    orders: tuple[str, ...] = ORDERS
    limit: int | None = None
    per_clip: int | None = None
    prompt: str = "stkit"


@dataclass(frozen=True)
class TrainSettings:
    """The loop. An update takes ``batch`` clips ``accumulation`` times; trees of at most ``max_tokens`` are computed at once.

    steps: updates; None: ``epochs``. warmup: part of the steps in which the rate rises. tower, projector: trained or
    frozen. save_every, keep: checkpoints. eval_every: updates between scores of ``eval_split`` (0: never), on at most
    eval_limit questions.
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
    seed: int = 0
    tracker: str = "none"


@dataclass(frozen=True)
class SftSettings:
    """form: what is learned to be written, see :mod:`stkit.train.answers`."""

    form: str = "timeline"


@dataclass(frozen=True)
class GrpoSettings:
    """The algorithm: see :mod:`stkit.train.losses`.

    group: rollouts a question. updates: optimiser steps on one batch of rollouts. kl: estimator of the penalty beta
    times KL to the reference. max_kl: mean KL at which the run stops (None: never). refills: times that dapo draws new
    questions for groups of equal reward. overlong: tokens before the limit over which dapo's penalty rises. patience:
    updates with all rewards equal before a warning. recorded: a rollouts.jsonl to learn from instead of sampling.
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


@dataclass(frozen=True)
class Settings:
    """All of it. ``rewards``: weight of each, by name (see :mod:`stkit.train.rewards`)."""

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


def preset_names() -> list[str]:
    """The presets that ship."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_settings(
    preset: str | Path = "tiny", stage: str = "sft", overrides: Mapping[str, object] | None = None
) -> Settings:
    """A preset with overrides, checked.

    Args:
        preset: a name that ships, or a YAML file.
        stage: "sft" or "grpo".
        overrides: values by dotted key, such as ``{"train.lr": 1e-5}``; texts are read as YAML reads them.

    Raises:
        BadUse: an unknown preset, key (with the nearest one) or value.
    """
    raw = read_preset(preset)
    for name in STAGES:
        extra = raw.pop(f"for_{name}", None) or {}
        if name == stage:
            raw = _merged(raw, extra)
    for key, value in (overrides or {}).items():
        raw = _merged(raw, _nested(key, value))
    settings = _build(Settings, raw, "")
    check_settings(settings, stage)
    return settings


def read_preset(preset: str | Path) -> dict:
    """The raw sections of a preset."""
    path = Path(preset)
    if path.suffix not in (".yaml", ".yml"):
        path = PRESETS / f"{preset}.yaml"
        if str(preset) not in preset_names():
            raise BadUse(f"preset {str(preset)!r} is unknown: use {', '.join(preset_names())}, or a .yaml file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StkitError(explain(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StkitError(f"{path}: not YAML ({' '.join(str(error).split())[:160]})") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise BadUse(f"{path}: sections such as 'train:' were expected, not {type(raw).__name__}")
    return raw


def parse_overrides(texts: typing.Iterable[str]) -> dict[str, object]:
    """``["train.lr=1e-5"]`` as ``{"train.lr": 1e-05}``: what ``--set`` takes.

    Raises:
        BadUse: no "=" in a text.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise BadUse(f"--set {text!r}: give a key and a value such as train.lr=1e-5")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise BadUse(f"--set {text!r}: {value!r} is not a value ({' '.join(str(error).split())[:80]})") from error
    return found


def _nested(key: str, value) -> dict:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _merged(old: Mapping, new: Mapping) -> dict:
    """``new`` laid over ``old``. The rewards that are named replace those that were: weights are meant together."""
    found = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _merged(found[key], value) if both else value
    return found


def _build(kind, raw, where: str):
    """A dataclass of plain values, with every key known and every value of its type."""
    if not isinstance(raw, Mapping):
        raise BadUse(f"{where or 'the preset'}: keys with values were expected, not {raw!r:.60}")
    hints = typing.get_type_hints(kind)
    found = {}
    for key, value in raw.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise BadUse(f"unknown key {name!r}: did you mean {_nearest(name, where)!r}?")
        found[key] = _build(hints[key], value, name) if is_dataclass(hints[key]) else _value(hints[key], value, name)
    return kind(**found)


def all_keys(kind=Settings, where: str = "") -> list[str]:
    """Every dotted key there is."""
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        key = f"{where}.{name}" if where else name
        found += all_keys(hint, key) if is_dataclass(hint) else [key]
    return found


def _nearest(name: str, where: str) -> str:
    keys = all_keys()
    own = [key for key in keys if key.startswith(f"{where}.")] if where else [f.name for f in fields(Settings)] + keys
    last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    exact = last.get(name.rpartition(".")[2])  # the right name in the wrong section
    near = difflib.get_close_matches(name, own, 1, 0.75)
    return near[0] if near else exact or difflib.get_close_matches(name, own or keys, 1, 0.0)[0]


def _value(hint, value, name: str):
    """A value of its type: numbers may come as texts ("1e-5", which YAML takes for one), tuples as lists."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, name)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_value(arguments[0], item, name) for item in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise BadUse(f"{name}={value!r}: give names with weights")
        return {str(k): _value(float, v, f"{name}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError as error:
            raise BadUse(f"{name}={value!r}: give a number") from error
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, bool) and name.endswith("precision"):
        return "no" if value is False else str(value)  # YAML reads "no" as false
    if type(value) is not hint:
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise BadUse(f"{name}={value!r}: give {kinds[hint]}")
    return value


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
        ("video.sampling", settings.video.sampling, (*SAMPLINGS, None)), ("sft.form", settings.sft.form, FORMS),
        ("grpo.variant", grpo.variant, VARIANTS), ("grpo.kl", grpo.kl, ESTIMATORS),
    )  # fmt: skip
    for name, value, known in chosen:
        if value not in known:
            raise BadUse(f"{name}={value!r} is unknown: use {', '.join(k for k in known if k)}")
    for name, values, known in (("data.tasks", data.tasks, TASKS), ("data.orders", data.orders, ORDERS)):
        if not values or not set(values) <= set(known):
            raise BadUse(f"{name}={list(values)!r}: give some of {', '.join(known)}")
    _check_numbers(settings)
    if settings.lora.dropout:
        raise BadUse(
            f"lora.dropout={settings.lora.dropout}: branches of a tree share their prefix's mask, so that dropout would "
            "not be exact: set it to 0 (weight_decay regularises)"
        )
    if stage == "grpo" and grpo.group < 2:
        raise BadUse(
            f"grpo.group={grpo.group}: a group of one has no advantage, nothing would be learned: give 2 or more"
        )
    if stage == "grpo" and not any(settings.rewards.values()):
        raise BadUse(f"rewards={settings.rewards}: every weight is 0, nothing would be learned: give one a weight")


def _check_numbers(settings: Settings) -> None:
    train, grpo, lora = settings.train, settings.grpo, settings.lora
    positive = {
        "train.lr": train.lr, "train.epochs": train.epochs, "train.steps": train.steps, "train.batch": train.batch,
        "train.accumulation": train.accumulation, "train.max_tokens": train.max_tokens, "train.clip_norm": train.clip_norm,
        "train.save_every": train.save_every, "train.keep": train.keep, "train.eval_limit": train.eval_limit,
        "lora.alpha": lora.alpha, "grpo.group": grpo.group, "grpo.temperature": grpo.temperature,
        "grpo.max_new_tokens": grpo.max_new_tokens, "grpo.updates": grpo.updates, "grpo.max_kl": grpo.max_kl,
        "grpo.patience": grpo.patience, "data.limit": settings.data.limit, "data.per_clip": settings.data.per_clip,
    }  # fmt: skip
    for name, value in positive.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BadUse(f"{name}={value!r}: give a number above 0")
    least = {
        "train.weight_decay": train.weight_decay, "train.warmup": train.warmup, "train.eval_every": train.eval_every,
        "train.seed": train.seed, "lora.rank": lora.rank, "lora.dropout": lora.dropout, "grpo.beta": grpo.beta,
        "grpo.clip_low": grpo.clip_low, "grpo.clip_high": grpo.clip_high, "grpo.refills": grpo.refills,
        "grpo.overlong": grpo.overlong,
    }  # fmt: skip
    for name, value in least.items():
        if not (math.isfinite(value) and value >= 0):
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
