"""Run every measure of the table: `make bench` writes runs/bench/bench.json, bench.md, plots and report.html.

    python kernels/benchmarks/bench.py --out runs/bench            # under 25 minutes on 2 cores
    python kernels/benchmarks/bench.py --out runs/bench --small    # the same path on a toy, in seconds
    python kernels/benchmarks/bench.py --out runs/bench-step --only whole-step    # one part of it

A row holds name, unit, peer, ours, ratio (peer / ours), goal, met, reason (of a goal not met), max_abs_diff (how far
the two answers are apart) and the spread of both; no numbers where the peer is not installed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import attend
import measure
import page
import peers
import stage
import torch
import whole
from setting import FULL, SMALL, Setting, Sizes, make_setting
from stkit_kernels.logprob import selected_log_probs
from stkit_kernels.memory import LiveStorages, peak_bytes
from stkit_kernels.patchify import patchify
from transformers import Qwen2VLVideoProcessor

from stkit.runs import write_json
from stkit.vlm import kvcache
from stkit.vlm.generate import Sampling, generate


def row(
    name: str, unit: str, peer: float, ours: float, goal: str, diff: float | None, ratio: float | None = None, **more
) -> dict:
    """A line of the table. ``goal``: ">= 9" or "<= 1.05", of the ratio."""
    ratio = peer / ours if ratio is None else ratio
    sign, bound = goal.split()
    met = ratio >= float(bound) if sign == ">=" else ratio <= float(bound)
    return {"name": name, "unit": unit, "peer": peer, "ours": ours, "ratio": ratio, "goal": goal, "met": met,
            "reason": "" if met else "not explained", "max_abs_diff": diff} | more  # fmt: skip


def explain(found: dict, work: float, call: Callable, limits: measure.Machine) -> None:
    """Say why a goal isn't met: where the time goes, and the ratio at this machine's best rate of products.

    ``work``: FLOPs of our call, forward and backward pass.
    """
    if found["met"]:
        return
    rate, best = work / found["ours"] / 1e9, work / limits.gflops / 1e9
    found["reason"] = (
        f"bound by arithmetic: a profile shows {measure.shares(call)}; it runs at {rate:.0f} GFLOP/s where a large product "
        f"reaches {limits.gflops:.0f} here, and at that rate the ratio would be {found['peer'] / best:.1f}"
    )


def timed(name: str, peer: Callable, ours: Callable, repeats: int, goal: str, diff: float) -> dict:
    """A row of seconds, both by turns."""
    theirs, mine = measure.alternate(peer, ours, repeats)
    spread = {"peer_spread": [theirs.low, theirs.high], "ours_spread": [mine.low, mine.high]}
    return row(name, "s", theirs.median, mine.median, goal, diff, **spread)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


def update_rows(s: Setting, limits: measure.Machine) -> list[dict]:
    """Forward and backward pass of one update, against both peers, and its memory."""
    calls = {k: getattr(peers, f"{k}_log_probs") for k in ("published", "lean", "tree")}
    found = {k: peers.update(s, call) for k, call in calls.items()}
    ours, ours_grads = found["tree"]
    diff = {k: apart(found[k][0], ours) for k in ("published", "lean")}
    grads = {k: max(apart(g, ours_grads[n]) for n, g in found[k][1].items()) for k in diff}
    del found
    work = {k: measure.flops(lambda call=call: peers.reference(s, call)) for k, call in calls.items()}

    def step(kind):
        return lambda: peers.update(s, calls[kind])

    rows = []
    for kind, goal in (("published", ">= 9"), ("lean", f">= {0.9 * work['lean'] / work['tree']:.2f}")):
        repeats = s.sizes.repeats if kind == "lean" else max(1, s.sizes.repeats - 2)
        label = "as published" if kind == "published" else "lean"
        rows.append(timed(f"update, G={s.sizes.group}, {label}", step(kind), step("tree"), repeats, goal, diff[kind]))
        rows[-1]["max_abs_diff_gradients"] = grads[kind]
        rows[-1]["flops_ratio"] = work[kind] / work["tree"]
        explain(rows[-1], measure.flops(step("tree")), step("tree"), limits)
    peer, mine = (peak_bytes(step(kind)) / 1e6 for kind in ("published", "tree"))
    rows.append(row("update, peak memory (live tensors), as published", "MB", peer, mine, ">= 5", None))
    small = s.sizes == SMALL  # of a toy, whose memory means nothing, one way runs alone
    peer = measure.peak_resident_mb(step("published")) if small else measure.resident_mb("published", small)
    mine = measure.resident_mb("tree", small)
    rows.append(row("update, peak memory (resident), as published", "MB", peer, mine, ">= 5", None))
    return rows


def reference_rows(s: Setting, limits: measure.Machine) -> list[dict]:
    """Log-probs without gradients and adapter."""
    calls = {k: getattr(peers, f"{k}_log_probs") for k in ("published", "lean", "tree")}
    found = {k: peers.reference(s, call) for k, call in calls.items()}
    work = {k: measure.flops(lambda call=call: peers.reference(s, call)) for k, call in calls.items()}
    rows = []
    for kind, goal in (("published", ">= 10"), ("lean", f">= {0.9 * work['lean'] / work['tree']:.2f}")):
        both = (lambda kind=kind: peers.reference(s, calls[kind])), (lambda: peers.reference(s, calls["tree"]))
        label = "as published" if kind == "published" else "lean"
        diff = apart(found[kind], found["tree"])
        rows.append(timed(f"reference log-probs, {label}", *both, s.sizes.repeats, goal, diff))
        rows[-1]["flops_ratio"] = work[kind] / work["tree"]
        explain(rows[-1], work["tree"], both[1], limits)
    return rows


def rollout_rows(s: Setting, limits: measure.Machine) -> list[dict]:
    """A group of rollouts, and the bytes of the prompt's keys and values."""
    own = peers.tree_rollouts(s, greedy=True)[0]
    plain = s.model.generate(**peers.inputs_of(s, torch.tensor([s.prompt])), do_sample=False, max_new_tokens=s.sizes.new,
                             min_new_tokens=s.sizes.new, eos_token_id=2, pad_token_id=0)[0, len(s.prompt) :]  # fmt: skip
    diff = float((own != plain).sum())  # tokens of a greedy rollout that differ
    both = (lambda: peers.published_rollouts(s)), (lambda: peers.tree_rollouts(s))
    rows = [timed(f"rollouts, G={s.sizes.group}, {s.sizes.new} new tokens", *both, s.sizes.repeats, ">= 2.5", diff)]
    explain_decoding(rows[0], s, limits)
    token = 2 * s.sizes.layers * s.base.config.text_config.num_key_value_heads * s.head_size * 4
    copies = s.sizes.group * len(s.prompt) * token / 1e6  # what a cache expanded to the group holds
    rows.append(row("keys and values of the prompt", "MB", copies, stored_mb(s), f">= {s.sizes.group}", None))
    return rows


