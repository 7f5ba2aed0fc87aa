"""A benchmark from nothing: clips rendered in parallel, questions asked about all of them, one folder.

Clips go to processes in fixed chunks by index, each with an engine of its own, so that neither the number of workers
nor a stop on the way changes a frame or a question; a build that was killed makes its unfinished chunks anew::

    made = build_benchmark("runs/walks", clips=40, seed=0)
    made["questions"], made["by_task"]
"""

import os
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from ..runs import claim, explain, write_json, write_jsonl
from ..runtime import BadUse, StkitError, versions
from .chunk import clip_plan
from .crew import Crew
from .plans import make_plan
from .presets import Preset
from .presets import preset as preset_of
from .questions import make_questions
from .schema import FORMAT_VERSION, SPLITS, benchmark_hash, row_of
from .world import screen_resolution

CHUNK = 10  # clips an engine; fixed, since what an engine has shown before a clip can change its frames
FIRST = 20  # walks that are planned before any is filmed: whether they have room, and questions
MANY_CLIPS = 20_000  # more than this needs a yes
SECONDS_A_FRAME, BYTES_A_PIXEL = 0.005, 0.12  # of one core at 160x120 and of the disk, measured on the tiny preset


def build_benchmark(
    out: str | Path,
    clips: int = 40,
    seed: int = 0,
    preset: str = "tiny",
    ood: bool = False,
    split: str | None = None,
    workers: int | None = None,
    yes: bool = False,
    progress: bool = True,
    **knobs,
) -> dict:
    """Build a benchmark folder, or go on with one that was interrupted.

    Args:
        out: the folder. One made with other settings is refused.
        clips: how many.
        seed: of everything that is drawn.
        preset: "tiny" or "default".
        ood: out of distribution: unseen textures, longer routes, darker.
        split: only clips whose map belongs to "train", "dev" or "test"; None takes them as they fall.
        workers: processes at a time; None takes one for each core. Changes nothing in the outcome.
        yes: go ahead with more than 20,000 clips.
        progress: a bar on stderr.
        knobs: turns, landmarks, actions, light (pairs), resolution, textures: see :func:`stkit.bench.presets.preset`.

    Returns:
        out, clips, questions, by_task, by_split, dropped (by reason), rejected_walks, hash, resumed_chunks,
        engine_deaths, seconds.

    Raises:
        BadUse: a count, a knob or a split that makes no sense; too many clips without ``yes``.
        StkitError: other settings in the folder, a full disk, a read-only folder, an engine that dies twice.
    """
    begin, out = time.monotonic(), Path(out)
    workers = (os.cpu_count() or 1) if workers is None else workers
    made = _check(clips, seed, preset, ood, split, workers, knobs)
    if clips > MANY_CLIPS and not yes:
        raise BadUse(f"clips={clips}: {estimate(clips, made, workers)}; say --yes (yes=True) if you mean it")
    settings = {"clips": clips, "seed": seed, "split": split, "preset": asdict(made)}
    renderer = {name: versions()[name] for name in ("stkit", "vizdoom", "av")}
    jobs = [
        {"out": str(out.absolute()), "chunk": k, "first": first, "last": min(first + CHUNK, clips), "seed": seed,
         "split": split, "preset": preset, "ood": ood, "knobs": knobs}
        for k, first in enumerate(range(0, clips, CHUNK))
    ]  # fmt: skip
    try:
        claim(out, settings | {"renderer": renderer})
        with tqdm(total=clips, unit="clip", disable=not progress) as bar:
            crew = Crew(out.absolute(), bar)
            crew.render_all(jobs, workers)
        done = _write(out, [crew.manifests[job["chunk"]] for job in jobs], made, settings)
    except OSError as error:
        raise StkitError(explain(error)) from error
    done |= {"resumed_chunks": crew.resumed, "engine_deaths": crew.engine_deaths}
    return {"out": str(out)} | done | {"seconds": round(time.monotonic() - begin, 1)}


def _check(clips, seed, preset, ood, split, workers, knobs) -> Preset:
    """Refuse what makes no sense before anything is written; the preset with its knobs turned."""
    for name, value, least in (("clips", clips, 1), ("seed", seed, 0), ("workers", workers, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BadUse(f"{name}={value!r}: give a whole number of at least {least}")
    if split not in (None, *SPLITS):
        raise BadUse(f"split {split!r} is unknown: use {', '.join(SPLITS)}")
    made = preset_of(preset, ood, **knobs)
    screen_resolution(made.width, made.height)
    first = [(str(index), make_plan(seed, index, made, split)) for index in range(min(clips, FIRST))]
    asked, dropped = make_questions(first, made, seed)
    if not asked:
        reasons = ", ".join({reason.split(": ")[1]: 0 for reason in dropped})
        raise BadUse(f"nothing can be asked about such walks ({reasons}): ask for fewer turns, landmarks or actions")
    return made


def estimate(clips: int, made: Preset, workers: int = 1) -> str:
    """What so many clips would cost, in words: hours on so many workers, and gigabytes."""
    frames = clips * (made.n_frames - 1) * made.event_ticks / 2 / made.ticks_per_frame
    pixels = frames * made.width * made.height
    hours = pixels / (160 * 120) * SECONDS_A_FRAME / workers / 3600
    hands, size = f"{workers} worker{'s' * (workers != 1)}", pixels * BYTES_A_PIXEL / 1e9
    return f"about {hours:,.1f} hours on {hands} and {size:,.0f} GB of disk"


def _write(out: Path, manifests: list[dict], made: Preset, settings: dict) -> dict:
    """Ask about all clips and write what makes the folder a benchmark; the counts."""
    rows = [row for manifest in manifests for row in manifest["clips"]]
    attempts = [attempt for manifest in manifests for attempt in manifest["attempts"]]
    seed, split = settings["seed"], settings["split"]
    plans = [clip_plan(seed, index, made, split, attempt) for index, attempt in enumerate(attempts)]
    questions, dropped = make_questions([(row["id"], plan) for row, plan in zip(rows, plans, strict=True)], made, seed)
    write_jsonl(out / "clips.jsonl", rows)
    write_jsonl(out / "questions.jsonl", [row_of(question) for question in questions])
    counts = {
        "clips": len(rows),
        "questions": len(questions),
        "by_task": dict(sorted(Counter(question.kind for question in questions).items())),
        "by_split": dict(sorted(Counter(row["split"] for row in rows).items())),
        "dropped": dropped,
        "rejected_walks": sum(len(manifest["rejected"]) for manifest in manifests),
    }
    whole = {"hash": benchmark_hash(out)}
    name = f"doom-walks-{made.name}{'-ood' if made.ood else ''}"
    head = {"format_version": FORMAT_VERSION, "name": name, "seed": seed, "split": split, "ood": made.ood}
    watched = {"sampling": made.sampling, "n_frames": made.n_frames}
    made_with = {"counts": counts, "settings": settings, "versions": versions()}
    write_json(out / "benchmark.json", head | watched | whole | made_with)
    return counts | whole
