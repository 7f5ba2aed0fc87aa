"""Pictures of scores: a dot and its interval for every category, each task in a colour of its own everywhere.

Tasks differ by colour and by row, orders by filled and hollow dots, so that nothing is lost in black and white. They
draw on Axes that are handed in or make their own, for notebooks and for the report alike::

    from stkit.reporting import judge, plots
    plots.accuracy_plot(judge.load_run("runs/first").scores)
"""

import contextlib
import io
import re

import matplotlib
import seaborn as sns
from markupsafe import escape
from matplotlib.figure import Figure

from ..bench.schema import TASKS
from .judge import KINDS

TASK_COLOURS = {"route": "#a65a9c", "direction": "#2a78bd", "landmark": "#c26a12", "action": "#20906b"}
INK = "#5a6068"
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": False,
    "ytick.left": False,
    "xtick.bottom": True,
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10.5,
    **{name: INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
}


@contextlib.contextmanager
def plot_style():
    """Our look for the time of one plot; a notebook's own settings are left alone."""
    with sns.axes_style("white"), sns.plotting_context("paper"), matplotlib.rc_context(STYLE):
        yield
        interactive = matplotlib.is_interactive()
    matplotlib.interactive(interactive)  # the first figure of a notebook turns that on, and no other is shown without it


def axes_for(ax, rows: int):
    """An Axes to draw on, transparent. A new one is pyplot's, so that a notebook shows it."""
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.subplots(figsize=figure_size(rows), layout="constrained")[1]
    ax.set_facecolor("none")
    ax.figure.patch.set_alpha(0)
    return ax


def _drawn(data: dict) -> list[str]:
    """The categories that there is something to draw of: those with an accuracy, or with a difference."""
    return [
        k
        for k in KINDS
        if (part := data["by_task"].get(k)) and part.get("accuracy", part.get("difference")) is not None
    ]


def figure_size(rows: int) -> tuple[float, float]:
    """Inches, width and height, for a plot of so many categories."""
    return 4.8, 0.8 + 0.29 * rows


def dot(ax, y: float, part: dict, colour: str, hollow: bool):
    """One value with its whisker. ``part`` holds value, low, high."""
    if part["value"] is None:
        return
    if part["low"] is not None:
        ax.hlines(y, part["low"], part["high"], color=colour, linewidth=1.6, zorder=2, clip_on=False)
    face = "none" if hollow else colour
    sns.scatterplot(
        x=[part["value"]],
        y=[y],
        ax=ax,
        s=34,
        facecolor=face,
        edgecolor=colour,
        linewidth=1.5,
        zorder=3,
        legend=False,
        clip_on=False,
    )


