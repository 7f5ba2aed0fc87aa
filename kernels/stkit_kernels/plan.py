"""Which calls compute attention over a packed tree: made once for a tree, used by every layer, forward and backward.

The tokens of a tree laid out depth first fall into segments, runs of tokens with one ``end``. What sees a segment is
its own tokens, causally, and then everything below it: one contiguous slice. So a segment is one causal call of its
subtree's queries on its own keys, and segments of like size share a call::

    plan = plan_tree(torch.tensor([8, 8, 8, 8, 8, 6, 8, 8]))
    [(c.count, c.q_len, c.k_len) for c in plan.calls]      # [(1, 8, 5), (2, 2, 2)]: one padded token, never seen
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

# A call costs about as much as so many (query, key) pairs, so that padding of up to that size is cheaper than one more.
CALL = 16_384
WASTE = 0.15


@dataclass(frozen=True)
class Rows:
    """Tokens of ``count`` segments, ``length`` each: evenly spaced (``start``, ``step``), or by ``index``.

    index: int64 ``(count * length,)``, where a shorter segment is filled up with its last token; None if evenly spaced.
    """

    start: int
    step: int
    count: int
    length: int
    index: torch.Tensor | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """``(T, ...)`` as ``(count, length, ...)``; a view where the rows are evenly spaced."""
        if self.index is not None:
            return x.index_select(0, self.index).unflatten(0, (self.count, self.length))
        shape = (self.count, self.length, *x.shape[1:])
        return x.as_strided(
            shape, (self.step * x.stride(0), *x.stride()), x.storage_offset() + self.start * x.stride(0)
        )


@dataclass(frozen=True)
class Call:
    """One call of a primitive: ``count`` subtrees' queries on their segments' keys, causal from the top left.

    real, k_real: which of the ``count * q_len`` queries (keys) are tokens, int64, None if all are. q_kept: the same as
    1 and 0, ``(count, q_len)``. mask: float32 ``(count, 1, 1, k_len)``, minus infinity on keys that only fill up, None
    where no query could see one. pairs: (query, key) pairs that are visible; padded: pairs that are computed on top of
    them.
    """

    q: Rows
    k: Rows
    real: torch.Tensor | None
    k_real: torch.Tensor | None
    q_kept: torch.Tensor | None
    mask: torch.Tensor | None
    pairs: int
    padded: int

    @property
    def count(self) -> int:
        return self.q.count

    @property
    def q_len(self) -> int:
        return self.q.length

    @property
    def k_len(self) -> int:
        return self.k.length


@dataclass(frozen=True)
class Varlen:
    """One call of a variable-length primitive: sequence i has queries q_rows[cu_q[i]:cu_q[i+1]], keys alike.

    q_rows, k_rows: int64, None for all tokens in their order. cu_q, cu_k: int32 ``(count + 1,)``.
    """

    q_rows: torch.Tensor | None
    k_rows: torch.Tensor | None
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    causal: bool

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Where sequences begin and end, and the longest: as the primitives take them."""
        return self.cu_q, self.cu_k, self.max_q, self.max_k


@dataclass
class TreePlan:
    """The calls for one tree or forest of T tokens on one device. ``end`` is kept for kernels that mask by themselves."""

    end: torch.Tensor
    calls: tuple[Call, ...]
    segments: tuple[tuple[int, int, int], ...]  # start, stop, end of the subtree
    cache: dict = field(default_factory=dict, repr=False)  # what a backend prepared for this tree

    def __len__(self) -> int:
        return len(self.end)

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs that the tree asks for."""
        return sum(call.pairs for call in self.calls)

    @property
    def padded_pairs(self) -> int:
        """Pairs that are computed on top, because segments of unlike size share a call."""
        return sum(call.padded for call in self.calls)

    def varlen(self) -> tuple[Varlen, ...]:
        """The same attention for variable-length primitives, which align a causal mask at the bottom right: every
        segment with itself, then level by level what lies below a segment with its keys."""
        if "varlen" not in self.cache:
            self.cache["varlen"] = _varlen_calls(self.segments, self.end.device)
        return self.cache["varlen"]


def plan_tree(end: torch.Tensor) -> TreePlan:
    """Plan the calls for a packed tree or forest.

    Args:
        end: int64 ``(T,)``, one past the last token of the subtree of each token, in depth-first order.

    Raises:
        ValueError: not the ``end`` of trees laid out depth first.
    """
    if end.dim() != 1 or end.dtype != torch.int64 or not len(end):
        raise ValueError(f"end of {end.dtype} {tuple(end.shape)}: give int64 (T,) with T at least 1")
    segments = _segments(end.tolist())
    below = _depths(segments)
    groups: list[list[tuple[int, int, int]]] = []
    for depth in range(max(below) + 1):  # inner segments level by level, so that no call has a query twice
        inner = [s for s, d in zip(segments, below) if d == depth and s[1] < s[2]]
        groups += _alike(inner)
    groups += _alike([s for s in segments if s[1] == s[2]])  # leaves share no queries, whatever their depth
    return TreePlan(end, tuple(_call(group, end.device) for group in groups), tuple(segments))


def _segments(end: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of tokens with one end, as (start, stop, end)."""
    found, start, total = [], 0, len(end)
    for t in range(1, total + 1):
        if t == total or end[t] != end[start]:
            found.append((start, t, end[start]))
            start = t
    _depths(found, total)
    return found


