"""The primitives under the cascade: attention that gives its log-sum-exp, on each kind of device, and the choice.

    choose_backend(torch.device("cpu"), torch.float32, 64)      # Backend(name='cpu-flash', why="torch's flash attention
    ...")

Two styles. *Padded* takes ``(count, H, L, D)`` with a causal mask from the top left and a mask of filled-up keys;
*varlen* takes ``(tokens, H, D)`` with bounds of sequences. Both return the log-sum-exp (natural log, float32) and have
a backward pass that takes an output and a log-sum-exp which other calls had a part in. Equal head counts are their own
business. CUDA primitives are written against their documented signatures; they are not run on a GPU here.
"""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch

aten = torch.ops.aten
NAMES = ("cpu-flash", "flash-attn", "aten-flash", "aten-efficient", "triton", "dense")
ROUND = 8  # memory-efficient attention reads its bias in vectors of so many numbers


class Backend(NamedTuple):
    """What computes the attention, and why. style: "padded", "varlen", "triton" or "dense"."""

    name: str
    why: str
    style: str


def choose_backend(device: torch.device, dtype: torch.dtype, head_size: int, name: str = "auto") -> Backend:
    """The backend for a device, dtype and head size: the fastest that is usable, or the one that was asked for.

    Args:
        name: "auto", or one of ``NAMES``.

    Raises:
        ValueError: an unknown name, or one that is not usable here, with the reason (never another in its place).
    """
    if name != "auto" and name not in NAMES:
        raise ValueError(f"attention backend {name!r} is unknown: use auto, {', '.join(NAMES)}")
    if name != "auto":
        if reason := obstacle(name, device, dtype, head_size):
            raise ValueError(f"attention backend {name!r} cannot be used: {reason}; use 'auto'")
        return Backend(name, "asked for", _STYLES[name])
    order = ("flash-attn", "aten-flash", "aten-efficient", "dense") if device.type == "cuda" else ("cpu-flash", "dense")
    reasons = []
    for candidate in order:
        reason = obstacle(candidate, device, dtype, head_size)
        if not reason:
            why = "; ".join([_WHY[candidate], *reasons])
            return Backend(candidate, why, _STYLES[candidate])
        reasons.append(f"not {candidate}: {reason}")
    raise AssertionError("the dense mask works everywhere")


_STYLES = {
    "cpu-flash": "padded", "aten-efficient": "padded", "flash-attn": "varlen", "aten-flash": "varlen", "triton": "triton",
    "dense": "dense",
}  # fmt: skip
_WHY = {
    "cpu-flash": "torch's flash attention for CPUs",
    "flash-attn": "flash-attn 2 is installed and this GPU can run it",
    "aten-flash": "torch's own flash attention",
    "aten-efficient": "torch's memory-efficient attention",
    "dense": "a dense mask works on every device",
}


def obstacle(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """What stands in the way of a backend ("" if nothing does)."""
    if name == "dense":
        return ""
    if name == "cpu-flash":
        return "" if device.type == "cpu" else f"it needs tensors on the CPU, these are on {device.type}"
    if name == "triton" and device.type == "cpu":
        import triton

        return "" if triton.knobs.runtime.interpret else "on a CPU it needs TRITON_INTERPRET=1 (slow, for proofs)"
    if device.type != "cuda":
        return f"it needs a CUDA GPU, the tensors are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if name == "aten-efficient":
        usable = dtype != torch.float64 and head_size % 8 == 0
        kind = str(dtype).removeprefix("torch.")
        return "" if usable else f"it takes head sizes that are multiples of 8 and no float64: {head_size}, {kind}"
    if capability[0] < 8:
        return f"it needs compute capability 8, this GPU has {capability[0]}.{capability[1]} (a T4 has 7.5)"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16 only, the tensors are {str(dtype).removeprefix('torch.')}"
    limit = 128 if name == "triton" else 256
    if head_size > limit or head_size % 8:
        return f"it takes head sizes up to {limit} that are multiples of 8, this is {head_size}"
    if name == "flash-attn":
        try:
            _flash_attn()
        except Exception as error:  # built for another torch, it is there and cannot be imported
            return f"flash-attn cannot be imported ({type(error).__name__}): pip install flash-attn"
    return ""


class Primitive(NamedTuple):
    """``forward(...) -> (out, lse)`` and ``backward(grad, ..., out, lse) -> (dq, dk, dv)`` of one style."""

    forward: Callable
    backward: Callable


def primitive(name: str) -> Primitive:
    """The primitive of a padded or varlen backend."""
    return _PRIMITIVES[name]


def _cpu_forward(q, k, v, causal, mask, scale):
    """Padded: q ``(n, H, Lq, D)``, k and v ``(n, KV, Lk, D)``, mask ``(n, 1, 1, Lk)`` or None; lse ``(n, H, Lq)``."""
    mask = None if mask is None else mask.to(q.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def _cpu_backward(grad, q, k, v, out, lse, causal, mask, scale):
    mask = None if mask is None else mask.to(q.dtype)
    call = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return call(grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)


def _efficient_forward(q, k, v, causal, mask, scale):
    groups, queries = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    call = aten._scaled_dot_product_efficient_attention
    out, lse, _, _ = call(q, k, v, _aligned(mask, q), True, 0.0, causal, scale=scale)
    return out, lse[:, :, :queries]  # the kernel rounds its length up


def _efficient_backward(grad, q, k, v, out, lse, causal, mask, scale):
    kv, groups = k.shape[1], q.shape[1] // k.shape[1]
    wide = [x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v)]
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    none = torch.zeros((), dtype=torch.int64, device=q.device)  # seed and offset of a dropout that is off
    call = aten._scaled_dot_product_efficient_attention_backward
    wanted = (True, True, True, False)
    dq, dk, dv, _ = call(grad, q, *wide, _aligned(mask, q), out, lse, none, none, 0.0, wanted, causal, scale=scale)
    dk, dv = (x.unflatten(1, (kv, groups)).sum(2) if groups > 1 else x for x in (dk, dv))
    return dq, dk, dv


def _aligned(mask: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """The mask as a bias ``(n, H, Lq, Lk)`` without copies for heads and queries, its rows at aligned addresses."""
    if mask is None:
        return None
    keys = mask.shape[-1]
    room = torch.nn.functional.pad(mask.to(q.dtype), (0, -keys % ROUND))[..., :keys]
    return room.expand(q.shape[0], q.shape[1], q.shape[2], keys)


def _flash_attn():
    """flash-attn 2, which is not always there."""
    return import_module("flash_attn.flash_attn_interface")


def _flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
    """Varlen: q ``(tokens, H, D)``, k and v ``(keys, KV, D)``; lse ``(H, tokens)``."""
    out, lse, *_ = _flash_attn()._flash_attn_varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, scale, causal)
    return out, lse


def _flash_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale):
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    rest = {
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": False,
    }
    _flash_attn()._flash_attn_varlen_backward(
        grad, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, 0.0, scale, causal, **rest
    )
    return dq, dk, dv


def _aten_flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
    found = aten._flash_attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def _aten_flash_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale):
    none = torch.zeros(2, dtype=torch.uint64, device=q.device)
    call = aten._flash_attention_backward
    return call(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, none, none[0], scale=scale)


_PRIMITIVES = {
    "cpu-flash": Primitive(_cpu_forward, _cpu_backward),
    "aten-efficient": Primitive(_efficient_forward, _efficient_backward),
    "flash-attn": Primitive(_flash_forward, _flash_backward),
    "aten-flash": Primitive(_aten_flash_forward, _aten_flash_backward),
}