def label_rows(ax, labels: list[str], counts: list[str], header: str):
    """Name each row on the left, print its counts on the right."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(max(len(labels), 1) - 0.5, -0.5)
    for y, text in enumerate(counts):
        ax.text(1.05, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=9.5)
    ax.text(1.05, -0.55, header, transform=ax.get_yaxis_transform(), va="bottom", fontsize=9.5)
    ax.set_ylabel("")
    ax.tick_params(axis="y", pad=7)  # room for a mark at 0


def percent_axis(ax, label: str, low: float = 0.0, high: float = 1.0):
    ax.set_xlim(low, high)
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}".replace("-", "−"))
    ax.set_xlabel(label)


def accuracy_plot(scores: dict, ax=None):
    """Accuracy of each category with its clustered 95 % interval, chance (bar) and blind score (cross) on the same row.

    Args:
        scores: as from :func:`stkit.reporting.judge.score`.
        ax: matplotlib Axes to draw on; None makes a figure.

    Returns:
        The Axes; n and clusters are printed beside each row.
    """
    kinds = _drawn(scores)
    with plot_style():
        ax = axes_for(ax, len(kinds))
        for y, kind in enumerate(kinds):
            part, colour = scores["by_task"][kind], TASK_COLOURS[kind.split("/")[0]]
            if part["chance"] is not None:
                ax.vlines(part["chance"], y - 0.3, y + 0.3, color=INK, linewidth=1.2, linestyle=(0, (2, 1.5)), zorder=1)
            if part["blind"] is not None:
                ax.plot(
                    part["blind"], y, marker="x", color=INK, markersize=5.5, linestyle="none", zorder=2.5, clip_on=False
                )
            dot(ax, y, part | {"value": part["accuracy"]}, colour, kind.endswith("reverse"))
        counts = [f"{scores['by_task'][k]['n']} / {scores['by_task'][k]['clusters']}" for k in kinds]
        label_rows(ax, [k.replace("/", ", ") for k in kinds], counts, "n / clusters")
        percent_axis(ax, "accuracy, %")
    return ax


def compare_plot(comparison: dict, ax=None):
    """Second run minus first, category by category, with clustered 95 % intervals; right of zero the second is better.

    Args:
        comparison: one of the dicts of :func:`stkit.reporting.judge.compare`.
        ax: matplotlib Axes to draw on; None makes a figure.
    """
    kinds = _drawn(comparison)
    parts = [comparison["by_task"][k] for k in kinds]
    ends = [abs(p[name]) for p in parts for name in ("low", "high", "difference") if p[name] is not None]
    reach = min(1.0, max([0.1, *ends]) * 1.08)
    with plot_style():
        ax = axes_for(ax, len(kinds))
        ax.axvline(0, color=INK, linewidth=1, linestyle=(0, (2, 1.5)), zorder=1)
        for y, (kind, part) in enumerate(zip(kinds, parts)):
            colour = TASK_COLOURS[kind.split("/")[0]]
            dot(ax, y, part | {"value": part["difference"]}, colour, kind.endswith("reverse"))
        counts = [f"{p['n']} / {p['clusters']}" for p in parts]
        label_rows(ax, [k.replace("/", ", ") for k in kinds], counts, "n / clusters")
        percent_axis(ax, "difference, percentage points", -reach, reach)
    return ax


def runs_plot(scores: dict[str, dict], fig=None):
    """Small multiples, one a task: every run or control is a row, forward (filled) above reverse (hollow).

    Args:
        scores: name -> scores, as from :func:`stkit.reporting.judge.score`.
        fig: matplotlib Figure to draw on; None makes one.

    Returns:
        The Figure; n and clusters of forward and reverse are printed in each panel.
    """
    with plot_style():
        if fig is None:
            from matplotlib import pyplot

            fig = pyplot.figure(figsize=(8.5, 0.9 + 0.42 * len(scores)), layout="constrained")
        fig.patch.set_alpha(0)
        panels = fig.subplots(1, len(TASKS), sharey=True)
        for ax, task in zip(panels, TASKS):
            axes_for(ax, 0).set_title(task, color=TASK_COLOURS[task])
            for y, found in enumerate(scores.values()):
                for order, shift in (("forward", -0.17), ("reverse", 0.17)):
                    part = found["by_task"].get(f"{task}/{order}")
                    if not part or part["accuracy"] is None:
                        continue
                    if part["chance"] is not None:
                        ax.vlines(
                            part["chance"],
                            y - 0.35,
                            y + 0.35,
                            color=INK,
                            linewidth=1,
                            linestyle=(0, (2, 1.5)),
                            zorder=1,
                        )
                    dot(ax, y + shift, part | {"value": part["accuracy"]}, TASK_COLOURS[task], order == "reverse")
                    ax.text(1.05, y + shift, f"{part['n']} / {part['clusters']}", va="center", fontsize=7.5)
            percent_axis(ax, "accuracy, %")
        panels[0].set_yticks(range(len(scores)), list(scores))
        panels[0].set_ylim(len(scores) - 0.5, -0.5)
    return fig


def inline_svg(draw, data: dict, label: str, name: str, size: tuple[float, float] | None = None) -> str:
    """A plot as an ``<svg>`` element for a page: it scales with its box, takes the page's ink and speaks its label.

    Args:
        draw: ``accuracy_plot``, ``compare_plot`` or one of :mod:`stkit.reporting.category_plots`.
        data: what it draws.
        label: text alternative.
        name: put before the ids of this picture, so that they differ from those of another on the same page.
        size: width and height in inches; None for that of the categories in ``data``.

    Returns:
        The element's text, "" when there is no category to draw.
    """
    if size is None and not _drawn(data):
        return ""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size or figure_size(len(_drawn(data))), layout="constrained")
        draw(data, ax=figure.add_subplot())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return svg_element(buffer.getvalue(), label, name)


def svg_element(svg: str, label: str, name: str) -> str:
    """matplotlib's SVG as an element for a page, less what none sees; label and name as in :func:`inline_svg`."""
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
    svg = re.sub(r' id="([^"]*)"', lambda found: found.group() if found[1] in used else "", svg)
    svg = re.sub(r'( id="|href="#|url\(#)', lambda found: f"{found.group()}{name}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg).group()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: _rounded(found.group()), svg)
    svg = re.sub(r"font-family: [^;\"]*; |(?<=>)\s+(?=<)", "", svg)  # the page has its own fonts
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box} role="img" aria-label="{escape(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg.replace(INK, "currentColor"), count=1)


def _rounded(attribute: str) -> str:
    """Coordinates to a hundredth of a point, on one line."""
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found.group()):.2f}", " " + " ".join(attribute.split()))
