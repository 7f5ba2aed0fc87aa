"""The forward pass over the vocabulary on a GPU: logits live in registers, and only five numbers a row come back.

torch writes the logits of each piece to memory and reads them again some five times. Here a program owns a block of
rows and a share of the vocabulary, and the shares are merged by their maxima afterwards. ``logprob`` calls it where the
forward pass has nothing to give but log-probabilities and entropies. A backward pass is products of matrices with a
log-sum-exp that is known by then: ``logprob_torch`` gives them to cuBLAS.

Not run on a GPU: equal to all logits' softmax in Triton's interpreter, and compiled by ``make kernels``.
"""

import torch
import triton
import triton.language as tl

from stkit_kernels.logprob_torch import LOWEST as LOWEST_SHIFT
from stkit_kernels.logprob_torch import Scan

LOWEST_LOGIT = tl.constexpr(-3.0e38)  # finite: a share that a bias masks with -inf leaves no NaN
SMALLEST_POWER = tl.constexpr(LOWEST_SHIFT)
# rows, tokens and numbers of a hidden state of one product; warps and stages. Chosen by what `make kernels` measures:
# no spills, shared memory within the 99 KB of sm_86 and sm_89
BLOCK_N, BLOCK_V, BLOCK_E, WARPS, STAGES = 128, 128, 64, 8, 3
PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def vocabulary_scan(
    hidden, weight, bias, targets, chosen, top, total, moment, inverse_temperature,
    N, V, E, share, hidden_row, weight_row,
    BIASED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One block of rows and one share of the vocabulary.

    hidden ``(N, E)``, weight ``(V, E)``, bias ``(V,)``, targets int64 ``(N,)``; share: tokens, a multiple of BLOCK_V.
    chosen, top, total, moment: float32 ``(shares, N)``, see ``logprob_torch.Scan``; chosen is 0 where the target lies
    in another share.
    """
    first_row = tl.program_id(0) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_N)
    present = rows < N
    # 64 bits: a vocabulary times a hidden size may pass 2^31; what is added to these inside of a tile does not
    hidden += first_row.to(tl.int64) * hidden_row
    target = tl.load(targets + rows, mask=present, other=-1)
    found = tl.zeros((BLOCK_N,), tl.float32)
    above = tl.full((BLOCK_N,), LOWEST_LOGIT, tl.float32)
    powers = tl.zeros((BLOCK_N,), tl.float32)
    shifts = tl.zeros((BLOCK_N,), tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, V), BLOCK_V):
        tokens = start + tl.arange(0, BLOCK_V)
        heads = weight + tl.cast(start, tl.int64) * weight_row
        logits = products(hidden, heads, N - first_row, V - start, E, hidden_row, weight_row, BLOCK_N, BLOCK_V, BLOCK_E)
        if BIASED:
            logits += tl.load(bias + tokens, mask=tokens < V, other=0.0).to(tl.float32)[None, :]
        logits *= inverse_temperature
        found += tl.sum(tl.where(tokens[None, :] == target[:, None], logits, 0.0), 1)
        logits = tl.where(tokens[None, :] < V, logits, float("-inf"))
        before = above
        above = tl.maximum(before, tl.max(logits, 1))
        shifted = logits - above[:, None]
        power = tl.exp(shifted)
        scale = tl.exp(before - above)
        if ENTROPY:
            shifts = (shifts + powers * (before - above)) * scale
            shifts += tl.sum(tl.maximum(shifted, SMALLEST_POWER) * power, 1)
        powers = powers * scale + tl.sum(power, 1)
    at = tl.program_id(1) * N + rows
    tl.store(chosen + at, found, mask=present)
    tl.store(top + at, above, mask=present)
    tl.store(total + at, powers, mask=present)
    tl.store(moment + at, shifts, mask=present)


@triton.jit
def products(
    left, right, lefts, rights, E, left_row, right_row,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """left @ right.T in float32, with ``lefts`` and ``rights`` rows there; 0 past the last of either."""
    i, j, numbers = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_E)
    left += i[:, None] * left_row + numbers[None, :]
    right += j[None, :] * right_row + numbers[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, E, BLOCK_E):
        inside = start + numbers < E
        a = tl.load(left + start, mask=(i[:, None] < lefts) & inside[None, :], other=0.0)
        b = tl.load(right + start, mask=(j[None, :] < rights) & inside[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    return sums


def scan_in_triton(hidden, weight, bias, targets, temperature: float, entropy: bool) -> Scan:
    """``logprob_torch.scan_vocabulary`` for one target a row, without ``expected``, in one launch.

    Args:
        hidden: ``(N, E)``, float16, bfloat16 or (slow on a GPU) float32.
        weight: ``(V, E)``.
        bias: ``(V,)`` or None.
        targets: int64 ``(N,)``.
    """
    count, size = hidden.shape
    vocabulary = len(weight)
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    targets, bias = targets.contiguous(), None if bias is None else bias.contiguous()
    blocks = triton.cdiv(count, BLOCK_N)
    share = _share(vocabulary, blocks, hidden.device)
    shares = triton.cdiv(vocabulary, share)
    found = torch.empty(4, shares, count, dtype=torch.float32, device=hidden.device)
    if count:
        with torch.cuda.device_of(hidden):
            vocabulary_scan[(blocks, shares)](
                hidden, weight, weight if bias is None else bias, targets, *found, 1 / temperature,
                count, vocabulary, size, share, hidden.stride(0), weight.stride(0),
                BIASED=bias is not None, ENTROPY=entropy, BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_E=BLOCK_E,
                num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
    return _merge(*found)


def _share(vocabulary: int, blocks: int, device: torch.device) -> int:
    """Tokens of one program, so that all processors of the GPU have work; whole blocks of them."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    shares = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, max(1, blocks))
    return triton.cdiv(triton.cdiv(vocabulary, shares), BLOCK_V) * BLOCK_V


def _merge(chosen, top, total, moment) -> Scan:
    """``(shares, N)`` each to one pass's sums."""
    above = top.amax(0)
    apart = top - above
    scale = apart.exp()
    moment = ((moment + total * apart) * scale).sum(0)
    return Scan(chosen.sum(0)[:, None], above, (total * scale).sum(0), moment, None)


def aot_cases() -> list[tuple]:
    """(name, function, signature, constexprs, warps, stages, divisible arguments) of what a GPU would run."""
    sums = dict.fromkeys(("chosen", "top", "total", "moment"), "*fp32")
    integers = dict.fromkeys(("N", "V", "E", "share", "hidden_row", "weight_row"), "i32")
    cases = []
    for kind in ("fp16", "bf16"):
        pointers = dict.fromkeys(("hidden", "weight", "bias"), f"*{kind}") | {"targets": "*i64"} | sums
        signature = pointers | {"inverse_temperature": "fp32"} | integers
        for entropy in (False, True):
            constants = {"BIASED": entropy, "ENTROPY": entropy}
            constants |= {"BLOCK_N": BLOCK_N, "BLOCK_V": BLOCK_V, "BLOCK_E": BLOCK_E}
            name = f"logprob {kind}{' with bias and entropy' if entropy else ''}"
            # hidden sizes of models are multiples of 16, the number of rows is any
            divisible = (*pointers, "E", "share", "hidden_row", "weight_row")
            cases.append((name, vocabulary_scan, signature, constants, WARPS, STAGES, divisible))
    return cases
