"""The Triton kernel against a dense oracle, in Triton's interpreter. It runs in a process of its own, since the
interpreter is chosen when triton is imported; what it answers is read by ``make kernels`` and by the tests::

    python kernels/benchmarks/tree_equality.py      # one JSON object: {"cases": ..., "loops": ..., "sibling": ...}

The oracle is a masked softmax in float64 with torch's autograd. Its mask comes from the nodes' parents, not from
``end``. Inputs lie in larger storage full of NaN, and so do outputs, whose surroundings have to stay NaN.
"""

import json
import os
from dataclasses import asdict, dataclass, replace

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch  # noqa: E402
from stkit_kernels import triton_tree  # noqa: E402
from stkit_kernels.triton_tree import Blocks, plan_blocks, tree_attention_backward, tree_attention_forward  # noqa: E402

# (tokens, parent's place in the list or -1), depth first
Nodes = tuple[tuple[int, int], ...]
GROUP: Nodes = ((37, -1), (19, 0), (19, 0), (20, 0))
ONE_TOKEN_NODES: Nodes = ((1, -1), (1, 0), (1, 1), (1, 1), (30, 0), (1, 4), (1, 4), (1, 0))
ONE_BRANCH: Nodes = ((71, -1),)
FOREST: Nodes = ((35, -1), (7, 0), (9, 0), (1, -1), (20, -1), (3, 4), (1, 4))
DEPTH_THREE: Nodes = ((40, -1), (17, 0), (6, 1), (1, 1), (23, 0), (5, 4), (11, 4), (33, 0), (2, 7))


@dataclass(frozen=True)
class Case:
    """A tree, the heads upon it, and how it is cut."""

    nodes: Nodes
    heads: int = 2
    kv_heads: int = 1
    size: int = 16
    block_q: int = 16
    block_k: int = 16
    dtype: str = "float32"


CASES = {
    "a group": Case(GROUP),
    "a group, wider keys": Case(GROUP, block_k=32),
    "a group, wider queries": Case(GROUP, block_q=32),
    "a group in tiles of 64": Case(((70, -1), (64, 0), (31, 0)), block_q=64, block_k=64, size=64),
    "nodes of one token": Case(ONE_TOKEN_NODES),
    "a tree of one token": Case(((1, -1),)),
    "one branch": Case(ONE_BRANCH),
    "one branch in whole blocks": Case(((64, -1),)),
    "a forest": Case(FOREST),
    "depth three": Case(DEPTH_THREE),
    "one head for each": Case(GROUP, kv_heads=2),
    "four heads on one": Case(FOREST, heads=8, kv_heads=2),
    "seven heads on one": Case(FOREST, heads=7),
    "head size 32": Case(GROUP, size=32),
    "head size 64": Case(GROUP, size=64),
    "head size 80": Case(FOREST, heads=4, kv_heads=2, size=80),
    "head size 128": Case(GROUP, size=128),
}
CASES |= {
    f"{name}, float16": replace(CASES[name], dtype="float16")
    for name in ("a group", "nodes of one token", "depth three", "head size 80", "head size 128")
}
RESULTS = ("out", "lse", "dq", "dk", "dv")
# of the largest expected value. float16 rounds the weights, the output and the gradients: 4 roundings of 2^-10
TOLERANCE = {"float32": 1e-5, "float16": 4 * torch.finfo(torch.float16).eps}


def tree(nodes: Nodes) -> tuple[torch.Tensor, torch.Tensor]:
    """``end (T,)`` by walking up from every token, and who sees whom ``(T, T)`` by the nodes' parents."""
    node = torch.tensor([place for place, (tokens, _) in enumerate(nodes) for _ in range(tokens)])
    above = torch.eye(len(nodes), dtype=torch.bool)
    for place, (_, parent) in enumerate(nodes):
        if parent >= 0:
            above[place] |= above[parent]
    visible = above[node[:, None], node[None, :]].tril()
    return visible.int().mul(torch.arange(1, len(node) + 1)[:, None]).amax(0).long(), visible


def oracle(q, k, v, grad, visible: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
    """Masked softmax in float64, gradients by autograd."""
    q, k, v, grad = (tensor.detach().double() for tensor in (q, k, v, grad))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    share = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(share, 1).transpose(2, 3) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    out = scores.softmax(-1) @ v.repeat_interleave(share, 1)
    found = out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, leaves, grad)
    return dict(zip(RESULTS, found, strict=True))


