"""Pictures of an evaluation taken apart, in the manner of :mod:`stkit.reporting.plots`.

Each takes what :func:`stkit.reporting.categories.analyse` returned and draws on Axes that are handed in or makes its
own; n and clusters stand beside every row, and nothing rests on colour alone::

    found = analyse(load_run("runs/first"))
    part_plot(found, "turns")
    chain_plot(found)
"""

import math

import numpy as np
import seaborn as sns
from matplotlib.transforms import ScaledTranslation

from ..runtime import BadUse, StkitError
from .categories import CHOICE
from .chains import OUTCOMES
from .plots import INK, TASK_COLOURS, axes_for, dot, figure_size, label_rows, percent_axis, plot_style

LABELS = {
    "task": "task and order", "turns": "turns on the walk", "steps": "steps of the route", "landmark": "landmark asked",
    "action": "action asked", "position": "right option",
}  # fmt: skip
SCOPES = {CHOICE: "multiple choice", "overall": "all multiple choice"}
SHADES = ("#20906b", "#a8d5c2", "#7a4a12", "#c26a12", "#e0a458", "#f1d9b5", "#b9bec4")  # of OUTCOMES: good, bad, unread
HATCHES = ("", "//", "", "||", "xx", "\\\\", "--")


def _part(found: dict, name: str):
    """A part of an analysis; an error that says why it was left out."""
    if not (part := found.get(name) or found["by"].get(name)):
        known = [*found["by"], "orders", "chain", "confusion", "calibration", "thought"]
        if name not in known:
            raise BadUse(f"{name!r} is no part of an analysis: use {', '.join(known)}")
        why = found["left_out"].get(name, "no question was scored")
        raise StkitError(f"{name} cannot be drawn of the run {found['run']}: {why}")
    return part


def picture_size(found: dict, name: str) -> tuple[float, float]:
    """Inches, width and height, of the picture of a part but "confusion": no wider than a phone shows well."""
    if name in ("calibration", "thought"):
        return 4.8, 3.4
    width, height = figure_size(len(_part(found, name)))
    return width, height + (0.9 if name == "chain" else 0)


def part_plot(found: dict, name: str, scope: str | None = None, ax=None):
    """Accuracy by the values of one category with intervals, chance (dashes) and blind score (cross) on the same row.

    Args:
        found: an analysis.
        name: a key of ``found["by"]``.
        scope: "choice" or a task; None for the widest there is.
        ax: matplotlib Axes to draw on; None makes a figure.

    Raises:
        StkitError: the part was left out, or has no such scope.
    """
    values = _part(found, name)
    picked = {value: scopes.get(scope or next(iter(scopes))) for value, scopes in values.items()}
    picked = {value: part for value, part in picked.items() if part}
    if not picked:
        there = dict.fromkeys(s for scopes in values.values() for s in scopes)
        raise BadUse(f"scope {scope!r} is not among the questions by {name}: use {', '.join(there)}")
    with plot_style():
        ax = axes_for(ax, len(picked))
        for y, (value, part) in enumerate(picked.items()):
            task = scope or next(iter(values[value]))
            _accuracy(ax, y, part, TASK_COLOURS.get(task, INK), value.endswith("reverse"))
        label_rows(ax, [value.replace("/", ", ") for value in picked], _counts(picked.values()), "n / clusters")
        ax.set_ylabel(LABELS[name])
        tasks = {scope or next(iter(values[value])) for value in picked}
        percent_axis(ax, f"accuracy, % ({SCOPES.get(*tasks, *tasks)})" if len(tasks) == 1 else "accuracy, %")
    return ax


def _accuracy(ax, y: float, part: dict, colour: str, hollow: bool = False):
    if part["chance"] is not None:
        ax.vlines(part["chance"], y - 0.3, y + 0.3, color=INK, linewidth=1.2, linestyle=(0, (2, 1.5)), zorder=1)
    if part["blind"] is not None:
        ax.plot(part["blind"], y, marker="x", color=INK, markersize=5.5, linestyle="none", zorder=2.5, clip_on=False)
    dot(ax, y, part | {"value": part["accuracy"]}, colour, hollow)


def _counts(parts) -> list[str]:
    return [f"{part['n']} / {part['clusters']}" for part in parts]


def order_plot(found: dict, ax=None):
    """Forward minus reverse, paired by walk, with clustered 95 % intervals; right of zero forward is easier."""
    parts = _part(found, "orders")
    ends = [abs(part[name]) for part in parts.values() for name in ("low", "high", "difference")]
    reach = min(1.0, max([0.1, *ends]) * 1.08)
    with plot_style():
        ax = axes_for(ax, len(parts))
        ax.axvline(0, color=INK, linewidth=1, linestyle=(0, (2, 1.5)), zorder=1)
        for y, (scope, part) in enumerate(parts.items()):
            dot(ax, y, part | {"value": part["difference"]}, TASK_COLOURS.get(scope, INK), False)
        label_rows(ax, [SCOPES.get(scope, scope) for scope in parts], _counts(parts.values()), "pairs / clusters")
        percent_axis(ax, "forward minus reverse, percentage points", -reach, reach)
    return ax


