"""From the stages' weights to the three folders that ship: ``tiny``, ``tiny-cold`` and ``tiny-r1``.

``tiny`` is the end of the last stage. ``tiny-cold`` is the recipe stopped early, where it is right about half of the
time, as walks of split "dev" tell: so that there is something left to learn. ``tiny-r1`` is ``tiny-cold`` after GRPO.
"""

import shlex
import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..bench.build import build_benchmark
from ..bench.schema import load_benchmark, row_of
from ..evaluation import evaluate
from ..runs import read_json, read_yaml, write_jsonl
from ..runtime import StkitError, commit, versions
from ..train.grpo import grpo
from ..train.run import read_rows
from ..vlm import tiny
from ..vlm.load import load_model
from .scores import MAX_NEW_TOKENS
from .thoughts import chain
from .walks import SPLIT

COLD = (0.55, 0.65)  # accuracy between which tiny-cold is to lie
CHOICE = "choice.jsonl"


def choice_questions(out: Path, clips: int, seed: int, progress: bool = True) -> Path:
    """A question file with the multiple-choice questions of fresh walks of split "dev"."""
    build_benchmark(out, clips, seed, split="dev", progress=progress)
    path = out / CHOICE
    write_jsonl(path, [row_of(q) for q in load_benchmark(out).questions if not q.is_open])
    return path


def accuracy(model: Path, questions: Path, out: Path, progress: bool = True) -> dict:
    """A model's scores on a question file, by greedy decoding, without a blind run beside (it decides nothing here)."""
    asked = {"mode": "generate", "max_new_tokens": MAX_NEW_TOKENS, "blind": False}
    return evaluate(questions, model=str(model), out=out, progress=progress, **asked).scores


def pick_cold(kept: Sequence[Path], questions: Path, out: Path, progress: bool = True) -> tuple[Path, float]:
    """Of the kept weights those whose accuracy on dev lies nearest to the middle of :data:`COLD`, of the copies that are scored.

    As accuracy rises in training, the first copy that reaches :data:`COLD` is looked for by halving: a few copies are scored.

    Args:
        kept: model folders (``stage/kept/update``) in the order of training.
        questions: see :func:`choice_questions`.

    Returns:
        The folder, and its accuracy on dev.

    Raises:
        StkitError: nothing was kept.
    """
    if not kept:
        raise StkitError("no weights were kept on the way: set keep_every of a stage in the recipe")
    found: dict[Path, float] = {}

    def reaches(model: Path) -> bool:
        name = "-".join(model.parts[-3::2])  # stage and update
        found[model] = accuracy(model, questions, out / name, progress)["accuracy"]
        return found[model] >= COLD[0]

    first = bisect_left(kept, True, hi=len(kept) - 1, key=reaches)
    reaches(kept[first])
    middle = sum(COLD) / 2
    best = min(found, key=lambda model: abs(found[model] - middle))
    return best, found[best]


def reason(model: Path, walks: Path, out: Path, settings: Mapping, seed: int, progress: bool = True) -> None:
    """GRPO on the films from ``tiny-cold``. Settings may weigh the reward "chain"; ``lora.rank`` above 0 trains an adapter."""
    if any((out / name).exists() for name in ("model", "adapter")):  # however many processes made it
        return
    rewards = {"chain": chain} if "rewards.chain" in settings else None
    common = {"model": model, "preset": "tiny", "out": out, "seed": seed, "progress": progress}
    grpo(walks, overrides=dict(settings), rewards=rewards, **common)


def ship(out: Path, name: str, model: Path, facts: Mapping) -> Path:
    """Write one of the folders that ship, with its manifest."""
    loaded = load_model(model, device="cpu")
    return tiny.export(loaded.model, loaded.processor, out / name, {"name": name, **facts})


def how() -> dict:
    """The command that runs, and the commit of its code."""
    return {"command": shlex.join(["stkit", *sys.argv[1:]]), "commit": commit() or "unknown"}


def facts_of(out: Path, recipe: Mapping, seed: int, stages: Sequence[Path]) -> dict:
    """What a manifest says of how the models were made; of each stage's folder the commit, and the minutes of its updates."""
    bench = read_json(out / "walks" / "benchmark.json")
    films = {
        "name": bench["name"], "seed": bench["seed"], "clips": bench["counts"]["clips"], "split": bench["split"],
        "preset": bench["settings"]["preset"]["name"], "hash": bench["hash"],
    }  # fmt: skip
    made = {folder.name: _made(folder) for folder in stages}
    told = {"seed": seed, "walks": recipe["told"], "split": SPLIT}
    return {**how(), "seed": seed, "recipe": recipe, "benchmark": films, "told": told, "stages": made, "versions": versions()}


def _made(folder: Path) -> dict:
    """The commit at which a stage was begun, and the minutes that its updates took (None without a record of them)."""
    record = next(path for name in ("stage.yaml", "config.yaml") if (path := folder / name).exists())
    seconds = [row["seconds"] for row in read_rows(folder / "metrics.jsonl")]
    return {"commit": read_yaml(record).get("commit") or "unknown", "minutes": round(sum(seconds) / 60, 1) if seconds else None}


def told(found: Mapping) -> str:
    """What :func:`stkit.tiny.recipe.train_tiny` made, for a terminal."""
    if "models" not in found:
        return "\n".join(["stages that are done:", *(f"  {name:<10} {folder}" for name, folder in found["stages"].items())])
    lines = ["right of the multiple-choice questions on walks of split dev (chance 0.25), decoded greedily:"]
    for name, folder in found["models"].items():
        scores = found["scores"][name]
        tasks = ", ".join(f"{kind} {part['accuracy']:.2f}" for kind, part in scores["by_task"].items())
        lines.append(
            f"  {name:<10} {scores['accuracy']:.3f} ({scores['low']:.3f} to {scores['high']:.3f}; {tasks}) in {folder}"
        )
    return "\n".join([*lines, "scores on fresh walks, with blind ones beside: stkit tiny score --out DIR FOLDER..."])
