"""Routes: how a walk is said in words, read back from words, and reversed.

A route is a sequence of steps (stkit.bench.schema): moves, landmarks with their side, actions. Between two turns there
is one "straight", and what is passed or done on it follows that word. Reversal keeps this form: it turns the order of
the straights around, and on each of them the order of what is passed and done, exchanges left and right, and undoes
actions::

    >>> route = parse("Go straight, pass the brick wall on your right and then turn left. Pick up an item.")
    >>> render(reverse(route), order="reverse")
    'turn around, put down an item, turn right, go straight, pass the brick wall on your left'
    >>> reverse(reverse(route)) == route
    True
"""

import re
from collections.abc import Iterator

from ..runtime import BadUse, StkitError
from .schema import ORDERS, Route, Step

LANDMARKS = ("brick", "wood", "marble", "metal", "computer", "fire", "ash", "skin", "torch", "column", "tree", "barrel")
ACTIONS = ("look up", "look down", "step back", "pause", "pick up", "open a door")
UNDO = {
    "pick up": "put down",
    "open a door": "close a door",
}  # what is absent undoes itself: back from a step back is one again
INVERSE = UNDO | {b: a for a, b in UNDO.items()} | {"left": "right", "right": "left"}

NOUNS = {
    "brick": "brick wall", "wood": "wooden wall", "marble": "marble wall", "metal": "metal wall",
    "computer": "computer wall", "fire": "fire wall", "ash": "ash wall", "skin": "skin wall",
    "torch": "torch", "column": "column", "tree": "tree", "barrel": "barrel",
}  # fmt: skip
PHRASES = {  # one wording for each style
    "straight": ("go straight", "walk forward", "go straight", "move ahead", "continue straight"),
    "left": ("turn left", "make a left", "turn left", "take a left", "turn to the left"),
    "right": ("turn right", "make a right", "turn right", "take a right", "turn to the right"),
    "look up": ("look up", "look upwards", "look up", "raise your head", "look up"),
    "look down": ("look down", "look downwards", "look down", "lower your head", "look down"),
    "step back": ("step back", "take a step back", "step back", "step backwards", "step back"),
    "pause": ("pause", "pause for a moment", "pause", "stand still for a moment", "stop for a moment"),
    "pick up": ("pick up an item", "pick up the item", "pick up an item", "take the item", "pick an item up"),
    "put down": ("put down an item", "put down the item", "put down an item", "lay down the item", "put an item down"),
    "open a door": ("open a door", "open the door", "open a door", "open the door", "open a door"),
    "close a door": ("close a door", "close the door", "close a door", "close the door", "close a door"),
}
PASSING = (
    "pass the {} on your {}",
    "walk past the {} on your {}",
    "pass the {} on your {} side",
    "go by the {} to your {}",
    "pass by the {} on the {}",
)
JOINS = (", ", ", then ", ". ", ", and then ", "; ")
STYLES = len(JOINS)

_SIDE = r"(?: (?:on|to|at) (?:the|your|my|its) (?P<side>left|right)(?:[- ]hand)?(?: side)?)?"
_GO = r"(?:go|walk|move|head|continue|proceed|advance|keep|keep going|keep walking|keep moving|carry on)(?:es|s|ing)?"
_TURN = r"(?:turn(?:s|ing)?|bear|go)"
_AT = r"(?: at the (?:next )?(?:corner|end|junction|intersection|crossing))?"
_ITEM = r"(?:an?|the|some) (?:item|object|thing|box)"
_WALL = {"wood": "wood(?:en)?", "fire": "(?:fire|fiery)", "ash": "ash(?:en)?", "computer": "computers?"}
GRAMMAR = tuple(
    (re.compile(pattern), kind, value)
    for pattern, kind, value in [
        (rf"{_GO}(?: straight| forwards?| ahead| onwards?| on)+(?: again)?", "move", "straight"),
        *[
            (
                rf"(?:{_TURN}(?: to)?(?: the| your)? {side}|(?:make|take) a (?:turn to the )?{side}(?: turn)?){_AT}",
                "move",
                side,
            )
            for side in ("left", "right")
        ],
        *[
            (
                r"(?:pass(?:es|ing)?(?: by)?|(?:walk|go|move|head)(?:es|s|ing)? (?:past|by)) (?:the|a|an) "
                + (rf"{_WALL.get(kind, kind)} wall" if NOUNS[kind].endswith("wall") else NOUNS[kind])
                + _SIDE,
                "landmark",
                kind,
            )
            for kind in LANDMARKS
        ],
        (r"look(?:s|ing)? up(?:wards?)?|raise your head", "action", "look up"),
        (r"look(?:s|ing)? down(?:wards?)?|lower your head", "action", "look down"),
        (r"step(?:s|ping)? back(?:wards?)?|take a step back(?:wards?)?", "action", "step back"),
        (r"(?:paus(?:e|es|ing)|stop|wait|stand still)(?: for a (?:moment|while|second))?", "action", "pause"),
        (rf"(?:pick(?:s|ing)? up|take|grab) {_ITEM}|pick {_ITEM} up", "action", "pick up"),
        (rf"(?:put(?:s|ting)? down|lay down|set down) {_ITEM}|put {_ITEM} (?:down|back)", "action", "put down"),
        (r"open(?:s|ing)? (?:a|the) door", "action", "open a door"),
        (r"clos(?:e|es|ing) (?:a|the) door|shut (?:a|the) door", "action", "close a door"),
    ]
)
SEAM = re.compile(r"[,.;:!\n]+|\b(?:and|then|next|first|finally|lastly|afterwards?|after that)\b")
FILLER = re.compile(r"^(?:(?:you|i|we|now|again|please|also|will|should|must)\s+)+")
AROUND = re.compile(r"turn(?:s|ing)? (?:around|round|back)")


