"""What every room needs and no room owns: errors, seeds, devices, versions.

    >>> child_seed(0, "clip", 3) == child_seed(0, "clip", 3)
    True
"""

import hashlib
import platform
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

PACKAGES = ("stkit", "torch", "transformers", "peft", "bitsandbytes", "decord", "av", "vizdoom", "numpy", "scikit-learn")


class StkitError(ValueError):
    """Bad input. The message is for the user: one line that names the value and the fix. Exit code 1."""


class BadUse(StkitError):
    """The call itself makes no sense (an unknown option value, a count of zero). Exit code 2."""


class OutOfMemory(StkitError):
    """Memory ran out; the message says what was computed, and which arguments make it smaller."""


class StkitWarning(UserWarning):
    """Something the user should know that doesn't stop the work."""


@contextmanager
def explain_memory(plan: str, lower: str) -> Iterator[None]:
    """Turn an error for want of memory, on a GPU or a CPU, into an OutOfMemory that says what the plan was.

    Args:
        plan: what was to be computed. lower: which arguments make it smaller.
    """
    import torch

    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        text = " ".join(str(error).split())
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in text:
            raise
        raise OutOfMemory(f"out of memory: {plan}: {lower} ({text[:120]})") from error


def child_seed(seed: int, *names: object) -> int:
    """A seed of 63 bits for one named part of a seeded job: the same on every machine and in every process."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: object) -> random.Random:
    """A ``random.Random`` of its own for one named part of a seeded job."""
    return random.Random(child_seed(seed, *names))


def commit() -> str | None:
    """The commit of the code that runs, marked where files differ from it; None outside a repository."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(asked, check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that can change a number (absent ones are "not installed")."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def pick_device(device: str = "auto") -> tuple[str, str]:
    """The device to compute on, and why.

    Args:
        device: "auto", "cpu", "mps", "cuda" or "cuda:N".

    Returns:
        ``(device, reason)``.

    Raises:
        StkitError: the device that was asked for is not there (never another in its place).
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda", "a CUDA GPU is there"
        if torch.backends.mps.is_available():
            return "mps", "an Apple GPU is there"
        return "cpu", "no CUDA or Apple GPU found"
    kind = device.split(":")[0]
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in usable:
        raise BadUse(f"device {device!r} is unknown: use auto, cpu, mps, cuda or cuda:N")
    if not usable[kind]:
        raise StkitError(f"device {device!r} is not usable here (torch sees none): use device='auto' or 'cpu'")
    return device, "asked for"


def pick_dtype(dtype: str = "auto", device: str = "cpu"):
    """The torch dtype to compute in, and why: float32 on a CPU, bfloat16 on GPUs that have it, float16 on a T4.

    Args:
        dtype: "auto", "float32", "float16" or "bfloat16".
        device: as returned by :func:`pick_device`.

    Returns:
        ``(torch.dtype, reason)``.
    """
    import torch

    named = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype != "auto":
        if dtype not in named:
            raise BadUse(f"dtype {dtype!r} is unknown: use auto, {', '.join(named)}")
        return named[dtype], "asked for"
    if device.startswith("cuda"):
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, "this GPU computes in bfloat16"
        return torch.float16, "this GPU (compute capability under 8, as a T4) has no bfloat16"
    if device == "mps":
        return torch.bfloat16, "Apple GPUs compute in bfloat16"
    return torch.float32, "a CPU is fastest and exact in float32"


def setup(seed: int = 0, device: str = "auto", dtype: str = "auto") -> dict[str, str]:
    """First cell of a notebook: seed every generator and print what this machine will compute with.

    Returns:
        A record with keys seed, device, dtype, attention (that on prefix trees) and the versions of :func:`versions`.
    """
    import numpy
    import torch
    from stkit_kernels.backends import choose_backend

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    device, device_reason = pick_device(device)
    chosen, dtype_reason = pick_dtype(dtype, device)
    record = {"seed": str(seed), "device": device, "dtype": str(chosen).removeprefix("torch.")}
    tree = choose_backend(torch.device(device), chosen, head_size=128)
    record["attention"] = tree.name
    print(f"device    {device} ({device_reason})\ndtype     {record['dtype']} ({dtype_reason})")
    print(f"attention {tree.name} ({tree.why})\nseed      {seed}")
    print("versions  " + ", ".join(f"{k} {v}" for k, v in versions().items() if k != "platform"))
    return record | versions()
