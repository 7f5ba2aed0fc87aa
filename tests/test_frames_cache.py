"""The cache gives back the very frames that were stored, forgets the oldest first, and survives damage and company."""

import functools
import multiprocessing
import os
import pickle
import shutil
import warnings

import numpy as np
import pytest
from clipmaker import make_clip, overwritten

from stkit.runtime import StkitError
from stkit.vlm import cache as cache_module
from stkit.vlm.cache import FrameCache, content_hash, load_frames
from stkit.vlm.video import Frames, read_video, resize

HOW = {"factor": 28, "min_pixels": 784, "max_pixels": 10_000}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clips") / "plain.mp4")


@pytest.fixture()
def readings(monkeypatch):
    """Counts how often a video is really read."""
    count = []

    @functools.wraps(read_video)
    def counted(*args, **kwargs):
        count.append(args)
        return read_video(*args, **kwargs)

    monkeypatch.setattr(cache_module, "read_video", counted)
    return count


def small(value: int = 1, count: int = 2) -> Frames:
    pixels = np.full((count, 28, 28, 3), value, np.uint8)
    return Frames(pixels, np.arange(count, dtype=float), "pyav", "uniform", 10.0, 9, np.arange(count), f"note {value}")


def entries(folder) -> list:
    return sorted(path.name for path in folder.iterdir())


def test_frames_come_back_as_they_were_read(tmp_path, clip, readings):
    cache, plain = FrameCache(tmp_path / "c"), resize(read_video(clip, n=4), **HOW)
    for _ in range(3):
        frames = load_frames(clip, **HOW, cache=cache, n=4)
        assert np.array_equal(frames.pixels, plain.pixels) and frames.pixels.dtype == np.uint8
        assert np.array_equal(frames.timestamps_s, plain.timestamps_s) and np.array_equal(frames.indices, plain.indices)
        for name in ("reader", "sampling", "fps", "total_frames", "note"):
            assert getattr(frames, name) == getattr(plain, name)
    assert len(readings) == 1


def test_without_a_cache_nothing_is_written(tmp_path, clip, readings, monkeypatch):
    monkeypatch.setenv("STKIT_CACHE", str(tmp_path / "c"))
    for _ in range(2):
        load_frames(clip, **HOW, n=4)
    assert len(readings) == 2 and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "other",
    [{"n": 6}, {"sampling": "fps"}, {"reader": "pyav"}, {"max_pixels": 3000}, {"factor": 14}, {"min_pixels": 9000},
     {"total_pixels": 9999}],
)
def test_other_settings_are_another_entry(tmp_path, clip, readings, other):
    cache = FrameCache(tmp_path)
    load_frames(clip, **HOW, cache=cache)
    load_frames(clip, **{**HOW, **other}, cache=cache)
    assert len(readings) == 2 and len(entries(tmp_path)) == 2


def test_defaults_written_out_and_time_limits_are_no_other_settings(tmp_path, clip, readings):
    cache = FrameCache(tmp_path)
    load_frames(clip, **HOW, cache=cache)
    load_frames(clip, **HOW, cache=cache, sampling="uniform", n=32, timeout_s=30)
    assert len(readings) == 1


def test_the_content_counts_and_not_the_name(tmp_path, clip, readings):
    cache, path = FrameCache(tmp_path / "c"), tmp_path / "walk.mp4"
    shutil.copy(clip, path)
    load_frames(clip, **HOW, cache=cache)
    load_frames(path, **HOW, cache=cache)
    assert len(readings) == 1
    make_clip(path, count=10)
    assert load_frames(path, **HOW, cache=cache).total_frames == 10 and len(readings) == 2


