"""The vision tower, run once a video: windows of equal length in one attention call, the patch embedding as a matrix.

Qwen's towers attend within windows: Qwen2.5-VL within squares of a frame (and in a few layers within whole frames),
Qwen2-VL and Qwen3-VL within frames. Transformers' path without flash attention calls the attention once a window, in
a Python loop, in every layer: for 32 frames of 360x420 these are 256 calls a layer. Here windows of one length are one
batch (4 calls there), grouped once a video and the same in every layer::

    features = encode_video(model, inputs)
    model(..., mm_encoder_outputs={"video": features})

How: Transformers' own forward pass runs on a view of the tower (see :mod:`stkit.vlm.views`) in which the attention and
the patch embedding are ours.
"""

import copy
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..runtime import BadUse, StkitError, explain_memory
from .video import VideoInputs
from .views import active, view


def encode_video(model, video: VideoInputs | None, grad: bool | None = None):
    """The output of the vision tower for one video (None for None), to be shared by everything that is asked of it.

    The attention is the one the model was loaded with ("sdpa", "eager", any registered one), called with a batch of
    windows. Where that is a flash attention, Transformers' own call is one already and stays.

    Args:
        model: Qwen2-VL, Qwen2.5-VL or Qwen3-VL "ForConditionalGeneration" of Transformers, or a peft model around it.
        video: from :func:`stkit.vlm.video.prepare`, on the CPU or where the tower is.
        grad: None: with a graph if a parameter of the tower is trainable (LoRA's count) and gradients are enabled
            where this is called, otherwise without one. True: with a graph, under ``torch.no_grad()`` too. False:
            without. Without a graph nothing is kept of the layers, and the features can still be used in training.

    Returns:
        What ``model.get_video_features`` returns: ``pooler_output``, a tuple of one ``(N / merge**2, hidden)`` in the
        tower's dtype, and for Qwen3-VL ``deepstack_features``, a list of such tuples. It is what the model takes as
        ``mm_encoder_outputs={"video": ...}``. Equal to Transformers' to rounding (float32: 1e-5).

    Raises:
        StkitError: no such model; pixels and grid that disagree; pixels of another dtype or device, or not finite;
            an output that is not finite; out of memory. BadUse: a graph was asked for where none can be.
    """
    return None if video is None else encode_videos(model, [video], grad)[0]


