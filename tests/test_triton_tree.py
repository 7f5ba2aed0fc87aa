"""Tree attention in Triton against a dense oracle, block lists against brute force. Not run on a GPU.

What runs in Triton's interpreter runs in one child process (``kernels/benchmarks/tree_equality.py``): whether a process
interprets is settled when triton is imported, and other tests may have imported it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from stkit_kernels import triton_tree  # noqa: E402
from stkit_kernels.triton_tree import (  # noqa: E402
    plan_blocks,
    tile_of,
    tree_attention_backward,
    tree_attention_forward,
)

BENCHMARKS = Path(__file__).parent.parent / "kernels" / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tree_equality = load("tree_equality")
CASES, RESULTS, TOLERANCE = tree_equality.CASES, tree_equality.RESULTS, tree_equality.TOLERANCE
# end of a root of 2 tokens with leaves of 1 and 2
SMALL = torch.tensor([5, 5, 3, 5, 5])


def child(args: list, interpret: bool) -> str:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_INTERPRET": "1"} if interpret else {}
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict:
    """What the interpreter's process found."""
    return json.loads(child([BENCHMARKS / "tree_equality.py"], interpret=True))


def test_the_oracles_trees_are_those_that_one_draws_by_hand():
    end, visible = tree_equality.tree(((2, -1), (1, 0), (2, 0)))
    assert torch.equal(end, SMALL)
    seen = ["10000", "11000", "11100", "11010", "11011"]
    assert visible.int().tolist() == [[int(mark) for mark in row] for row in seen]


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_the_dense_oracle(found, name):
    relative = found["cases"][name]["relative"]
    assert set(relative) == set(RESULTS)
    assert all(value <= TOLERANCE[CASES[name].dtype] for value in relative.values()), relative


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_written_outside_the_results(found, name):
    assert found["cases"][name]["wrote_only_its_own"]


def test_the_cases_have_full_and_masked_blocks_of_every_shape(found):
    for name in ("a group", "a group, wider keys", "a group, wider queries", "a group in tiles of 64"):
        row = found["cases"][name]
        assert 0 < row["full"] < row["visited"]
    assert found["cases"]["nodes of one token"]["full"] == 0


@pytest.mark.parametrize("result", RESULTS)
def test_the_loop_over_full_blocks_ran_in_every_kernel(found, result):
    """Without full blocks in the plan the result is far off, so they had been visited."""
    assert not found["loops"]["without full"][result] < 0.01


@pytest.mark.parametrize("result", RESULTS)
def test_the_loop_over_masked_blocks_ran_in_every_kernel(found, result):
    """Left out, the first query of a block sees nothing at all: its result is NaN, or far off."""
    assert not found["loops"]["without masked"][result] < 0.01


def test_the_mask_changes_nothing_in_a_full_block(found):
    assert all(value <= TOLERANCE["float32"] for value in found["loops"]["all masked"].values())


def test_a_branch_never_sees_its_sibling(found):
    assert found["sibling"] == {"in the branch": True, "elsewhere": False}


@st.composite
def forests(draw) -> tuple[tuple[int, int], ...]:
    """Nodes depth first: each one's parent is on the path to the node before it, or there is none."""
    nodes, path = [], []
    for place in range(draw(st.integers(1, 9))):
        depth = draw(st.integers(0, len(path)))
        path = path[:depth]
        nodes.append((draw(st.integers(1, 40)), path[-1] if path else -1))
        path.append(place)
    return tuple(nodes)


def entries(offsets: torch.Tensor, masked: torch.Tensor, index: torch.Tensor) -> set[tuple[int, int, bool]]:
    """(row, column, full) of every listed block, as the kernels read the lists."""
    listed = [
        (row, int(index[at]), at < int(masked[row]))
        for row in range(len(masked))
        for at in range(int(offsets[row]), int(offsets[row + 1]))
    ]
    assert len(listed) == len(set(listed)) == len(index)
    return set(listed)


