"""What the shipped models score, on walks that neither training nor selection saw: the one command behind every card.

    found = score_tiny("runs/tiny-scores", clips=200, seed=7)
    found["models"]["tiny"]["in"]["by_task"]["direction/forward"]

Walks of split "test" are made from a seed of the caller's; a second set is out of distribution. Decoding is greedy, the
blind score stands beside each; thoughts without frames, and with shuffled and reversed ones, show what answers rest on.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from ..bench.build import build_benchmark
from ..evaluation import evaluate
from ..reporting.judge import compare, load_run
from ..reporting.scores import KINDS
from ..runs import claim, explain, read_json, write_json
from ..runtime import BadUse, StkitError, versions
from ..vlm import tiny
from ..vlm.load import find, result_of_run

MAX_NEW_TOKENS = 256  # the longest answer that is taught, a reversed route with its time line, has less
CONTROLS = ("blind", "shuffled", "reversed")
SHOWN = (
    "accuracy", "low", "high", "n", "clusters", "chance", "blind", "minus_blind", "unparsed_rate", "failed", "by_task",
    "by_order", "route", "turn_order",
)  # fmt: skip


def score_tiny(
    out: str | Path, clips: int = 200, seed: int = 1, models: Sequence[str] = tiny.SHIPPED, controls: bool = True,
    progress: bool = True,
) -> dict:  # fmt: skip
    """Score models on fresh walks, in distribution and out of it; run again, it goes on where it was.

    Args:
        out: folder of the benchmarks and runs; ``scores.json`` in it holds what is returned.
        clips: walks in distribution, and as many out of it.
        seed: of the walks; any but those of training would do, as splits go by map.
        models: names or folders for :func:`stkit.load_model`.
        controls: also ask without frames (with a thought; the blind score beside is by letter), and with shuffled and
            with reversed ones.

    Returns:
        clips, seed, versions, benchmarks (hash of each), weights (SHA-256, where a manifest tells it), models: for each
        the scores "in", "ood" (and "blind", "shuffled", "reversed"), see :func:`summary`; comparisons of each two,
        paired: the later one minus the earlier one.

    Raises:
        BadUse: no model, or two whose folders have one name. StkitError: a model that is not there, another scoring's
            folder, a full disk.
    """
    names = [_short(model) for model in models]
    if not names or len(set(names)) < len(names):
        raise BadUse(f"models={list(map(str, models))}: give at least one, each of another name")
    for model in models:  # before anything is filmed
        find(result_of_run(str(model), None)[0])
    out = Path(out)
    try:
        claim(out, {"clips": clips, "seed": seed}, name="settings.json")
        found = {"clips": clips, "seed": seed, "benchmarks": {}, "models": {}, "weights": {}, "versions": versions()}
        for name in ("in", "ood"):
            built = build_benchmark(out / name, clips, seed, split="test", ood=name == "ood", progress=progress)
            found["benchmarks"][name] = {"hash": built["hash"], "by_task": built["by_task"]}
        for model in models:
            found["models"][str(model)] = _asked(out, str(model), controls, progress)
            manifest = read_json(out / _short(model) / "in" / "config.json")["model"]["manifest"]
            found["weights"][str(model)] = manifest and manifest["sha256"]
        found["comparisons"] = [_compared(out, *pair) for pair in combinations(map(str, models), 2)]
        write_json(out / "scores.json", found)
    except OSError as error:
        raise StkitError(explain(error)) from error
    return found


def _short(model: str | Path) -> str:
    return Path(model).name


def _asked(out: Path, model: str, controls: bool, progress: bool) -> dict:
    """One model's scores on each benchmark and under each control."""
    found = {}
    for name in ("in", "ood", *(CONTROLS if controls else ())):
        control = name if name in CONTROLS else "none"
        bench = out / ("ood" if name == "ood" else "in")
        run = out / _short(model) / name
        asked = {"mode": "generate", "max_new_tokens": MAX_NEW_TOKENS, "blind": control == "none", "control": control}
        evaluate(bench, model=model, out=run, progress=progress, **asked)
        found[name] = summary(run)
    return found


def summary(run: Path) -> dict:
    """The numbers of one evaluation that a card shows; accuracy and its interval are over multiple-choice questions."""
    scores = read_json(run / "scores.json")
    return {name: scores[name] for name in SHOWN}


def _compared(out: Path, one: str, other: str) -> dict:
    (found,) = compare(*(load_run(out / _short(model) / "in") for model in (one, other)))
    return {"models": [one, other], **found}


def text(found: Mapping) -> str:
    """The scores for a terminal: a row for each model and way of asking, in percent."""
    kinds = [kind for kind in KINDS if not kind.startswith("route")]
    head = ["model", "asked", "all six", "interval", "blind", *kinds, "route", "route dist."]
    rows = [head]
    for model, ways in found["models"].items():
        for way, scores in ways.items():
            route = scores["route"] or {"exact": None, "edit_distance": None}
            rows.append([
                model, way, _percent(scores["accuracy"]), f"{_percent(scores['low'])} to {_percent(scores['high'])}",
                _percent(scores["blind"]), *(_percent(scores["by_task"].get(k, {}).get("accuracy")) for k in kinds),
                _percent(route["exact"]), "" if route["edit_distance"] is None else f"{route['edit_distance']:.2f}",
            ])  # fmt: skip
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
