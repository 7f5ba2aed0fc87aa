"""Attention over a packed tree in Triton: one launch forward, three backward; blocks that nobody sees are never read.

The tree lies depth first in one sequence of T tokens, ``end[k]`` is one past the last token of token k's subtree, and
query q sees key k iff ``k <= q < end[k]``. Which blocks of queries see which blocks of keys depends on the tree only:
it is worked out once and reused by every layer::

    blocks = plan_blocks(end, *tile_of(head_size)).to(q.device)
    out, lse = tree_attention_forward(q, k, v, blocks, scale=head_size**-0.5)
    dq, dk, dv = tree_attention_backward(grad_out, q, k, v, out, lse, blocks, scale=head_size**-0.5)

On a CPU it runs in Triton's interpreter only (``TRITON_INTERPRET=1`` before triton is imported), slowly: that is for
tests and for stepping through. ``make kernels`` compiles it for the cards of ``aot.CAPABILITIES``; not run on a GPU.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from types import MappingProxyType

import torch
import triton
from triton.runtime import JITFunction

from stkit_kernels.triton_tree_kernels import tree_delta, tree_dkdv, tree_dq, tree_forward

HEAD_SIZES = (16, 32, 64, 80, 128)  # 16 and 32 for small tests; 80 runs in the tile of 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Tile:
    """How one head size is cut.

    Attributes:
        block_q, block_k: queries and keys of a block, the same in all kernels, so that one plan serves them.
        warps: kernel's name to warps of a block.
        stages: kernel's name to stages of the pipelined loads.
    """

    block_q: int
    block_k: int
    warps: Mapping[str, int]
    stages: Mapping[str, int]


def _tile(block_q: int, block_k: int, **kernels: tuple[int, int]) -> Tile:
    warps, stages = ({name: pair[i] for name, pair in kernels.items()} for i in (0, 1))
    return Tile(block_q, block_k, MappingProxyType(warps), MappingProxyType(stages))


# by the power of two that holds the head; chosen by what `make kernels` measures: no spills, shared memory within 99 KB
TILES = MappingProxyType(
    {
        16: _tile(64, 64, forward=(4, 2), delta=(4, 1), dkdv=(4, 2), dq=(4, 2)),
        32: _tile(64, 64, forward=(4, 2), delta=(4, 1), dkdv=(4, 2), dq=(4, 2)),
        64: _tile(64, 64, forward=(4, 3), delta=(4, 1), dkdv=(8, 3), dq=(4, 3)),
        128: _tile(64, 64, forward=(4, 2), delta=(4, 1), dkdv=(8, 2), dq=(8, 2)),
    }
)


def tile_of(head_size: int) -> tuple[int, int]:
    """(block_q, block_k) that the launcher's warps and stages were chosen for."""
    tile = TILES[_block_d(head_size)]
    return tile.block_q, tile.block_k


def _block_d(head_size: int) -> int:
    if head_size not in HEAD_SIZES:
        raise ValueError(f"head size {head_size}: the Triton kernel takes {HEAD_SIZES}; choose another backend")
    return triton.next_power_of_2(head_size)


