"""Log-probabilities of chosen tokens from hidden states and the head, without the logits of a whole vocabulary.

    found = selected_log_probs(hidden, head.weight, targets, entropy=True)     # (N, E), (V, E), (N,)
    found.log_probs, found.entropy, found.backend                              # (N,), (N,), "torch"
    log_probs_of(hidden, head.weight, letters)                                 # letters (N, L) -> (N, L)

The vocabulary goes by in pieces. Of each, the maximum, the sum of exponentials and, where hidden states want a
gradient, the sum of the head's rows under those exponentials are kept: attention with the vocabulary as keys.

With p the softmax of the logits, W the head and t the target,

    d log p[t] / d hidden = (W[t] - p @ W) / temperature

so with a frozen head (LoRA) the backward pass is ready after the forward pass: two products of N x V x E as in the
plain way, and no logits computed again. For a head that is trained they are computed again, once, in the backward pass.

torch 2.14 has ``linear_cross_entropy(reduction="none")``, which computes the logits again for any head and has neither
temperature nor entropy nor float32 results for half precision. Forward and backward pass, frozen head, V 152,000, E
512, N 1024, float32, CPU seconds of one thread of an EPYC (median of 5) and peak above the inputs:

    all logits 5.0 s, 1781 MiB; torch's with its best chunks (256 rows) 5.9 s, 149 MiB; this one 3.5 s, 23 MiB
"""

import math
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from stkit_kernels.logprob_torch import HALF, How, Scan, default_chunk, recompute, scan_vocabulary
from stkit_kernels.usable import triton_obstacle

BACKENDS = ("auto", "torch", "triton")


@dataclass(frozen=True)
class LogProbs:
    """What ``selected_log_probs`` found.

    Attributes:
        log_probs: ``(N,)`` natural log, float32 (float64 for float64 inputs).
        entropy: ``(N,)`` of the whole distribution in nats, same dtype; None if not asked for.
        backend: "torch" or "triton", what computed the forward pass.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None
    backend: str


def selected_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> LogProbs:
    """log softmax((hidden @ weight.T + bias) / temperature) at the targets, differentiable once.

    Args:
        hidden: ``(N, E)`` float; N may be 0.
        weight: ``(V, E)``, dtype and device of hidden. Frozen, it gets no gradient and no memory for one.
        targets: int64 ``(N,)``, 0 to V - 1.
        bias: ``(V,)`` or None; may be frozen too.
        temperature: above 0; divides the logits.
        entropy: the entropy too. Its gradient computes the logits again.
        chunk: tokens of the vocabulary in one piece of ``4 * chunk * (min(N, 1024) + E)`` bytes. Default: 32 MiB.
        backend: "torch", "triton", or "auto": Triton for half precision on a GPU of capability 8 or more, unless the
            forward pass has to keep ``p @ W`` (frozen head, gradient of hidden), which is torch's.

    Returns:
        LogProbs. A row of hidden with a NaN gives NaN.

    Raises:
        ValueError: other shapes, mixed dtypes or devices, a target outside of the vocabulary, a temperature not above
            0, a backend that cannot be used here.

    Source: online log-sum-exp, arXiv 1805.02867; p @ W gathered as FlashAttention does its values, arXiv 2307.08691.
    """
    _check(hidden, weight, bias, targets, temperature, chunk)
    if targets.dim() != 1:
        raise ValueError(f"targets {tuple(targets.shape)}: give ({len(hidden)},); log_probs_of takes several a row")
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    ready = torch.is_grad_enabled() and hidden.requires_grad and not trained
    name = _choose(backend, hidden, ready)
    how = How(float(temperature), entropy, chunk or default_chunk(hidden, weight), ready, name)
    log_probs, spread = _Selected.apply(hidden, weight, bias, targets, how)
    return LogProbs(log_probs, spread, name)


@torch.no_grad()
def log_probs_of(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """Log-probabilities of several tokens a row, such as the options' letters. No gradient.

    Args:
        ids: int64 ``(N, L)``, 0 to V - 1.
        hidden, weight, bias, temperature, chunk: as in ``selected_log_probs``.

    Returns:
        ``(N, L)`` natural log, float32 (float64 for float64 inputs).

    Raises:
        ValueError: as ``selected_log_probs``.
    """
    _check(hidden, weight, bias, ids, temperature, chunk)
    if ids.dim() != 2:
        raise ValueError(f"ids {tuple(ids.shape)}: give (N, L), L tokens for each of {len(hidden)} rows")
    how = How(float(temperature), False, chunk or default_chunk(hidden, weight), False, "torch")
    with torch.autocast(hidden.device.type, enabled=False):
        scan = scan_vocabulary(hidden, weight, bias, ids, how)
    return (scan.chosen - scan.top[:, None]) - scan.total.log()[:, None]


class _Selected(torch.autograd.Function):
    """The pass over the vocabulary, and what it leaves for the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, how):
        with torch.autocast(hidden.device.type, enabled=False):  # it would round what is float32 on purpose
            scan = _forward(hidden, weight, bias, targets, how)
        log_total = scan.total.log()
        log_probs = (scan.chosen[:, 0] - scan.top) - log_total
        spread = log_total - scan.moment / scan.total if how.entropy else None
        expected = None if scan.expected is None else scan.expected.div_(scan.total[:, None])
        ctx.save_for_backward(hidden, weight, bias, targets, scan.top + log_total, spread, expected)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return log_probs, spread

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_spread):
        if grad is None and grad_spread is None:
            return None, None, None, None, None
        hidden, weight, bias, targets, lse, spread, expected = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            if expected is not None and grad_spread is None:
                slopes = (weight[targets] - expected).mul_((grad / ctx.how.temperature)[:, None])
                return slopes.to(hidden.dtype), None, None, None, None
            wanted = ctx.needs_input_grad[:3]
            found = recompute(hidden, weight, bias, targets, lse, spread, grad, grad_spread, ctx.how, wanted)
        return *found, None, None


