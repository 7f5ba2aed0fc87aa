"""Eight tasks on each walk: {route, direction, landmark, action} x {forward, reverse}, with options that give nothing
away.

Options are an edit square: two independent edits e1, e2 of the truth t, offered as {t, e1 t, e2 t, e1 e2 t}. From the
inside all four look alike. They are alike from the outside too, because each of the four would have been the truth of a
walk with the same probability, and would then have been offered with the same other three:

- the edits undo themselves (or have an inverse that is as probable), so the square of t is a square of each of its
  members;
- places, types and kinds of the edits come from a generator that doesn't look at the truth, and there is no second try;
- a mirrored turn has to leave a walk that doesn't touch itself, else the question is dropped (tiny: 9 walks in
  100, out of distribution 33; default: 23 and 41); kinds and sides fit everywhere.

All questions on one thing of one walk share one square: the reverse question's options are the forward one's,
reversed::

    questions, dropped = plan_questions(40, seed=0)
    questions[0].question, questions[0].options
"""

import random
from collections import Counter
from collections.abc import Iterable
from itertools import cycle, islice
from typing import NamedTuple

from ..runtime import generator
from .plans import MIRROR, Plan, Preset, covered, fits, make_plan
from .plans import preset as preset_of
from .routes import STYLES, render, reverse
from .schema import ORDERS, TASKS, Question, Route, Step

KIND_OF = {"direction": "move", "landmark": "landmark", "action": "action"}
TYPES = {  # a square's two edits, and how many of the preset's kinds they take that the walk has not
    "landmark": {
        ("replace", "replace"): 2,
        ("swap", "replace"): 1,
        ("swap", "turn over"): 0,
        ("replace", "turn over"): 1,
    },
    "action": {("replace", "replace"): 2, ("swap", "replace"): 1},
}
TEMPLATES = {
    ("route", "forward"): (
        "Based on this first-person video, describe the route to the destination: moves, landmarks with their side, "
        "and actions, in order.",
        "Tell step by step how you got to the destination of this video: every turn, every landmark and its side, "
        "every action.",
        "You walked the way that this video shows. Give the whole route: moves, landmarks with their side, actions.",
        "What route does this video show? Name moves, landmarks on the left or right, and actions as they come.",
    ),
    ("route", "reverse"): (
        "Based on this first-person video, describe the route back to the starting point: moves, landmarks with their "
        "side, and actions undone, in order.",
        "You turn around at the destination. Tell step by step how you return to the starting point: every turn, every "
        "landmark and its side, every action undone.",
        "Imagine walking back the way that this video shows. Give the whole route back: moves, landmarks with their "
        "side, actions undone.",
        "What route leads back from the end of this video to the start? Name moves, landmarks on the left or right, "
        "and actions undone as they come.",
    ),
    ("direction", "forward"): (
        "Based on this first-person video, which moves did you make to reach your destination?",
        "In which directions did you go, in order, to reach the destination of this video?",
        "Which sequence of turns took you from the starting point to the destination?",
        "How did you turn on the way that this video shows?",
    ),
    ("direction", "reverse"): (
        "Based on this first-person video, which moves would take you back to the starting point?",
        "You turn around at the destination. In which directions do you go, in order, to return to the starting point?",
        "Which sequence of turns would take you from the destination back to the starting point?",
        "How would you turn on the way back along the route that this video shows?",
    ),
    ("landmark", "forward"): (
        "Based on this first-person video, which landmarks did you pass to reach your destination, in order?",
        "What did you pass, and on which side, on the way that this video shows?",
        "Which sequence of landmarks lay along your way from the starting point to the destination?",
        "Walking as in this video, what do you see beside you, one after the other?",
    ),
    ("landmark", "reverse"): (
        "Based on this first-person video, which landmarks would you pass to return to the starting point, in order?",
        "You turn around at the destination. What do you pass, and on which side, on the way back?",
        "Which sequence of landmarks would lie along your way from the destination back to the starting point?",
        "Walking back along the route of this video, what do you see beside you, one after the other?",
    ),
    ("action", "forward"): (
        "Based on this first-person video, which actions did you take on the way to your destination, in order?",
        "What did you do, besides walking and turning, on the way that this video shows?",
        "Which sequence of actions did you carry out between the starting point and the destination?",
        "Besides walking, what happens in this video, one after the other?",
    ),
    ("action", "reverse"): (
        "Based on this first-person video, which actions would you take, in order, on the way back, undoing each one?",
        "You turn around at the destination. What do you do on the way back if every action is undone?",
        "Which sequence of actions, on the way back to the starting point, undoes what you did before?",
        "Walking back along the route of this video and undoing each action, what do you do, one after the other?",
    ),
}


