"""Frames to the rows that a Qwen-VL's vision tower takes: cut, put in order and normalised in one pass.

A row is one patch of ``temporal_patch`` frames. Rows are ordered by time, then by video token (merge x merge patches),
then inside the token, so that the tower merges neighbours by reshaping::

    patchify(torch.zeros(2, 28, 28, 3, dtype=torch.uint8), 14, 2, 2, (0.5,) * 3, (0.5,) * 3).shape    # (4, 1176)

In torch the bytes are put in order first, a quarter of what floats would move: a patch's line (all its channels, 42
bytes for 14 pixels) moves as a few wide integers. Then each byte becomes a float once, at its last place, and is
normalised there while the block is in the cache. On a GPU ``patchify_triton`` does it all in one launch.
"""

import math
from collections.abc import Sequence

import torch

from stkit_kernels.usable import triton_obstacle

BLOCK = 2048  # rows normalised at once: 10 MB of floats for a patch of 14, where long videos leave the cache
WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "torch", "triton")


def patchify(
    frames: torch.Tensor,
    patch: int,
    merge: int,
    temporal_patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> torch.Tensor:
    """Normalise and cut frames.

    Args:
        frames: uint8 ``(T, H, W, C)``; H and W multiples of ``patch * merge``. T that is no multiple of
            ``temporal_patch`` is filled up with the last frame.
        patch: pixels of a patch's side.
        merge: patches of a video token's side.
        temporal_patch: frames of a patch.
        mean, std: C numbers each, of values of 0 to 1.
        dtype: float32, float16 or bfloat16 of the result; computed in float32.
        backend: "auto", "torch" or "triton"; ``choose_backend`` tells which one auto is.

    Returns:
        ``(N, C * temporal_patch * patch * patch)`` with N = ceil(T / temporal_patch) * H / patch * W / patch.

    Raises:
        ValueError: frames of another type or shape, another dtype, a backend that cannot be used here.

    Source: Transformers, Qwen2VLVideoProcessor.patchify and rescale_and_normalize.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 4 or not frames.numel():
        raise ValueError(f"frames of {frames.dtype} {tuple(frames.shape)}: give uint8 (T, H, W, C) with T at least 1")
    _, height, width, channels = frames.shape
    if height % (patch * merge) or width % (patch * merge):
        raise ValueError(f"frames of {width}x{height}: both sides must be multiples of {patch * merge}")
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean of {len(mean)} and std of {len(std)} numbers: the frames have {channels} channels")
    if dtype not in DTYPES:
        raise ValueError(f"patches of {dtype}: give one of {', '.join(map(str, DTYPES))}")
    # of bytes: 0 to 255
    mean, std = (torch.tensor(x, dtype=torch.float32, device=frames.device).mul_(255) for x in (mean, std))
    if choose_backend(frames.device, dtype, backend) == "triton":
        from stkit_kernels.patchify_triton import patchify_in_triton

        return patchify_in_triton(frames, patch, merge, temporal_patch, mean, std, dtype)
    return _patchify(frames, patch, merge, temporal_patch, mean, std, dtype)


def choose_backend(device: torch.device, dtype: torch.dtype = torch.float32, backend: str = "auto") -> str:
    """Which one cuts: "triton" on a GPU that can, else "torch"; or the one that was asked for.

    Raises:
        ValueError: an unknown name, or one that cannot be used here, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    reason = triton_obstacle(device, dtype)
    if backend == "triton" and reason:
        raise ValueError(f"backend 'triton' cannot be used: {reason}; use 'auto'")
    return "torch" if reason else "triton"


def _patchify(frames, patch, merge, temporal_patch, mean, std, dtype):
    """mean and std: ``(C,)`` float32 of bytes, on the frames' device."""
    pixels = _in_order(frames, patch, merge, temporal_patch)
    rows = torch.empty(pixels.mT.shape, dtype=dtype, device=frames.device)
    for source, target in zip(pixels.mT.split(BLOCK), rows.split(BLOCK)):
        values = target if dtype == torch.float32 else torch.empty(target.shape, device=frames.device)
        values.copy_(source).sub_(mean[:, None]).div_(std[:, None])
        if values is not target:
            target.copy_(values)
    return rows.flatten(1)


def _in_order(frames: torch.Tensor, patch: int, merge: int, temporal_patch: int) -> torch.Tensor:
    """The bytes as ``(N, temporal_patch * patch * patch, C)``, patch after patch."""
    count, height, width, channels = frames.shape
    if missing := -count % temporal_patch:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    line, lines = patch * channels, frames.contiguous().flatten(2)
    unit = math.gcd(line, 8, lines.storage_offset())  # an integer begins at a multiple of its size
    tall, wide = height // (patch * merge), width // (patch * merge)
    cut = lines.view(WIDE[unit]).view(-1, temporal_patch, tall, merge, patch, wide, merge, line // unit)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).contiguous()
    return cut.view(torch.uint8).view(-1, temporal_patch * patch * patch, channels)
