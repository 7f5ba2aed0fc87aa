"""The report: one HTML file that works without a network, on a phone, in the dark and on paper.

All text that comes from a file or from a model passes through Jinja's escaping and through
:func:`stkit.reporting.tables.visible`; the page's own policy forbids scripts and any request::

    report(["runs/first", "runs/second"], out="runs/both.html")["tables"]
"""

import base64
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .. import __version__
from ..bench.schema import LETTERS, TASKS
from ..runs import explain, write_text
from ..runtime import BadUse, StkitError, child_seed, generator
from .judge import CONTROLS, KINDS, Row, Run, compare, load_run
from .plots import TASK_COLOURS, accuracy_plot, compare_plot, inline_svg
from .tables import percent, signed, visible, write_tables

EXAMPLES = 6
THUMBNAILS = 8
THUMBNAIL_WIDTH = 160
LONGEST_TEXT = 1500
LEGEND = "Filled: forward, hollow: reverse; whiskers: 95 % intervals, clustered"
TROUBLES = {"unparsed": "not read, %", "failed": "failed", "not_asked": "not asked"}


def _p_value(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _environment() -> Environment:
    """Jinja with escaping on; a value that isn't markup of ours is made visible before it is escaped."""
    environment = Environment(
        loader=PackageLoader("stkit", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
    )
    environment.filters |= {"percent": percent, "signed": signed, "p": _p_value}
    return environment


def pick_examples(rows: Sequence[Row], count: int = EXAMPLES, seed: int = 0) -> list[Row]:
    """At most ``count`` rows, a category at a time in turn, by a rule that looks at nothing but ids and the seed."""
    kinds = list(KINDS)
    generator(seed, "kinds").shuffle(kinds)
    ordered = sorted(rows, key=lambda r: child_seed(seed, "example", r.question.id))
    queues = [[r for r in ordered if r.question.kind == kind] for kind in kinds]
    turns = [queue[i] for i in range(count) for queue in queues if i < len(queue)]
    return turns[:count]


def _thumbnail(pixels: np.ndarray) -> tuple[str, int, int]:
    """A frame ``(H, W, 3)`` uint8 as a data URI of a small JPEG, with its width and height."""
    height = max(1, round(pixels.shape[0] * THUMBNAIL_WIDTH / pixels.shape[1]))
    image = Image.fromarray(pixels).resize(
        (THUMBNAIL_WIDTH, min(height, 4 * THUMBNAIL_WIDTH)), Image.Resampling.LANCZOS
    )
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=72, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), *image.size


def _frames(run: Run, video: str, seen: dict) -> tuple[list[dict], str]:
    """Thumbnails of a video's sampled frames and a note; a video that cannot be read gives the note alone."""
    from ..vlm.video import read_video  # torch comes with it

    if video in seen:
        return seen[video]
    settings = run.config["settings"]
    asked = {"sampling": settings.get("sampling"), "n": settings.get("frames"), "fps": settings.get("fps")}
    try:
        frames = read_video(run.benchmark.video_path(video), **{k: v for k, v in asked.items() if v is not None})
    except (StkitError, OSError) as error:
        seen[video] = [], f"frames not shown: {str(error).splitlines()[0]}"
        return seen[video]
    total = len(frames.pixels)
    shown = np.unique(np.linspace(0, total - 1, min(THUMBNAILS, total)).round().astype(int))
    pictures = []
    for i in shown:
        uri, width, height = _thumbnail(frames.pixels[i])
        time = f"{frames.timestamps_s[i]:.1f} s"
        alt = f"frame {i + 1} of {total} of the video, at {time}"
        pictures.append({"uri": uri, "width": width, "height": height, "time": time, "alt": alt})
    control = run.config["settings"].get("control", "none")
    note = f"{len(shown)} of the {total} sampled frames" if len(shown) < total else ""
    if control in CONTROLS and control != "circular":
        note += f"{'; ' if note else ''}shown in the video’s order ({CONTROLS[control]})"
    seen[video] = pictures, note
    return seen[video]


def _options(row: Row) -> list[dict]:
    """Each option with its letter, its marks and, in letter mode, its share of the letters' probability."""
    shares = np.full(len(row.question.options), np.nan)
    if len(row.said.log_probs) == len(shares):
        logs = np.array(row.said.log_probs, dtype=float)
        shares = np.exp(logs - np.logaddexp.reduce(logs))
    return [
        {
            "letter": LETTERS[i],
            "text": text,
            "right": i == row.question.answer,
            "chosen": i == row.said.parsed,
            "share": float(shares[i]) if np.isfinite(shares[i]) else None,
        }
        for i, text in enumerate(row.question.options)
    ]


def _card(run: Run, row: Row, seen: dict) -> dict:
    """One hit or miss as the template shows it."""
    question, said = row.question, row.said
    frames, note = _frames(run, question.video, seen)
    marks = {True: ("hit", "✓ hit"), False: ("miss", "✗ miss")}
    verdict, mark = marks[bool(said.correct)]
    if turned := said.extra.get("rotations"):
        right = sum(rotation["parsed"] == question.answer for rotation in turned)
        mark += f", right under {right} of {len(turned)} rotations of the options"
    unread = "" if said.parsed is not None else ", which could not be read as an answer"
    label = f"the model’s text{unread}" if said.text else f"the model gave no text{unread}"
    return {
        "id": question.id,
        "kind": question.kind,
        "verdict": verdict,
        "mark": mark,
        "frames": frames,
        "frames_note": note,
        "question": question.question,
        "options": _options(row),
        "answer": question.answer,
        "said_label": label,
        "text": said.text[:LONGEST_TEXT],
        "cut": max(0, len(said.text) - LONGEST_TEXT),
    }


def _outcomes(run: Run, count: int) -> list[dict]:
    seen, found = {}, []
    for title, right in (("Misses", False), ("Hits", True)):
        rows = [r for r in run.rows if r.scored and bool(r.said.correct) is right]
        if rows:
            picked = pick_examples(rows, count)
            note = f"{len(picked)} of {len(rows)}, drawn by a fixed seed from all categories in turn."
            if any(r.said.log_probs for r in picked):
                note += " The percentages beside the options are the letters’ shares of the model’s probability."
            found.append({"title": title, "note": note, "cards": [_card(run, r, seen) for r in picked]})
    return found


def flatten(value, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as ("model.dtype", "float32") lines, in their order."""
    if not isinstance(value, Mapping) or not value:
        return [(prefix, _shown(value))]
    named = {f"{prefix}.{key}" if prefix else str(key): item for key, item in value.items()}
    return [line for name, item in named.items() for line in flatten(item, name)]


def _shown(value) -> str:
    """One setting in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value)) or "–"
    return "–" if value in (None, "", {}) else str(value)


