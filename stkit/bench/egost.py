"""Read the released Ego-ST files, and write predictions back into them for the authors' own scorers.

Three forms are known, told apart by :func:`detect_form`::

    "mcq"   {"1": {"video": "76.mp4", "forward_mcq": {"question": "...", "options": ["A. ..."], "answer": "B"}}}
    "open"  {"1": {"video": "76.mp4", "question": "...", "forward_answer": "...", "predict": ""}}
    "r1"    training rows, JSON Lines or a list: {"problem": "... Options: A. ...", "solution": "...", "video": "..."}

Each becomes a benchmark folder of the schema::

    told = import_egost("tests/samples/egost_mcq.json", "runs/released")
    told["rows"], told["questions"], told["rejected"], told["doubtful"]
    write_predictions("tests/samples/egost_mcq.json", {"1/forward": "B"}, "runs/released_predict.json")
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from ..runs import claim, explain, write_json, write_jsonl, write_text
from ..runtime import StkitError
from .egost_rows import MCQ_PLACES, Item, Source, at, by_row, members, questions_of_source, read_source
from .options import plain
from .schema import FORMAT_VERSION, LETTERS, Clip, benchmark_hash, row_of


def detect_form(file: str | Path) -> str:
    """Which of the released forms a file has: "mcq", "open" or "r1".

    Raises:
        StkitError: no such file, an empty one, not JSON, or JSON of another shape.
    """
    return read_source(Path(file)).form


def import_egost(file: str | Path, out: str | Path, videos: str | Path | None = None) -> dict:
    """Turn a released file into a benchmark folder.

    Every row ends as a question (an mcq row as up to two) or among the rejected ones with a reason: ``rows ==
    kept_rows + rejected_rows``. ``rejected`` and ``doubtful`` have at most one entry a row; a row of which one question
    was kept and the other rejected counts as kept and stands in ``rejected`` too. ``row`` is the key in the file, or
    the line of a training row (its place, counted from 1, in a list).

    Task and order are not fields upstream. The order is that of the key (``forward_mcq``, ``reverse_answer``); without
    one, words such as "return", "back" or "to the starting point" mean reverse, "destination" means forward. The task
    is read off the question's words ("landmarks", "actions", "directions", "route"); open-ended questions are routes.
    What the wording leaves open is read off the file's name (``Part1_reverse_mcq_landmark.json``), else taken as
    direction and forward; the row is then doubtful.

    Args:
        file: a released file of any of the three forms.
        out: the folder to write; one made from another file is refused.
        videos: a folder with the clips: those that are there are hard-linked (copied where that fails) into
            ``out/videos``.

    Returns:
        ``{"rows", "questions", "kept_rows", "rejected_rows": int, "rejected", "doubtful": [{"row", "reason"}], "form",
        "notes": [str], "clips", "missing_videos": int, "out"}``, also written to ``out/import.json``;
        ``missing_videos`` counts clips without a file in ``out/videos``.

    Raises:
        StkitError: the file is missing, empty, not JSON or of another shape; ``out`` holds something else.
    """
    source, out = read_source(Path(file)), Path(out)
    if videos is not None and not Path(videos).is_dir():
        raise StkitError(f"{videos}: no such folder: give --videos the folder that holds the clips")
    items, rejected, notes = questions_of_source(source)
    doubtful = by_row((item.row.name, at(item.place, d)) for item in items for d in item.doubts)
    kept = {item.row.name for item in items}
    told = {"rows": len(source.rows) + len(source.rejected), "questions": len(items), "kept_rows": len(kept)}
    told["rejected_rows"] = sum(entry["row"] not in kept for entry in rejected)
    told |= {"rejected": rejected, "doubtful": doubtful, "form": source.form, "notes": notes}
    try:
        _write(source, out, items, told, videos)
    except OSError as error:
        raise StkitError(explain(error)) from error
    return told


def write_predictions(file: str | Path, predictions: dict[str, str | int], out: str | Path) -> dict:
    """Fill ``predict`` into a released file; all the rest of it stays as it is, byte for byte.

    An open-ended row gets the text. A multiple-choice row gets the letter that the option has in the file: inside
    ``forward_mcq`` or ``reverse_mcq``, and also in the row itself, where the released code puts it, unless both
    questions of the row were answered (one place can't hold two letters: for code that looks there, write one order at
    a time). Where nothing is written, a ``predict`` that stands there is emptied, so that two models never mix.

    Args:
        file: the file that was imported.
        predictions: question id (``"1/forward"``) -> text, letter or index. Letters are those of the imported
            question: A is its first option.
        out: the file to write.

    Returns:
        ``{"written": int, "left_out": [{"id", "reason"}]}``.

    Raises:
        StkitError: training rows (they have no place for predictions), an id that is not in the file, ``out`` is the
            file itself.
    """
    source = read_source(Path(file))
    if source.form == "r1":
        raise StkitError(f"{file}: training rows have no 'predict' form: give the mcq or open-ended file")
    if Path(out).resolve() == source.path.resolve():
        raise StkitError(f"{out} is the released file itself: choose another name, it is never written over")
    items = {item.question.id: item for item in questions_of_source(source)[0]}
    if unknown := [i for i in predictions if i not in items]:
        raise StkitError(f"{file} has no question {unknown[0]!r} ({len(unknown)} such ids): use the ids of its import")
    left_out, said = [], {}
    for name, item in items.items():
        value, reason = _said(predictions.get(name), item)
        said.setdefault(item.row.name, {})[item.place] = value
        if reason:
            left_out.append({"id": name, "reason": reason})
    try:
        write_text(out, _edited(source.text, _edits(source, said)))
    except OSError as error:
        raise StkitError(explain(error)) from error
    return {"written": len(items) - len(left_out), "left_out": left_out}


def _write(source: Source, out: Path, items: list[Item], told: dict, videos: str | Path | None) -> None:
    """The benchmark folder; benchmark.json comes last, so that a half-written folder is never taken for a whole one."""
    origin = {"file": source.path.name, "sha256": hashlib.sha256(source.text.encode()).hexdigest(), "form": source.form}
    claim(out, {"source": origin})
    questions = [item.question for item in items]
    clips = {
        q.video: Clip(q.clip_id, q.video, q.group, q.split, frames=0, fps=0.0, width=0, height=0, duration_s=0.0)
        for q in questions
    }
    (out / "videos").mkdir(exist_ok=True)
    there = [_place_video(name, out / "videos", videos) for name in clips]
    told |= {"clips": len(clips), "missing_videos": there.count(False), "out": str(out)}
    write_jsonl(out / "clips.jsonl", map(row_of, clips.values()))
    write_jsonl(out / "questions.jsonl", map(row_of, questions))
    write_json(out / "import.json", told)
    counts = {name: value for name, value in told.items() if isinstance(value, int)}
    info = {"format_version": FORMAT_VERSION, "hash": benchmark_hash(out), "seed": None, "counts": counts}
    write_json(out / "benchmark.json", info | {"settings": {"source": origin}, "source": origin})


def _place_video(name: str, root: Path, folder: str | Path | None) -> bool:
    """Put a clip into ``videos/`` as a file of its own name there; False when it isn't to be had."""
    target = root / name
    if target.is_file():
        return target.resolve().is_relative_to(root.resolve())
    places = [Path(folder, name), Path(folder, PurePosixPath(name).name)] if folder else []
    found = [place.resolve() for place in places if place.is_file()]
    if not found:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(found[0], temporary)
        except OSError:  # another disk, or a file system without hard links
            shutil.copyfile(found[0], temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _said(value: str | int | None, item: Item) -> tuple[str | None, str]:
    """What to write for a prediction, or None and why nothing can be written."""
    labels = item.labels
    if value is None or (isinstance(value, str) and not value.strip()):
        return None, "no prediction was given"
    if isinstance(value, str) and not labels:
        return value, ""
    if isinstance(value, str):
        letter = value.strip(" .()[]").upper()
        texts = [plain(text) for text in item.question.options]
        if len(letter) == 1 and letter in LETTERS:
            value = LETTERS.index(letter)
        elif plain(value) in texts:
            value = texts.index(plain(value))
        elif labels == tuple(LETTERS[: len(labels)]):
            return value, ""
        else:
            return None, f"{value!r:.60} is not a letter, and the file's own letters are {', '.join(labels)}"
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(labels):
        return None, f"{value!r} is none of its {len(labels)} options"
    return labels[value], ""


def _edits(source: Source, said: dict[str, dict[str, str | None]]) -> Iterator[tuple[int, int, str]]:
    """(start, end, new text) for every ``predict`` of a file that changes."""
    for row in source.rows:
        if not isinstance(row.value, dict):
            continue
        by_place = said.get(row.name, {})
        answered = [value for value in by_place.values() if value is not None]
        yield from _edit(source.text, row.start, answered[0] if len(answered) == 1 else None)
        for member in members(source.text, row.start):
            if source.form == "mcq" and member.name in MCQ_PLACES and isinstance(row.value[member.name], dict):
                yield from _edit(source.text, member.value_start, by_place.get(member.name))


def _edit(text: str, start: int, value: str | None) -> Iterator[tuple[int, int, str]]:
    """Set ``predict`` in the object at ``start``: in its place if it has one, else at the end, spaced like the last."""
    found = members(text, start)
    old = [member for member in found if member.name == "predict"]
    new = json.dumps(value or "", ensure_ascii=any("\ud800" <= c <= "\udfff" for c in value or ""))
    if old:
        yield old[-1].value_start, old[-1].value_end, new
    elif value is not None:
        last = found[-1]
        space = text[len(text[: last.start].rstrip(" \t\r\n")) : last.start]
        yield last.value_end, last.value_end, f',{space}"predict"{text[last.name_end : last.value_start]}{new}'


def _edited(text: str, edits: Iterable[tuple[int, int, str]]) -> str:
    pieces, at_char = [], 0
    for start, end, new in sorted(edits):
        pieces += [text[at_char:start], new]
        at_char = end
    return "".join([*pieces, text[at_char:]])
