"""Good videos of every kind: the frames asked for, upright, at their true times, whoever reads them."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from clipmaker import camera_clip, make_clip, number_of, picture, trimmed, turned

from stkit.runtime import BadUse
from stkit.vlm.reader import shared_reader
from stkit.vlm.video import read_video

READERS = ("pyav", "decord")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clips") / "plain.mp4")


def corners(frame: np.ndarray) -> list[str]:
    """The colours of the corners: top left, top right, bottom left, bottom right."""
    tall, wide = frame.shape[0] // 8, frame.shape[1] // 8
    patches = [frame[:tall, :wide], frame[:tall, -wide:], frame[-tall:, :wide], frame[-tall:, -wide:]]
    means = [patch.reshape(-1, 3).mean(0) for patch in patches]
    return ["rgb"[int(mean.argmax())] if mean.max() - mean.min() > 90 else "-" for mean in means]


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4"])
def test_decord_and_pyav_read_the_same_frames_of_real_clips(name):
    by_decord, by_pyav = (read_video(camera_clip(name), n=6, reader=reader) for reader in ("decord", "pyav"))
    assert (by_decord.reader, by_pyav.reader) == ("decord", "pyav")
    assert np.array_equal(by_decord.pixels, by_pyav.pixels)
    assert np.array_equal(by_decord.timestamps_s, by_pyav.timestamps_s)
    assert by_decord.pixels.std() > 20
    total = {"bikes.mp4": 250, "bigbuckbunny.mp4": 132}[name]
    assert by_pyav.total_frames == total and by_pyav.fps == 25
    assert np.allclose(by_pyav.timestamps_s, np.linspace(0, total - 1, 6).round() / 25)


def test_auto_reads_an_ordinary_clip_with_decord_and_says_so():
    frames = read_video(camera_clip("bikes.mp4"), n=2)
    assert frames.reader == "decord" and frames.note == "decord and PyAV agree on 250 frames"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("sampling", "expected"),
    # 20 frames at 10 a second; published: 1 a second, but at least 4, then 8 of these 4 by truncated linspace
    [("uniform", [0, 6, 13, 19]), ("fps", [0, 4, 8, 11, 15, 19]), ("published", [0, 0, 0, 6, 6, 13, 13, 19])],
)
def test_the_frames_are_those_that_the_sampling_names(clip, reader, sampling, expected):
    frames = read_video(clip, sampling, n=4, fps=3.0, reader=reader)
    assert frames.pixels.dtype == np.uint8 and frames.pixels.shape == (len(expected), 96, 128, 3)
    assert [number_of(frame) for frame in frames.pixels] == expected == frames.indices.tolist()
    assert frames.timestamps_s.dtype == np.float64 and np.allclose(frames.timestamps_s, np.array(expected) / 10)
    assert (frames.sampling, frames.fps, frames.total_frames) == (sampling, 10.0, 20)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rate_keeps_the_times_of_the_frames(tmp_path, reader, name):
    times_ms = np.cumsum([0] + [40, 40, 500] * 5)[:12].tolist()
    path = make_clip(tmp_path / name, count=12, times_ms=times_ms)
    frames = read_video(path, n=12, reader=reader)
    assert [number_of(frame) for frame in frames.pixels] == list(range(12))
    assert np.allclose(frames.timestamps_s, np.array(times_ms) / 1000)
    assert frames.fps == pytest.approx(11 / (times_ms[-1] / 1000))


@pytest.mark.parametrize("reader", READERS)
def test_a_video_of_one_frame_is_that_frame_repeated(tmp_path, reader):
    frames = read_video(make_clip(tmp_path / "one.mp4", count=1), n=4, reader=reader)
    assert frames.total_frames == 1 and frames.timestamps_s.tolist() == [0, 0, 0, 0]
    assert [number_of(frame) for frame in frames.pixels] == [0, 0, 0, 0]
    assert corners(frames.pixels[3]) == ["r", "g", "b", "-"]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("matrix", "shape", "seen"),
    [
        ((0, 1, -1, 0), (128, 96), ["b", "r", "-", "g"]),  # a quarter clockwise
        ((-1, 0, 0, -1), (96, 128), ["-", "b", "g", "r"]),
        ((0, -1, 1, 0), (128, 96), ["g", "-", "r", "b"]),
    ],
)
def test_rotated_videos_come_out_upright(tmp_path, clip, reader, matrix, shape, seen):
    frames = read_video(turned(clip, tmp_path / "turned.mp4", *matrix), n=2, reader=reader)
    assert frames.pixels.shape[1:3] == shape and corners(frames.pixels[0]) == seen


@pytest.mark.parametrize(
    ("matrix", "seen"), [((-1, 0, 0, 1), ["g", "r", "-", "b"]), ((1, 0, 0, -1), ["b", "-", "r", "g"])]
)
def test_mirrored_videos_are_left_to_pyav(tmp_path, clip, matrix, seen):
    frames = read_video(turned(clip, tmp_path / "mirrored.mp4", *matrix), n=2)
    assert frames.reader == "pyav" and "mirrored" in frames.note and corners(frames.pixels[0]) == seen


KINDS = {
    "odd size": ("a.webm", {"codec": "libvpx-vp9", "height": 47, "width": 63}),
    "grey": ("a.mkv", {"codec": "ffv1", "pixels": "gray"}),
    "4:4:4": ("a.mp4", {"pixels": "yuv444p"}),
    "10 bit": ("a.mp4", {"pixels": "yuv420p10le"}),
    "avi": ("a.avi", {"codec": "mjpeg", "pixels": "yuvj420p"}),
    "avi with frames out of order": ("a.avi", {}),
    "mpeg-ts": ("a.ts", {}),
    "flv": ("a.flv", {}),
    "av1": ("a.mp4", {"codec": "libsvtav1"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_unusual_videos_give_the_right_frames_and_say_who_read_them(tmp_path, kind):
    name, how = KINDS[kind]
    path = make_clip(tmp_path / name, **how)
    frames = read_video(path, n=20)
    assert frames.pixels.shape == (20, how.get("height", 96), how.get("width", 128), 3)
    assert [number_of(frame) for frame in frames.pixels] == list(range(20))
    assert np.allclose(frames.timestamps_s, np.arange(20) / 10, atol=0.002)
    assert corners(frames.pixels[0]) == (["-"] * 4 if kind == "grey" else ["r", "g", "b", "-"])
    assert frames.reader == "pyav" and "decord" in frames.note


def test_lossless_frames_come_back_bit_for_bit(tmp_path):
    path = make_clip(tmp_path / "a.mkv", codec="ffv1", pixels="bgr0", height=37, width=51)
    frames = read_video(path, n=20)
    assert np.array_equal(frames.pixels, np.stack([picture(i, 37, 51) for i in range(20)]))


def test_a_container_that_claims_more_frames_than_it_shows_is_read_by_pyav(tmp_path, clip):
    """decord counts the hidden frames too and fills the end with copies of one frame, or hangs (dmlc/decord#373)."""
    frames = read_video(trimmed(clip, tmp_path / "trimmed.mp4", shown_s=1.0), n=10)
    assert frames.reader == "pyav" and frames.note == "the container claims 20 frames, 10 are shown"
    assert frames.total_frames == 10 and [number_of(frame) for frame in frames.pixels] == list(range(10))


def test_one_child_serves_many_videos_and_comes_back_after_it_was_stopped(clip):
    reader = shared_reader(os.getpid())
    read_video(clip, n=2)
    child = reader.process.pid
    read_video(camera_clip("bikes.mp4"), n=2)
    assert reader.process.pid == child
    reader.process.kill()
    reader.process.wait()
    assert read_video(clip, n=2).total_frames == 20 and reader.process.pid != child


def test_threads_that_read_at_once_each_get_their_own_video(clip):
    found = {}

    def work(name, path):
        found[name] = [read_video(path, n=2, reader="pyav").total_frames for _ in range(3)]

    paths = {"plain": clip, "bikes": camera_clip("bikes.mp4")}
    threads = [threading.Thread(target=work, args=item) for item in paths.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"plain": [20] * 3, "bikes": [250] * 3}


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), 9)"])
def test_the_child_ends_with_its_parent_however_that_ends(clip, end):
    script = f"""import os
from stkit.vlm.reader import shared_reader
from stkit.vlm.video import read_video
read_video({str(clip)!r}, n=2)
print(shared_reader(os.getpid()).process.pid, flush=True)
{end}"""
    child = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout)
    until = time.monotonic() + 120
    while alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # an ended child that nobody has waited for yet is not alive
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_forked_process_has_a_reader_of_its_own(clip):
    read_video(clip, n=2)
    ours, (end, other_end) = shared_reader(os.getpid()).process.pid, os.pipe()
    pid = os.fork()
    if pid == 0:
        frames = read_video(clip, n=2)
        reader = shared_reader(os.getpid())
        os.write(other_end, f"{reader.process.pid} {frames.total_frames}".encode())
        reader.stop()
        os._exit(0)
    os.waitpid(pid, 0)
    theirs, total = map(int, os.read(end, 100).split())
    assert theirs != ours and total == 20
    assert read_video(clip, n=2).total_frames == 20 and shared_reader(os.getpid()).process.pid == ours


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"reader": "opencv"}, "opencv"),
        ({"sampling": "random"}, "random"),
        ({"n": 5}, "n=5"),
        ({"n": 0}, "n=0"),
        ({"sampling": "fps", "fps": 0}, "fps=0"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"max_bytes": float("nan")}, "max_bytes=nan"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_before_anything_is_opened(wrong, told):
    with pytest.raises(BadUse) as error:
        read_video("absent.mp4", **wrong)
    assert told in str(error.value) and "\n" not in str(error.value)
