"""What this machine can do: its parts, the backends that work here, what would be chosen, and what to install.

>>> doctor()["choice"]["four_bit"] in (True, False)
True
"""

import os
import platform
import shutil
import sys
from importlib import import_module

import torch

from ..runtime import versions
from .choose import Choice, choose, flash_usable, memory_gb, nf4_usable, one_line

EXAMPLE = ("Qwen/Qwen2.5-VL-3B-Instruct", 3_750_000_000)
# What a backend is for, how to get it, and where it cannot be had.
PACKAGES = {
    "decord": ("reads video, quickly", "pip install decord"),
    "av": ("reads and writes video, robustly", "pip install av"),
    "vizdoom": ("renders the benchmark's walks", "pip install vizdoom"),
}


def doctor() -> dict:
    """Look at this machine and at what is installed; nothing is changed or downloaded.

    Returns:
        A dict of plain JSON values: machine, versions, backends (name -> usable, why), choice (what
        :func:`stkit.load_model` would choose here for a model of 3 billion parameters, and why), advice (commands, best
        first; empty when nothing better can be had) and text (all of it, for people).
    """
    choice = choose(EXAMPLE[1])
    result = {
        "machine": machine(),
        "versions": versions(),
        "backends": backends(choice),
        "choice": {
            "model": EXAMPLE[0],
            "device": choice.device,
            "dtype": str(choice.dtype).removeprefix("torch."),
            "attention": choice.attention,
            "tree_attention": choice.tree_attention,
            "four_bit": choice.four_bit,
            "why": choice.why,
        },
    }
    result["advice"] = advice(result["backends"], choice)
    return result | {"text": as_text(result)}


def machine() -> dict:
    """Platform, cores that this process may use, memory in GB, and the GPUs that torch sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        gpus.append(f"{found.name}, {found.total_memory / 1e9:.0f} GB, compute capability {found.major}.{found.minor}")
    if torch.backends.mps.is_available():
        gpus.append("Apple GPU (mps)")
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu_cores": cores,
        "memory_gb": round(memory_gb("cpu"), 1),
        "gpus": gpus,
    }


def backends(choice: Choice) -> dict[str, dict]:
    """For each backend, whether it is usable here and why (found out by using or importing it)."""
    flash, why_flash = flash_usable(choice.device, choice.dtype)
    nf4, why_nf4 = nf4_usable(choice.device)
    found = {
        "attention: sdpa": {"usable": True, "why": "part of torch"},
        "attention: flash-attn": {"usable": flash, "why": why_flash},
        "4 bits: NF4": {"usable": nf4, "why": why_nf4},
    }
    for name, (purpose, _) in PACKAGES.items():
        try:
            import_module(name)
        except Exception as error:  # a broken installation may raise anything, and the user has to see it
            found[name] = {"usable": False, "why": f"cannot be imported ({one_line(error)})"}
        else:
            found[name] = {"usable": True, "why": purpose}
    return found


def advice(found: dict[str, dict], choice: Choice) -> list[str]:
    """What to install for something better than what is used now."""
    lines = []
    if choice.device == "cpu" and shutil.which("nvidia-smi"):
        lines.append("there is an NVIDIA driver, but this torch sees no GPU: install the CUDA build from pytorch.org")
    flash = found["attention: flash-attn"]["why"]
    if "pip install" in flash:  # only where the GPU could run it
        lines.append(f"faster attention: {flash[flash.index('pip install') :]}")
    if not found["4 bits: NF4"]["usable"] and choice.device != "mps":
        lines.append("4-bit models: pip install --upgrade bitsandbytes")
    for name, (purpose, command) in PACKAGES.items():
        apple_without_wheel = name == "decord" and sys.platform == "darwin"
        if not found[name]["usable"] and not apple_without_wheel:
            lines.append(f"{name} ({purpose}): {command}")
    return lines


def as_text(result: dict) -> str:
    """The same for people, a line each."""
    here, choice = result["machine"], result["choice"]
    lines = [
        f"machine    {here['platform']}, {here['cpu_cores']} cores, {here['memory_gb']} GB of memory",
        f"GPU        {'; '.join(here['gpus']) or 'none that torch sees'}",
        "versions   "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "platform"),
        "",
        "backends",
    ]
    for name, state in result["backends"].items():
        lines.append(f"  {'yes' if state['usable'] else 'no '}  {name}: {state['why']}")
    lines += ["", f"load_model({choice['model']!r}) would choose"]
    for key in ("device", "dtype", "attention", "tree_attention", "four_bit"):
        lines.append(f"  {key:<14} {choice[key]} ({choice['why'][key]})")
    lines += ["", "to do better"]
    lines += [f"  {line}" for line in result["advice"]] or ["  nothing: this machine uses the best that it has"]
    return "\n".join(lines)
