"""The page of a study: our miniature beside the paper's figures, and what follows from the numbers, by rule.

    write_page("data_cards")       # ablations.json -> ablations.md, both in that folder

Nothing on the page is written by hand but the text on what cannot be known: figures come from the JSON, and so do the
sentences on what transfers and what does not.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..runs import read_json, write_text
from ..runtime import StkitError
from . import paper
from .findings import ALPHA, DISAGREE, HIGHER, LOWER, ON, unsure

WHERE = {"test": "in distribution", "ood": "out of distribution"}
SAID = {HIGHER: "higher", LOWER: "lower", DISAGREE: "seeds disagree", "none shown": "no difference shown"}
UNKNOWABLE = """\
- Whether any of this holds for a model of billions of parameters: ours has a few million, knows no words but those of its
  world, and its thought is a time line of fixed form, where the paper's is free text.
- What reverse thinking does to a model that was trained on natural language: our start has learned the algebra of routes,
  reversal included, from text before any arm begins. An arm without reverse thinking leaves out a sentence, not that knowledge.
- What happens on real video: our walks are rendered corridors with right angles, twelve kinds of landmarks and six actions.
- How arms would stand with more time: each has minutes on a CPU, and none was tuned beyond the settings that stand in the
  JSON. Arms of SFT and then GRPO have more updates than either alone, in the paper too.
- How far other seeds would differ: so few tell little, and the interval by clip and seed rests on them alone. p speaks of
  other walks with these seeds, not of other seeds.
- Whether the paper's own figures would survive an audit: its released questions can be answered in large part without the
  video (see `ego_st_bench.md`), and no intervals are published. Those marked [D] were read off a radar chart, to about 2 points."""


def write_page(folder: str | Path) -> Path:
    """Write ``ablations.md`` beside ``ablations.json``."""
    path = Path(folder) / "ablations.md"
    write_text(path, page(read_json(Path(folder) / "ablations.json")))
    return path


def page(found: Mapping) -> str:
    """The page as Markdown.

    Args:
        found: what ``ablations.json`` holds.

    Raises:
        StkitError: it is not the result of a study.
    """
    if not isinstance(found, Mapping) or (
        missing := [k for k in ("arms", "contrasts", "walks", "commands") if k not in found]
    ):
        lacking = "not a JSON object" if not isinstance(found, Mapping) else f"no {missing[0]!r} in it"
        raise StkitError(f"ablations.json: {lacking}: run 'python -m stkit.tiny.ablations' again")
    parts = [
        _head(found),
        _arms(found),
        *(_accuracies(found, on) for on in ON),
        _contrasts(found),
        _beside(found),
        _prose(found),
    ]
    return "\n\n".join(parts) + "\n"


def _percent(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{round(100 * value, 1) + 0.0:{sign}.1f}"  # + 0.0: no minus before a zero


def _range(part: Mapping, low: str = "low", high: str = "high", sign: str = "") -> str:
    if part[low] is None:
        return "–"
    return f"{_percent(part[low], sign)} to {_percent(part[high], sign)}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, ["---"] * len(lines[0]), *map(list, rows)])


def _head(found: Mapping) -> str:
    test, ood = (found["walks"][on] for on in ON)
    seeds, machine = found["study"]["seeds"], found["machine"]
    commands = "\n".join(found["commands"])
    return f"""# The paper's questions, in miniature

Written by `stkit.tiny.ablation_page` from `ablations.json` beside it. All runs were made by

```bash
{commands}
```

on {machine["cores"]} cores ({machine["processor"]}, torch {machine["torch"]}). {_commits(found)}

Every arm starts from one small model (weights `{found["start"]["sha256"][:12]}`) that writes the time line of a video and has
learned the algebra of routes from text, but was never asked a question about a video. Answers are decoded greedily, with
thoughts, on {test["clips"]} fresh walks of split test and on {ood["clips"]} out of distribution (longer routes, unseen
textures, less light). Accuracy is over multiple choice (direction, landmark, action, each forward and reverse), in percent.
Training ran with {len(seeds)} seeds ({", ".join(map(str, seeds))}).{_unfinished(found)}

