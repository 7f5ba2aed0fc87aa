"""Frames to patches on a GPU: bytes in, normalised patches out, one launch and nothing between.

``patchify`` calls it. Each program writes a part of one row, so writes are whole lines; a patch's neighbours find in
the cache what it left of the lines that it read.

Not run on a GPU: equal to the torch version in Triton's interpreter, and compiled by ``make kernels``.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # numbers of a row that one program writes


@triton.jit
def patch_rows(
    frames, out, mean, std, count, tall, wide, frame_stride, line_stride, pixel_stride, channel_stride,
    PATCH: tl.constexpr, MERGE: tl.constexpr, TEMPORAL: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of one row.

    frames uint8 ``(count, H, W, C)`` with its four strides; out ``(N, C * TEMPORAL * PATCH * PATCH)``; mean and std
    float32 ``(C,)`` of bytes; tall and wide: tokens of a frame's sides.
    """
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    size: tl.constexpr = CHANNELS * TEMPORAL * PATCH * PATCH
    inside = at < size
    # row = ((time, token y, token x), patch y, patch x)
    patch_x = row % MERGE
    patch_y = row // MERGE % MERGE
    token = row // (MERGE * MERGE)
    left = (token % wide * MERGE + patch_x) * PATCH
    top = (token // wide % tall * MERGE + patch_y) * PATCH
    time = token // (wide * tall) * TEMPORAL
    # column = (channel, frame, y, x)
    x = left + at % PATCH
    y = top + at // PATCH % PATCH
    frame = tl.minimum(time + at // (PATCH * PATCH) % TEMPORAL, count - 1)  # filled up with the last
    channel = at // (TEMPORAL * PATCH * PATCH)
    # 64 bits: a long film has more than 2^31 bytes
    place = frame.to(tl.int64) * frame_stride + y.to(tl.int64) * line_stride
    place += x.to(tl.int64) * pixel_stride + channel.to(tl.int64) * channel_stride
    value = tl.load(frames + place, mask=inside, other=0).to(tl.float32)
    shift = tl.load(mean + channel, mask=inside, other=0.0)
    scale = tl.load(std + channel, mask=inside, other=1.0)
    value = tl.div_rn(value - shift, scale)
    tl.store(out + row.to(tl.int64) * size + at, value.to(out.dtype.element_ty), mask=inside)


def patchify_in_triton(
    frames: torch.Tensor,
    patch: int,
    merge: int,
    temporal_patch: int,
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``patchify`` with arguments that are checked already.

    mean and std: float32 ``(C,)`` of bytes, on the frames' device. The frames may have any strides, no copy is made.
    """
    count, height, width, channels = frames.shape
    tall, wide = height // (patch * merge), width // (patch * merge)
    size = channels * temporal_patch * patch * patch
    rows = -(-count // temporal_patch) * tall * wide * merge * merge
    out = torch.empty(rows, size, dtype=dtype, device=frames.device)
    with torch.cuda.device_of(frames):
        patch_rows[(rows, triton.cdiv(size, BLOCK))](
            frames, out, mean, std, count, tall, wide, *frames.stride(),
            PATCH=patch, MERGE=merge, TEMPORAL=temporal_patch, CHANNELS=channels, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def aot_cases() -> list[tuple]:
    """(name, function, signature, constexprs, warps, stages, divisible arguments) of what a GPU would run."""
    integers = ("count", "tall", "wide", "frame_stride", "line_stride", "pixel_stride", "channel_stride")
    cases = []
    for kind in ("fp32", "fp16", "bf16"):
        for patch in (14, 16):  # Qwen2-VL and Qwen2.5-VL, Qwen3-VL
            pointers = {"frames": "*u8", "out": f"*{kind}", "mean": "*fp32", "std": "*fp32"}
            constants = {"PATCH": patch, "MERGE": 2, "TEMPORAL": 2, "CHANNELS": 3, "BLOCK": BLOCK}
            signature = pointers | dict.fromkeys(integers, "i32")
            cases.append((f"patchify {patch} {kind}", patch_rows, signature, constants, 4, 1, tuple(pointers)))
    return cases
