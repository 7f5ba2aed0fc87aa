"""The prefix tree: many continuations of one prompt, laid out once in one sequence of T tokens.

A node is a run of tokens: the video prompt is the root, a question its child, a rollout a grandchild. Depth first,
every subtree is one contiguous slice, so that one number a token says who sees it: q sees k iff k <= q < end[k]::

    tree = Tree([1, 2, 3], name="video")
    question = tree.branch([4, 5], name="question")
    question.branch([6], weight=1.0)
    question.branch([7, 8], weight=1.0)
    packed = tree.pack()
    packed.ids.tolist()     # [1, 2, 3, 4, 5, 6, 7, 8]
    packed.end.tolist()     # [8, 8, 8, 8, 8, 6, 8, 8]
    packed.prev.tolist()    # [-1, 0, 1, 2, 3, 4, 4, 6]    token 4 predicts the first token of both rollouts
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ..runtime import StkitError
from . import tree_picture


class Tree:
    """A node with everything below it; the whole tree is its root.

    ids: token ids, at least one. weight: what the loss takes of each of its tokens, one number or one a token. name:
    for pictures. children: nodes, in the order in which they were added.
    """

    def __init__(self, ids: Sequence[int], weight: float | Sequence[float] = 0.0, name: str = ""):
        self.ids = tuple(int(i) for i in ids)
        if not self.ids:
            raise StkitError(f"branch {name!r} has no token: leave it out, or give at least one id")
        if min(self.ids) < 0:
            raise StkitError(f"branch {name!r} holds the id {min(self.ids)}: token ids are not negative")
        weights = [float(weight)] * len(self.ids) if isinstance(weight, (int, float)) else [float(w) for w in weight]
        if len(weights) != len(self.ids):
            raise StkitError(f"branch {name!r}: {len(weights)} weights for {len(self.ids)} tokens: give one for each")
        self.weight, self.name, self.children = tuple(weights), name, []

    def branch(self, ids: Sequence[int], weight: float | Sequence[float] = 0.0, name: str = "") -> "Tree":
        """Add a child and return it."""
        self.children.append(Tree(ids, weight, name))
        return self.children[-1]

    def walk(self) -> Iterator[tuple["Tree", "Tree | None"]]:
        """Every node with its parent, depth first."""
        waiting: list[tuple[Tree, Tree | None]] = [(self, None)]
        while waiting:
            node, parent = waiting.pop()
            yield node, parent
            waiting += [(child, node) for child in reversed(node.children)]

    def pack(self, root_positions: torch.Tensor | None = None, context: int | None = None) -> "Packed":
        """This tree in one sequence: see :func:`pack`."""
        return pack([self], None if root_positions is None else [root_positions], context)

    def draw(self, ax=None) -> str:
        """A picture: text to print, and drawn on a matplotlib axis if one is given (nodes as bars over tokens)."""
        return tree_picture.draw(self.pack(), ax)


@dataclass(frozen=True)
class Packed:
    """Trees laid out depth first, one after another, in T tokens.

    ids: int64 ``(T,)``. end: int64 ``(T,)``, one past the last token of the subtree of each token. prev: int64
    ``(T,)``, the token whose output predicts each (-1 for the first of a root, which nothing predicts). position: int64
    ``(3, T)``, M-RoPE positions in time, height and width. weight: float32 ``(T,)``. slices: where each of N nodes
    lies. parents: of each node, -1 for a root. nodes: the nodes themselves. following: int64 ``(3, N)``, the position
    after each node.
    """

    ids: torch.Tensor
    end: torch.Tensor
    prev: torch.Tensor
    position: torch.Tensor
    weight: torch.Tensor
    slices: tuple[slice, ...]
    parents: tuple[int, ...]
    nodes: tuple[Tree, ...]
    following: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def unpack(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Values of tokens ``(T, ...)`` as one piece for each node, in the order of ``nodes`` (views, no copies)."""
        if len(values) != len(self):
            raise StkitError(f"{len(values)} values for {len(self)} tokens: give one for each token of the packed tree")
        return [values[piece] for piece in self.slices]

    def index(self, node: Tree) -> int:
        """Which node of the packed order this is."""
        return next(k for k, other in enumerate(self.nodes) if other is node)

    def ancestry(self, k: int) -> list[int]:
        """Node k with its ancestors, root first."""
        found = [k]
        while self.parents[found[-1]] >= 0:
            found.append(self.parents[found[-1]])
        return found[::-1]

    def path(self, k: int) -> torch.Tensor:
        """Indices of the tokens from the root to the end of node k: what a model without trees would be given."""
        return torch.cat([torch.arange(self.slices[n].start, self.slices[n].stop) for n in self.ancestry(k)])

    def visible(self) -> torch.Tensor:
        """Who sees whom, bool ``(T, T)`` (query, key): for pictures and tests of small trees."""
        token = torch.arange(len(self))
        return (token[None] <= token[:, None]) & (token[:, None] < self.end[None])


