"""What can be proven of the Triton kernels without a GPU, as a table: ``make kernels``.

    python kernels/benchmarks/prove.py --out runs/kernels

Writes ``kernels.json`` and ``kernels.md``: (1) tree attention and its gradients against a dense oracle, in Triton's
interpreter; (2) every kernel compiled ahead of time for every card: registers, spills, shared memory; (3) blocks visited
against the fewest that could do. Exits with 1, naming each proof that failed.
"""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
import triton
from stkit_kernels import logprob_triton, patchify_triton, triton_tree
from stkit_kernels.aot import CAPABILITIES, SHARED_LIMIT_BYTES, compile_kernel
from tree_equality import RESULTS, TOLERANCE, Nodes, tree

# modules that offer aot_cases()
PROOFS = (triton_tree, logprob_triton, patchify_triton)

TREES: dict[str, Nodes] = {
    "GRPO group: prompt 403, 8 rollouts of 64": ((403, -1), *((64, 0),) * 8),
    "evaluation: video 400, 8 questions of 40, 4 options of 40 each": (
        (400, -1),
        *(node for question in range(8) for node in ((40, 0), *((40, 1 + 5 * question),) * 4)),
    ),
    "depth three, unequal lengths": (
        (311, -1), (97, 0), (33, 1), (1, 1), (142, 1), (18, 0), (75, 5), (209, 5), (64, 0), (5, 8), (128, 8),
    ),
}  # fmt: skip


def start_equality() -> subprocess.Popen:
    """The interpreter's runs, beside the compiler's: a child, since triton is either one or the other in a process."""
    script = Path(__file__).parent / "tree_equality.py"
    return subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def equality_rows(child: subprocess.Popen) -> list[dict]:
    """One row a case, ``ok`` if every result is within the dtype's tolerance; then the loops, then siblings."""
    shown, errors = child.communicate()
    if child.returncode:
        raise RuntimeError(f"tree_equality.py failed:\n{errors}")
    found, rows = json.loads(shown), []
    for name, row in found["cases"].items():
        limit = TOLERANCE[row["case"]["dtype"]]
        within = all(row["relative"][result] <= limit for result in RESULTS)
        rows.append({"name": name, **row, "tolerance": limit, "ok": within and row["wrote_only_its_own"]})
    rows += [loop_row(name, row) for name, row in found["loops"].items()]
    apart = found["sibling"] == {"in the branch": True, "elsewhere": False}
    return [*rows, {"name": "a changed branch changes no bit elsewhere", "ok": apart}]


def loop_row(plan: str, relative: dict[str, float]) -> dict:
    """A loop is proven to have run if every result is wrong without its blocks; the mask, if full blocks bear it."""
    if plan == "all masked":
        ok = all(value <= TOLERANCE["float32"] for value in relative.values())
    else:
        ok = not any(value < 0.01 for value in relative.values())  # NaN, a row that saw nothing, is wrong as well
    return {"name": f"loops: a group {plan}", "relative": relative, "ok": ok}


def compiled_rows(modules: tuple, capabilities: tuple[int, ...] = CAPABILITIES) -> list[dict]:
    """One row a kernel and card, ``ok`` if nothing spills and its shared memory is there."""
    rows = []
    for module in modules:
        for name, fn, signature, constexprs, warps, stages, divisible in module.aot_cases():
            sizes = {key.removeprefix("BLOCK_"): value for key, value in constexprs.items() if "BLOCK" in key}
            tile = " ".join(f"{key} {value}" for key, value in sizes.items())
            for capability in capabilities:
                facts = compile_kernel(fn, signature, constexprs, capability, warps, stages, divisible)
                ok = facts.spill_bytes == 0 and facts.shared_bytes <= SHARED_LIMIT_BYTES[capability]
                row = {"name": name, "card": f"sm_{capability}", "tile": tile, "warps": warps, "stages": stages}
                rows.append({**row, **asdict(facts), "limit_bytes": SHARED_LIMIT_BYTES[capability], "ok": ok})
    return rows


def tile_rows() -> list[dict]:
    """One row a head size: tiles of at least 32 x 32."""
    sizes = {size: triton_tree.tile_of(size) for size in (64, 80, 128)}
    return [{"name": f"tile of head size {n}", "tile": tile, "ok": min(tile) >= 32} for n, tile in sizes.items()]


