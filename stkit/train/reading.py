"""Presets of training: settings in YAML, overridden by ``--set``, every key checked before anything runs.

    settings = load_settings("tiny", "sft", {"train.lr": "1e-3"})
    settings.train.lr, settings.grpo.variant

A preset holds the sections of :class:`stkit.train.settings.Settings`; ``for_sft`` and ``for_grpo`` hold what only that
command takes. What a preset leaves out has the default that stands there; the rewards it names are all it has.
"""

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path

import yaml

from ..runs import read_yaml
from ..runtime import BadUse
from .settings import STAGES, Settings, check_settings

PRESETS = Path(__file__).parent / "presets"
ELSEWHERE = {  # what TRL and Transformers call it
    "learning_rate": "train.lr", "max_steps": "train.steps", "num_train_epochs": "train.epochs",
    "gradient_accumulation_steps": "train.accumulation", "per_device_train_batch_size": "train.batch",
    "gradient_checkpointing": "train.checkpointing", "max_grad_norm": "train.clip_norm", "warmup_ratio": "train.warmup",
    "lr_scheduler_type": "train.schedule", "optim": "train.optimizer", "num_generations": "grpo.group",
    "max_completion_length": "grpo.max_new_tokens", "load_in_4bit": "model.four_bit", "r": "lora.rank",
}  # fmt: skip


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
    raw = {"rewards": Settings().rewards} | read_preset(preset)
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
    raw = read_yaml(path)
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
    names = key.split(".", 1 if key.startswith("rewards.") else -1)  # a reward may be named "my_rewards.py:brief"
    for name in reversed(names):
        value = {name: value}
    return value


def _merged(old: Mapping, new: Mapping) -> dict:
    """``new`` laid over ``old``, section by section."""
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
        found[key] = _build(hints[key], value, name) if is_dataclass(hints[key]) else read_value(hints[key], value, name)
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
    word = name.rpartition(".")[2]
    if word in last or word in ELSEWHERE:  # the right name in the wrong section, or another trainer's name
        return last.get(word) or ELSEWHERE[word]
    if near := difflib.get_close_matches(name, own, 1, 0.75):
        return near[0]
    if near := difflib.get_close_matches(word, ELSEWHERE, 1, 0.8):
        return ELSEWHERE[near[0]]
    return difflib.get_close_matches(name, own or keys, 1, 0.0)[0]


def read_value(hint, value, name: str):
    """A value of its type: numbers may come as texts ("1e-5", which YAML takes for one), tuples as lists."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return read_value(next(a for a in arguments if a is not type(None)), value, name)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(read_value(arguments[0], item, name) for item in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise BadUse(f"{name}={value!r}: give names with weights")
        return {str(k): read_value(float, v, f"{name}.{k}") for k, v in value.items()}
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
