"""From nothing to a small model that sees and reasons: stages of training, each of which the next one rests on.

    made = train_tiny("runs/tiny", recipe="full", seed=0)
    made["models"]["tiny"], made["stages"]["see"]

A stage is lessons on walks (see :mod:`stkit.tiny.lessons`), with the kit's own tree, loop and checkpoints: first on told
walks, without a video, then on films. Then GRPO. A run that was stopped goes on where it was.
"""

import math
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig

from ..bench.build import build_benchmark
from ..bench.presets import PRESETS
from ..runs import claim, explain, replace_folder
from ..runtime import BadUse, StkitError, generator, versions
from ..train.forest import Line, Plant, plant
from ..train.loop import Loop
from ..train.merge import merge
from ..train.policy import Policy, make_policy
from ..train.processes import Processes
from ..train.reading import load_settings
from ..vlm import tiny
from ..vlm.load import load_model
from ..vlm.logps import tree_logps
from ..vlm.processes import Team, join_team
from ..vlm.prompts import encode_answer
from ..vlm.video import VideoInputs
from ..vlm.vision import encode_videos
from .glance import glance_loss, glance_on, word_tokens
from .lessons import SEEN, Reader, glanced, lesson
from .ship import CHOICE, accuracy, choice_questions, facts_of, how, pick_cold, reason, ship
from .stages import Recipe, Stage, load_recipe
from .walks import SPLIT, Films, Walk, planned_walks

MADE_FOR = PRESETS["tiny"]
MAX_TOKENS = 8_192  # computed at once; with more of them a CPU's caches hold less, and an update takes longer


def train_tiny(
    out: str | Path, recipe: str | Path = "full", seed: int = 0, until: str | None = None, progress: bool = True
) -> dict:
    """Make the tiny model from nothing; run again in the same folder, it goes on where it was.

    Args:
        out: folder of films, stages and the model.
        recipe: see :func:`stkit.tiny.stages.load_recipe`.
        seed: of the first weights, the walks and the order of lessons.
        until: the last stage to run, or "grpo" for all of the training, which several processes may share; None for the
            folders that ship and their scores, too.

    Returns:
        stages (name -> folder); without ``until`` models (name -> folder of each that ships), cold_accuracy on dev and
        scores (the same of each model).

    Raises:
        BadUse: an unknown recipe or stage. StkitError: another recipe's folder, a full disk, no memory.
    """
    out, plan = Path(out), load_recipe(recipe)
    names = [*(stage.name for stage in plan.stages), "grpo"]
    if until is not None and until not in names:
        raise BadUse(f"until={until!r}: no such stage, use {', '.join(names)}")
    team = join_team()
    if team.count > 1 and until is None:
        raise BadUse(f"{team.count} processes share the training only: give until={names[-1]!r}, then run the rest in one")
    try:
        told = {"recipe": asdict(plan), "seed": seed}
        team.first(lambda: claim(out, told, name="recipe.yaml", beside=how() | {"versions": versions()}))
        model = out / "start"
        team.first(lambda: _first_weights(model, seed))
        made, films = {}, None
        for stage in plan.stages[: names.index(until) + 1 if until else None]:
            if stage.lesson in SEEN and films is None:
                team.first(lambda: build_benchmark(out / "walks", plan.films, seed, split=SPLIT, progress=progress))
                team.first(lambda: _films(out, plan, model, progress))
                films = _films(out, plan, model, False)
            made[stage.name] = out / stage.name
            model = run_stage(stage, made[stage.name], model, films, plan.told, seed, progress)
        if until not in (None, "grpo"):
            return {"stages": made}
        reasoned = _reasoned(out, plan, seed, made, team, progress)
        if until:
            return {"stages": made | {"grpo": out / "grpo"}}
        return {"stages": made} | _three(out, plan, seed, made, reasoned, progress)
    except OSError as error:
        raise StkitError(explain(error)) from error


def _reasoned(out: Path, plan: Recipe, seed: int, made: dict[str, Path], team: Team, progress: bool) -> dict:
    """GRPO from the copy that is to be tiny-cold: questions of split "dev", and cold (its folder and accuracy on them)."""
    kept = [copy for folder in made.values() for copy in sorted((folder / "kept").glob("*"))]
    team.first(lambda: choice_questions(out / "dev", plan.dev, seed, progress))
    questions = out / "dev" / CHOICE
    cold = pick_cold(kept, questions, out / "dev-scores", progress)
    reason(cold[0], out / "walks", out / "grpo", plan.grpo, seed, progress)
    return {"questions": questions, "cold": cold}


