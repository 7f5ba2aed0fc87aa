"""The page on a training run: how it went, its curves, rollouts to read side by side, and what it was run with.

    report("runs/grpo", out="runs/grpo.html")["plots"]            # told from an evaluation by its config.yaml
    report(["runs/grpo", "runs/dapo"], out="runs/both.html")      # in the same axes, with what differs between them

What stays the same over all steps, or is not there, is told in words; what is missing is said.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment

from .. import __version__
from ..bench.schema import LETTERS, Question, load_benchmark
from ..runs import clean, explain, read_json, write_text
from ..runtime import BadUse, StkitError, child_seed
from ..train.run import BESIDE, Run
from ..vlm.sight import fingerprint
from .curves import SCORES, caption, columns, named, number, panels, recorded, series, svg, training_plot
from .html import flatten
from .plots import TASK_COLOURS
from .tables import percent

__all__ = ["training_plot", "training_report"]
OFTEN = 5  # times that a clip was learned from, from which on GRPO's rewards may be learned by heart
FEW_CLUSTERS = 10
GROUPS = 4
LONGEST_TEXT = 1000


def _setting(run: Run, name: str):
    """A setting by its dotted name; None where it isn't recorded."""
    value = run.config.get("settings")
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _spans(steps: Sequence[int]) -> str:
    """Steps in words: [1, 2, 3, 5] is "1 to 3, 5"."""
    spans = itertools.groupby(enumerate(steps), lambda pair: pair[1] - pair[0])
    ends = [(found[0][1], found[-1][1]) for found in (list(span) for _, span in spans)]
    told = [f"{first} to {last}" if first < last else str(first) for first, last in ends]
    return ", ".join(told[:6]) + (f" and {len(told) - 6} more spans" if len(told) > 6 else "")


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _batches(run: Run) -> list[dict]:
    """The rows of metrics.jsonl at which rollouts were drawn: the first of the updates on each batch."""
    return [row for row in clean(run.metrics.to_dict("records")) if row.get("groups") and not row.get("update")]


def summary(run: Run) -> dict:
    """What became of a run, as far as it is known.

    Returns:
        stage, steps (done), asked, epoch, result (its path, None while there is none), loss and reward (first, last),
        best (step, accuracy, low, high, blind, chance, n, clusters, and ``of`` how many it is the best).
    """
    steps = list(run.metrics["step"]) if len(run.metrics) else []
    told = {"stage": run.config["stage"], "steps": int(max(steps, default=0)), "asked": run.config.get("steps") or _setting(run, "train.steps")}
    told |= {"epoch": series(run, "epoch").max(), "result": str(run.model) if run.model else None, "best": _best(run)}
    for name in ("loss", "reward"):
        values = series(run, name).dropna()
        told[name] = {"first": values.iloc[0], "last": values.iloc[-1]} if len(values) else None
    return clean(told)


def _best(run: Run) -> dict | None:
    rows = [row for row in clean(run.scores.to_dict("records")) if isinstance(row.get("accuracy"), float | int)]
    if not rows:
        return None
    best = max(rows, key=lambda row: row["accuracy"])
    return {name: best.get(name) for name in ("step", *SCORES, "n", "clusters")} | {"of": len(rows)}


def steps_of(run: Run, told: Mapping) -> tuple[str, str]:
    """The steps done of those that were asked for, and whether the run is finished, in words."""
    done = f"{told['steps']} of {told['asked']}"
    if not told["asked"]:
        done = f"{told['steps']}, epoch {number(told['epoch'])} of {_setting(run, 'train.epochs') or '–'}"
    if told["result"]:
        return done, "finished"
    over = told["asked"] and told["steps"] >= told["asked"]
    return done, "all steps are done, no result is in its folder" if over else "not finished: under way or stopped"


def went(run: Run, told: Mapping) -> str:
    """How it went, in a line."""
    done, state = steps_of(run, told)
    parts = [f"{told['stage']}: steps {done}", state]
    for name in ("loss", "reward"):
        if told[name]:
            parts.append(f"{name} {number(told[name]['first'])} → {number(told[name]['last'])}")
    best = told["best"]
    if not best:
        return "; ".join([*parts, "no score was taken"])
    interval = "no interval" if best["low"] is None else f"{percent(best['low'])} to {percent(best['high'])}"
    beside = f"blind {percent(best['blind'])}, chance {percent(best['chance'])}"
    counts = f"n {_whole(best['n'])}, {_whole(best['clusters'])} clusters; the best of {best['of']}"
    score = f"best score {percent(best['accuracy'])} % at step {best['step']} ({interval}; {beside}; {counts})"
    return "; ".join([*parts, score])


