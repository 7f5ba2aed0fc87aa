"""Processes that do one job together, as ``accelerate launch`` or ``torchrun`` starts them.

Each takes its share, and they meet at a few points. One that fails says so there, so that none waits for it for ever::

    team = join_team()                                # alone: a team of one, for which nothing is connected
    team.each(lambda: ask(team.share(clips)))         # all go on when all are through, or stop when one failed
    team.first(lambda: write(out))                    # process 0, while the others wait for it
    tokens = sum(team.gather(len(ids)))               # a JSON value of each process, in each
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple

from ..runtime import BadUse, StkitError

LONGEST_START = timedelta(minutes=10)  # until all processes are there
LONGEST_WAIT = timedelta(days=30)  # for the slowest of them; one that ends is noticed at once


class Team(NamedTuple):
    """This process: ``rank`` of ``count``, ``place`` on its machine; ``group`` connects them (gloo)."""

    rank: int = 0
    count: int = 1
    place: int = 0
    group: object = None

    def share(self, items: Sequence) -> Sequence:
        """Every ``count``-th of the items, from this process's number on."""
        return items[self.rank :: self.count]

    def gather(self, value) -> list:
        """One JSON value from each process, in their order; every process must call it.

        Raises:
            StkitError: another process ended.
        """
        if self.count == 1:
            return [value]
        import torch
        from torch import distributed

        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        try:
            distributed.all_gather(sizes, torch.tensor([len(text)]), group=self.group)
            padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
            padded[: len(text)] = text
            texts = [torch.zeros_like(padded) for _ in range(self.count)]
            distributed.all_gather(texts, padded, group=self.group)
        except RuntimeError as error:
            ended = "another process ended without a word: run the same command again, it goes on where it was"
            raise StkitError(ended) from error
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]

    def each(self, function: Callable):
        """Call a function in every process (one that itself waits for none), and go on when all have done so.

        Returns:
            What it returned in this process.

        Raises:
            StkitError: it failed in another process, or another process ended. An error of this process comes as it is.
        """
        if self.count == 1:
            return function()
        try:
            result = function()
        except Exception as error:
            print(f"stkit: process {self.rank} of {self.count} stops: {error}", file=sys.stderr, flush=True)
            self._tell(f"{error}" or type(error).__name__)
            raise
        stopped = [f"process {rank} of {self.count} stopped ({why})" for rank, why in enumerate(self.gather("")) if why]
        if stopped:
            raise StkitError(f"{'; '.join(stopped)}: run the same command again, it goes on where it was")
        return result

    def first(self, function: Callable):
        """Call a function in process 0, while the others wait for it; they get None."""
        return self.each(function if self.rank == 0 else lambda: None)

    def _tell(self, why: str) -> None:
        """Let the others know that this process stops."""
        try:
            self.gather(why)
        except StkitError:  # it has an error of its own to tell of
            pass


def launched() -> bool:
    """Whether this process is one of several."""
    return os.environ.get("WORLD_SIZE", "1").strip() not in ("", "1")


def speaks() -> bool:
    """Whether this process is the one of several that tells the user what came out."""
    return not launched() or os.environ.get("RANK") == "0"


def join_team() -> Team:
    """The team that the launcher's environment (WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) describes.

    A process group that is there already (Accelerate's, say) stays the default one.

    Raises:
        BadUse: the environment describes none. StkitError: the others cannot be reached.
    """
    if not launched():
        return Team()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name, "") for name in names]
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
        told = ", ".join(f"{name}={value!r}" for name, value in zip(names, values))
        raise BadUse(f"{told} describe no process of several: start them by accelerate launch or torchrun")
    from torch import distributed

    try:
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=LONGEST_START)
        group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise StkitError(f"the other processes cannot be reached ({' '.join(str(error).split())[:200]})") from error
    return Team(*map(int, values), group)


def own_device(device: str, team: Team) -> str:
    """The device of this process: with "auto" a GPU of its own where there are GPUs.

    Raises:
        BadUse: more processes than GPUs on this machine.
    """
    if device != "auto" or team.count == 1:
        return device
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "cpu"
    if not torch.cuda.is_available():
        return device
    if team.place >= (there := torch.cuda.device_count()):
        raise BadUse(f"process {team.place} of this machine finds no GPU, {there} are there: launch {there} a machine")
    return f"cuda:{team.place}"