def _three(out: Path, plan: Recipe, seed: int, made: dict[str, Path], reasoned: Mapping, progress: bool) -> dict:
    """The three models that ship, from the stages; each with its accuracy on walks of split "dev"."""
    cold, cold_accuracy = reasoned["cold"]
    facts = facts_of(out, asdict(plan), seed, [*made.values(), out / "grpo"])
    facts |= {"cold": {"stage": cold.parent.parent.name, "update": int(cold.name)}}
    merged = Path(merge(out / "grpo", out / "grpo-merged")["out"])  # without an adapter: a copy
    sources = {"tiny": made[plan.stages[-1].name] / "model", "tiny-cold": cold, "tiny-r1": merged}
    models = {name: ship(out, name, source, facts) for name, source in sources.items()}
    dev, questions = out / "dev-scores", reasoned["questions"]
    scores = {name: accuracy(folder, questions, dev / name, progress) for name, folder in models.items()}
    return {"models": models, "cold_accuracy": cold_accuracy, "scores": scores}


def _first_weights(folder: Path, seed: int) -> None:
    """A model folder with weights drawn from the seed."""
    if not (folder / "model.safetensors").exists():
        tiny.write_folder(folder)
        tiny.seeded_model(Qwen2_5_VLConfig.from_pretrained(folder), seed).save_pretrained(folder)


def _films(out: Path, plan: Recipe, model: Path, progress: bool) -> Films:
    """The filmed walks, decoded once."""
    return Films(out / "walks", out / "films", load_model(model, device="cpu").processor, plan.shifts, progress)


def run_stage(
    stage: Stage, out: Path, model: Path, films: Films | None, told: int, seed: int, progress: bool = True
) -> Path:
    """One stage, from a model's folder to another's."""
    result = out / "model"
    if result.exists():
        return result
    settings = load_settings("tiny", "sft", {
        "train.steps": stage.steps, "train.lr": stage.lr, "train.warmup": stage.warmup, "train.seed": seed,
        "train.weight_decay": stage.weight_decay, "train.save_every": 25, "train.max_tokens": MAX_TOKENS,
        "train.precision": precision(stage),
    })  # fmt: skip
    processes = Processes(settings, out)
    if processes.first:
        told_once = {"stage": asdict(stage), "seed": seed, "precision": settings.train.precision}
        claim(out, told_once, name="stage.yaml", beside=how())
        print(f"stage {stage.name}: precision {settings.train.precision}", file=sys.stderr)
    processes.wait()
    policy = make_policy(model, settings, reference=False, device=processes.device)
    loop = Loop(out, policy, settings, stage.steps, processes, progress)
    loop.bar.set_description(stage.name)
    loop.resume()
    walks = planned_walks(told, seed) if stage.told or stage.lesson not in SEEN else []
    lessons = Lessons(stage, films, walks, seed, policy, processes.share)
    words = word_tokens(policy.loaded.processor.tokenizer)
    loss = partial(glance_on if stage.lesson == "glance" else partial(loss_on, glance=stage.glance), words=words)
    with loop.guarded():
        while loop.step < stage.steps:
            update(loop, policy, lessons.of(loop.step), loss)
            if stage.keep_every and loop.step % stage.keep_every == 0 and processes.first:
                replace_folder(out / "kept" / f"{loop.step:05d}", policy.save)
            loop.save_if_due(loop.step)
        loop.finish()
    return result


def precision(stage: Stage) -> str:
    """bf16 for lessons with a video on a CPU that multiplies in it (elsewhere it is slower), else float32; a GPU's own."""
    if torch.cuda.is_available():
        return "auto"
    return "bf16" if stage.lesson in SEEN and torch.cpu._is_avx512_bf16_supported() else "no"


class Told(typing.NamedTuple):
    """Lines on one walk, with its film (None: it is told), how much each line's loss counts, and the tokens of the words
    that a glance at the film reads."""

    lines: list[Line]
    video: VideoInputs | None
    share: float
    words: tuple[int, ...] = ()


