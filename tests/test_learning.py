"""Does it learn? Toy tasks that are done in seconds: a copy task, a bandit in every variant, two clips told apart."""

from dataclasses import replace

import numpy as np
import pytest
from benchmaker import write_bench
from trainmaker import metrics

from stkit import evaluate, grpo, sft
from stkit.bench.schema import Question
from stkit.vlm.answers import parse

OPTIONS = ("left, right", "right, left", "left, left", "right, right")
FAST = {"train.warmup": 0, "train.schedule": "constant", "train.save_every": 1000, "train.weight_decay": 0, "data.per_clip": None}
TEXT = FAST | {"train.tower": False, "train.projector": False}  # what the frames show plays no part


def question(name: str, clip: str, answer: int, text: str, split: str = "train", solution: str = "") -> Question:
    return Question(
        id=name, clip_id=clip, video=f"{clip}.mp4", group=clip, task="direction", order="forward", question=text,
        options=OPTIONS, answer=answer, split=split, solution=solution,
    )  # fmt: skip


def bandit() -> list[Question]:
    """Four questions on one clip, one right letter each."""
    words = ("tree", "torch", "door", "wall")  # often enough that no attention has to form to tell them apart
    return [question(f"q{k}", "a", (k * 3 + 1) % 4, f"{word} " * 24) for k, word in enumerate(words)]


def right(rollouts):
    return [float(parse(r.text, r.question.options) == r.question.answer) for r in rollouts]


def wrong(rollouts):
    return [1 - value for value in right(rollouts)]


@pytest.fixture(scope="module")
def chance(tmp_path_factory):
    """A benchmark of the bandit, and a model that answers each of its questions with any letter, equally often."""
    folder = tmp_path_factory.mktemp("bandit")
    taught = [replace(q, id=f"{q.id}-{letter}", solution=letter) for q in bandit() for letter in "ABCD"]
    write_bench(folder / "taught", taught)
    write_bench(folder / "bench", bandit())
    own = FAST | {"sft.form": "solution", "train.batch": 1, "train.lr": 2e-3}
    run = sft(folder / "taught", "tiny-untrained", out=folder / "sft", steps=25, overrides=own, progress=False)
    assert run.metrics["loss"].iloc[-1] == pytest.approx(np.log(4) / 2, abs=0.1)  # a letter, then the end of the turn
    return folder / "bench", run.model


@pytest.mark.parametrize(
    "variant, reward", [("grpo", right), ("dr_grpo", right), ("dapo", right), ("gspo", right), ("grpo", wrong)]
)
def test_grpo_learns_a_bandit_and_unlearns_it_with_the_reward_inverted(chance, tmp_path, variant, reward):
    bench, model = chance
    own = FAST | {
        "grpo.variant": variant, "grpo.group": 16, "grpo.max_new_tokens": 2, "grpo.beta": 0.05, "train.batch": 1, "train.lr": 5e-4,
        "grpo.refills": 0, "rewards.correct": 0, "rewards.format": 0, "grpo.patience": 1000,
    }  # fmt: skip
    run = grpo(
        bench,
        model=model,
        out=tmp_path / "run",
        steps=45,
        overrides=own,
        rewards={reward.__name__: reward},
        progress=False,
    )
    said = run.rollouts.assign(right=[float(t.strip()[:1] == "ABCD"[bandit()[int(i[1])].answer]) for t, i in
                                      zip(run.rollouts["text"], run.rollouts["id"])])  # fmt: skip
    start, end = said[said["step"] == 1]["right"].mean(), said[said["step"] > 35]["right"].mean()
    assert 0.05 < start < 0.5
    assert end >= 0.95 if reward is right else end <= 0.05


def test_sft_learns_a_copy_task(tmp_path):
    """The answer is a letter that stands in the question."""
    rows = [
        question(f"c{k}-{clip}", clip, k % 4, f"Say {'ABCD'[k % 4]} {k}.", split="train")
        for clip in "abc"
        for k in range(8)
    ]
    bench = write_bench(tmp_path / "bench", rows)
    own = TEXT | {"sft.form": "answer", "train.batch": 3, "train.lr": 2e-3}
    sft(bench, "tiny-untrained", out=tmp_path / "run", steps=40, overrides=own, progress=False)
    scores = evaluate(bench, model=tmp_path / "run" / "model", out=tmp_path / "eval", progress=False).scores
    assert scores["accuracy"] >= 0.99


def test_frames_matter_two_clips_that_only_the_video_tells_apart(tmp_path):
    """The same question on both clips, with other answers: blind it cannot be better than chance."""
    rows = [
        question(f"{clip}{k}", clip, answer, f"Which way, number {k}?")
        for clip, answer in (("a", 0), ("b", 3))
        for k in range(2)
    ]
    bench = write_bench(tmp_path / "bench", rows)
    own = FAST | {"sft.form": "answer", "train.batch": 2, "train.lr": 1e-3}
    sft(bench, "tiny-untrained", out=tmp_path / "run", steps=40, overrides=own, progress=False)
    scores = evaluate(bench, model=tmp_path / "run" / "model", out=tmp_path / "eval", progress=False).scores
    assert scores["accuracy"] == 1.0 and scores["blind"] <= 0.5


def test_grpo_learns_from_frames_too(tmp_path):
    rows = [question(clip, clip, answer, "Which way?") for clip, answer in (("a", 0), ("b", 3))]
    bench = write_bench(tmp_path / "bench", rows)
    taught = write_bench(
        tmp_path / "taught", [replace(q, id=f"{q.id}{letter}", solution=letter) for q in rows for letter in "AD"]
    )
    own = FAST | {"train.batch": 2, "train.lr": 1e-3}
    start = sft(
        taught, "tiny-untrained", out=tmp_path / "sft", steps=25, progress=False,
        overrides=own | {"sft.form": "solution"},
    )  # fmt: skip
    own |= {"grpo.group": 16, "grpo.max_new_tokens": 2, "rewards.format": 0, "grpo.patience": 1000}
    run = grpo(bench, model=start.model, out=tmp_path / "run", steps=40, overrides=own, progress=False)
    assert np.mean([row["reward"] for row in metrics(run.out)[-4:]]) >= 0.95
