"""The model card of a merged model: what it is, what it learned from, how, what it scored, all of it read from files.

    model_card("runs/grpo", facts, read_scores(["runs/grpo-eval"]))      # Markdown with the hub's front matter

Nothing is said that no file says: what was not evaluated is called so, and the licence is left to the base.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ..runs import read_json, read_yaml, to_json
from ..runtime import StkitError
from ..vlm.load import HUB_NAME
from .run import read_rows

STAGES = {"sft": "supervised fine-tuning (cold start)", "grpo": "GRPO"}
SCORES = ("model", "set", "questions", "accuracy", "95 % interval", "blind", "chance", "n", "clusters", "unresolved")


def model_card(run: str | Path, merged: Mapping, scores: Mapping[str, dict] | None = None) -> str:
    """The card as Markdown.

    Args:
        run: the training run's folder.
        merged: what :func:`stkit.train.merge.merge` found out.
        scores: from :func:`read_scores`.

    Raises:
        StkitError: a file of the run that is there and cannot be read.
    """
    run = Path(run)
    config = read_yaml(run / "config.yaml") or {}
    parts = [
        _front(config, merged), _what(config, merged), _data(config), _method(run, config), _weights(merged),
        _scores(scores or {}), _while_training(run), _commands(config, merged), _limits(merged),
    ]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def read_scores(folders: Sequence[str | Path]) -> dict[str, dict]:
    """``scores.json`` and ``config.json`` of evaluations, by folder.

    Raises:
        StkitError: no evaluation there, or one that is not finished.
    """
    found = {}
    for folder in map(Path, folders):
        for name in ("scores.json", "config.json"):
            if not (folder / name).is_file():
                raise StkitError(f"{folder}: no {name} in it: give the folder of a finished 'stkit eval'")
        both = {"scores": read_json(folder / "scores.json"), "config": read_json(folder / "config.json")}
        if not all(isinstance(value, dict) for value in both.values()) or "by_task" not in both["scores"]:
            raise StkitError(f"{folder}/scores.json: not the scores of an evaluation: run 'stkit eval' again")
        found[str(folder)] = both
    return found


def cell(value: object) -> str:
    """A value as text in a Markdown table or paragraph: one line, in which nothing is mark-up."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", text)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *[[cell(value) for value in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str) -> str:
    """Lines as they are, in a fence that no run of backticks in them closes."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _front(config: Mapping, merged: Mapping) -> str:
    """The hub's front matter. A base in a folder has no name there, and no licence is claimed."""
    front = {"library_name": "transformers", "pipeline_tag": "video-text-to-text"}
    front["tags"] = ["stkit", str(config.get("stage")), "video-question-answering", "egocentric"]
    if HUB_NAME.fullmatch(str(merged["base"])):
        front |= {"base_model": merged["base"], "base_model_relation": "finetune"}
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _what(config: Mapping, merged: Mapping) -> str:
    stage = STAGES.get(config.get("stage"), str(config.get("stage")))
    how = "an adapter merged into it" if merged["method"] == "lora" else "all of its weights trained"
    model = config.get("model") or {}
    revision = f" (revision {cell(model['revision'])})" if model.get("revision") else ""
    lines = [
        f"# {cell(merged['base'])}, trained by {cell(stage)}",
        f"A model of family {cell(merged['family'])} that answers questions on egocentric video: "
        f"{cell(merged['base'])}{revision} with {how}, stored in {cell(merged['dtype'])}. "
        "It loads in plain Transformers.",
    ]
    if model.get("untrained"):
        lines.append("**The base had untrained weights: what is here has learned from this run's data alone.**")
    return "\n\n".join(lines)


def _data(config: Mapping) -> str:
    bench = config.get("benchmark") or {}
    data = (config.get("settings") or {}).get("data") or {}
    rows = [("benchmark", config.get("bench", "not recorded")), ("SHA-256", bench.get("sha256", "not recorded"))]
    rows.append(("split", (data["split"] or "all") if "split" in data else "not recorded"))
    rows += [(name, _plain(value)) for name, value in sorted(_flat(bench).items()) if name != "sha256"]
    return "## Data\n\n" + table(("what", "value"), rows)


def _method(run: Path, config: Mapping) -> str:
    settings = _flat(config.get("settings") or {})
    settings |= _flat({name: config[name] for name in ("shown", "processes") if name in config})
    rows = [(name, _plain(value)) for name, value in settings.items()]
    parts = [f"## Method\n\n{cell(STAGES.get(config.get('stage'), str(config.get('stage'))))}."]
    if steps := read_rows(run / "metrics.jsonl"):
        last = steps[-1]
        shown = [(name, _number(last[name])) for name in ("step", "loss", "reward", "kl") if last.get(name) is not None]
        parts.append("Last update recorded: " + ", ".join(f"{name} {cell(value)}" for name, value in shown) + ".")
    parts.append(table(("setting", "value"), rows) if rows else "Settings were not recorded.")
    used = ", ".join(f"{cell(k)} {cell(v)}" for k, v in (config.get("versions") or {}).items())
    parts.append(f"Versions: {used or 'not recorded'}.")
    return "\n\n".join(parts)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else to_json(value)


def _flat(values: Mapping, where: str = "") -> dict:
    found = {}
    for key, value in values.items():
        found |= _flat(value, f"{where}{key}.") if isinstance(value, Mapping) else {f"{where}{key}": value}
    return found


def _weights(merged: Mapping) -> str:
    """How the weights came about, and what of the trained model is lost in them."""
    if merged["method"] == "full":
        return "## Weights\n\nThe trained weights as they are; nothing was merged, nothing is lost."
    adapter = ", ".join(f"{cell(name)} {cell(value)}" for name, value in merged["adapter"].items())
    base = "the base dequantised from NF4, on which it was trained" if merged["four_bit"] else "the base"
    text = f"## Weights\n\nA LoRA adapter ({adapter}) was added to {base}, in float32, at {merged['layers']} weights, "
    text += f"then stored in {cell(merged['dtype'])}."
    text += "\n\nWhat is lost, in nats of the log-probability of a fixed prompt's tokens:"
    rows = [("this model", *_gap(merged["difference"]))]
    if merged["original_difference"]:
        rows.append(("the adapter on the original 16-bit base (not this model)", *_gap(merged["original_difference"])))
    return f"{text}\n\n" + table(("against the model as trained", "max", "mean", "tokens"), rows)


def _gap(difference: Mapping) -> tuple[str, str, int]:
    return f"{difference['max']:.2g}", f"{difference['mean']:.2g}", difference["tokens"]


def _scores(scores: Mapping[str, dict]) -> str:
    if not scores:
        return "## Scores\n\nNot evaluated: no scores were given when this card was written."
    rows = []
    for folder, both in scores.items():
        figures, settings = both["scores"], both["config"].get("settings") or {}
        name = _model_name(both["config"])
        asked = f"{settings.get('split') or 'all splits'}, {settings.get('mode')}, control {settings.get('control')}"
        parts = {"all multiple choice": figures} | {k: part for k, part in figures["by_task"].items() if part["n"]}
        name = f"{name} ({Path(folder).name})"
        rows += [(name, asked, kind, *_figures(part, part["unparsed_rate"])) for kind, part in parts.items()]
    notices = [(Path(f).name, text) for f, both in scores.items() for text in both["scores"].get("notices", [])]
    told = [f"- {cell(name)}: {cell(text)}" for name, text in notices]
    text = "Blind: the same model's accuracy on the same questions without the video. Intervals are clustered by walk."
    return "\n\n".join(["## Scores", text, table(SCORES, rows), "\n".join(told)])


def _model_name(config: Mapping) -> str:
    model = config.get("model") or {}
    return f"{model.get('name')}" + (f" + adapter {model['adapter']}" if model.get("adapter") else "")


def _figures(part: Mapping, unresolved: float | None) -> tuple:
    interval = "undefined" if part["low"] is None else f"{_percent(part['low'])} to {_percent(part['high'])}"
    blind = "not run" if part["blind"] is None else _percent(part["blind"])
    chance = "none" if part["chance"] is None else _percent(part["chance"])
    accuracy = _percent(part["accuracy"])
    return (accuracy, interval, blind, chance, part["n"], part["clusters"], _percent(unresolved))


def _percent(share: float | None) -> str:
    return "undefined" if share is None else f"{100 * share:.1f} %"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _while_training(run: Path) -> str:
    """The scores on the held-out split that the run itself took: the best and the last."""
    rows = [row for row in read_rows(run / "scores.jsonl") if row.get("accuracy") is not None]
    if not rows:
        return ""
    best = max(rows, key=lambda row: row["accuracy"])
    shown = [("best", best)] + [("last", rows[-1])] * (rows[-1] is not best)
    lines = [(f"{name}, step {row['step']}", *_figures(row, row["unparsed"])) for name, row in shown]
    text = "Scores on held-out questions taken while training, by which the best weights were chosen:"
    return f"{text}\n\n" + table(("weights", *SCORES[3:]), lines)


def _commands(config: Mapping, merged: Mapping) -> str:
    lines = [str(config.get("command") or "the training command was not recorded"), str(merged.get("command", ""))]
    return "## Commands\n\n" + fenced("\n".join(line for line in lines if line))


def _limits(merged: Mapping) -> str:
    return f"""## Intended use and limits

For research on spatio-temporal questions about egocentric video. It was trained on the data above and on nothing else
here: other cameras, places or questions are untested unless the scores say so. An accuracy says little without its
blind one beside it, and fewer than 10 clusters make an interval rough. Not for decisions on people or for navigation.

## Licence

That of the base, {cell(merged["base"])}, applies; see there. The data has its own."""
