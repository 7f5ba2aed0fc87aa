"""A study: arms that each train the same model in another way, and contrasts between them that were planned beforehand.

study = load_study("paper")
study.arms["sft-grpo-reverse"].after, study.contrasts[0].question
"""

import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..runs import read_yaml
from ..runtime import BadUse
from ..sampling import SAMPLINGS
from ..train.reading import load_settings
from ..train.settings import STAGES
from .paper import FIGURES
from .thoughts import THINKING

STUDIES = Path(__file__).parent / "studies"
WALKS = ("train", "test", "ood")


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
            raise BadUse(f"study {str(name)!r} is unknown: use {', '.join(there)}")
    raw = read_yaml(path)
    _keys(raw, Study, str(path), given=("name",))
    if missing := [f.name for f in fields(Study)[1:] if f.name not in raw]:
        raise BadUse(f"{path}: {missing[0]!r} is missing: a study has {', '.join(f.name for f in fields(Study)[1:])}")
    for key, kind in (("max_new_tokens", int), ("both_orders", (int, float))):
        value = raw[key]
        if isinstance(value, bool) or not isinstance(value, kind) or value < 0:
            raise BadUse(f"{path}: {key}={value!r}: give a number of at least 0")
    arms = {key: _made(Arm, key, row or {}, f"arms.{key}") for key, row in raw["arms"].items()}
    contrasts = tuple(_made(Contrast, key, row, f"contrasts.{key}") for key, row in raw["contrasts"].items())
    study = Study(path.stem, **raw | {"seeds": tuple(raw["seeds"]), "arms": arms, "contrasts": contrasts})
    _check(study)
    return study


def _keys(row: Mapping, kind: type, where: str, given: tuple[str, ...] = ()) -> None:
    known = [f.name for f in fields(kind) if f.name not in given]
    if not isinstance(row, Mapping):
        raise BadUse(f"{where}: keys with values were expected, not {row!r:.60}")
    if unknown := [key for key in row if key not in known]:
        raise BadUse(f"{where}: {unknown[0]!r} is unknown: use {', '.join(known)}")


def _made(kind: type, name: str, row: Mapping, where: str):
    _keys(row, kind, where, given=("name",))
    hints = typing.get_type_hints(kind)
    try:
        return kind(name, **{k: tuple(v) if hints[k] == tuple[str, ...] else v for k, v in row.items()})
    except TypeError as error:
        raise BadUse(f"{where}: {error}") from error


def _check(study: Study) -> None:
    """Refuse what makes no sense before anything is filmed."""
    if set(study.walks) != set(WALKS) or any(set(how) != {"clips", "seed"} for how in study.walks.values()):
        raise BadUse(f"walks: {', '.join(study.walks)}: give clips and seed of {', '.join(WALKS)}")
    if not study.seeds or len(set(study.seeds)) != len(study.seeds):
        raise BadUse(f"seeds={list(study.seeds)}: give at least one, none twice")
    seen: set[str] = set()
    for arm in study.arms.values():
        _check_arm(study, arm, seen)
        seen.add(arm.name)
    for one in study.contrasts:
        if missing := [name for name in (one.first, one.second) if name not in study.arms]:
            raise BadUse(f"contrasts.{one.name}: arm {missing[0]!r} is unknown: use {', '.join(study.arms)}")
        if one.paper and (len(one.paper) != 2 or not set(one.paper) <= set(FIGURES)):
            raise BadUse(f"contrasts.{one.name}.paper={list(one.paper)}: give two of {', '.join(FIGURES)}")


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
        load_settings("tiny", arm.stage, settings_of(study, arm))


def settings_of(study: Study, arm: Arm) -> dict:
    """The settings of an arm's stage by dotted key, over the preset "tiny"."""
    return {"sft": {"sft.form": "solution"} | study.sft, "grpo": study.grpo}[arm.stage] | arm.settings


def told(study: Study, name: str) -> dict:
    """What decides an arm's outcome, as plain values: a result with another is not taken for this one's."""
    arms = study.chain(name)
    used = {"sft": study.sft, "grpo": study.grpo | {"both_orders": study.both_orders}}
    stages = {arm.stage: used[arm.stage] for arm in arms if arm.stage}
    found = {"arms": [asdict(arm) for arm in arms], "stages": stages, "walks": study.walks}
    return found | {"max_new_tokens": study.max_new_tokens}
