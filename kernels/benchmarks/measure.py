"""Measuring: two ways of doing one thing alternated in one run, live and resident memory, and FLOPs by our own formula."""

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent


class Times(NamedTuple):
    """Median and the spread around it, in seconds."""

    median: float
    low: float
    high: float


def alternate(peer: Callable, ours: Callable, repeats: int) -> tuple[Times, Times]:
    """Both by turns, once to warm up and then ``repeats`` times each; a turn repeats what takes under 0.1 s."""
    seconds: tuple[list[float], list[float]] = ([], [])
    each = max(1, min(50, int(0.1 / max(_seconds(peer, 1), _seconds(ours, 1)))))
    for _ in range(repeats):
        for kept, call in zip(seconds, (peer, ours)):
            gc.collect()
            kept.append(_seconds(call, each))
    return tuple(Times(statistics.median(s), min(s), max(s)) for s in seconds)


def times(call: Callable, repeats: int) -> list[float]:
    """Seconds of each of some calls; warming up is the caller's."""
    return [_seconds(call, 1) for _ in range(repeats)]


def _seconds(call: Callable, each: int) -> float:
    if each > 1:  # collecting garbage put the threads to sleep
        call()
    begin = time.perf_counter()
    for _ in range(each):
        call()
    return (time.perf_counter() - begin) / each


class AttentionFlops(TorchDispatchMode):
    """FLOPs of attention on a CPU, which torch's counter takes for nothing: 4 D a (query, key) pair of a head.

    A causal call computes the pairs with key <= query; a call with a mask of queries by keys computes all of them.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            q, k = args[:2]
            count, heads, queries, size = q.shape
            keys = k.shape[2]
            causal = args[4] if len(args) > 4 else (kwargs or {}).get("is_causal", False)
            own = min(queries, keys)
            pairs = own * (own + 1) // 2 + max(0, queries - keys) * keys if causal else queries * keys
            self.total += 4 * size * heads * count * pairs
        return func(*args, **(kwargs or {}))


def _product_flops(_, a, b, *__, **___) -> int:
    return 2 * a[0] * a[1] * b[1]


IN_PLACE = {torch.ops.aten.addmm_: _product_flops}  # a product that torch's counter doesn't know


def flops(call: Callable) -> int:
    """Of a call: every matrix product and convolution as torch counts them, and attention by :class:`AttentionFlops`."""
    with AttentionFlops() as attention, FlopCounterMode(display=False, custom_mapping=IN_PLACE) as dense:
        call()
    return dense.get_total_flops() + attention.total


class Machine(NamedTuple):
    """What this machine can do at best: GFLOP/s of a large matrix product, GB/s of reading memory."""

    gflops: float
    gbytes: float


def machine_limits(size: int = 2000) -> Machine:
    """Measured now: a product of 2,000 x 2,000 matrices, the sum of 256 MB (of a toy's ``size``, what is no limit)."""
    a, big = torch.randn(size, size), torch.randn(32_000 * size)
    product, reading = alternate(lambda: a @ a, lambda: big.sum(), 5)
    return Machine(2 * size**3 / product.low / 1e9, big.numel() * 4 / reading.low / 1e9)


def shares(call: Callable) -> str:
    """Where the time of a call goes: "71 % matrix products, 9 % attention, 20 % the rest"."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    spent = {"matrix products": 0.0, "attention": 0.0, "the rest": 0.0}
    for event in profile.key_averages():
        products = event.key in (
            "aten::mm",
            "aten::addmm",
            "aten::addmm_",
            "aten::bmm",
            "aten::baddbmm",
            "aten::convolution",
        )
        kind = "matrix products" if products else "attention" if "_attention_for_cpu" in event.key else "the rest"
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())
    return ", ".join(f"{value / total:.0%} {kind}".replace("%", " %") for kind, value in spent.items())


def resident_mb(name: str, small: bool) -> float:
    """The most memory that a process needed for one call of ``name`` above what it had before, in MB.

    The call is made once in a process of its own after a warm-up with the smallest setting.
    """
    command = [sys.executable, str(HERE / "bench.py"), "--resident", name] + ["--small"] * small
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(done.stdout.strip().splitlines()[-1])


def peak_resident_mb(call: Callable) -> float:
    """Of a call in this process: the high-water mark of its memory above what it had before (Linux)."""
    mark = ResidentMark()
    call()
    return mark.above()


class ResidentMark:
    """From when it is made: how far this process's memory rose above what it had, in MB."""

    def __init__(self):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # starts the mark anew
        self.before = _status("VmRSS")

    def above(self) -> float:
        return (_status("VmHWM") - self.before) / 1024


def _status(name: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
    return int(line.split()[1])