def notices(run: Run, told: Mapping) -> list[str]:
    """What a reader must know beside the first line."""
    found = [] if told["steps"] else ["no step is done yet: nothing here is a result"]
    if (run.config.get("model") or {}).get("untrained"):
        found.append("it started from untrained weights")
    return [*found, *_holes(run, told), *_unlearned(run), *_by_heart(told), *_doubts(told["best"])]


def _holes(run: Run, told: Mapping) -> list[str]:
    """Steps without a row or without a number, and memory that ran out."""
    found = []
    if len(run.metrics) and (gone := sorted(set(range(1, told["steps"] + 1)) - set(run.metrics["step"]))):
        found.append(f"metrics.jsonl has no row of steps {_spans(gone)}")
    for name, label in columns([run]).items():
        values = recorded(run, name)
        empty = sorted(values.index[values.isna()])
        sparse = len(empty) == len(values) or name.startswith("reward_")  # not recorded, or not always applicable
        if empty and (name == "loss" or not sparse):
            found.append(f"{label}: no number at {len(empty)} of {len(values)} steps ({_spans(empty)})")
    if len(halved := series(run, "max_tokens").dropna()):
        found.append(f"memory ran out: from step {halved.index[0]} on train.max_tokens was {halved.iloc[0]:.0f}")
    return found


def _unlearned(run: Run) -> list[str]:
    """Batches without an advantage, and rollouts that were cut off."""
    found, batches = [], _batches(run)
    if flat := [row["step"] for row in batches if row.get("skipped_groups") == row["groups"]]:
        found.append(
            f"all rewards equal in every group at {len(flat)} of {len(batches)} batches (steps {_spans(flat)}): "
            "nothing was learned from these, and neither KL nor entropy was measured"
        )
    ended = series(run, "finished").dropna()
    if len(ended) and ended.iloc[-1] < 50:
        limit = f"grpo.max_new_tokens={_setting(run, 'grpo.max_new_tokens')}"
        found.append(f"only {ended.iloc[-1]:.0f} % of the last step’s rollouts ended within {limit}")
    return found


def _by_heart(told: Mapping) -> list[str]:
    """Rewards on the same few clips again and again."""
    if told["stage"] != "grpo" or not told["epoch"] or told["epoch"] < OFTEN:
        return []
    return [
        f"every clip was learned from {told['epoch']:.0f} times: the rewards show that the run learns its own clips, "
        "and not that it does better on others: score clips that it has not seen"
    ]


def _doubts(best: Mapping | None) -> list[str]:
    """Why the best score may say little."""
    found = []
    if best and best["blind"] is not None and best["low"] is not None and best["low"] <= best["blind"]:
        found.append("the best score’s interval reaches the blind score: it does not show that the video is used")
    if best and best["clusters"] is not None and best["clusters"] < FEW_CLUSTERS:
        found.append(f"only {best['clusters']:.0f} clusters were scored: the interval is rough")
    return found


def told_as_numbers(run: Run) -> list[tuple[str, str]]:
    """What has no curve because it stays the same or is not there, and what needs none."""
    found, absent = [], []
    for name, label in columns([run]).items():
        values = series(run, name).dropna()
        if not len(values):
            absent.append(label)
        elif values.nunique() == 1:
            where = f"step {values.index[0]}" if len(values) == 1 else f"all {len(values)} steps that have one"
            found.append((label, f"{number(values.iloc[0])} at {where}"))
    seconds, batches = series(run, "seconds").dropna(), _batches(run)
    if len(seconds):
        found.append(("time", f"{seconds.sum():.0f} s in all, {number(seconds.median())} s a step (median)"))
    for name, label in (("tokens", "tokens computed"), ("learned_tokens", "tokens learned from")):
        if series(run, name).notna().any():
            found.append((label, f"{series(run, name).sum():.0f}"))
    if batches:
        names = ("rollouts", "groups", "skipped_groups")
        drawn, groups, skipped = (sum(row.get(name) or 0 for row in batches) for name in names)
        found.append(("rollouts", f"{drawn} in {groups} groups, {skipped} of them skipped (equal rewards)"))
    starts = series(run, "resumed_from_step").dropna().items()
    found.append(("resumed", "; ".join(f"from step {start:.0f}, at step {step}" for step, start in starts) or "never"))
    return [*found, ("not recorded", "; ".join(absent))] if absent else found


