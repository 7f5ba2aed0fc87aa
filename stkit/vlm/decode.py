"""The child process that opens videos: what FFmpeg or decord does to a damaged file happens here, not in the notebook.

decord 0.6 can spin for ever holding the GIL, and a decoder can die on a bad file; only a process can be stopped from
outside. :mod:`stkit.vlm.reader` starts this one without fork, sends a request as one line of JSON, and takes back one
line of JSON and the frames as plain bytes (nothing is pickled). PyAV goes through the packets first, so that the number
of frames is known before anybody is asked for the last one::

    clip = index_video("walk.mp4", max_frame_pixels=2**25, max_duration_s=3600)
    clip.total, clip.fps
"""

import faulthandler
import json
import os
import signal
import sys
import tempfile
from contextlib import contextmanager
from typing import NamedTuple

import av
import numpy as np

from ..runtime import StkitError
from ..sampling import sample_indices
from .containers import container_of

DECORD_CODECS = ("h264", "hevc", "vp9", "mpeg4")
DECORD_PIXELS = ("yuv420p", "yuvj420p")
SAME_TIME_S = 0.01
NO_TIMES = "no usable time stamps: frames taken as evenly spaced"


class Clip(NamedTuple):
    """What going through a video once told. ``times_s``: (total,) from the first frame; ``turn``: :func:`turn_of`."""

    demuxer: str
    codec: str
    pixel_format: str
    height: int
    width: int
    turn: tuple[bool, bool, bool]
    times_s: np.ndarray
    fps: float
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        return len(self.times_s)


