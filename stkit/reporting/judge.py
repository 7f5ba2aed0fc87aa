"""Read runs back, score them, compare them (what counts how: :mod:`stkit.reporting.scores`).

run = load_run("runs/first")
run.scores["accuracy"], run.scores["by_task"]["direction/forward"]["blind"]
compare(run, load_run("runs/second"))[0]["by_task"]["direction/forward"]["p_holm"]
"""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

from .. import stats
from ..bench.schema import Benchmark, Prediction, Question, load_benchmark, row_of
from ..runs import clean, read_json, to_json
from ..runtime import StkitError
from .scores import CONTROLS, KINDS, Row, blind_accuracy, correct, failure_notice, groups, join, plain, score

__all__ = ["CONTROLS", "KINDS", "Row", "Run", "compare", "join", "load_run", "score"]
ANEW = "delete that line and run the same 'stkit eval' again"


@dataclass(frozen=True)
class Run:
    """An evaluation read back from its folder. ``scores`` are computed from its predictions, never read from a file."""

    name: str
    path: Path
    config: dict
    predictions: tuple[Prediction, ...]
    blind: tuple[Prediction, ...]
    questions: tuple[Question, ...]
    benchmark: Benchmark
    scores: dict
    changed: int = 0

    @property
    def notices(self) -> list[str]:
        """What a reader must know before the first figure; both of the weightiest stand in the first line."""
        untrained, failed = self.config.get("model", {}).get("untrained"), failure_notice(self.scores)
        first = "; ".join(filter(None, ["untrained weights: expect chance" if untrained else "", failed]))
        control = CONTROLS.get(self.config["settings"].get("control"))
        found = [*filter(None, [first, control]), *(n for n in self.scores["notices"] if n != failed)]
        if self.benchmark.skipped:
            found.append(f"{len(self.benchmark.skipped)} malformed rows were left out")
        if self.changed:
            found.append(
                f"{self.changed} questions were edited since the run: they are shown as they read now, scored as asked"
            )
        return found

    @property
    def rows(self) -> list[Row]:
        """Questions joined with their predictions, in the order of the benchmark."""
        return join(self.predictions, self.blind, self.questions)


def _prediction(row, where: str) -> Prediction:
    """A checked line of predictions.jsonl."""
    known = {f.name for f in fields(Prediction)}
    required = ("id", "mode", "control", "text", "parsed", "correct")
    if not isinstance(row, dict) or (missing := [name for name in required if name not in row]):
        raise StkitError(
            f"{where}: {'not a JSON object' if not isinstance(row, dict) else missing[0] + ' is missing'}: {ANEW}"
        )
    for name, kinds in (
        ("id", str),
        ("text", str),
        ("failed", str),
        ("extra", dict),
        ("log_probs", list | None),
        ("correct", bool | None),
        ("parsed", int | str | None),
    ):
        if name in row and not isinstance(row[name], kinds):
            raise StkitError(f"{where}: {name}={row[name]!r:.60} has the wrong type: {ANEW}")
    kept = {k: v for k, v in row.items() if k in known}
    lists = {k: tuple(kept.get(k) or ()) for k in ("log_probs", "timestamps_s")}
    return Prediction(**kept | lists)


def _predictions(path: Path) -> tuple[Prediction, ...]:
    """Read a file of predictions and leave it as it is: a run may be going on, its half-written line is for later."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StkitError(f"{path}:{number}: not JSON ({error}): {ANEW}") from error
        found.append(_prediction(row, f"{path}:{number}"))
    return tuple(found)


def _asked(folder: Path, settings: dict) -> tuple[Benchmark, tuple[Question, ...], int]:
    """The benchmark of a run, the questions that it was asked, and how many of them read otherwise than then."""
    then = Path(str(settings.get("bench")))
    beside = folder.resolve().parent / then.name  # runs that were copied from elsewhere come with their benchmark
    if not (found := [place for place in (then, beside) if place.exists()]):
        raise StkitError(
            f"{then}: the benchmark that the run {folder} was asked is not there: put it back, there or beside the run"
        )
    benchmark = load_benchmark(found[0], bool(settings.get("skip_bad")))
    questions = benchmark.select(settings.get("split"), settings.get("limit"))
    if not (folder / "files.json").is_file():
        return benchmark, questions, 0
    hashes = read_json(folder / "files.json").get("questions", {})
    now = {q.id: hashlib.sha256(to_json(row_of(q)).encode()).hexdigest() for q in questions}
    return benchmark, questions, sum(now[i] != hashes[i] for i in now if i in hashes)


def load_run(folder: str | Path) -> Run:
    """Read a run folder (config.json, predictions.jsonl, blind.jsonl and the benchmark that the run was asked on).

    Args:
        folder: as given to ``stkit eval --out``.

    Raises:
        StkitError: no such folder, not a run folder, a malformed line, or the benchmark is gone or another.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, a run folder was expected" if folder.exists() else "no such run folder"
        raise StkitError(f"{folder}: {what}: make one with 'stkit eval BENCH --out {folder}'")
    if missing := [name for name in ("config.json", "predictions.jsonl") if not (folder / name).is_file()]:
        raise StkitError(
            f"{folder} is not a run folder (no {missing[0]} in it): make one with 'stkit eval BENCH --out DIR'"
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("settings"), dict):
        raise StkitError(f"{folder}/config.json: no settings in it: run 'stkit eval' into a fresh folder")
    predictions = _predictions(folder / "predictions.jsonl")
    blind = _predictions(folder / "blind.jsonl") if (folder / "blind.jsonl").is_file() else ()
    benchmark, questions, changed = _asked(folder, config["settings"])
    known = {q.id for q in questions}
    if strange := [p.id for p in (*predictions, *blind) if p.id not in known]:
        raise StkitError(
            f"{folder}: {strange[0]!r:.80} is answered there but not in {benchmark.path}, which changed since"
        )
    scores = score(predictions, blind, questions)
    return Run(folder.resolve().name, folder, config, predictions, blind, questions, benchmark, scores, changed)


