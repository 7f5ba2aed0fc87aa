"""One chunk of clips in a process of its own: plans walked, videos and truth written, then a manifest.

The engine is deterministic only from its start on, and sometimes dies with signal 11 when it is closed after many maps:
so a chunk has a fresh engine, and all its files are on disk before the engine is closed. :mod:`stkit.bench.crew` starts
``python -m stkit.bench.chunk`` with a job like this on stdin::

    {"out": "/data/walks", "chunk": 0, "first": 0, "last": 10, "seed": 0, "split": null,
     "preset": "tiny", "ood": false, "knobs": {}}
"""

import _thread
import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av

from ..runs import explain, to_json, write_json, write_text
from ..runtime import StkitError, child_seed
from .camera import schedule
from .crew import GRACE_S, manifest_path, scratch
from .film import decoded_hash, encode
from .plans import Plan, make_plan, plan_row
from .presets import TICKS_PER_SECOND, Preset, preset
from .schema import FORMAT_VERSION, Clip, row_of
from .wad import textmap, wad
from .world import Walk, engine, scene, walk

SPARE_WALKS = 4  # plans tried in place of a blocked one before a chunk gives up


def clip_plan(seed: int, index: int, made: Preset, split: str | None, attempt: int) -> Plan:
    """The plan of a clip, or the one that takes its place when ``attempt`` walks before it were blocked."""
    return make_plan(child_seed(seed, "spare", attempt) if attempt else seed, index, made, split)


def clip_id(seed: int, index: int, ood: bool) -> str:
    """The name of a clip, its own across seeds and distributions."""
    return f"{'ood' if ood else 'walk'}-{seed}-{index:05d}"


def render_chunk(job: dict, folder: Path, say: Callable[[str], None] = lambda name: None) -> dict:
    """Render the clips ``first`` to ``last`` (exclusive) of a job; write the manifest, whole, when all are on disk.

    Args:
        job: see the module's example.
        folder: where the engine keeps its files.
        say: gets the id of each clip when its files are on disk.

    Returns:
        The manifest: chunk, clips (rows, by index), attempts (how many walks of each clip were blocked before its own),
        rejected (those walks).

    Raises:
        StkitError: a clip's walk was blocked time and again.
    """
    made, out = preset(job["preset"], job["ood"], **job["knobs"]), Path(job["out"])
    waiting, rows, rejected = [*range(job["first"], job["last"])], {}, []
    for attempt in range(SPARE_WALKS + 1):
        plans = [
            (clip_id(job["seed"], i, job["ood"]), clip_plan(job["seed"], i, made, job["split"], attempt))
            for i in waiting
        ]
        maps = wad([textmap(scene(plan)) for _, plan in plans])
        with engine(maps, made, folder, child_seed(job["seed"], "engine", job["chunk"], attempt)) as game:
            for number, (name, plan) in enumerate(plans):
                walked = walk(game, number, plan, made)
                if walked.blocked:
                    rejected.append({"clip_id": name, "attempt": attempt, "off_units": round(walked.off_units, 1)})
                    continue
                rows[plan.index] = _hand_over(out, name, plan, walked, made), attempt
                say(name)
            waiting = [index for index in waiting if index not in rows]
            if not waiting:
                clips, attempts = zip(*(rows[index] for index in sorted(rows)), strict=True)
                manifest = {"chunk": job["chunk"], "clips": clips, "attempts": attempts, "rejected": rejected}
                write_json(manifest_path(out, job["chunk"]), manifest)
                return manifest
    raise StkitError(
        f"{rejected[-1]['clip_id']}: {SPARE_WALKS + 1} walks in a row were blocked: its maps are not as planned"
    )


def _hand_over(out: Path, name: str, plan: Plan, walked: Walk, made: Preset) -> dict:
    """Write one clip's video and truth, each whole or not at all; its row."""
    data = encode(walked.frames, Fraction(TICKS_PER_SECOND, made.ticks_per_frame))
    frames_sha256, count = decoded_hash(data)
    if count != len(walked.frames):
        raise StkitError(
            f"{name}: {len(walked.frames)} frames went into the video, {count} came out: PyAV is broken here"
        )
    clip = Clip(
        id=name,
        video=f"{name}.mp4",
        group=plan.group,
        split=plan.split(),
        frames=count,
        fps=made.fps,
        width=made.width,
        height=made.height,
        duration_s=count / made.fps,
        map_hash=plan.map_hash(),
        frames_sha256=frames_sha256,
        ood=made.ood,
        truth=f"truth/{name}.json",
        settings={"light": plan.light, "dressing": plan.dressing},
    )
    write_text(out / "videos" / clip.video, data)
    write_text(out / clip.truth, to_json(truth(name, plan, walked, made)) + "\n")
    return row_of(clip)


def truth(name: str, plan: Plan, walked: Walk, made: Preset) -> dict:
    """The time line of a clip: for everything known a column with a value for each tick, and the frames' ticks.

    ``steps`` is the route; ``step`` says which of them is under way (-1: none) and ``event`` what it is, ``landmark``
    the kind in view, ``cell`` where along the walk. Poses are measured: units, degrees (0 east, 90 north), pitch
    positive upwards.
    """
    ticks, names = schedule(plan, made), ("x", "y", "angle_deg", "pitch_deg")
    columns = {
        n: [round(v, 3) for v in column] for n, column in zip(names, zip(*walked.poses, strict=True), strict=True)
    }
    columns |= {n: [getattr(tick, n) for tick in ticks] for n in ("event", "step", "landmark", "cell")}
    return {
        "format_version": FORMAT_VERSION,
        "clip_id": name,
        "ticks_per_second": TICKS_PER_SECOND,
        "frame_ticks": [*range(0, len(ticks), made.ticks_per_frame)],
        "steps": [{"kind": s.kind, "value": s.value, "side": s.side} for s in plan.route().steps],
        "plan": plan_row(plan),
        "off_units": round(walked.off_units, 3),
        "off_degrees": round(walked.off_degrees, 3),
        "ticks": columns,
    }


def _end_with_parent() -> None:
    """Wait for the parent's end (it holds our stdin open); then end too, engine and all."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    _thread.interrupt_main()
    time.sleep(GRACE_S / 2)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """The job is one line on stdin; stdout gets a line of JSON for each clip and for an error."""
    channel = os.dup(1)  # ours alone: the engine would keep stdout open when it outlives us
    os.dup2(2, 1)

    def say(**line) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(channel, json.dumps(line).encode() + b"\n")

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it: see _end_with_parent
    job = json.loads(sys.stdin.buffer.raw.readline())
    folder = scratch(Path(job["out"]), job["chunk"], os.getpid())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        folder.mkdir(parents=True)
        os.chdir(folder)  # the engine leaves files where it is started
        render_chunk(job, folder, lambda name: say(clip=name))
    except StkitError as error:
        say(error=str(error))
        return 1
    except (OSError, av.FFmpegError) as error:
        say(error=explain(error))
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