def _forward(hidden, weight, bias, targets, how: How) -> Scan:
    if how.backend == "torch":
        return scan_vocabulary(hidden, weight, bias, targets[:, None], how)
    from stkit_kernels.logprob_triton import scan_in_triton

    return scan_in_triton(hidden, weight, bias, targets, how.temperature, how.entropy)


def _choose(backend: str, hidden: torch.Tensor, ready: bool) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and (hidden.device.type != "cuda" or ready)):
        return "torch"
    reason = triton_obstacle(hidden.device, hidden.dtype)
    if not reason and hidden.device.type == "cuda" and hidden.dtype not in HALF:
        reason = "exact products of float32 have no tensor cores, cuBLAS is faster"
    if backend == "triton" and reason:
        raise ValueError(f"backend 'triton' cannot be used: {reason}; use 'auto'")
    return "torch" if reason else "triton"


def _check(hidden, weight, bias, ids, temperature: float, chunk: int | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not weight.numel():
        shapes = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: give (N, E) and (V, E) with V and E at least 1")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)}: give ({len(weight)},), one number a token")
    floats = [hidden, weight] if bias is None else [hidden, weight, bias]
    if len({t.dtype for t in floats}) > 1 or not hidden.is_floating_point():
        dtypes = ", ".join(str(t.dtype).removeprefix("torch.") for t in floats)
        raise ValueError(f"hidden, weight and bias of {dtypes}: give one floating dtype for all")
    if len({t.device for t in [*floats, ids]}) > 1:
        raise ValueError(f"tensors on {', '.join(str(t.device) for t in [*floats, ids])}: move all to one device")
    if ids.dtype != torch.int64 or not ids.dim() or len(ids) != len(hidden):
        raise ValueError(f"token ids of {ids.dtype} {tuple(ids.shape)}: give int64, one row for each of {len(hidden)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature {temperature}: give a number above 0 (greedy: take the largest logit)")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk {chunk}: give at least 1 token of the vocabulary, or None")
    if ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= len(weight):
            raise ValueError(f"token id {low if low < 0 else high} is not in the vocabulary of {len(weight)}")
