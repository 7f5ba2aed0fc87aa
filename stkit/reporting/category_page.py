"""The part of the report that takes a run apart: what :func:`stkit.reporting.categories.analyse` finds, part by part.

    found = take_apart(load_run("runs/first"))
    shown = category_page(found, "run0")
    shown["parts"][0]["title"], shown["left_out"]

Each part has a title, its gist in a few words, a picture (or none) and tables of text that the template escapes.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from ..runs import write_text
from ..runtime import StkitError
from .categories import analyse, category_tables
from .category_plots import (
    LABELS,
    SCOPES,
    calibration_plot,
    chain_plot,
    order_plot,
    part_plot,
    picture_size,
    thought_plot,
)
from .chains import STEPS, UNREAD
from .judge import Run
from .plots import inline_svg
from .tables import percent, signed, visible

TITLES = {name: label[0].upper() + label[1:] for name, label in LABELS.items()} | {
    "chain": "Where the error came in", "orders": "Forward against reverse", "confusion": "Words of the time line",
    "calibration": "Calibration", "thought": "Length of the thought",
}  # fmt: skip
NOTES = {
    "steps": "Straights, turns, landmarks and actions of the whole route, in quarters of the questions.",
    "landmark": "A question counts under each kind that its right answer names.",
    "action": "A question counts under each kind that its right answer names.",
    "position": "Chosen: how many answers gave that letter.",
}
ACCURACY = ("accuracy,", "95 % interval")
BESIDE = ("chance", "blind")
HELD = {"see": "saw what is asked", "read": "read the route off it", "reverse": "reversed that route",
        "match": "matched it with the options"}  # fmt: skip
SHADES = 4
WHISKERS = "whiskers: 95 % intervals, clustered"


def take_apart(run: Run) -> dict:
    """The analysis of a run; one whose truth is gone or malformed is taken apart without it, and says so."""
    try:
        return analyse(run)
    except StkitError as error:
        found = analyse(run, truth=False)
        return found | {"notices": [*found["notices"], f"the clips’ truth was not read: {str(error).splitlines()[0]}"]}


def category_page(found: dict, name: str, known: Sequence[str] = ()) -> dict:
    """What the template shows of an analysis.

    Args:
        found: as :func:`take_apart` returns it.
        name: put before the ids of its pictures.
        known: notices that the page has already.

    Returns:
        ``parts`` (title, gist, note, open, plot, beside and below: tables), ``left_out`` (names of parts, why) and
        ``notices``; no parts and nothing left out where no question was scored.
    """
    makers = {"chain": _chain, "orders": _orders} | {key: partial(_by, key=key) for key in found["by"] if key != "task"}
    makers |= {"confusion": _confusion, "calibration": _calibration, "thought": _thought}
    there = found["by"] | found
    parts = [make(found, name=f"{name}-{key}") for key, make in makers.items() if there[key]]
    reasons: dict[str, list[str]] = {}
    for key, why in found["left_out"].items() if found["by"]["task"] else ():
        reasons.setdefault(why, []).append(TITLES[key])
    left_out = [(" · ".join(titles), why) for why, titles in reasons.items()]
    return {"parts": parts, "left_out": left_out, "notices": [n for n in found["notices"] if n not in known]}


def _part(key: str, gist: str, note: str, beside: list[dict], below: Sequence[dict] = (), plot=None) -> dict:
    shown = {"title": TITLES[key], "gist": gist, "note": note, "open": False}
    return shown | {"plot": plot, "beside": beside, "below": below}


def _table(label: str, first: str, heads: Sequence, rows: list[dict], unit: str = "questions") -> dict:
    """A table: heads are words or lines of words; ``unit`` is what n counts, "" for no columns of n and clusters."""
    lines = [[head] if isinstance(head, str) else head for head in heads]
    return {"label": label, "first": first, "heads": lines, "rows": rows, "unit": unit}


def _row(name: str, part: dict, cells: Sequence, line: bool = False) -> dict:
    """A row with its n and clusters; its cells are texts or from :func:`_cell`; ``line`` draws a line above."""
    made = [_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    return {"name": name, "n": part["n"], "clusters": part["clusters"], "cells": made, "line": line}


def _cell(text: str, soft: str = "", wide: str = "", shade: int = 0) -> dict:
    """A figure, what stands softly beside it, how wide that is in the report's style, and its shade."""
    return {"text": text, "soft": soft, "wide": wide, "shade": shade}