@contextmanager
def open_video(path: str, demuxer: str):
    """The best video stream of a file: this one demuxer, no protocol but ``file``."""
    options = {"protocol_whitelist": "file"}
    try:
        with av.open(path, format=demuxer, options=options, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise StkitError(f"{path}: has no video stream (sound or pictures only)")
            if stream.codec_context is None:
                raise StkitError(f"{path}: no decoder for its video: re-encode it as H.264 mp4")
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise StkitError(f"{path}: damaged, FFmpeg cannot read it ({error.strerror}): copy or re-encode it") from error


def index_video(path: str, max_frame_pixels: int, max_duration_s: float) -> Clip:
    """Go through the packets (no decoding but of the first frame) and check the bounds."""
    demuxer = container_of(path)
    with open_video(path, demuxer) as (container, stream):
        check_pixels(path, stream.height, stream.width, max_frame_pixels)
        pts = []
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise StkitError(f"{path}: truncated or damaged after {len(pts)} frames: copy or download it again")
            if packet.size and not packet.is_discard:
                pts.append(packet.pts)
        claimed, rate, base = stream.frames, stream.average_rate or stream.guessed_rate, stream.time_base
        codec = stream.codec_context.name
    if not pts:
        raise StkitError(f"{path}: its video stream has no frames")
    with open_video(path, demuxer) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise StkitError(f"{path}: none of its {len(pts)} frames can be decoded: re-encode it")
        check_pixels(path, frame.height, frame.width, max_frame_pixels)
        turn = turn_of(path, frame)
        size, pixels = (frame.height, frame.width), frame.format.name
    times, fps, notes = timeline(pts, base, rate)
    if claimed > len(pts):
        notes = (f"the container claims {claimed} frames, {len(pts)} are shown", *notes)
    if times[-1] > max_duration_s:
        over = f"lasts {times[-1]:.0f} s, over the bound of {max_duration_s:g} s"
        raise StkitError(f"{path}: {over}: cut it or raise max_duration_s")
    return Clip(demuxer, codec, pixels, *size, turn, times, fps, notes)


def timeline(pts: list, base, rate) -> tuple[np.ndarray, float, tuple[str, ...]]:
    """Seconds from the first frame in the order shown, frames a second, notes where the container gives no times."""
    rate = float(rate or 1)
    if None in pts or len(set(pts)) < len(pts) or base is None:
        return np.arange(len(pts)) / rate, rate, (NO_TIMES,)
    times = (np.sort(np.array(pts, dtype=np.int64)) - min(pts)) * float(base)
    measured = (len(pts) - 1) / times[-1] if len(pts) > 1 else rate
    # the container's own rate is exact where it is right at all; the measured one is rounded to the time base
    return times, (rate if abs(measured / rate - 1) < 0.01 else float(measured)), ()


def check_pixels(path: str, height: int, width: int, most: int) -> None:
    if height * width > most:
        over = f"{width}x{height} pixels a frame, over the bound of {most}"
        raise StkitError(f"{path}: {over}: scale it or raise max_frame_pixels")


def turn_of(path: str, frame) -> tuple[bool, bool, bool]:
    """(transpose, flip up-down, flip left-right) that makes the frame upright, from its display matrix."""
    data = [bytes(s) for s in frame.side_data if s.type.name == "DISPLAYMATRIX"]
    if not data:
        return False, False, False
    a, b, _, c, d = np.frombuffer(data[0], "<i4")[:5].tolist()
    if b == c == 0 and a and d:
        return False, d < 0, a < 0
    if a == d == 0 and b and c:
        return True, b < 0, c < 0
    matrix = f"display matrix {a, b, c, d}"
    raise StkitError(f"{path}: is to be shown rotated by an odd angle ({matrix}): re-encode it upright")


def upright(pixels: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
    """Turn one frame ``(H, W, 3)`` by what :func:`turn_of` said."""
    pixels = pixels.transpose(1, 0, 2) if turn[0] else pixels
    return np.ascontiguousarray(pixels[:: -1 if turn[1] else 1, :: -1 if turn[2] else 1])


def decode_pyav(path: str, clip: Clip, wanted: set[int], max_frame_pixels: int) -> tuple[list[np.ndarray], list]:
    """Decode the whole file, keep the wanted frames: each frame is vouched for, a damaged one is an error.

    Returns:
        The wanted frames upright, in order, and the time stamps of all frames.
    """
    frames, pts = [], []
    with open_video(path, clip.demuxer) as (container, stream):
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise StkitError(f"{path}: frame {len(pts)} is damaged: copy the file again or re-encode it")
                check_pixels(path, frame.height, frame.width, max_frame_pixels)
                if (frame.height, frame.width) != (clip.height, clip.width):
                    raise StkitError(f"{path}: frame {len(pts)} is {frame.width}x{frame.height}, the first one is "
                                     f"{clip.width}x{clip.height}: re-encode it at one size")
                if len(pts) in wanted:
                    frames.append(upright(frame.to_ndarray(format="rgb24"), clip.turn))
                pts.append(frame.pts)
        except av.FFmpegError as error:
            where = f"frame {len(pts)} of {clip.total} cannot be decoded ({error.strerror})"
            raise StkitError(f"{path}: {where}: truncated or damaged, copy or re-encode it") from error
    return frames, pts


def read_pyav(path: str, clip: Clip, request: dict) -> tuple[Clip, np.ndarray, list[np.ndarray]]:
    """The sampled frames by PyAV. Where the decoder shows other frames than there are packets, the decoder is right."""
    for _ in range(2):
        indices = sample(path, clip, request)
        frames, pts = decode_pyav(path, clip, set(indices.tolist()), request["max_frame_pixels"])
        if not pts:
            raise StkitError(f"{path}: none of its {clip.total} frames can be decoded: re-encode it")
        if len(pts) == clip.total:
            ordered = None not in pts and all(a < b for a, b in zip(pts, pts[1:]))
            if not ordered and NO_TIMES not in clip.notes:
                clip = clip._replace(times_s=np.arange(clip.total) / clip.fps, notes=(*clip.notes, NO_TIMES))
            return clip, indices, frames
        with open_video(path, clip.demuxer) as (_, stream):
            times, fps, notes = timeline(pts, stream.time_base, stream.average_rate)
        notes = (f"{clip.total} packets give {len(pts)} frames", *notes)
        clip = clip._replace(times_s=times, fps=fps, notes=notes)
    raise StkitError(f"{path}: gives another number of frames each time it is decoded: re-encode it")


def sample(path: str, clip: Clip, request: dict) -> np.ndarray:
    """Indices of the sampled frames, if they fit the bound on bytes."""
    indices = sample_indices(clip.total, clip.fps, request["sampling"], n=request["n"], fps=request["fps"])
    size, most = len(indices) * clip.height * clip.width * 3, request["max_bytes"]
    if size > most:
        over = f"{len(indices)} frames of {clip.width}x{clip.height} take {size} bytes, over the bound of {most}"
        raise StkitError(f"{path}: {over}: sample fewer or raise max_bytes")
    return indices


def against_decord(clip: Clip, careful: bool) -> str:
    """Why decord should not read this clip, or "". ``careful``: also where it reads other pixels than PyAV."""
    if clip.demuxer not in ("mov", "matroska"):
        return f"decord is unreliable on {clip.demuxer}"
    transpose, up_down, left_right = clip.turn
    if transpose != (up_down != left_right):
        return "the video is mirrored, which decord ignores"
    if clip.notes:
        return "; ".join(clip.notes)
    if careful and clip.codec not in DECORD_CODECS:
        return f"decord is untested on {clip.codec}"
    if careful and (clip.pixel_format not in DECORD_PIXELS or clip.height % 2 or clip.width % 2):
        return f"decord converts the colours of {clip.width}x{clip.height} {clip.pixel_format} otherwise"
    return ""


def read_decord(path: str, clip: Clip, request: dict, careful: bool) -> tuple[np.ndarray, list[np.ndarray]] | str:
    """The sampled frames by decord, or the reason why they are not to be had from it."""
    reason = against_decord(clip, careful)
    if reason:
        return reason
    try:
        import decord
    except (ImportError, OSError) as error:
        return f"decord is missing ({error})"
    indices = sample(path, clip, request)
    with captured_stderr() as log:
        decord.logging.set_level(decord.logging.ERROR)
        try:
            video = decord.VideoReader(path, num_threads=min(os.cpu_count() or 1, 4))
            if len(video) != clip.total:
                return f"decord counts {len(video)} frames, PyAV {clip.total}"
            times = video.get_frame_timestamp(list(range(clip.total)))[:, 0].astype(np.float64)
            if np.abs(times - times[0] - clip.times_s).max() > SAME_TIME_S:
                return "decord and PyAV disagree on the time stamps"
            frames = video.get_batch(np.unique(indices)).asnumpy()
            del video
        except Exception as error:  # decord raises bare errors of many kinds; each becomes a reason that is told
            return f"decord failed ({str(error).splitlines()[-1][-120:] if str(error) else type(error).__name__})"
        log.seek(0)
        complaints = log.read().decode(errors="replace").strip().splitlines()
    if complaints:
        return f"decord's decoder complained ({complaints[0][-120:]})"
    return indices, list(frames)


@contextmanager
def captured_stderr():
    """File descriptor 2 into a temporary file: FFmpeg inside decord tells of damaged frames there and nowhere else."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def read(request: dict, tell) -> tuple[dict, list[np.ndarray]]:
    """Serve one request: the facts for :class:`stkit.vlm.video.Frames`, and each sampled frame once.

    Args:
        request: path, reader, sampling, n, fps, max_frame_pixels, max_duration_s, max_bytes.
        tell: called with "decord" before decord is let loose, so that a process that hangs is known to hang there.
    """
    path, reader, note = request["path"], request["reader"], "asked for"
    clip = index_video(path, request["max_frame_pixels"], request["max_duration_s"])
    result = None
    if reader != "pyav":
        tell("decord")
        result = read_decord(path, clip, request, careful=reader == "auto")
        if isinstance(result, str):
            if reader == "decord":
                raise StkitError(f"{path}: {result}: use reader='auto' or 'pyav'")
            note, result = result, None
        else:
            note = f"decord and PyAV agree on {clip.total} frames"
    if result is None:
        tell("pyav")
        clip, indices, frames = read_pyav(path, clip, request)
        note = "; ".join([note, *(extra for extra in clip.notes if extra not in note)])
        used = "pyav"
    else:
        (indices, frames), used = result, "decord"
    facts = {"reader": used, "note": note, "fps": clip.fps, "total_frames": clip.total, "indices": indices.tolist(),
             "timestamps_s": clip.times_s[indices].tolist(), "shape": [len(frames), *frames[0].shape]}
    return facts, frames


def serve() -> None:
    """Answer requests from standard input until it closes. Whatever a decoder prints goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(value: dict) -> None:
        out.write(json.dumps(value).encode() + b"\n")
        out.flush()

    for line in sys.stdin.buffer:
        request = json.loads(line)
        # a thread of C that needs no GIL: ends this process should the parent be gone while a decoder spins
        faulthandler.dump_traceback_later(request["timeout_s"] + 10, exit=True)
        try:
            facts, frames = read(request, lambda stage: send({"stage": stage}))
        except StkitError as error:
            send({"error": str(error)})
        except Exception as error:  # told to the parent, which raises it: one strange file must not end the reader
            send({"error": f"{request['path']}: the reader failed ({type(error).__name__}: {error})"})
        else:
            send(facts)
            for frame in frames:
                out.write(np.ascontiguousarray(frame).data)
            out.flush()
        faulthandler.cancel_dump_traceback_later()
