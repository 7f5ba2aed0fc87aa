"""Lettered options read out of running text, and an answer matched to one of them.

The released training rows hold question, options and instructions in one string, so the options have to be found again.
Commas part them and stand inside them too; hence the letters decide: the reading in which they run A, B, C, ... wins::

    found = parse_options("A. left, then right, B. vitamin A. bottle, C. stop")
    found.texts    # ('left, then right', 'vitamin A. bottle', 'stop')
    found.doubts   # one: option B holds 'A.', which looks like a letter
"""

import re
from typing import NamedTuple

from .schema import LETTERS

MARK = re.compile(
    r"(?P<lead>\A\s*|(?<!\s)\s*[,;]\s*|(?<!\s)\s+)(?:(?:and|or|[-*\u2022])\s+)?"
    r"(?P<mark>\((?P<inner>[A-Za-z])\)|(?P<letter>[A-Za-z])[.):](?![A-Za-z]\.))"
)
LABEL = re.compile(r"\s*(?:\((?P<inner>[A-Za-z])\)|(?P<letter>[A-Za-z])[.):](?![A-Za-z]\.))\s*(?P<text>.*)", re.DOTALL)
HEADER = re.compile(r"\b(?:options?|choices?)\s*:\s*", re.IGNORECASE)
BARE_START = re.compile(r"[?:.!\n][ \t]*(?=(?:\(A\)|A[.):])\s)")
INSTRUCTIONS = tuple(re.compile(lead + r"Instructions?\s*:", re.IGNORECASE) for lead in (r"\n[ \t]*", r"\s"))
LINE, COMMA, SPACE = 0, 1, 2  # what parts two options, from the surest sign to the weakest
MOST_OPTIONS = "D"  # Ego-ST Bench has up to four: up to here a letter may be missing, beyond it they run without a gap


class Rejected(ValueError):
    """Why a row cannot become a question."""


class Options(NamedTuple):
    """Options as they stand in a file: ``labels`` are upper-case letters, ``texts`` come without them."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    doubts: tuple[str, ...]


class Mark(NamedTuple):
    """Something that may be an option's letter: its text runs from ``end`` to the next one's ``start``."""

    letter: str
    upper: bool
    style: str
    parted_by: int
    start: int
    end: int


def plain(text: str) -> str:
    """A text for comparing: case, spaces and the punctuation around it don't count."""
    return " ".join(text.split()).casefold().strip(" .,;:!")


def _marks(blob: str) -> list[Mark]:
    marks = []
    for m in MARK.finditer(blob):
        letter, lead = m["inner"] or m["letter"], m["lead"]
        parted_by = LINE if m.start() == 0 or "\n" in lead else COMMA if lead.strip() else SPACE
        spaced = blob[m.end() : m.end() + 1].isspace() or m.end() == len(blob)
        style = m["mark"].replace(letter, "_") + " " * spaced
        if parted_by < SPACE or spaced:
            marks.append(Mark(letter.upper(), letter.isupper(), style, parted_by, m.start(), m.end()))
    return marks


def _follows(letter: str, previous: str) -> bool:
    return letter > previous and (ord(letter) == ord(previous) + 1 or letter <= MOST_OPTIONS)


def _run(marks: list[Mark]) -> list[Mark]:
    """From the first mark on, always the next letter that is there; of equal ones the one that looks like the first."""
    run = marks[:1]
    while later := [m for m in marks if run and m.start >= run[-1].end and _follows(m.letter, run[-1].letter)]:
        letter = min(m.letter for m in later)
        same = [m for m in later if m.letter == letter]
        run.append(min(same, key=lambda m: (m.upper != run[0].upper, m.style != run[0].style, m.start)))
    return run


