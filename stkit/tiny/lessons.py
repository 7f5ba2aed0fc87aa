"""What is learned from a walk: questions with their answers, of which a lesson takes a part.

    lines = lesson(walk.questions(preset, seed), walk, "derive", reader)

- "derive": without a video, from the route on: it is given, what follows from it is learned;
- "read": without a video, from the time line on: it is given, the route is learned too;
- "see": with the video, the time line alone;
- "answer": with the video, all of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..bench.schema import Question
from ..bench.timeline import render
from ..runtime import BadUse, StkitError
from ..train.answers import answer_text
from ..train.forest import Line
from ..vlm.prompts import build_prompt, encode_answer
from ..vlm.video import VideoInputs
from .walks import Walk

LESSONS = ("derive", "read", "see", "answer")


class Reader(NamedTuple):
    """What prompts are made with: a processor and a model's family."""

    processor: object
    family: str


def parts(question: Question, walk: Walk, lesson: str) -> tuple[str, str, bool]:
    """The text that is given, the text that is learned after it, and whether that ends the turn."""
    if lesson not in LESSONS:
        raise BadUse(f"lesson {lesson!r} is unknown: use {', '.join(LESSONS)}")
    text, line = answer_text(question, "timeline", moments=walk.moments), render(walk.moments)
    head = f"<think>{line}"
    if not text.startswith(head):
        raise StkitError(f"question {question.id}: its text does not begin with the time line")
    if lesson == "see":
        return "", head, False
    if lesson == "answer":
        return "", text, True
    if lesson == "read":
        return head, text[len(head) :], True
    given, stop, learned = text[len(head) :].partition(".")
    return f"<think>{given.lstrip()}{stop}", learned, True


def lesson(
    questions: Sequence[Question], walk: Walk, kind: str, reader: Reader, video: VideoInputs | None = None
) -> list[Line]:
    """A line for each question: weight 1 on what is learned, 0 on what is given.

    Args:
        kind: one of :data:`LESSONS`.
        video: the walk's film; None for the lessons that are told.
    """
    tokenizer, found = reader.processor.tokenizer, []
    for question in questions:
        given, learned, ends = parts(question, walk, kind)
        ids = encode_answer(tokenizer, given + learned)
        known = len(encode_answer(tokenizer, given)) - 1 if given else 0
        if given and ids[:known] != encode_answer(tokenizer, given)[:known]:
            raise StkitError(f"question {question.id}: what is given and what is learned share a token")
        ids = ids if ends else ids[:-1]
        prompt = build_prompt(question, reader.processor, reader.family, video, think=True)
        found.append(Line(prompt.ids, ids, (0.0,) * known + (1.0,) * (len(ids) - known), question.id))
    return found
