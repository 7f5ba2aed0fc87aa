"""What is learned from: clips with their questions, in an order that depends on the seed and the epoch alone.

    course = Course(benchmark, settings)
    item = course[0]                  # the first clip of the first epoch; course[len(course)] opens the second
    seen = Watcher(benchmark, settings.video, processor).watch(item)

An interrupted run goes on exactly where it was because its place in the data is one number.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..bench.schema import Benchmark, Question
from ..runs import read_lines
from ..runtime import StkitError, generator
from ..vlm.cache import FrameCache, load_frames
from ..vlm.sight import choose_pixels, choose_sampling
from ..vlm.video import VideoInputs, prepare, video_spec
from .settings import Settings, VideoSettings


class Item(NamedTuple):
    """A clip with the questions on it that are learned from together. ``place``: where in the course it comes."""

    place: int
    clip_id: str
    video: str
    questions: tuple[Question, ...]


class Seen(NamedTuple):
    """A video as a model takes it, and which frames of the file (of S) they are: int64 ``(S,)``."""

    inputs: VideoInputs
    indices: np.ndarray


class Course:
    """An endless sequence of items: all clips once an epoch, shuffled anew in each.

    Args:
        benchmark: where the questions are from.
        settings: data (which questions), train.seed.

    Raises:
        StkitError: no question is left, or a clip's file is not there.
    """

    def __init__(self, benchmark: Benchmark, settings: Settings):
        self.seed, self.per_clip = settings.train.seed, settings.data.per_clip
        self.questions = select(benchmark, settings)
        self.clips: dict[str, list[Question]] = {}
        for question in self.questions:
            self.clips.setdefault(question.video, []).append(question)
        missing = [video for video in self.clips if not benchmark.video_path(video).is_file()]
        if missing:
            raise StkitError(
                f"{benchmark.path}: {len(missing)} of {len(self.clips)} clips have no file in videos/ (first {missing[0]!r}): "
                "put them there, nothing is learned without the video"
            )
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        """Clips of an epoch."""
        return len(self.clips)

    def __getitem__(self, place: int) -> Item:
        epoch, index = divmod(place, len(self))
        video = self._order(epoch)[index]
        questions = tuple(drawn(self.clips[video], self.per_clip, self.seed, epoch))
        return Item(place, questions[0].clip_id, video, questions)

    def _shuffled(self, epoch: int) -> list[str]:
        videos = list(self.clips)
        generator(self.seed, "order", epoch).shuffle(videos)
        return videos


def select(benchmark: Benchmark, settings: Settings) -> tuple[Question, ...]:
    """The questions that settings.data asks for."""
    data = settings.data
    found = [q for q in benchmark.select(data.split) if q.task in data.tasks and q.order in data.orders][: data.limit]
    if not found:
        there = ", ".join(sorted({f"{q.kind} of split {q.split}" for q in benchmark.questions})[:12])
        raise StkitError(
            f"{benchmark.path}: no question for data.split={data.split!r}, data.tasks={list(data.tasks)}, "
            f"data.orders={list(data.orders)} (there are {there}): choose others with --set"
        )
    return tuple(found)


def drawn(questions: Sequence[Question], count: int | None, seed: int, epoch: int) -> list[Question]:
    """At most ``count`` of a clip's questions, drawn anew each epoch; the two orders of a task stay together.

    Returns:
        In the order in which they came; one pair more than fits is not taken, unless it is the only one.
    """
    if count is None or len(questions) <= count:
        return list(questions)
    pairs: dict[str, list[int]] = {}
    for k, question in enumerate(questions):
        pairs.setdefault(question.task, []).append(k)
    units = list(pairs.values())
    generator(seed, "questions", epoch, questions[0].clip_id).shuffle(units)
    taken: list[int] = []
    for unit in units:
        taken += unit[: max(0, count - len(taken))] if not taken or len(taken) + len(unit) <= count else []
    return [questions[k] for k in sorted(taken)]


class Watcher:
    """Reads videos as settings.video says, frames that were read before from the cache.

    ``chosen``: sampling, frames, fps, min_pixels, max_pixels and reader, as they were decided.
    """

    def __init__(self, benchmark: Benchmark, video: VideoSettings, processor, cache: FrameCache | None = None):
        self.benchmark, self.cache = benchmark, FrameCache() if cache is None else cache
        self.spec = video_spec(processor)
        self.chosen = choose_sampling(benchmark.info, video.sampling, video.frames, video.fps)
        self.chosen |= choose_pixels(processor.video_processor.size, video.max_pixels) | {"reader": video.reader}

    def watch(self, item: Item) -> Seen:
        """The item's video.

        Raises:
            StkitError: it cannot be read; nothing is ever learned without the frames.
        """
        how, path = self.chosen, self.benchmark.video_path(item.video)
        reading = {"n": how["frames"], "fps": how["fps"]}
        bounds = (how["min_pixels"], how["max_pixels"])
        frames = load_frames(
            path, self.spec.patch * self.spec.merge, *bounds, cache=self.cache, sampling=how["sampling"],
            reader=how["reader"], **{k: v for k, v in reading.items() if v is not None},
        )  # fmt: skip
        return Seen(prepare(frames, self.spec, *bounds), frames.indices)


def load_pairs(path: Path) -> Benchmark | None:
    """A user's file of rows ``{"video", "prompt", "completion"}`` as a benchmark; None for a file of another form.

    Each row is an open-ended question whose solution is the completion (``data.prompt=plain``, ``sft.form=solution``).
    """
    rows = list(read_lines(path))
    if not isinstance(rows[0][1], dict) or not {"prompt", "completion"} <= rows[0][1].keys():
        return None
    found = []
    for number, row, problem in rows:
        names = ("video", "prompt", "completion")
        if not problem and not isinstance(row, dict):
            problem = "a row is a JSON object"
        if bad := [n for n in names if not problem and not (isinstance(row.get(n), str) and row[n].strip())]:
            problem = f"{bad[0]}={row.get(bad[0])!r}: give a text that is not empty"
        if problem:
            raise StkitError(f"{path}:{number}: {problem}")
        stem = Path(row["video"]).stem
        found.append(Question(
            id=f"row-{number}", clip_id=stem, video=row["video"], group=stem, task="route", order="forward",
            question=row["prompt"], options=(), answer=row["completion"], split="train", solution=row["completion"],
        ))  # fmt: skip
    return Benchmark(path, tuple(found))