def _best_run(marks: list[Mark]) -> list[Mark]:
    """The reading to take: first of all letters in order A, B, C, then no bare space as a parting, then the longer."""

    def merit(choice) -> tuple:
        run, widest, one_style = choice
        in_order = [m.letter for m in run] == list(LETTERS[: len(run)])
        return len(run) > 1, in_order, widest < SPACE, len(run), one_style, -widest

    choices = []
    for widest in (LINE, COMMA, SPACE):
        for one_style in (True, False):
            kept = [m for m in marks if m.parted_by <= widest and (not one_style or m.style == marks[0].style)]
            choices.append((_run(kept), widest, one_style))
    return max((choice for choice in choices if choice[0]), key=merit)[0]


def _letter_doubts(labels: list[str]) -> list[str]:
    if labels == list(LETTERS[: len(labels)]):
        return []
    absent = [c for c in LETTERS[: LETTERS.index(max(labels))] if c not in labels]
    why = f"{', '.join(absent)} missing" if absent else "not in order"
    return [f"the options' letters are {', '.join(labels)} ({why})"]


def _text_doubts(labels: list[str], texts: list[str]) -> list[str]:
    doubts, known = [], [*labels, *LETTERS[LETTERS.index(max(labels)) + 1 :][:1]]
    for label, text in zip(labels, texts):
        held = [m for m in MARK.finditer(" " + text) if (m["inner"] or m["letter"]).upper() in known]
        doubts += [f"option {label} holds {m['mark']!r}, which looks like a letter" for m in held[:1]]
    bare = [plain(t) for t in texts]
    alike = [label for label, text in zip(labels, bare) if bare.count(text) > 1]
    return doubts + [f"options {' and '.join(alike)} differ in punctuation alone"] * (len(alike) > 1)


def _without_letters(blob: str) -> Options:
    texts = [line.strip() for line in blob.split("\n") if line.strip()]
    if not 2 <= len(texts) <= len(LETTERS):
        raise Rejected(f"no lettered options in {blob.strip()!r:.60}")
    return Options(tuple(LETTERS[: len(texts)]), tuple(texts), ("options without letters: lettered in their order",))


def parse_options(blob: str) -> Options:
    """Options from one string such as ``"A. left, B. right"``.

    "A.", "A)", "A:" and "(A)" are letters, in either case; newlines, commas, semicolons or (the last resort) bare
    spaces part the options. Of several readings the one whose letters run A, B, C, ... is taken; what had to be chosen
    or repaired, or looks odd, is said in ``doubts``.

    Raises:
        Rejected: no lettered options and not a list of lines either.
    """
    marks = _marks(blob)
    if not [m for m in marks if m.letter <= MOST_OPTIONS and m.parted_by < SPACE]:
        return _without_letters(blob)
    starts = [m for m in marks if m.start == 0] or [m for m in marks if m.letter in "AB"] or marks
    run = _best_run([m for m in marks if m.start >= starts[0].start])
    ends = [m.start for m in run[1:]] + [len(blob)]
    labels, texts = [m.letter for m in run], [blob[m.end : end].strip().rstrip(",; \n") for m, end in zip(run, ends)]
    doubts = []
    if before := blob[: run[0].start].strip(" ,;\n"):
        if labels[0] == "B":
            labels, texts = ["A", *labels], [before, *texts]
            doubts.append("the first option has no letter: taken as A")
        else:
            doubts.append(f"{before!r:.60} before the options was left out")
    last, *tail = re.split(r"\n\s*\n", texts[-1], maxsplit=1)
    if tail:
        texts[-1] = last.strip()
        doubts.append(f"{tail[0].strip()!r:.60} after the options was left out")
    if not all(m.upper for m in run):
        doubts.append("the options' letters are in lower case")
    if len({m.style for m in run}) > 1:
        doubts.append("the options' letters are written in several ways")
    if any(m.parted_by == SPACE for m in run):
        doubts.append("nothing but a space parts some options")
    return Options(tuple(labels), tuple(texts), tuple(doubts + _letter_doubts(labels) + _text_doubts(labels, texts)))


