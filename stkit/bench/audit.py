"""Can the questions be answered without the video? Blind attacks, each with its interval, and a verdict.

    result = audit("runs/walks")
    result.leaks, result.table()

An attack that is above chance has found something in the text: a leak. Below chance is none (cross-validation on
exactly balanced letters falls a little below it). The verdict is by one-sided, cluster-robust tests with Holm's
correction over all of them, at a family level of 1 %.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runtime import StkitError
from ..stats import above_chance_p, clustered_interval, holm
from .attacks import ATTACKS, WORD, Rows, guess
from .egost_rows import questions_of_source, read_source
from .schema import LETTERS, TASKS, Question, load_benchmark

FAMILY_LEVEL = 0.01
ENOUGH = 300  # questions a task, to say that there is no leak
WORDS_SHOWN = 10


@dataclass(frozen=True)
class Audit:
    """What the attacks found.

    ``results`` has one row for each attack and scope ("all" or a task): baseline, scope, accuracy, chance, low, high,
    n, clusters, p, p_holm, verdict ("leak", "no leak", "too few to tell"). ``letters`` counts right answers by category
    and letter; ``lengths`` the mean characters of right and wrong options; ``words`` those that tell right from wrong
    options best.
    """

    path: str
    questions: int
    open_ended: int
    skipped: int
    clusters: int
    results: tuple[dict, ...]
    letters: dict[str, dict[str, int]]
    lengths: dict[str, dict[str, float]]
    duplicates: int
    words: tuple[dict, ...]

    @property
    def leaks(self) -> bool:
        """Whether any attack is above chance beyond doubt."""
        return any(r["verdict"] == "leak" for r in self.results)

    @property
    def verdict(self) -> str:
        """ "leak", "no leak" or "too few to tell"."""
        found = {r["verdict"] for r in self.results}
        return next(v for v in ("leak", "too few to tell", "no leak") if v in found)

    @property
    def best(self) -> dict:
        """The row of the most accurate attack on all questions."""
        return max((r for r in self.results if r["scope"] == "all"), key=lambda r: r["accuracy"])

    def table(self):
        """The results as a pandas DataFrame, one row for each attack and scope."""
        import pandas as pd

        return pd.DataFrame(list(self.results))

    def to_json(self) -> dict:
        """What ``stkit audit --json`` prints."""
        return {
            "path": self.path,
            "verdict": self.verdict,
            "leaks": self.leaks,
            "questions": self.questions,
            "open_ended": self.open_ended,
            "skipped": self.skipped,
            "clusters": self.clusters,
            "best": self.best,
            "results": list(self.results),
            "letters": self.letters,
            "lengths": self.lengths,
            "duplicates": self.duplicates,
            "leaking_words": list(self.words),
        }

    def text(self) -> str:
        """The audit for a terminal."""
        best = self.best
        told = {
            "leak": "LEAK: the text gives answers away",
            "no leak": "no leak found: no attack is above chance",
            "too few to tell": f"no leak found, but some tasks have under {ENOUGH} questions: too few to tell",
        }[self.verdict]
        lines = [
            f"{told} (one-sided tests, Holm's correction, family level {FAMILY_LEVEL:.0%})",
            f"best blind attack: {best['baseline']}, {best['accuracy']:.1%} where chance is {best['chance']:.1%}",
            f"{self.questions} questions with options on {self.clusters} clips ({self.open_ended} open-ended and {self.skipped} bad rows left out)",
            "",
        ]
        head = f"{'attack':<28}{'scope':<11}{'accuracy':>9}  {'95 % interval':<15}{'chance':>7}{'n':>7}{'p (Holm)':>10}"
        lines.append(f"{head}  verdict")
        for r in self.results:
            interval = f"{100 * r['low']:.1f} to {100 * r['high']:.1f}"
            lines.append(
                f"{r['baseline']:<28}{r['scope']:<11}{100 * r['accuracy']:>9.1f}  {interval:<15}"
                f"{100 * r['chance']:>7.1f}{r['n']:>7}{r['p_holm']:>10.2g}  {r['verdict']}"
            )
        lines += ["", *_facts(self)]
        return "\n".join(lines)


def _facts(result: Audit) -> list[str]:
    letters = Counter()
    for counts in result.letters.values():
        letters.update(counts)
    told = ", ".join(f"{letter} {n}" for letter, n in sorted(letters.items()))
    lengths = "; ".join(f"{kind} {v['right']:.1f} / {v['wrong']:.1f}" for kind, v in result.lengths.items())
    words = ", ".join(f"{w['word']} ({w['right']} of {w['right'] + w['wrong']})" for w in result.words)
    return [
        f"right answers by letter: {told}",
        f"mean characters of right / wrong options: {lengths}",
        f"questions that stand twice with the same options: {result.duplicates}",
        f"words that tell most (right options among those with the word): {words or 'none'}",
    ]


def audit(path: str | Path, seed: int = 0, skip_bad: bool = False) -> Audit:
    """Audit a benchmark folder, a question file of the schema, or a released Ego-ST file.

    Args:
        path: what to audit; no video is opened.
        seed: of the folds and of ties.
        skip_bad: go on without malformed rows and count them (the rejected rows of a released file always are).

    Raises:
        StkitError: no such file, malformed rows, no question with options, or options on a single clip only.
    """
    questions, skipped = _questions(Path(path), skip_bad)
    return audit_questions(questions, seed, str(path), skipped)


def _questions(path: Path, skip_bad: bool) -> tuple[Sequence[Question], int]:
    if path.is_file():
        try:
            source = read_source(path)
        except StkitError:
            pass  # not a released form: a file of the schema, or malformed, which its reader tells line by line
        else:
            items, rejected, _ = questions_of_source(source)
            return [item.question for item in items], len(rejected)
    benchmark = load_benchmark(path, skip_bad)
    return benchmark.questions, len(benchmark.skipped)


def audit_questions(questions: Sequence[Question], seed: int = 0, path: str = "", skipped: int = 0) -> Audit:
    """Audit questions in memory; see :func:`audit`."""
    asked = [q for q in questions if q.options]
    if not asked:
        raise StkitError(
            f"{path or 'these questions'}: no question has options, so there is nothing to guess from them"
        )
    rows = Rows(asked)
    tasks = np.array([q.task for q in asked])
    results = []
    for scope in ("all", *[t for t in TASKS if len({q.group for q in asked if q.task == t}) > 1]):
        chosen = np.ones(len(asked), bool) if scope == "all" else tasks == scope
        results += [_result(rows, attack, scope, chosen, seed) for attack in ATTACKS]
    adjusted = holm({f"{r['baseline']}/{r['scope']}": r["p"] for r in results})
    for r in results:
        r["p_holm"] = adjusted[f"{r['baseline']}/{r['scope']}"]
        sure = r["p_holm"] < FAMILY_LEVEL
        few = min(int((tasks == t).sum()) for t in set(tasks)) if r["scope"] == "all" else r["n"]
        r["verdict"] = "leak" if sure else "no leak" if few >= ENOUGH else "too few to tell"
    copies = Counter((q.question, q.options) for q in asked)
    return Audit(
        path=path,
        questions=len(asked),
        open_ended=len(questions) - len(asked),
        skipped=skipped,
        clusters=len({q.group for q in asked}),
        results=tuple(results),
        letters=_letters(asked),
        lengths=_lengths(asked),
        duplicates=sum(n - 1 for n in copies.values()),
        words=_telling_words(rows),
    )


def _result(rows: Rows, attack: str, scope: str, chosen: np.ndarray, seed: int) -> dict:
    taken = guess(rows, attack, chosen, seed)
    picked = [k for k in np.flatnonzero(chosen)]
    correct = np.array([taken[k] == rows.questions[k].answer for k in picked], float)
    chance = np.array([1 / len(rows.questions[k].options) for k in picked])
    groups = [rows.questions[k].group for k in picked]
    interval = clustered_interval(correct, groups)
    return {
        "baseline": attack,
        "scope": scope,
        "accuracy": interval.mean,
        "chance": float(chance.mean()),
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "clusters": interval.clusters,
        "p": above_chance_p(correct, chance, groups),
    }


def _letters(questions: Sequence[Question]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter] = {}
    for q in questions:
        counts.setdefault(q.kind, Counter())[LETTERS[q.answer]] += 1
    return {kind: dict(sorted(c.items())) for kind, c in sorted(counts.items())}


def _lengths(questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    sizes: dict[str, dict[str, list[int]]] = {}
    for q in questions:
        of_kind = sizes.setdefault(q.kind, {"right": [], "wrong": []})
        for i, option in enumerate(q.options):
            of_kind["right" if i == q.answer else "wrong"].append(len(option))
    return {kind: {name: float(np.mean(v)) for name, v in s.items()} for kind, s in sorted(sizes.items())}


def _telling_words(rows: Rows) -> tuple[dict, ...]:
    """Words that stand in right options more (or less) often than one option in so many would, by their z score."""
    sizes = np.array([len(q.options) for q in rows.questions])[rows.owner]
    right, wrong, expected, spread = Counter(), Counter(), Counter(), Counter()
    for words, is_right, size in zip(rows.words, rows.right, sizes, strict=True):
        for word in {w for w in words if WORD.fullmatch(w)}:
            (right if is_right else wrong)[word] += 1
            expected[word] += 1 / size
            spread[word] += 1 / size * (1 - 1 / size)
    scored = {w: (right[w] - expected[w]) / max(spread[w], 1e-9) ** 0.5 for w in expected if right[w] + wrong[w] >= 10}
    best = sorted(scored, key=lambda w: (-abs(scored[w]), w))[:WORDS_SHOWN]
    return tuple({"word": w, "right": right[w], "wrong": wrong[w], "z": round(float(scored[w]), 2)} for w in best)
