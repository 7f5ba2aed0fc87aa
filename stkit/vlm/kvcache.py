"""Keys and values of a tree, each stored once, and of the rollouts that grow from its nodes.

While the prompts are computed the cache attends by the cascade and keeps each node's keys and values. While rollouts
are decoded, one token each at a time, a query meets the keys of every node on its path (shared with all rollouts there)
and those of its own rollout, under one softmax. Nothing is copied for a group and nothing grows: rollouts have their
room from the start, and those that have ended leave it to the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .attention import TreeAttention
from .tree import Packed

ALIKE = 0.5  # nodes share a batch down to this share of its longest


@dataclass
class Shelf:
    """Nodes of one depth and like length, and the keys and values of every layer of them.

    nodes: their numbers. rows: int64 ``(n, L)``, their tokens in the packed tree, the last one repeated as filling.
    mask: float32 ``(n, 1, 1, L)``, minus infinity on filling, or None. keys, values: by layer, ``(n, KV, L, D)``.
    index: int64 ``(n, R')``, the rollouts that see each node, filled up too; None for one node that all see. real:
    which of ``index`` are no filling, and places, the rollouts there. column: where the scores on its keys stand.
    """

    nodes: list[int]
    rows: torch.Tensor
    mask: torch.Tensor | None
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    column: int = 0
    index: torch.Tensor | None = None
    real: torch.Tensor | None = None
    places: torch.Tensor | None = None

    def score(self, scores: torch.Tensor, folded: torch.Tensor, layer: int) -> None:
        """Write the scores of queries ``(R, KV, g, D)`` on this shelf's keys into their columns ``(R, KV, g, ...)``."""
        columns = scores[..., self.column : self.column + self.rows.shape[1]]
        found = self._taken(folded) @ self.keys[layer].transpose(-1, -2)
        if self.mask is not None:
            found += self.mask.to(found.dtype)
        found = found.unflatten(2, (-1, folded.shape[2])).transpose(1, 2)
        if self.index is None:
            columns.copy_(found[0])
        else:
            columns[self.places] = found.flatten(0, 1)[self.real].to(scores.dtype)

    def add(self, out: torch.Tensor, shares: torch.Tensor, layer: int) -> None:
        """Add this shelf's values ``(n, KV, L, D)``, by their shares, to ``out (R, KV, g, D)``."""
        taken = self._taken(shares[..., self.column : self.column + self.rows.shape[1]])
        found = (taken @ self.values[layer]).unflatten(2, (-1, out.shape[2])).transpose(1, 2)
        if self.index is None:
            out += found[0]
        else:
            out[self.places] += found.flatten(0, 1)[self.real]  # a rollout sees one node of a shelf

    def _taken(self, x: torch.Tensor) -> torch.Tensor:
        """What belongs to each node's rollouts, ``(R, KV, g, ...)`` as ``(n, KV, R' * g, ...)``."""
        if self.index is None:
            return x.transpose(0, 1).flatten(1, 2)[None]
        return x[self.index].transpose(1, 2).flatten(2, 3)

    def seat(self, beneath: list[list[int]], total: int) -> None:
        """Say which of ``total`` rollouts see each node."""
        widest = max(map(len, beneath))
        filled = [[*rows, *[rows[-1] if rows else 0] * (widest - len(rows))] for rows in beneath]
        kept = [[k < len(rows) for k in range(widest)] for rows in beneath]
        every = len(beneath) == 1 and filled[0] == list(range(total))
        self.index = self.real = self.places = None
        if not every:
            self.index = torch.tensor(filled, dtype=torch.long, device=self.rows.device)
            self.real = torch.tensor(kept, device=self.rows.device).flatten().nonzero().flatten()
            self.places = self.index.flatten()[self.real]


class TreeCache:
    """What the layers attend to while a tree is computed and while R rollouts are decoded from its nodes.

    Args:
        packed: T tokens in N nodes. ends: for each rollout the node that it goes on from, in packed order.
        attention: the cascade over the same tree.
        max_new_tokens: the most that a rollout can have.
    """

    def __init__(self, packed: Packed, ends: Sequence[int], attention: TreeAttention, max_new_tokens: int):
        self.packed, self.ends, self.attention = packed, list(ends), attention
        self.room, self.step, self.decoding = max_new_tokens, 0, False
        self.shelves, self.width = _shelves(packed, self.ends, attention.plan.end.device)
        self.keys: list[torch.Tensor] = []  # of the rollouts, by layer: (R, KV, max_new_tokens, D)
        self.values: list[torch.Tensor] = []
        self._seat()

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """The tree's tokens ``(1, H, T, D)``, or one token a rollout ``(R, H, 1, D)``."""
        if self.decoding:
            return self._decode(layer, query, key, value, scale)
        self._keep(key, value)
        return self.attention.attend(layer, query, key, value, scale)

    @property
    def bytes(self) -> int:
        """Of all keys and values, the rollouts' room included."""
        stored = [x for shelf in self.shelves for x in (*shelf.keys, *shelf.values)] + self.keys + self.values
        return sum(x.numel() * x.element_size() for x in stored)

    def start(self) -> None:
        """The tree is computed: from here on rollouts are decoded."""
        self.decoding = True

    def advance(self) -> None:
        """A token of each rollout is stored in every layer."""
        self.step += 1

    def keep(self, alive: Sequence[int]) -> None:
        """Go on with the rollouts in these places (ascending); the others leave."""
        places = torch.tensor(alive, dtype=torch.long, device=self.shelves[0].rows.device)
        for rooms in (self.keys, self.values):
            for layer, room in enumerate(rooms):
                room[: len(alive), :, : self.step] = room[places, :, : self.step]
                rooms[layer] = room[: len(alive)]
        self.ends = [self.ends[place] for place in alive]
        self._seat()

    def _seat(self) -> None:
        beneath: list[list[int]] = [[] for _ in self.packed.nodes]
        for row, end in enumerate(self.ends):
            for node in self.packed.ancestry(end):
                beneath[node].append(row)
        for shelf in self.shelves:
            shelf.seat([beneath[node] for node in shelf.nodes], len(self.ends))

    def _keep(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the keys and values ``(1, KV, T, D)`` of a layer, each once, and make room for the rollouts'."""
        for shelf in self.shelves:
            count, length = shelf.rows.shape
            for stored, x in ((shelf.keys, key), (shelf.values, value)):
                taken = x[0][:, shelf.rows.flatten()].unflatten(1, (count, length))
                stored.append(taken.transpose(0, 1).contiguous())
        shape = (len(self.ends), key.shape[1], self.room, key.shape[3])
        for rooms in (self.keys, self.values):
            rooms.append(torch.empty(shape, dtype=key.dtype, device=key.device))

    def _decode(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """One softmax over the scores on all parts of each path; shelves of one depth share their columns of scores."""
        rollouts, heads, _, size = query.shape
        kv, length = key.shape[1], self.step + 1
        self.keys[layer][:, :, self.step] = key[:, :, 0]
        self.values[layer][:, :, self.step] = value[:, :, 0]
        # heads that share keys are rows of one product; scaled first, or scores in float16 can exceed its range
        folded = (query * scale).reshape(rollouts, kv, heads // kv, size)
        keys, values = (room[layer][:, :, :length] for room in (self.keys, self.values))
        shape = (rollouts, kv, heads // kv, self.width + length)
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = torch.full(shape, float("-inf"), dtype=wide, device=query.device)
        scores[..., self.width :] = folded @ keys.transpose(-1, -2)
        for shelf in self.shelves:
            shelf.score(scores, folded, layer)
        shares = torch.softmax(scores, -1).to(value.dtype)
        out = shares[..., self.width :] @ values
        for shelf in self.shelves:
            shelf.add(out, shares, layer)
        return out.reshape(rollouts, heads, 1, size)


def _shelves(packed: Packed, ends: Sequence[int], device: torch.device) -> tuple[list[Shelf], int]:
    """The nodes on the rollouts' paths, by depth and length, and how many columns their scores take."""
    used = {node for end in set(ends) for node in packed.ancestry(end)}
    by_depth: dict[int, list[int]] = {}
    for node in sorted(used):
        by_depth.setdefault(len(packed.ancestry(node)), []).append(node)
    lengths = [piece.stop - piece.start for piece in packed.slices]
    shelves, width = [], 0
    for nodes in by_depth.values():
        groups: list[list[int]] = [[]]
        for node in sorted(nodes, key=lambda k: -lengths[k]):
            if groups[-1] and lengths[node] < ALIKE * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(node)
        shelves += [_shelf(packed, sorted(group), lengths, width, device) for group in groups]
        width += lengths[groups[0][0]]
    return shelves, width


def _shelf(packed: Packed, nodes: list[int], lengths: Sequence[int], column: int, device: torch.device) -> Shelf:
    longest = max(lengths[node] for node in nodes)
    starts = torch.tensor([packed.slices[node].start for node in nodes])[:, None]
    last = torch.tensor([lengths[node] for node in nodes])[:, None] - 1
    offsets = torch.arange(longest)[None]
    mask = None
    if bool((offsets > last).any()):
        mask = torch.zeros(len(nodes), longest).masked_fill(offsets > last, float("-inf"))[:, None, None].to(device)
    return Shelf(nodes, (starts + offsets.minimum(last)).to(device), mask, [], [], column)