def _depths(segments: Sequence[tuple[int, int, int]], total: int | None = None) -> list[int]:
    """How many segments lie above each; with a total, refuse what is no tree laid out depth first."""
    depths, open_ends = [], []
    for start, stop, end in segments:
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        if total is not None and not stop <= end <= (open_ends[-1] if open_ends else total):
            raise ValueError(f"end[{start}] = {end} is not the end of a subtree laid out depth first")
        depths.append(len(open_ends))
        open_ends.append(end)
    return depths


def _alike(segments: Sequence[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Segments that share a call: sorted by size, until filling up costs more than a call of its own."""
    groups: list[list[tuple[int, int, int]]] = []
    real = q_len = k_len = 0
    for segment in sorted(segments, key=lambda s: (s[1] - s[0], s[2] - s[0]), reverse=True):
        k, q = segment[1] - segment[0], segment[2] - segment[0]
        if groups:
            wide = max(q_len, q) * k_len
            waste = wide * (len(groups[-1]) + 1) - real - q * k
            if waste <= max(CALL, WASTE * (real + q * k)):
                groups[-1].append(segment)
                real, q_len = real + q * k, max(q_len, q)
                continue
        groups.append([segment])
        real, q_len, k_len = q * k, q, k
    return [sorted(group) for group in groups]


def _call(group: Sequence[tuple[int, int, int]], device: torch.device) -> Call:
    starts = [s for s, _, _ in group]
    q_lens, k_lens = [end - start for start, _, end in group], [stop - start for start, stop, _ in group]
    q, real = _rows(starts, q_lens, device)
    k, k_real = _rows(starts, k_lens, device)
    mask = None
    if k_real is not None and any(ql > kl for ql, kl in zip(q_lens, k_lens)):
        hidden = torch.arange(k.length)[None] >= torch.tensor(k_lens)[:, None]
        mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))[:, None, None].to(device)
    pairs = sum(_causal_pairs(ql, kl) for ql, kl in zip(q_lens, k_lens))
    padded = len(group) * _causal_pairs(q.length, k.length) - pairs
    kept = None
    if real is not None:
        kept = (torch.arange(q.length)[None] < torch.tensor(q_lens)[:, None]).float().to(device)
    return Call(q, k, real, k_real, kept, mask, pairs, padded)


def _causal_pairs(q_len: int, k_len: int) -> int:
    """Pairs with key <= query, counted from the top left."""
    return k_len * (k_len + 1) // 2 + (q_len - k_len) * k_len


def _rows(starts: list[int], lengths: list[int], device: torch.device) -> tuple[Rows, torch.Tensor | None]:
    """Where the tokens of segments are, and which of them are no filling (None: all)."""
    count, length = len(starts), max(lengths)
    steps = {b - a for a, b in zip(starts, starts[1:])}
    even = len(set(lengths)) == 1 and len(steps) <= 1
    if even:
        return Rows(starts[0], steps.pop() if steps else length, count, length), None
    offsets = torch.arange(length)[None].expand(count, -1)
    last = torch.tensor(lengths)[:, None] - 1
    index = torch.tensor(starts)[:, None] + offsets.minimum(last)
    real = None if len(set(lengths)) == 1 else (offsets <= last).flatten().nonzero().flatten().to(device)
    return Rows(starts[0], 0, count, length, index.flatten().to(device)), real


def _varlen_calls(segments: Sequence[tuple[int, int, int]], device: torch.device) -> tuple[Varlen, ...]:
    lengths = [stop - start for start, stop, _ in segments]
    own = _bounds(lengths, device)
    calls = [Varlen(None, None, own, own, max(lengths), max(lengths), True)]
    depths = _depths(segments)
    for depth in range(max(depths) + 1):
        inner = [s for s, d in zip(segments, depths) if d == depth and s[1] < s[2]]
        if inner:
            below, keys = [end - stop for _, stop, end in inner], [stop - start for start, stop, _ in inner]
            q_rows = torch.cat([torch.arange(stop, end) for _, stop, end in inner]).to(device)
            k_rows = torch.cat([torch.arange(start, stop) for start, stop, _ in inner]).to(device)
            bounds = _bounds(below, device), _bounds(keys, device)
            calls.append(Varlen(q_rows, k_rows, *bounds, max(below), max(keys), False))
    return tuple(calls)


def _bounds(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
