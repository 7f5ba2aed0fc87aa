"""All questions of a benchmark put to one model: every answer on disk as it comes, and nothing asked twice.

    inquiry = Inquiry(out, benchmark, questions, interview, files["videos"], blind=True)
    inquiry.start(settings, files, sizes={})
    inquiry.ask()
    inquiry.said, inquiry.unseen                 # id -> Prediction, with the video and without

A folder holds ``predictions.jsonl`` and ``blind.jsonl``, one line a question (of two for the same the later counts). Of
several processes each appends to files of its own, and :meth:`Inquiry.merge` brings them together.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..bench.schema import Benchmark, Prediction, Question, row_of
from ..runs import append_jsonl, read_partial_jsonl, to_json, write_jsonl
from ..runtime import BadUse, StkitError
from .cache import content_hash
from .endpoint import in_threads
from .interview import BLIND, Interview, Shown
from .processes import Team
from .remote import RemoteInterview, total_costs
from .sight import claim_run

FILES = {"said": "predictions", "blind": "blind"}


class Work(NamedTuple):
    """Something to ask, for one of the ``FILES``. ``closes``: questions of the clip that are through with it."""

    name: str
    ask: Callable[[], Sequence[Prediction]]
    closes: int = 0


class Inquiry:
    """What is on disk already, and what is still to be asked.

    Args:
        out: the run's folder.
        benchmark: where the videos are.
        questions: all of the run.
        interview: who is asked; behind a server one question at a time, and failed ones again.
        videos: SHA-256 of each video's file.
        blind: ask everything without frames too.
        size: questions of a clip that are asked and saved together; None for all.
        workers: questions that a server is asked at a time.
        team: the processes that share the clips.
    """

    def __init__(
        self, out: Path, benchmark: Benchmark, questions: Sequence[Question], interview: Interview,
        videos: dict[str, str], blind: bool, size: int | None = None, workers: int = 1, team: Team = Team(),
    ):  # fmt: skip
        self.out, self.benchmark, self.questions, self.interview = out, benchmark, questions, interview
        self.videos, self.team, self.remote = videos, team, isinstance(interview, RemoteInterview)
        self.size, self.workers = (1, workers) if self.remote else (size, 1)
        self.without = interview.blindfolded() if blind else None
        self.said: dict[str, Prediction] = {}
        self.unseen: dict[str, Prediction] = {}

    def start(self, settings: dict, files: dict, sizes: dict) -> None:
        """Claim the folder, and bring together what an earlier start left in it; see :func:`claim_run`."""
        claim_run(self.out, {"settings": settings}, self.interview.loaded.record, files, sizes)
        self.merge()
        self._path("said").touch()

    def read(self) -> dict[str, Prediction]:
        """Take what is on disk for what was said, and return it."""
        self.said = read_predictions(self._path("said"))
        self.unseen = read_predictions(self._path("blind")) if self.without is not None else {}
        return self.said

    def costs(self) -> dict:
        """Requests, retries and tokens of all lines on disk, and questions that the server left without an answer."""
        rows = [row for name in FILES for row in read_partial_jsonl(self._path(name))]
        failed = sum(bool(p.failed) and "requests" in p.extra for p in (*self.said.values(), *self.unseen.values()))
        return {"failed": failed} | total_costs(row["extra"] for row in rows)

    def merge(self) -> None:
        """Bring the processes' parts into the run's own files, as one process would have asked.

        Killed at any moment, it loses nothing: lines that are in a part and in the whole are one line the next time.
        """
        order = {q.id: k for k, q in enumerate(q for clip in by_clip(self.questions) for q in clip)}
        for name, file in FILES.items():
            parts = sorted(self.out.glob(f"{file}.part-*.jsonl"))
            if not parts:
                continue
            rows = {to_json(row): row for path in (self._path(name), *parts) for row in read_partial_jsonl(path)}
            write_jsonl(self._path(name), sorted(rows.values(), key=lambda row: order.get(row.get("id"), len(order))))
            for path in parts:
                path.unlink()

    def ask(self, progress: bool = False) -> None:
        """Ask what has no answer yet, clip by clip; ``progress``: bar and estimate on stderr."""
        self.read()
        if self.remote:
            self.interview.tally.answered = sum(not p.failed for p in (*self.said.values(), *self.unseen.values()))
        clips = self.team.share(by_clip([q for q in self.questions if self._open(q)]))
        left, done, begin = sum(map(len, clips)), 0, time.monotonic()
        answers = in_threads(lambda work: (work.name, work.ask(), work.closes), self._works(clips), self.workers)
        with tqdm(total=left, unit="question", disable=not (progress and left), file=sys.stderr) as bar:
            for name, predictions, closes in answers:
                self._keep(name, predictions)
                if progress and closes and not done:
                    each, rest = (time.monotonic() - begin) / closes, left - closes
                    bar.write(f"about {_duration(each * rest)} for {rest} more questions ({each:.2f} s each, "
                              "measured on the first clip)", file=sys.stderr)  # fmt: skip
                done += closes
                bar.update(closes)

    def _path(self, name: str) -> Path:
        return self.out / f"{FILES[name]}.jsonl"

    def _asks(self, interview: Interview | None, kept: dict[str, Prediction], question: Question) -> bool:
        """An interview (with the video or without) has still to ask it."""
        if interview is None or not interview.asks(question):
            return False
        return question.id not in kept or (self.remote and bool(kept[question.id].failed))

    def _open(self, question: Question) -> bool:
        return self._asks(self.interview, self.said, question) or self._asks(self.without, self.unseen, question)

    def _works(self, clips: Sequence[Sequence[Question]]) -> Iterator[Work]:
        for clip in clips:
            yield from self._works_of(clip)

    def _works_of(self, clip: Sequence[Question]) -> Iterator[Work]:
        """With the video, then without; the last of it closes the clip's questions."""
        asked = [q for q in clip if self._asks(self.interview, self.said, q)]
        unseen = [q for q in clip if self._asks(self.without, self.unseen, q)]
        shown = self._show(asked[0]) if asked else BLIND
        works = []
        if isinstance(shown, str):
            works += [Work("said", partial(self._unshown, question, shown)) for question in asked]
        else:
            works += [Work("said", partial(self.interview.ask, batch, shown)) for batch in self._batches(asked)]
        works += [Work("blind", partial(self.without.ask, batch, BLIND)) for batch in self._batches(unseen)]
        yield from works[:-1]
        yield works[-1]._replace(closes=len(clip))

    def _unshown(self, question: Question, reason: str) -> list[Prediction]:
        return [self.interview.failed(question, reason)]

    def _batches(self, questions: Sequence[Question]) -> list[Sequence[Question]]:
        size = self.size or max(1, len(questions))
        return [questions[start : start + size] for start in range(0, len(questions), size)]

    def _show(self, question: Question) -> Shown | str:
        """Its video as the model sees it, or why it can't be shown."""
        if self.interview.settings.control == "blind":
            return BLIND
        try:
            path = self.benchmark.video_path(question.video)
            shown = self.interview.watch(path, question.clip_id)
        except BadUse:
            raise
        except StkitError as error:
            return str(error)
        if content_hash(path) != self.videos[question.video]:
            raise StkitError(f"{path} changed since the run was started: choose another --out")
        return shown

    def _keep(self, name: str, predictions: Sequence[Prediction]) -> None:
        kept, path = {"said": self.said, "blind": self.unseen}[name], self._path(name)
        if self.team.count > 1:
            path = self.out / f"{FILES[name]}.part-{self.team.rank}.jsonl"
        for prediction in predictions:
            append_jsonl(path, row_of(prediction))
            kept[prediction.id] = prediction


def by_clip(questions: Sequence[Question]) -> list[list[Question]]:
    """The questions of each video, videos in the order of their first question."""
    clips: dict[str, list[Question]] = {}
    for question in questions:
        clips.setdefault(question.video, []).append(question)
    return list(clips.values())


def read_predictions(path: Path) -> dict[str, Prediction]:
    """The answers of an earlier start; a half-written last line is dropped, its question is asked again."""
    rows = read_partial_jsonl(path)
    lists = ("log_probs", "timestamps_s")
    try:
        return {row["id"]: Prediction(**row | {name: tuple(row[name]) for name in lists}) for row in rows}
    except (KeyError, TypeError) as error:
        raise StkitError(f"{path}: a line is no prediction ({error}): choose another --out") from error


def _duration(seconds: float) -> str:
    """Seconds in words: "40 s", "3 min", "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