def _paired(first: dict[str, Row], second: dict[str, Row], ids: list[str]) -> dict | None:
    """Second minus first on the same questions, with a permutation test over clusters."""
    if not ids:
        return None
    a, b = correct([first[i] for i in ids]), correct([second[i] for i in ids])
    clusters = groups([first[i] for i in ids])
    difference = plain(stats.paired_difference(b, a, clusters))
    testable = len(set(clusters)) > 1  # one cluster can't be exchanged for any other
    return {
        "first": float(a.mean()),
        "second": float(b.mean()),
        "first_blind": blind_accuracy([first[i] for i in ids]),
        "second_blind": blind_accuracy([second[i] for i in ids]),
        "difference": difference.pop("mean"),
        **difference,
        "p": clean(float(stats.permutation_p(b, a, clusters, seed=0))) if testable else None,
    }


def _compare_two(first: Run, second: Run) -> dict:
    one, two = ({r.question.id: r for r in run.rows if r.scored} for run in (first, second))
    shared = [i for i in one if i in two and _same(one[i].question, two[i].question)]
    kinds = {kind: [i for i in shared if one[i].question.kind == kind] for kind in KINDS}
    by_task = {kind: _paired(one, two, ids) for kind, ids in kinds.items() if ids}
    choice = [i for i in shared if not one[i].question.is_open]
    notices = []
    if not shared:
        notices.append(f"{first.name} and {second.name} share no scored question: nothing can be compared")
    elif left := len(one) + len(two) - 2 * len(shared):
        notices.append(
            f"{left} questions were scored in one of the runs only (or differ): the comparison leaves them out"
        )
    return {
        "first": first.name,
        "second": second.name,
        "overall": _paired(one, two, choice),
        "by_task": by_task,
        "differs": _differing(_facts(first.config), _facts(second.config)),
        "notices": notices,
    }


def _facts(config: dict) -> dict:
    """What two runs may differ in, by name: settings, and what was chosen for them."""
    parts = [
        (f"{part}: {key}", value)
        for part in ("model", "versions", "benchmark")
        for key, value in config.get(part, {}).items()
    ]
    return config["settings"] | dict(parts)


def _differing(first: dict, second: dict) -> list[list]:
    """Facts that differ, as [name, first, second]."""
    return [[key, first.get(key), second.get(key)] for key in {**first, **second} if first.get(key) != second.get(key)]


def _same(a: Question, b: Question) -> bool:
    return (a.question, a.options, a.answer, a.group) == (b.question, b.options, b.answer, b.group)


def compare(first: Run, *others: Run) -> list[dict]:
    """Compare runs with the first one, on the questions that both have scored.

    Returns:
        One dict for each of the others: first, second (names); overall and by_task ({first, second, first_blind,
        second_blind, difference = second minus first, low, high, n, clusters, p}); differs (settings); notices.
        ``p`` is the two-sided permutation test over clusters; ``p_holm`` of the categories is corrected over all
        categories of all comparisons (``overall`` is one planned test of its own and has none).
    """
    found = [_compare_two(first, other) for other in others]
    tests = {f"{i}/{kind}": part["p"] for i, pair in enumerate(found) for kind, part in pair["by_task"].items()}
    adjusted = stats.holm({name: p for name, p in tests.items() if p is not None})
    for i, pair in enumerate(found):
        for kind, part in pair["by_task"].items():
            part["p_holm"] = adjusted.get(f"{i}/{kind}")
    return clean(found)
