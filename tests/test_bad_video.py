"""Bad videos of every kind: a clear error of one line or the right frames, in time, and never a picture made up."""

import os
import re
import struct
import sys
import time

import av
import numpy as np
import pytest
from clipmaker import (
    camera_clip,
    cut,
    make_clip,
    number_of,
    of_two_sizes,
    overwritten,
    referring,
    sound_only,
    trimmed,
    turned,
)

from stkit.runtime import StkitError
from stkit.vlm.reader import Reader, ReaderLost, shared_reader
from stkit.vlm.video import read_video

READERS = ("auto", "pyav", "decord")
HANG = "import ctypes; ctypes.PyDLL(None).sleep(3600)"  # holding the GIL, as decord 0.6 does when it hangs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One good clip of each container, and a bad one of each kind."""
    folder = tmp_path_factory.mktemp("bad")
    good = make_clip(folder / "good.mp4", count=30, g="10")
    head = make_clip(folder / "head.mp4", count=30, g="10", container={"movflags": "faststart"})
    for name in ("good.mkv", "good.avi"):
        cut(make_clip(folder / name, count=30), folder / f"cut_{name}", 0.6)
    cut(good, folder / "cut_good.mp4", 0.6)
    cut(head, folder / "cut_head.mp4", 0.6)
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    cut(make_clip(folder / "fragments.mp4", count=30, g="10", container=fragments), folder / "cut_fragments.mp4", 0.6)
    # cut, and its headers made to agree with the length: nothing but the packets tells
    data = bytearray((folder / "cut_head.mp4").read_bytes())
    at = data.find(b"mdat") - 4
    data[at : at + 4] = struct.pack(">I", len(data) - at)
    (folder / "claims.mp4").write_bytes(data)
    bikes = camera_clip("bikes.mp4")
    overwritten(bikes, folder / "zeros.mp4", 170_000, bytes(20_000))
    overwritten(bikes, folder / "bits.mp4", 170_000, bytes(range(1, 60)))
    make_clip(folder / "no_frames.mp4", count=0)
    sound_only(folder / "sound.m4a")
    turned(good, folder / "askew.mp4", 1, 1, -1, 1)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video at all\n" * 100)
    (folder / "noise.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(range(256)) * 40)
    (folder / "noise.mkv").write_bytes(b"\x1a\x45\xdf\xa3" + bytes(range(256)) * 40)
    (folder / "folder.mp4").mkdir()
    return folder


BAD = {
    "absent.mp4": "no such file",
    "folder.mp4": "not a regular file",
    "empty.mp4": "0 bytes",
    "text.mp4": "not a video",
    "noise.mp4": "truncated|damaged",
    "noise.mkv": "truncated|damaged",
    "cut_good.mp4": "truncated",
    "cut_head.mp4": "truncated",
    "cut_fragments.mp4": "truncated",
    "cut_good.mkv": "truncated",
    "cut_good.avi": "truncated",
    "claims.mp4": "truncated or damaged",
    "zeros.mp4": "damaged|decord",
    "bits.mp4": "damaged|decord",
    "no_frames.mp4": "no frames|no video stream",
    "sound.m4a": "no video stream",
    "askew.mp4": "rotated",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_video_gets_one_line_that_names_it(folder, name, reader):
    started = time.monotonic()
    with pytest.raises(StkitError) as error:
        read_video(folder / name, n=8, reader=reader)
    message = str(error.value)
    assert re.search(BAD[name], message) and str(folder / name) in message and "\n" not in message
    assert time.monotonic() - started < 50  # read_video's own limit is 60


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/walk.mp4", "file:walk.mp4", "concat:a.mp4|b.mp4", "a\0b.mp4"])
def test_only_local_files_are_opened(path):
    with pytest.raises(StkitError, match="no such file|not a file name"):
        read_video(path)


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(StkitError, match="not a regular file"):
        read_video(tmp_path / "pipe.mp4")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "text",
    ["#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9.0,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n",
     '<?xml version="1.0"?>\n<MPD profiles="urn:mpeg:dash:profile:full:2011"><BaseURL>{}</BaseURL></MPD>'],
)
def test_a_playlist_named_mp4_opens_nothing_that_it_names(tmp_path, folder, text, reader):
    """decord and FFmpeg both follow such a file to what it names (tried)."""
    (tmp_path / "list.mp4").write_text(text.format(folder / "good.mp4"))
    with pytest.raises(StkitError, match="not a video"):
        read_video(tmp_path / "list.mp4", reader=reader)


@pytest.mark.parametrize("reader", READERS)
def test_a_movie_that_keeps_its_frames_in_another_file_is_not_followed_there(tmp_path, folder, reader):
    """A QuickTime data reference ('alis') may name any file; FFmpeg reads it when told to."""
    movie = referring(folder / "good.mp4", tmp_path / "movie.mp4", folder / "good.mp4")
    with av.open(str(movie), options={"enable_drefs": "1", "use_absolute_path": "1"}) as told_to:
        assert sum(1 for _ in told_to.decode(video=0)) == 30
    with pytest.raises(StkitError, match="no frames"):
        read_video(movie, reader=reader)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("bound", "told"),
    [
        ({"max_frame_pixels": 96 * 128 - 1}, "128x96 pixels a frame"),
        ({"max_duration_s": 2.8}, "over the bound of 2.8 s"),
        ({"max_bytes": 4 * 96 * 128 * 3 - 1}, "4 frames of 128x96"),
    ],
)
def test_pixels_duration_and_bytes_are_bounded(folder, bound, told, reader):
    with pytest.raises(StkitError) as error:
        read_video(folder / "good.mp4", n=4, reader=reader, **bound)
    assert told in str(error.value) and next(iter(bound)) in str(error.value)
    (name, value), = bound.items()
    assert len(read_video(folder / "good.mp4", n=4, reader=reader, **{name: value + 1}).pixels) == 4