- **by clip**: 95 % interval of the mean over the seeds, clustered by map; it holds for these seeds on other walks.
- **by clip and seed**: the same, made wider by a t margin of the seeds' own spread; it speaks of other seeds too.
- **blind**: the same model asked for the letter without frames.
- **with reverse thinking**: the thought tells the route and its reverse, whichever is asked, and GRPO rewards that with
  {found["study"]["both_orders"]:g}. **Without**: the asked order is written straight from the time line. See `stkit/tiny/thoughts.py`."""


def _commits(found: Mapping) -> str:
    """At which commit every run was made, and a warning where that can't be had."""
    runs: dict[str, dict[str, list[str]]] = {}
    for name, arm in found["arms"].items():
        for seed, row in arm["seeds"].items():
            runs.setdefault(row["commit"], {}).setdefault(name, []).append(seed)
    if len(runs) == 1:
        said = f"All were made at commit `{next(iter(runs))}`."
    else:
        lines = [
            f"- `{commit}`: " + ", ".join(f"{name} ({', '.join(seeds)})" for name, seeds in arms.items())
            for commit, arms in runs.items()
        ]
        said = "They were made at these commits, arms with their seeds:\n\n" + "\n".join(lines)
    if bad := [commit for commit in runs if unsure(commit)]:
        count = sum(len(seeds) for commit in bad for seeds in runs[commit].values())
        total = sum(len(arm["seeds"]) for arm in found["arms"].values())
        named = ", ".join(f"`{commit}`" for commit in bad)
        said += f"\n\n> **Not reproducible: code that no commit holds made {count} of {total} runs** ({named})."
    return said


def _unfinished(found: Mapping) -> str:
    left = found.get("unfinished")
    return f" Not through with all arms, and left out: seed {', '.join(map(str, left))}." if left else ""


def _arms(found: Mapping) -> str:
    rows = []
    for name, row in found["arms"].items():
        arm, runs = row["arm"], list(row["seeds"].values())
        minutes = [run["seconds"] / 60 for run in runs if run["seconds"] is not None]
        answered = arm["clips"] or found["walks"]["train"]["clips"] if arm["stage"] == "sft" else None
        rows.append([
            name, arm["stage"].upper() if arm["stage"] else "none",
            {"reverse": "with", "direct": "without"}[arm["thinking"]] if arm["stage"] else "–",
            arm["after"] or ("start" if arm["stage"] else "–"), str(answered or "–"), arm["sampling"] or "as made",
            str(runs[0]["updates"]),
            f"{sum(minutes) / len(minutes):.1f}" if minutes else "–",
        ])  # fmt: skip
    head = (
        "arm",
        "trained by",
        "reverse thinking",
        "from",
        "clips with answers",
        "sampling",
        "updates",
        "minutes a run",
    )
    said = "Minutes are of training from the arm before it and of scoring, beside whatever else ran."
    return f"## Arms\n\n{_table(head, rows)}\n\n{said}"


def _accuracies(found: Mapping, on: str) -> str:
    kinds = [kind for kind in paper.KINDS if all(kind in arm[on]["by_task"] for arm in found["arms"].values())]
    rows = []
    for name, arm in found["arms"].items():
        part = arm[on]
        own = [_percent(part["by_task"][kind]["accuracy"]) for kind in kinds]
        rows.append([
            name, f"**{_percent(part['accuracy'])}**", _range(part), _range(part, "wide_low", "wide_high"),
            ", ".join(map(_percent, part["by_seed"])), _percent(part["blind"]), _percent(part["unparsed_rate"]), *own,
        ])  # fmt: skip
    head = ("arm", "accuracy", "by clip", "by clip and seed", "each seed", "blind", "unread", *map(_short, kinds))
    first = next(iter(found["arms"].values()))[on]
    few = " Exploratory: fewer than ten clusters." if first["clusters"] < 10 else ""
    return (
        f"## Accuracy {WHERE[on]}\n\n{_table(head, rows)}\n\nn = {first['n']} questions, {first['clusters']} clusters, chance "
        f"{_percent(first['chance'])}. F forward, R reverse. unread: no answer could be read.{few}"
    )


def _contrasts(found: Mapping) -> str:
    rows = [
        [
            one["question"], f"{one['first']} → {one['second']}", WHERE[one["on"]], _percent(one["difference"], "+"),
            _range(one, sign="+"), _range(one, "wide_low", "wide_high", "+"),
            ", ".join(_percent(difference, "+") for difference in one["by_seed"]), _p(one["p"]), _p(one["p_holm"]),
            SAID[one["outcome"]],
        ]
        for one in found["contrasts"]
    ]  # fmt: skip
    head = (
        "question",
        "arms",
        "on",
        "difference",
        "by clip",
        "by clip and seed",
        "each seed",
        "p",
        "p (Holm)",
        "outcome",
    )
    return (
        f"## Contrasts\n\nPoints, second minus first, on the same questions. p: permutation over maps of the means over the seeds; "
        f"Holm's correction is over all {len(rows)} rows. An outcome is said where the corrected p is below {ALPHA} and all "
        f"seeds agree in sign.\n\n{_table(head, rows)}"
    )


