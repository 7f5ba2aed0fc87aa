"""Checkpoints that a crash cannot spoil: written under a temporary name, synced, renamed; the last few are kept.

    tensors = {"optimizer": optimizer.state_dict(), "generators": generators()}
    save(folder, step, weights=model.save_pretrained, tensors=tensors, state={"cursor": 12}, keep=2)
    found = latest(folder)          # by reading what is there, not by a link that may dangle
    restore = load_tensors(found / "optimizer.pt")

``RUN/checkpoints/step-000010`` holds ``weights/``, a ``.pt`` for each of ``tensors``, and ``state.json``, written last.
"""

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from ..runs import explain, read_json, write_json
from ..runtime import StkitError

NAME = "step-{:06d}"


def save(
    folder: Path, step: int, weights: Callable[[Path], object], tensors: Mapping[str, object], state: Mapping, keep: int
) -> Path:
    """Write a checkpoint, whole or not at all, then delete the oldest beyond ``keep``.

    Args:
        folder: of all checkpoints.
        weights: writes the model's weights into the folder that it is given.
        tensors: what goes through torch.save, by file name without ending.
        state: plain values.

    Raises:
        StkitError: it cannot be written (a full disk): those that were there are whole still.
    """
    target, temporary = folder / NAME.format(step), folder / f".{NAME.format(step)}.{os.getpid()}.tmp"
    if (target / "state.json").exists():  # stopped just after it was written: the state is the same
        return target
    try:
        remove_leftovers(folder)
        (temporary / "weights").mkdir(parents=True)
        weights(temporary / "weights")
        for name, value in tensors.items():
            torch.save(value, temporary / f"{name}.pt")
        write_json(temporary / "state.json", {"step": step, **state})
        sync(temporary)
        os.replace(temporary, target)
        sync_folder(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        cause = explain(error) if isinstance(error, OSError) else " ".join(str(error).split())[:160]
        raise StkitError(f"checkpoint of step {step} was not written, earlier ones are whole: {cause}") from error
    for old in steps(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def remove_leftovers(folder: Path) -> None:
    """What a killed process was writing."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def steps(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/state.json"))


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint."""
    found = steps(folder)
    return found[-1] if found else None


def load_tensors(path: Path) -> dict:
    """What torch.save wrote, tensors and plain values only."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise StkitError(f"{path}: damaged ({error}): delete that checkpoint, the one before is used then") from error


def read_state(checkpoint: Path) -> dict:
    """Its plain values."""
    return read_json(checkpoint / "state.json")


def sync(folder: Path) -> None:
    """Push every file below a folder to the disk."""
    for path in [*folder.rglob("*"), folder]:
        with contextlib.suppress(PermissionError):  # folders cannot be opened on some systems
            sync_folder(path)


def sync_folder(path: Path) -> None:
    """Push one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def generators() -> dict:
    """The state of every random generator, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    found = {"torch": torch.get_rng_state(), "python": [version, list(internal), gauss]}
    found["numpy"] = [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached]
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def restore_generators(found: dict) -> None:
    """Set every random generator to what :func:`generators` gave."""
    version, internal, gauss = found["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = found["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(found["torch"])
    if "cuda" in found:
        torch.cuda.set_rng_state_all(found["cuda"])