def pack(
    trees: Sequence[Tree], root_positions: Sequence[torch.Tensor | None] | None = None, context: int | None = None
) -> Packed:
    """Lay trees out depth first, one after another; no tree sees another.

    Args:
        trees: their roots.
        root_positions: for each root of P tokens int64 ``(3, P + 1)``: M-RoPE positions, and where its branches start
            (for a video as the model's ``get_rope_index`` gives them); None: 0, 1, 2, ...
        context: tokens that the model can take from a root to a leaf.

    Raises:
        StkitError: a path longer than the context, a weight on a token that nothing predicts, positions of another
        shape.
    """
    if not trees:
        raise StkitError("no tree to pack: give at least one")
    known = root_positions if root_positions is not None else [None] * len(trees)
    order = [pair for tree in trees for pair in tree.walk()]
    number = {id(node): k for k, (node, _) in enumerate(order)}
    parents = [-1 if parent is None else number[id(parent)] for _, parent in order]
    slices, start = [], 0
    for node, _ in order:
        slices.append(slice(start, start + len(node.ids)))
        start += len(node.ids)
    stops = _subtree_stops(slices, parents)
    end = torch.cat([torch.full((len(node.ids),), stop) for (node, _), stop in zip(order, stops)])
    prev = torch.arange(start) - 1
    for piece, parent in zip(slices, parents):
        prev[piece.start] = slices[parent].stop - 1 if parent >= 0 else -1
    weight = torch.tensor([w for node, _ in order for w in node.weight], dtype=torch.float32)
    position, following = _positions([node for node, _ in order], parents, known)
    _check(trees, order, slices, parents, weight, prev, context)
    ids = torch.tensor([i for node, _ in order for i in node.ids])
    return Packed(
        ids, end, prev, position, weight, tuple(slices), tuple(parents), tuple(n for n, _ in order), following
    )


def _subtree_stops(slices: Sequence[slice], parents: Sequence[int]) -> list[int]:
    """One past the last token of each node's subtree."""
    stops = [piece.stop for piece in slices]
    for k in reversed(range(len(slices))):  # children come after their parents
        if parents[k] >= 0:
            stops[parents[k]] = max(stops[parents[k]], stops[k])
    return stops


def _positions(nodes, parents, roots) -> tuple[torch.Tensor, torch.Tensor]:
    """M-RoPE positions ``(3, T)``: each branch goes on where its own path is; and the position after each node."""
    pieces, following, waiting = [], [], iter(roots)
    for node, parent in zip(nodes, parents):
        given = next(waiting) if parent < 0 else None
        length = len(node.ids)
        if given is None:
            first = following[parent] if parent >= 0 else torch.zeros(3, 1, dtype=torch.long)
            given = first + torch.arange(length + 1)
        elif given.shape != (3, length + 1):
            raise StkitError(
                f"root positions {tuple(given.shape)}: give (3, {length + 1}), one more than it has tokens"
            )
        pieces.append(given[:, :length])
        following.append(given[:, length:])
    return torch.cat(pieces, dim=1), torch.cat(following, dim=1)


def _check(trees, order, slices, parents, weight, prev, context) -> None:
    if weight[prev < 0].any():
        raise StkitError("the first token of a root has a weight, but nothing predicts it: give it weight 0")
    if context is None:
        return
    length = [0] * len(order)
    for k, (node, _) in enumerate(order):
        length[k] = len(node.ids) + (length[parents[k]] if parents[k] >= 0 else 0)
        if length[k] > context:
            raise StkitError(
                f"branch {node.name!r} ends {length[k]} tokens after its root, the model's context is {context}: "
                "lower frames or max_pixels, or shorten the branch (nothing is ever cut off)"
            )


def trie(sequences: Sequence[Sequence[int]]) -> tuple[list[Tree], list[Tree]]:
    """The trees in which whatever sequences have in common from their start stands once.

    Args:
        sequences: token ids, none empty; equal ones share a node.

    Returns:
        ``(trees, last)``: the roots, and for each sequence the node with which it ends.
    """
    if empty := [k for k, ids in enumerate(sequences) if not len(ids)]:
        raise StkitError(f"sequence {empty[0]} has no token: leave it out")
    trees: list[Tree] = []
    last: list[Tree | None] = [None] * len(sequences)
    for group in _by_next(sequences, range(len(sequences)), 0):
        _grow(sequences, group, 0, None, trees, last)
    return trees, last


def _by_next(sequences, members, start: int) -> list[list[int]]:
    """Members grouped by their token at ``start``, in the order in which they first come."""
    groups: dict[int, list[int]] = {}
    for k in members:
        groups.setdefault(sequences[k][start], []).append(k)
    return list(groups.values())


def _grow(sequences, members: list[int], start: int, parent: Tree | None, trees: list[Tree], last: list) -> None:
    stop = start + _common([sequences[k][start:] for k in members])
    ids = sequences[members[0]][start:stop]
    node = Tree(ids) if parent is None else parent.branch(ids)
    if parent is None:
        trees.append(node)
    for k in members:
        if len(sequences[k]) == stop:
            last[k] = node
    for group in _by_next(sequences, [k for k in members if len(sequences[k]) > stop], stop):
        _grow(sequences, group, stop, node, trees, last)


def _common(pieces: Sequence[Sequence[int]]) -> int:
    """How many tokens all pieces have in common from their start."""
    first, length = pieces[0], min(map(len, pieces))
    for other in pieces[1:]:
        runs = groupby(zip(first[:length], other[:length]), key=lambda pair: pair[0] == pair[1])
        same, run = next(runs, (False, ()))
        length = sum(1 for _ in run) if same else 0
    return length
