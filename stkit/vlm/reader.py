"""The other end of :mod:`stkit.vlm.decode`: one child process, kept, used again, stopped when its time is over.

    facts, frames = shared_reader(os.getpid()).ask(request)
"""

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from functools import lru_cache

import numpy as np

from ..runtime import StkitError

SERVE = "import sys; sys.path[:] = {path!r}; from stkit.vlm.decode import serve; serve()"


class ReaderLost(StkitError):
    """The child gave no answer in time and was stopped, or died. ``stage``: what it was in, "", "decord" or "pyav"."""

    def __init__(self, message: str, stage: str):
        super().__init__(message)
        self.stage = stage


class Reader:
    """One child process that reads videos, started when first needed and again after it was stopped.

    Args:
        command: the program to start; tests give others.
    """

    def __init__(self, command: list[str] | None = None):
        self.command = command
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()

    def start(self) -> None:
        """Start the child with this process's import path, from nothing (no fork: torch may be loaded here)."""
        command = self.command or [sys.executable, "-c", SERVE.format(path=sys.path)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        """End the child at once and wait for its end."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                try:
                    pipe.close()
                except BrokenPipeError:  # a request that the child did not live to read
                    pass

    def ask(self, request: dict) -> tuple[dict, np.ndarray]:
        """Send one request, wait at most ``request["timeout_s"]`` seconds.

        decord gets half of what is left, when PyAV may follow it.

        Returns:
            The facts and the distinct frames, uint8 ``(U, H, W, 3)``.

        Raises:
            StkitError: the file is bad.
            ReaderLost: time over, or the child died. The next request is served all the same.
        """
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.stop()
                self.start()
            try:
                answer, pixels = self._exchange(request)
            except BaseException:  # Ctrl-C too: half an answer may be in the pipe
                self.stop()
                raise
        if "error" in answer:
            raise StkitError(answer["error"])
        return answer, pixels

    def _exchange(self, request: dict) -> tuple[dict, np.ndarray]:
        process, stage, until = self.process, "", time.monotonic() + request["timeout_s"]
        clock = _Clock(process.kill)
        clock.set(request["timeout_s"])
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            while "stage" in (answer := json.loads(_line(process.stdout))):
                stage = answer["stage"]
                left_s = max(0.0, until - time.monotonic())
                clock.set(left_s / 2 if (stage, request["reader"]) == ("decord", "auto") else left_s)
            return answer, _exactly(process.stdout, answer.get("shape", [0]))
        except (EOFError, BrokenPipeError) as error:
            if clock.rang:
                what = f"took over {clock.seconds:.3g} s and was stopped: raise timeout_s or re-encode it"
            else:
                what = f"ended the reading process (exit code {process.wait()}): re-encode it"
            raise ReaderLost(f"{request['path']}: {stage or 'opening it'} {what}", stage) from error
        finally:
            clock.clear()
            if clock.rang:  # perhaps in the moment after the last byte
                self.stop()


class _Clock:
    """Calls ``ring`` when its seconds are over, unless it was set again or cleared before."""

    def __init__(self, ring):
        self.ring, self.rang, self.seconds, self.timer = ring, False, 0.0, None

    def _expire(self) -> None:
        self.rang = True
        self.ring()

    def set(self, seconds: float) -> None:
        self.clear()
        self.seconds, self.timer = seconds, threading.Timer(seconds, self._expire)
        self.timer.daemon = True
        self.timer.start()

    def clear(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer.join()


def _line(pipe) -> bytes:
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return line


def _exactly(pipe, shape: list[int]) -> np.ndarray:
    pixels = np.empty(shape, np.uint8)
    view, done = memoryview(pixels).cast("B"), 0
    while done < len(view):
        got = pipe.readinto(view[done:])
        if not got:
            raise EOFError
        done += got
    return pixels


@lru_cache(maxsize=8)
def shared_reader(pid: int) -> Reader:
    """The one reader of a process. A forked child has a pid of its own and never talks to its parent's reader."""
    reader = Reader()
    atexit.register(lambda: reader.stop() if os.getpid() == pid else None)
    return reader
