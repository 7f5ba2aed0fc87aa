"""An evaluation taken apart: what it depends on how often a model is right, and where it goes wrong.

    found = analyse(load_run("runs/first"))
    found["by"]["turns"]["3"]["direction"]["accuracy"], found["chain"]["overall"]["outcomes"]["saw wrong"]["count"]
    category_tables(found)["turns"]          # the same as DataFrames

Every share has its interval, clustered by walk, with n and clusters, and every accuracy the blind one beside it. What a
run cannot tell is None, and ``left_out`` says why.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd

from .. import stats
from ..bench.routes import ACTIONS, LANDMARKS
from ..bench.schema import LETTERS, TASKS
from ..bench.timeline import Moment, load_truth, timeline
from ..runs import clean
from ..runtime import StkitError
from .chains import asked_items, confusion, count_outcomes, trace
from .judge import KINDS, Run
from .scores import CONTROLS, Row, blind_accuracy, correct, groups, plain

CONFIDENCE_BINS, LENGTH_BINS = 10, 4
CHOICE = "choice"  # all multiple-choice questions together
NO_TRUTH = "no clip has its truth beside it (imported rows have none)"


def analyse(run: Run, truth: bool = True) -> dict:
    """All that can be told of a run by category.

    Args:
        run: as :func:`stkit.reporting.judge.load_run` reads it.
        truth: read the clips' truth, which turns, steps and confusion need.

    Returns:
        Plain JSON values, None where undefined:
        ``by``: task, turns, steps (of the walk), landmark and action (kinds that the right answer names: a question
        counts under each), position (letter of the right option); each value -> "choice" and the tasks, or its one task
        -> accuracy, low, high, chance, blind, n, clusters, exploratory (position: chosen too, how many answers).
        ``orders``: see :func:`forward_against_reverse`. ``chain``: see :func:`stkit.reporting.chains.count_outcomes`.
        ``confusion``: see :func:`stkit.reporting.chains.confusion`. ``calibration``: see :func:`calibration`.
        ``thought``: see :func:`thought_length`. ``left_out``: part -> why it is None. ``notices``: texts.

    Raises:
        StkitError: a truth file that is gone or malformed.
    """
    rows = [row for row in run.rows if row.scored]
    truths = _truths(run, rows) if truth else {}
    by = _by(rows, truths, NO_TRUTH if truth else "truth=False: the clips' truth was not read")
    chain, told = _chain(run, rows)
    parts = {"orders": forward_against_reverse(rows), "chain": chain, "confusion": _confusion(run, rows, truths)}
    parts |= {"calibration": calibration(rows), "thought": thought_length(rows)}
    why = {name: part for name, part in (by | parts).items() if isinstance(part, str)}
    by, parts = ({k: None if k in why else part for k, part in group.items()} for group in (by, parts))
    lacking = sum(row.question.clip_id not in truths for row in rows) if truths else 0
    if lacking:
        told.append(f"{lacking} questions are on clips without truth: turns, steps and confusion leave them out")
    notices = [*run.notices, *told, *_few(by)]
    return clean({"run": run.name, "by": by, **parts, "left_out": why, "notices": notices})


def _truths(run: Run, rows: Sequence[Row]) -> dict[str, dict]:
    """The truth of each clip that has one."""
    found = {clip: load_truth(run.benchmark, clip) for clip in {row.question.clip_id: None for row in rows}}
    return {clip: truth for clip, truth in found.items() if truth is not None}


def _figures(rows: Sequence[Row]) -> dict:
    """Accuracy with its interval, chance and the blind accuracy of some scored questions, at least one."""
    found = plain(stats.clustered_interval(correct(rows), groups(rows)))
    chances = [1 / len(row.question.options) for row in rows if row.question.options]
    beside = {"chance": float(np.mean(chances)) if chances else None, "blind": blind_accuracy(rows)}
    counts = {name: found[name] for name in ("n", "clusters")}
    span = {"accuracy": found["mean"], "low": found["low"], "high": found["high"]}
    return span | beside | counts | {"exploratory": found["clusters"] < stats.EXPLORATORY}


def _scopes(rows: Sequence[Row]) -> dict[str, dict]:
    """Figures of all multiple-choice questions and of each task; where there is but one task, of that alone."""
    parts = {task: [row for row in rows if row.question.task == task] for task in TASKS}
    parts = {task: part for task, part in parts.items() if part}
    if len(parts) > 1:
        parts = {CHOICE: [row for row in rows if not row.question.is_open]} | parts
    return {scope: _figures(part) for scope, part in parts.items() if part}


def _split(rows: Sequence[Row], labels: Callable[[Row], Iterable], order: Iterable) -> dict[str, dict]:
    """Figures by label, in an order; a row counts under each of its labels."""
    parts: dict = {}
    for row in rows:
        for label in labels(row):
            parts.setdefault(label, []).append(row)
    return {str(label): _scopes(parts[label]) for label in order if label in parts}


def _by(rows: Sequence[Row], truths: dict[str, dict], why: str) -> dict[str, dict | str]:
    """The accuracies by category; the reason where there are none."""
    found: dict = {"task": _split(rows, lambda row: [row.question.kind], KINDS)}
    known = [row for row in rows if row.question.clip_id in truths]
    turns, steps = ({c: count(truths[c]) for c in truths} for count in (_turns, _steps))
    found["turns"] = _split(known, lambda row: [turns[row.question.clip_id]], sorted({*turns.values()})) or why
    bins = quantile_bins([steps[row.question.clip_id] for row in known], LENGTH_BINS)
    found["steps"] = _split(known, lambda row: [bins[steps[row.question.clip_id]]], dict.fromkeys(bins.values())) or why
    for task, kinds in (("landmark", LANDMARKS), ("action", ACTIONS)):
        asked = [row for row in rows if row.question.task == task]
        found[task] = _split(asked, _kinds, kinds) or f"no {task} question whose right answer tells known kinds"
    choice = [row for row in rows if not row.question.is_open]
    found["position"] = _position(choice) or "no multiple-choice question"
    return found


def _position(choice: Sequence[Row]) -> dict[str, dict]:
    """Figures by the right option's letter, and how many answers chose that letter."""
    found = _split(choice, lambda row: [LETTERS[row.question.answer]], LETTERS)
    chosen = Counter((LETTERS[r.said.parsed], r.question.task) for r in choice if r.said.parsed is not None)
    for letter, scopes in found.items():
        for scope, part in scopes.items():
            part["chosen"] = sum(chosen[letter, task] for task in (TASKS if scope == CHOICE else [scope]))
    return found


