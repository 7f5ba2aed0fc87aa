"""The four Triton kernels of tree attention; ``triton_tree`` plans and launches them, and says what is what.

One program owns one tile of its output, so nothing is added atomically. It walks the list of blocks that hold a visible
pair: first the full ones, where every query sees every key and no mask is needed, then the others, masked by
``k <= q < end[k]``. Scores are kept in base 2, since a GPU has an instruction for that exponential. Softmax and sums
are float32, products take the inputs' type.

Names: T tokens, GROUP query heads for one key/value head, HEAD the head size, BLOCK_D the power of two that holds it.
Pointers come with their strides over heads and over tokens; the head dimension is dense.
T and GROUP aren't specialised: for a T that 16 divides Triton would compile anew, and run what no proof saw.

Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2, with the key blocks of a list in place of all of them.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# a first maximum below any score, yet finite: a row that is hidden in its first block would else take -inf from -inf
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def load_tile(base, rows, stride, T, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows of a head as ``(rows, BLOCK_D)``, zeros past the last token and past the head's size."""
    dims = tl.arange(0, BLOCK_D)
    at = base + rows[:, None] * stride + dims[None, :]
    if HEAD == BLOCK_D:
        if BOUNDED:
            return tl.load(at, mask=rows[:, None] < T, other=0.0)
        else:
            return tl.load(at)
    else:
        inside = (dims[None, :] < HEAD) & (rows[:, None] < T if BOUNDED else True)
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_tile(base, rows, stride, T, tile, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < T) & (dims[None, :] < HEAD)
    tl.store(base + rows[:, None] * stride + dims[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def head_of(base, head, stride):
    """The first element of a head. 64 bits: heads x tokens x size may pass 2^31."""
    return base + head.to(tl.int64) * stride


@triton.jit(do_not_specialize=["T", "GROUP"])
def tree_forward(
    q, k, v, out, lse, end, offsets, masked, index, scale, T, GROUP,
    q_head, q_row, k_head, k_row, v_head, v_row, out_head, out_row,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: ``out`` and the natural log-sum-exp of its scores."""
    block, head = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys, values = head_of(k, head // GROUP, k_head), head_of(v, head // GROUP, v_head)
    query = load_tile(head_of(q, head, q_head), rows, q_row, T, HEAD, BLOCK_D, True)
    top = tl.full((BLOCK_Q,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    first_masked = tl.load(masked + block)
    for at in range(tl.load(offsets + block), first_masked):
        cols = tl.load(index + at) * BLOCK_K + tl.arange(0, BLOCK_K)
        acc, total, top = forward_step(
            acc, total, top, query, rows, cols, keys, values, end, scale, T, k_row, v_row, HEAD, BLOCK_D, False)
    for at in range(first_masked, tl.load(offsets + block + 1)):
        cols = tl.load(index + at) * BLOCK_K + tl.arange(0, BLOCK_K)
        acc, total, top = forward_step(
            acc, total, top, query, rows, cols, keys, values, end, scale, T, k_row, v_row, HEAD, BLOCK_D, True)
    # a row past the last token saw nothing; it is not stored, but 0 / 0 would warn in the interpreter
    total = tl.where(rows < T, total, 1.0)
    store_tile(head_of(out, head, out_head), rows, out_row, T, acc / total[:, None], HEAD, BLOCK_D)
    tl.store(lse + head * T + rows, (top + tl.log2(total)) / LOG2_E, mask=rows < T)


@triton.jit
def forward_step(
    acc, total, top, query, rows, cols, keys, values, end, scale, T, k_row, v_row,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys taken into the running maximum, sum and output (online softmax)."""
    key = load_tile(keys, cols, k_row, T, HEAD, BLOCK_D, MASKED)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E)
    if MASKED:
        stops = tl.load(end + cols, mask=cols < T, other=0)
        seen = (cols[None, :] <= rows[:, None]) & (rows[:, None] < stops[None, :])
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    value = load_tile(values, cols, v_row, T, HEAD, BLOCK_D, MASKED)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(weights, 1), new_top


@triton.jit(do_not_specialize=["T"])
def tree_delta(
    out, grad_out, delta, T, out_head, out_row, grad_head, grad_row,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """``delta = sum(out * grad_out)`` over the head's size: what softmax's derivative takes from each row."""
    block, head = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    left = load_tile(head_of(out, head, out_head), rows, out_row, T, HEAD, BLOCK_D, True)
    right = load_tile(head_of(grad_out, head, grad_head), rows, grad_row, T, HEAD, BLOCK_D, True)
    tl.store(delta + head * T + rows, tl.sum(left.to(tl.float32) * right.to(tl.float32), 1), mask=rows < T)


@triton.jit(do_not_specialize=["T", "GROUP"])
def tree_dkdv(
    q, k, v, grad_out, dk, dv, lse, delta, end, offsets, masked, index, scale, T, GROUP,
    q_head, q_row, k_head, k_row, v_head, v_row, grad_head, grad_row, dk_head, dk_row, dv_head, dv_row,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key/value head: dK and dV, summed over the group's query heads right here."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    cols = block * BLOCK_K + tl.arange(0, BLOCK_K)
    key = load_tile(head_of(k, kv_head, k_head), cols, k_row, T, HEAD, BLOCK_D, True)
    value = load_tile(head_of(v, kv_head, v_head), cols, v_row, T, HEAD, BLOCK_D, True)
    stops = tl.load(end + cols, mask=cols < T, other=0)
    grad_key = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    grad_value = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    first, first_masked, last = tl.load(offsets + block), tl.load(masked + block), tl.load(offsets + block + 1)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        queries, grads = head_of(q, head, q_head), head_of(grad_out, head, grad_head)
        for at in range(first, first_masked):
            rows = tl.load(index + at) * BLOCK_Q + tl.arange(0, BLOCK_Q)
            grad_key, grad_value = dkdv_step(
                grad_key, grad_value, key, value, stops, rows, cols, queries, grads, lse + head * T, delta + head * T,
                scale, T, q_row, grad_row, HEAD, BLOCK_D, False)
        for at in range(first_masked, last):
            rows = tl.load(index + at) * BLOCK_Q + tl.arange(0, BLOCK_Q)
            grad_key, grad_value = dkdv_step(
                grad_key, grad_value, key, value, stops, rows, cols, queries, grads, lse + head * T, delta + head * T,
                scale, T, q_row, grad_row, HEAD, BLOCK_D, True)
    store_tile(head_of(dk, kv_head, dk_head), cols, dk_row, T, grad_key * scale, HEAD, BLOCK_D)
    store_tile(head_of(dv, kv_head, dv_head), cols, dv_row, T, grad_value, HEAD, BLOCK_D)


@triton.jit
def dkdv_step(
    grad_key, grad_value, key, value, stops, rows, cols, queries, grads, lse, delta, scale, T, q_row, grad_row,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of queries added. Tiles stand as ``(keys, queries)``, so that both products sum over queries."""
    query = load_tile(queries, rows, q_row, T, HEAD, BLOCK_D, MASKED)
    sums = tl.load(lse + rows, mask=rows < T, other=0.0)
    weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * LOG2_E) - sums[None, :] * LOG2_E)
    if MASKED:
        seen = (cols[:, None] <= rows[None, :]) & (rows[None, :] < stops[:, None])
        weights = tl.where(seen, weights, 0.0)
    grad = load_tile(grads, rows, grad_row, T, HEAD, BLOCK_D, MASKED)
    grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision="ieee")
    taken = tl.load(delta + rows, mask=rows < T, other=0.0)
    grad_scores = weights * (tl.dot(value, tl.trans(grad), input_precision="ieee") - taken[None, :])
    return tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision="ieee"), grad_value


@triton.jit(do_not_specialize=["T", "GROUP"])
def tree_dq(
    q, k, v, grad_out, dq, lse, delta, end, offsets, masked, index, scale, T, GROUP,
    q_head, q_row, k_head, k_row, v_head, v_row, grad_head, grad_row, dq_head, dq_row,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: dQ."""
    block, head = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys, values = head_of(k, head // GROUP, k_head), head_of(v, head // GROUP, v_head)
    query = load_tile(head_of(q, head, q_head), rows, q_row, T, HEAD, BLOCK_D, True)
    grad = load_tile(head_of(grad_out, head, grad_head), rows, grad_row, T, HEAD, BLOCK_D, True)
    sums = tl.load(lse + head * T + rows, mask=rows < T, other=0.0) * LOG2_E
    taken = tl.load(delta + head * T + rows, mask=rows < T, other=0.0)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    first_masked = tl.load(masked + block)
    for at in range(tl.load(offsets + block), first_masked):
        cols = tl.load(index + at) * BLOCK_K + tl.arange(0, BLOCK_K)
        acc = dq_step(
            acc, query, grad, sums, taken, rows, cols, keys, values, end, scale, T, k_row, v_row, HEAD, BLOCK_D, False)
    for at in range(first_masked, tl.load(offsets + block + 1)):
        cols = tl.load(index + at) * BLOCK_K + tl.arange(0, BLOCK_K)
        acc = dq_step(
            acc, query, grad, sums, taken, rows, cols, keys, values, end, scale, T, k_row, v_row, HEAD, BLOCK_D, True)
    store_tile(head_of(dq, head, dq_head), rows, dq_row, T, acc * scale, HEAD, BLOCK_D)


@triton.jit
def dq_step(
    acc, query, grad, sums, taken, rows, cols, keys, values, end, scale, T, k_row, v_row,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys added."""
    key = load_tile(keys, cols, k_row, T, HEAD, BLOCK_D, MASKED)
    weights = tl.exp2(tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E) - sums[:, None])
    if MASKED:
        stops = tl.load(end + cols, mask=cols < T, other=0)
        seen = (cols[None, :] <= rows[:, None]) & (rows[:, None] < stops[None, :])
        weights = tl.where(seen, weights, 0.0)
    value = load_tile(values, cols, v_row, T, HEAD, BLOCK_D, MASKED)
    grad_scores = weights * (tl.dot(grad, tl.trans(value), input_precision="ieee") - taken[:, None])
    return tl.dot(grad_scores.to(key.dtype), key, acc, input_precision="ieee")
