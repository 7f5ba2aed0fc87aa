"""Cascade attention: exact attention over a packed prefix tree, without a mask of T x T and without waste.

Depth first, the subtree of a segment of tokens is one contiguous slice. So each segment's keys meet the queries of its
subtree in one call of an ordinary attention primitive; a query that has several such parts gets them merged by their
log-sum-exp. The backward pass is exact too: each part's backward pass is called with the *merged* output and the
*merged* log-sum-exp, which makes the primitive recompute the probabilities of the whole softmax::

    plan = plan_tree(end)                                       # once for a tree
    out = cascade_attention(q, k, v, plan)                      # in every layer

Source: the merge is that of FlashAttention's split keys (arXiv 2205.14135), its backward pass that of ring attention
(arXiv 2310.01889). Shared prefixes: see also PrefixGrouper (arXiv 2506.05433).
"""

import torch

from .backends import Backend, choose_backend, primitive
from .plan import Call, TreePlan
from .reference import dense_attention, visible_mask


def cascade_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: TreePlan,
    scale: float | None = None,
    backend: str | Backend = "auto",
) -> torch.Tensor:
    """Attention in which query i sees key j iff j <= i < end[j].

    Args:
        q: ``(1, H, T, D)``. k, v: ``(1, KV, T, D)``; H is a multiple of KV. Any strides with the last one 1.
        plan: of the same T tokens, from :func:`stkit_kernels.plan.plan_tree`.
        scale: of the scores; None for D ** -0.5.
        backend: a name for :func:`stkit_kernels.backends.choose_backend`, or what it returned.

    Returns:
        ``(1, H, T, D)`` of q's dtype. Differentiable in q, k and v.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit together, a backend that is not usable.
    """
    _check(q, k, v, plan)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(backend, str):
        backend = choose_backend(q.device, q.dtype, q.shape[-1], backend)
    if backend.style == "dense":
        if "mask" not in plan.cache:
            plan.cache["mask"] = visible_mask(plan.end)
        return dense_attention(q, k, v, plan.cache["mask"], scale)
    if backend.name == "cpu-flash" and len(plan.segments) == 1:  # a chain: torch's own call of this very primitive
        gqa = q.shape[1] != k.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    attend = {"padded": _Padded, "varlen": _Variable, "triton": _Triton}[backend.style]
    out = attend.apply(*(x[0].transpose(0, 1) for x in (q, k, v)), plan, scale, backend.name)
    return out.transpose(0, 1)[None]


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: TreePlan) -> None:
    if q.dim() != 4 or q.shape[0] != 1 or k.shape != v.shape or k.dim() != 4 or k.shape[0] != 1:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: give (1, heads, T, D), k and v alike"
        )
    if q.shape[2:] != k.shape[2:] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}: T and D must agree, H be a multiple of KV")
    if q.shape[2] != len(plan):
        raise ValueError(f"{q.shape[2]} tokens and a plan for {len(plan)}: make the plan of this very tree")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device, plan.end.device}) > 1:
        kinds = ", ".join(f"{n} {x.dtype} on {x.device}" for n, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"{kinds}, plan on {plan.end.device}: bring them to one dtype and device")


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge a part of the softmax into ``out (..., D)`` and ``lse (...)``, in place.

    A log-sum-exp of minus infinity stands for nothing yet.
    """
    share = torch.sigmoid(part_lse - lse)[..., None]
    out.lerp_(part.to(out.dtype), share.to(out.dtype))
    torch.logaddexp(lse, part_lse, out=lse)


class _Padded(torch.autograd.Function):
    """q ``(T, H, D)``, k and v ``(T, KV, D)`` by a padded primitive."""

    @staticmethod
    def forward(ctx, q, k, v, plan: TreePlan, scale: float, name: str):
        out, lse = _first_part(q, k, v, plan, scale, name)
        for call in plan.calls[1:]:
            _merge_rows(out, lse, call, *_padded_part(q, k, v, call, scale, name))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.name = plan, scale, name
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = _wide_zeros(q), torch.empty_like(k), torch.empty_like(v)  # each key is in one call
        for call in ctx.plan.calls:
            taken = [call.q.take(x).transpose(1, 2) for x in (grad, q, out, lse)]
            if call.real is not None:  # what only fills up has no gradient
                taken[0] = taken[0] * call.q_kept.to(grad.dtype)[:, None, :, None]
            keys = [call.k.take(x).transpose(1, 2) for x in (k, v)]
            back = primitive(ctx.name).backward
            parts = back(taken[0], taken[1], *keys, *taken[2:], True, call.mask, ctx.scale)
            parts = [part.transpose(1, 2) for part in parts]
            _add_rows(dq, call, parts[0])
            for total, part in ((dk, parts[1]), (dv, parts[2])):
                if call.k.index is None:
                    call.k.take(total).copy_(part)
                else:
                    _put(total, call.k.index, part.flatten(0, 1), call.k_real)
        return dq.to(q.dtype), dk, dv, None, None, None


def _wide_zeros(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _padded_part(q, k, v, call: Call, scale: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One call's output ``(count, q_len, H, D)`` and log-sum-exp ``(count, q_len, H)``."""
    rows = (call.q.take(q), call.k.take(k), call.k.take(v))
    out, lse = primitive(name).forward(*(x.transpose(1, 2) for x in rows), True, call.mask, scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _first_part(q, k, v, plan: TreePlan, scale: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``(T, H, D)`` and log-sum-exp ``(T, H)`` after the first call: that of a single root is of all tokens."""
    call = plan.calls[0]
    part, part_lse = _padded_part(q, k, v, call, scale, name)
    wide = torch.promote_types(q.dtype, torch.float32)
    if call.q.index is None and call.count * call.q_len == len(plan):
        return part.flatten(0, 1).to(wide), part_lse.flatten(0, 1).to(wide)
    out = _wide_zeros(q)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=wide, device=q.device)
    _merge_rows(out, lse, call, part, part_lse)
    return out, lse


def _merge_rows(out, lse, call: Call, part, part_lse) -> None:
    """Merge a call's part into the rows that it is of."""
    if call.q.index is None:
        merge(call.q.take(out), call.q.take(lse), part, part_lse)
        return
    part, part_lse, index = part.flatten(0, 1), part_lse.flatten(0, 1), call.q.index
    if call.real is not None:
        part, part_lse, index = part[call.real], part_lse[call.real], index[call.real]
    rows, rows_lse = out[index], lse[index]
    merge(rows, rows_lse, part, part_lse)
    out.index_copy_(0, index, rows)
    lse.index_copy_(0, index, rows_lse)


def _add_rows(total, call: Call, part) -> None:
    if call.q.index is None:
        call.q.take(total).add_(part)
    else:
        part = part.flatten(0, 1)
        index = call.q.index
        if call.real is not None:
            part, index = part[call.real], index[call.real]
        total.index_add_(0, index, part.to(total.dtype))


def _put(total, index, part, real) -> None:
    if real is not None:
        part, index = part[real], index[real]
    total.index_copy_(0, index, part)


class _Variable(torch.autograd.Function):
    """q ``(T, H, D)``, k and v ``(T, KV, D)`` by a varlen primitive."""

    @staticmethod
    def forward(ctx, q, k, v, plan: TreePlan, scale: float, name: str):
        forward = primitive(name).forward
        own, *above = plan.varlen()
        out, lse = forward(q.contiguous(), k.contiguous(), v.contiguous(), *own.bounds, True, scale)
        out, lse = out.to(torch.promote_types(q.dtype, torch.float32)), lse.transpose(0, 1).contiguous()
        for call in above:
            part, part_lse = forward(q[call.q_rows], k[call.k_rows], v[call.k_rows], *call.bounds, False, scale)
            rows, rows_lse = out[call.q_rows], lse[call.q_rows]
            merge(rows, rows_lse, part, part_lse.transpose(0, 1))
            out[call.q_rows], lse[call.q_rows] = rows, rows_lse
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.name = plan, scale, name
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        back = primitive(ctx.name).backward
        totals = [_wide_zeros(x) for x in (q, k, v)]
        for call in ctx.plan.varlen():
            queries, keys = slice(None) if call.q_rows is None else call.q_rows, call.k_rows
            keys = slice(None) if keys is None else keys
            taken = [x[queries].contiguous() for x in (grad, q)] + [x[keys].contiguous() for x in (k, v)]
            taken += [out[queries].contiguous(), lse[queries].transpose(0, 1).contiguous()]
            parts = back(*taken, *call.bounds, call.causal, ctx.scale)
            for total, rows, part in zip(totals, (queries, keys, keys), parts):
                total[rows] += part  # no row comes twice in a call
        return *(total.to(x.dtype) for total, x in zip(totals, (q, k, v))), None, None, None


class _Triton(torch.autograd.Function):
    """The same by one Triton kernel over the whole tree: q ``(T, H, D)``, k and v ``(T, KV, D)``."""

    @staticmethod
    def forward(ctx, q, k, v, plan: TreePlan, scale: float, name: str):
        from . import triton_tree

        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        if "triton" not in plan.cache:
            plan.cache["triton"] = triton_tree.plan_blocks(plan.end, *triton_tree.tile_of(q.shape[-1])).to(q.device)
        out, lse = triton_tree.tree_attention_forward(q, k, v, plan.cache["triton"], scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.scale = plan.cache["triton"], scale
        return out[0].transpose(0, 1)

    @staticmethod
    def backward(ctx, grad):
        from . import triton_tree

        q, k, v, out, lse = ctx.saved_tensors
        grad = grad.transpose(0, 1)[None].contiguous()
        parts = triton_tree.tree_attention_backward(grad, q, k, v, out, lse, ctx.blocks, ctx.scale)
        return *(part[0].transpose(0, 1) for part in parts), None, None, None
