"""What SFT and GRPO do before the first update: settings, data, model and folder, everything checked before it costs.

job = begin("sft", "runs/walks", "tiny", "tiny", out="runs/sft", overrides={"train.steps": 10})
job.course, job.watcher, job.policy, job.loop, job.cursor
"""

import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..bench.schema import Benchmark, load_benchmark
from ..runs import append_jsonl, explain, refuse_other
from ..runtime import BadUse, StkitError
from ..vlm import tiny
from ..vlm.load import Loaded, find, result_of_run
from ..vlm.sight import choose_pixels, claim_run, fingerprint
from ..vlm.vision import encode_video
from .anatomy import published
from .data import Course, Item, Seen, Watcher, load_pairs
from .loop import Loop
from .plan import Plan, check_plan, plan, said
from .policy import Policy, make_policy
from .processes import Processes
from .reading import load_settings
from .run import CONFIG
from .scoring import Scorer
from .settings import Settings


@dataclass
class Job:
    """A run that is ready for its next update. ``cursor``: the place in the course; ``scorer``: None without scores."""

    out: Path
    benchmark: Benchmark
    settings: Settings
    course: Course
    watcher: Watcher
    policy: Policy
    loop: Loop
    processes: Processes
    scorer: Scorer | None
    cursor: int

    @property
    def clips(self) -> int:
        """Clips of an update."""
        return self.settings.train.batch * self.settings.train.accumulation

    def items(self, cursor: int, count: int) -> list[Item]:
        """This process's share of the next ``count`` clips."""
        return list(self.processes.share([self.course[place] for place in range(cursor, cursor + count)]))

    def features(self, seen: Seen):
        """The video's features where they stay the same while training; None where the tower learns."""
        return None if self.policy.tower else encode_video(self.policy.model, seen.inputs)

    def score_if_due(self) -> None:
        """Scores where they are due."""
        every = self.settings.train.eval_every
        if self.scorer is None or not (self.loop.step % every == 0 or self.loop.step >= self.loop.steps):
            return
        self.loop.bar.set_description(f"scoring {len(self.scorer.questions)} questions")
        found = self.scorer.score(self.policy, self.processes)
        self.loop.bar.set_description("")
        found = {"step": self.loop.step, **found, "best": self.loop.keep_best(found["accuracy"])}
        if self.processes.first:
            append_jsonl(self.out / "scores.jsonl", found)


def with_named(overrides: Mapping | None, steps: int | None, seed: int | None, eval_every: int | None) -> dict:
    """Overrides with the settings that have an argument of their own, where one was given."""
    named = {"train.steps": steps, "train.seed": seed, "train.eval_every": eval_every}
    return dict(overrides or {}) | {k: v for k, v in named.items() if v is not None}


