"""A study: arms that each train the same model in another way, and contrasts between them that were planned beforehand.

study = load_study("paper")
study.arms["sft-grpo-reverse"].after, study.contrasts[0].question
"""

import math
import re
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from ..runs import read_yaml
from ..runtime import BadUse
from ..sampling import SAMPLINGS
from ..train.plugins import find_rewards
from ..train.reading import load_settings, read_value
from ..train.rewards import REWARDS
from ..train.settings import STAGES
from .paper import FIGURES
from .thoughts import THINKING

STUDIES = Path(__file__).parent / "studies"
WALKS = ("train", "test", "ood")
GIVEN = {  # settings that the study gives itself
    "train.seed": "seeds", "sft.form": "thinking", "video.sampling": "sampling", "video.frames": "sampling",
    "rewards.both_orders": "both_orders",
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to train. ``stage`` None: not at all. ``after``: the arm from whose result it starts, None for the start.

    thinking: see :mod:`stkit.tiny.thoughts`. clips: walks with answers for SFT, None for all. sampling: of training and
    of the evaluation, None for what the walks are made for. settings: by dotted key, over those of the stage.
    """

    name: str
    stage: str | None = None
    thinking: str = "reverse"
    after: str | None = None
    clips: int | None = None
    sampling: str | None = None
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Contrast:
    """A comparison that was planned: ``second`` minus ``first``. paper: the two models of the paper that it stands
    beside, where there are such; note: how the two differ from ours."""

    name: str
    question: str
    first: str
    second: str
    paper: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Study:
    """All of it. walks: clips and seed of "train", "test" and "ood". both_orders: weight of that reward in GRPO of an
    arm that thinks in reverse. sft, grpo: settings of the stages by dotted key, over the preset "tiny"."""

    name: str
    seeds: tuple[int, ...]
    walks: dict[str, dict[str, int]]
    max_new_tokens: int
    both_orders: float
    sft: dict
    grpo: dict
    arms: dict[str, Arm]
    contrasts: tuple[Contrast, ...]

    def chain(self, name: str) -> list[Arm]:
        """The arms that lead from the start to this one, itself included."""
        arm = self.arms[name]
        return [*(self.chain(arm.after) if arm.after else ()), arm]


def load_study(name: str | Path) -> Study:
    """A study that ships ("paper") or a YAML file, checked.

    Raises:
        BadUse: an unknown study, key, arm or setting.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = STUDIES / f"{name}.yaml"
        if not path.exists():
            there = sorted(found.stem for found in STUDIES.glob("*.yaml"))
            raise BadUse(f"study {str(name)!r} is unknown: use {', '.join(there)}, or a .yaml file")
    try:
        raw = _row(read_yaml(path), Study, "the study")
        arms = {key: _made(Arm, key, row, f"arms.{key}") for key, row in raw["arms"].items()}
        contrasts = [_made(Contrast, key, row, f"contrasts.{key}") for key, row in raw["contrasts"].items()]
        study = Study(path.stem, **raw | {"arms": arms, "contrasts": tuple(contrasts)})
        _check(study)
    except BadUse as error:
        raise BadUse(f"{path}: {error}") from error
    return study


def _row(row, kind: type, where: str) -> dict:
    """The keys of a dataclass but its name, all known, those without a default there, each value of its type."""
    if not isinstance(row, Mapping):
        raise BadUse(f"{where}: keys with values were expected, not {row!r:.60}")
    known = {one.name: one for one in fields(kind) if one.name != "name"}
    if unknown := [key for key in row if key not in known]:
        raise BadUse(f"{where}: {unknown[0]!r} is unknown: use {', '.join(known)}")
    needed = [key for key, one in known.items() if one.default is one.default_factory is MISSING]
    if missing := [key for key in needed if key not in row]:
        raise BadUse(f"{where}: {missing[0]!r} is missing: give {', '.join(needed)}")
    hints, prefix = typing.get_type_hints(kind), "" if kind is Study else f"{where}."
    return {key: _value(hints[key], value, f"{prefix}{key}") for key, value in row.items()}


def _value(hint, value, name: str):
    """A value of its type; what a mapping holds is looked at later."""
    if name in ("arms", "contrasts", "walks") or hint is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise BadUse(f"{name}={value!r:.60}: give names with values")
        return dict(value)
    if typing.get_origin(hint) is tuple and not isinstance(value, list):
        raise BadUse(f"{name}={value!r:.60}: give a list")
    return read_value(hint, value, name)


def _made(kind: type, name: str, row, where: str):
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise BadUse(f"{where}: give a name of small letters, digits and hyphens")
    return kind(name, **_row({} if row is None else row, kind, where))


def _check(study: Study) -> None:
    """Refuse what makes no sense before anything is filmed."""
    if set(study.walks) != set(WALKS):
        raise BadUse(f"walks: {', '.join(study.walks)}: give clips and seed of {', '.join(WALKS)}")
    for name, how in study.walks.items():
        if not isinstance(how, Mapping) or set(how) != {"clips", "seed"}:
            raise BadUse(f"walks.{name}={how!r:.60}: give clips and seed")
        _least(how["clips"], f"walks.{name}.clips", 1)
        _least(how["seed"], f"walks.{name}.seed", 0)
    if not study.seeds or len(set(study.seeds)) != len(study.seeds) or min(study.seeds) < 0:
        raise BadUse(f"seeds={list(study.seeds)}: give at least one, none twice, none below 0")
    _least(study.max_new_tokens, "max_new_tokens", 1)
    if not (math.isfinite(study.both_orders) and study.both_orders >= 0):
        raise BadUse(f"both_orders={study.both_orders!r}: give 0 or more")
    seen: set[str] = set()
    for arm in study.arms.values():
        _check_arm(study, arm, seen)
        seen.add(arm.name)
    if not any(arm.stage for arm in study.arms.values()):
        raise BadUse(f"arms: {', '.join(study.arms) or 'none'}: give a stage to at least one, nothing is trained")
    if not study.contrasts:
        raise BadUse("contrasts: none: give at least one, planned before anything is run")
    for one in study.contrasts:
        where = f"contrasts.{one.name}"
        if missing := [name for name in (one.first, one.second) if name not in study.arms]:
            raise BadUse(f"{where}: arm {missing[0]!r} is unknown: use {', '.join(study.arms)}")
        if one.first == one.second:
            raise BadUse(f"{where}: {one.first!r} is compared with itself: give two arms")
        if one.paper and (len(one.paper) != 2 or not set(one.paper) <= set(FIGURES)):
            raise BadUse(f"{where}.paper={list(one.paper)}: give two of {', '.join(FIGURES)}")


def _least(value, name: str, least: int) -> None:
    if type(value) is not int or value < least:
        raise BadUse(f"{name}={value!r}: give a whole number of at least {least}")


def _check_arm(study: Study, arm: Arm, earlier: set[str]) -> None:
    where = f"arms.{arm.name}"
    for name, value, known in (
        ("stage", arm.stage, (*STAGES, None)), ("thinking", arm.thinking, THINKING),
        ("sampling", arm.sampling, (*SAMPLINGS, None)),
    ):  # fmt: skip
        if value not in known:
            raise BadUse(f"{where}.{name}={value!r} is unknown: use {', '.join(k for k in known if k)}")
    if arm.after is not None and arm.after not in earlier:
        raise BadUse(f"{where}.after={arm.after!r}: name an arm that stands before it")
    if arm.after is not None and study.arms[arm.after].stage is None:
        raise BadUse(f"{where}.after={arm.after!r} trains nothing: leave it out to start from the start")
    if arm.clips is not None and not 1 <= arm.clips <= study.walks["train"]["clips"]:
        raise BadUse(f"{where}.clips={arm.clips}: give 1 to {study.walks['train']['clips']} (walks.train.clips)")
    if arm.clips is not None and arm.stage != "sft":
        raise BadUse(
            f"{where}.clips={arm.clips} has no meaning for stage {arm.stage!r}: it counts what SFT learns from"
        )
    if arm.stage is None and (arm.after or arm.settings):
        raise BadUse(f"{where}: without a stage nothing is trained: leave out after and settings")
    if arm.stage:
        _check_settings(study, arm, where)


def _check_settings(study: Study, arm: Arm, where: str) -> None:
    """Settings of an arm that the stage does not know, that make no sense, or that the study gives itself."""
    chosen = settings_of(study, arm)
    if own := [key for key in chosen if key in GIVEN]:
        raise BadUse(f"{where}: {own[0]} is set: leave it out, {GIVEN[own[0]]} decides it")
    try:
        settings = load_settings("tiny", arm.stage, {"sft.form": "solution"} | chosen)
        if arm.stage == "grpo":
            find_rewards(settings.rewards, REWARDS, {})
    except BadUse as error:
        raise BadUse(f"{where}: {error}") from error


def settings_of(study: Study, arm: Arm) -> dict:
    """The settings of an arm's stage by dotted key, over the preset "tiny"."""
    return {"sft": study.sft, "grpo": study.grpo}[arm.stage] | arm.settings


def told(study: Study, name: str) -> dict:
    """What decides an arm's outcome, as plain values: a result with another is not taken for this one's."""
    arms = study.chain(name)
    used = {"sft": study.sft, "grpo": study.grpo | {"both_orders": study.both_orders}}
    stages = {arm.stage: used[arm.stage] for arm in arms if arm.stage}
    found = {"arms": [asdict(arm) for arm in arms], "stages": stages, "walks": study.walks}
    return found | {"max_new_tokens": study.max_new_tokens}