def explain_decoding(found: dict, s: Setting, limits: measure.Machine) -> None:
    """Say why decoding is no faster: each step reads every weight, whoever decodes."""
    if found["met"]:
        return
    one = Sampling(max_new_tokens=1)
    call = (
        (lambda: peers.tree_rollouts(s)),
        (lambda: generate(s.model, [s.prompt], s.video, group=s.sizes.group, sampling=one)),
    )
    prompt = measure.alternate(call[1], call[1], 3)[0].median
    weights = sum(p.numel() for p in s.base.model.language_model.parameters()) * 4 / 1e9
    step, least = (found["ours"] - prompt) / (s.sizes.new - 1), weights / limits.gbytes
    best = found["peer"] / (prompt + (s.sizes.new - 1) * least)
    found["reason"] = (
        f"bound by memory: the prompt takes {prompt:.2f} s and each step {step * 1e3:.0f} ms, in which all {weights * 1e3:.0f} MB "
        f"of weights are read for {s.sizes.group} rows, as by the peer; a profile shows {measure.shares(call[0])}; at the "
        f"{limits.gbytes:.0f} GB/s of this machine a step takes {least * 1e3:.0f} ms at least, and the ratio would be {best:.1f}"
    )


def stored_mb(s: Setting) -> float:
    """What the cache really holds of the prompt's keys and values while a group is decoded."""
    made = []
    start = kvcache.TreeCache.start
    kvcache.TreeCache.start = lambda self: made.append(self) or start(self)
    try:
        generate(s.model, [s.prompt], s.video, group=s.sizes.group, sampling=Sampling(max_new_tokens=1))
    finally:
        kvcache.TreeCache.start = start
    stored = [x for shelf in made[0].shelves for x in shelf.keys + shelf.values]
    return sum(x.numel() * x.element_size() for x in stored) / 1e6


