"""Read a video, sample its frames, cut them into the patches that a Qwen-VL takes.

    frames = read_video("walk.mp4", sampling="uniform", n=8)
    frames.pixels.shape, frames.timestamps_s, frames.reader, frames.note
    inputs = prepare(frames, video_spec(processor), max_pixels=360 * 420)

Videos are opened in a child process that is kept and used again (see :mod:`stkit.vlm.decode`): a decoder that hangs is
stopped when its time is over, one that dies takes nothing with it.
"""

import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from stkit_kernels.patchify import patchify

from ..runtime import BadUse, StkitError
from ..sampling import sample_indices
from .reader import ReaderLost, shared_reader

READERS = ("auto", "decord", "pyav")
PUBLISHED_MAX_PIXELS = 360 * 420
RATIO_LIMIT = 200


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames of one video, with what is needed to say where they come from.

    pixels: uint8 ``(T, H, W, 3)``, RGB, upright. timestamps_s: float64 ``(T,)``, seconds from the video's first frame,
    those of the frames really sampled. indices: int64 ``(T,)``, their numbers among ``total_frames``. fps: of the
    video, not of the sample. reader: "decord" or "pyav", and note: why that one, and what was odd about the file.
    """

    pixels: np.ndarray
    timestamps_s: np.ndarray
    reader: str
    sampling: str
    fps: float
    total_frames: int
    indices: np.ndarray
    note: str = ""


def read_video(
    path: str | Path,
    sampling: str = "uniform",
    n: int = 32,
    fps: float = 1.0,
    reader: str = "auto",
    timeout_s: float = 60,
    max_frame_pixels: int = 7680 * 4320,
    max_duration_s: float = 4 * 3600,
    max_bytes: int = 2 * 1024**3,
) -> Frames:
    """Read the sampled frames of a local video.

    ``reader="auto"``: PyAV goes through the packets; decord reads where it is installed, counts the same frames at the
    same times, and converts colours alike (H.264, HEVC, VP9 or MPEG-4 in mp4/mkv, 8-bit 4:2:0, even size); PyAV reads
    everything else and whatever decord fails on, stumbles over or hangs at. ``Frames.reader`` and ``Frames.note`` say
    which and why. PyAV decodes the whole file and refuses it at the first damaged frame; decord decodes, and notices
    damage in, only what leads up to the sampled frames.

    Args:
        path: mp4/mov, mkv/webm, avi, ogg, flv, mpeg-ps or mpeg-ts; a regular local file.
        sampling, n, fps: see :func:`stkit.sampling.sample_indices`. Indices count frames, so that in a video of
            variable frame rate they are not evenly spaced in time; ``timestamps_s`` tells.
        reader: "auto", "decord" or "pyav".
        timeout_s: seconds after which the decoder is stopped (in "auto" decord gets half of them).
        max_frame_pixels, max_duration_s, max_bytes: bounds on pixels a frame, seconds, and bytes of the sampled frames.

    Returns:
        :class:`Frames`.

    Raises:
        BadUse: an unknown sampling or reader, or a bound or number that makes no sense.
        StkitError: no such file, not a video, truncated, damaged, without frames, over a bound, out of time.
    """
    request = {"reader": reader, "sampling": sampling, "n": n, "fps": fps, "timeout_s": timeout_s}
    request |= {"max_frame_pixels": max_frame_pixels, "max_duration_s": max_duration_s, "max_bytes": max_bytes}
    facts, pixels = _ask(_checked(path, request))
    indices = np.array(facts["indices"], np.int64)
    distinct, places = np.unique(indices, return_inverse=True)
    return Frames(
        pixels=pixels if len(distinct) == len(indices) else pixels[places],
        timestamps_s=np.array(facts["timestamps_s"], np.float64),
        reader=facts["reader"],
        sampling=sampling,
        fps=facts["fps"],
        total_frames=facts["total_frames"],
        indices=indices,
        note=facts["note"],
    )


def _checked(path: str | Path, request: dict) -> dict:
    """The request as the child takes it, if it makes sense at all."""
    if request["reader"] not in READERS:
        raise BadUse(f"reader {request['reader']!r} is unknown: use {', '.join(READERS)}")
    for name in ("timeout_s", "max_frame_pixels", "max_duration_s", "max_bytes"):
        if not 0 < request[name] < math.inf:
            raise BadUse(f"{name}={request[name]} must be positive and finite")
    sample_indices(1, 1.0, request["sampling"], n=request["n"], fps=request["fps"])
    try:
        path = os.path.abspath(os.fsdecode(path))
    except TypeError as error:
        raise BadUse(f"{path!r} is not a path: give the name of a video file") from error
    return request | {"path": path, "n": int(request["n"]), "fps": float(request["fps"])}


def _ask(request: dict) -> tuple[dict, np.ndarray]:
    """The facts and the distinct frames; by PyAV in the time left, where decord hung or died and wasn't insisted on."""
    started = time.monotonic()
    try:
        return shared_reader(os.getpid()).ask(request)
    except ReaderLost as error:
        if request["reader"] != "auto" or error.stage != "decord":
            raise
        note = str(error).removeprefix(f"{request['path']}: ").split(": ")[0]
    left_s = max(1.0, request["timeout_s"] - (time.monotonic() - started))
    facts, pixels = shared_reader(os.getpid()).ask(request | {"reader": "pyav", "timeout_s": left_s})
    return facts | {"note": note + facts["note"].removeprefix("asked for")}, pixels


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size a frame gets: both sides multiples of ``factor``, between the bounds, shape kept as far as that goes.

    Args:
        height, width: pixels.
        factor: patch x merge, pixels of a side of one video token.
        min_pixels, max_pixels: bounds on the pixels of one frame.

    Returns:
        ``(height, width)``.

    Raises:
        StkitError: one side over 200 times the other. BadUse: bounds that make no sense.

    Source: Transformers, qwen2_vl/video_processing_qwen2_vl.py (Python's round: halves go to the even multiple).
    """
    if not 0 < min_pixels <= max_pixels:
        raise BadUse(f"min_pixels={min_pixels} and max_pixels={max_pixels}: give 0 < min_pixels <= max_pixels")
    if min(height, width) < 1 or max(height, width) / min(height, width) > RATIO_LIMIT:
        most = f"one side may be {RATIO_LIMIT} times the other at most"
        raise StkitError(f"a frame of {width}x{height} is too thin ({most}): crop the video")
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        tall, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif tall * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        tall, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return tall, wide


def pixel_bounds(
    frames: int, factor: int, min_pixels: int | None, max_pixels: int | None, total_pixels: int | None
) -> tuple[int, int]:
    """Bounds on one frame's pixels, when all frames together have a bound too.

    Args:
        frames: T.
        min_pixels: None for 128 tokens' worth. max_pixels: None for 768 tokens' worth.
        total_pixels: over the temporal patches of all frames; None for 90 % of 128,000 tokens' worth.

    Source: qwen-vl-utils 0.0.14, fetch_video.
    """
    token = factor * factor
    least = 128 * token if min_pixels is None else min_pixels
    most = 768 * token if max_pixels is None else max_pixels
    total = int(128_000 * token * 0.9) if total_pixels is None else total_pixels
    return least, min(most, max(int(total / frames * 2), int(least * 1.05)))


def resize(
    frames: Frames,
    factor: int,
    min_pixels: int | None = None,
    max_pixels: int | None = PUBLISHED_MAX_PIXELS,
    total_pixels: int | None = None,
) -> Frames:
    """Frames of the size that :func:`smart_resize` gives, bicubic and antialiased on uint8 as Transformers does.

    Args:
        factor: patch x merge. The bounds are those of :func:`pixel_bounds`.

    Returns:
        Frames of ``(T, H', W', 3)``; the same object where nothing changes.
    """
    count, height, width, _ = frames.pixels.shape
    size = smart_resize(height, width, factor, *pixel_bounds(count, factor, min_pixels, max_pixels, total_pixels))
    if size == (height, width):
        return frames
    planes = torch.from_numpy(frames.pixels).permute(0, 3, 1, 2)
    planes = torch.nn.functional.interpolate(planes, size, mode="bicubic", align_corners=False, antialias=True)
    return replace(frames, pixels=planes.permute(0, 2, 3, 1).contiguous().numpy())


class VideoSpec(NamedTuple):
    """How a model family cuts frames: pixels of a patch's side, patches of a token's side, frames of a temporal patch,
    and mean and standard deviation of each colour, of 0 to 1."""

    patch: int
    merge: int
    temporal_patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def video_spec(processor) -> VideoSpec:
    """What the processor of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL (or its video processor) does to frames.

    Raises:
        StkitError: it has no video processor, or one that does not scale by 1/255 and normalise.
    """
    video = getattr(processor, "video_processor", processor)
    names = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
    values = [getattr(video, name, None) for name in names]
    if any(value is None for value in values):
        missing = ", ".join(name for name, value in zip(names, values) if value is None)
        kind = type(processor).__name__
        raise StkitError(f"{kind} is no Qwen-VL processor (no {missing}): load one with AutoProcessor")
    if not (video.do_rescale and video.do_normalize and math.isclose(video.rescale_factor, 1 / 255)):
        kind = type(video).__name__
        raise StkitError(f"{kind} does not scale by 1/255 and normalise: only such processors are known")
    patch, merge, temporal, mean, std = values
    return VideoSpec(patch, merge, temporal, tuple(mean), tuple(std))


class VideoInputs(NamedTuple):
    """What a model takes of one video.

    pixel_values: float32 ``(N, 3 * temporal_patch * patch * patch)``. grid_thw: int64 ``(3,)``, patches in time, height
    and width, N their product. second_per_grid_s: seconds from one temporal patch to the next. timestamps_s: float64
    ``(grid_t,)``, the middle of each temporal patch.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    second_per_grid_s: float
    timestamps_s: np.ndarray


def prepare(
    frames: Frames,
    spec: VideoSpec,
    min_pixels: int | None = None,
    max_pixels: int | None = PUBLISHED_MAX_PIXELS,
    total_pixels: int | None = None,
) -> VideoInputs:
    """Resize, normalise and cut into patches, as Transformers' processor does with the same frames.

    ``second_per_grid_s`` is that of the frames really sampled, whatever the sampling: the code published with ST-R1
    samples one frame a second, keeps 8 of them, and still tells the model 2 seconds a temporal patch (to repeat that,
    ``inputs._replace(second_per_grid_s=2.0)``). An odd T is filled up with the last frame.

    Args:
        frames: T frames.
        spec: from :func:`video_spec`.
        min_pixels, max_pixels, total_pixels: see :func:`pixel_bounds`.

    Returns:
        :class:`VideoInputs`.
    """
    frames = resize(frames, spec.patch * spec.merge, min_pixels, max_pixels, total_pixels)
    count, height, width, _ = frames.pixels.shape
    pixel_values = patchify(torch.from_numpy(frames.pixels), *spec)
    grid = (-(-count // spec.temporal_patch), height // spec.patch, width // spec.patch)
    times = frames.timestamps_s
    spacing_s = (times[-1] - times[0]) / (count - 1) if count > 1 else 1 / frames.fps
    filled = np.append(times, np.repeat(times[-1], -count % spec.temporal_patch)).reshape(-1, spec.temporal_patch)
    middles = (filled[:, 0] + filled[:, -1]) / 2
    return VideoInputs(pixel_values, torch.tensor(grid), float(spacing_s * spec.temporal_patch), middles)
