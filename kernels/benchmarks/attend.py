"""Cascade attention against torch's own with a dense mask, over sizes of a group: prompt P, G rollouts, C tokens each."""

from collections.abc import Callable

import torch
from stkit_kernels.cascade import cascade_attention
from stkit_kernels.plan import plan_tree
from stkit_kernels.reference import dense_attention, visible_mask

SIZE = (1500, 8, 128)
SWEEP = [(p, g, c) for p in (128, 512, 1500, 3000) for g in (1, 8, 32) for c in (16, 128) if p + g * c <= 5000]
HEADS, SIZE_OF_HEAD = 8, 64


def group_end(prompt: int, group: int, new: int) -> torch.Tensor:
    """``end`` of a prompt with G rollouts."""
    total = prompt + group * new
    ends = [torch.full((prompt,), total)] + [torch.full((new,), prompt + (g + 1) * new) for g in range(group)]
    return torch.cat(ends)


def pair(p: int, g: int, c: int, heads: int = HEADS) -> tuple[Callable, Callable]:
    """Both ways of one attention, forward and backward pass: each returns output and gradients."""
    end = group_end(p, g, c)
    draw = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, len(end), heads, SIZE_OF_HEAD, generator=draw).transpose(1, 2) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    mask, plan = visible_mask(end), plan_tree(end)

    def run(attend, backward=True):
        out = attend()
        return (out.detach(), *(torch.autograd.grad(out, (q, k, v), grad) if backward else ()))

    return (lambda **x: run(lambda: dense_attention(q, k, v, mask), **x)), (
        lambda **x: run(lambda: cascade_attention(q, k, v, plan), **x)
    )


def rows(small: bool, timed: Callable, row: Callable) -> list[dict]:
    """The size of the goal, forward pass alone and both passes; and the worst of the sweep."""
    p, g, c = (60, 3, 8) if small else SIZE
    masked, cascade = pair(p, g, c)
    diff = max(float((a - b).abs().max()) for a, b in zip(masked(), cascade()))
    name = f"cascade against masked SDPA, P={p} G={g} C={c}"
    repeats = 2 if small else 7
    found = [
        timed(
            f"{name}, forward pass",
            lambda: masked(backward=False),
            lambda: cascade(backward=False),
            repeats,
            ">= 2",
            diff,
        ),
        timed(f"{name}, both passes", masked, cascade, repeats, ">= 2", diff),
    ]
    swept = []
    for p, g, c in [(60, 2, 8)] if small else SWEEP:
        masked, cascade = pair(p, g, c)
        diff = max(float((a - b).abs().max()) for a, b in zip(masked(), cascade()))
        each = 2 if small else (9 if p + g * c < 1500 else 2)
        swept.append(timed(f"P={p} G={g} C={c}", masked, cascade, each, ">= 1", diff))
    worst = min(swept, key=lambda r: r["ratio"])
    label = f"cascade against masked SDPA, worst of {len(swept)} sizes ({worst['name']})"
    diff = max(r["max_abs_diff"] for r in swept)
    found.append(row(label, "s", worst["peer"], worst["ours"], ">= 1", diff, sweep=swept))
    return found