def parse_listed(options: list) -> Options:
    """Options from a list such as ``["A. left", "B. right"]``; a text without a letter gets that of its place.

    Raises:
        Rejected: something in it is not a text, or a letter stands twice.
    """
    if bad := [o for o in options if not isinstance(o, str)]:
        raise Rejected(f"options hold {bad[0]!r:.60}: texts were expected")
    if len(options) > len(LETTERS):
        raise Rejected(f"{len(options)} options, at most {len(LETTERS)} are possible")
    found = [LABEL.fullmatch(o) for o in options]
    letters = [(m["inner"] or m["letter"]) if m else "" for m in found]
    if not all(letters):
        letters = [a if a.upper() == LETTERS[i] else "" for i, a in enumerate(letters)]
    labels = [a.upper() or LETTERS[i] for i, a in enumerate(letters)]
    if double := [a for a in labels if labels.count(a) > 1]:
        raise Rejected(f"the letter {double[0]} stands before two options")
    texts = [m["text"].strip() if a else o.strip() for o, m, a in zip(options, found, letters)]
    doubts = []
    if not any(letters):
        doubts.append("options without letters: lettered in their order")
    elif not all(letters):
        doubts.append(f"option {labels[letters.index('')]} has no letter of its own")
    if any(a.islower() for a in letters):
        doubts.append("the options' letters are in lower case")
    return Options(tuple(labels), tuple(texts), tuple(doubts + _letter_doubts(labels) + _text_doubts(labels, texts)))


def split_problem(text: str) -> tuple[str, str, tuple[str, ...]]:
    """Cut a training row's ``problem`` into question, options and doubts; "Instructions: ..." after the options goes.

    Raises:
        Rejected: there is no "Options:" in it, nor a sentence's end followed by "A.".
    """
    headers, doubts = list(HEADER.finditer(text)), ()
    lettered = [h for h in headers if LABEL.match(text, h.end())]
    start = (lettered or headers[-1:] or [BARE_START.search(text)])[0]
    if start is None:
        raise Rejected("no options in it ('Options: A. ..., B. ...' was expected)")
    question_end = start.start()
    if not headers:
        doubts, question_end = ("no 'Options:' before the options",), start.start() + 1
    blob = text[start.end() :]
    own_line, inline = (list(pattern.finditer(blob)) for pattern in INSTRUCTIONS)
    if cut := own_line[:1] or inline[-1:]:
        blob = blob[: cut[0].start()]
    return text[:question_end].strip(), blob, doubts


def read_answer(answer, options: Options) -> tuple[int, tuple[str, ...]]:
    """The index of the option that an answer names ("B", "b)", "(B)", "B. its text", "its text"), and doubts.

    Raises:
        Rejected: it names none of them, or two.
    """
    if not isinstance(answer, str) or not answer.strip():
        raise Rejected(f"answer={answer!r:.60}: a letter was expected")
    bare = [plain(t) for t in options.texts]
    if letter := re.fullmatch(r"(?:option|answer)?[\W_]*([A-Za-z])[\W_]*", answer.strip(), re.IGNORECASE):
        doubts = ["the answer's letter is in lower case"] if letter[1].islower() else []
        return _index(letter[1], options), tuple(doubts)
    labelled = LABEL.fullmatch(answer)
    if labelled and (labelled["inner"] or labelled["letter"]).upper() in options.labels and plain(answer) not in bare:
        index = _index(labelled["inner"] or labelled["letter"], options)
        said = plain(labelled["text"])
        if said in bare and said != bare[index]:
            raise Rejected(f"the answer {answer!r:.60} has the letter of one option and the text of another")
        return index, () if said == bare[index] else (f"the answer {answer!r:.60} was read by its letter alone",)
    if bare.count(plain(answer)) == 1:
        return bare.index(plain(answer)), ("the answer was read from an option's text",)
    raise Rejected(f"the answer {answer!r:.60} is none of the options {', '.join(options.labels)}")


def _index(letter: str, options: Options) -> int:
    if letter.upper() not in options.labels:
        raise Rejected(f"the answer's letter {letter!r} is not there: the options are {', '.join(options.labels)}")
    return options.labels.index(letter.upper())
