"""Training runs read back and drawn: a curve of what changes over the steps, several runs in the same axes.

    runs = named(["runs/sft", "runs/sft-2"])
    training_plot(runs.values())                             # small multiples, for a notebook
    [panel.label for panel in panels(runs)]

What stays the same or is not there has no curve. The files of a run are only read: one under way can be looked at.
"""

import io
import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import matplotlib
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..train.run import Run, open_run
from .plots import INK, STYLE, svg_element
from .tables import visible

HEAVY = ("ids", "log_probs", "forced")
COLUMNS = {
    "loss": "loss", "reward": "reward", "kl": "KL, nats a token", "entropy": "entropy, nats a token",
    "length": "length, tokens", "finished": "rollouts ended, %", "clip_fraction": "clipped tokens, %",
    "grad_norm": "gradient norm", "lr": "learning rate",
}  # fmt: skip
SCORES = ("accuracy", "low", "high", "blind", "chance")
OF_TOKENS = ("kl", "entropy", "clip_fraction")
SHARES = ("finished", "clip_fraction", *SCORES)
LOOKS = (
    (INK, "-", "o"), ("#c2456b", (0, (5, 2)), "s"), ("#7565c7", (0, (1, 1.2)), "^"),
    ("#8a7a1c", (0, (6, 2, 1, 2)), "D"), ("#2b8f9c", (0, (3, 1, 1, 1, 1, 1)), "v"),
)  # fmt: skip
CURVES = STYLE | {
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": INK, "grid.alpha": 0.25, "grid.linewidth": 0.6,
    "ytick.labelsize": 9, "xtick.labelsize": 9, "legend.fontsize": 8.5, "lines.linewidth": 1.5,
}  # fmt: skip
FEW_POINTS, LONGEST_NAME = 40, 30


@dataclass(frozen=True)
class Panel:
    """One plot: ``lines`` by name over steps; ``scores``: runs by name, whose scores are drawn instead."""

    label: str
    lines: Mapping[str, pd.Series]
    scores: Mapping[str, Run] | None = None


def read_run(run: str | os.PathLike | Run) -> Run:
    """A training run as it is on disk at this moment.

    Raises:
        StkitError: no training run, or a malformed line in it.
    """
    if isinstance(run, Run):
        return run
    found = open_run(run)
    return replace(found, rollouts=found.rollouts.drop(columns=list(HEAVY), errors="ignore"))


def named(runs) -> dict[str, Run]:
    """Runs by the names of their folders; two of one name are called by their paths."""
    items = [runs] if isinstance(runs, (str, os.PathLike, Run)) else list(runs)
    found = list(map(read_run, items))
    names = [run.out.resolve().name for run in found]
    count = Counter(names)
    return {visible(name if count[name] == 1 else run.out): run for name, run in zip(names, found)}


def _finite(value) -> float:
    """A finite number, else NaN."""
    plain = isinstance(value, (int, float)) or hasattr(value, "item")
    return float(value) if plain and math.isfinite(value) else math.nan


def number(value) -> str:
    """A number for reading, "–" where there is none."""
    value = _finite(value)
    return "–" if math.isnan(value) else f"{value + 0:.4g}".replace("-", "−")  # + 0: no "−0"


def recorded(run: Run, column: str, table: str = "metrics") -> pd.Series:
    """A column over steps as it stands in the file; what is no finite number is NaN."""
    frame = getattr(run, table)
    if column not in frame:
        return pd.Series(dtype=float)
    return pd.Series([_finite(value) for value in frame[column]], index=list(frame["step"]), dtype=float)


def series(run: Run, column: str, table: str = "metrics") -> pd.Series:
    """A column over steps, in percent for shares; means over learned tokens are NaN at steps that learned from none."""
    values = recorded(run, column, table) * (100 if column in SHARES else 1)
    if column in OF_TOKENS and "learned_tokens" in run.metrics:
        values = values.where(recorded(run, "learned_tokens").to_numpy() != 0)
    return values