class Square(NamedTuple):
    """The options of one thing on one walk, told forwards: the truth, edited once, edited by the other, by both."""

    options: tuple[Route, Route, Route, Route]
    edits: tuple[str, str]


class Draft(NamedTuple):
    """A question without its letter: ``options`` are texts with the truth first, empty for a route."""

    task: str
    order: str
    question: str
    options: tuple[str, ...]
    answer: str


def truth_of(plan: Plan, task: str) -> Route:
    """What a task asks about: the walk's moves, landmarks or actions alone; all of it for "route"."""
    steps = plan.route().steps
    return Route(tuple(s for s in steps if task == "route" or s.kind == KIND_OF[task]))


def square(plan: Plan, preset: Preset, task: str) -> Square | str:
    """The square of "direction", "landmark" or "action" on a walk, or the reason why there is none."""
    rng = generator(plan.seed, "square", plan.index, task)
    if task == "direction":
        return direction_square(plan.turns, plan.lengths, rng)
    kinds = preset.landmark_kinds if task == "landmark" else preset.action_kinds
    return list_square(truth_of(plan, task).steps, kinds, rng)


def direction_square(turns: tuple[str, ...], lengths: tuple[int, ...], rng: random.Random) -> Square | str:
    """Two turns mirrored. Equally probable: turns are i.i.d., and all four walks fit these lengths, or it is
    dropped."""
    if len(turns) < 2:
        return "fewer than two turns"
    i, j = rng.sample(range(len(turns)), 2)
    walks = [_mirrored(turns, places) for places in ((), (i,), (j,), (i, j))]
    if not all(fits(walk, lengths) for walk in walks):
        return "a mirrored walk touches itself"
    return Square(tuple(_moves(walk) for walk in walks), ("mirror", "mirror"))


