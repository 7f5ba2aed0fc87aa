"""Compile a Triton kernel for a GPU that is not there, and read what it takes.

The compiler, the assembler and the reader of binaries all come with triton's wheel, so registers, spills and shared
memory of a kernel can be proven on a laptop. Nothing here runs the kernel::

    facts = compile_kernel(kernel, {"x": "*fp16", "n": "i32"}, {"BLOCK": 128}, capability=80, divisible=("x",))
    facts.registers, facts.spill_bytes, facts.shared_bytes
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

CAPABILITIES = (80, 86, 89, 90)
# the most that one block may take, by the CUDA programming guide's table of compute capabilities
SHARED_LIMIT_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class CompiledFacts:
    """What one compiled kernel takes.

    Attributes:
        registers: of a thread; 255 is the most there can be.
        spill_bytes: stack and local memory of a thread. Our kernels have no arrays of their own, so all of it is
            registers that did not fit.
        shared_bytes: shared memory of a block.
        capability: compute capability without its dot, 80 for sm_80.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    capability: int


def compile_kernel(
    fn: JITFunction,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    capability: int,
    num_warps: int = 4,
    num_stages: int = 2,
    divisible: tuple[str, ...] = (),
) -> CompiledFacts:
    """Compile for one GPU, without a driver.

    Args:
        fn: a function under ``triton.jit``.
        signature: argument name to Triton's type, ``"*fp16"`` a pointer, ``"i32"`` an integer, without constexprs.
        constexprs: argument name to value.
        capability: one of ``CAPABILITIES``.
        num_warps: warps of a block.
        num_stages: loads in flight in a pipelined loop.
        divisible: arguments whose value is a multiple of 16. Triton's launcher finds out by itself (torch's
            allocations all are); here they must be named, or loads stay narrow and the registers are not a real run's.

    Raises:
        ValueError: another capability, an argument missing or unknown, or triton's interpreter switched on.

    Source: triton.compiler.compile; ``cuobjdump --dump-resource-usage``.
    """
    source = _source(fn, signature, constexprs, capability, divisible)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    # triton asks for its shared memory at launch, so the binary names only what the system keeps for itself (sm_90)
    shared = max(usage["SHARED"], compiled.metadata.shared)
    return CompiledFacts(usage["REG"], usage["STACK"] + usage["LOCAL"], shared, capability)


def _source(
    fn: JITFunction,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    capability: int,
    divisible: tuple[str, ...],
) -> ASTSource:
    if capability not in CAPABILITIES:
        raise ValueError(f"compute capability {capability!r}: give one of {CAPABILITIES}, 80 for sm_80")
    if not isinstance(fn, JITFunction):
        hint = "the interpreter compiles nothing; unset TRITON_INTERPRET before triton is imported"
        raise ValueError(f"{fn!r} is no function under triton.jit (with TRITON_INTERPRET=1 {hint})")
    given = {*signature, *constexprs}
    if unknown := (given | set(divisible)) - set(fn.arg_names):
        raise ValueError(f"{fn.__name__} has no argument {sorted(unknown)}: it has {fn.arg_names}")
    if missing := [name for name in fn.arg_names if name not in given]:
        raise ValueError(f"{fn.__name__} also takes {missing}: name them in signature or constexprs")
    types = {name: "constexpr" if name in constexprs else signature[name] for name in fn.arg_names}
    attrs = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible if name not in constexprs}
    return ASTSource(fn=fn, signature=types, constexprs=dict(constexprs), attrs=attrs)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the one kernel in a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        shown = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", shown)}
    if len(usage) != 4:
        raise RuntimeError(f"cuobjdump said nothing of registers, stack, shared and local memory: {shown!r}")
    return usage
