"""The three released Ego-ST forms, read row by row into questions (stkit.bench.egost tells what they are)::

source = read_source(Path("tests/samples/egost_mcq.json"))
items, rejected, notes = questions_of_source(source)
items[0].question.options, rejected[0]["reason"]
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..runs import explain
from ..runtime import StkitError
from .options import Options, Rejected, parse_listed, parse_options, read_answer, split_problem
from .schema import Question, row_of, row_problem

EXPECTED = (
    "an object of rows with forward_mcq or reverse_mcq (or question and options), an object of rows with question and "
    "forward_answer or reverse_answer, or training rows with problem, solution and video"
)
MCQ_PLACES = ("forward_mcq", "reverse_mcq")
OPEN_PLACES = ("forward_answer", "reverse_answer")
ANSWER_NAMES = ("answer", "correct_answer", "correct_option", "correct", "ground_truth", "label")
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
TASK_WORDS = (
    ("landmark", r"\blandmarks?\b|\bscenery\b"),
    ("action", r"\bactions?\b|\bactivit(?:y|ies)\b|\bperform(?:ed)?\b"),
    ("direction", r"\bdirections?\b|\bturns?\b|\bwhich way\b"),
    ("route", r"\broutes?\b|\btrajectory\b"),
)
REVERSE_WORDS = r"\brevers\w*|\breturn(?:ing)?\b|\bback\b|\bto (?:the |your )?start"
FORWARD_WORDS = r"\bdestination\b|\bforward\b"


WHITE = re.compile(r"[ \t\r\n]*")


class Member(NamedTuple):
    """One member of a JSON object, and where it lies in the text."""

    name: str
    start: int
    name_end: int
    value_start: int
    value_end: int


class Row(NamedTuple):
    """One row of a file: its key or number, its value, where that starts in the text (-1: nothing is written back)."""

    name: str | int
    value: object
    start: int


@dataclass
class Source:
    """A file as it was read. ``rejected`` are rows that were bad before anybody looked into them."""

    path: Path
    form: str
    text: str
    rows: list[Row]
    rejected: list[tuple[str | int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Item:
    """A question, the row and the place in it that it came from, the letters its options have there."""

    row: Row
    place: str
    labels: tuple[str, ...]
    question: Question
    doubts: tuple[str, ...]


def read_source(path: Path) -> Source:
    """Read a file, tell its form and cut it into rows.

    Raises:
        StkitError: no such file, an empty one, not JSON, or JSON of another shape.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise StkitError(explain(error)) from error
    except UnicodeDecodeError as error:
        raise StkitError(f"{path}: not UTF-8 text: {EXPECTED} was expected") from error
    lead = len(text) - len(text.lstrip("\ufeff \t\r\n"))
    if lead == len(text):
        raise StkitError(f"{path}: the file is empty: {EXPECTED} was expected")
    try:
        value = json.loads(text[lead:])
    except (ValueError, RecursionError) as error:
        source = _training_lines(path, text.removeprefix("\ufeff"))
        if not source.rows:
            raise StkitError(f"{path}: not JSON ({error}): {EXPECTED} was expected") from error
        return source
    if isinstance(value, dict) and isinstance(value.get("problem"), str):
        value = [value]
    if isinstance(value, list) and any(isinstance(row, dict) and "problem" in row for row in value):
        return Source(path, "r1", text, [Row(n, row, -1) for n, row in enumerate(value, 1)])
    forms = Counter(filter(None, map(_form_of, value.values()))) if isinstance(value, dict) else {}
    if not forms:
        raise StkitError(f"{path}: not one of the released forms: {EXPECTED} was expected")
    source = Source(path, max(("mcq", "open"), key=lambda form: forms[form]), text, [])
    found = members(text, lead)
    last = {member.name: n for n, member in enumerate(found)}
    for n, member in enumerate(found):
        name = member.name.encode("utf-8", "backslashreplace").decode()
        if last[member.name] != n:
            source.rejected.append((f"{name} (row {n + 1})", "the same key stands again later: only that one is read"))
        else:
            source.rows.append(Row(name, value[member.name], member.value_start))
    return source


def members(text: str, start: int) -> list[Member]:
    """The members of the JSON object that starts at ``text[start]`` (the text is known to be JSON)."""
    decode, found = json.JSONDecoder().raw_decode, []
    at_char = WHITE.match(text, start + 1).end()
    while text[at_char] != "}":
        name, name_end = decode(text, at_char)
        value_start = WHITE.match(text, WHITE.match(text, name_end).end() + 1).end()
        found.append(Member(name, at_char, name_end, value_start, decode(text, value_start)[1]))
        at_char = WHITE.match(text, found[-1].value_end).end()
        if text[at_char] == ",":
            at_char = WHITE.match(text, at_char + 1).end()
    return found


