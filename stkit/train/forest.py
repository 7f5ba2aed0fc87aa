"""Answers to learn from as trees on their videos, and several trees packed up to a number of tokens.

lines = [Line(prompt.ids, answer_ids, weights, question.id)]
plants = plant(item, lines, max_tokens=8192)        # as a rule one tree for a clip
for forest in forests(plants, max_tokens=8192):
    ...                                             # one forward and one backward pass each
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..runtime import StkitError
from ..vlm.ask import in_common
from ..vlm.tree import Tree, trie


class Line(NamedTuple):
    """One answer. prompt, ids: token ids. weight: what the loss takes of each of ``ids``. name: the question's id."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    weight: tuple[float, ...]
    name: str


class Plant(NamedTuple):
    """A tree on one clip. ``leaves``: the node of each of its lines; ``numbers``: which lines of the clip they are."""

    clip: int
    tree: Tree
    leaves: tuple[Tree, ...]
    numbers: tuple[int, ...]
    tokens: int


def plant(clip: int, lines: Sequence[Line], max_tokens: int) -> list[Plant]:
    """Lines on one clip as trees of at most ``max_tokens``: what prompts have in common stands once in each.

    Args:
        clip: a number of the caller's, kept in the plants.
        lines: those of one prompt beside each other.

    Raises:
        StkitError: a line that is longer by itself, named.
    """
    found, begin, held, before = [], 0, 0, ()
    for k, line in enumerate(lines):
        alone = len(line.prompt) + len(line.ids)
        if alone > max_tokens:
            raise StkitError(
                f"question {line.name!r}: prompt and answer have {alone} tokens, over train.max_tokens={max_tokens}: raise it "
                f"to {alone}, or lower video.frames or video.max_pixels (nothing is ever cut off)"
            )
        new = alone - in_common(before, line.prompt)
        if held + new > max_tokens:
            found.append(_grown(clip, lines, range(begin, k), held))
            begin, held, new = k, 0, alone
        held, before = held + new, line.prompt
    return [*found, _grown(clip, lines, range(begin, len(lines)), held)] if lines else []


def _grown(clip: int, lines: Sequence[Line], numbers: range, tokens: int) -> Plant:
    prompts = list(dict.fromkeys(lines[k].prompt for k in numbers))
    trees, last = trie(prompts)
    if len(trees) > 1:
        raise StkitError(f"prompts on one video begin in {len(trees)} ways: use one chat template for all")
    ends = dict(zip(prompts, last))
    leaves = [ends[lines[k].prompt].branch(lines[k].ids, lines[k].weight, lines[k].name) for k in numbers]
    return Plant(clip, trees[0], tuple(leaves), tuple(numbers), tokens)


def forests(plants: Sequence[Plant], max_tokens: int) -> Iterator[list[Plant]]:
    """Plants in their order, as many at a time as ``max_tokens`` hold."""
    held: list[Plant] = []
    for one in plants:
        if held and sum(p.tokens for p in held) + one.tokens > max_tokens:
            yield held
            held = []
        held.append(one)
    if held:
        yield held