def _turns(truth: dict) -> int:
    return len(truth["plan"]["turns"])


def _steps(truth: dict) -> int:
    """Steps of the walk's route: straights, turns, landmarks, actions."""
    return sum(len(truth["plan"][name]) for name in ("lengths", "turns", "landmarks", "actions"))


def _kinds(row: Row) -> set[str]:
    """The kinds that the right answer names, as they stand on the way there; none where it tells no route."""
    try:
        return {step.value for step in asked_items(row.question)}
    except StkitError:
        return set()


def quantile_bins(values: Sequence[int], count: int) -> dict[int, str]:
    """Cut whole numbers into at most ``count`` bins of about equal size; equal numbers are never parted.

    Returns:
        Each number that occurs -> its bin's name, such as "8 to 11", in rising order.
    """
    if not len(values):
        return {}
    ends = np.unique(np.quantile(values, np.arange(1, count + 1) / count, method="inverted_cdf"))
    parts: dict[int, list[int]] = {}
    for value in sorted(set(values)):
        parts.setdefault(int(np.searchsorted(ends, value)), []).append(value)
    names = {k: f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for k, part in parts.items()}
    return {value: names[k] for k, part in parts.items() for value in part}


def _few(by: dict) -> list[str]:
    """That a category has few clusters; those by task are among the run's own notices."""
    found = []
    for name, values in by.items():
        parts = {} if name == "task" else values or {}
        few = [value for value, scopes in parts.items() if next(iter(scopes.values()))["exploratory"]]
        found += [f"{name} ({', '.join(few)})"] if few else []
    return [f"exploratory: fewer than {stats.EXPLORATORY} clusters in {'; '.join(found)}"] if found else []