def evaluation_rows(s: Setting) -> list[dict]:
    """All questions under all rotations of their options, letter by letter."""
    theirs, mine = peers.published_letters(s), peers.tree_letters(s)
    margin = theirs.topk(2).values.diff(dim=-1).abs()[:, 0]
    same = bool((theirs.argmax(-1) == mine.argmax(-1))[margin > 1e-4].all())
    both = (lambda: peers.published_letters(s)), (lambda: peers.tree_letters(s))
    name = f"evaluation, {s.sizes.questions} questions x {s.sizes.rotations} rotations, as published"
    return [timed(name, *both, max(1, s.sizes.repeats - 2), ">= 12", apart(theirs, mine)) | {"equal_letters": same}]


def flops_row(s: Setting) -> dict:
    """FLOPs that the forward pass over a tree does, against those that its distinct tokens need by a formula."""
    done = measure.flops(lambda: peers.reference(s, peers.tree_log_probs)) / 1e9
    needed = distinct_flops(s) / 1e9
    found = row("forward FLOPs done / of distinct tokens", "GFLOP", needed, done, "<= 1.05", None, ratio=done / needed)
    return found | {"head_for_the_backward_pass_gflop": head_again(s)}


def head_again(s: Setting) -> float:
    """What the head's forward pass computes on top when there will be a backward pass, in GFLOP: probabilities by weights,
    which the backward pass would compute otherwise. The logits are not computed again."""
    hidden = torch.randn(s.rollouts.numel(), s.sizes.hidden)
    weight, targets = s.base.lm_head.weight.detach(), s.rollouts.flatten()
    both = [measure.flops(lambda h=h: selected_log_probs(h, weight, targets)) for h in (hidden, hidden.clone().requires_grad_())]
    return (both[1] - both[0]) / 1e9


def distinct_flops(s: Setting) -> int:
    """2 for each weight and row that it sees, and 4 D for each visible (query, key) pair of a head."""
    from stkit_kernels.plan import plan_tree

    from stkit.vlm.vision import group_windows

    base, tree = s.base, attend.group_end(len(s.prompt), s.sizes.group, s.sizes.new)
    config, tower = base.config.text_config, base.model.visual
    layers = sum(m.weight.numel() for n, m in base.model.language_model.named_modules() if linear(n, m))
    pairs = plan_tree(tree).visible_pairs
    language = 2 * layers * len(tree) + 4 * s.head_size * config.num_attention_heads * config.num_hidden_layers * pairs
    head = 2 * base.lm_head.weight.numel() * s.rollouts.numel()
    patches, merged = len(s.video.pixel_values), len(s.video.pixel_values) // 4
    vision = 2 * sum(p.numel() for n, p in tower.named_parameters() if p.dim() > 1 and "merger" not in n) * patches
    vision += 2 * sum(p.numel() for n, p in tower.merger.named_parameters() if p.dim() > 1) * merged
    size = tower.config.hidden_size // tower.config.num_heads
    for bounds, count in window_bounds(s):
        pairs = sum(n * length**2 for n, length in group_windows(bounds).batches)
        vision += 4 * size * tower.config.num_heads * pairs * count
    return language + head + vision


def linear(name: str, module) -> bool:
    return isinstance(module, torch.nn.Linear) and "lora" not in name


def window_bounds(s: Setting) -> list[tuple[torch.Tensor, int]]:
    """Bounds of the tower's windows, and in how many layers they are these: frames in one, squares of 8 x 8 in the rest."""
    frames, tall, wide = (int(n) for n in s.video.grid_thw)
    whole = torch.tensor([0] + [tall * wide] * frames).cumsum(0)
    side = 8
    squares = [min(side, tall - y) * min(side, wide - x) for y in range(0, tall, side) for x in range(0, wide, side)]
    return [(whole, 1), (torch.tensor([0] + squares * frames).cumsum(0), s.sizes.layers - 1)]


def logprob_row(small: bool) -> dict:
    """Memory of the selected log-probs, forward and backward pass."""
    vocabulary, width, count = (3_000, 32, 64) if small else (152_000, 512, 1_024)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=draw).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=draw) / width**0.5
    targets = torch.randint(vocabulary, (count,), generator=draw)

    def plain():
        found = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
        return found, torch.autograd.grad(found.sum(), hidden)[0]

    def ours():
        found = selected_log_probs(hidden, weight, targets).log_probs
        return found, torch.autograd.grad(found.sum(), hidden)[0]

    a, b = plain(), ours()
    diff = max(apart(x, y) for x, y in zip(a, b))
    del a, b
    name = f"log-prob memory, V={vocabulary // 1000}k, T={count}"
    return row(name, "MB", peak_bytes(plain) / 1e6, peak_bytes(ours) / 1e6, ">= 10", diff)


