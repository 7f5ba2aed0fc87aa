"""Pictures of a packed tree, as text and as bars over its tokens."""

from collections.abc import Sequence


def draw(packed, ax=None) -> str:
    """Lines such as "├─ question  [403:443)  40 tokens"; with a matplotlib axis also bars, a row for each depth."""
    last = _last_children(packed.parents)
    lines = []
    for k, (node, piece) in enumerate(zip(packed.nodes, packed.slices)):
        above = packed.ancestry(k)[1:]
        bars = "".join("   " if n in last else "│  " for n in above[:-1])
        fork = ("└─ " if k in last else "├─ ") if above else ""
        trained = f", {sum(w != 0 for w in node.weight)} in the loss" if any(node.weight) else ""
        count = len(node.ids)
        label = f"{bars}{fork}{node.name or f'node {k}'}  [{piece.start}:{piece.stop})"
        lines.append(f"{label}  {count} token{'s' * (count != 1)}{trained}")
    if ax is not None:
        _bars(packed, ax)
    return "\n".join(lines)


def _last_children(parents: Sequence[int]) -> set[int]:
    """The nodes that are the last child of their parent."""
    return set({parent: k for k, parent in enumerate(parents) if parent >= 0}.values())


def _bars(packed, ax) -> None:
    depths = [len(packed.ancestry(k)) - 1 for k in range(len(packed.nodes))]
    shades = ("#4477AA", "#CCBB44", "#66CCEE", "#BBBBBB")
    for k, (node, piece) in enumerate(zip(packed.nodes, packed.slices)):
        start, width = piece.start, piece.stop - piece.start
        ax.barh(depths[k], width, left=start, height=0.8, color=shades[depths[k] % len(shades)], edgecolor="black")
        if len(packed) and width / len(packed) > 0.06:
            ax.text(start + width / 2, depths[k], node.name or f"node {k}", ha="center", va="center", fontsize=8)
    ax.set_yticks(range(max(depths) + 1), [f"depth {d}" for d in range(max(depths) + 1)])
    ax.invert_yaxis()
    ax.set_xlim(0, len(packed))
    ax.set_xlabel("token in the packed sequence")
