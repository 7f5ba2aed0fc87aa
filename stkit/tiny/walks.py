"""The walks that the tiny model learns from: planned ones to read about, filmed ones to see, and the mirror image of each.

    told = planned_walks(200, seed=0)          # nothing is rendered: a time line is a function of the plan
    films = Films("runs/tiny/walks", "runs/tiny/films", processor)   # decoded once, to a memory-mapped array
    walk = films.shifted(films.walks[0], rng).mirrored()
    walk.moments, films.video(walk)

Only maps of split "train" are learned from. A mirror image is on the same side of that line as its walk: the split is a
hash of the map, which is the same for both.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..bench.camera import schedule
from ..bench.plans import Landmark, Plan, PlannedAction, make_plan, plan_row
from ..bench.presets import MIRROR, PRESETS, Preset
from ..bench.questions import make_questions
from ..bench.schema import Question, load_benchmark
from ..bench.timeline import Moment, load_truth, shown, told
from ..reporting.chains import items_told
from ..runs import claim
from ..runtime import BadUse, child_seed
from ..sampling import sample_indices
from ..vlm.cache import load_frames
from ..vlm.sight import choose_pixels, choose_sampling
from ..vlm.video import Frames, VideoInputs, prepare, video_spec

SPLIT = "train"


@dataclass(frozen=True)
class Walk:
    """A walk with what each sampled frame shows. ``film``: which of the films shows it, None for a walk that is only
    told; ``shift``: which of its samples of frames; ``flipped``: the film is to be mirrored; ``backwards``: it is to run
    from its end."""

    name: str
    plan: Plan
    frames: tuple[Moment, ...]
    film: int | None = None
    shift: int = 0
    flipped: bool = False
    backwards: bool = False

    @property
    def moments(self) -> tuple[Moment, ...]:
        """What is told of each patch of time."""
        return told(self.frames)

    def mirrored(self) -> "Walk":
        """The same walk with left and right exchanged."""
        plan = replace(
            self.plan,
            turns=tuple(MIRROR[turn] for turn in self.plan.turns),
            landmarks=tuple(replace(mark, side=MIRROR[mark.side]) for mark in self.plan.landmarks),
        )
        frames = tuple(Moment(MIRROR.get(m.motion, m.motion), m.landmark, MIRROR.get(m.side, "")) for m in self.frames)
        return replace(self, plan=plan, frames=frames, flipped=not self.flipped)

    def run_backwards(self) -> "Walk":
        """What is seen when its film runs backwards: a turn to the left is one to the right then. The plan stays that of
        the walk, so that it has a time line and no answers."""
        frames = tuple(replace(m, motion=MIRROR.get(m.motion, m.motion)) for m in reversed(self.frames))
        return replace(self, frames=frames, backwards=not self.backwards)

    def questions(self, preset: Preset, seed: int) -> list[Question]:
        """Its eight questions (fewer where one cannot be asked), with options, wording and letters drawn from ``seed``."""
        plan = replace(self.plan, seed=seed)
        return make_questions([(self.name, plan)], preset, seed)[0]


def planned_walks(count: int, seed: int, preset: Preset = PRESETS["tiny"]) -> list[Walk]:
    """Walks of split "train" that nobody has filmed, with their time lines."""
    own = child_seed(seed, "told")
    return [planned(f"told-{k}", make_plan(own, k, preset, SPLIT), preset) for k in range(count)]


def planned(name: str, plan: Plan, preset: Preset) -> Walk:
    """A plan as a walk: what its frames would show follows from the camera's schedule."""
    ticks = schedule(plan, preset)
    truth = {
        "frame_ticks": [*range(0, len(ticks), preset.ticks_per_frame)],
        "ticks": {"event": [t.event for t in ticks], "landmark": [t.landmark for t in ticks]},
        "plan": plan_row(plan),
    }
    taken = sample_indices(len(truth["frame_ticks"]), preset.fps, preset.sampling, n=preset.n_frames)
    return Walk(name, plan, shown(truth, taken))


def plan_of(row: dict) -> Plan:
    """The plan that a clip's truth holds."""
    marks = tuple(Landmark(**mark) for mark in row["landmarks"])
    acts = tuple(PlannedAction(**act) for act in row["actions"])
    own = {name: tuple(row[name]) for name in ("turns", "lengths")}
    return Plan(**{**row, **own, "landmarks": marks, "actions": acts})


