"""Decoded and resized frames on disk, so that a video asked about again is not decoded again.

An entry is named by the video's content and by every setting that could change a pixel, so it never goes stale; the
folder has a size, and what was not used for the longest time leaves first::

    cache = FrameCache()                                  # $STKIT_CACHE, or ~/.cache/stkit/frames
    frames = load_frames("walk.mp4", factor=28, cache=cache, sampling="uniform", n=8)
"""

import hashlib
import inspect
import json
import os
import tempfile
import warnings
import zipfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..runs import explain
from ..runtime import StkitError, versions
from .video import PUBLISHED_MAX_PIXELS, Frames, read_video, resize

FORMAT = 1
ARRAYS = ("pixels", "timestamps_s", "indices")
FACTS = ("reader", "sampling", "fps", "total_frames", "note")
DAMAGED = (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile)


class FrameCache:
    """A folder of frames, safe to share between processes: entries are written whole or not at all.

    Args:
        folder: None for ``$STKIT_CACHE``, or ``~/.cache/stkit/frames``.
        max_bytes: what all entries together may take.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int = 4 * 1024**3):
        default = os.environ.get("STKIT_CACHE") or Path.home() / ".cache" / "stkit" / "frames"
        self.folder, self.max_bytes = Path(folder or default), max_bytes

    def get(self, key: str) -> Frames | None:
        """The frames stored under a key; None when there are none, or when the entry is damaged (a warning says so)."""
        path = self.folder / f"{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as entry:
                arrays = {name: entry[name] for name in ARRAYS}
                facts = json.loads(entry["facts"].tobytes())
            frames = Frames(**arrays, **{name: facts[name] for name in FACTS})
            if frames.pixels.dtype != np.uint8 or frames.pixels.shape[:1] != frames.timestamps_s.shape:
                raise ValueError("arrays of another kind")
            os.utime(path)
        except FileNotFoundError:
            return None
        except DAMAGED as error:
            warnings.warn(f"{path}: a damaged cache entry ({error}): the video is read anew", stacklevel=2)
            return None
        return frames

    def put(self, key: str, frames: Frames) -> None:
        """Store frames. A folder that cannot be written costs time, not the run: a warning says so."""
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            facts = json.dumps({name: getattr(frames, name) for name in FACTS}).encode()
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as file:
                temporary = Path(file.name)
                arrays = {name: getattr(frames, name) for name in ARRAYS}
                np.savez(file, facts=np.frombuffer(facts, np.uint8), **arrays)
            try:
                os.replace(temporary, self.folder / f"{key}.npz")
            except FileNotFoundError:  # another process made room before it had its name
                return
            self.prune()
        except OSError as error:
            warnings.warn(f"the frames are not cached: {explain(error)}", stacklevel=2)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def prune(self) -> None:
        """Delete the entries used longest ago until the rest fits; files that a killed process left count too."""
        found = []
        for path in [*self.folder.glob("*.npz"), *self.folder.glob("*.tmp")]:
            try:
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            except FileNotFoundError:  # another process was quicker
                continue
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


@lru_cache(maxsize=4096)
def _content(path: str, *unchanged: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_hash(path: str | Path) -> str:
    """sha256 of a file, computed again only when its size or one of its times differs."""
    try:
        facts = os.stat(path)
        return _content(os.path.abspath(path), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    except OSError as error:
        raise StkitError(explain(error)) from error


@lru_cache(maxsize=1)
def _versions() -> str:
    return json.dumps({name: version for name, version in versions().items() if name in ("av", "decord", "torch")})


def frames_key(path: str | Path, settings: dict) -> str:
    """The name of an entry: content of the video, settings, and versions of what decodes and resizes."""
    text = json.dumps([FORMAT, content_hash(path), settings, _versions()], sort_keys=True, default=float)
    return hashlib.sha256(text.encode()).hexdigest()


def load_frames(
    path: str | Path,
    factor: int,
    min_pixels: int | None = None,
    max_pixels: int | None = PUBLISHED_MAX_PIXELS,
    total_pixels: int | None = None,
    cache: FrameCache | None = None,
    **reading,
) -> Frames:
    """Frames read and resized, from the cache where it has them.

    Args:
        path, reading: see :func:`stkit.vlm.video.read_video`.
        factor, min_pixels, max_pixels, total_pixels: see :func:`stkit.vlm.video.resize`.
        cache: None for no cache.

    Returns:
        Frames equal to ``resize(read_video(path, **reading), factor, ...)``; the note says where an entry was damaged.
    """
    size = {"factor": factor, "min_pixels": min_pixels, "max_pixels": max_pixels, "total_pixels": total_pixels}
    if cache is None or not os.path.isfile(path):
        return resize(read_video(path, **reading), **size)
    asked = inspect.signature(read_video).bind(path, **reading)
    asked.apply_defaults()
    settings = {k: v for k, v in asked.arguments.items() if k not in ("path", "timeout_s")}
    key = frames_key(path, {**settings, **size})
    stored = cache.get(key)
    if stored is not None:
        return stored
    frames = resize(read_video(path, **reading), **size)
    damaged = (cache.folder / f"{key}.npz").exists()
    cache.put(key, frames)
    return replace(frames, note=f"{frames.note}; its cache entry was damaged and made anew") if damaged else frames