def columns(runs: Sequence[Run]) -> dict[str, str]:
    """What may be drawn, with its label: the parts of the reward after the reward."""
    found = {name for run in runs for name in run.metrics if str(name).startswith("reward_") and name != "reward_std"}
    parts = {name: f"reward, {name.removeprefix('reward_')}" for name in sorted(found)}
    return {"loss": "loss", "reward": "reward"} | parts | COLUMNS


def _changes(values: pd.Series) -> bool:
    return values.nunique() > 1


def panels(runs: Mapping[str, Run]) -> list[Panel]:
    """What there is to draw. Of one run the reward and its parts are in the same axes."""
    found, together = [], {}
    for column, label in columns(list(runs.values())).items():
        lines = {name: series(run, column) for name, run in runs.items()}
        if not any(map(_changes, lines.values())):
            continue
        if len(runs) == 1 and column.startswith("reward"):
            if not together:
                found.append(Panel("reward", together))
            together[label.removeprefix("reward, ")] = next(iter(lines.values()))
        else:
            found.append(Panel(label, {name: values for name, values in lines.items() if values.notna().any()}))
    scored = {name: run for name, run in runs.items() if series(run, "accuracy", "scores").notna().any()}
    if any(len(run.scores) > 1 for run in scored.values()):
        found.append(Panel("accuracy, %", {}, scored))
    return found


def _line(ax, values: pd.Series, look: tuple, **more):
    """One line, broken where there is no number. Few points are marked; of many the mean of a window lies over them."""
    colour, dash, marker = look
    points = list(values.index)
    few = len(points) <= FEW_POINTS
    alone = values.notna() & values.shift(1).isna() & values.shift(-1).isna()
    marks = {"marker": marker, "markersize": 4} | ({} if few else {"markevery": alone.to_numpy().nonzero()[0].tolist()})
    style = {"color": colour, "linestyle": dash} | (marks if few or alone.any() else {}) | more
    if few:
        return ax.plot(points, values, **style)[0]
    ax.plot(points, values, **style | {"linewidth": 0.7, "alpha": 0.4})
    mean = values.rolling(_window(len(values)), center=True, min_periods=1).mean()
    return ax.plot(points, mean.where(values.notna()), color=colour, linestyle=dash)[0]


