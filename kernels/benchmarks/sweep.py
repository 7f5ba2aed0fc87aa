"""How cost grows: `make bench-sweep` varies frames, rollouts and questions, one at a time, against lean Transformers.

    python kernels/benchmarks/sweep.py --out runs/bench-sweep

sweep.json holds rows as bench.json does, with ``of`` (what varies), ``at`` (its value) and the tokens that copies have
(``peer_tokens``).
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import page
import peers
import torch
from bench import apart, timed
from setting import FULL, SMALL, Setting, Sizes, make_setting

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from stkit.runs import write_json, write_text  # noqa: E402

FRAMES, GROUPS, QUESTIONS = (4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32)


def lean_letters(s: Setting) -> torch.Tensor:
    """Letters with the tower run once and logits of the last position: the best that plain Transformers can do."""
    found = []
    with torch.no_grad():
        features = s.base.get_video_features(s.video.pixel_values, s.video.grid_thw[None], return_dict=True)
        for ids in torch.tensor(peers.every_prompt(s)).split(8):
            logits = s.model(**peers.inputs_of(s, ids, features), use_cache=False, logits_to_keep=1).logits[:, -1]
            found.append(torch.log_softmax(logits, -1)[:, list(peers.LETTERS)])
    return torch.cat(found)


def update_at(s: Setting) -> tuple[Callable, Callable, float]:
    """Both ways of an update, and how far their log-probs are apart."""
    found = [peers.update(s, call)[0] for call in (peers.lean_log_probs, peers.tree_log_probs)]
    both = (lambda: peers.update(s, peers.lean_log_probs)), (lambda: peers.update(s, peers.tree_log_probs))
    return *both, apart(*found)


def letters_at(s: Setting) -> tuple[Callable, Callable, float]:
    """Both ways of an evaluation, and how far their log-probs are apart."""
    return (lambda: lean_letters(s)), (lambda: peers.tree_letters(s)), apart(lean_letters(s), peers.tree_letters(s))


def every_row(sizes: Sizes, say: Callable) -> list[dict]:
    plan = [("frames", FRAMES, "frames", update_at), ("rollouts", GROUPS, "group", update_at)]
    plan += [("questions", QUESTIONS, "questions", letters_at)]
    rows = []
    for of, values, name, ways in plan:
        for value in values[: 2 if sizes == SMALL else None]:
            s = make_setting(sizes, **{name: value})
            peer, ours, diff = ways(s)
            row = timed(f"{of}: {value}", peer, ours, 1 if sizes == SMALL else 3, ">= 1", diff) | {"of": of, "at": value}
            prompts = peers.every_prompt(s) if of == "questions" else peers.whole(s).tolist()
            row["peer_tokens"] = sum(map(len, prompts))
            rows.append(row)
            say(f"{row['name']}: {row['peer']:.3g} s -> {row['ours']:.3g} s, ratio {row['ratio']:.2f}")
    return rows


def draw(path: Path, rows: list[dict]) -> Path:
    """Seconds of both, a panel for each thing that varies."""
    kinds = list(dict.fromkeys(r["of"] for r in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 3.4), squeeze=False)
    for ax, kind in zip(axes[0], kinds):
        shown = [r for r in rows if r["of"] == kind]
        at = [r["at"] for r in shown]
        ax.plot(at, [r["peer"] for r in shown], "s--", color="#BB5566", label="lean Transformers")
        ax.plot(at, [r["ours"] for r in shown], "o-", color="#004488", label="prefix tree")
        ax.set_xscale("log", base=2)
        ax.set_xticks(at, [str(a) for a in at])
        ax.set_xlabel(kind)
        ax.set_ylabel("seconds: " + ("evaluation" if kind == "questions" else "update"))
        ax.set_ylim(bottom=0)
        ax.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="How time grows with frames, rollouts and questions.")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-sweep"))
    parser.add_argument("--small", action="store_true", help="a toy, to see that it runs")
    arguments = parser.parse_args()
    begin = time.monotonic()
    rows = every_row(SMALL if arguments.small else FULL, lambda text: print(text, flush=True))
    result = {"rows": rows, "small": arguments.small, "seconds": round(time.monotonic() - begin), **page.origin()}
    write_json(arguments.out / "sweep.json", result)
    notes = [f"command: {result['command']}", f"machine: {result['machine']}", "not run on a GPU"]
    picture = draw(arguments.out / "growth.png", rows)
    write_text(arguments.out / "sweep.md", page.table(rows) + "\n\n" + "\n".join(f"- {n}" for n in notes) + "\n")
    write_text(arguments.out / "report.html", page.as_page("How cost grows", rows, notes, [picture]))
    print(f"the report is {arguments.out / 'report.html'}")


if __name__ == "__main__":
    main()