def _groups(run: Run, step: int) -> list[list[dict]]:
    """The rollouts of a step by group; those of a group stand beside each other in their file."""
    rows = clean(run.rollouts[run.rollouts["step"] == step].to_dict("records"))
    return [list(group) for _, group in itertools.groupby(rows, lambda row: row.get("id"))]


def pick_groups(run: Run, count: int = GROUPS) -> dict[int, tuple[list[list[dict]], int]]:
    """Groups of the first and of the last step, with how many there were: by a rule that looks at no text.

    Questions that both steps asked come first, then groups with an advantage, then as a fixed seed draws them.
    """
    steps = set(run.rollouts["step"]) if len(run.rollouts) else set()
    found = {int(step): _groups(run, step) for step in sorted({min(steps), max(steps)} if steps else steps)}
    names = [{group[0].get("id") for group in groups} for groups in found.values()]
    shared = set.intersection(*names) if len(names) > 1 else set()
    every = [row for groups in found.values() for group in groups for row in group]
    taught = {row.get("id") for row in every if row.get("advantage")}

    def rank(group: list[dict]) -> tuple:
        name = group[0].get("id")
        return name not in shared, name not in taught, child_seed(0, "rollouts", name)

    return {step: (sorted(groups, key=rank)[:count], len(groups)) for step, groups in found.items()}


def _questions(run: Run) -> tuple[dict[str, Question], str]:
    """The questions as they were asked, by id, and what is to be said of them."""
    then = Path(str(run.config.get("bench")))
    beside = run.out.resolve().parent / then.name  # a run that was copied from elsewhere with its benchmark
    try:
        questions = load_benchmark(next((path for path in (then, beside) if path.exists()), then)).questions
        asked = read_json(run.out / "files.json")["questions"]
    except (StkitError, OSError, KeyError, TypeError) as error:
        return {}, f"the questions’ texts are not shown: {str(error).splitlines()[0]}"
    now = fingerprint(None, questions, with_videos=False)["questions"]
    same = {q.id: q for q in questions if asked.get(q.id) == now[q.id]}
    return same, "" if len(same) >= len(asked) else "questions that were edited since are shown by their ids alone"


def _worth(row: Mapping) -> float:
    return -math.inf if row.get("reward") is None else row["reward"]


def _rollout(row: Mapping) -> dict:
    """One rollout as the template shows it."""
    parts = row["rewards"] if isinstance(row.get("rewards"), dict) else {}
    text, told = str(row.get("text") or ""), ", ".join(f"{name} {number(value)}" for name, value in parts.items())
    advantage, tokens = row.get("advantage"), row.get("tokens")
    facts = [f"reward {number(row.get('reward'))}" + (f" ({told})" if told else "")]
    facts.append(f"advantage {'+' if (advantage or 0) > 0 else ''}{number(advantage)}")
    facts.append(f"{_whole(tokens)} tokens, {'ended by itself' if row.get('finished') else 'cut off'}")
    return {"facts": " · ".join(facts), "text": text[:LONGEST_TEXT], "cut": max(0, len(text) - LONGEST_TEXT)}


def reading(run: Run, told: Mapping, count: int) -> dict:
    """Rollouts to read side by side: groups of the first and of the last step, the best rollout first."""
    questions, note = _questions(run) if len(run.rollouts) else ({}, "")
    steps = []
    for step, (groups, total) in pick_groups(run, count).items():
        cards = []
        for group in groups:
            name, question = group[0].get("id"), questions.get(group[0].get("id"))
            texts = question.options if question else ()
            options = [(LETTERS[i], text, i == question.answer) for i, text in enumerate(texts)]
            rollouts = [_rollout(row) for row in sorted(group, key=_worth, reverse=True)]
            cards.append({"id": name, "question": question, "options": options, "rollouts": rollouts})
        late = " (not learned from yet)" if step > told["steps"] else ""
        steps.append({"title": f"Step {step}{late}", "shown": f"{len(cards)} of {total} groups", "cards": cards})
    return {"steps": steps, "note": note}


