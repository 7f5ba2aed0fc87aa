"""What evaluation and training decide the same way: what of a video is shown, and whether a run's folder is theirs.

sampling = choose_sampling(benchmark.info, sampling=None, frames=8, fps=None)
pixels = choose_pixels(loaded.processor.video_processor.size, max_pixels=None)
files = fingerprint(benchmark, questions)
claim_run(out, {"settings": settings}, loaded.record, files, beside={})
"""

import hashlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..bench.schema import Benchmark, Question, row_of
from ..runs import claim, read_json, to_json, write_json
from ..runtime import BadUse, StkitError, commit, versions
from ..sampling import sample_indices
from .cache import content_hash
from .endpoint import redacted
from .video import PUBLISHED_MAX_PIXELS


def choose_sampling(info: Mapping, sampling: str | None, frames: int | None, fps: float | None) -> dict:
    """Which frames are looked at: what was asked for, else what the benchmark was made for, else 32 uniform ones.

    Args:
        info: benchmark.json.
        sampling, frames, fps: as in :func:`stkit.sampling.sample_indices`, None where nothing was asked for.

    Returns:
        ``{"sampling", "frames", "fps"}``.
    """
    chosen = sampling or info.get("sampling") or "uniform"
    for name, given, fits in (("frames", frames, "uniform"), ("fps", fps, "fps")):
        if given is not None and chosen != fits:
            raise BadUse(
                f"{name}={given} has no meaning with sampling {chosen!r}: leave it out or use sampling {fits!r}"
            )
    if chosen == "uniform" and frames is None:
        frames = 32 if sampling else info.get("n_frames") or 32
    if chosen == "fps" and fps is None:
        fps = 1.0
    sample_indices(1, 1.0, chosen, n=2 if frames is None else frames, fps=1.0 if fps is None else fps)
    return {"sampling": chosen, "frames": frames, "fps": fps}


def choose_pixels(size: Mapping[str, int], max_pixels: int | None) -> dict:
    """Bounds on a frame's pixels: the published ones, or the processor's own where it takes less.

    Args:
        size: "shortest_edge" and "longest_edge" of the video processor, in pixels of a frame.

    Returns:
        ``{"min_pixels", "max_pixels"}``.
    """
    if max_pixels is None:
        max_pixels = min(PUBLISHED_MAX_PIXELS, size["longest_edge"])
    return {"min_pixels": min(size["shortest_edge"], max_pixels), "max_pixels": max_pixels}


def fingerprint(benchmark: Benchmark, questions: Sequence[Question], with_videos: bool = True) -> dict:
    """SHA-256 of every question and every video file of a run ("" where there is none), by kind and name."""
    videos = {}
    for name in sorted({q.video for q in questions} if with_videos else ()):
        try:
            videos[name] = content_hash(benchmark.video_path(name))
        except StkitError:  # what is wrong with it is said where it is read
            videos[name] = ""
    rows = {q.id: hashlib.sha256(to_json(row_of(q)).encode()).hexdigest() for q in questions}
    return {"questions": rows, "videos": videos}


def claim_run(
    out: Path, chosen: Mapping, record: Mapping, files: Mapping, beside: Mapping, name: str = "config.json"
) -> bool:
    """Claim a run's folder, and refuse files that changed since it was started, by name.

    Args:
        chosen: what decides the run, with its "settings". record: of the model. Other ones are refused.
        files: SHA-256 of every question and video, by kind, see :func:`fingerprint`.
        beside: written down, not compared.
        name: the file that holds all of it.

    Returns:
        Whether an earlier start is there.
    """
    recorded = out / "files.json"
    if recorded.exists() and (names := _changed(read_json(recorded), files)):
        bench = chosen.get("bench") or chosen["settings"]["bench"]
        raise StkitError(f"{bench} changed since the run in {out} was started ({names}): choose another --out")
    model = {k: v for k, v in record.items() if k not in ("why", "versions")}
    used = {k: v for k, v in versions().items() if k != "platform"}
    counts = {part: len(files[part]) for part in files}
    digest = hashlib.sha256(to_json(files).encode()).hexdigest()
    compared = {**chosen, "model": model, "versions": used, "benchmark": counts | {"sha256": digest}}
    told = {
        "command": redacted(shlex.join(sys.argv)), "commit": commit(), "why": record.get("why", {}),
        "platform": versions()["platform"],
    }  # fmt: skip
    found = claim(out, compared, name=name, beside=told | dict(beside))
    if not recorded.exists():
        write_json(recorded, files)
    return found


def _changed(before: Mapping, now: Mapping) -> str:
    """Names of the questions and videos whose fingerprints differ, "" when none does."""
    changed = [k for part in now for k, v in now[part].items() if before.get(part, {}).get(k, v) != v]
    return ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
