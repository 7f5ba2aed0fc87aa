"""Kernels compiled for GPUs that are not there. Numbers are the assembler's; not run on a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

KERNELS = """
import triton, triton.language as tl
from stkit_kernels.aot import compile_kernel

@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)

@triton.jit
def products(x, y, n, SIDE: tl.constexpr):
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for _ in range(n):
        tile = tl.load(x + at)
        total = tl.dot(tile, tile, total)
        x += SIDE * SIDE
    tl.store(y + at, total)

COPY = {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"BLOCK": 128}
PRODUCTS = {"x": "*fp16", "y": "*fp32", "n": "i32"}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run code after the kernels' in a process of its own: there triton is imported without the interpreter, whatever
    the other tests did. Answers what it printed."""
    path = tmp_path_factory.mktemp("aot") / "kernels.py"

    def in_a_child(code: str, **env: str) -> str:
        path.write_text(KERNELS + code)
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, env={**clean, **env})
        assert done.returncode == 0, done.stderr
        return done.stdout

    return in_a_child


def test_a_small_kernel_compiles_for_every_card_without_a_driver(run):
    code = """
for capability in (80, 86, 89, 90):
    facts = compile_kernel(copy, *COPY, capability)
    print(facts.capability, facts.registers, facts.spill_bytes)
"""
    out = run(code)
    rows = [[int(word) for word in line.split()] for line in out.splitlines()]
    assert [row[0] for row in rows] == [80, 86, 89, 90]
    assert all(0 < registers < 64 and spill == 0 for _, registers, spill in rows)


def test_registers_that_do_not_fit_are_counted_as_spilled(run):
    """One warp holds 128 x 128 float32 sums: 512 a thread, where 255 is the most."""
    out = run("print(compile_kernel(products, PRODUCTS, {'SIDE': 128}, 80, 1).spill_bytes)")
    assert int(out) >= 4 * (512 - 255)


def test_divisible_arguments_are_told_to_the_compiler(run):
    """Four warps hold those sums, but only when loads are wide."""
    code = """
for divisible in ((), ("x", "y")):
    print(compile_kernel(products, PRODUCTS, {"SIDE": 128}, 80, 4, divisible=divisible).spill_bytes)
"""
    narrow, wide = map(int, run(code).split())
    assert narrow > 0 and wide == 0


def test_shared_memory_is_what_the_tiles_need(run):
    """Both operands of a product on sm_80 pass through shared memory: a half tile of 64 x 64 is 8192 bytes."""
    out = run("f = compile_kernel(products, PRODUCTS, {'SIDE': 64}, 80, 4)\nprint(f.shared_bytes)")
    assert int(out) % 8192 == 0 and int(out) > 0


def test_a_wrong_call_is_refused_with_its_fix(run):
    code = """
for call in (
    lambda: compile_kernel(copy, *COPY, 75),
    lambda: compile_kernel(copy, {"x": "*fp32", "y": "*fp32"}, {"BLOCK": 128}, 80),
    lambda: compile_kernel(copy, *COPY, 80, divisible=("z",)),
    lambda: compile_kernel(len, *COPY, 80),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    lines = run(code).splitlines()
    assert len(lines) == 4
    told = ["capability 75", "also takes ['n']", "no argument ['z']", "triton.jit"]
    assert all(word in line for word, line in zip(told, lines, strict=True))


def test_the_interpreter_is_told_apart_from_the_compiler(run):
    code = "try:\n compile_kernel(copy, *COPY, 80)\nexcept ValueError as error:\n print(error)"
    assert "unset TRITON_INTERPRET" in run(code, TRITON_INTERPRET="1")

