"""The whole step of GRPO against the plain recipe and against TRL: time by part, and memory, each side on its own.

Sides of a process of their own (``bench.py --side NAME --folder FOLDER``): ours, plain, trl (as it comes, with
checkpointing) and trl-fast (without, which takes more memory and less time).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import material
import measure
import trl_side
from setting import SMALL, Sizes
from sides import PARTS, Ours, Plain, Side, measured, same_step

SIDES = ("ours", "plain", "trl", "trl-fast")
TRL_NAMES = {"trl": "TRL", "trl-fast": "TRL without checkpointing"}


def rows(sizes: Sizes, timed: Callable, row: Callable) -> list[dict]:
    """Both peers; the model and the clip are written to a temporary folder that all sides load."""
    with tempfile.TemporaryDirectory(prefix="stkit-bench-") as name:
        folder = material.write(Path(name), sizes)
        found = [published_row(folder, sizes, count, timed) for count in (1, sizes.asked)]
        alone = {side: by_itself(side, folder, sizes) for side in ("ours", "plain")}
        for kind, label in (("live_mb", "live tensors"), ("resident_mb", "resident")):
            sides = (alone[side][kind] for side in ("plain", "ours"))
            found.append(row(f"whole step, peak memory ({label}), as published", "MB", *sides, ">= 4", None))
        explain_memory(found[2:], "the plain recipe")
        for side in TRL_NAMES:
            found += trl_rows(side, folder, sizes, alone["ours"], row)
    return found


def title(sizes: Sizes, questions: int = 1) -> str:
    asked = "one question" if questions == 1 else f"{questions} questions of a clip"
    return f"whole step, G={sizes.group}, {sizes.new} new tokens, {asked}"


def published_row(folder: Path, sizes: Sizes, questions: int, timed: Callable) -> dict:
    """Seconds by turns with the plain recipe, exactness first."""
    loss, gradients, tokens = same_step(folder, sizes, questions)
    if tokens != questions * sizes.group * sizes.new:
        raise RuntimeError(f"{tokens} tokens were learned from, {questions * sizes.group * sizes.new} were asked for")
    peer, ours = Plain(folder, sizes, questions), Ours(folder, sizes, questions)
    repeats = max(1, sizes.repeats - (2 if questions == 1 else 3))
    found = timed(f"{title(sizes, questions)}, as published", peer.step, ours.step, repeats, ">= 6", loss)
    found |= {"max_abs_diff_gradients": gradients, "peer_parts": peer.parts(), "ours_parts": ours.parts()}
    if not found["met"]:
        found["reason"] = by_part(found) + (profile(peer, ours) if questions == 1 else "")
    return found


def profile(peer: Side, ours: Side) -> str:
    """Where the time goes on both sides, by kind of operator."""
    shares = {"ours": measure.shares(ours.step), "the peer": measure.shares(peer.step)}
    return "; a profile shows " + " and ".join(f"in {name} {text}" for name, text in shares.items())


def by_part(found: dict) -> str:
    """ "rollouts 3.9 -> 1.7 s (2.3x, 58 % of ours), ..." and what the ratio is without the rollouts."""
    theirs, mine = found["peer_parts"], found["ours_parts"]
    total = sum(mine.values())
    texts = [
        f"{name} {theirs[name]:.2f} -> {mine[name]:.2f} s ({theirs[name] / mine[name]:.1f}x, {mine[name] / total:.0%} of ours)"
        for name in PARTS
    ]
    rest = [sum(side[name] for name in PARTS[1:]) for side in (theirs, mine)]
    return ", ".join(texts).replace("%", " %") + f"; the ratio without the rollouts is {rest[0] / rest[1]:.1f}"


def explain_memory(found: list[dict], peer: str) -> None:
    for one in found:
        if not one["met"]:
            one["reason"] = f"{peer} takes {one['peer']:.0f} MB above its weights, ours {one['ours']:.0f} MB"


def trl_rows(side: str, folder: Path, sizes: Sizes, ours: dict, row: Callable) -> list[dict]:
    """Seconds and memory of TRL's own step against ours, each measured alone in a process."""
    label, found = TRL_NAMES[side], []
    if not trl_side.installed():
        names = (title(sizes), *(f"whole step, peak memory ({kind})" for kind in ("live tensors", "resident")))
        return [missing(f"{n}, {label}", u, g) for n, u, g in zip(names, ("s", "MB", "MB"), (">= 10", ">= 4", ">= 4"))]
    peer = by_itself(side, folder, sizes)
    label = label.replace("TRL", f"TRL {peer['version']}")
    spread = {f"{k}_spread": [min(v["seconds"]), max(v["seconds"])] for k, v in (("peer", peer), ("ours", ours))}
    times = (median(v["seconds"]) for v in (peer, ours))
    found.append(row(f"{title(sizes)}, {label}", "s", *times, ">= 10", None, **spread))
    found[0] |= {"peer_parts": peer["parts"], "ours_parts": ours["parts"], "peer_prompt_tokens": peer["prompt_tokens"]}
    if not found[0]["met"]:
        found[0]["reason"] = by_part(found[0])
    for kind, what in (("live_mb", "live tensors"), ("resident_mb", "resident")):
        found.append(row(f"whole step, peak memory ({what}), {label}", "MB", peer[kind], ours[kind], ">= 4", None))
    explain_memory(found[1:], label)
    return found


def missing(name: str, unit: str, goal: str) -> dict:
    """A row whose peer is not there."""
    return {"name": name, "unit": unit, "peer": None, "ours": None, "ratio": None, "goal": goal, "met": False,
            "reason": trl_side.INSTALL, "max_abs_diff": None}  # fmt: skip


def by_itself(side: str, folder: Path, sizes: Sizes) -> dict:
    """What a side measures of itself in a process of its own (of a toy, whose memory means nothing, one side does)."""
    if sizes == SMALL and side != "ours":
        return run_side(side, folder, sizes)
    command = [sys.executable, "-W", "ignore", str(measure.HERE / "bench.py"), "--side", side, "--folder", str(folder)]
    command += ["--small"] * (sizes == SMALL)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise RuntimeError(f"side {side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_side(side: str, folder: Path, sizes: Sizes) -> dict:
    """Called in that process."""
    repeats = max(1, sizes.repeats - 3)
    if side.startswith("trl"):
        return trl_side.measured(folder, sizes, repeats, checkpointing=side == "trl")
    kind = {"ours": Ours, "plain": Plain}[side]
    return measured(kind(folder, sizes, 1), repeats if side == "ours" else 0)  # the plain recipe is timed by turns
