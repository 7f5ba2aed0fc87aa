"""The packed tree against brute force: walk every path by hand and compare."""

import random

import matplotlib
import matplotlib.pyplot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stkit.runtime import StkitError
from stkit.vlm.tree import Tree, pack, trie

matplotlib.use("Agg")


@st.composite
def trees(draw, most: int = 12):
    """A random tree: each further node hangs on one that is there already."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=most))
    number = random.Random(draw(st.integers(0, 2**32)))
    nodes = [Tree(number.choices(range(50), k=lengths[0]), name="root")]
    for length in lengths[1:]:
        nodes.append(number.choice(nodes).branch(number.choices(range(50), k=length), weight=number.random()))
    return nodes[0]


def paths(tree: Tree, before=()):
    """By recursion: every node with the (node, offset) of all tokens from the root to its end, depth first."""
    mine = before + tuple((id(tree), k) for k in range(len(tree.ids)))
    yield tree, mine
    for child in tree.children:
        yield from paths(child, mine)


@given(st.lists(trees(), min_size=1, max_size=3))
def test_a_token_sees_what_lies_on_its_path_and_nothing_else(forest):
    packed = pack(forest)
    order = [pair for tree in forest for pair in paths(tree)]
    place = {}
    for node, _ in order:
        for k in range(len(node.ids)):
            place[id(node), k] = len(place)
    sees = torch.zeros(len(place), len(place), dtype=torch.bool)
    for node, path in order:
        for k in range(len(node.ids)):
            upto = path[: len(path) - len(node.ids) + k + 1]
            query = place[id(node), k]
            sees[query, [place[token] for token in upto]] = True
            assert packed.prev[query] == (place[upto[-2]] if len(upto) > 1 else -1)
            assert packed.position[:, query].tolist() == [len(upto) - 1] * 3
            assert packed.ids[query] == node.ids[k] and packed.weight[query] == pytest.approx(node.weight[k])
    assert torch.equal(packed.visible(), sees)
    for k, (node, path) in enumerate(order):
        assert packed.nodes[k] is node and packed.path(k).tolist() == [place[token] for token in path]
        assert packed.following[:, k].tolist() == [len(path)] * 3


@given(trees())
def test_unpack_gives_each_node_its_own_values(tree):
    packed = tree.pack()
    pieces = packed.unpack(packed.ids)
    assert [tuple(piece.tolist()) for piece in pieces] == [node.ids for node in packed.nodes]
    wide = torch.randn(len(packed), 3)
    assert torch.equal(torch.cat(packed.unpack(wide)), wide)


def test_the_example_in_words():
    tree = Tree([1, 2, 3], name="video")
    question = tree.branch([4, 5], name="question")
    question.branch([6], weight=1.0)
    question.branch([7, 8], weight=(1.0, 0.5))
    packed = tree.pack()
    assert packed.end.tolist() == [8, 8, 8, 8, 8, 6, 8, 8]
    assert packed.prev.tolist() == [-1, 0, 1, 2, 3, 4, 4, 6]
    assert packed.position[0].tolist() == [0, 1, 2, 3, 4, 5, 5, 6]
    assert packed.weight.tolist() == [0, 0, 0, 0, 0, 1, 1, 0.5]
    assert packed.parents == (-1, 0, 1, 1) and packed.slices[1] == slice(3, 5)


def test_a_tree_of_one_token_is_a_tree():
    packed = Tree([9]).pack()
    assert (packed.ids.tolist(), packed.end.tolist(), packed.prev.tolist()) == ([9], [1], [-1])


def test_branches_go_on_where_the_root_says_not_at_the_packed_index():
    """After a video text goes on by its height and width: positions of the root can repeat and exceed the next one."""
    given = torch.tensor([[0, 1, 9, 4], [0, 1, 2, 4], [0, 1, 3, 4]])
    root = Tree([1, 2, 3])
    root.branch([4, 5]).branch([6])
    root.branch([7])
    packed = root.pack(given)
    assert packed.position.tolist() == [[0, 1, 9, 4, 5, 6, 4], [0, 1, 2, 4, 5, 6, 4], [0, 1, 3, 4, 5, 6, 4]]
    assert packed.following.tolist() == [[4, 6, 7, 5]] * 3


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8))
def test_a_trie_spells_every_sequence_and_holds_each_prefix_once(sequences):
    roots, last = trie(sequences)
    packed = pack(roots)
    for ids, node in zip(sequences, last):
        assert packed.ids[packed.path(packed.index(node))].tolist() == ids
    prefixes = {tuple(ids[:k]) for ids in sequences for k in range(1, len(ids) + 1)}
    assert len(packed) == len(prefixes)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Tree([]), "no token"),
        (lambda: Tree([1]).branch([], name="q7"), "'q7'"),
        (lambda: Tree([3, -200]), "-200"),
        (lambda: Tree([1, 2], weight=[1.0]), "1 weights for 2 tokens"),
        (lambda: Tree([1, 2], weight=1.0).pack(), "nothing predicts it"),
        (lambda: Tree([1, 2]).pack(torch.zeros(3, 2, dtype=torch.long)), "(3, 3)"),
        (lambda: pack([]), "at least one"),
        (lambda: trie([[1], []]), "sequence 1"),
        (lambda: Tree([1]).pack().unpack(torch.zeros(2)), "2 values for 1 tokens"),
    ],
)
def test_what_is_no_tree_is_refused_by_name(make, told):
    with pytest.raises(StkitError) as error:
        make()
    assert told in str(error.value)


def test_the_context_bounds_a_path_and_not_the_whole_tree():
    root = Tree([1] * 6)
    for _ in range(5):
        root.branch([2] * 4, name="rollout")
    assert len(root.pack(context=10)) == 26
    with pytest.raises(StkitError, match=r"'rollout'.* 10 tokens .* context is 9"):
        root.pack(context=9)


def test_a_picture_names_the_nodes_their_places_and_what_is_trained():
    root = Tree([1] * 3, name="video")
    root.branch([2] * 2, name="why").branch([3], weight=1.0)
    root.branch([4] * 5)
    figure, ax = matplotlib.pyplot.subplots()
    text = root.draw(ax)
    assert text.splitlines() == [
        "video  [0:3)  3 tokens",
        "├─ why  [3:5)  2 tokens",
        "│  └─ node 2  [5:6)  1 token, 1 in the loss",
        "└─ node 3  [6:11)  5 tokens",
    ]
    bars = [(p.get_x(), p.get_width(), round(p.get_y() + 0.4)) for p in ax.patches]
    assert bars == [(0, 3, 0), (3, 2, 1), (5, 1, 2), (6, 5, 1)]
    matplotlib.pyplot.close(figure)
