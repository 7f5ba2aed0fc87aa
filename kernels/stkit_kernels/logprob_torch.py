"""The pass over the vocabulary that ``logprob`` rests on, in torch: one piece of the head at a time, no logits kept.

Forward, with e = exp(logit - the largest so far)::

    for each piece of the vocabulary:   its logits -> the chosen ones, new maximum, sum of e, sum of e @ weight

CUDA was not run: float16 and bfloat16 there multiply as they are into float32 sums, a CPU multiplies them as float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

PIECE_BYTES = 32 * 2**20  # logits and float32 head of a piece: within reach of a CPU's cache, and 1/50 of plain logits
ROWS = 1024  # rows of one piece
LOWEST = -1000.0  # below it, exp() is 0 in float64 too; finite, so that 0 times it is 0
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class How:
    """The settings of one call. ready: keep what the backward pass of a frozen head needs."""

    temperature: float
    entropy: bool
    chunk: int
    ready: bool
    backend: str


@dataclass(frozen=True)
class Scan:
    """Sums over the vocabulary, with e = exp(logit - top). All float32 or float64.

    Attributes:
        chosen: ``(N, L)`` logits of the chosen tokens, divided by the temperature.
        top: ``(N,)`` largest logit.
        total: ``(N,)`` sum of e.
        moment: ``(N,)`` sum of e * (logit - top), for the entropy; zeros if not asked for.
        expected: ``(N, E)`` sum of e * weight, or None.
    """

    chosen: torch.Tensor
    top: torch.Tensor
    total: torch.Tensor
    moment: torch.Tensor
    expected: torch.Tensor | None


def scan_vocabulary(hidden, weight, bias, ids, how: How) -> Scan:
    """One pass over the vocabulary.

    Args:
        hidden: ``(N, E)``.
        weight: ``(V, E)``.
        bias: ``(V,)`` or None.
        ids: int64 ``(N, L)``, the tokens whose logits are wanted.
        how: of ``backend`` nothing is read.
    """
    kind, wide = _wide(hidden)
    count, size = hidden.shape
    rows = hidden.to(wide)
    lowest = torch.finfo(kind).min  # finite: a piece that a bias masks with -inf leaves no NaN
    top = hidden.new_full((count,), lowest, dtype=kind)
    total, moment = (hidden.new_zeros(count, dtype=kind) for _ in range(2))
    chosen = hidden.new_zeros(ids.shape, dtype=kind)
    expected = hidden.new_zeros((count, size), dtype=kind) if how.ready else None
    room = hidden.new_empty(min(count, ROWS) * min(how.chunk, len(weight)), dtype=kind)
    for start, part, shift in _pieces(weight, bias, how.chunk, wide):
        for some in _tiles(count):
            logits = _logits(rows[some], part, shift, how.temperature, room)
            place = ids[some] - start
            inside = (place >= 0) & (place < len(part))
            found = logits.gather(1, place.clamp(0, len(part) - 1))
            chosen[some] = torch.where(inside, found, chosen[some])
            before = top[some].clone()
            above = torch.maximum(before, logits.amax(1), out=top[some])
            scale = (before - above).exp_()
            powers, sums = _powers(logits.sub_(above[:, None]), how.entropy)
            if how.entropy:
                moment[some].add_(total[some] * (before - above)).mul_(scale).add_(sums)
            total[some].mul_(scale).add_(powers.sum(1))
            if expected is not None:
                _add_product(expected[some].mul_(scale[:, None]), powers, part)
    return Scan(chosen, top, total, moment, expected)


def _powers(shifted: torch.Tensor, entropy: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """exp(x), in place where it can be, and the sum of x * exp(x) in each row if the entropy needs it."""
    if not entropy:
        return shifted.exp_(), None
    powers = shifted.clamp_(min=LOWEST).exp()
    return powers, shifted.mul_(powers).sum(1)


def recompute(hidden, weight, bias, targets, lse, spread, grad, grad_spread, how: How, wanted):
    """Gradients of hidden, weight and bias from logits computed again.

    With p the softmax and H the entropy, d log p[t] / d logit = onehot(t) - p and dH / d logit = -p * (log p + H).

    Args:
        targets, lse, spread: ``(N,)`` tokens, log-sum-exps and entropies (or None) of the forward pass.
        grad, grad_spread: ``(N,)`` gradients of log-probabilities and entropies, or None.
        wanted: which of the three gradients; the others are None and take no memory.
    """
    kind, wide = _wide(hidden)
    if wide == torch.float16:  # gradients times probabilities would be lost below its smallest number
        wide = torch.float32
    grad = (torch.zeros_like(lse) if grad is None else grad) / how.temperature
    grad_spread = None if grad_spread is None else grad_spread / how.temperature
    rows = hidden.to(wide)
    for_hidden = torch.zeros_like(hidden, dtype=kind) if wanted[0] else None
    for_weight = torch.empty_like(weight) if wanted[1] else None
    for_bias = torch.empty_like(bias) if wanted[2] else None
    room = hidden.new_empty(min(len(rows), ROWS) * min(how.chunk, len(weight)), dtype=kind)
    for start, part, shift in _pieces(weight, bias, how.chunk, wide):
        piece = slice(start, start + len(part))
        own = torch.zeros_like(part, dtype=kind) if wanted[1] else None
        own_bias = part.new_zeros(len(part), dtype=kind) if wanted[2] else None
        for some in _tiles(len(rows)):
            slopes = _logits(rows[some], part, shift, how.temperature, room).sub_(lse[some, None])
            for_spread = None if grad_spread is None else (grad_spread[some], spread[some])
            _to_slopes(slopes, targets[some] - start, grad[some], for_spread)
            if wanted[0]:
                _add_product(for_hidden[some], slopes, part)
            if wanted[1]:
                _add_product(own, slopes.T, rows[some])
            if wanted[2]:
                own_bias.add_(slopes.sum(0))
        if wanted[1]:
            for_weight[piece] = own
        if wanted[2]:
            for_bias[piece] = own_bias
    return for_hidden.to(hidden.dtype) if wanted[0] else None, for_weight, for_bias


def _to_slopes(log_p, place, grad, for_spread) -> None:
    """Log-probabilities of a piece to gradients of its logits, in place.

    Args:
        log_p: ``(rows, tokens)``.
        place: ``(rows,)`` the targets' columns; they may lie outside of the piece.
        grad: ``(rows,)`` of the targets' log-probabilities.
        for_spread: (gradient of the entropy, entropy), ``(rows,)`` each, or None.
    """
    if for_spread is None:
        log_p.exp_().mul_(-grad[:, None])
    else:
        grad_spread, spread = (x[:, None] for x in for_spread)
        powers = log_p.clamp_(min=LOWEST).exp()
        log_p.add_(spread).mul_(grad_spread).add_(grad[:, None]).mul_(powers).neg_()
    inside = (place >= 0) & (place < log_p.shape[1])
    log_p.scatter_add_(1, place.clamp(0, log_p.shape[1] - 1)[:, None], torch.where(inside, grad, 0.0)[:, None])


def _pieces(weight, bias, chunk: int, wide: torch.dtype) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """(first token, head's rows in the dtype of the product, their bias) along the vocabulary."""
    for start in range(0, len(weight), chunk):
        piece = slice(start, start + chunk)
        yield start, weight[piece].detach().to(wide), None if bias is None else bias[piece].detach()


def _tiles(count: int) -> Iterator[slice]:
    for start in range(0, count, ROWS):
        yield slice(start, min(start + ROWS, count))


def _logits(rows, part, bias, temperature: float, room: torch.Tensor) -> torch.Tensor:
    """``(rows, tokens)`` logits of a piece, in room's memory and dtype."""
    out = room[: len(rows) * len(part)].view(len(rows), len(part))
    if rows.dtype == room.dtype:
        torch.mm(rows, part.T, out=out)
    else:
        torch.mm(rows, part.T, out_dtype=room.dtype, out=out)
    if bias is not None:
        out.add_(bias)
    return out.div_(temperature) if temperature != 1 else out


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, summed in total's dtype."""
    if b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a.to(b.dtype), b, out_dtype=total.dtype))


def _wide(hidden: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Dtype of sums, and of the factors of products: only CUDA multiplies half precision into float32."""
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return kind, hidden.dtype if hidden.dtype in HALF and hidden.device.type == "cuda" else kind


def default_chunk(hidden: torch.Tensor, weight: torch.Tensor) -> int:
    """Tokens of a piece: ``PIECE_BYTES`` for its logits and its part of the head; 64s, for whole cache lines."""
    tokens = PIECE_BYTES // (4 * (min(len(hidden), ROWS) + weight.shape[1]))
    return max(64, tokens // 64 * 64)