def _training_lines(path: Path, text: str) -> Source:
    source = Source(path, "r1", text, [])
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            source.rows.append(Row(number, json.loads(line), -1))
        except (ValueError, RecursionError) as error:
            source.rejected.append((number, f"not JSON ({error})"))
    if not any(isinstance(row.value, dict) and "problem" in row.value for row in source.rows):
        source.rows = []
    return source


def _form_of(row) -> str:
    if not isinstance(row, dict):
        return ""
    if any(place in row for place in MCQ_PLACES) or ("question" in row and "options" in row):
        return "mcq"
    return "open" if any(place in row for place in OPEN_PLACES) else ""


def at(place: str, reason: str) -> str:
    """A reason with the place in the row that it is about."""
    return f"{place}: {reason}" if place else reason


def by_row(pairs) -> list[dict]:
    """One {"row", "reason"} a row, several reasons joined."""
    reasons = {}
    for row, reason in pairs:
        reasons.setdefault(row, []).append(reason)
    return [{"row": row, "reason": "; ".join(found)} for row, found in reasons.items()]


def questions_of_source(source: Source) -> tuple[list[Item], list[dict], list[str]]:
    """All questions of a file, what was rejected, and what is worth saying once."""
    items, rejected, folders = [], list(source.rejected), {}
    for row in source.rows:
        for place in _places(row.value, source.form):
            try:
                items.append(_item(row, place, source, folders))
            except Rejected as error:
                rejected.append((row.name, at(place, str(error))))
    cut = sum(len(found) for found in folders.values())
    notes = [f"{cut} questions name their video by an absolute path: only the base name is kept"] if cut else []
    if source.form == "r1":
        rejected.sort(key=lambda pair: pair[0])
    return items, by_row(rejected), notes


def _places(row, form: str) -> list[str]:
    names = {"mcq": MCQ_PLACES, "open": OPEN_PLACES, "r1": ()}[form]
    found = [name for name in names if isinstance(row, dict) and name in row]
    if form == "open" and len(found) == 2:  # one question, two answers: its wording decides
        found = [OPEN_PLACES[_order(str(row.get("question")), "", "")[0] == "reverse"]]
    return found or [""]


def _item(row: Row, place: str, source: Source, folders: dict) -> Item:
    if not isinstance(row.value, dict):
        raise Rejected(f"{row.value!r:.60}: an object was expected")
    text, options, answer, doubts = {"mcq": _mcq, "open": _open, "r1": _r1}[source.form](row.value, place)
    if options.labels and len(options.labels) < 2:
        raise Rejected(f"fewer than two options: {options.texts[0]!r:.60} is the only one")
    order, order_doubts = _order(text, place, source.path.stem)
    task, task_doubts = ("route", ()) if source.form == "open" else _task(text, source.path.stem)
    video, video_doubts = _video(row, source.form, folders)
    question = Question(
        id=f"{row.name}/{order}",
        clip_id=video,
        video=video,
        group=video,
        task=task,
        order=order,
        question=text,
        options=options.texts,
        answer=answer,
        split="train" if source.form == "r1" else "test",
        solution=row.value["solution"] if source.form == "r1" and isinstance(row.value.get("solution"), str) else "",
    )
    if problem := row_problem(row_of(question)):
        raise Rejected(problem)
    doubts = (*doubts, *options.doubts, *order_doubts, *task_doubts, *video_doubts)
    return Item(row, place, options.labels, question, doubts)


def _mcq(row: dict, place: str) -> tuple[str, Options, int, tuple[str, ...]]:
    asked = row[place] if place else row
    if not isinstance(asked, dict):
        raise Rejected(f"{asked!r:.60}: an object with question and options was expected")
    text, listed = asked.get("question", row.get("question")), asked.get("options")
    if not isinstance(text, str) or not text.strip():
        raise Rejected(f"question={text!r:.60}: a text was expected")
    doubts = ()
    if isinstance(listed, str) and listed.strip():
        options, doubts = parse_options(listed), ("options given as one text",)
    elif isinstance(listed, list) and listed:
        options = parse_listed(listed)
    else:
        raise Rejected(f"options={listed!r:.60}: missing or empty, a list of texts was expected")
    if re.search(r"\boptions?\s*:\s*\(?A[.):]", text, re.IGNORECASE):
        text, doubts = split_problem(text)[0], (*doubts, "the question's text held the options too")
    answer, answer_doubts = read_answer(_given_answer(row, asked, place), options)
    return text.strip(), options, answer, doubts + answer_doubts