def test_a_changed_byte_changes_the_hash_although_size_and_mtime_stay(tmp_path, clip):
    path = tmp_path / "walk.mp4"
    shutil.copy(clip, path)
    before, times = content_hash(path), os.stat(path)
    overwritten(path, path, 2000, b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_hash(path) != before


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "empty", "pickle"])
def test_a_damaged_entry_is_made_anew_and_said(tmp_path, clip, readings, damage):
    cache = FrameCache(tmp_path)
    good = load_frames(clip, **HOW, cache=cache)
    (path,) = tmp_path.glob("*.npz")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "bit":
        data[len(data) // 2] ^= 1
    else:
        data = {"text": b"no archive", "empty": b"", "pickle": pickle.dumps({"pixels": 1})}[damage]
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged cache entry"):
        again = load_frames(clip, **HOW, cache=cache)
    assert np.array_equal(again.pixels, good.pixels)
    assert again.note.endswith("its cache entry was damaged and made anew")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(load_frames(clip, **HOW, cache=cache).pixels, good.pixels)
    assert len(readings) == 2


def test_nothing_in_an_entry_is_unpickled(tmp_path):
    """An entry whose array is a pickle would run code when loaded carelessly."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    np.savez(tmp_path / "key.npz", pixels=np.array([Trap()], dtype=object))
    with pytest.warns(UserWarning, match="damaged"):
        assert FrameCache(tmp_path).get("key") is None
    assert not (tmp_path / "sprung").exists()


def test_what_was_used_longest_ago_leaves_first(tmp_path):
    cache = FrameCache(tmp_path)
    for i, key in enumerate("abc"):
        cache.put(key, small(i))
        os.utime(tmp_path / f"{key}.npz", (1000 + i, 1000 + i))
    assert cache.get("a").note == "note 0"  # used now, so b is the oldest
    size = (tmp_path / "a.npz").stat().st_size
    cache.max_bytes = 3 * size
    cache.put("d", small(3))
    assert entries(tmp_path) == ["a.npz", "c.npz", "d.npz"]
    assert cache.get("b") is None


def test_what_a_killed_process_left_counts_and_leaves_too(tmp_path):
    left = tmp_path / "left.tmp"
    left.write_bytes(bytes(100_000))
    os.utime(left, (1000, 1000))
    FrameCache(tmp_path, max_bytes=50_000).put("a", small())
    assert entries(tmp_path) == ["a.npz"]


def hammer(folder: str, seed: int) -> None:
    cache = FrameCache(folder, max_bytes=40_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(60):
            key = f"{(i * seed) % 7}"
            cache.put(key, small((i * seed) % 7))
            frames = cache.get(key)
            assert frames is None or (frames.pixels == int(key)).all()


def test_two_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=hammer, args=(str(tmp_path), seed)) for seed in (1, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert not list(tmp_path.glob("*.tmp"))


def test_an_entry_that_another_process_deletes_before_it_has_its_name_is_not_cached(tmp_path, monkeypatch):
    replaced = os.replace

    def late(source, target):
        os.unlink(source)
        replaced(source, target)

    monkeypatch.setattr(os, "replace", late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FrameCache(tmp_path).put("a", small(1))
    assert FrameCache(tmp_path).get("a") is None and not list(tmp_path.iterdir())


def test_a_full_disk_costs_time_and_not_the_run(tmp_path, clip, monkeypatch):
    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="not cached: the disk is full"):
        frames = load_frames(clip, **HOW, cache=FrameCache(tmp_path))
    assert frames.total_frames == 20 and entries(tmp_path) == []


def test_the_folder_is_taken_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("STKIT_CACHE", str(tmp_path))
    assert FrameCache().folder == tmp_path
    monkeypatch.delenv("STKIT_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(FrameCache().folder) == "/home/somebody/.cache/stkit/frames"


@pytest.mark.parametrize("name", ["absent.mp4", ""])
def test_a_bad_video_is_the_same_error_with_a_cache(tmp_path, name):
    with pytest.raises(StkitError, match="no such file|not a regular file"):
        load_frames(tmp_path / name, **HOW, cache=FrameCache(tmp_path / "c"))