def forward_against_reverse(rows: Sequence[Row]) -> dict | str:
    """Forward minus reverse, paired by walk and task.

    Returns:
        "overall" (multiple choice) and each task -> forward, reverse, forward_blind, reverse_blind, difference, low,
        high, n (pairs), clusters, exploratory; the reason where no walk was asked both.
    """
    asked: dict = {}
    for row in rows:
        orders = asked.setdefault((row.question.clip_id, row.question.task), {})
        orders.setdefault(row.question.order, []).append(row)
    pairs = {key: (both["forward"], both["reverse"]) for key, both in asked.items() if len(both) == 2}
    scopes = {"overall": [pair for pair in pairs.values() if not pair[0][0].question.is_open]}
    scopes |= {task: [pair for (_, own), pair in pairs.items() if own == task] for task in TASKS}
    return {scope: _paired(own) for scope, own in scopes.items() if own} or "no walk was asked a task in both orders"


def _paired(pairs: list[tuple[list[Row], list[Row]]]) -> dict:
    right = [[np.mean([bool(row.said.correct) for row in part]) for part in pair] for pair in pairs]
    (forward, reverse), clusters = np.array(right).T, groups([there[0] for there, _ in pairs])
    found = plain(stats.paired_difference(forward, reverse, clusters))
    blind = [blind_accuracy([row for pair in pairs for row in pair[k]]) for k in (0, 1)]
    means = {"forward": float(forward.mean()), "reverse": float(reverse.mean())}
    means |= {"forward_blind": blind[0], "reverse_blind": blind[1], "difference": found.pop("mean")}
    return means | found | {"exploratory": found["clusters"] < stats.EXPLORATORY}


def _chain(run: Run, rows: Sequence[Row]) -> tuple[dict | str, list[str]]:
    """Where chains went wrong, and what a reader has to know of it."""
    if why := _other_frames(run):
        return why, []
    traced, lost = trace(rows)
    cut = sum("cut_off" in row.said.extra for row in rows)
    told = [f"{lost} questions are left out of the chain: their options are no routes to tell apart"] * (lost > 0)
    told += [f"{cut} answers were cut off at max_new_tokens"] * (cut > 0)
    if traced:
        return count_outcomes(traced), told
    return _no_text(rows) if not lost else "no question has options that are routes", told


def _other_frames(run: Run) -> str:
    control = run.config["settings"].get("control", "none")
    return f"{CONTROLS[control]}, not the walk" if control in CONTROLS else ""


def _no_text(rows: Sequence[Row]) -> str:
    decoded = any(row.said.mode == "generate" for row in rows)
    return "no multiple-choice question was answered" if decoded else "no text was decoded: use mode='generate'"


def _confusion(run: Run, rows: Sequence[Row], truths: dict[str, dict]) -> dict | str:
    if why := _other_frames(run):
        return why
    if not truths:
        return f"no true time line is known: {NO_TRUTH}"
    if not any(row.said.mode == "generate" for row in rows):
        return _no_text(rows)
    clips = {clip.id: clip for clip in run.benchmark.clips}

    def shown(row: Row) -> tuple[Moment, ...] | None:
        clip, times = clips.get(row.question.clip_id), row.said.timestamps_s
        if clip is None or clip.id not in truths or not times:
            return None
        return timeline(truths[clip.id], np.rint(np.array(times) * clip.fps).astype(int))

    return confusion(rows, shown) or "no text holds a whole time line of a clip with truth"


