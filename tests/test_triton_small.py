"""The small Triton kernels (log-probabilities, patches): equal in the interpreter, and compiled for absent cards.

The interpreter must be switched on before triton is imported, and pytest's workers share their process, so all cases of
a kind run in one child process and come back as numbers. Not run on a GPU.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

IN_THE_INTERPRETER = r"""
import itertools, json, sys
import torch
import stkit_kernels.logprob_triton as kernel
from stkit_kernels.logprob import selected_log_probs
from stkit_kernels.patchify import choose_backend, patchify

kernel.BLOCK_N, kernel.BLOCK_V, kernel.BLOCK_E = 16, 32, 16   # so that small cases have several blocks and ragged ends
found = {}

def gap(a, b):
    return (a.double() - b.double()).abs().max().item()

def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)

def amid_nan(x):    # what is read past an end is NaN: it would show
    shape = [n + 9 for n in x.shape]
    inside = tuple(slice(4, 4 + n) for n in x.shape)
    room = torch.full(shape, float("nan"), dtype=x.dtype)
    room[inside] = x
    return room[inside]

def case(name, count, vocabulary, size, dtype, biased, shares, temperature=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = amid_nan(torch.randn(count, size, generator=generator).to(dtype)).requires_grad_()
    weight = amid_nan((torch.randn(vocabulary, size, generator=generator) / 3).to(dtype))
    bias = amid_nan(torch.randn(vocabulary, generator=generator).to(dtype)) if biased else None
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    targets[0], targets[-1] = vocabulary - 1, 0
    kernel.PROGRAMS_PER_PROCESSOR = shares
    with torch.no_grad():
        plain = selected_log_probs(hidden, weight, targets, bias, temperature, False, backend="triton")
    ours = selected_log_probs(hidden, weight, targets, bias, temperature, True, backend="triton")
    logits = hidden.double() @ weight.double().T + (bias.double() if biased else 0)
    log_p = (logits / temperature).log_softmax(-1)
    spread, log_p = -(log_p.exp() * log_p).sum(-1), log_p.gather(1, targets[:, None])[:, 0]
    slope, = torch.autograd.grad(ours.log_probs.double().sum() + ours.entropy.double().sum(), hidden)
    exact, = torch.autograd.grad(log_p.sum() + spread.sum(), hidden)
    found[name] = {
        "backend": ours.backend, "log_probs": gap(ours.log_probs, log_p), "entropy": gap(ours.entropy, spread),
        "alone": gap(plain.log_probs, log_p), "slope": gap(slope, exact),
    }

sizes = [(13, 101, 24), (1, 1, 1), (33, 333, 35), (16, 64, 16)]
for (count, vocabulary, size), dtype in itertools.product(sizes, (torch.float32, torch.float16)):
    case(f"{count}x{vocabulary}x{size} {str(dtype)[6:]}", count, vocabulary, size, dtype, True, 2, 0.7)
case("no bias", 13, 101, 24, torch.float32, False, 2)
case("one share", 5, 101, 24, torch.float32, True, 1)
case("a share for each block", 5, 101, 24, torch.float32, True, 4)

hidden, weight = torch.randn(4, 8), torch.randn(70, 8)
bias = torch.zeros(70)
bias[:40] = float("-inf")     # all of the first block
targets = torch.full((4,), 50)
ours, exact = (selected_log_probs(hidden, weight, targets, bias, 1.0, True, backend=b) for b in ("triton", "torch"))
found["forbidden"] = [gap(ours.log_probs, exact.log_probs), gap(ours.entropy, exact.entropy)]
hidden[2, 3] = float("nan")
broken = selected_log_probs(hidden, weight, targets, None, 1.0, True, backend="triton")
found["nan"] = [broken.log_probs.isnan().tolist(), broken.entropy.isnan().tolist()]
found["empty"] = list(selected_log_probs(hidden[:0], weight, targets[:0], backend="triton").log_probs.shape)

mean, std = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
generator = torch.Generator().manual_seed(0)
noise = torch.randint(0, 256, (5, 96, 168, 3), dtype=torch.uint8, generator=generator)
planes = noise.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
cuts = {
    "14 pixels, frames to fill up": (noise[:, :56, :84], 14, 2, 2), "16 pixels": (noise[:4, :64, :96], 16, 2, 2),
    "no merge, three frames": (noise[:3, :12, :18], 6, 1, 3), "planes": (planes[:2, :56, :56], 14, 2, 2),
}
for (name, (frames, *sizes)), dtype in itertools.product(cuts.items(), (torch.float32, torch.float16)):
    ours = patchify(frames, *sizes, mean, std, dtype=dtype, backend="triton")
    exact = patchify(frames, *sizes, mean, std, dtype=dtype, backend="torch")
    same = ours.dtype == exact.dtype and ours.shape == exact.shape
    found[f"patches: {name}, {str(dtype)[6:]}"] = gap(ours, exact) if same else "another shape"
found["chosen"] = choose_backend(torch.device("cpu"), backend="triton")
hidden, weight = hidden.bfloat16(), weight.bfloat16()
found["bfloat16"] = refusal(lambda: selected_log_probs(hidden, weight, targets, backend="triton"))
frames = noise[:2, :28, :28]
found["bfloat16 patches"] = refusal(lambda: patchify(frames, 14, 2, 2, mean, std, torch.bfloat16, "triton"))
json.dump(found, sys.stdout)
"""

COMPILED = r"""
import json, sys
import torch
from dataclasses import asdict
from stkit_kernels import logprob_triton, patchify_triton
from stkit_kernels.aot import SHARED_LIMIT_BYTES, compile_kernel
from stkit_kernels.logprob import selected_log_probs
from stkit_kernels.patchify import patchify

def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)

