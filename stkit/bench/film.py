"""Frames to an H.264 file in memory, and the hash of what a reader decodes from it.

The file is made in memory and written whole, so that a full disk leaves no half video and speaks through one error. The
encoder has one thread: with more, x264's output depends on the machine. And it does without macroblock trees, for which
x264 reads memory that nobody wrote where a side is no multiple of 16 (seen with AVX-512): the same frames gave other
bytes in every second run::

    data = encode(frames, Fraction(35, 2))
    frames_sha256, count = decoded_hash(data)
"""

import hashlib
import io
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np

from ..runtime import BadUse, StkitError

X264 = {"preset": "veryfast", "crf": "23", "threads": "1", "x264-params": "mbtree=0"}


def check_size(width: int, height: int) -> None:
    """Refuse what H.264 in 4:2:0 cannot hold: odd sizes, and sizes in which no landmark could be told from another.

    Raises:
        BadUse: a side is odd, under 32 or over 4096.
    """
    for name, value in (("width", width), ("height", height)):
        if value % 2 or not 32 <= value <= 4096:
            raise BadUse(f"resolution {width}x{height}: {name} {value} must be even, from 32 to 4096 (H.264 in 4:2:0)")


def encode(frames: Iterable[np.ndarray], fps: Fraction) -> bytes:
    """An mp4 file (H.264, 4:2:0, no sound) of the frames.

    Args:
        frames: uint8 RGB pictures (H, W, 3), all of one even size, at least one.
        fps: frames a second.

    Returns:
        The file's bytes: the same for the same frames, whatever the machine's load or number of cores.
    """
    frames = list(frames)
    if not frames:
        raise StkitError("a video needs at least one frame")
    height, width = frames[0].shape[:2]
    check_size(width, height)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=X264)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def decoded_hash(data: bytes) -> tuple[str, int]:
    """SHA-256 over the decoded frames (RGB, in order of display, each with its shape), and how many there are."""
    digest, count = hashlib.sha256(), 0
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            pixels = frame.to_ndarray(format="rgb24")
            digest.update(f"{pixels.shape}".encode() + pixels.tobytes())
            count += 1
    return digest.hexdigest(), count