def _record(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything the run was made with, part by part, and the video readers that its predictions name."""
    readers = sorted({str(p.extra["reader"]) for p in run.predictions if p.extra.get("reader")})
    parts = {key: value for key, value in run.config.items() if isinstance(value, Mapping)}
    rest = {key: value for key, value in run.config.items() if key not in parts} | {"video reader": readers}
    return [(key, flatten(value)) for key, value in (parts | {"run": rest}).items()]


def _label(scores: dict) -> str:
    """The plot in words, for those who don't see it."""
    told = [
        f"{kind.replace('/', ', ')} {percent(part['accuracy'])} % ({percent(part['low'])} to {percent(part['high'])}; "
        f"blind {percent(part['blind'])}, chance {percent(part['chance'])})"
        for kind, part in scores["by_task"].items()
        if part["accuracy"] is not None
    ]
    return "Accuracy by category with 95 % intervals: " + ("; ".join(told) or "nothing was scored")


def _section(run: Run, number: int, count: int, categories: dict) -> dict:
    """What the template shows of one run."""
    settings = run.config["settings"]
    kept = ("model", "bench", "mode", "control", "split", "seed")
    gaps = run.scores["forward_minus_reverse"]
    names = {task: task for task in TASKS} | {"overall": "all multiple choice"}
    reasons = Counter(r.said.failed for r in run.rows if r.failed)
    caption = f"{LEGEND}; dashes: chance; cross: blind."
    svg = inline_svg(accuracy_plot, run.scores, visible(_label(run.scores)), f"run{number}")
    return {
        "name": run.name,
        "subtitle": " · ".join(f"{name} {settings[name]}" for name in kept if settings.get(name) not in (None, "")),
        "scores": run.scores,
        "gaps": {task: gaps[key] for key, task in names.items() if gaps[key]},
        "troubles": {
            key: label for key, label in TROUBLES.items() if any(part[key] for part in run.scores["by_task"].values())
        },
        "not_asked": "routes are asked in generate mode" if settings.get("mode") == "letter" else "",
        "plot": {"svg": Markup(svg), "caption": caption},
        "categories": categories,
        "outcomes": _outcomes(run, count),
        "failures": [{"count": n, "reason": reason} for reason, n in reasons.most_common(10)],
        "record": _record(run),
    }


def _pairs(runs: Sequence[Run], found: list[dict]) -> list[dict]:
    """The comparisons with their plots."""
    shown = []
    for i, pair in enumerate(found):
        told = [
            f"{k.replace('/', ', ')} {signed(p['difference'])} ({signed(p['low'])} to {signed(p['high'])})"
            for k, p in pair["by_task"].items()
        ]
        label = f"{pair['second']} minus {pair['first']} in percentage points: " + "; ".join(told)
        differs = [(key, _shown(a), _shown(b)) for key, a, b in pair["differs"]]
        caption = f"{pair['second']} minus {pair['first']}. {LEGEND}."
        svg = Markup(inline_svg(compare_plot, pair, visible(label), f"pair{i}"))
        shown.append(pair | {"plot": {"svg": svg, "caption": caption}, "differs": differs})
    return shown


def _items(runs) -> list:
    """What was given, one or several, as a list."""
    items = [runs] if isinstance(runs, (str, os.PathLike, Run)) or hasattr(runs, "out") else list(runs)
    if not items:
        raise BadUse("no run given: name at least one folder that 'stkit eval' wrote")
    return items


def _loaded(items: Sequence) -> list[Run]:
    """Runs from folders, results of ``evaluate`` or Runs; two of one name are called by their paths."""
    loaded = [item if isinstance(item, Run) else load_run(getattr(item, "out", item)) for item in items]
    names = Counter(run.name for run in loaded)
    return [run if names[run.name] == 1 else replace(run, name=str(run.path)) for run in loaded]


def _notices(runs: Sequence[Run]) -> list[str]:
    """Every run's notices: what holds for all of them once, the rest with the run's name."""
    said = [n for run in runs for n in run.notices]
    shared = [n for n in dict.fromkeys(said) if said.count(n) == len(runs)]
    return shared + [f"{run.name}: {n}" for run in runs for n in run.notices if n not in shared]


def _by_kind(items: Sequence) -> tuple[list, list]:
    """Evaluations, and training runs, which are told by their config.yaml."""
    training = [i for i in items if (Path(getattr(i, "out", getattr(i, "path", i))) / "config.yaml").is_file()]
    return [i for i in items if i not in training], training


def report(runs, out: str | os.PathLike = "report.html") -> dict:
    """Write the report of one run, or of several beside the first; of training runs in the same axes.

    Training runs beside evaluations get a section of their own at the end of the page.

    Args:
        runs: a run folder, a result of ``evaluate`` or of a training, or several of them.
        out: the HTML file; the category table goes beside it as ``.csv`` and ``.tex``, what the runs are taken apart
            into as ``.categories.csv``.

    Returns:
        {"report": path, "tables": [paths], "notices": [texts], "runs": [name, path and scores of each],
        "comparison": [as from :func:`stkit.reporting.judge.compare`, empty for one run]}; of training runs as from
        :func:`stkit.reporting.training.training_report`.

    Raises:
        StkitError: a folder that isn't a run, a malformed file, an output that cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise BadUse(f"--out {out}: give a name that ends in .html")
    evaluations, trained = _by_kind(_items(runs))
    environment, learned = _environment(), {}
    if trained:
        from .training import sections, training_report  # torch comes with it: not for evaluations alone

        if not evaluations:
            return training_report(trained, out, environment)
        learned = sections(trained, environment)
    loaded = _loaded(evaluations)
    from .category_page import category_page, take_apart, write_categories  # torch comes with it: first read the runs

    comparison = compare(*loaded) if len(loaded) > 1 else []
    found = [take_apart(run) for run in loaded]
    categories = [category_page(apart, f"run{i}", run.notices) for i, (apart, run) in enumerate(zip(found, loaded))]
    notices = _notices(loaded)
    count = max(2, EXAMPLES // len(loaded))
    page = environment.get_template("report.html").render(
        version=__version__, title=" and ".join(run.name for run in loaded), colours=TASK_COLOURS, tasks=TASKS,
        kinds=KINDS, notices=notices, comparison=_pairs(loaded, comparison), learned=learned,
        runs=[_section(run, i, count, shown) for i, (run, shown) in enumerate(zip(loaded, categories))],
    )  # fmt: skip
    try:
        write_text(out, page)
        tables = [*write_tables(loaded, out), write_categories(found, out)]
    except OSError as error:
        raise StkitError(explain(error)) from error
    return {
        "report": str(out),
        "tables": [str(path) for path in tables],
        "notices": notices,
        "runs": [{"name": run.name, "path": str(run.path)} | run.scores for run in loaded],
        "comparison": comparison,
    }