def _mirrored(turns: tuple[str, ...], places: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(MIRROR[t] if k in places else t for k, t in enumerate(turns))


def _moves(turns: tuple[str, ...]) -> Route:
    steps = [Step("move", "straight")]
    for turn in turns:
        steps += [Step("move", turn), Step("move", "straight")]
    return Route(tuple(steps))


def list_square(truth: tuple[Step, ...], kinds: tuple[str, ...], rng: random.Random) -> Square | str:
    """A square of landmarks or actions: kinds are a random ordered choice of ``kinds``, sides i.i.d.

    - "replace" one by a kind that the walk has not (two by two different ones): the way back, from the new kind to the
      old, is a choice out of as many kinds;
    - "swap" two neighbours, a landmark together with its side: undoes itself;
    - "turn over" one landmark's side: undoes itself.

    A replaced or turned landmark is the same one wherever a swap has put it, so the two edits can be made in either
    order. The type is drawn out of those for which there are elements and kinds enough, which is the same for all four.
    """
    thing = "landmark" if truth and truth[0].kind == "landmark" else "action"
    if not truth:
        return "none on this walk"
    if len(truth) == 1:
        types = [("replace", "turn over")] if thing == "landmark" else []
    else:
        types = [*TYPES[thing]]
    absent = [kind for kind in kinds if kind not in {step.value for step in truth}]
    if not types:
        return "one alone cannot be edited in two ways"
    types = [pair for pair in types if TYPES[thing][pair] <= len(absent)]
    if not types:
        return "no other kinds to put in"
    edits = rng.choice(types)
    first, second = rng.sample(range(len(truth)), 2) if len(truth) > 1 else (0, 0)
    place = rng.randrange(len(truth) - 1) if "swap" in edits else -1
    new = rng.sample(absent, edits.count("replace"))
    changes = []
    for edit, element in zip(edits, (first, second), strict=True):
        changes.append((edit, place if edit == "swap" else element, new.pop() if edit == "replace" else ""))
    sets = ([], changes[:1], changes[1:], changes)
    return Square(tuple(Route(_edited(truth, chosen)) for chosen in sets), edits)


def _edited(truth: tuple[Step, ...], changes: list[tuple[str, int, str]]) -> tuple[Step, ...]:
    """The list with changes made: elements first (numbered as in the truth), then places."""
    steps = list(truth)
    for edit, at, kind in changes:
        if edit == "replace":
            steps[at] = Step(steps[at].kind, kind, steps[at].side)
        elif edit == "turn over":
            steps[at] = Step(steps[at].kind, steps[at].value, MIRROR[steps[at].side])
    for edit, at, _ in changes:
        if edit == "swap":
            steps[at : at + 2] = [steps[at + 1], steps[at]]
    return tuple(steps)


def questions_of(plan: Plan, preset: Preset, seed: int) -> tuple[list[Draft], Counter]:
    """A walk's questions, and how many could not be asked, by task and reason.

    Wording is drawn for each question from ``seed``, without a look at the truth; all options of a question are worded
    alike.
    """
    drafts, dropped = [], Counter()
    seen, steps = covered(plan, preset), plan.route().steps
    for task in TASKS:
        asked = {
            k for k, s in enumerate(steps) if (task == "route" or s.kind == KIND_OF[task]) and s.value != "straight"
        }
        made = "event not covered by two sampled frames" if asked - seen else None
        if made is None and task != "route":
            made = square(plan, preset, task)
        if isinstance(made, str):
            dropped[f"{task}: {made}"] += len(ORDERS)
            continue
        drafts += [
            _draft(plan, task, order, made, generator(seed, "words", plan.index, task, order)) for order in ORDERS
        ]
    return drafts, dropped


def _draft(plan: Plan, task: str, order: str, made: Square | None, rng: random.Random) -> Draft:
    question, style = rng.choice(TEMPLATES[task, order]), rng.randrange(STYLES)

    def told(route: Route) -> Route:
        return reverse(route) if order == "reverse" else route

    if made is None:
        return Draft(task, order, question, (), render(told(plan.route()), order=order))
    options = tuple(render(told(route), style) for route in made.options)
    return Draft(task, order, question, options, options[0])


def make_questions(
    walks: Iterable[tuple[str, Plan]], preset: Preset, seed: int
) -> tuple[list[Question], dict[str, int]]:
    """The questions of all clips, with letters.

    Args:
        walks: (clip id, plan); the clip's video is ``{clip id}.mp4``.
        seed: of wording and letters.

    Returns:
        Questions in the order of the walks, and how many were dropped by "task: reason". Within a task and order each
        letter is the answer as often as any other, give or take one, in an order that is drawn without a look at walks
        or options.
    """
    drafts, dropped = [], Counter()
    for clip_id, plan in walks:
        made, lost = questions_of(plan, preset, seed)
        drafts += [(clip_id, plan, draft) for draft in made]
        dropped += lost
    counts = Counter((draft.task, draft.order) for _, _, draft in drafts)
    letters = {kind: iter(_letters(count, generator(seed, "letters", *kind))) for kind, count in counts.items()}
    questions = [
        _question(clip_id, plan, draft, next(letters[draft.task, draft.order]), seed) for clip_id, plan, draft in drafts
    ]
    return questions, dict(sorted(dropped.items()))


def _letters(count: int, rng: random.Random) -> list[int]:
    """``count`` indices from 0 to 3, each as often as any other, give or take one, shuffled."""
    first = rng.sample(range(4), 4)
    drawn = list(islice(cycle(first), count))
    rng.shuffle(drawn)
    return drawn


def _question(clip_id: str, plan: Plan, draft: Draft, letter: int, seed: int) -> Question:
    options, answer = [], draft.answer
    if draft.options:
        options, answer = list(draft.options[1:]), letter
        generator(seed, "order", plan.index, draft.task, draft.order).shuffle(options)
        options.insert(letter, draft.options[0])
    return Question(
        f"{clip_id}-{draft.task}-{draft.order}", clip_id, f"{clip_id}.mp4", plan.group, draft.task, draft.order,
        draft.question, tuple(options), answer, plan.split(),
    )  # fmt: skip


def plan_questions(
    clips: int, seed: int = 0, preset: str | Preset = "tiny", split: str | None = None
) -> tuple[list[Question], dict[str, int]]:
    """The questions of ``clips`` walks that nobody has rendered: they are a function of the plans."""
    made = preset_of(preset) if isinstance(preset, str) else preset
    walks = [(f"walk-{index:05d}", make_plan(seed, index, made, split)) for index in range(clips)]
    return make_questions(walks, made, seed)