def encode_videos(model, videos: Sequence[VideoInputs], grad: bool | None = None) -> list:
    """The output of the vision tower for each of several videos, computed in one pass over all of them.

    For small towers, where what a call costs beside its products weighs most. See :func:`encode_video`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    core = getattr(base, "model", None)
    tower = active(getattr(core, "visual", None))
    if not hasattr(tower, "blocks") or not hasattr(tower, "patch_embed"):
        raise StkitError(f"{type(base).__name__} has no vision tower of a Qwen-VL: give a Qwen2-VL, 2.5-VL or 3-VL")
    checked = [_checked(tower, video) for video in videos]
    pixels, grids = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*checked))
    graph = _graph_wanted(tower, grad)
    plan = f"{len(pixels)} patches of {_said(videos)} went through the vision tower"
    with torch.set_grad_enabled(graph), explain_memory(plan, "lower frames or max_pixels"):
        features = view(core, visual=_batched(tower)).get_video_features(pixels, grids, return_dict=True)
    if not all(part.isfinite().all() for part in features.pooler_output):
        dtype = str(features.pooler_output[0].dtype).removeprefix("torch.")
        advice = "load the model in float32 or bfloat16" if dtype == "float16" else "look for NaN among its weights"
        raise StkitError(f"the vision tower's output is not finite (in {dtype}; the pixels are): {advice}")
    return [features] if len(videos) == 1 else _parted(features, len(videos))


def _said(videos: Sequence[VideoInputs]) -> str:
    return "a video" if len(videos) == 1 else f"{len(videos)} videos"


def _parted(features, count: int) -> list:
    """The features of several videos as those of each."""
    found = [copy.copy(features) for _ in range(count)]
    for k, one in enumerate(found):
        one.pooler_output = features.pooler_output[k : k + 1]
        if getattr(features, "deepstack_features", None) is not None:
            one.deepstack_features = [level[k : k + 1] for level in features.deepstack_features]
    return found


@dataclass(frozen=True, eq=False)
class Windows:
    """Attention windows by length.

    order: int64 ``(T,)``, the tokens sorted by the length of their window (stable, so windows stay whole), or None
    where they are so already. back: its inverse. batches: ``(windows, length)`` of each length, ascending, in order.
    """

    order: torch.Tensor | None
    back: torch.Tensor | None
    batches: tuple[tuple[int, int], ...]


def group_windows(cu_seqlens: torch.Tensor) -> Windows:
    """Sort windows by length, so that those of one length lie side by side and are a batch by a mere view.

    Args:
        cu_seqlens: integers ``(windows + 1,)``, where each window begins, then T. Empty windows are left out.

    Returns:
        :class:`Windows`, on the device of ``cu_seqlens`` (read from there once).
    """
    lengths = cu_seqlens.detach().cpu().long().diff()
    lengths = lengths[lengths > 0]
    sizes, counts = lengths.unique(return_counts=True)
    batches = tuple(zip(counts.tolist(), sizes.tolist()))
    if (lengths.diff() >= 0).all():
        return Windows(None, None, batches)
    order = lengths.repeat_interleave(lengths).argsort(stable=True)
    return Windows(order.to(cu_seqlens.device), order.argsort().to(cu_seqlens.device), batches)


def _batched(tower: nn.Module) -> nn.Module:
    """A view of the tower with windows in batches and the patch embedding as a matrix product.

    Raises:
        StkitError: something put a forward of its own on the tower or on a block, which a view would call in vain.
    """
    for module in (tower, *tower.blocks):
        if "forward" in vars(module) and not hasattr(module, "_old_forward"):
            raise StkitError(f"the forward pass of this {type(module).__name__} was replaced: encode the video without")
    children = {}
    embed = tower.patch_embed
    if type(embed.proj) is nn.Conv3d:  # with LoRA on it, it is more than its weight, and stays as it is
        children["patch_embed"] = view(embed, _embed_patches)
    if "flash" not in tower.config._attn_implementation:
        grouped = functools.cache(group_windows)  # by identity, as tensors are hashed: once a video, not once a layer
        blocks = (view(b, attn=view(active(b.attn), _attend_in_batches, grouped)) for b in tower.blocks)
        children["blocks"] = nn.ModuleList(blocks)
    return view(tower, **children)


def _embed_patches(embed: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Patches ``(N, 3 * temporal_patch * patch * patch)`` to ``(N, hidden)``: a convolution whose kernel is its stride
    sees each patch once, so it is one product with the weight seen as a matrix (a view, no copy)."""
    weight = embed.proj.weight
    return F.linear(pixels.to(weight.dtype), weight.flatten(1), embed.proj.bias)


