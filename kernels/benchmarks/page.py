"""The table and plots of a run: bench.md, PNGs, and report.html that holds both."""

import base64
import html
import os
import platform
import shlex
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from stkit.runs import write_text  # noqa: E402
from stkit.runtime import versions  # noqa: E402

COLUMNS = ("measure", "unit", "peer", "ours", "ratio", "goal", "met", "largest difference")
STYLE = "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
STYLE += "td,th{padding:.25em .7em;border-bottom:1px solid #ccc;text-align:right}td:first-child{text-align:left}img{max-width:100%}"


def origin() -> dict:
    """The machine, the versions and the command, as they belong beside every number."""
    model = next(
        (row.split(":")[1].strip() for row in _read("/proc/cpuinfo") if row.startswith("model name")),
        platform.machine(),
    )
    machine = {"cpu": model, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "gpu": "none"}
    return {"machine": machine, "versions": versions(), "command": shlex.join(["python", *sys.argv])}


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def cells(row: dict) -> list[str]:
    """One row as texts."""
    spread = [f" [{row[k][0]:.3g}, {row[k][1]:.3g}]" if k in row else "" for k in ("peer_spread", "ours_spread")]
    if row["peer"] is None:
        return [row["name"], row["unit"], "", "", "", row["goal"], row["reason"], ""]
    met = "yes" if row["met"] else f"no: {row['reason']}"
    diff = "" if row["max_abs_diff"] is None else f"{row['max_abs_diff']:.1e}"
    both = [f"{row[k]:.4g}{s}" for k, s in zip(("peer", "ours"), spread)]
    return [row["name"], row["unit"], *both, f"{row['ratio']:.2f}", row["goal"], met, diff]


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(out: Path, result: dict) -> None:
    """bench.md, ratios.png, sweep.png and report.html into the folder."""
    notes = [f"command: {result['command']}", "machine: " + ", ".join(f"{k} {v}" for k, v in result["machine"].items())]
    notes.append("versions: " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()))
    notes.append(f"seconds: {result['seconds']}; times are medians [least, most]; not run on a GPU")
    if "load_average" in result:
        load = result["load_average"]
        notes.append(f"load average (1 minute): {load['start']} at the start, {load['end']} at the end")
    write_text(out / "bench.md", table(result["rows"]) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n")
    pictures = [ratios(out / "ratios.png", result["rows"])]
    pictures += [sweep(out / "sweep.png", r["sweep"]) for r in result["rows"] if "sweep" in r]
    write_text(out / "report.html", as_page("Encode each video once: measured", result["rows"], notes, pictures))


def as_page(title: str, rows: list[dict], notes: list[str], pictures: list[Path]) -> str:
    """One self-contained page."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(r)) + "</tr>" for r in rows)
    shown = "".join(
        f'<p><img src="data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}"></p>' for p in pictures
    )
    list_of = "".join(f"<li>{html.escape(n)}</li>" for n in notes)
    page = f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1><table><tr>{head}</tr>{body}</table>{shown}<ul>{list_of}</ul>"
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{page}</html>\n'


def ratios(path: Path, rows: list[dict]) -> Path:
    """How many times better each measure is, its goal as a tick."""
    shown = [r for r in rows if r["goal"].startswith(">=") and r["peer"] is not None]
    figure, ax = plt.subplots(figsize=(9, 0.42 * len(shown) + 1.2))
    ax.barh(range(len(shown)), [r["ratio"] for r in shown], color=["#4477AA" if r["met"] else "#CCBB44" for r in shown])
    for k, r in enumerate(shown):
        goal = float(r["goal"].split()[1])
        ax.plot([goal, goal], [k - 0.4, k + 0.4], color="black", lw=2)
        ax.text(max(r["ratio"], goal) * 1.05, k, f"{r['ratio']:.1f}x", va="center", fontsize=9)
    ax.set_yticks(range(len(shown)), [r["name"] for r in shown], fontsize=9)
    ax.set_xscale("log")
    ax.set_xlim(right=max(r["ratio"] for r in shown) * 1.6)
    ax.invert_yaxis()
    ax.set_xlabel("peer / ours (log scale); the black line is the goal")
    return _save(figure, path)


def sweep(path: Path, rows: list[dict]) -> Path:
    """Ratio of both passes of attention at every size."""
    figure, ax = plt.subplots(figsize=(9, 0.24 * len(rows) + 1.2))
    ax.barh(range(len(rows)), [r["ratio"] for r in rows], color="#4477AA")
    ax.axvline(1, color="black", lw=2)
    ax.set_yticks(range(len(rows)), [r["name"] for r in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("masked SDPA / cascade, forward and backward pass; at the black line they are as fast")
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