def _array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """An array on disk: the one that is there, or a new one of zeros."""
    return np.lib.format.open_memmap(path, "r+" if path.exists() else "w+", dtype, shape)


class Films:
    """A benchmark's clips as walks whose frames lie, at the model's size, in one memory-mapped array.

    Args:
        bench: a benchmark folder of split "train".
        out: where the array goes; films that are there are not read again.
        processor: of the model; its sizes are used.
        shifts: by how many of a film's frames the sampled ones are moved, to see more of it; the first one is 0. Each of
            them is 0.9 MB a film on the disk.

    Raises:
        BadUse: a clip of another split.
    """

    def __init__(self, bench: str | Path, out: str | Path, processor, shifts: Sequence[int] = (0,), progress: bool = True):
        benchmark = load_benchmark(bench)
        if other := [clip.id for clip in benchmark.clips if clip.split != SPLIT]:
            raise BadUse(f"{bench}: clip {other[0]} is of another split: only maps of split {SPLIT!r} are learned from")
        self.how = choose_sampling(benchmark.info, None, None, None)
        self.how |= choose_pixels(processor.video_processor.size, None)
        self.spec, self.fps = video_spec(processor), benchmark.clips[0].fps
        self.walks: list[Walk] = []
        self.others: list[list[Walk]] = []  # of each walk: itself, and the same from other frames
        out = Path(out)
        facts = {"benchmark": benchmark.info["hash"], "how": self.how, "shifts": list(shifts)}
        claim(out, facts, name="films.json")
        paths = [benchmark.video_path(clip.video) for clip in benchmark.clips]
        first = self._read(paths[0], benchmark.clips[0].frames)
        shape = (len(paths), len(shifts), self.how["frames"])
        self.frames = _array(out / "frames.npy", np.uint8, (*shape, *first.pixels.shape[1:]))
        self.times = _array(out / "times.npy", np.float64, shape)
        for k in tqdm(range(len(paths)), "reading films", unit="clip", disable=not progress):
            clip = benchmark.clips[k]
            truth = load_truth(benchmark, clip.id)
            taken = sample_indices(clip.frames, clip.fps, self.how["sampling"], n=self.how["frames"])
            samples = [np.clip(taken + shift, 0, clip.frames - 1) for shift in shifts]
            if not self.times[k].any():
                film = self._read(paths[k], clip.frames)
                places = np.searchsorted(film.indices, np.stack(samples))
                self.frames[k], self.times[k] = film.pixels[places], film.timestamps_s[places]
            plan = plan_of(truth["plan"])
            found = [Walk(clip.id, plan, shown(truth, frames), k, at) for at, frames in enumerate(samples)]
            self.walks.append(found[0])
            self.others.append([walk for walk in found if _items(walk) == _items(found[0])])

    def _read(self, path: Path, frames: int) -> Frames:
        """All frames of a film; where they are an odd number one of them twice, since frames are read in pairs."""
        how, factor = self.how, self.spec.patch * self.spec.merge
        return load_frames(path, factor, how["min_pixels"], how["max_pixels"], sampling="uniform", n=frames + frames % 2)

    def shifted(self, walk: Walk, rng: random.Random) -> Walk:
        """The walk as one of the samples of its film's frames shows it, of those from which the same follows."""
        return rng.choice(self.others[walk.film])

    def video(self, walk: Walk) -> VideoInputs:
        """The film of a walk as the model takes it, mirrored or backwards where the walk is."""
        pixels = self.frames[walk.film, walk.shift]
        pixels = pixels[:, :, ::-1] if walk.flipped else pixels
        pixels = np.ascontiguousarray(pixels[::-1] if walk.backwards else pixels)
        times = self.times[walk.film, walk.shift]
        indices = np.rint(times * self.fps).astype(np.int64)
        frames = Frames(pixels, times, "", self.how["sampling"], self.fps, int(indices[-1]) + 1, indices)
        return prepare(frames, self.spec, self.how["min_pixels"], self.how["max_pixels"])


def _items(walk: Walk) -> list[tuple]:
    """What the time line says of each task."""
    return [items_told(walk.moments, task) for task in ("direction", "landmark", "action")]
