"""What a model is taught to write: the text that answers a question, in one of five forms.

    answer_text(question, "timeline", moments=moments)
    # <think>Timeline: stand tree left, ..., stand. Route: left, right. Reversed: left, right. left: A, C; right: C.
    # So the answer is C.</think> <answer>C</answer>

"timeline" is ours: what is seen, the route that follows, reversed if that is asked, and after each of its items the
letters of the options that still agree; no step is more than a look-up. "checked" has three words for every moment of
the time line, and after the route each option is read as far as it agrees (``A: left, left. B: right. C: left, right.
So the answer is C.``): look-ups again, and easier ones. "paper" is ST-R1's cold start, which first answers the question
of the other order. "solution" is the row's own text. "answer" is the letter (or route) alone, as
the prompt without tags asks for it.
"""

import re
from collections.abc import Sequence

from ..bench.routes import parse, reverse
from ..bench.schema import LETTERS, Question, Route, Step
from ..bench.timeline import WORDS, Moment, render
from ..runtime import BadUse, StkitError
from .settings import FORMS

UNDONE = {"put down": "put", "close a door": "close"}
LEAD = re.compile(
    r"\s*(?:Please take an? egocentric view to understand the following questions?\.\s*)*"
    r"(?:Based on this (?:first-person )?video,\s*)?",
    re.IGNORECASE,
)


def answer_text(
    question: Question, form: str, opposite: Question | None = None, moments: Sequence[Moment] | None = None
) -> str:
    """The text that is learned for one question.

    Args:
        question: what is asked.
        form: "timeline", "checked", "paper", "solution" or "answer".
        opposite: the question of the other order, of the same task on the same clip ("paper" needs it).
        moments: the clip's time line at the frames that are shown ("timeline" and "checked" need it).

    Returns:
        A text from which stkit.vlm.answers reads the right answer ("solution": the row's own text, unseen).

    Raises:
        BadUse: an unknown form.
        StkitError: the form needs what the question or its clip has not.
    """
    if form in ("timeline", "checked"):
        return f"<think>{_derivation(question, moments, form)}</think> {tagged(question)}"
    if form == "paper":
        return _cold_start(question, opposite)
    if form == "solution":
        if not question.solution.strip():
            raise StkitError(f"question {question.id}: it has no solution to learn: set sft.form to another form")
        return question.solution
    if form == "answer":
        return short_answer(question)
    raise BadUse(f"form {form!r} is unknown: use {', '.join(FORMS)}")


def short_answer(question: Question) -> str:
    """The right option's letter; of an open-ended question the route's text."""
    return question.answer if question.is_open else LETTERS[question.answer]


def right_text(question: Question) -> str:
    """The right option's text; of an open-ended question the route's."""
    return question.answer if question.is_open else question.options[question.answer]


def tagged(question: Question) -> str:
    """The answer in its tags."""
    return f"<answer>{short_answer(question)}</answer>"


def _cold_start(question: Question, opposite: Question | None) -> str:
    alike = opposite and (opposite.clip_id, opposite.task) == (question.clip_id, question.task)
    if not alike or opposite.order == question.order:
        raise StkitError(
            f"question {question.id}: its clip has no {question.task} question of the other order, which is answered "
            "first in sft.form=paper: set sft.form to another form, or leave such questions out (data.tasks)"
        )
    return cold_start(
        opposite.order, plain_question(opposite), f" {right_text(opposite)}", plain_question(question), short_answer(question)
    )


def cold_start(order: str, asked_first: str, told_first: str, asked: str, answer: str) -> str:
    """ST-R1's text from its parts.

    Args:
        order: of the question that is answered first.
        asked_first, asked: the two questions as :func:`plain_question` puts them.
        told_first: the first one's answer, with the space before it (released lists of landmarks have none).
        answer: a letter, or a route's text.

    Source: the released training rows of WPR001/Ego-ST, letter by letter.
    """
    return (
        f"<think>Let's start by thinking {order} {asked_first}?{told_first} And then think about {asked}? "
        f"Hence, the correct answer is {answer}</think> <answer>{answer}</answer>"
    )


