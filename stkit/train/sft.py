"""SFT: a model learns to write answers, several questions of a video in one tree, the loss on the answers' tokens only.

    run = sft("runs/walks", model="tiny", preset="tiny", out="runs/sft", steps=60)
    run.metrics[["step", "loss"]], run.model

What is learned is ``sft.form``: a time line and what follows from it, the paper's cold start ("thinking reverse first"),
the row's own solution, or the answer alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..bench.schema import Benchmark, Question
from ..bench.timeline import load_truth, timeline
from ..vlm.load import Loaded
from ..vlm.logps import tree_logps
from ..vlm.prompts import build_prompt, encode_answer
from .answers import answer_text
from .data import Item, Seen
from .forest import Line, Plant, plant
from .run import Run, open_run
from .start import Job, begin, with_named


def sft(
    bench: str | Path,
    model: str | Path | Loaded = "tiny",
    preset: str | Path = "tiny",
    out: str | Path | None = None,
    steps: int | None = None,
    seed: int | None = None,
    eval_every: int | None = None,
    overrides: Mapping[str, object] | None = None,
    progress: bool = True,
) -> Run:
    """Train on answers; run again in the same folder, it goes on where it was stopped.

    Args:
        bench: a benchmark folder, a question file, or a JSONL of ``{"video", "prompt", "completion"}`` with its videos in
            ``videos/`` beside it.
        model: a name or folder for :func:`stkit.load_model`, or what it returned (it is trained in place).
        preset: a name that ships or a YAML file.
        out: the run's folder; None for a temporary one.
        steps, seed, eval_every: train.steps, train.seed, train.eval_every.
        overrides: any other setting by dotted key, ``{"train.lr": 1e-4}``.
        progress: a bar on stderr.

    Returns:
        :class:`stkit.train.run.Run`.

    Raises:
        BadUse: a setting that makes no sense.
        StkitError: no such benchmark or model, no question with a video, another run's folder, a loss that is not
            finite (the last checkpoint stays), no memory.
    """
    job = begin("sft", bench, model, preset, out, with_named(overrides, steps, seed, eval_every), progress)
    with job.loop.guarded():
        while job.loop.step < job.loop.steps:
            _update(job)
        job.loop.finish()
    job.processes.end()
    return open_run(job.out)


def _update(job: Job) -> None:
    """One step: read the clips, write down what is to be learned, learn it."""
    items = job.items(job.cursor, job.clips)
    seen = [job.watcher.watch(item) for item in items]
    lines = [examples(job.benchmark, item, shown, job) for item, shown in zip(items, seen)]
    with job.policy.whole(tower_only=True):
        features = [job.features(shown) for shown in seen]
    counts = job.processes.summed({"learned": sum(sum(line.weight) for clip in lines for line in clip),
                                   "questions": sum(map(len, lines))})  # fmt: skip

    def plants(max_tokens: int) -> list[Plant]:
        return [one for k, clip in enumerate(lines) for one in plant(k, clip, max_tokens)]

    def loss_of(forest: Sequence[Plant]) -> tuple[torch.Tensor, dict]:
        encoded = None if job.policy.tower else [features[one.clip] for one in forest]
        found = tree_logps(
            job.policy.model, [one.tree for one in forest], [seen[one.clip].inputs for one in forest], encoded,
            entropy=True, tokens="weighted",
        )  # fmt: skip
        weight = found.packed.weight.to(found.log_probs.device)
        entropy = float((found.entropy.detach() * weight).sum())
        return -(found.log_probs * weight).sum() / counts["learned"], {"entropy": entropy}

    told = job.loop.learn(plants, loss_of)
    job.cursor += job.clips
    job.loop.log({
        "loss": told["loss"], "reward": None, "kl": None, "entropy": told["entropy"] / counts["learned"], "lr": told["lr"],
        "grad_norm": told["grad_norm"], "clip_fraction": None, "tokens": int(told["tokens"]),
        "learned_tokens": int(counts["learned"]), "questions": int(counts["questions"]), "clips": job.clips,
        "epoch": job.cursor / len(job.course),
    })  # fmt: skip
    job.score_if_due()
    job.loop.save_if_due(job.cursor)


def examples(benchmark: Benchmark, item: Item, seen: Seen, job: Job) -> list[Line]:
    """What is learned on one clip: a prompt and an answer for each question, those of one prompt beside each other."""
    form = job.settings.sft.form
    moments = clip_moments(benchmark, item, seen) if form in ("timeline", "checked") else None
    found = []
    for question in item.questions:
        other = opposite(benchmark, question) if form == "paper" else None
        text = answer_text(question, form, other, moments)
        found.append(example(question, text, seen, job, think=form != "answer"))
    return found


def example(question: Question, text: str, seen: Seen, job: Job, think: bool) -> Line:
    """One prompt with the text that answers it: the end of the turn is learned too, the prompt is not."""
    loaded = job.policy.loaded
    ids = encode_answer(loaded.processor.tokenizer, text)
    prompt = build_prompt(
        question, loaded.processor, loaded.record["family"], seen.inputs, job.settings.data.prompt, think=think,
        context=loaded.record["context"], max_new_tokens=len(ids),
    )  # fmt: skip
    return Line(prompt.ids, ids, (1.0,) * len(ids), question.id)


def clip_moments(benchmark: Benchmark, item: Item, seen: Seen):
    """The true time line of a clip at the frames that are shown; None where the benchmark has no truth of it."""
    truth = load_truth(benchmark, item.clip_id)
    return None if truth is None else timeline(truth, seen.indices)


def opposite(benchmark: Benchmark, question: Question) -> Question | None:
    """The question of the other order, of the same task on the same clip."""
    others = (q for q in benchmark.questions if q.clip_id == question.clip_id and q.task == question.task)
    return next((q for q in others if q.order != question.order), None)
