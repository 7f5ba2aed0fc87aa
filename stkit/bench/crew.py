"""Processes that render a build's chunks: started, watched, tried again once, ended with their engines.

Each chunk has a process of its own (``python -m stkit.bench.chunk``) that is done when its manifest is on disk. What
the engine does after that, dying with signal 11 on closing included, costs nothing; before, the chunk is made anew::

    crew = Crew(out, tqdm(total=20))
    crew.render_all(jobs, workers=2)
    crew.manifests[0]["clips"]
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from ..runs import read_json
from ..runtime import StkitError

COMMAND = (sys.executable, "-m", "stkit.bench.chunk")
GRACE_S = 30  # for a process to close its engine and leave nothing behind, before it is killed
LIMIT_S = 3600  # for a chunk; ten clips of the default preset take a minute


class Crew:
    """The processes at work on one build, and what they have handed over.

    Attributes:
        manifests: chunk -> what it handed over (see :func:`stkit.bench.chunk.render_chunk`).
        engine_deaths: how often an engine died, on closing or before.
        resumed: chunks that an earlier run had finished.
    """

    def __init__(self, out: Path, bar: tqdm):
        self.out, self.bar = out, bar
        self.manifests: dict[int, dict] = {}
        self.engine_deaths = self.resumed = 0
        self._children: set[subprocess.Popen] = set()
        self._lock, self._stopping = threading.Lock(), False

    def render_all(self, jobs: list[dict], workers: int) -> None:
        """Render the chunks that are not finished yet, ``workers`` at a time.

        Raises:
            StkitError: a chunk's own error, or an engine that died twice in one. The other processes are ended.
            KeyboardInterrupt: Ctrl-C; they are ended too. What is finished stays on disk.
        """
        _sweep(self.out)
        todo = []
        for job in jobs:
            if found := self._manifest(job):
                self.manifests[job["chunk"]] = found
                self.bar.update(len(found["clips"]))
            else:
                todo.append(job)
        self.resumed = len(self.manifests)
        pool = ThreadPoolExecutor(workers)
        try:
            for done in as_completed([pool.submit(self._render, job) for job in todo]):
                done.result()
        except BaseException:
            self._stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _manifest(self, job: dict) -> dict | None:
        """What a finished chunk handed over, if all its files are still there."""
        path = manifest_path(self.out, job["chunk"])
        if not path.exists():
            return None
        found = read_json(path)
        files = [name for row in found["clips"] for name in (f"videos/{row['video']}", row["truth"])]
        return found if all((self.out / name).exists() for name in files) else None

    def _render(self, job: dict) -> None:
        """One chunk; a second try when the process dies before it has handed over."""
        for attempt in (1, 2):
            code, error, log = self._run(job)
            if self._stopping:
                return
            if error:
                raise StkitError(error)
            found = self._manifest(job)
            died = code != 0 or "signal 11" in log
            with self._lock:
                self.engine_deaths += died
            if found:
                self.manifests[job["chunk"]] = found
                return
            words = f"{_cause(code)}; {([*filter(None, log.splitlines())] or ['no message'])[-1]}"
            if attempt == 1:
                self.bar.write(f"chunk {job['chunk']}: the engine died ({words}): trying once more", file=sys.stderr)
        raise StkitError(
            f"chunk {job['chunk']}: the engine died twice ({words}): run the same command again, it goes on there"
        )

    def _run(self, job: dict) -> tuple[int, str, str]:
        """Run one process to its end: its exit code, its error message ("" if it had none), what it left on stderr."""
        error, counted = "", 0
        with tempfile.TemporaryFile() as log, self._start(log) as child:
            limit = threading.Timer(LIMIT_S, _kill_group, [child])
            limit.daemon = True
            limit.start()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(job).encode() + b"\n")
                child.stdin.flush()
            for line in child.stdout:
                said = json.loads(line)
                error, counted = said.get("error", error), counted + ("clip" in said)
                with self._lock:
                    self.bar.update("clip" in said)
            code = child.wait()
            limit.cancel()
            _kill_group(child)
            with self._lock:
                self._children.discard(child)
            shutil.rmtree(scratch(self.out, job["chunk"], child.pid), ignore_errors=True)
            log.seek(0)
            text = log.read().decode(errors="replace")
        if code != 0 and not self._manifest(job):
            with self._lock:
                self.bar.update(-counted)
        return code, error, text

    def _start(self, log) -> subprocess.Popen:
        """A process that reads its job from stdin and ends when that closes, so that it never outlives us."""
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        pipe, own = subprocess.PIPE, {"env": os.environ | {"PYTHONPATH": path}, "start_new_session": True}
        with self._lock:
            if self._stopping:
                raise StkitError("stopped before the chunk was begun")
            child = subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=log, **own)
            self._children.add(child)
        return child

    def _stop(self) -> None:
        """End all processes: they close their engines when stdin closes; what is not gone after a while is killed."""
        with self._lock:
            self._stopping = True
            children = [*self._children]
        for child in children:
            with contextlib.suppress(OSError):
                child.stdin.close()
        for child in children:
            try:
                child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                _kill_group(child)


def manifest_path(out: Path, chunk: int) -> Path:
    """What a chunk's process writes last, when all its clips are on disk."""
    return out / ".chunks" / f"{chunk:05d}.json"


def scratch(out: Path, chunk: int, pid: int) -> Path:
    """Where a process keeps its WAD and the engine its own files; gone with the process."""
    return out / ".chunks" / f"{chunk:05d}.{pid}.tmp"


def _sweep(out: Path) -> None:
    """Remove what killed processes left: WADs, and files that were being written."""
    for folder in (out / ".chunks").glob("*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)
    for pattern in (".*.tmp", "videos/.*.tmp", "truth/.*.tmp", ".chunks/.*.tmp"):
        for file in out.glob(pattern):
            file.unlink(missing_ok=True)


def _kill_group(child: subprocess.Popen) -> None:
    """Kill a process and the engine that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _cause(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