def plain_question(question: Question) -> str:
    """A question as it stands within a sentence: without "Based on this video,", its last mark and its capital."""
    text = question.question[LEAD.match(question.question).end() :]
    return text[:1].lower() + re.sub(r"[?.]\s*$", "", text[1:])


def _derivation(question: Question, moments: Sequence[Moment] | None, form: str) -> str:
    """Time line, route, its reverse where that is asked, what of the options agrees with it, the letter.

    The route is the right answer's own: a time line of fewer frames than the benchmark is made for may lack a turn.
    """
    if not moments:
        raise StkitError(
            f"question {question.id}: clip {question.clip_id} has no truth, so there is no time line to learn: set "
            "sft.form=solution (the rows' own texts) or sft.form=answer"
        )
    route = told_route(question)
    forward = reverse(route) if question.order == "reverse" else route
    said = [render(moments, dense=form == "checked"), derived(forward, question)]
    if not question.is_open:
        alive = narrowed(question)
        if form == "timeline":
            told = ["; ".join(f"{_word(step)}: {', '.join(letters)}" for step, letters in alive)]
        else:
            told = [f"{letter}: {', '.join(items)}" for letter, items in checked(question)]
        said.append(f"{'. '.join(told)}. So the answer is {short_answer(question)}.")
    return " ".join(said)


def derived(route: Route, question: Question) -> str:
    """A route forwards, and after it its reverse where the question asks for that, in the words of the time line."""
    told = f"Route: {_listed(route, question)}."
    return told if question.order == "forward" else f"{told} Reversed: {_listed(reverse(route), question)}."


def told_route(question: Question) -> Route:
    """The route that the right answer tells, in the order that is asked.

    Raises:
        StkitError: it tells none.
    """
    return _route(question, right_text(question))


def narrowed(question: Question) -> list[tuple[Step, list[str]]]:
    """Each item of the right answer with the letters of the options that agree with it up to there.

    Straights are no items: all options of a question on directions have the same. With the last item an option that
    goes on is out too.

    Raises:
        StkitError: an option is no route, or more than one tells the right answer's route.
    """
    listed = [_items(_route(question, option)) for option in question.options]
    right = listed[question.answer]
    found = []
    for k, step in enumerate(right, 1):
        agree = [items[:k] == right[:k] and (k < len(right) or len(items) == k) for items in listed]
        found.append((step, [letter for letter, yes in zip(LETTERS, agree) if yes]))
    if not found or len(found[-1][1]) != 1:
        same = len(found[-1][1]) if found else "all"
        raise StkitError(
            f"question {question.id}: {same} of its options tell one route, so that none can be derived: "
            "set sft.form=answer, or leave the question out"
        )
    return found


def _route(question: Question, text: str) -> Route:
    try:
        return parse(text)
    except StkitError as error:
        raise StkitError(
            f"question {question.id}: no route can be read from its answer or options ({error}): "
            "set sft.form=solution or sft.form=answer"
        ) from error


def _items(route: Route) -> tuple[Step, ...]:
    return tuple(step for step in route.steps if step.value != "straight")


def checked(question: Question) -> list[tuple[str, list[str]]]:
    """Each option up to the right one, in the words of the time line, as far as it agrees with the right answer: to the
    first item that differs (with it), or to its end."""
    listed = [short_items(question, option) for option in question.options]
    right, found = listed[question.answer], []
    for letter, items in zip(LETTERS, listed[: question.answer + 1]):
        differs = next((k for k, item in enumerate(items) if right[k : k + 1] != [item]), len(items))
        found.append((letter, items[: differs + 1]))
    return found


def short_items(question: Question, text: str) -> list[str]:
    """The items of an option, or of an open-ended answer, in the words of the time line; straights are none."""
    return [_word(step) for step in _items(_route(question, text))]


def _listed(route: Route, question: Question) -> str:
    """A route's items in short words; with the straights where the whole route is asked for."""
    return ", ".join(_word(step) for step in (route.steps if question.task == "route" else _items(route)))


def _word(step: Step) -> str:
    return " ".join(filter(None, (UNDONE.get(step.value) or WORDS.get(step.value, step.value), step.side)))
