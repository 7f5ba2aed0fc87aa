"""The rows that everything else passes around, and how they lie on disk.

A benchmark is a folder: ``benchmark.json``, ``clips.jsonl``, ``questions.jsonl`` and ``videos/``. Each row is one line
of JSON with a ``format_version``; a video is named relative to ``videos/`` and may not leave it::

    bench = load_benchmark("runs/walks")
    bench.questions[0].task, bench.questions[0].options
"""

import hashlib
import json
import math
import os
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..runs import read_json, read_lines
from ..runtime import StkitError, StkitWarning

FORMAT_VERSION = 1
TASKS = ("route", "direction", "landmark", "action")
ORDERS = ("forward", "reverse")
SPLITS = ("train", "dev", "test")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Step:
    """One step of a route. ``kind`` is "move", "landmark" or "action"; ``side``, of a landmark, "left" or "right"."""

    kind: str
    value: str
    side: str = ""


@dataclass(frozen=True)
class Route:
    """What is walked, passed and done, in the order of time (stkit.bench.routes renders, parses and reverses it)."""

    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Clip:
    """One video of one walk. ``map_hash`` decides the split; ``frames_sha256`` covers the decoded frames."""

    id: str
    video: str
    group: str
    split: str
    frames: int
    fps: float
    width: int
    height: int
    duration_s: float
    map_hash: str = ""
    frames_sha256: str = ""
    ood: bool = False
    truth: str = ""
    settings: dict = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Question:
    """One question on one clip.

    ``group`` is the cluster of the statistics: all questions on one walk, forward and reverse, share it. ``options``
    are texts without letters, empty for an open-ended (route) question; ``answer`` is an index into them, or a text for
    a route. ``solution`` is a reasoning text to train on, where the source has one.
    """

    id: str
    clip_id: str
    video: str
    group: str
    task: str
    order: str
    question: str
    options: tuple[str, ...]
    answer: int | str
    split: str
    solution: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def is_open(self) -> bool:
        """Open-ended: answered in words, not by a letter."""
        return not self.options

    @property
    def kind(self) -> str:
        """The category, e.g. ``direction/forward``."""
        return f"{self.task}/{self.order}"


@dataclass(frozen=True)
class Prediction:
    """What a model said to one question: one line of ``predictions.jsonl``.

    ``parsed`` is an option's index, a text for an open-ended question, or None when the text could not be resolved.
    ``log_probs`` holds one natural-log probability an option (letter mode). ``failed`` is the reason why the question
    could not be asked, "" when it was; such a row is counted, never scored. ``correct`` is None when it was not scored.
    """

    id: str
    mode: str
    control: str
    text: str
    parsed: int | str | None
    correct: bool | None
    log_probs: tuple[float, ...] = ()
    edit_distance: float | None = None
    failed: str = ""
    seconds: float = 0.0
    prompt_sha256: str = ""
    timestamps_s: tuple[float, ...] = ()
    extra: dict = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Benchmark:
    """A benchmark in memory. ``info`` is benchmark.json ({} for a bare JSONL file); ``skipped``: bad rows left out."""

    path: Path
    questions: tuple[Question, ...]
    clips: tuple[Clip, ...] = ()
    info: dict = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def video_path(self, video: str) -> Path:
        """The file of a video, checked not to leave ``videos/`` (a symlink out of it is refused)."""
        root = (self.path if self.path.is_dir() else self.path.parent) / "videos"
        path = root / video
        if video_problem(video) or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
            raise StkitError(f"video {video!r} leaves {root}: put the file into that folder and name it relative to it")
        return path

    def select(self, split: str | None = None, limit: int | None = None) -> tuple[Question, ...]:
        """The questions of a split (None: of all), at most the first ``limit`` of them."""
        return tuple(q for q in self.questions if split in (None, q.split))[:limit]

    def frame(self):
        """The questions as a pandas DataFrame, one row each."""
        import pandas as pd

        return pd.DataFrame([asdict(q) for q in self.questions])