def _record(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything the run was made with, part by part."""
    parts = {key: value for key, value in run.config.items() if isinstance(value, Mapping) and value}
    rest = {key: value for key, value in run.config.items() if key not in parts}
    settings = {f"settings: {key}": value for key, value in parts.pop("settings", {}).items()}
    whole = {"run": rest | {"folder": run.out, "result": run.model}} | settings | parts
    return [(key, flatten(value)) for key, value in whole.items()]


def differing(runs: Mapping[str, Run]) -> list[tuple[str, list[str]]]:
    """Settings, versions and the like that are not the same in all runs, with the value in each."""
    facts = [dict(flatten({k: v for k, v in run.config.items() if k not in BESIDE})) for run in runs.values()]
    found = [(key, [one.get(key, "–") for one in facts]) for key in dict.fromkeys(key for one in facts for key in one)]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def _section(name: str, run: Run, count: int) -> dict:
    """What the template shows of one run."""
    told = summary(run)
    done, state = steps_of(run, told)
    what = (run.config["stage"], (run.config.get("model") or {}).get("name"), run.config.get("bench"))
    return {
        "name": name,
        "told": told,
        "went": went(run, told),
        "steps": done,
        "state": state,
        "command": str(run.config.get("command") or "not recorded"),
        "subtitle": " · ".join(str(value) for value in what if value),
        "notices": notices(run, told),
        "numbers": told_as_numbers(run),
        "reading": reading(run, told, count),
        "record": _record(run),
    }


def _metrics(runs: Mapping[str, Run]) -> pd.DataFrame:
    """All rows of metrics.jsonl, with the run's name first."""
    frames = [run.metrics.assign(run=name) for name, run in runs.items()]
    order = dict.fromkeys(["run", "step", *(column for frame in frames for column in frame)])
    return pd.concat(frames, ignore_index=True).reindex(columns=list(order))


def _refuse_stages(runs: Mapping[str, Run]) -> None:
    stages = {run.config["stage"]: name for name, run in runs.items()}
    if len(stages) > 1:
        told = " and ".join(f"{name} is of {stage}" for stage, name in stages.items())
        fix = "report them apart, and compare their models by 'stkit eval'"
        raise BadUse(f"{told}: their losses have nothing in common: {fix}")


def sections(runs, environment: Environment) -> dict:
    """What a page shows of training runs of one stage: found (name -> run), runs (a section each), plots, caption; the
    environment learns how they write numbers. Raises what :func:`training_report` does of the runs."""
    environment.filters["number"], found = number, named(runs)
    _refuse_stages(found)
    drawn = [svg(panel, found, f"plot{i}") for i, panel in enumerate(panels(found))]
    parts = [_section(name, run, max(2, GROUPS // len(found))) for name, run in found.items()]
    return {"found": found, "runs": parts, "plots": drawn, "caption": caption(found)}


def training_report(runs, out: str | Path, environment: Environment) -> dict:
    """Write the page of one training run, or of several of one stage in the same axes.

    Args:
        runs: a run's folder, a :class:`stkit.train.run.Run`, or several.
        out: the HTML file; the metrics go beside it as ``.csv``.
        environment: Jinja's, of the reports.

    Returns:
        {"report": path, "tables": [paths], "plots": how many, "notices": [texts], "runs": [name, path and summary of
        each], "differs": [[setting, [its value in each run]]]}.

    Raises:
        BadUse: runs of both stages. StkitError: a malformed file, an output that cannot be written.
    """
    out, shown = Path(out), sections(runs, environment)
    found, parts = shown.pop("found"), shown["runs"]
    differs = differing(found) if len(found) > 1 else []
    said = [f"{s['name']}: {notice}" if len(found) > 1 else notice for s in parts for notice in s["notices"]]
    page = environment.get_template("training.html").render(
        version=__version__, colours=TASK_COLOURS, title=" and ".join(found), notices=said, **shown,
        differs=[(key, " → ".join(values)) for key, values in differs],
    )  # fmt: skip
    table = out.with_suffix(".csv")
    try:
        write_text(out, page)
        write_text(table, _metrics(found).to_csv(index=False))
    except OSError as error:
        raise StkitError(explain(error)) from error
    told = [{"name": s["name"], "path": str(run.out)} | s["told"] for s, run in zip(parts, found.values())]
    return {"report": str(out), "tables": [str(table)], "plots": len(shown["plots"]), "notices": said, "runs": told,
            "differs": clean(differs)}  # fmt: skip
