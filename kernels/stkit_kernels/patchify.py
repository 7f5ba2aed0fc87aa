"""Frames to the rows that a Qwen-VL's vision tower takes, in plain torch.

A row is one patch of ``temporal_patch`` frames. Rows are ordered by time, then by video token (merge x merge patches),
then inside the token, so that the tower merges neighbours by reshaping::

    patchify(torch.zeros(2, 28, 28, 3, dtype=torch.uint8), 14, 2, 2, (0.5,) * 3, (0.5,) * 3).shape    # (4, 1176)
"""

from collections.abc import Sequence

import torch


def patchify(
    frames: torch.Tensor, patch: int, merge: int, temporal_patch: int, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Normalise and cut frames.

    Args:
        frames: uint8 ``(T, H, W, C)``; H and W multiples of ``patch * merge``. T that is no multiple of
            ``temporal_patch`` is filled up with the last frame.
        patch: pixels of a patch's side.
        merge: patches of a video token's side.
        temporal_patch: frames of a patch.
        mean, std: C numbers each, of values of 0 to 1.

    Returns:
        float32 ``(N, C * temporal_patch * patch * patch)`` with N = ceil(T / temporal_patch) * H / patch * W / patch.

    Raises:
        ValueError: frames of another type or shape.

    Source: Transformers, Qwen2VLVideoProcessor.patchify and rescale_and_normalize.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 4 or not len(frames):
        raise ValueError(f"frames of {frames.dtype} {tuple(frames.shape)}: give uint8 (T, H, W, C) with T at least 1")
    count, height, width, channels = frames.shape
    if height % (patch * merge) or width % (patch * merge):
        raise ValueError(f"frames of {width}x{height}: both sides must be multiples of {patch * merge}")
    if missing := -count % temporal_patch:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    tall, wide = height // (patch * merge), width // (patch * merge)
    cut = frames.reshape(-1, temporal_patch, tall, merge, patch, wide, merge, patch, channels)
    cut = cut.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    # floats are written once, in their last order, and normalised in place
    values = cut.to(torch.float32, memory_format=torch.contiguous_format)
    by_channel = (channels, 1, 1, 1)
    values.sub_(torch.tensor(mean, device=frames.device).mul_(255).view(by_channel))
    values.div_(torch.tensor(std, device=frames.device).mul_(255).view(by_channel))
    return values.view(-1, channels * temporal_patch * patch * patch)
