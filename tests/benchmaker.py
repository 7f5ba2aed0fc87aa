"""A small benchmark with videos of noise, for the tests of the evaluation."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from stkit.bench.schema import Question, row_of
from stkit.runs import write_json, write_jsonl

CLIPS = ("a", "b", "c")


def write_video(path: Path, seed: int, frames: int = 12) -> None:
    picture = (
        np.random.default_rng(seed).integers(0, 255, (frames, 6, 8, 3), dtype=np.uint8).repeat(14, 1).repeat(14, 2)
    )
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=Fraction(4))
        stream.width, stream.height, stream.pix_fmt = 112, 84, "yuv420p"
        for image in picture:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())


def make_questions() -> list[Question]:
    texts = {
        "direction": ("left, right", "right, left", "left, left", "right, right"),
        "landmark": ("a tree", "a wall", "a torch"),
        "route": (),
    }
    found = []
    for k, clip in enumerate(CLIPS):
        for task, options in texts.items():
            for order in ("forward", "reverse"):
                answer = "go straight, turn left" if task == "route" else k % len(options)
                found.append(Question(
                    id=f"{clip}-{task}-{order}", clip_id=clip, video=f"{clip}.mp4", group=clip, task=task, order=order,
                    question=f"Which {task} {order}?",
                    options=options, answer=answer, split="test" if clip == "c" else "train",
                ))  # fmt: skip
    return found


def write_bench(folder: Path, questions=None) -> Path:
    (folder / "videos").mkdir(parents=True)
    for k, clip in enumerate(CLIPS):
        write_video(folder / "videos" / f"{clip}.mp4", k)
    write_jsonl(folder / "questions.jsonl", map(row_of, questions or make_questions()))
    write_json(folder / "benchmark.json", {"format_version": 1, "sampling": "uniform", "n_frames": 4})
    return folder


def lines(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