@dataclass(frozen=True)
class Blocks:
    """Which blocks see which, for one tree and one size of blocks. All tensors int32.

    The key blocks of query block i are ``key_index[key_offsets[i] : key_offsets[i + 1]]``; the full ones, where every
    query sees every key, stand before ``key_masked[i]``. The query blocks of key block j likewise.

    Attributes:
        end: ``(T,)`` one past each token's subtree.
        key_offsets, key_masked, key_index: ``(query blocks + 1,)``, ``(query blocks,)``, ``(visited,)``.
        query_offsets, query_masked, query_index: ``(key blocks + 1,)``, ``(key blocks,)``, ``(visited,)``.
        block_q, block_k: tokens of a block.
        visited: pairs of blocks that hold a visible pair of tokens.
        full: those of them that need no mask.
        visible_pairs: pairs (query, key) of tokens.
    """

    end: torch.Tensor
    key_offsets: torch.Tensor
    key_masked: torch.Tensor
    key_index: torch.Tensor
    query_offsets: torch.Tensor
    query_masked: torch.Tensor
    query_index: torch.Tensor
    block_q: int
    block_k: int
    visited: int
    full: int
    visible_pairs: int

    @cached_property
    def ideal(self) -> float:
        """Pairs of blocks that would do if visible pairs could be moved together."""
        return self.visible_pairs / (self.block_q * self.block_k)

    def to(self, device: torch.device | str) -> "Blocks":
        """The same plan on another device; itself where it is there already."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def plan_blocks(end: torch.Tensor, block_q: int, block_k: int) -> Blocks:
    """Find the blocks worth visiting.

    Args:
        end: integers ``(T,)``, one past the last token of each token's subtree, ``k < end[k] <= T``.
        block_q, block_k: powers of two from 16 (Triton's smallest product); ``tile_of`` names the ones to use on a GPU.

    Returns:
        Blocks on the device of ``end``.

    Raises:
        ValueError: no tokens, an ``end`` that is none, or another size of blocks.
    """
    count = _check_plan(end, block_q, block_k)
    device, end = end.device, end.cpu().long()
    first_q = torch.arange(0, count, block_q)[:, None]
    first_k = torch.arange(0, count, block_k)[None, :]
    stop_q, stop_k = (first_q + block_q).clamp(max=count), first_k + block_k
    rows = torch.nn.functional.pad(end, (0, -count % block_k), value=0).view(-1, block_k)
    # A block of keys that begins above the queries' last one holds something for them iff a subtree reaches their first
    # one: if the keys go on past the queries, the first query that is also a key sees itself.
    some = (first_k < stop_q) & (rows.amax(1) > first_q)
    # full only where both blocks are whole, so that full blocks need no bounds either
    whole = (first_q + block_q <= count) & (stop_k <= count)
    every = some & whole & (stop_k - 1 <= first_q) & (rows.amin(1) >= stop_q)
    lists = (*_lists(some, every), *_lists(some.T, every.T))
    pairs = int((end - torch.arange(count)).sum())
    tensors = [tensor.to(device, torch.int32) for tensor in (end, *lists)]
    return Blocks(*tensors, block_q, block_k, int(some.sum()), int(every.sum()), pairs)


def _check_plan(end: torch.Tensor, block_q: int, block_k: int) -> int:
    for size in (block_q, block_k):
        if size < 16 or size & (size - 1):
            raise ValueError(f"blocks of {block_q} queries and {block_k} keys: give powers of two from 16")
    if end.dim() != 1 or not len(end) or end.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"end of {end.dtype} {tuple(end.shape)}: give integers (T,) with T at least 1")
    token = torch.arange(len(end), device=end.device)
    wrong = (end <= token) | (end > len(end))
    if wrong.any():
        k = int(wrong.nonzero()[0])
        raise ValueError(f"end[{k}] is {int(end[k])}: a subtree of {len(end)} tokens ends in {k + 1}..{len(end)}")
    return len(end)


def _lists(some: torch.Tensor, every: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Offsets, where the masked ones begin, and the columns of each row: full ones first, each kind in rising order."""
    kind = torch.where(every, 0, torch.where(some, 1, 2))
    order = kind.argsort(dim=1, stable=True)
    offsets = torch.nn.functional.pad(some.sum(1).cumsum(0), (1, 0))
    index = order[torch.arange(some.shape[1]) < some.sum(1, keepdim=True)]
    return offsets, offsets[:-1] + every.sum(1), index


def tree_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: Blocks, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the tree, in one launch.

    Args:
        q: ``(1, H, T, D)``, float16 or bfloat16 (float32 for tests); D one of ``HEAD_SIZES``.
        k, v: ``(1, KV, T, D)`` with H a multiple of KV: query head h reads key/value head ``h // (H // KV)``.
            Any strides, as long as the last is 1 (those that 16 doesn't divide are slower: narrow loads); no padding.
        blocks: from ``plan_blocks``, on the same device.
        scale: of the scores, usually ``D ** -0.5``.

    Returns:
        out ``(1, H, T, D)`` like q, and the natural log-sum-exp of each query's scores, float32 ``(1, H, T)``.

    Raises:
        ValueError: shapes, dtypes, devices or strides that the kernel can't take; a CPU without the interpreter.
    """
    _check({"q": q, "k": k, "v": v}, blocks)
    heads, count, size = q.shape[1:]
    out = _like(q)
    lse = q.new_empty((1, heads, count), dtype=torch.float32)
    with _device_of(q):
        tree_forward[(len(blocks.key_masked), heads)](
            q, k, v, out, lse, blocks.end, blocks.key_offsets, blocks.key_masked, blocks.key_index,
            scale, count, heads // k.shape[1], *_strides(q, k, v, out), **_constants("forward", size, blocks),
        )  # fmt: skip
    return out, lse


def tree_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    blocks: Blocks,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``tree_attention_forward``, in three launches and without atomics: the same bits each time.

    Args:
        grad_out: ``(1, H, T, D)``, the gradient of out; copied if its last stride isn't 1.
        q, k, v, blocks, scale: as they went forward.
        out, lse: as they came back.

    Returns:
        dq, dk, dv like q, k, v.

    Raises:
        ValueError: as forward.
    """
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    _check({"q": q, "k": k, "v": v, "out": out, "grad_out": grad_out}, blocks)
    heads, count, size = q.shape[1:]
    kv_heads = k.shape[1]
    wanted = (1, heads, count), torch.float32, q.device
    if (lse.shape, lse.dtype, lse.device) != wanted or not lse.is_contiguous():
        kind = f"{lse.dtype} {tuple(lse.shape)} on {lse.device}"
        raise ValueError(f"lse of {kind}: give the one that the forward pass returned")
    delta, dq, dk, dv = torch.empty_like(lse), _like(q), _like(k), _like(v)
    constants = _constants("delta", size, blocks)
    del constants["BLOCK_K"]
    with _device_of(q):
        tree_delta[(len(blocks.key_masked), heads)](out, grad_out, delta, count, *_strides(out, grad_out), **constants)
        tree_dkdv[(len(blocks.query_masked), kv_heads)](
            q, k, v, grad_out, dk, dv, lse, delta,
            blocks.end, blocks.query_offsets, blocks.query_masked, blocks.query_index,
            scale, count, heads // kv_heads, *_strides(q, k, v, grad_out, dk, dv), **_constants("dkdv", size, blocks),
        )  # fmt: skip
        tree_dq[(len(blocks.key_masked), heads)](
            q, k, v, grad_out, dq, lse, delta, blocks.end, blocks.key_offsets, blocks.key_masked, blocks.key_index,
            scale, count, heads // kv_heads, *_strides(q, k, v, grad_out, dq), **_constants("dq", size, blocks),
        )  # fmt: skip
    return dq, dk, dv


def _constants(kernel: str, head_size: int, blocks: Blocks) -> dict[str, int]:
    tile = TILES[_block_d(head_size)]
    sizes = {"BLOCK_D": _block_d(head_size), "BLOCK_Q": blocks.block_q, "BLOCK_K": blocks.block_k}
    return {"HEAD": head_size, **sizes, "num_warps": tile.warps[kernel], "num_stages": tile.stages[kernel]}


def aot_cases() -> list[tuple]:
    """What ``make kernels`` compiles: (name, kernel, signature, constexprs, warps, stages, divisible arguments)."""
    kernels = {"forward": tree_forward, "delta": tree_delta, "dkdv": tree_dkdv, "dq": tree_dq}
    plain = {"end": "*i32", "offsets": "*i32", "masked": "*i32", "index": "*i32", "lse": "*fp32", "delta": "*fp32"}
    plain |= {"scale": "fp32", "T": "i32", "GROUP": "i32"}
    cases = []
    for size, dtype, (name, kernel) in product((64, 80, 128), ("fp16", "bf16"), kernels.items()):
        tile = TILES[_block_d(size)]
        sizes = {"HEAD": size, "BLOCK_D": _block_d(size), "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
        constants = {key: value for key, value in sizes.items() if key in kernel.arg_names}
        strides = {arg: "i32" for arg in kernel.arg_names if arg.endswith(("_head", "_row"))}
        signature = {arg: (plain | strides).get(arg, f"*{dtype}") for arg in kernel.arg_names if arg not in constants}
        divisible = tuple(arg for arg, kind in signature.items() if kind.startswith("*") or arg in strides)
        named = f"tree {name} D={size} {dtype}"
        cases.append((named, kernel, signature, constants, tile.warps[name], tile.stages[name], divisible))
    return cases


def _device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current GPU, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[1:3]]


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor)  # keeps the order of dimensions: a (T, H, D) layout stays one


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: decided when triton_tree was imported."""
    return not isinstance(tree_forward, JITFunction)


def _check(tensors: dict[str, torch.Tensor], blocks: Blocks) -> None:
    """Everything that a launch assumes, said before it goes wrong silently."""
    q, k = tensors["q"], tensors["k"]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if q.dim() != 4 or len(q) != 1 or shapes["k"] != shapes["v"] or k.dim() != 4:
        raise ValueError(f"{shapes}: give q (1, H, T, D), k and v (1, KV, T, D)")
    _block_d(q.shape[3])
    kv_shape = (1, k.shape[1], *q.shape[2:])
    wanted = {name: kv_shape if name in "kv" else tuple(q.shape) for name in tensors}
    if shapes != wanted:
        raise ValueError(f"{shapes}: q and what is like it share one shape, k and v its tokens and head size")
    if not k.shape[1] or q.shape[1] % k.shape[1] or not q.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads on {k.shape[1]} key/value heads: the first must be a multiple")
    if q.shape[2] != len(blocks.end):
        raise ValueError(f"{q.shape[2]} tokens, but blocks of a tree of {len(blocks.end)}: plan them from this end")
    kinds = {name: f"{tensor.dtype} on {tensor.device}" for name, tensor in tensors.items()}
    if len(set(kinds.values())) > 1 or q.dtype not in DTYPES:
        raise ValueError(f"{kinds}: give one device and one of {', '.join(map(str, DTYPES))}")
    if blocks.end.device != q.device:
        raise ValueError(f"blocks on {blocks.end.device}, q on {q.device}: move them once with blocks.to(q.device)")
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 or tensor.stride(2) * tensor.shape[2] >= 2**31:
            raise ValueError(f"{name} has strides {tensor.stride()}: the last must be 1; use {name}.contiguous()")
    _check_device(q)


def _check_device(q: torch.Tensor) -> None:
    if interpreted():
        if q.dtype == torch.bfloat16:
            raise ValueError("bfloat16 goes wrong silently in Triton's interpreter: use float32 or float16 there")
    elif q.device.type != "cuda":
        hint = "choose another backend, or set TRITON_INTERPRET=1 before triton is imported to step through it slowly"
        raise ValueError(f"the Triton kernel on {q.device.type}: it needs a GPU; {hint}")
    elif torch.cuda.get_device_capability(q.device) < (8, 0):
        name = torch.cuda.get_device_name(q.device)
        raise ValueError(f"{name}: the Triton kernel needs compute capability 8.0; choose another backend")