def chain_plot(found: dict, ax=None):
    """What became of the chains of each task and order: shares of the outcomes, from right to no chain, in one bar."""
    kinds = _part(found, "chain")
    with plot_style():
        ax = _own(ax, *picture_size(found, "chain"))
        for y, part in enumerate(kinds.values()):
            left = 0.0
            for name, shade, hatch in zip(OUTCOMES, SHADES, HATCHES, strict=True):
                share = part["outcomes"][name]["share"]
                ax.barh(y, share, 0.72, left, color=shade, hatch=hatch, edgecolor="white", linewidth=0.8,
                        label=name if y == 0 else None)  # fmt: skip
                left += share
        names = [SCOPES.get(kind, kind).replace("/", ", ") for kind in kinds]
        label_rows(ax, names, _counts(kinds.values()), "n / clusters")
        percent_axis(ax, "questions, %")
        below = ax.transAxes + ScaledTranslation(0, -0.45, ax.figure.dpi_scale_trans)  # inches, whatever the height
        ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.4, 0), bbox_transform=below, fontsize=9, frameon=False)
    return ax


def confusion_plot(found: dict, words: str = "motion", ax=None):
    """The words that were written against the true ones: the shade is a share of the true word's places.

    Args:
        found: an analysis.
        words: "motion" or "landmark".
        ax: matplotlib Axes to draw on; None makes a figure.

    Returns:
        The Axes; the number in each square is a count of places.
    """
    confused = _part(found, "confusion")
    if words not in ("motion", "landmark"):
        raise BadUse(f"words={words!r}: use motion or landmark")
    part = confused[words]
    counts = np.array(part["counts"])
    rows = [k for k, word in enumerate(part["words"]) if counts[k].any()]
    shown, shares = counts[rows], counts[rows] / counts[rows].sum(1, keepdims=True)
    numbers = np.where(shown, shown, "").astype(object)
    size = 1.6 + 0.36 * np.array([len(part["words"]), len(rows)])
    whole = part["overall"]
    title = f"{words}: {100 * whole['mean']:.1f} % of {whole['n']} places right, {whole['clusters']} clusters"
    with plot_style():
        ax = _own(ax, *size)
        sns.heatmap(
            shares, annot=numbers, fmt="", cmap="Greys", vmin=0, vmax=1, cbar=False, linewidths=0.5, linecolor="0.85",
            xticklabels=part["words"], yticklabels=[part["words"][k] for k in rows], annot_kws={"size": 7.5}, ax=ax,
        )  # fmt: skip
        ax.tick_params(axis="y", rotation=0)
        ax.tick_params(axis="x", rotation=90)
        ax.set(xlabel="written", ylabel="true")
        ax.set_title(title, fontsize=10)
    return ax


def calibration_plot(found: dict, ax=None):
    """How often the chosen letter is right against its probability; on the dashes a model means what it says."""
    part = _part(found, "calibration")
    with plot_style():
        ax = _own(ax, *picture_size(found, "calibration"))
        ax.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (2, 1.5)), zorder=1)
        _whiskers(ax, [b["confidence"] for b in part["bins"]], part["bins"])
        ax.set(xlim=(0, 1), xlabel="probability of the chosen letter, %")
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
        ax.set_title(f"expected calibration error {100 * part['error']:.1f} points (n / clusters at each)", fontsize=10)
    return ax


def thought_plot(found: dict, ax=None):
    """Accuracy against the length of the answer with its thought, in quarters; dashes: chance, crosses: blind."""
    part = _part(found, "thought")
    means = [b["mean"] for b in part["bins"]]
    with plot_style():
        ax = _own(ax, *picture_size(found, "thought"))
        _whiskers(ax, means, part["bins"])
        for name, marker in (("chance", "_"), ("blind", "x")):
            ax.plot(means, [math.nan if b[name] is None else b[name] for b in part["bins"]], marker=marker, color=INK,
                    linestyle="none", markersize=7)  # fmt: skip
        ax.set_xlabel(f"{part['unit']} of the answer, mean of the bin (n / clusters at each)")
        ax.margins(x=0.15)
    return ax


def _own(ax, width: float, height: float):
    """Axes to draw on; new ones in a figure of this size in inches."""
    new = ax is None
    ax = axes_for(ax, 1)
    if new:
        ax.figure.set_size_inches(width, height)
    return ax


def _whiskers(ax, places: list[float], bins: list[dict]):
    """Accuracies over numbers, upright, with intervals and counts; the counts in two rows, so that neighbours don't touch."""
    for k, (x, part) in enumerate(zip(places, bins)):
        ax.vlines(x, part["low"], part["high"], color=INK, linewidth=1.6)
        ax.text(x, 1.03 + 0.08 * (k % 2), f"{part['n']} / {part['clusters']}", ha="center", fontsize=7.5)
    ax.plot(places, [part["accuracy"] for part in bins], marker="o", color=INK, markersize=6, linewidth=0.8)
    ax.set(ylim=(0, 1.18), ylabel="accuracy, %")
    ax.spines["left"].set_visible(True)
    ax.set_yticks(np.arange(0, 1.01, 0.25))
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