def _attend_in_batches(
    attn: nn.Module,
    grouped,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    max_seqlen: int | None = None,
    **kwargs,
) -> torch.Tensor:
    """The forward pass of a vision attention with one call for each window length.

    Args:
        attn: the layer; its ``qkv`` and ``proj`` are called as they are (LoRA, NF4).
        grouped: ``cu_seqlens`` to :class:`Windows`.
        hidden_states: ``(T, hidden)``. cu_seqlens: ``(windows + 1,)``.
        position_embeddings: cosine and sine, ``(T, D)`` each. max_seqlen: for flash attention only.

    Returns:
        ``(T, hidden)``.

    Source: Transformers, Qwen2_5_VLVisionAttention.forward (that of Qwen2-VL and Qwen3-VL are the same).
    """
    windows: Windows = grouped(cu_seqlens)
    count, (cos, sin) = len(hidden_states), position_embeddings
    if windows.order is not None:
        hidden_states, cos, sin = (x.index_select(0, windows.order) for x in (hidden_states, cos, sin))
    qkv = attn.qkv(hidden_states).reshape(count, 3, attn.num_heads, -1)
    query_key, value = _rotated(qkv[:, :2], cos, sin), qkv[:, 2]
    found, start = [], 0
    for number, length in windows.batches:
        rows = slice(start, start + number * length)
        q, k, v = (
            tensor[rows].unflatten(0, (number, length)).transpose(1, 2)  # (windows, H, length, D)
            for tensor in (query_key[:, 0], query_key[:, 1], value)
        )
        out, _ = _interface(attn)(
            attn, q, k, v, attention_mask=None, scaling=attn.scaling, is_causal=False,
            dropout=attn.attention_dropout if attn.training else 0.0, **kwargs,
        )  # fmt: skip
        found.append(out.reshape(number * length, -1))
        start = rows.stop
    out = attn.proj(torch.cat(found) if len(found) > 1 else found[0])
    return out if windows.back is None else out.index_select(0, windows.back)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on ``(T, 2, H, D)``, in float32, by cosine and sine ``(T, D)``."""
    cos, sin, turned = cos[:, None, None].float(), sin[:, None, None].float(), x.float()
    first, second = turned.chunk(2, dim=-1)
    return (turned * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def _interface(attn: nn.Module):
    """The attention function that the model was loaded with."""
    name = attn.config._attn_implementation
    if name == "eager":  # the only one that is not registered: each family has its own
        return sys.modules[type(attn).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def _graph_wanted(tower: nn.Module, grad: bool | None) -> bool:
    """Whether to keep a graph: see :func:`encode_video`."""
    trainable = any(parameter.requires_grad for parameter in tower.parameters())
    if not grad:
        return grad is None and trainable and torch.is_grad_enabled()
    if not trainable:
        raise BadUse("grad=True, but no parameter of the vision tower is trainable: leave grad out, or unfreeze some")
    if torch.is_inference_mode_enabled():
        raise BadUse("grad=True under torch.inference_mode(), where there are no graphs: use torch.no_grad() there")
    return True


def _checked(tower: nn.Module, video: VideoInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels ``(N, C)`` and grid ``(1, 3)`` where the tower is, if they make sense to it."""
    pixels, grid, weight = video.pixel_values, video.grid_thw, tower.patch_embed.proj.weight
    merge, columns = tower.spatial_merge_size, math.prod(weight.shape[1:])
    if grid.shape != (3,) or grid.is_floating_point() or not (grid > 0).all() or (grid[1:] % merge).any():
        wanted = f"3 positive integers (t, h, w), h and w multiples of {merge}"
        raise StkitError(f"grid_thw is {grid.tolist()}: it must be {wanted}, as stkit.vlm.video.prepare gives it")
    t, h, w = grid.tolist()
    if pixels.shape != (t * h * w, columns):
        wanted = f"{t}x{h}x{w} patches for this tower are ({t * h * w}, {columns})"
        raise StkitError(f"pixel_values are {tuple(pixels.shape)}, but {wanted}: use the model's own processor")
    if pixels.dtype not in (torch.float32, weight.dtype):
        raise StkitError(f"pixel_values are {pixels.dtype}: give float32, as stkit.vlm.video.prepare does")
    if weight.is_meta or pixels.device.type != "cpu" and pixels.device != weight.device:
        fix = "load the weights" if weight.is_meta else "leave the pixels on the CPU or move them there"
        raise StkitError(f"pixel_values are on {pixels.device}, the vision tower on {weight.device}: {fix}")
    finite = pixels.isfinite().all(dim=1)
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        where = f"{int((~finite).sum())} rows, first in row {row} (temporal patch {row // (h * w)}, counted from 0)"
        raise StkitError(f"pixel_values are not finite in {where}: look at the frames they were made of")
    return pixels.to(weight.device), grid[None].to(weight.device)