def _window(count: int) -> int:
    """How many of so many points a mean is taken over."""
    return max(5, count // 20)


def _draw_scores(ax, runs: Mapping[str, Run]) -> dict:
    """Accuracy with its interval, the blind score (dashes, crosses) and chance (dots) of every run."""
    legend: dict = {}
    beside: dict = {}
    for (name, run), look in zip(runs.items(), itertools.cycle(LOOKS)):
        told = {part: series(run, part, "scores") for part in SCORES}
        if len(told["low"]) and len(told["high"]):
            style = {"color": look[0], "linestyle": look[1], "linewidth": 0.9, "alpha": 0.7}
            ax.vlines(list(told["low"].index), told["low"], told["high"], **style)
        legend[name if len(runs) > 1 else "accuracy"] = _line(ax, told["accuracy"], look)
        for part, dash, marker in (("blind", (0, (4, 2)), "x"), ("chance", (0, (1, 2)), "")):
            if told[part].notna().any():
                few = max(1, len(told[part]) // 6)
                line = _line(ax, told[part], (look[0], dash, marker), linewidth=1.1, markevery=few)
                beside.setdefault(part, line)
    return legend | beside


def _legend(ax, lines: Mapping) -> None:
    """Above the plot, side by side where there is room."""
    names = [name if len(name) <= LONGEST_NAME else f"{name[:14]}…{name[-15:]}" for name in lines]
    columns = len(names) if sum(len(name) + 6 for name in names) <= 40 else 1
    ax.legend(
        list(lines.values()), names, loc="lower left", bbox_to_anchor=(-0.05, 1), borderaxespad=0.2, frameon=False,
        handlelength=2.4, handletextpad=0.5, columnspacing=1, ncols=columns,
    )  # fmt: skip


def draw(ax, panel: Panel, resumed: Sequence[int] = ()) -> None:
    """One panel on Axes, with a legend where there are several lines."""
    if panel.scores is not None:
        legend = _draw_scores(ax, panel.scores)
    else:
        legend = {k: _line(ax, v, look) for (k, v), look in zip(panel.lines.items(), itertools.cycle(LOOKS))}
    for step in resumed:
        ax.axvline(step + 0.5, color=INK, linewidth=0.8, linestyle=(0, (1, 3)))
    ax.patch.set_alpha(0)
    ax.set(xlabel="step", ylabel=panel.label)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.5g}".replace("-", "−"))
    if len(legend) > 1:
        _legend(ax, legend)


def training_plot(run, fig=None):
    """The curves of a training run as small multiples, or of several runs in the same axes.

    Args:
        run: a :class:`stkit.train.run.Run` or its folder, or several of them.
        fig: matplotlib Figure to draw on; None makes one.

    Returns:
        The Figure; where nothing changes yet it says so.
    """
    runs = named(run)
    shown = panels(runs)
    with matplotlib.rc_context(CURVES):
        if fig is None:
            from matplotlib import pyplot

            fig = pyplot.figure(figsize=(9.6, 2.5 * max(1, math.ceil(len(shown) / 3))), layout="constrained")
        fig.patch.set_alpha(0)
        if not shown:
            told = "; ".join(f"{name}: {len(one.metrics)} steps" for name, one in runs.items())
            fig.text(0.5, 0.5, f"nothing to draw yet ({told})", ha="center")
        for place, panel in enumerate(shown, 1):
            draw(fig.add_subplot(math.ceil(len(shown) / 3), min(3, len(shown)), place), panel, resumptions(runs))
    return fig


def resumptions(runs: Mapping[str, Run]) -> list[int]:
    """The steps from which a run was resumed, where one alone is shown."""
    if len(runs) > 1:
        return []
    return [int(step) for run in runs.values() for step in series(run, "resumed_from_step").dropna()]


def caption(runs: Mapping[str, Run]) -> str:
    """What the lines of the plots mean beyond their legends."""
    longest = max((len(run.metrics) for run in runs.values()), default=0)
    found = []
    if longest > FEW_POINTS:
        found.append(f"Thin: each step; thick: the mean over {_window(longest)} steps.")
    if any(len(run.scores) > 1 for run in runs.values()):
        found.append("Whiskers of the accuracy: 95 % intervals, clustered; dashes with crosses: blind; dots: chance.")
    if resumptions(runs):
        found.append("Dotted uprights: the run was resumed there.")
    if any(run.config["stage"] == "grpo" for run in runs.values()):
        found.append("GRPO’s loss is near 0 by its making and tells no progress: the reward and the scores do.")
    return " ".join(found)


def _label(panel: Panel) -> str:
    """A plot in words, for those who don't see it."""
    lines = panel.lines or {name: series(run, "accuracy", "scores") for name, run in panel.scores.items()}
    kept = {name: values.dropna() for name, values in lines.items()}
    told = [
        f"{name} {number(v.iloc[0])} at step {v.index[0]}, {number(v.iloc[-1])} at step {v.index[-1]}"
        for name, v in kept.items() if len(v)
    ]
    return f"{panel.label} over steps: " + "; ".join(told)


def svg(panel: Panel, runs: Mapping[str, Run], name: str) -> Markup:
    """A panel as an element of a page, in the page's ink; its ids start with ``name``."""
    buffer = io.StringIO()
    with matplotlib.rc_context(CURVES | {"svg.hashsalt": name}):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        draw(figure.add_subplot(), panel, resumptions(runs))
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Markup(svg_element(buffer.getvalue(), visible(_label(panel)), name))
