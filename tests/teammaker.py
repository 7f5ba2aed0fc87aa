"""Several processes that do one job, as a launcher would start them, for the tests; quick: one server forks them."""

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["stkit.evaluation", "stkit.train.grpo", "torch.distributed.fsdp", "torch._dynamo", "peft"]
CONTEXT.set_forkserver_preload(PRELOADED)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _process(rank: int, count: int, port: int, folder: Path, function: Callable, args: tuple) -> None:
    """One process: its output in a file of its own, exit code 1 when the function fails."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "STKIT_CACHE": str(folder / "frames")}
    with open(folder / f"told-{rank}.txt", "w") as told:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            try:
                function(*args)
            except BaseException:
                traceback.print_exc()
                told.flush()
                os._exit(1)
    sys.exit(0)


def run_team(folder: Path, function: Callable, *args, count: int = 2, wait_s: float = 600.0) -> list[tuple[int, str]]:
    """Call a function of a test module in each of ``count`` processes.

    Returns:
        Exit code (negative: the signal that ended it) and output of each. One that hangs is an AssertionError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    team = [CONTEXT.Process(target=_process, args=(k, count, port, folder, function, args)) for k in range(count)]
    for process in team:
        process.start()
    for process in team:
        process.join(wait_s)
    hung = [k for k, process in enumerate(team) if process.is_alive()]
    for k in hung:
        team[k].kill()
    told = [(folder / f"told-{k}.txt").read_text() for k in range(count)]
    assert not hung, f"processes {hung} hang: {told}"
    return [(process.exitcode, text) for process, text in zip(team, told, strict=True)]
