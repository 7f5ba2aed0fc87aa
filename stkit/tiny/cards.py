"""The cards of the models that ship: prose, with every figure from a manifest or from the scores of ``stkit tiny score``.

    write_cards("data_cards/tiny_scores.json")

writes ``data_cards/tiny.md`` and ``tiny_r1.md``, and a README.md into each folder that ships. Or as a command::

    python -m stkit.tiny.cards --scores data_cards/tiny_scores.json
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from ..reporting.scores import KINDS
from ..runs import read_json, write_text
from ..runtime import StkitError
from ..vlm import tiny

CARDS = Path(__file__).parents[2] / "data_cards"
WAYS = {
    "in": "in distribution", "ood": "out of distribution", "blind": "no frames, thinking", "shuffled": "frames shuffled",
    "reversed": "frames backwards",
}  # fmt: skip
WHAT = {
    "tiny": "the end of the recipe's supervised stages",
    "tiny-cold": "the same recipe stopped early, so that there is something left to learn",
    "tiny-r1": "`tiny-cold` after GRPO, with rewards for right answers, form and time line",
}
INTENDED = """\
For teaching, tests, demonstrations without a network, and for studying how training moves a model that anyone can retrain.
It sees one world only: walks of 32 frames through rendered corridors, twelve kinds of landmarks, six kinds of
actions, the kit's own questions and wording. It knows nothing of real video, of other questions, or of language beyond
them: for anything else take a Qwen-VL, by the same commands."""
LIMITS = """\
- Its figures say what so small a model can learn here. They are no evidence about large models or real video.
- Its thoughts follow one form, which it was taught. A right answer after a wrong thought happens (06_category_analysis counts
  it), so a thought is not a proof of how the answer came about.
- Unseen wall textures, longer routes and less light are out of distribution: see the second row.
- Not run on a GPU; float16 on disk, scored in float32."""


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def table(ways: Mapping[str, Mapping]) -> str:
    """Scores in percent: a row for each way of asking, with the blind score beside."""
    kinds = [kind for kind in KINDS if not kind.startswith("route")]
    head = ["asked", "all six", "95 %", "blind", *(kind.replace("/", ", ") for kind in kinds), "routes exact", "route steps off"]
    lines = [head, ["---"] * len(head)]
    for way, scores in ways.items():
        route = scores["route"] or {}
        lines.append([
            WAYS[way], percent(scores["accuracy"]), f"{percent(scores['low'])} to {percent(scores['high'])}",
            percent(scores["blind"]), *(percent(scores["by_task"].get(kind, {}).get("accuracy")) for kind in kinds),
            percent(route.get("exact")), "–" if route.get("edit_distance") is None else f"{route['edit_distance']:.2f}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def recipe_table(manifest: Mapping) -> str:
    """The stages of the recipe, with the minutes that their updates took; GRPO is told apart."""
    head = ["stage", "lesson", "updates", "walks an update", "questions a walk", "peak learning rate", "minutes", "commit"]
    lines = [head, ["---"] * len(head)]
    for stage in manifest["recipe"]["stages"]:
        made = manifest["stages"][stage["name"]]
        row = [stage[k] for k in ("name", "lesson", "steps", "walks", "per_walk", "lr")]
        lines.append([*map(str, row), "–" if made["minutes"] is None else f"{made['minutes']:.0f}", f"`{made['commit']}`"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goals(name: str, found: Mapping) -> list[tuple[str, str, bool]]:
    """What a model was to reach: the goal, what it reached, and whether that is enough.

    Args:
        name: of a model that ships.
        found: what ``stkit tiny score`` wrote, of all of them.
    """
    ways = found["models"][name]
    inside, mean = ways["in"], ways["in"]["accuracy"]
    parts = {kind: part["accuracy"] for kind, part in inside["by_task"].items() if not kind.startswith("route")}
    worst, told = min(parts, key=parts.get), []
    if name == "tiny":
        told.append(("each of the six at least 90", f"the lowest, {worst}, {percent(parts[worst])}", parts[worst] >= 0.90))
        told.append(("routes exactly right at least 70", percent(inside["route"]["exact"]), inside["route"]["exact"] >= 0.70))
    if name == "tiny-cold":
        told.append(("the mean of the six from 50 to 65", percent(mean), 0.50 <= mean <= 0.65))
    if name == "tiny-r1":
        told.append(("the mean of the six at least 80", percent(mean), mean >= 0.80))
    pairs = {tuple(one["models"]): one["overall"] for one in found["comparisons"]}
    if name == "tiny-r1" and (pair := pairs.get(("tiny-cold", "tiny-r1"))):
        gained = f"{100 * pair['difference']:+.1f} ({100 * pair['low']:.1f} to {100 * pair['high']:.1f}, p {_p(pair['p'])})"
        enough = pair["difference"] >= 0.15 and pair["p"] is not None and pair["p"] < 0.05
        told.append(("at least 15 above tiny-cold, by a paired test over walks", gained, enough))
    if "blind" in ways:
        blind = ways["blind"]
        said = f"{percent(blind['accuracy'])} ({_range(blind)}), {percent(blind['unparsed_rate'])} without an answer; "
        said += f"by letter {percent(inside['blind'])}"
        told.append(("without frames not above chance", said, blind["low"] <= blind["chance"]))
    if turns := (ways.get("reversed") or {}).get("turn_order"):
        said = f"{percent(turns['mean'])} ({_range(turns)}) of the routes"
        told.append(("frames backwards told as they show, more often than not", said, turns["mean"] > 0.5))
    return told


def _range(part: Mapping) -> str:
    return f"{percent(part['low'])} to {percent(part['high'])}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def goals_table(name: str, found: Mapping) -> str:
    """The goals and what came of them; missed ones are marked."""
    lines = [["goal", "reached", ""], ["---"] * 3]
    lines += [[goal, reached, "met" if met else "**missed**"] for goal, reached, met in goals(name, found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def card(name: str, manifest: Mapping, scores: Mapping) -> str:
    """A model's card.

    Args:
        manifest: of the folder that ships; ``note``, if it has one, stands below the recipe.
        scores: what ``stkit tiny score`` wrote.

    Raises:
        StkitError: the scores are of other weights.
    """
    if name not in scores["models"]:
        raise StkitError(f"the scores hold {', '.join(scores['models'])}, not {name!r}: run 'stkit tiny score' with it")
    ways, bench = scores["models"][name], manifest["benchmark"]
    first = next(iter(ways.values()))
    grpo = ", ".join(f"{key}={value}" for key, value in manifest["recipe"]["grpo"].items())
    learned, made, cold = "", manifest["stages"]["grpo"], manifest["cold"]
    if name != "tiny":
        learned = f"\n\n`tiny-cold` was taken from stage `{cold['stage']}` after {cold['update']} updates; later stages play no part in it."
    if name == "tiny-r1":
        learned += f" Then GRPO, {made['minutes']:.0f} minutes at commit `{made['commit']}` (`{grpo}`; the rest as in "
        learned += "`stkit/train/presets/tiny.yaml`)."
    thinking = f", without a thought; the row \"{WAYS['blind']}\" is with one" * ("blind" in ways)
    note = f"\n\n{manifest['note']}" if manifest.get("note") else ""
    return f"""# {name}

