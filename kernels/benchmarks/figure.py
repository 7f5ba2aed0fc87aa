"""Draw kernels/cascade.png: a tree, its mask, and the calls that compute it.

python kernels/benchmarks/figure.py
"""

from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from stkit_kernels.plan import TreePlan, plan_tree  # noqa: E402
from stkit_kernels.reference import visible_mask  # noqa: E402

from stkit.vlm.tree import Tree  # noqa: E402

COLORS = ("#004488", "#DDAA33", "#BB5566", "#66CCEE")


def example() -> Tree:
    """A video, two questions, and rollouts of each."""
    video = Tree([0] * 8, name="video")
    for question, rollouts in (("q1", (3, 3, 3)), ("q2", (3, 3))):
        node = video.branch([0] * 4, name=question)
        for k, length in enumerate(rollouts):
            node.branch([0] * length, name=f"r{k + 1}")
    return video


def draw_calls(ax, plan: TreePlan) -> None:
    """The mask with a frame around what each call computes, a colour for each call."""
    ax.imshow(visible_mask(plan.end), cmap="Greys", vmin=0, vmax=3)
    for k, call in enumerate(plan.calls):
        rows, columns = (r.take(torch.arange(len(plan))) for r in (call.q, call.k))
        for queries, keys in zip(rows, columns):
            corner = float(keys[0]) - 0.5, float(queries[0]) - 0.5
            size = int(keys.max() - keys[0]) + 1, int(queries.max() - queries[0]) + 1
            ax.add_patch(Rectangle(corner, *size, fill=False, lw=2.5, edgecolor=COLORS[k % len(COLORS)]))
    ax.set_xlabel("key")
    ax.set_ylabel("query")


def main() -> None:
    tree = example()
    plan = plan_tree(tree.pack().end)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1.3, 1))
    tree.draw(left)
    left.set_title("a tree, laid out depth first")
    draw_calls(right, plan)
    shapes = ", ".join(f"{c.count} x ({c.q_len}, {c.k_len})" for c in plan.calls)
    right.set_title(f"{len(plan.calls)} calls: {shapes}", fontsize=10)
    figure.tight_layout()
    out = Path(__file__).parent.parent / "cascade.png"
    figure.savefig(out, dpi=110)
    print(f"{out.name}: {len(plan)} tokens, {plan.visible_pairs} visible pairs of {len(plan) ** 2}")


if __name__ == "__main__":
    main()
