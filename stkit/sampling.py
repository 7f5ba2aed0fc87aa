"""Which frames of a video are looked at: one function that the benchmark (what is visible?) and the reader share.

    >>> sample_indices(100, 10.0, "uniform", n=4).tolist()
    [0, 33, 66, 99]
"""

import numpy as np

from .runtime import BadUse, StkitError

SAMPLINGS = ("published", "uniform", "fps")


def _linspace_fps(total: int, video_fps: float, fps: float, min_frames: int = 4, max_frames: int = 768) -> np.ndarray:
    """Rounded linspace at ``fps`` frames a second, an even number of them (qwen-vl-utils 0.0.14, smart_nframes)."""
    top = max(2, min(max_frames, total) // 2 * 2)
    wanted = min(max(total / video_fps * fps, min_frames), top)
    count = max(2, int(wanted // 2) * 2)
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def sample_indices(total: int, video_fps: float, sampling: str = "uniform", n: int = 32, fps: float = 1.0) -> np.ndarray:
    """Indices of the sampled frames.

    Args:
        total: frames in the video, at least 1.
        video_fps: frames a second of the video.
        sampling: "published" (fps 1 by rounded linspace, then 8 of those by truncated linspace, as ST-R1 does),
            "uniform" (``n`` frames by rounded linspace, ends included) or "fps" (rounded linspace at ``fps``).
        n: frames for "uniform", even.
        fps: frames a second for "fps".

    Returns:
        ``(T,)`` int64, not decreasing. T is even; a video shorter than T repeats frames.

    Raises:
        BadUse: unknown sampling, ``n`` odd or below 2, ``fps`` not positive.
        StkitError: ``total`` below 1.

    Source: WPR001/Ego-ST (published), qwen-vl-utils 0.0.14 (fps). Deviation: none drops the last frame.
    """
    if total < 1:
        raise StkitError(f"a video of {total} frames cannot be sampled")
    if sampling == "published":
        first = _linspace_fps(total, video_fps, 1.0)
        return first[np.linspace(0, len(first) - 1, 8).astype(np.int64)]
    if sampling == "uniform":
        if n < 2 or n % 2:
            raise BadUse(f"n={n} frames: give an even number of at least 2 (two frames make one temporal patch)")
        return np.linspace(0, total - 1, n).round().astype(np.int64)
    if sampling == "fps":
        if not fps > 0:
            raise BadUse(f"fps={fps} must be positive")
        return _linspace_fps(total, video_fps, fps)
    raise BadUse(f"sampling {sampling!r} is unknown: use {', '.join(SAMPLINGS)}")
