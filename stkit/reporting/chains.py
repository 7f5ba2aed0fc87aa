"""Where a chain of thought went wrong: each step of a think-trace, held against what it had to follow from.

The kit's models write down what they see, the route, its reverse where that is asked, what of the options agrees with it,
and the answer (:mod:`stkit.train.answers`). Each step is a look-up in the one before, so each can be checked by itself, and the
first wrong one names the error::

    chain = read_chain("<think>Timeline: left, straight, right. Route: left, right. left: A, C; right: C. So the ...")
    steps = check_steps(chain, question, chosen=2)    # {"see": True, "read": True, "reverse": None, "match": True}
    outcome(steps, correct=True)                      # "right"
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import stats
from ..bench import routes
from ..bench.plans import MIRROR
from ..bench.routes import ACTIONS, LANDMARKS
from ..bench.schema import LETTERS, Question, Route, Step
from ..bench.timeline import WORDS, Moment
from ..bench.timeline import parse as parse_timeline
from ..runtime import StkitError
from ..train.answers import UNDONE, told_route
from .scores import KINDS, Row, plain

STEPS = ("see", "read", "reverse", "match")
WRONG = {"see": "saw wrong", "read": "read wrong", "reverse": "reversed wrong", "match": "matched wrong"}
RIGHT, LUCKY, UNREAD = "right", "right by luck", "no chain"
OUTCOMES = (RIGHT, LUCKY, *WRONG.values(), UNREAD)
ABSENT = "nothing"  # a place that only one of two time lines has
NO_MARK = "none"
Items = tuple[Step, ...]

SPOKEN = {word: Step("move", word) for word in ("straight", *MIRROR)}
SPOKEN |= {WORDS[kind]: Step("action", kind) for kind in ACTIONS}
SPOKEN |= {word: Step("action", kind) for kind, word in UNDONE.items()}
SPOKEN |= {f"{kind} {side}": Step("landmark", kind, side) for kind in LANDMARKS for side in MIRROR}
ENDED = re.compile(r"\btime\s?line\s*:[^.<\n]*\.", re.IGNORECASE)
SO = re.compile(r"so the answer is ([A-Z])", re.IGNORECASE)
ALIVE = re.compile(r"(.+?)\s*:\s*((?:[A-Z](?:\s*,\s*[A-Z])*)?)")
CHECKED = re.compile(r"([A-Z])\s*:\s*(.+)")


@dataclass(frozen=True)
class Chain:
    """What a think-trace says, step by step; None where nothing can be read.

    ``route`` and ``reversed`` are items without straights; ``alive`` has each item with its letters, as a set ("left: B,
    D; right: D"), or ``checked`` each option with the items that were read of it ("B: left, left. D: left, right");
    ``letter`` is that of "So the answer is".
    """

    moments: tuple[Moment, ...]
    route: Items | None
    reversed: Items | None
    alive: tuple[tuple[Step, frozenset[str]], ...] | None
    checked: tuple[tuple[str, Items], ...] | None
    letter: str | None


def read_chain(text: str) -> Chain | None:
    """The chain that a model's text holds, None without a whole time line: no other step can be judged without it.

    A sentence that is not there, stands there twice, is cut off or says what is no item counts as unreadable.
    """
    thought = re.split(r"<\s*/\s*think\s*>|<\s*answer\s*>", text, maxsplit=1, flags=re.IGNORECASE)[0]
    moments = parse_timeline(thought)
    if not moments or not ENDED.search(thought):
        return None
    sentences = [" ".join(sentence.split()) for sentence in thought.split(".")[:-1]]  # after the last stop: cut off
    ends = [k for k, sentence in enumerate(sentences) if SO.fullmatch(sentence)]
    alive = _alive(sentences[ends[0] - 1]) if len(ends) == 1 else None
    letter = SO.fullmatch(sentences[ends[0]])[1].upper() if len(ends) == 1 else None
    checked = _checked(sentences[: ends[0]]) if len(ends) == 1 else None
    return Chain(moments, _listed(sentences, "route:"), _listed(sentences, "reversed:"), alive, checked, letter)


def _listed(sentences: list[str], heading: str) -> Items | None:
    """The items of the one sentence that begins with these words."""
    found = [sentence[len(heading) :] for sentence in sentences if sentence.lower().startswith(heading)]
    steps = [SPOKEN.get(_word(part)) for part in found[0].split(",")] if len(found) == 1 else [None]
    return None if None in steps else _items(steps)


def _alive(sentence: str) -> tuple[tuple[Step, frozenset[str]], ...] | None:
    parts = [ALIVE.fullmatch(part.strip()) for part in sentence.split(";")]
    if not all(parts) or any(_word(part[1]) not in SPOKEN for part in parts):
        return None
    return tuple((SPOKEN[_word(part[1])], frozenset(re.findall("[A-Z]", part[2]))) for part in parts)


def _checked(sentences: list[str]) -> tuple[tuple[str, Items], ...] | None:
    """The options that the last sentences read, in their order."""
    found = []
    for sentence in reversed(sentences):
        if not (said := CHECKED.fullmatch(sentence)):
            break
        steps = [SPOKEN.get(_word(part)) for part in said[2].split(",")]
        if None in steps:
            return None
        found.append((said[1], tuple(steps)))
    return tuple(reversed(found)) or None


def _word(part: str) -> str:
    return " ".join(part.lower().split())


def _items(steps: Sequence[Step]) -> Items:
    return tuple(step for step in steps if step.value != "straight")


def items_told(moments: Sequence[Moment], task: str) -> Items:
    """What a time line says about a task: its turns, its landmarks or its actions, in order.

    Equal neighbours are one item. A walk has each landmark and each action once, so the same one again after a gap is
    still that one; a turn after a straight is another turn.
    """
    if task == "direction":
        said = [Step("move", m.motion) if m.motion in MIRROR else None for m in moments]
    elif task == "landmark":
        said = [Step("landmark", m.landmark, m.side) for m in moments if m.landmark]
    else:
        said = [Step("action", m.motion) for m in moments if m.motion in ACTIONS]
    return tuple(step for k, step in enumerate(said) if step and (not k or said[k - 1] != step))


def asked_items(question: Question) -> Items:
    """The items of the right answer in the order of the walk, whichever order is asked.

    Raises:
        StkitError: it tells no route.
    """
    return _forwards(_items(told_route(question).steps), question)


def _forwards(items: Items, question: Question) -> Items:
    return routes.reverse(Route(items)).steps if question.order == "reverse" else items


def option_items(question: Question) -> list[Items]:
    """The items of each option.

    Raises:
        StkitError: an option is no route, or another one tells the same as the right one, so that none can be derived.
    """
    found = [_items(routes.parse(option).steps) for option in question.options]
    if found.count(found[question.answer]) > 1:
        raise StkitError(f"question {question.id}: two options tell the right answer's route: leave the question out")
    return found


def check_steps(chain: Chain | None, question: Question, chosen: int | None) -> dict[str, bool | None] | None:
    """Whether each step follows from the one before it as the model wrote that, the first from the truth.

    Args:
        chain: as :func:`read_chain` reads it.
        question: multiple-choice, its options routes.
        chosen: index of the option that was answered, None for none.

    Returns:
        see (the time line tells the items that are asked for), read (Route is what it tells), reverse (Reversed is the
        reverse of Route; a forward question may go without), match (what is said of the options follows from the route in
        the order asked, and the answer is the option that is that route). None: nothing to judge, as there is no step before
        it, or no option agrees with the route. No chain: None instead.

    Raises:
        StkitError: as :func:`option_items`.
    """
    options = option_items(question)
    if chain is None:
        return None
    told, backwards = items_told(chain.moments, question.task), question.order == "reverse"
    found = {
        "see": told == _forwards(options[question.answer], question),
        "read": chain.route == told,
        "reverse": None,
        "match": None,
    }
    if chain.route is not None and (backwards or chain.reversed is not None):
        found["reverse"] = chain.reversed == routes.reverse(Route(chain.route)).steps
    derived = chain.reversed if backwards else chain.route
    if derived and derived in options:
        answered = None if chosen is None else LETTERS[chosen]
        if chain.checked is not None:
            derives = chain.checked == read_options(derived, options)
        else:
            derives = chain.alive == still_alive(derived, options)
        found["match"] = derives and answered == chain.letter == LETTERS[options.index(derived)]
    return found


def read_options(items: Items, options: Sequence[Items]) -> tuple[tuple[str, Items], ...]:
    """Each option up to the one that is the derived route, as far as it agrees with it and one item on."""
    found = []
    for letter, option in zip(LETTERS, options):
        agree = next((k for k, step in enumerate(option) if items[k : k + 1] != (step,)), len(option))
        found.append((letter, option[: agree + 1]))
        if option == items:
            break
    return tuple(found)


def still_alive(items: Items, options: Sequence[Items]) -> tuple[tuple[Step, frozenset[str]], ...]:
    """Each item of a derived route with the letters of the options that agree up to there; at its end, wholly."""
    found = []
    for k, step in enumerate(items, 1):
        agree = [option[:k] == items[:k] and (k < len(items) or len(option) == k) for option in options]
        found.append((step, frozenset(letter for letter, yes in zip(LETTERS, agree) if yes)))
    return tuple(found)


def outcome(steps: dict[str, bool | None] | None, correct: bool) -> str:
    """One of :data:`OUTCOMES`: the first wrong step names the error; a right letter after one is luck."""
    if steps is None:
        return UNREAD
    first = first_wrong(steps)
    if correct:
        return LUCKY if first else RIGHT
    return WRONG[first or "match"]


def first_wrong(steps: dict[str, bool | None]) -> str | None:
    """The name of the first step that is wrong."""
    return next((name for name in STEPS if steps[name] is False), None)


def trace(rows: Sequence[Row]) -> tuple[list[dict], int]:
    """What became of each multiple-choice question that was answered in words.

    Returns:
        A dict a question (id, kind, group, correct, outcome, first_wrong, and each step's verdict), and how many were
        left out because their options are no routes that could be told apart.
    """
    found, left_out = [], 0
    for row in rows:
        question, said = row.question, row.said
        if question.is_open or not row.scored or said.mode != "generate":
            continue
        try:
            steps = check_steps(read_chain(said.text), question, said.parsed)
        except StkitError:
            left_out += 1
            continue
        found.append({
            "id": question.id, "kind": question.kind, "group": question.group, "correct": bool(said.correct),
            "outcome": outcome(steps, bool(said.correct)), "first_wrong": steps and first_wrong(steps),
            **(steps or dict.fromkeys(STEPS)),
        })  # fmt: skip
    return found, left_out


def count_outcomes(traced: Sequence[dict]) -> dict:
    """Outcomes by task and order, and "overall".

    Returns:
        By name: n, clusters, outcomes (each: count, share with low and high, in_clusters) and steps (each: the share
        of chains in which it is right given what was written before it, as mean, low, high, n, clusters).
    """
    parts = {kind: [t for t in traced if t["kind"] == kind] for kind in KINDS} | {"overall": list(traced)}
    return {name: _counted(part) for name, part in parts.items() if part}


def _counted(part: list[dict]) -> dict:
    groups, outcomes = [t["group"] for t in part], {}
    for name in OUTCOMES:
        own = [t["group"] for t in part if t["outcome"] == name]
        share = plain(stats.clustered_interval([float(t["outcome"] == name) for t in part], groups))
        outcomes[name] = {"count": len(own), "share": share["mean"], "low": share["low"], "high": share["high"],
                          "in_clusters": len(set(own))}  # fmt: skip
    steps = {}
    for name in STEPS:
        judged = [t for t in part if t[name] is not None]
        steps[name] = plain(stats.clustered_interval([float(t[name]) for t in judged], [t["group"] for t in judged]))
    return {"n": len(part), "clusters": len(set(groups)), "outcomes": outcomes, "steps": steps}


def confusion(rows: Sequence[Row], true_moments: Callable[[Row], tuple[Moment, ...] | None]) -> dict | None:
    """The words of the time lines that were written against the true ones, place by place.

    Args:
        rows: those without a readable time line, or without a true one, are passed over.
        true_moments: what the frames that were shown for a row really show.

    Returns:
        motion and landmark (a kind with its side, "none"), each: words, counts (true words down, written ones across;
        "nothing" for a place that only one of the two has), recall (of each true word, as mean, low, high, n,
        clusters), overall (the same over all places); texts, how many were compared. None when there was none.
    """
    pairs = {"motion": [], "landmark": []}
    texts = 0
    for row in rows:
        written = read_chain(row.said.text) if row.scored and row.said.mode == "generate" else None
        shown = true_moments(row) if written else None
        if shown is None:
            continue
        texts += 1
        for k in range(max(len(shown), len(written.moments))):
            both = [line[k] if k < len(line) else None for line in (shown, written.moments)]
            for name, say in (("motion", _motion), ("landmark", _mark)):
                pairs[name].append((*map(say, both), row.question.group))
    return {name: _matrix(found, ORDER[name]) for name, found in pairs.items()} | {"texts": texts} if texts else None


def _motion(moment: Moment | None) -> str:
    return ABSENT if moment is None else WORDS[moment.motion]


def _mark(moment: Moment | None) -> str:
    return ABSENT if moment is None else f"{moment.landmark} {moment.side}".strip() or NO_MARK


ORDER = {
    "motion": (*WORDS.values(), ABSENT),
    "landmark": (NO_MARK, *(f"{kind} {side}" for kind in LANDMARKS for side in MIRROR), ABSENT),
}


def _matrix(pairs: list[tuple[str, str, str]], order: Sequence[str]) -> dict:
    """Counts of (true, written) pairs over the words that occur."""
    words = [word for word in order if any(word in pair[:2] for pair in pairs)]
    place = {word: k for k, word in enumerate(words)}
    counts = np.zeros((len(words), len(words)), dtype=int)
    for true, written, _ in pairs:
        counts[place[true], place[written]] += 1
    parts = {word: [p for p in pairs if p[0] == word] for word in words}
    recall = {word: _agreement(part) for word, part in parts.items() if part and word != ABSENT}
    return {"words": words, "counts": counts.tolist(), "recall": recall, "overall": _agreement(pairs)}


def _agreement(pairs: list[tuple[str, str, str]]) -> dict:
    return plain(stats.clustered_interval([float(true == said) for true, said, _ in pairs], [g for *_, g in pairs]))