A Qwen2.5-VL of a few million parameters (Transformers' own classes), trained from nothing by stkit's own parts: {WHAT[name]}.
`load_model("{name}")` loads it; so does plain Transformers.

## Scores
{scores["clips"]} fresh walks of split "test" (seed {scores["seed"]}), and as many out of distribution; {first["n"]} multiple-choice
questions in distribution. Greedy decoding; chance is 25; intervals are clustered by walk. In percent:

{table(ways)}

`stkit tiny score --out DIR --clips {scores["clips"]} --seed {scores["seed"]}` gives them; choose a seed of your own. "Blind" is the same
questions without the video, by the likeliest letter{thinking}.
With frames backwards, {_turns(ways)}

## Goals
Set before the training, in percent:

{goals_table(name, scores)}

## Data
{bench["clips"]} filmed walks (seed {bench["seed"]}, preset "{bench["preset"]}") and {manifest["told"]["walks"]} walks that were told without a
film, all on maps of split "{bench["split"]}"; maps of split "dev" chose `tiny-cold`, maps of split "test" are those above. The split is a
hash of the map, so no seed can mix them (tests/test_shipped.py). Benchmark hash `{bench["hash"]}`.

## Recipe
`{manifest["command"]}` at commit `{manifest["commit"]}`, seed {manifest["seed"]}:

{recipe_table(manifest)}{learned}{note}

## Intended use
{INTENDED}

## Limits
{LIMITS}

SHA-256 of the weights: `{manifest["sha256"]}`, verified whenever they are loaded. Licence: Apache-2.0, as the kit.
"""


def _turns(ways: Mapping[str, Mapping]) -> str:
    """What the reversed frames did."""
    turns = (ways.get("reversed") or {}).get("turn_order")
    if turns is None:
        return "no route was asked."
    return (
        f"the turns of {percent(turns['mean'])} % of the routes it tells are those that the frames show that way round "
        f"({percent(turns['low'])} to {percent(turns['high'])})."
    )


def write_cards(scores: str | Path, out: str | Path = CARDS) -> list[Path]:
    """Write the cards of all models that the scores are of, and copies into the folders that ship.

    Raises:
        StkitError: weights that are not those of the scores.
    """
    found, written = read_json(scores), []
    for name in found["models"]:
        place = tiny.folder(name)
        manifest = read_json(place / "manifest.json")
        told = found["weights"].get(name)
        if told != manifest["sha256"]:
            raise StkitError(f"{scores}: scored weights {told}, but {place} holds {manifest['sha256']}: score them anew")
        text = card(name, manifest, found)
        paths = [place / "README.md"] + [Path(out) / f"{name.replace('-', '_')}.md"] * (name != "tiny-cold")
        for path in paths:
            write_text(path, text)
            written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the cards of the models that ship.")
    parser.add_argument("--scores", default=str(CARDS / "tiny_scores.json"), help="what 'stkit tiny score' wrote")
    for path in write_cards(parser.parse_args().scores):
        print(path)


if __name__ == "__main__":
    main()