class Lessons:
    """What a stage's updates learn: a function of the seed and the update's number alone."""

    def __init__(
        self, stage: Stage, films: Films | None, told: Sequence[Walk], seed: int, policy: Policy,
        share: Callable[[Sequence], Sequence] = list,
    ):  # fmt: skip
        self.stage, self.films, self.told, self.seed, self.share = stage, films, told, seed, share
        self.reader = Reader(policy.loaded.processor, policy.loaded.record["family"])

    def of(self, step: int) -> list[Told]:
        """The lessons of one update; of several processes this one's share."""
        stage, seen = self.stage, self.stage.lesson in SEEN
        walks = self.films.walks if seen else self.told
        found = [self._on(walks, stage.lesson, stage.tasks, place, stage.per_walk, 1 / (stage.walks * stage.per_walk))
                 for place in self.share(range(step * stage.walks, (step + 1) * stage.walks))]  # fmt: skip
        found += [self._on(self.told, "read", stage.told_tasks or stage.tasks, place, 1, stage.told_share / stage.told)
                  for place in self.share(range(step * stage.told, (step + 1) * stage.told))]  # fmt: skip
        return found

    def _on(self, walks: Sequence[Walk], kind: str, tasks: Sequence[str], place: int, count: int, share: float) -> Told:
        epoch, index = divmod(place, len(walks))
        rng = generator(self.seed, self.stage.name, kind, place)
        walk = walks[_order(len(walks), self.seed, self.stage.name, kind, epoch)[index]]
        if kind in SEEN:
            walk = self.films.shifted(walk, rng)
        if rng.random() < 0.5:
            walk = walk.mirrored()
        if (kind in SEEN or self.stage.backwards) and rng.random() < self.stage.backwards:
            walk = walk.run_backwards()
        asked = [q for q in walk.questions(MADE_FOR, rng.getrandbits(62)) if q.task in tasks]
        video = self.films.video(walk) if kind in SEEN else None
        chosen = rng.sample(asked, min(count, len(asked)))
        words = encode_answer(self.reader.processor.tokenizer, glanced(walk))[:-1] if kind in SEEN else ()
        return Told(lesson(chosen, walk, kind, self.reader, video), video, share, words)


@lru_cache(maxsize=8)
def _order(count: int, *seeds: object) -> list[int]:
    """The walks of an epoch, shuffled."""
    order = list(range(count))
    generator(*seeds, "order").shuffle(order)
    return order


def update(loop: Loop, policy: Policy, told: Sequence[Told], loss: Callable) -> None:
    """One step of the optimiser on all lessons of an update: each line's mean loss, weighted by its share."""
    sums = loop.learn(lambda size: plants_of(told, size), lambda forest: loss(policy.model, forest, told))
    loop.log({
        "loss": sums["loss"], "exact": sums["exact"] / sums["lines"], "words": sums["words"] / sums["learned_tokens"],
        "lr": sums["lr"], "grad_norm": sums["grad_norm"], "tokens": int(sums["tokens"]), "lines": int(sums["lines"]),
        "learned_tokens": int(sums["learned_tokens"]),
    })  # fmt: skip


def plants_of(told: Sequence[Told], max_tokens: int) -> list[Plant]:
    """A tree for each film with all lines on it, and one for each line that is told."""
    found = []
    for k, one in enumerate(told):
        lines = [_scaled(line, one.share) for line in one.lines]
        found += plant(k, lines, max_tokens) if one.video else [p for x in lines for p in plant(k, [x], max_tokens)]
    return found


def loss_on(
    model, forest: Sequence[Plant], told: Sequence[Told], glance: float = 0.0, words: Sequence[Sequence[int]] = ()
) -> tuple[torch.Tensor, dict]:
    """The loss of some trees, a scalar, and numbers that add up: lines, of which exact (every learned token has a
    probability over one half), learned_tokens, of which words (it has). glance: how much a glance at the films counts
    beside; words: see :func:`stkit.tiny.glance.word_tokens`."""
    videos = [told[one.clip].video for one in forest]
    seen = iter(encode_videos(model, [v for v in videos if v is not None]) if any(videos) else ())
    features = [None if v is None else next(seen) for v in videos]
    found = tree_logps(model, [one.tree for one in forest], videos, features, tokens="weighted")
    weight = found.packed.weight.to(found.log_probs.device)
    right = (found.log_probs.detach() > math.log(0.5)) | (weight == 0)
    leaves = [p for node, p in zip(found.packed.nodes, found.packed.slices) if any(node.weight)]
    numbers = {
        "lines": len(leaves), "exact": sum(bool(right[piece].all()) for piece in leaves),
        "learned_tokens": int((weight != 0).sum()), "words": int((right & (weight != 0)).sum()),
    }  # fmt: skip
    loss = -(found.log_probs * weight).sum()
    if glance and any(videos):
        films = [(one, part.pooler_output[0]) for one, part in zip(forest, features) if part is not None]
        shares = [glance * told[one.clip].share * len(one.leaves) for one, _ in films]
        wanted, table = [told[one.clip].words for one, _ in films], model.get_input_embeddings().weight
        loss = loss + glance_loss(table, [part for _, part in films], wanted, shares, words)[0]
    return loss, numbers


def _scaled(line: Line, share: float) -> Line:
    """A line whose learned tokens weigh ``share`` together."""
    total = sum(line.weight)
    return line._replace(weight=tuple(w * share / total for w in line.weight))
