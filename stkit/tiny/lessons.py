"""What is learned from a walk: questions with their answers, of which a lesson takes a part.

    lines = lesson(walk.questions(preset, seed), walk, "read", reader)

- "recall": no video and no question: the route is given, that it is said again is learned, backwards too, and in
  sentences;
- "spell": no video, and options in the words of the chain alone: what each of them says is learned, in any order;
- "match": the same, with the route given: what follows from it is learned;
- "read": without a video, from the time line on: it is given, the route is learned too;
- "glance": with the video, without the language part: what each frame shows is read off the features;
- "see": with the video, the time line alone, without a question;
- "tell": the same after a question, so that the words of the time line stand at any distance from the frames;
- "answer": with the video, all of it.

Of a film that runs backwards, and of its time line, the route is learned that it shows, and nothing of the options: they are of
the walk as it was.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ..bench.routes import Route, is_turn, reverse, undo
from ..bench.schema import LETTERS, Question
from ..bench.timeline import render, words_of
from ..runtime import BadUse, StkitError, generator
from ..train.answers import answer_text, derived, right_text, short_items, told_route
from ..train.forest import Line
from ..vlm.prompts import build_prompt, encode_answer
from ..vlm.video import VideoInputs
from .walks import Walk

LESSONS = ("recall", "spell", "match", "read", "glance", "see", "tell", "answer")
SEEN = ("glance", "see", "tell", "answer")  # lessons with a video
BARE = ("recall", "spell", "match")  # lessons without a question
FORM = "checked"
ASSISTANT = "<|im_start|>assistant\n"


class Reader(NamedTuple):
    """What prompts are made with: a processor and a model's family."""

    processor: object
    family: str


def parts(question: Question, walk: Walk, lesson: str) -> tuple[str, str, bool]:
    """The text that is given, the text that is learned after it, and whether that ends the turn."""
    if lesson not in LESSONS:
        raise BadUse(f"lesson {lesson!r} is unknown: use {', '.join(LESSONS)}")
    head = f"<think>{render(walk.moments, dense=True)}"
    if lesson == "glance":
        return "", glanced(walk), False
    if lesson in ("see", "tell"):
        return "", head, False
    text = answer_text(question, FORM, moments=walk.moments)
    if not text.startswith(head):
        raise StkitError(f"question {question.id}: its text does not begin with the time line")
    if walk.backwards:
        text = f"{head} {derived(_shown_backwards(question), question)}"
    if lesson == "answer":
        return "", text, not walk.backwards
    if lesson == "read":
        return head, text[len(head) :], not walk.backwards
    if lesson == "spell":
        return "", f"<think>{_spelled(question)}", False
    given, stop, learned = text[len(head) :].partition(".")
    if lesson == "recall" and not question.is_open:
        learned = f"{learned.partition(' A:')[0]} {'; '.join(short_items(question, right_text(question)))}."
    return f"<think>{given.lstrip()}{stop}", learned, lesson != "recall"


def _shown_backwards(question: Question) -> Route:
    """The route that a film shows from its end on: turns as on the way back, all else as it was seen."""
    back = told_route(question)
    there = reverse(back) if question.order == "reverse" else back
    return Route(tuple(step if is_turn(step) else undo(step) for step in reverse(there).steps))


def glanced(walk: Walk) -> str:
    """What each of its frames shows, three words a frame."""
    return "".join(f" {word}" for moment in walk.frames for word in words_of(moment))


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
        start = encode_answer(tokenizer, given)[:-1] if given else ()
        known = len(start)
        if ids[:known] != start:
            raise StkitError(f"question {question.id}: what is given and what is learned share a token")
        ids = ids if ends else ids[:-1]
        if kind in BARE:
            bare = _options(question) * (kind != "recall") + ASSISTANT
            prompt = tuple(tokenizer.encode(bare, add_special_tokens=False))
        elif kind in ("glance", "see"):
            nothing = replace(question, question="", options=())
            prompt = build_prompt(nothing, reader.processor, reader.family, video, style="plain").ids
        else:
            prompt = build_prompt(question, reader.processor, reader.family, video, think=True).ids
        found.append(Line(prompt, ids, (0.0,) * known + (1.0,) * (len(ids) - known), question.id))
    return found


def _options(question: Question) -> str:
    """The options in the words of the chain, a line for each."""
    routes = [short_items(question, option) for option in question.options]
    return "".join(f"{letter}. {', '.join(route)}\n" for letter, route in zip(LETTERS, routes))


def _spelled(question: Question) -> str:
    """What each option says, in an order that depends on the question alone."""
    told = [f"{letter}: {', '.join(short_items(question, option))}" for letter, option in zip(LETTERS, question.options)]
    generator(0, "spell", question.id, *question.options).shuffle(told)
    return ". ".join(told) + "."
