"""What of a benchmark's videos a model is shown, decided the same way for evaluation and training.

    sampling = choose_sampling(benchmark.info, sampling=None, frames=8, fps=None)
    pixels = choose_pixels(loaded.processor, max_pixels=None)
    files = fingerprint(benchmark, questions)
"""

import hashlib
from collections.abc import Mapping, Sequence

from ..bench.schema import Benchmark, Question, row_of
from ..runs import to_json
from ..runtime import BadUse, StkitError
from ..sampling import sample_indices
from .cache import content_hash
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


def choose_pixels(processor, max_pixels: int | None) -> dict:
    """Bounds on a frame's pixels: the published ones, or the processor's own where it takes less.

    Returns:
        ``{"min_pixels", "max_pixels"}``.
    """
    size = processor.video_processor.size
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


def changed_files(before: Mapping, now: Mapping) -> str:
    """Names of the questions and videos whose fingerprints differ, "" when none does."""
    changed = [k for part in now for k, v in now[part].items() if before.get(part, {}).get(k, v) != v]
    return ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