def calibration(rows: Sequence[Row]) -> dict | str:
    """How far the probability of the chosen letter, among the letters, tells how often it is right.

    Returns:
        bins of a tenth (from, to, confidence: the mean; accuracy, low, high, chance, blind, n, clusters, exploratory),
        error (expected calibration error: mean gap between a bin's confidence and accuracy, weighted by n), confidence,
        accuracy, n, clusters; the reason where no letter has a probability.
    """
    asked = [row for row in rows if not row.question.is_open]
    if any(row.said.control == "circular" for row in asked):
        return "circular control: right under every rotation is no event that one rotation's probabilities are about"
    asked = [row for row in asked if len(row.said.log_probs) == len(row.question.options)]
    asked = [row for row in asked if row.said.parsed is not None and None not in row.said.log_probs]
    if not asked:
        return "the answers have no probabilities: use mode='letter'"
    shares = [_share(row) for row in asked]
    places = [min(int(share * CONFIDENCE_BINS), CONFIDENCE_BINS - 1) for share in shares]
    bins = []
    for k in sorted(set(places)):
        own = [j for j, place in enumerate(places) if place == k]
        part = _figures([asked[j] for j in own])
        bounds = {"from": k / CONFIDENCE_BINS, "to": (k + 1) / CONFIDENCE_BINS}
        bins.append(bounds | {"confidence": float(np.mean([shares[j] for j in own]))} | part)
    error = sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(asked)
    return {"bins": bins, "error": error, "confidence": float(np.mean(shares)), **_figures(asked)}


def _share(row: Row) -> float:
    logs = np.array(row.said.log_probs, dtype=float)
    return float(np.exp(logs[row.said.parsed] - np.logaddexp.reduce(logs)))


def thought_length(rows: Sequence[Row]) -> dict | str:
    """Accuracy by the length of the answer with its thought, in quarters of the multiple-choice questions.

    Returns:
        unit ("tokens" as recorded, else "words" of the text), bins (from, to, mean length; accuracy, low, high, chance,
        blind, n, clusters, exploratory); the reason where no text was decoded.
    """
    asked = [row for row in rows if not row.question.is_open and row.said.mode == "generate"]
    if not asked:
        return _no_text(rows)
    recorded = all(isinstance(row.said.extra.get("tokens"), int) for row in asked)
    lengths = [row.said.extra["tokens"] if recorded else len(row.said.text.split()) for row in asked]
    names, bins = quantile_bins(lengths, LENGTH_BINS), []
    for name in dict.fromkeys(names.values()):
        own = [k for k, length in enumerate(lengths) if names[length] == name]
        sizes = [lengths[k] for k in own]
        span = {"from": min(sizes), "to": max(sizes), "mean": float(np.mean(sizes))}
        bins.append(span | _figures([asked[k] for k in own]))
    return {"unit": "tokens" if recorded else "words", "bins": bins}


def category_tables(found: Run | dict) -> dict[str, pd.DataFrame]:
    """What :func:`analyse` finds, as tables for a notebook or a spreadsheet; parts that are left out have none.

    Args:
        found: a run, or what :func:`analyse` returned.

    Returns:
        task, turns, steps, landmark, action, position, orders, chain, chain_steps, motion and landmark_words (counts:
        true words down, written ones across), recall, calibration, thought.
    """
    found = analyse(found) if isinstance(found, Run) else found
    tables = {name: _rows_of(values, name, "scope") for name, values in found["by"].items() if values}
    if found["orders"]:
        tables["orders"] = pd.DataFrame([{"scope": scope} | part for scope, part in found["orders"].items()])
    if found["chain"]:
        for name, part in (("chain", "outcomes"), ("chain_steps", "steps")):
            told = {kind: own[part] for kind, own in found["chain"].items()}
            tables[name] = _rows_of(told, "kind", part.removesuffix("s"))
        counts = {kind: (own["n"], own["clusters"]) for kind, own in found["chain"].items()}
        tables["chain"]["n"], tables["chain"]["clusters"] = zip(*tables["chain"]["kind"].map(counts))
    if found["confusion"]:
        for name, part in (("motion", "motion"), ("landmark_words", "landmark")):
            own = found["confusion"][part]
            tables[name] = pd.DataFrame(own["counts"], index=own["words"], columns=own["words"])
        told = {part: found["confusion"][part]["recall"] for part in ("motion", "landmark")}
        tables["recall"] = _rows_of(told, "words", "true")
    for name in ("calibration", "thought"):
        if found[name]:
            tables[name] = pd.DataFrame(found[name]["bins"])
    return tables


def _rows_of(nested: dict, outer: str, inner: str) -> pd.DataFrame:
    """A row for each inner part of a dict of dicts of figures."""
    return pd.DataFrame([{outer: a, inner: b} | part for a, parts in nested.items() for b, part in parts.items()])