found = {}
for module, capability in ((logprob_triton, 86), (patchify_triton, 80)):
    name, fn, signature, constants, warps, stages, divisible = module.aot_cases()[-1]
    facts = compile_kernel(fn, signature, constants, capability, warps, stages, divisible)
    found[module.__name__] = asdict(facts) | {"limit": SHARED_LIMIT_BYTES[capability]}
hidden, weight, targets = torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0])
found["logprob"] = refusal(lambda: selected_log_probs(hidden, weight, targets, backend="triton"))
frames = torch.zeros(2, 28, 28, 3, dtype=torch.uint8)
found["patchify"] = refusal(lambda: patchify(frames, 14, 2, 2, (0, 0, 0), (1, 1, 1), backend="triton"))
json.dump(found, sys.stdout)
"""


def child(code: str, **env: str) -> dict:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **env})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return child(IN_THE_INTERPRETER, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def compiled():
    return child(COMPILED, OMP_NUM_THREADS="1")


CASES = [
    f"{sizes} {dtype}" for sizes in ("13x101x24", "1x1x1", "33x333x35", "16x64x16") for dtype in ("float32", "float16")
]


@pytest.mark.parametrize("name", [*CASES, "no bias", "one share", "a share for each block"])
def test_log_probs_equal_those_of_all_logits(found, name):
    case = found[name]
    assert case["backend"] == "triton"
    assert max(case["log_probs"], case["entropy"], case["alone"]) < 5e-6
    assert case["slope"] < (4e-3 if "float16" in name else 1e-5)


def test_tokens_that_a_bias_forbids_leave_no_nan_in_a_whole_block(found):
    assert max(found["forbidden"]) < 1e-5


def test_a_nan_stays_a_nan_in_its_row_and_nowhere_else(found):
    assert found["nan"] == [[False, False, True, False]] * 2


def test_no_rows_give_no_values(found):
    assert found["empty"] == [0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["14 pixels, frames to fill up", "16 pixels", "no merge, three frames", "planes"])
def test_patches_equal_those_of_torch(found, name, dtype):
    assert found[f"patches: {name}, {dtype}"] < (1e-6 if dtype == "float32" else 2e-3)


def test_the_path_that_was_asked_for_is_the_one_taken(found):
    assert found["chosen"] == "triton"


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 patches"])
def test_bfloat16_is_refused_in_the_interpreter_which_gets_it_wrong(found, name):
    assert "bfloat16" in found[name]


@pytest.mark.parametrize("module", ["logprob_triton", "patchify_triton"])
def test_kernels_compile_without_spills_within_the_shared_memory_of_small_cards(compiled, module):
    facts = compiled[f"stkit_kernels.{module}"]
    assert facts["registers"] > 0 and facts["spill_bytes"] == 0
    assert facts["shared_bytes"] <= facts["limit"]


@pytest.mark.parametrize("name", ["logprob", "patchify"])
def test_triton_forced_on_a_cpu_without_the_interpreter_is_an_error_with_the_reason(compiled, name):
    assert "TRITON_INTERPRET=1" in compiled[name]
