"""Which files FFmpeg may open at all: told by their first bytes, never by their name.

FFmpeg opens what a file *says*: a text file called ``walk.mp4`` can be a playlist that names other files or addresses.
So a video must look like one of the containers below, and that demuxer alone is used on it. Files that end before their
own headers say (a download cut off) are found here too, since decoders return the rest as if it were all::

    container_of("walk.mp4")        # "mov"
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO

from ..runs import explain
from ..runtime import StkitError

CONTAINERS = "mp4/mov, mkv/webm, avi, ogg, flv, mpeg-ps and mpeg-ts"
MOV_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
SEGMENT = b"\x18\x53\x80\x67"


def container_of(path: str | Path) -> str:
    """FFmpeg's name of the demuxer for a local video file.

    Raises:
        StkitError: no such file, not a regular file, empty, not one of the containers, or cut off.
    """
    try:
        if not os.path.exists(path):
            raise StkitError(f"{path}: no such file (only local files are read)")
        if not os.path.isfile(path):
            raise StkitError(f"{path}: is not a regular file, a video file was expected")
        with open(path, "rb") as file:
            head, size = file.read(1024), os.fstat(file.fileno()).st_size
            if not head:
                raise StkitError(f"{path}: the file is empty (0 bytes): copy or download it again")
            demuxer = _demuxer(head)
            if demuxer is None:
                raise StkitError(f"{path}: not a video: its first bytes are none of {CONTAINERS}")
            cut = {"mov": _cut_mov, "matroska": _cut_matroska, "avi": _cut_avi}.get(demuxer)
            if cut and (where := cut(file, head, size)):
                raise StkitError(f"{path}: truncated: the file ends inside {where}: copy or download it again")
    except OSError as error:
        raise StkitError(explain(error) if error.filename else f"{path}: {explain(error)}") from error
    except ValueError as error:
        raise error if isinstance(error, StkitError) else StkitError(f"{path!r}: not a file name ({error})") from error
    return demuxer


def _demuxer(head: bytes) -> str | None:
    if head[4:8] in MOV_FIRST_BOXES:
        return "mov"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        return "mpegts"
    magics = {b"\x1a\x45\xdf\xa3": "matroska", b"OggS": "ogg", b"FLV\x01": "flv", b"\x00\x00\x01\xba": "mpeg"}
    return magics.get(head[:4])


def _cut_mov(file: BinaryIO, head: bytes, size: int) -> str:
    """Walk the top-level boxes; ISO/IEC 14496-12, 4.2. A cut in a box that holds no frames loses nothing."""
    offset, seen = 0, set()
    while offset + 8 <= size:
        file.seek(offset)
        header = file.read(16)
        length, kind = struct.unpack(">I4s", header[:8])
        if length == 1 and len(header) == 16:
            length = struct.unpack(">Q", header[8:])[0]
        if length == 0:
            length = size - offset
        if length < 8:
            break
        seen.add(kind)
        if offset + length > size and kind in (b"mdat", b"moov", b"moof"):
            return f"its '{kind.decode()}' box"
        offset += length
    return "" if b"moov" in seen else "the recording (it has no 'moov' box)"


def _cut_matroska(file: BinaryIO, head: bytes, size: int) -> str:
    """Compare the Segment's length with the file's; RFC 8794. A live recording has none, and nothing to compare."""
    length, start = _vint(head, 4)
    offset = start + length
    if offset >= size:
        return "its header"
    file.seek(offset)
    segment = file.read(12)
    if segment[:4] != SEGMENT:
        return ""
    length, used = _vint(segment, 4)
    unknown = length == (1 << 7 * (used - 4)) - 1
    return "" if unknown or offset + used + length <= size else "its Segment"


def _vint(data: bytes, at: int) -> tuple[int, int]:
    """An EBML number of 1 to 8 bytes, and the place after it."""
    width = 9 - data[at].bit_length() if len(data) > at and data[at] else 8
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return value, at + width


def _cut_avi(file: BinaryIO, head: bytes, size: int) -> str:
    length = struct.unpack("<I", head[4:8])[0] if len(head) >= 8 else 0
    return "its RIFF chunk" if 8 + length > size else ""