def test_decord_asked_for_by_name_refuses_what_it_would_read_wrongly(tmp_path, folder):
    with pytest.raises(StkitError, match="claims 30 frames, 10 are shown: use reader='auto'"):
        read_video(trimmed(folder / "good.mp4", tmp_path / "trimmed.mp4", 1.0), reader="decord")


@pytest.fixture()
def decord_that(tmp_path, monkeypatch):
    """Put a decord of our own before the real one, in a fresh child."""

    def install(body: str, head: str = "") -> None:
        lines = ["import numpy as np", "class logging:", "    ERROR = 16", "    def set_level(level): pass",
                 "class VideoReader:", "    def __init__(self, path, num_threads): pass"]
        lines += [f"    {line}" for line in body.splitlines()]
        (tmp_path / "decord.py").write_text(head + "\n" + "\n".join(lines) + "\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    shared_reader(os.getpid()).stop()
    yield install
    shared_reader(os.getpid()).stop()


COUNTS = "def __len__(self): return 30\n"
TIMES = "def get_frame_timestamp(self, i): return np.arange(30)[:, None] / 10\n"


def test_a_decord_that_hangs_holding_the_gil_is_stopped_and_pyav_reads(folder, decord_that):
    decord_that(COUNTS + TIMES + f"def get_batch(self, i): {HANG}")
    read_video(folder / "good.mp4", n=2, reader="pyav")  # the child has started, however busy the machine
    started = time.monotonic()
    frames = read_video(folder / "good.mp4", n=4, timeout_s=24)
    assert time.monotonic() - started < 24
    assert frames.reader == "pyav" and re.search(r"decord took over \d.* and was stopped", frames.note)
    assert [number_of(frame) for frame in frames.pixels] == [0, 10, 19, 29]
    assert read_video(folder / "good.mp4", n=2, reader="pyav").total_frames == 30


def test_a_decord_that_hangs_and_was_asked_for_by_name_is_an_error_in_time(folder, decord_that):
    decord_that(COUNTS + TIMES + f"def get_batch(self, i): {HANG}")
    read_video(folder / "good.mp4", n=2, reader="pyav")
    started = time.monotonic()
    with pytest.raises(ReaderLost, match="decord took over .* and was stopped: raise timeout_s"):
        read_video(folder / "good.mp4", n=4, reader="decord", timeout_s=3)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("body", "head", "told"),
    [
        ("def __len__(self): return 31", "", "decord counts 31 frames, PyAV 30"),
        (COUNTS + TIMES.replace("10", "9"), "", "disagree on the time stamps"),
        (COUNTS + TIMES + "def get_batch(self, i): raise RuntimeError('no more')", "", "decord failed (no more)"),
        (COUNTS + TIMES + "def get_batch(self, i): import os; os.abort()", "", "decord ended the reading process"),
        ("pass", "raise ImportError('none here')", "decord is missing (none here)"),
    ],
)
def test_where_decord_fails_pyav_reads_and_says_why(folder, decord_that, body, head, told):
    decord_that(body, head)
    frames = read_video(folder / "good.mp4", n=4)
    assert frames.reader == "pyav" and told in frames.note
    assert [number_of(frame) for frame in frames.pixels] == [0, 10, 19, 29]
    with pytest.raises(StkitError, match=re.escape(told)):
        read_video(folder / "good.mp4", n=4, reader="decord")


def test_what_decords_decoder_complains_of_is_not_used(folder, decord_that):
    """FFmpeg inside decord conceals damaged parts and tells of it on standard error alone."""
    body = "def get_batch(self, i):\n    import os; os.write(2, b'error while decoding MB 3 4\\n'); return self\n"
    decord_that(COUNTS + TIMES + body + "def asnumpy(self): return np.zeros((4, 96, 128, 3), np.uint8)")
    frames = read_video(folder / "good.mp4", n=4)
    assert frames.reader == "pyav" and "error while decoding MB" in frames.note and frames.pixels.mean() > 40


@pytest.mark.parametrize(
    ("script", "timeout_s", "told"), [(HANG, 1, "took over 1"), ("import os; os._exit(7)", 60, "exit code 7")]
)
def test_a_child_that_hangs_or_dies_is_an_error_that_names_the_file(script, timeout_s, told):
    reader = Reader([sys.executable, "-c", f"import sys; sys.stdin.readline(); {script}"])
    with pytest.raises(ReaderLost) as error:
        reader.ask({"path": "/walk.mp4", "reader": "pyav", "timeout_s": timeout_s})
    assert told in str(error.value) and "/walk.mp4" in str(error.value)
    assert reader.process is None


def test_half_an_answer_is_never_taken_for_frames():
    answer = """import sys; sys.stdin.readline(); print('{"shape": [1, 2, 2, 3]}', flush=True); print("abc")"""
    reader = Reader([sys.executable, "-c", answer])
    with pytest.raises(ReaderLost):
        reader.ask({"path": "/walk.mp4", "reader": "pyav", "timeout_s": 20})


def test_frames_that_change_size_halfway_are_an_error(tmp_path):
    with pytest.raises(StkitError, match="frame 10 is 160x120, the first one is 128x96"):
        read_video(of_two_sizes(tmp_path / "both.avi"), n=4)


def test_no_frame_is_black_where_the_video_is_not(folder):
    for name in ("good.mp4", "good.mkv", "good.avi", "fragments.mp4"):
        frames = read_video(folder / name, n=8)
        assert (frames.pixels.mean((1, 2, 3)) > 40).all() and np.unique(frames.indices).size == 8
