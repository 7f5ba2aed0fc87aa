"""A recipe: the stages of the tiny models' training and their settings, from a YAML file, checked.

    plan = load_recipe("full")
    [stage.name for stage in plan.stages], plan.films
"""

import typing
from dataclasses import dataclass, fields
from pathlib import Path

from ..bench.schema import TASKS
from ..runs import read_yaml
from ..runtime import BadUse
from ..train.reading import load_settings, read_value
from .lessons import LESSONS

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Stage:
    """A stage. An update takes ``walks`` walks with ``per_walk`` questions each; beside them ``told`` walks of the
    lesson "read", whose loss counts ``told_share`` times as much, on ``told_tasks`` (none: the same tasks). glance: how much
    the loss of the lesson "glance" counts, on the same films. backwards: the share of walks that run from their end, of
    which what is seen is told and no question is answered. keep_every: updates between copies of the weights."""

    name: str
    lesson: str
    steps: int
    walks: int
    per_walk: int
    lr: float
    tasks: tuple[str, ...] = TASKS
    told: int = 0
    told_share: float = 0.3
    told_tasks: tuple[str, ...] = ()
    glance: float = 0.0
    backwards: float = 0.0
    warmup: float = 0.1
    weight_decay: float = 0.05
    keep_every: int = 0


@dataclass(frozen=True)
class Recipe:
    """All of it. films, told: how many walks are filmed, and told without a film. shifts: see :class:`Films`. dev: walks by
    which tiny-cold is picked. grpo: settings of GRPO by dotted key."""

    films: int
    shifts: tuple[int, ...]
    told: int
    dev: int
    stages: tuple[Stage, ...]
    grpo: dict


def load_recipe(name: str | Path) -> Recipe:
    """A recipe that ships ("full", "quick") or a YAML file.

    Raises:
        BadUse: an unknown recipe, key or lesson.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name}.yaml"
        if not path.exists():
            raise BadUse(f"recipe {str(name)!r} is unknown: use {', '.join(sorted(p.stem for p in RECIPES.glob('*.yaml')))}")
    raw = read_yaml(path)
    names = [f.name for f in fields(Recipe)]
    if not isinstance(raw, dict) or set(raw) != set(names):
        raise BadUse(f"{path}: the keys {', '.join(names)} were expected")
    if not all(isinstance(raw[key], dict) and raw[key] for key in ("stages", "grpo")):
        raise BadUse(f"{path}: stages and grpo hold names with values")
    stages = tuple(_stage(str(key), row) for key, row in raw["stages"].items())
    counts = {name: _count(read_value(int, raw[name], name), name) for name in ("films", "told", "dev")}
    shifts = read_value(tuple[int, ...], raw["shifts"], "shifts")
    if shifts[:1] != (0,) or len(set(shifts)) < len(shifts):
        raise BadUse(f"shifts={list(shifts)}: give whole numbers, 0 the first, none twice")
    load_settings("tiny", "grpo", raw["grpo"])
    return Recipe(**counts, shifts=shifts, stages=stages, grpo=dict(raw["grpo"]))


def _stage(name: str, row: object) -> Stage:
    where, hints = f"stages.{name}", typing.get_type_hints(Stage)
    known = [f.name for f in fields(Stage)[1:]]
    if not isinstance(row, dict) or not {"lesson", "steps", "walks", "per_walk", "lr"} <= set(row) <= set(known):
        raise BadUse(f"{where}={row!r:.80}: give lesson, steps, walks, per_walk and lr, and others of {', '.join(known)}")
    stage = Stage(name, **{key: read_value(hints[key], value, f"{where}.{key}") for key, value in row.items()})
    if stage.lesson not in LESSONS:
        raise BadUse(f"{where}.lesson={stage.lesson!r} is unknown: use {', '.join(LESSONS)}")
    for key in ("tasks", "told_tasks"):
        given = getattr(stage, key)
        if not set(given) <= set(TASKS) or (key == "tasks" and not given):
            raise BadUse(f"{where}.{key}={list(given)!r}: give some of {', '.join(TASKS)}")
    for key in ("steps", "walks", "per_walk", "lr"):
        _count(getattr(stage, key), f"{where}.{key}")
    if not 0 <= stage.backwards <= 1:
        raise BadUse(f"{where}.backwards={stage.backwards!r}: give a share from 0 to 1")
    return stage


def _count(value: float, name: str):
    if value <= 0:
        raise BadUse(f"{name}={value!r}: give a number above 0")
    return value
