"""Scores as tables: a DataFrame to work with, CSV for a spreadsheet, LaTeX for a paper, text for a terminal.

>>> latex_text("50 % of a_b & c")
'50 \\\\% of a\\\\_b \\\\& c'
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..runs import write_text
from .judge import KINDS, Run

COLUMNS = ("accuracy", "low", "high", "chance", "blind", "n", "clusters", "resolved_accuracy", "accuracy_failed_wrong",
           "unparsed_rate", "failed", "not_asked")  # fmt: skip
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
LATEX |= {char: "\\" + char for char in "&%$#_{}"}


def visible(text: object) -> str:
    """Any value as text that hides nothing and breaks no page: controls, overrides of direction, lone surrogates show.

    >>> visible("a\\x00b\\u202ec")
    'a␀b⟨U+202E⟩c'
    """
    return "".join(map(_visible_char, str(text)))


def _visible_char(char: str) -> str:
    code, category = ord(char), unicodedata.category(char)
    if char in "\n\t" or category not in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp") or char in "\u200c\u200d":
        return char  # joiners are part of how Persian, Hindi and emoji are written
    return chr(0x2400 + code) if code < 32 else f"⟨U+{code:04X}⟩"


def percent(value: float | None) -> str:
    """A share as "31.2", "–" when undefined."""
    return "–" if value is None else f"{100 * value:.1f}"


def signed(value: float | None) -> str:
    """A difference in percentage points: "+3.1", "−3.1", "0.0", "–" when undefined."""
    if value is None:
        return "–"
    return "0.0" if round(100 * value, 1) == 0 else f"{100 * value:+.1f}".replace("-", "−")


def latex_text(text: object) -> str:
    """Text as LaTeX that typesets just it, on one line."""
    return "".join(LATEX.get(char, char) for char in " ".join(visible(text).split()))


def table(*runs: Run) -> pd.DataFrame:
    """One row a run and category, ``overall`` last, with figures of ``judge.score``: shares in [0, 1] or NaN."""
    rows = []
    for run in runs:
        parts = {kind: run.scores["by_task"][kind] for kind in KINDS if kind in run.scores["by_task"]}
        for kind, part in (parts | {"overall": run.scores}).items():
            rows.append({"run": run.name, "category": kind} | {name: part[name] for name in COLUMNS})
    return pd.DataFrame(rows).astype(
        {name: float for name in COLUMNS if name not in ("n", "clusters", "failed", "not_asked")}
    )


def latex(runs: Sequence[Run]) -> str:
    """The table as a LaTeX tabular that needs no package; accuracies in percent with their 95 % intervals."""
    lines = [
        r"\begin{tabular}{llrrrrrr}",
        r"\hline",
        r"run & category & accuracy & 95\,\% interval & chance & blind & questions & clusters \\",
        r"\hline",
    ]
    for row in table(*runs).astype(object).where(lambda frame: frame.notna(), None).to_dict("records"):
        interval = "–" if row["low"] is None else f"{percent(row['low'])}--{percent(row['high'])}"
        cells = [row["run"], row["category"].replace("/", ", "), percent(row["accuracy"])]
        cells = [latex_text(c) for c in cells] + [
            interval,
            percent(row["chance"]),
            percent(row["blind"]),
            row["n"],
            row["clusters"],
        ]
        lines.append(" & ".join(str(c).replace("–", "--") for c in cells) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])


def text_table(scores: dict) -> str:
    """The category table for a terminal."""
    lines = [f"{'category':<20}{'accuracy':>9}  {'95 % interval':<14}{'chance':>7}{'blind':>7}{'n':>6}{'clusters':>10}"]
    for kind, part in (scores["by_task"] | {"overall": scores}).items():
        interval = "–" if part["low"] is None else f"{percent(part['low'])} to {percent(part['high'])}"
        figures = (
            f"{percent(part['accuracy']):>9}  {interval:<14}{percent(part['chance']):>7}{percent(part['blind']):>7}"
        )
        lines.append(f"{kind:<20}{figures}{part['n']:>6}{part['clusters']:>10}")
    return "\n".join(lines)


def write_tables(runs: Sequence[Run], report: Path) -> list[Path]:
    """Write the category table beside a report, under its name: ``report.csv`` and ``report.tex``."""
    csv, tex = report.with_suffix(".csv"), report.with_suffix(".tex")
    frame = table(*runs)
    frame["run"] = frame["run"].map(visible)
    write_text(csv, frame.to_csv(index=False))
    write_text(tex, latex(runs))
    return [csv, tex]