@settings(max_examples=60)
@given(forests(), st.sampled_from([16, 32]), st.sampled_from([16, 64]))
def test_blocks_are_listed_iff_the_dense_mask_has_something_in_them(nodes, block_q, block_k):
    end, visible = tree_equality.tree(nodes)
    blocks, expected = plan_blocks(end, block_q, block_k), set()
    for i, rows in enumerate(visible.split(block_q)):
        for j, cut in enumerate(rows.split(block_k, 1)):
            if cut.any():
                expected.add((i, j, bool(cut.all()) and cut.shape == (block_q, block_k)))
    assert entries(blocks.key_offsets, blocks.key_masked, blocks.key_index) == expected
    turned = entries(blocks.query_offsets, blocks.query_masked, blocks.query_index)
    assert turned == {(j, i, full) for i, j, full in expected}
    assert (blocks.visited, blocks.full) == (len(expected), sum(full for *_, full in expected))
    assert blocks.ideal == pytest.approx(int(visible.sum()) / (block_q * block_k))


def test_a_plan_is_small_integers_and_moves_as_a_whole():
    moved = plan_blocks(SMALL, 16, 32).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7 and all(t.device.type == "meta" and t.dtype == torch.int32 for t in tensors)
    assert (moved.block_q, moved.block_k, moved.visible_pairs) == (16, 32, 13)


@pytest.mark.parametrize(
    ("end", "block_q", "block_k", "told"),
    [
        (SMALL, 24, 16, "24 queries"),
        (SMALL, 16, 8, "8 keys"),
        (SMALL.float(), 16, 16, "float32"),
        (SMALL[:0], 16, 16, "at least 1"),
        (SMALL[None], 16, 16, "(1, 5)"),
        (torch.tensor([2, 1]), 16, 16, "end[1] is 1"),
        (torch.tensor([3, 2]), 16, 16, "end[0] is 3"),
    ],
)
def test_an_end_or_a_block_that_is_none_is_refused(end, block_q, block_k, told):
    with pytest.raises(ValueError) as error:
        plan_blocks(end, block_q, block_k)
    assert told in str(error.value)


def qkv(heads=2, kv_heads=1, tokens=5, size=16, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(1, count, tokens, size, dtype=dtype) for count in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda q, k, v: qkv(size=96), "head size 96"),
        (lambda q, k, v: qkv(heads=3, kv_heads=2), "3 query heads on 2"),
        (lambda q, k, v: qkv(tokens=6), "6 tokens, but blocks of a tree of 5"),
        (lambda q, k, v: qkv(dtype=torch.float64), "float64"),
        (lambda q, k, v: (q, k.half(), v), "'k': 'torch.float16 on cpu'"),
        (lambda q, k, v: (q, k, v.to("meta")), "'v': 'torch.float32 on meta'"),
        (lambda q, k, v: [x.to("meta") for x in (q, k, v)], "blocks.to(q.device)"),
        (lambda q, k, v: (q[0], k, v), "give q (1, H, T, D)"),
        (lambda q, k, v: (q, k, v[:, :, :4]), "give q (1, H, T, D)"),
        (lambda q, k, v: (q, k[..., :8], v[..., :8]), "share one shape"),
        (lambda q, k, v: (q.mT.contiguous().mT, k, v), "q.contiguous()"),
    ],
)
def test_inputs_that_the_kernel_cannot_take_are_refused(change, told):
    with pytest.raises(ValueError) as error:
        tree_attention_forward(*change(*qkv()), plan_blocks(SMALL, 16, 16), 0.25)
    assert told in str(error.value)


def test_a_gradient_of_another_dtype_is_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="'grad_out': 'torch.float16 on cpu'"):
        tree_attention_backward(q.half(), q, k, v, q, torch.zeros(1, 2, 5), plan_blocks(SMALL, 16, 16), 0.25)