def begin(
    stage: str, bench: str | Path, model: str | Path | Loaded, preset: str | Path, out: str | Path | None,
    overrides: Mapping[str, object], progress: bool = True, beside: Mapping | None = None,
) -> Job:  # fmt: skip
    """Get a run ready: a new one, or the one that is in the folder.

    Args:
        overrides: by dotted key.
        beside: facts of the caller's that must be equal on resumption (a reward function's source).
    """
    benchmark, overrides = _benchmark(bench, dict(overrides))
    settings = load_settings(preset, stage, overrides)
    course = Course(benchmark, settings)
    out = Path(out if out is not None else tempfile.mkdtemp(prefix=f"stkit-{stage}-"))
    told = {"settings": settings.to_dict(), "bench": str(Path(bench).resolve())} | dict(beside or {})
    for part in ({"stage": stage}, told):  # before a model is loaded
        refuse_other(out, part, name=CONFIG, given_only=True)
    processes = Processes(settings, out, told["settings"])
    if processes.count > settings.train.batch * settings.train.accumulation:
        raise BadUse(
            f"{processes.count} processes share {settings.train.batch * settings.train.accumulation} clips of an update: raise "
            f"train.batch to {processes.count} or more"
        )
    needs = _needs(model, settings, stage, processes)
    policy = make_policy(model, settings, reference=stage == "grpo" and settings.grpo.beta > 0, device=processes.device,
                         shards=processes.count if processes.sharded else 1)  # fmt: skip
    watcher = Watcher(benchmark, settings.video, policy.loaded.processor)
    scorer = None
    if settings.train.eval_every:
        mode = "letter" if stage == "sft" and settings.sft.form == "answer" else "generate"
        scorer = Scorer(benchmark, settings, watcher, mode)
    loop = _loop(out, stage, settings, course, policy, processes, progress)
    record = policy.loaded.record
    told |= {"shown": watcher.chosen, "processes": processes.count}
    files = fingerprint(benchmark, [*course.questions, *(scorer.questions if scorer else ())])
    why = record.get("why", {}) | {"precision": f"{loop.precision}: {loop.why}"}
    try:
        if processes.first:
            facts = {"why": why, "threads": torch.get_num_threads(), "plan": needs.to_json(), "steps": loop.steps}
            claim_run(out, {"stage": stage, **told}, record, files, facts, name=CONFIG)
            _say(policy, loop)
        processes.wait()
        cursor = loop.resume()
    except OSError as error:
        raise StkitError(explain(error)) from error
    return Job(out, benchmark, settings, course, watcher, policy, loop, processes, scorer, cursor)


def _benchmark(bench: str | Path, overrides: dict) -> tuple[Benchmark, dict]:
    """The benchmark, or a user's file of prompts and completions, which are taken as they stand."""
    path = Path(bench)
    pairs = load_pairs(path) if path.is_file() and path.suffix == ".jsonl" else None
    if pairs is None:
        return load_benchmark(bench), overrides
    return pairs, {"data.prompt": "plain", "sft.form": "solution"} | overrides


def _needs(model: str | Path | Loaded, settings: Settings, stage: str, processes: Processes) -> Plan:
    """What the run will need of memory, said and refused where it cannot fit, before anything is loaded."""
    if isinstance(model, (str, Path)):
        model = result_of_run(str(model), settings.model.adapter)[0]
        known = tiny.is_own(model) or published(model)
        found = plan(model if known else find(model).folder, settings, stage)
    else:
        pixels = choose_pixels(model[1].video_processor.size, settings.video.max_pixels)["max_pixels"]
        found = plan(model[0].config, replace(settings, video=replace(settings.video, max_pixels=pixels)), stage)
    if processes.sharded:  # not planned for: how much is whole at a time depends on the phase
        print(f"memory: {processes.count} processes share what one would need {said(found.peak)} for", file=sys.stderr)
        return found
    if found.peak > found.limit:  # whether a prompt fits into max_tokens is known when it is read
        check_plan(found)
    print(
        f"memory: about {said(found.peak)} of {said(found.limit)} at the peak, {found.phase} ({found.assumed()})",
        file=sys.stderr,
    )
    return found


def _loop(out, stage, settings: Settings, course: Course, policy, processes, progress) -> Loop:
    train = settings.train
    steps = train.steps or math.ceil(train.epochs * len(course) / (train.batch * train.accumulation))
    if train.steps is None and stage == "grpo":
        steps *= settings.grpo.updates
    return Loop(out, policy, settings, steps, processes, progress)


def _say(policy: Policy, loop: Loop) -> None:
    """What is trained, and by which path, once."""
    count, record = sum(p.numel() for p in loop.parameters), policy.loaded.record
    what = "LoRA" if policy.lora else "all weights"
    print(
        f"training {count / 1e6:.2f} M parameters ({what}) for {loop.steps} steps; precision {loop.precision} ({loop.why}); "
        f"{record['tree_attention']} attention on trees; {loop.settings.train.optimizer}",
        file=sys.stderr,
    )
