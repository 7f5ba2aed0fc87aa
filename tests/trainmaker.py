"""What the tests of training share: a benchmark of noise with truths, and settings that are done in seconds."""

import json
from pathlib import Path

from benchmaker import lines, write_bench

from stkit.bench.schema import load_benchmark, row_of
from stkit.runs import write_jsonl

QUICK = {"data.split": None, "sft.form": "answer", "train.steps": 2, "data.tasks": ["direction", "landmark"]}


def metrics(out: Path) -> list[dict]:
    """The rows of metrics.jsonl without what can't be equal twice."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "resumed_from_step")}
        for row in lines(out / "metrics.jsonl")
    ]


def with_solutions(folder: Path) -> Path:
    """A benchmark whose questions have a reasoning text of their own."""
    bench = write_bench(folder)
    rows = [row_of(q) | {"solution": f"<think>I saw {q.clip_id}.</think> <answer>{answer(q)}</answer>"}
            for q in load_benchmark(bench).questions]  # fmt: skip
    write_jsonl(bench / "questions.jsonl", rows)
    return bench


def answer(question) -> str:
    return question.answer if question.is_open else "ABCD"[question.answer]


def edit_row(path: Path, number: int, **changes) -> None:
    """Change a row of a JSONL file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number] |= changes
    write_jsonl(path, rows)