CALLS = """
import torch
from stkit_kernels.triton_tree import plan_blocks, tree_attention_backward, tree_attention_forward
q, lse = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 2)
half, blocks = q.bfloat16(), plan_blocks(torch.tensor([1]), 16, 16)
for call in (lambda: tree_attention_forward(half, half, half, blocks, 1.0),
             lambda: tree_attention_backward(half, half, half, half, half, lse, blocks, 1.0),
             lambda: tree_attention_backward(q, q, q, q, q, lse, blocks, 1.0)):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_a_cpu_without_the_interpreter_is_told_what_to_do():
    lines = child(["-c", CALLS], interpret=False).splitlines()
    assert len(lines) == 3 and all("TRITON_INTERPRET=1 before triton is imported" in line for line in lines)


def test_the_interpreter_refuses_bfloat16_which_it_gets_wrong_and_a_log_sum_exp_of_another_shape():
    *bfloat16, other = interpreted()[:3]
    assert len(bfloat16) == 2 and all("use float32 or float16" in line for line in bfloat16)
    assert "lse of torch.float32 (1, 1, 2)" in other


EXPANDED = """
import torch
from stkit_kernels.triton_tree import plan_blocks, tree_attention_backward, tree_attention_forward
q = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
blocks = plan_blocks(torch.tensor([5, 5, 3, 5, 5]), 16, 16)
out, lse = tree_attention_forward(q, q, q, blocks, 0.25)
thin = torch.ones(()).expand_as(out)
pairs = [tree_attention_backward(grad, q, q, q, out, lse, blocks, 0.25) for grad in (thin, thin.contiguous())]
print(*(bool(a.any()) and torch.equal(a, b) for a, b in zip(*pairs)))
"""


def test_the_gradient_of_a_sum_is_taken_though_it_has_no_strides():
    assert interpreted()[3:] == ["True True True"]


@lru_cache
def interpreted() -> list[str]:
    """What both pieces of code say in the interpreter, line by line."""
    return child(["-c", CALLS + EXPANDED], interpret=True).splitlines()


def test_one_table_cuts_every_head_size():
    for size in triton_tree.HEAD_SIZES:
        assert min(tile_of(size)) >= 32
    assert tile_of(80) == tile_of(128)


def test_the_proofs_compile_every_kernel_for_every_head_and_dtype():
    names = [case[0] for case in triton_tree.aot_cases()]
    kernels = ("forward", "delta", "dkdv", "dq")
    sizes = product(kernels, (64, 80, 128), ("fp16", "bf16"))
    expected = {f"tree {kernel} D={size} {dtype}" for kernel, size, dtype in sizes}
    assert len(names) == 24 and set(names) == expected


COMPILE = """
import sys
sys.path.insert(0, sys.argv[1])
import prove
from stkit_kernels import triton_tree

class Forward:
    "The forward kernel as it ships, and in a tile that two warps can't hold."
    def aot_cases():
        name, fn, signature, constexprs, warps, *rest = triton_tree.aot_cases()[0]
        wide = {**constexprs, "BLOCK_Q": 128}
        return [(name, fn, signature, constexprs, warps, *rest), (name, fn, signature, wide, 2, *rest)]

for row in prove.compiled_rows((Forward,), (80,)):
    print(row["name"], row["ok"], row["spill_bytes"] > 0, sep=";")
"""


def test_the_forward_kernel_compiles_without_spills_and_a_tile_that_spills_is_not_proven():
    lines = child(["-c", COMPILE, BENCHMARKS], interpret=False).splitlines()
    assert lines == ["tree forward D=64 fp16;True;False", "tree forward D=64 fp16;False;True"]


def test_a_loop_that_changes_nothing_is_not_proven():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        loop_row = load("prove").loop_row
    finally:
        sys.path.remove(str(BENCHMARKS))
    assert not loop_row("without full", {"out": 1.0, "dq": 0.001})["ok"]
    assert loop_row("without full", {"out": float("nan"), "dq": 0.5})["ok"]
    assert not loop_row("all masked", {"out": 0.5})["ok"] and not loop_row("all masked", {"out": float("nan")})["ok"]