class BadRows(StkitError):
    """Malformed rows: one line of text for each, all of them listed."""

    def __init__(self, problems: list[str]):
        self.problems = tuple(problems)
        if len(problems) == 1:
            super().__init__(f"{problems[0]}; or go on without that row by --skip-bad (skip_bad=True)")
        else:
            fix = f"{len(problems)} bad rows: mend them, or go on without them by --skip-bad (skip_bad=True)"
            super().__init__("\n".join([*problems, fix]))


def video_problem(video) -> str:
    """Why a video's name is not acceptable ("" when it is)."""
    if not isinstance(video, str) or not video.strip():
        return f"video={video!r}: give a file name relative to videos/"
    outside = PurePosixPath(video).is_absolute() or PureWindowsPath(video).drive or video.startswith(("\\", "~"))
    if outside or ".." in PurePosixPath(video.replace("\\", "/")).parts or "\0" in video or "://" in video:
        return f"video={video!r} leaves videos/: give a file name relative to it"
    if any(len(part.encode()) > 255 for part in video.split("/")):
        return f"video={video!r:.40}...: no file's name has more than 255 bytes"
    return ""


def _text_problem(row: dict, name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        return f"{name}={value!r}: give a text that is not empty"
    return ""


def _option_problem(row: dict) -> str:
    options, answer = row["options"], row["answer"]
    if not isinstance(options, (list, tuple)):
        return f"options={options!r}: give a list of texts"
    if not options:
        if row["task"] != "route":
            return "options=[]: only a route question is open-ended, give at least two options"
        return _text_problem(row, "answer")
    if bad := [o for o in options if not isinstance(o, str) or not o.strip()]:
        return f"options hold {bad[0]!r}: give texts that are not empty"
    if not 2 <= len(options) <= len(LETTERS):
        return f"options: {len(options)} given, 2 to {len(LETTERS)} are possible"
    plain = [" ".join(unicodedata.normalize("NFC", o).split()).casefold() for o in options]
    if double := [o for o, p in zip(options, plain) if plain.count(p) > 1]:
        return f"options hold {double[0]!r} twice: no two may be equal"
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        return f"answer={answer!r}: give an index from 0 to {len(options) - 1}"
    return ""


def _form_problem(row, kind: type, texts: tuple[str, ...]) -> str:
    """What is wrong with the form of a row of either kind, and with the fields that both have."""
    if not isinstance(row, dict):
        return f"{row!r:.60}: a row is a JSON object"
    version = row.get("format_version", FORMAT_VERSION)
    if isinstance(version, bool) or version != FORMAT_VERSION:
        return f"format_version={version!r}: this stkit reads {FORMAT_VERSION}"
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in row]:
        return f"{missing[0]} is missing: every row has {', '.join(required)}"
    try:
        json.dumps(_known(row, kind), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half a surrogate pair (\\ud800 to \\udfff) stands in it: UTF-8 can't hold that, write the text anew"
    for name in texts:
        if problem := _text_problem(row, name):
            return problem
    if row["split"] not in SPLITS:
        return f"split={row['split']!r}: use {', '.join(SPLITS)}"
    return video_problem(row["video"])


def row_problem(row) -> str:
    """Why a question row is malformed, "" when it isn't: the field, its value and the fix."""
    if problem := _form_problem(row, Question, ("id", "clip_id", "group", "question")):
        return problem
    for name, allowed in (("task", TASKS), ("order", ORDERS)):
        if row[name] not in allowed:
            return f"{name}={row[name]!r}: use {', '.join(allowed)}"
    if not isinstance(row.get("solution", ""), str):
        return f"solution={row['solution']!r:.60}: give a text, or leave it out"
    return _option_problem(row)


def clip_problem(row) -> str:
    """Why a clip's row is malformed, "" when it isn't."""
    if problem := _form_problem(row, Clip, ("id", "group")):
        return problem
    for name in ("frames", "fps", "width", "height", "duration_s"):
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            return f"{name}={value!r:.60}: give a number, 0 where it isn't known"
    return ""


def _known(row: dict, kind: type) -> dict:
    """The fields of a row; unknown keys are left out."""
    return {f.name: row[f.name] for f in fields(kind) if f.name in row}


def _checked(path: Path, problem_of: Callable[[object], str], make: Callable[[dict], object]) -> tuple[list, list[str]]:
    """The good rows of a file, made into what they are, and a line for each bad one."""
    rows, problems, seen, read = [], [], {}, list(read_lines(path))
    if not any(isinstance(row, dict) for _, row, _ in read):
        number, row, problem = read[0]
        raise StkitError(f"{path}:{number}: {problem or problem_of(row)} (no line of this file is a JSON object)")
    for number, row, problem in read:
        problem = problem or problem_of(row)
        if not problem and row["id"] in seen:
            problem = f"id={row['id']!r} stands in line {seen[row['id']]} too: give each row an id of its own"
        if problem:
            problems.append(f"{path}:{number}: {problem}")
            continue
        seen[row["id"]] = number
        rows.append(make(row))
    return rows, problems


def _questions(path: Path) -> tuple[list[Question], list[str]]:
    def made(row: dict) -> Question:
        return Question(**_known(row, Question) | {"options": tuple(row["options"])})

    return _checked(path, row_problem, made)


def _usable(path: Path, questions: list[Question], problems: list[str], skip_bad: bool) -> None:
    """Stop at bad rows, unless they are to be left out and something is left."""
    if problems and not skip_bad:
        raise BadRows(problems)
    if not questions:
        raise StkitError(f"{path}: not one good row in it ({problems[0] if problems else 'it is empty'})")


def load_questions(path: str | Path, skip_bad: bool = False) -> tuple[list[Question], list[str]]:
    """Read and check a question file.

    Args:
        path: a ``.jsonl`` file of the schema.
        skip_bad: leave malformed rows out instead of stopping.

    Returns:
        The questions and, for each row that was left out, a line that says why.

    Raises:
        BadRows: malformed rows, all listed with file, line, field, value and fix (unless ``skip_bad``).
        StkitError: no such file, an empty one, or not one good row in it.
    """
    path = Path(path)
    questions, problems = _questions(path)
    _usable(path, questions, problems, skip_bad)
    return questions, problems


def benchmark_hash(folder: str | Path) -> str:
    """SHA-256 over clips.jsonl (which holds the hash of each clip's decoded frames) and questions.jsonl."""
    digest = hashlib.sha256()
    for name in ("clips.jsonl", "questions.jsonl"):
        path = Path(folder) / name
        digest.update(name.encode() + b"\0" + (path.read_bytes() if path.exists() else b"") + b"\0")
    return digest.hexdigest()


def load_benchmark(path: str | Path, skip_bad: bool = False) -> Benchmark:
    """Load a benchmark folder, or a bare question file (its videos are in ``videos/`` beside it).

    A hash that differs from the recorded one is warned about, not refused.
    """
    path = Path(path)
    if not path.exists():
        raise StkitError(f"{path}: no such file or folder: build one with 'stkit build --out {path}'")
    if not path.is_dir():
        questions, skipped = load_questions(path, skip_bad)
        return Benchmark(path, tuple(questions), skipped=tuple(skipped))
    for name in ("benchmark.json", "questions.jsonl"):
        if not (path / name).exists():
            raise StkitError(f"{path}: no {name} in it: a benchmark folder comes from 'stkit build' or 'stkit import'")
    info = read_json(path / "benchmark.json")
    if not isinstance(info, dict) or info.get("format_version") != FORMAT_VERSION:
        raise StkitError(f"{path}/benchmark.json: format_version is not {FORMAT_VERSION}: build it with this stkit")
    (questions, skipped), clips = _questions(path / "questions.jsonl"), []
    if (path / "clips.jsonl").exists():
        clips, bad = _checked(path / "clips.jsonl", clip_problem, lambda row: Clip(**_known(row, Clip)))
        skipped += bad
    _usable(path / "questions.jsonl", questions, skipped, skip_bad)
    if info.get("hash") and info["hash"] != benchmark_hash(path):
        message = f"{path}: questions or clips differ from the hash in benchmark.json: they were edited since"
        warnings.warn(message, StkitWarning, stacklevel=2)
    return Benchmark(path, tuple(questions), tuple(clips), info, tuple(skipped))


def row_of(item: Question | Clip | Prediction) -> dict:
    """A dataclass as the dict that is written to disk; NaN and infinities become None."""
    return {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in asdict(item).items()}