def reverse(route: Route) -> Route:
    """The way back: straights in reverse order, left and right exchanged, actions undone. ``reverse(reverse(r)) == r``.

    Between two turns the words "straight" at either end stay where they are, and what lies between is read backwards:
    "go straight, pass the tree" is the same straight on the way back, and said in the same form.
    """
    straights: list[list[Step]] = [[]]
    turns = []
    for step in route.steps:
        if is_turn(step):
            turns.append(undo(step))
            straights.append([])
        else:
            straights[-1].append(step)
    steps = _backwards(straights[-1])
    for turn, straight in zip(reversed(turns), reversed(straights[:-1]), strict=True):
        steps += [turn, *_backwards(straight)]
    return Route(tuple(steps))


def is_turn(step: Step) -> bool:
    """Whether it changes the direction."""
    return step.kind == "move" and step.value != "straight"


def undo(step: Step) -> Step:
    """The step on the way back: left and right exchanged, an action undone. ``undo(undo(step)) == step``."""
    value = step.value if step.kind == "landmark" else INVERSE.get(step.value, step.value)
    return Step(step.kind, value, INVERSE.get(step.side, step.side))


def _backwards(steps: list[Step]) -> list[Step]:
    begin, end = 0, len(steps)
    while begin < end and steps[begin].kind == "move":
        begin += 1
    while end > begin and steps[end - 1].kind == "move":
        end -= 1
    return steps[:begin] + [undo(step) for step in reversed(steps[begin:end])] + steps[end:]


def render(route: Route, style: int = 0, order: str = "forward") -> str:
    """The route in words.

    Args:
        style: 0 to ``STYLES`` - 1: other words and other joints for the same route.
        order: "reverse" puts "turn around" first; the route is taken as it is (give :func:`reverse` of the walk's).

    Raises:
        BadUse: an unknown style or order.
        StkitError: a step that there are no words for.
    """
    if style not in range(STYLES):
        raise BadUse(f"style {style!r} is unknown: use 0 to {STYLES - 1}")
    if order not in ORDERS:
        raise BadUse(f"order {order!r} is unknown: use {', '.join(ORDERS)}")
    clauses = ["turn around"] * (order == "reverse") + [_clause(step, style) for step in route.steps]
    if JOINS[style] == ". ":
        return " ".join(clause.capitalize() + "." for clause in clauses)
    return JOINS[style].join(clauses)


def _clause(step: Step, style: int) -> str:
    if step.kind == "landmark" and step.value in NOUNS and step.side in ("", "left", "right"):
        text = PASSING[style].format(NOUNS[step.value], step.side)
        return text if step.side else text[: text.index(NOUNS[step.value]) + len(NOUNS[step.value])]
    if step.kind != "landmark" and step.value in PHRASES:
        return PHRASES[step.value][style]
    raise StkitError(f"{step} has no words: use a landmark of {', '.join(NOUNS)}, or one of {', '.join(PHRASES)}")


def parse(text: str) -> Route:
    """The route that a text tells, in any style of :func:`render` or as a person would put it.

    "turn around" at the beginning is passed over: it says which way the route is told, and is no step of it. A landmark
    named without its side has side "".

    Raises:
        StkitError: a phrase that is none of a route's, named; or no phrase at all.
    """
    steps = tuple(_steps(text))
    if not steps:
        raise StkitError(
            f"{text!r:.60} tells no route: say it as in 'go straight, turn left, pass the tree on your right'"
        )
    return Route(steps)


def _steps(text: str) -> Iterator[Step]:
    begun = False
    for clause in SEAM.split(" ".join(text.lower().split())):
        clause = FILLER.sub("", clause.strip(" \"'*()-"))
        if not clause or (not begun and AROUND.fullmatch(clause)):
            continue
        begun = True
        yield _step(clause)


def _step(clause: str) -> Step:
    for pattern, kind, value in GRAMMAR:
        if found := pattern.fullmatch(clause):
            return Step(kind, value, (found.groupdict().get("side") or "") if kind == "landmark" else "")
    raise StkitError(
        f"{clause!r:.80} is no phrase of a route: use such as 'turn left', 'pass the tree on your right', 'look up'"
    )


def edit_distance(a: Route, b: Route) -> int:
    """How many steps have to be put in, taken out or replaced to make one route of the other (Levenshtein, over
    steps)."""
    row = list(range(len(b.steps) + 1))
    for i, step in enumerate(a.steps, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b.steps, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (step != other))
    return row[-1]
