"""A benchmark of walks that nobody films: plans, questions and truth as ``stkit build`` writes them, without videos."""

from pathlib import Path
from types import SimpleNamespace

from stkit.bench.chunk import truth
from stkit.bench.plans import make_plan, preset, schedule
from stkit.bench.questions import make_questions
from stkit.bench.schema import Benchmark, Clip, load_benchmark, row_of
from stkit.runs import write_json, write_jsonl
from stkit.sampling import sample_indices

MADE = preset("tiny")


def make_plans(count: int, seed: int = 0) -> dict:
    """Plans by clip id."""
    return {f"walk-{seed}-{index:05d}": make_plan(seed, index, MADE) for index in range(count)}


def truth_of(clip_id: str, plan) -> dict:
    """The truth of a walk that goes as planned."""
    walked = SimpleNamespace(poses=[(0.0,) * 4] * len(schedule(plan, MADE)), off_units=0.0, off_degrees=0.0)
    return truth(clip_id, plan, walked, MADE)


def sampled(truth: dict, n: int = MADE.n_frames):
    """The frames of a clip that a model is shown."""
    return sample_indices(len(truth["frame_ticks"]), MADE.fps, MADE.sampling, n=n)


def make_walks(folder: Path, clips: int = 8, seed: int = 0) -> Benchmark:
    """Write a benchmark folder and load it."""
    plans = make_plans(clips, seed)
    rows = []
    for name, plan in plans.items():
        told = truth_of(name, plan)
        frames = len(told["frame_ticks"])
        write_json(folder / "truth" / f"{name}.json", told)
        rows.append(row_of(Clip(
            name, f"{name}.mp4", plan.group, plan.split(), frames, MADE.fps, MADE.width, MADE.height, frames / MADE.fps,
            truth=f"truth/{name}.json",
        )))  # fmt: skip
    questions, _ = make_questions(plans.items(), MADE, seed)
    write_jsonl(folder / "clips.jsonl", rows)
    write_jsonl(folder / "questions.jsonl", map(row_of, questions))
    write_json(folder / "benchmark.json", {"format_version": 1, "sampling": MADE.sampling, "n_frames": MADE.n_frames})
    return load_benchmark(folder)