def patchify_rows(small: bool) -> list[dict]:
    """uint8 frames to patches, against Transformers' video processor, and what both hold meanwhile."""
    theirs = Qwen2VLVideoProcessor()
    frames = torch.randint(0, 256, (2 if small else 32, 224, 280, 3), dtype=torch.uint8)
    planes = frames.permute(0, 3, 1, 2)  # as a decoder gives them, in the order that Transformers wants

    def peer():
        return theirs([planes], do_resize=False, do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]

    def ours():
        return patchify(frames, 14, 2, 2, theirs.image_mean, theirs.image_std)

    rows = [timed("patchify", peer, ours, 3 if small else 15, ">= 2", apart(peer(), ours()))]
    with LiveStorages() as held, torch.no_grad():
        found = ours()
    rows[0]["float32_copies"] = round(held.peak / (found.numel() * 4), 3)
    return rows


PARTS = (
    "patchify", "log-prob", "cascade", "FLOPs", "reference", "rollouts", "evaluation", "update", "whole-step", "stage",
)  # fmt: skip


def every_row(sizes: Sizes, say: Callable, only: str | None = None) -> list[dict]:
    small = sizes == SMALL
    s, limits = make_setting(sizes), measure.machine_limits(200 if small else 2000)
    say(f"this machine: {limits.gflops:.0f} GFLOP/s, {limits.gbytes:.0f} GB/s")
    parts = {
        "patchify": lambda: patchify_rows(small), "log-prob": lambda: [logprob_row(small)],
        "cascade": lambda: attend.rows(small, timed, row), "FLOPs": lambda: [flops_row(s)],
        "reference": lambda: reference_rows(s, limits), "rollouts": lambda: rollout_rows(s, limits),
        "evaluation": lambda: evaluation_rows(s), "update": lambda: update_rows(s, limits),
        "whole-step": lambda: whole.rows(sizes, timed, row), "stage": lambda: stage.rows(
            small, timed, lambda found, call: explain(found, measure.flops(call), call, limits)),
    }  # fmt: skip
    found = []
    for name in PARTS if only is None else [only]:
        begin = time.monotonic()
        new = parts[name]()
        found += new
        for r in new:
            if r["peer"] is None:
                say(f"{r['name']}: {r['reason']}")
                continue
            say(
                f"{r['name']}: {r['peer']:.4g} -> {r['ours']:.4g} {r['unit']}, ratio {r['ratio']:.2f} (goal {r['goal']})"
            )
        say(f"  {name}: {time.monotonic() - begin:.0f} s")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time and memory against plain Transformers, with exactness beside it."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--small", action="store_true", help="a toy, to see that it runs: goals are not judged")
    parser.add_argument("--only", choices=PARTS, help="one part of the table: the others are not measured or written")
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=whole.SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = SMALL if arguments.small else FULL
    if arguments.resident:
        s = make_setting(sizes)
        call = getattr(peers, f"{arguments.resident}_log_probs")
        print(measure.peak_resident_mb(lambda: peers.update(s, call)))
        return
    if arguments.side:
        print(json.dumps(whole.run_side(arguments.side, arguments.folder, sizes)))
        return
    begin, load = time.monotonic(), os.getloadavg()[0]
    rows = every_row(sizes, lambda text: print(text, flush=True), arguments.only)
    result = {"rows": rows, "small": arguments.small, "seconds": round(time.monotonic() - begin), **page.origin()}
    result["load_average"] = {"start": round(load, 2), "end": round(os.getloadavg()[0], 2)}
    write_json(arguments.out / "bench.json", result)
    page.write(arguments.out, json.loads((arguments.out / "bench.json").read_text()))
    print(f"\n{page.table(rows)}\n\nthe report is {arguments.out / 'report.html'}")
    missed = [r["name"] for r in rows if not r["met"]]
    if missed and not arguments.small:
        print(f"goals not met: {', '.join(missed)}", file=sys.stderr)


if __name__ == "__main__":
    main()