def in_nan(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same values inside larger storage of NaN: (view, storage). Every side but the last stride's has a margin."""
    heads, tokens, size = tensor.shape[1:]
    storage = torch.full((heads + 2, tokens + 70, size + 5), float("nan"), dtype=tensor.dtype)
    view = storage[None, 1:-1, 35:-35, 3:-2]
    view.copy_(tensor)
    return view, storage


def untouched(view: torch.Tensor, storage: torch.Tensor) -> bool:
    return int(storage.isnan().sum()) == storage.numel() - view.numel() + int(view.isnan().sum())


def inputs(case: Case, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v and the gradient of out, standard normal."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(count for count, _ in case.nodes)
    shapes = [(1, heads, tokens, case.size) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    return [torch.randn(shape, generator=generator).to(getattr(torch, case.dtype)) for shape in shapes]


def run(case: Case, blocks: Blocks, scale: float) -> tuple[dict[str, torch.Tensor], bool]:
    """The kernel's results, and whether it wrote nowhere else."""
    made = []

    def like_in_nan(tensor: torch.Tensor) -> torch.Tensor:
        made.append(in_nan(torch.zeros_like(tensor)))
        return made[-1][0]

    plain, triton_tree._like = triton_tree._like, like_in_nan
    try:
        q, k, v, grad = (in_nan(tensor)[0] for tensor in inputs(case))
        out, lse = tree_attention_forward(q, k, v, blocks, scale)
        wide = torch.full((lse.numel() + 200,), float("nan"))
        lse = wide[100:-100].copy_(lse.flatten()).view_as(lse)
        dq, dk, dv = tree_attention_backward(grad, q, k, v, out, lse, blocks, scale)
    finally:
        triton_tree._like = plain
    clean = len(made) == 4 and all(untouched(*pair) for pair in made)
    return dict(zip(RESULTS, (out, lse, dq, dk, dv), strict=True)), clean


def relative(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference over the largest expected value (over 1 where all are 0); NaN if there is one anywhere."""
    largest = {name: float(expected[name].abs().max()) or 1.0 for name in RESULTS}
    return {name: difference / largest[name] for name, difference in differences(ours, expected).items()}


def differences(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((ours[name].double() - expected[name]).abs().max()) for name in RESULTS}


def only(blocks: Blocks, full: bool) -> Blocks:
    """The plan without its full blocks, or with nothing else."""
    cut = {}
    for side in ("key", "query"):
        offsets, masked, index = (getattr(blocks, f"{side}_{name}") for name in ("offsets", "masked", "index"))
        ranges = zip(offsets[:-1].tolist(), masked.tolist(), offsets[1:].tolist(), strict=True)
        parts = [index[first:middle] if full else index[middle:last] for first, middle, last in ranges]
        sizes = torch.tensor([0] + [len(part) for part in parts]).cumsum(0).to(torch.int32)
        cut |= {f"{side}_offsets": sizes, f"{side}_index": torch.cat(parts)}
        cut[f"{side}_masked"] = sizes[1:] if full else sizes[:-1]
    return replace(blocks, **cut)


def all_masked(blocks: Blocks) -> Blocks:
    """The plan with its full blocks handed to the masked loop."""
    return replace(blocks, key_masked=blocks.key_offsets[:-1], query_masked=blocks.query_offsets[:-1])


def check(case: Case) -> dict:
    """Differences of one case, and what each loop adds to each result."""
    end, visible = tree(case.nodes)
    blocks, scale = plan_blocks(end, case.block_q, case.block_k), case.size**-0.5
    expected = oracle(*inputs(case), visible, scale)
    ours, clean = run(case, blocks, scale)
    return {
        "case": asdict(case), "tokens": len(end), "visited": blocks.visited, "full": blocks.full,
        "max_abs_diff": differences(ours, expected), "relative": relative(ours, expected), "wrote_only_its_own": clean,
    }  # fmt: skip


def check_loops(case: Case) -> dict[str, dict[str, float]]:
    """How far results are off with one kind of blocks left out, and with the mask on full blocks too."""
    end, visible = tree(case.nodes)
    blocks, scale = plan_blocks(end, case.block_q, case.block_k), case.size**-0.5
    expected = oracle(*inputs(case), visible, scale)
    plans = {"without full": only(blocks, full=False), "without masked": only(blocks, full=True)}
    plans["all masked"] = all_masked(blocks)
    return {name: relative(run(case, plan, scale)[0], expected) for name, plan in plans.items()}


def check_sibling(case: Case) -> dict[str, bool]:
    """The first branch's keys and values are replaced: did any bit change in the branch, and did any elsewhere?"""
    end, _ = tree(case.nodes)
    blocks, (q, k, v, _) = plan_blocks(end, case.block_q, case.block_k), inputs(case)
    branch = slice(case.nodes[0][0], case.nodes[0][0] + case.nodes[1][0])
    before, _ = tree_attention_forward(q, k, v, blocks, case.size**-0.5)
    k[:, :, branch], v[:, :, branch] = 3.0, -5.0
    moved = (tree_attention_forward(q, k, v, blocks, case.size**-0.5)[0] != before).any(3).any(1)[0]
    return {"in the branch": bool(moved[branch].all()), "elsewhere": bool(moved.sum() > moved[branch].sum())}


def main() -> None:
    torch.set_num_threads(1)
    rows = {name: check(case) for name, case in CASES.items()}
    group = CASES["a group"]
    print(json.dumps({"cases": rows, "loops": check_loops(group), "sibling": check_sibling(group)}))


if __name__ == "__main__":
    main()