def _given_answer(row: dict, asked: dict, place: str) -> str:
    """The answer of a multiple-choice question; steps in a list are joined by spaces, as the options are upstream."""
    names = [*ANSWER_NAMES, *([place.replace("mcq", "answer")] if place else [])]
    alone = sum(other in row for other in MCQ_PLACES) < 2
    for where in (asked, row) if alone else (asked,):
        for name in names:
            if where.get(name) is not None:
                found = where[name]
                return " ".join(map(str, found)) if isinstance(found, list) else found
    raise Rejected(f"no answer in it (none of {', '.join(names)})")


def _open(row: dict, place: str) -> tuple[str, Options, str, tuple[str, ...]]:
    if not place:
        raise Rejected("neither forward_answer nor reverse_answer is in it")
    text, answer, doubts = row.get("question"), row[place], ()
    if not isinstance(text, str) or not text.strip():
        raise Rejected(f"question={text!r:.60}: a text was expected")
    if isinstance(answer, list) and answer and all(isinstance(part, str) for part in answer):
        answer, doubts = ", ".join(answer), ("the answer was a list: joined by commas",)
    if not isinstance(answer, str) or not answer.strip():
        raise Rejected(f"{place}={answer!r:.60}: a text was expected")
    if all(name in row for name in OPEN_PLACES):
        doubts += ("it has both answers: the question's wording decided",)
    return text.strip(), Options((), (), ()), answer.strip(), doubts


def _r1(row: dict, place: str) -> tuple[str, Options, int, tuple[str, ...]]:
    if not isinstance(row.get("problem"), str) or not row["problem"].strip():
        raise Rejected(f"problem={row.get('problem')!r:.60}: a text was expected")
    text, blob, doubts = split_problem(row["problem"])
    options, solution = parse_options(blob), row.get("solution")
    tagged = TAGGED.findall(solution) if isinstance(solution, str) else []
    original = row.get("original_answer")
    given = [*tagged, original] if original is not None else tagged
    if not given:
        raise Rejected("no <answer> in its solution, and no original_answer")
    read = [read_answer(answer, options) for answer in given]
    if len({index for index, _ in read}) > 1:
        raise Rejected(f"its answers disagree: {', '.join(a.strip()[:20] for a in given)}")
    if not tagged:
        doubts += ("no <answer> in its solution: original_answer was taken",)
    return text, options, read[0][0], tuple(dict.fromkeys([*doubts, *(d for _, found in read for d in found)]))


def _task(text: str, stem: str) -> tuple[str, tuple[str, ...]]:
    found = [task for task, words in TASK_WORDS if re.search(words, text, re.IGNORECASE)]
    if found:
        unclear = len(found) > 1 and found[1] != "route"  # "which landmarks did you pass on your route" is clear
        return found[0], (f"the wording fits {' and '.join(found)}: taken as {found[0]}",) if unclear else ()
    named = [task for task, _ in TASK_WORDS if task in stem.lower()]
    if named:
        return named[0], (f"the wording doesn't tell the task: taken as {named[0]} by the file's name",)
    return "direction", ("the wording doesn't tell the task: taken as direction",)


def _order(text: str, place: str, stem: str) -> tuple[str, tuple[str, ...]]:
    words = {"reverse": REVERSE_WORDS, "forward": FORWARD_WORDS}
    said = [order for order, pattern in words.items() if re.search(pattern, text, re.IGNORECASE)]
    keyed = place.split("_")[0]
    if keyed:
        return keyed, (f"it is {keyed} by its key, {said[0]} by its wording",) if said and keyed not in said else ()
    if said:
        return said[0], ("the wording fits both orders: taken as reverse",) if len(said) > 1 else ()
    order = "reverse" if "reverse" in stem.lower() else "forward"
    return order, (f"the wording doesn't tell the order: taken as {order}",)


def _video(row: Row, form: str, folders: dict) -> tuple[str, tuple[str, ...]]:
    """The name under ``videos/``. ``folders`` collects, for each base name, the folders that were cut off."""
    given = row.value.get("video")
    if form == "open" and "video" not in row.value:  # the form that the scorer reads does without it
        name = re.sub(r"[^\w.-]|\.(?=\.)", "_", row.name)
        return f"unnamed/{name}", ("it names no video: it can be read, but not asked",)
    if not isinstance(given, str) or not given.strip():
        raise Rejected(f"video={given!r:.60}: a file name was expected")
    if not re.match(r"[\\/~]|[A-Za-z]:[\\/]", given):
        return given, ()
    folder, _, name = given.replace("\\", "/").rpartition("/")
    seen = folders.setdefault(name, [])
    seen.append(folder)
    same = folder == seen[0]
    return name, () if same else (f"{name} comes from {folder} here, from {seen[0]} before: taken as one clip",)
