"""A walk seen from above, for notebooks: the path, its landmarks on their sides, its actions.

axes = map_picture(make_plan(0, 3, PRESETS["tiny"]))
"""

from .plans import Plan
from .presets import CELL, HEADINGS
from .wad import point
from .world import headings

COLOURS = {
    "brick": "#e08a50", "wood": "#6b4a2b", "marble": "#6d8a4f", "metal": "#a9adb3", "computer": "#2d3aa8",
    "fire": "#d5160a", "ash": "#222222", "skin": "#d97b84", "torch": "#f39c12", "column": "#27ae60",
    "tree": "#145a32", "barrel": "#7f8c8d",
}  # fmt: skip


def map_picture(plan: Plan, axes=None):
    """Draw the map of a plan.

    Args:
        plan: the walk.
        axes: matplotlib Axes to draw on; None makes a figure.

    Returns:
        The Axes. Units are cells; north is up.
    """
    import matplotlib.pyplot as plt

    axes = axes or plt.subplots(figsize=(4, 4))[1]
    cells, ways = plan.cells(), headings(plan)

    def at(cell: int, ahead: float = 0, aside: float = 0) -> tuple[float, float]:
        x, y = point(cells[cell], ways[cell], ahead * CELL, aside * CELL)
        return x / CELL, y / CELL

    for x, y in cells:
        axes.add_patch(plt.Rectangle((x, y), 1, 1, facecolor="0.93", edgecolor="0.8"))
    axes.plot(*zip(*(at(k) for k in range(len(cells))), strict=True), color="black", linewidth=1)
    axes.plot(*at(0), "o", color="black")
    axes.annotate("", at(len(cells) - 1, 0.3), at(len(cells) - 1), arrowprops={"arrowstyle": "-|>", "color": "black"})
    for mark in plan.landmarks:
        hand = 1 if mark.side == "right" else -1
        dx, dy = HEADINGS[(ways[mark.cell] + hand) % 4]
        (x, y), upright = at(mark.cell, aside=0.44 * hand), dx == 0
        size = (0.9, 0.12) if upright else (0.12, 0.9)
        axes.add_patch(plt.Rectangle((x - size[0] / 2, y - size[1] / 2), *size, color=COLOURS[mark.kind]))
        axes.annotate(
            mark.kind, (x + 0.15 * dx, y + 0.15 * dy), ha={1: "left", -1: "right"}.get(dx, "center"),
            va={1: "bottom", -1: "top"}.get(dy, "center"), fontsize=8,
        )  # fmt: skip
    for action in plan.actions:
        axes.plot(*at(action.cell), "D", color="white", markeredgecolor="black")
        axes.annotate(action.kind, at(action.cell), (6, 6), textcoords="offset points", fontsize=8, style="italic")
    axes.set_aspect("equal")
    axes.margins(0.08)
    axes.set_axis_off()
    return axes