def _share(part: dict, key: str = "accuracy", say=percent) -> dict:
    """A figure with its interval."""
    interval = "" if part["low"] is None else f"{say(part['low'])} to {say(part['high'])}"
    return _cell(say(part[key]), interval, "wide" if say is signed else "")


def _told(row: dict) -> str:
    """The first figure of a row in words."""
    cell = row["cells"][0]
    return f"{cell['text']} ({cell['soft']})" if cell["soft"] else cell["text"]


def _beside(part: dict) -> list:
    return [_share(part), percent(part["chance"]), percent(part["blind"])]


def _picture(draw, found: dict, key: str, name: str, caption: str, rows: list[dict]) -> dict:
    """A plot, whose text alternative tells the first figure of these rows of its table."""
    told = "; ".join(f"{row['name']} {_told(row)}" for row in rows)
    svg = inline_svg(draw, found, visible(f"{TITLES[key]}: {told}"), name, picture_size(found, key))
    return {"svg": Markup(svg), "caption": caption}


def _by(found: dict, key: str, name: str) -> dict:
    """Accuracy by the values of one category: the picture of the widest scope, a table of all."""
    rows, drawn, more = [], [], ["chosen"] if key == "position" else []
    for value, scopes in found["by"][key].items():
        for scope, part in scopes.items():
            said = value if len(scopes) == 1 else f"{value}, {SCOPES.get(scope, scope)}"
            widest = scope == next(iter(scopes))
            cells = [*_beside(part), *(str(part[extra]) for extra in more)]
            rows.append(_row(said, part, cells, widest and len(scopes) > 1))
            drawn += rows[-1:] if widest else []
    shares = {value: next(iter(scopes.values()))["accuracy"] for value, scopes in found["by"][key].items()}
    ends = dict.fromkeys((max(shares, key=shares.get), min(shares, key=shares.get)))
    gist = " down to ".join(f"{percent(shares[value])} % ({value})" for value in ends)
    plot = _picture(partial(part_plot, name=key), found, key, name, f"Dashes: chance; cross: blind; {WHISKERS}.", drawn)
    table = _table(f"accuracy by {LABELS[key]}", LABELS[key], [ACCURACY, *BESIDE, *more], rows)
    return _part(key, gist, NOTES.get(key, ""), [table], plot=plot)


def _orders(found: dict, name: str) -> dict:
    rows = []
    for scope, part in found["orders"].items():
        both = [percent(part[name]) for name in ("forward", "forward_blind", "reverse", "reverse_blind")]
        rows.append(_row(SCOPES.get(scope, scope), part, [_share(part, "difference", signed), *both]))
    gist = f"{_told(rows[0])} percentage points"
    plot = _picture(order_plot, found, "orders", name, f"Right of the dashes forward is easier; {WHISKERS}.", rows)
    heads = [("difference,", "95 % interval"), "forward", "blind", "reverse", "blind"]
    note = "Forward minus reverse, percentage points: the same walk asked the same task in both orders."
    return _part("orders", gist, note, [_table("forward against reverse", "task", heads, rows, "pairs")], plot=plot)


def _chain(found: dict, name: str) -> dict:
    """Outcomes of all chains with intervals, which steps hold, and the counts by task and order."""
    whole = found["chain"]["overall"]
    outcomes = {k: own | {"n": own["count"], "clusters": own["in_clusters"]} for k, own in whole["outcomes"].items()}
    rows = [_row(key, own, [_share(own, "share")]) for key, own in outcomes.items()]
    steps = [_row(HELD[key], whole["steps"][key], [_share(whole["steps"][key], "mean")]) for key in STEPS]
    counts = [
        _row(SCOPES.get(kind, kind), own, [str(part["count"]) for part in own["outcomes"].values()], kind == "overall")
        for kind, own in found["chain"].items()
    ]  # fmt: skip
    gist = ", ".join(f"{key} {percent(own['share'])} %" for key, own in outcomes.items() if own["count"])
    note = (
        "What each answer writes down is held against what it had to follow from: the time line against the walk, "
        "every later step against the one before. The first wrong step names the error; a right answer in spite of it "
        "is luck."
    )
    plot = _picture(chain_plot, found, "chain", name, "Every bar is all questions of its row.", rows)
    beside = [
        _table("outcomes", "outcome", [("share, %,", "95 % interval")], rows, "answers"),
        _table("steps that follow from the one before", "step", [("share, %,", "95 % interval")], steps, "judged"),
    ]
    below = [_table("outcomes by task and order, counts", "category", [key.split(" ", 1) for key in outcomes], counts)]
    return _part("chain", gist, note, beside, below, plot) | {"open": whole["outcomes"][UNREAD]["count"] < whole["n"]}