def _beside(found: Mapping) -> str:
    pairs = [pair for pair in _pairs(found) if pair[0]["paper"]]
    rows = [
        [
            test["question"], "{} → {}".format(*test["paper"]),
            "{:.0f} → {:.0f} ({:+.0f})".format(*map(paper.mean, test["paper"]), _published(test)),
            f"{test['first']} → {test['second']}", _both(test), _both(ood),
        ]
        for test, ood in pairs
    ]  # fmt: skip
    head = ("question", "the paper's", "accuracy [D]", "ours", "in distribution", "out of distribution")
    used = {name: arm for test, _ in pairs for name, arm in zip(test["paper"], (test["first"], test["second"]))}
    names = "; ".join(f"{name}: {paper.MEANT[name]}" for name in used)
    kinds = []
    for name, arm in used.items():
        kinds.append([f"{name} [D]", f"{paper.mean(name):.0f}", *map(str, paper.FIGURES[name])])
        for on in ON:
            part = found["arms"][arm][on]
            by_kind = [part["by_task"].get(kind, {}).get("accuracy") for kind in paper.KINDS]
            kinds.append([f"{arm}, {WHERE[on]}", *map(_percent, [part["accuracy"], *by_kind])])
    return (
        f"## Beside the paper\n\n{_table(head, rows)}\n\nMeans of the six kinds of question for the paper, all questions "
        f"for ours. [D]: read off a radar chart, to about {paper.READ_OFF} points. {names}.\n\n"
        f"{_table(('model', 'accuracy', *map(_short, paper.KINDS)), kinds)}"
    )


def _both(one: Mapping) -> str:
    """Both accuracies of a contrast and their difference."""
    first, second = (_percent(one[f"{which}_accuracy"]) for which in ("first", "second"))
    return f"{first} → {second} ({_percent(one['difference'], '+')})"


def _short(kind: str) -> str:
    return kind.replace("/forward", " F").replace("/reverse", " R")


def _pairs(found: Mapping) -> list[tuple[dict, dict]]:
    """Each contrast in distribution with itself out of it."""
    on = {(one["name"], one["on"]): one for one in found["contrasts"]}
    return [(on[name, "test"], on[name, "ood"]) for name in dict.fromkeys(one["name"] for one in found["contrasts"])]


def _published(one: Mapping) -> float:
    first, second = one["paper"]
    return paper.mean(second) - paper.mean(first)


def verdict(one: Mapping) -> str:
    """Whether a contrast has the paper's direction.

    "same", "opposite", "not shown", "unknown" (the paper's own difference is within the error of reading it) or "own"
    (the paper has no figures on it).
    """
    if not one["paper"]:
        return "own"
    if abs(_published(one)) <= paper.READ_OFF:
        return "unknown"
    if one["outcome"] not in (HIGHER, LOWER):
        return "not shown"
    return "same" if (one["outcome"] == HIGHER) == (_published(one) > 0) else "opposite"


def _prose(found: Mapping) -> str:
    pairs = _pairs(found)

    def listed(*verdicts: str) -> str:
        lines = [f"- {_sentence(test, ood)}" for test, ood in pairs if verdict(test) in verdicts]
        return "\n".join(lines) or "- Nothing."

    return "\n\n".join([
        "## What transfers\n\nContrasts in distribution that have the paper's direction.\n\n" + listed("same"),
        "## What does not\n\nContrasts in distribution that go the other way, or where none is shown.\n\n"
        + listed("opposite", "not shown"),
        "## What only the miniature was asked\n\nThe paper gives no figures on these.\n\n" + listed("own"),
        "## What cannot be known from so small a model\n\n"
        + "\n".join([f"- {_sentence(test, ood)}" for test, ood in pairs if verdict(test) == "unknown"] + [UNKNOWABLE]),
    ])  # fmt: skip


def _sentence(test: Mapping, ood: Mapping) -> str:
    """A contrast in words: what was asked, what came out on either benchmark, and the paper's difference."""
    said = f"**{test['question']}** In distribution {_told(test)}; out of distribution {_told(ood)}."
    return " ".join(filter(None, [said, _beside_paper(test), test["note"]]))


def _told(one: Mapping) -> str:
    size = f"{_percent(one['difference'], '+')} points, {_range(one, sign='+')}, Holm's p {_p(one['p_holm'])}"
    if one["outcome"] in (HIGHER, LOWER):
        return f"`{one['second']}` is {one['outcome']} than `{one['first']}` ({size})"
    if one["outcome"] == DISAGREE:
        return f"the seeds disagree on `{one['second']}` against `{one['first']}` ({size})"
    return f"no difference is shown between `{one['first']}` and `{one['second']}` ({size})"


def _beside_paper(one: Mapping) -> str:
    if not one["paper"]:
        return ""
    published = _published(one)
    said = f"The paper's difference is {published:+.0f} points [D]"
    if verdict(one) == "unknown":
        return f"{said}, which is no more than the error of reading it."
    if verdict(one) == "not shown":
        inside = 100 * one["low"] <= published <= 100 * one["high"]
        return f"{said}; our interval by clip {'has room for it' if inside else 'leaves it out'}."
    return f"{said}{', the other way round' if verdict(one) == 'opposite' else ''}."