def visited_rows() -> list[dict]:
    """One row a tree and tile: blocks visited, beside a count over the dense mask and what others would visit."""
    rows, tiles = [], sorted({triton_tree.tile_of(size) for size in (64, 128)})
    for (name, nodes), tile in product(TREES.items(), tiles):
        end, visible = tree(nodes)
        blocks = triton_tree.plan_blocks(end, *tile)
        needed, dense = dense_count(visible, *tile)
        causal = triton_tree.plan_blocks(torch.full_like(end, len(end)), *tile).visited
        row = {"name": name, "tile": tile, "tokens": len(end), "visited": blocks.visited, "full": blocks.full}
        row |= {"needed": needed, "causal": causal, "dense": dense, "ideal": round(blocks.ideal, 1)}
        pairs = int(visible.sum()) == blocks.visible_pairs
        rows.append({**row, "ratio": round(blocks.visited / blocks.ideal, 3), "ok": pairs and blocks.visited == needed})
    return rows


def dense_count(visible: torch.Tensor, block_q: int, block_k: int) -> tuple[int, int]:
    """(blocks of a dense mask that hold a visible pair, all of them)."""
    pad = torch.nn.functional.pad(visible, (0, -len(visible) % block_k, 0, -len(visible) % block_q))
    some = pad.unflatten(0, (-1, block_q)).unflatten(2, (-1, block_k)).any(3).any(1)
    return int(some.sum()), some.numel()


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(),
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
        "gpu": "none: not run on a GPU",
        "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip


def plain(value):
    """JSON has no NaN and no infinity: those become text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def table(head: str, rows: list[list]) -> str:
    names = head.split(" | ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def markdown(proof: dict) -> str:
    """The same as kernels.json, to read."""
    told = {True: "yes", False: "**NO**"}
    equal = []
    for row in proof["equality"]:
        found = row.get("max_abs_diff") or row.get("relative") or {}
        numbers = [f"{found[name]:.1e}" if found else "" for name in RESULTS]
        equal.append([row["name"], row.get("tokens", ""), *numbers, told[row["ok"]]])
    keys = ("name", "card", "tile", "warps", "stages", "registers", "spill_bytes", "shared_bytes", "limit_bytes")
    compiled = [[*(row[key] for key in keys), told[row["ok"]]] for row in proof["compiled"]]
    keys = ("name", "tokens", "tile", "visited", "full", "needed", "ideal", "ratio", "causal", "dense")
    visited = [[*(row[key] for key in keys), told[row["ok"]]] for row in proof["visited"]]
    parts = [
        "# What is proven of the Triton kernels without a GPU",
        "\n".join(f"- {name}: {value}" for name, value in proof["machine"].items()),
        "## Equal to a dense oracle",
        "Largest absolute differences from a masked softmax in float64, in Triton's interpreter, inputs amid NaN. "
        f"Goal, relative to the largest value: {TOLERANCE['float32']:.0e} in float32, {TOLERANCE['float16']:.1e} in "
        "float16. The rows 'loops' are relative: without its blocks each loop's results are wrong, so each loop ran. "
        "bfloat16 is compiled below but not run: the interpreter gets it wrong.",
        table("case | T | out | lse | dq | dk | dv | ok", equal),
        "## Compiled ahead of time",
        "Goal: no spills, shared memory within what a block may take. Spills are bytes of a thread, shared memory "
        "is a block's. Pointers and strides are taken to be multiples of 16, as torch's are; T is not.",
        table("kernel | card | tile | warps | stages | registers | spills | shared | limit | ok", compiled),
        "## Blocks visited",
        "Pairs of blocks. Ideal: visible pairs of tokens / size of a block; needed: counted over the dense mask; "
        "causal: what a kernel that knows no tree would visit; dense: all.",
        table("tree | T | tile | visited | full | needed | ideal | visited / ideal | causal | dense | ok", visited),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.json and kernels.md")
    out, began = parser.parse_args().out, time.monotonic()
    child = start_equality()
    proof = {"machine": machine(), "compiled": compiled_rows(PROOFS), "tiles": tile_rows(), "visited": visited_rows()}
    proof["equality"] = equality_rows(child)
    proof["seconds"] = round(time.monotonic() - began)
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").write_text(json.dumps(plain(proof), indent=1, allow_nan=False) + "\n")
    (out / "kernels.md").write_text(markdown(proof))
    rows = [row for part in ("equality", "compiled", "tiles", "visited") for row in proof[part]]
    failed = [row for row in rows if not row["ok"]]
    for row in failed:
        print("not proven:", row["name"], row.get("card", ""))
    print(f"{len(rows) - len(failed)} of {len(rows)} proofs in {proof['seconds']} s: {out / 'kernels.md'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