def _confusion(found: dict, name: str) -> dict:
    """Written words against true ones: a square table each, the shade being the share of the true word's places."""
    confused = found["confusion"]
    parts = {words: confused[words] for words in ("motion", "landmark")}
    whole = {words: part["overall"] for words, part in parts.items()}
    gist = ", ".join(f"{words} {percent(part['mean'])} %" for words, part in whole.items()) + " of places right"
    note = f"{confused['texts']} time lines, place by place. Down: the true word; across: the one that was written."
    return _part("confusion", gist, note, [], [_matrix(words, part) for words, part in parts.items()])


def _matrix(words: str, part: dict) -> dict:
    rows = []
    for word, counts in zip(part["words"], part["counts"]):
        if not (total := sum(counts)):
            continue
        recall = part["recall"].get(word, {"mean": None, "low": None, "n": total, "clusters": "–"})
        squares = [_cell(str(n) if n else "", shade=math.ceil(SHADES * n / total)) for n in counts]
        figures = [_share(recall, "mean"), str(recall["n"]), str(recall["clusters"])]
        rows.append(_row(word, recall, [*figures, *squares]))
    overall = part["overall"]
    said = f"{words} words: {percent(overall['mean'])} % of {overall['n']} places right, {overall['clusters']} clusters"
    heads = [("right, %,", "95 % interval"), ("n", "places"), "clusters", *part["words"]]
    return _table(said, "true word", heads, rows, "")


def _calibration(found: dict, name: str) -> dict:
    part = found["calibration"]
    rows = [
        _row(f"{100 * b['from']:.0f} to {100 * b['to']:.0f} %", b, [*_beside(b), percent(b["confidence"])])
        for b in part["bins"]
    ]
    gist = f"expected calibration error {percent(part['error'])} points"
    note = (
        f"How often the chosen letter is right, by its probability among the letters: {percent(part['confidence'])} % "
        f"on average, against an accuracy of {percent(part['accuracy'])} % (blind {percent(part['blind'])}, chance "
        f"{percent(part['chance'])}; n {part['n']}, {part['clusters']} clusters)."
    )
    caption = f"On the dashes a model means what it says; {WHISKERS}."
    plot = _picture(calibration_plot, found, "calibration", name, caption, rows)
    table = _table("accuracy by probability of the chosen letter", "probability",
                   [ACCURACY, *BESIDE, ("mean", "probability")], rows)  # fmt: skip
    return _part("calibration", gist, note, [table], plot=plot)


def _thought(found: dict, name: str) -> dict:
    part = found["thought"]
    spans = [" to ".join(dict.fromkeys((str(b["from"]), str(b["to"])))) for b in part["bins"]]
    rows = [_row(span, b, _beside(b)) for span, b in zip(spans, part["bins"])]
    ends = {row["name"]: row["cells"][0]["text"] for row in (rows[0], rows[-1])}
    gist = ", ".join(f"{share} % at {span} {part['unit']}" for span, share in ends.items())
    note = "Multiple-choice questions in quarters by the length of the answer with its thought."
    plot = _picture(thought_plot, found, "thought", name, f"Dashes: chance; crosses: blind; {WHISKERS}.", rows)
    table = _table(f"accuracy by {part['unit']} of the answer", part["unit"], [ACCURACY, *BESIDE], rows)
    return _part("thought", gist, note, [table], plot=plot)


def write_categories(found: Sequence[dict], report: Path) -> Path:
    """Write all tables of some analyses beside a report, as ``report.categories.csv``.

    One row a figure with its interval; ``run`` and ``part`` (names as in
    :func:`stkit.reporting.categories.category_tables`) say which, and columns that a part lacks are empty.
    """
    lines = []
    for one in found:
        for part, frame in category_tables(one).items():
            if part in ("motion", "landmark_words"):
                frame = frame.rename_axis("true").reset_index().melt("true", var_name="written", value_name="count")
            where = {"run": visible(one["run"]), "part": part}
            lines += [where | row for row in frame.rename(columns={part: "value"}).to_dict("records")]
    columns = list(dict.fromkeys(["run", "part", *(key for line in lines for key in line)]))
    path = report.with_suffix(".categories.csv")
    write_text(path, pd.DataFrame(lines, columns=columns, dtype=object).to_csv(index=False))
    return path
