"""Log-probabilities of every token of a tree, in one forward pass over it.

Evaluation, SFT, GRPO and the reference pass are this one call; they differ in weights and in what they sum up::

    tree = Tree(prompt_ids)
    for rollout in rollouts:
        tree.branch(rollout, weight=1.0)
    found = tree_logps(model, tree, video)
    loss = -(found.log_probs * found.packed.weight.to(found.log_probs.device)).sum()
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from stkit_kernels.logprob import log_probs_of, selected_log_probs
from torch import nn

from ..runtime import BadUse, StkitError
from .attention import TreeAttention, memory_explained, pack_for, tree_forward
from .tree import Packed, Tree
from .video import VideoInputs
from .views import base_model
from .vision import encode_video

TOKENS = ("all", "weighted")


class TreeLogProbs(NamedTuple):
    """What :func:`tree_logps` returns.

    log_probs: ``(T,)`` float32 (float64 for a float64 model), natural log, of each token given its path; 0 where
    nothing predicts it or it was not asked for. entropy: ``(T,)`` in nats, of the distribution that each token is from,
    or None. packed: the tree, laid out. path: which attention and which log-probability backend ran, and why.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None
    packed: Packed
    path: dict[str, str]


def tree_logps(
    model,
    tree: Tree | Sequence[Tree],
    video: VideoInputs | None | Sequence[VideoInputs | None] = None,
    features=None,
    temperature: float = 1.0,
    entropy: bool = False,
    tokens: str = "all",
    backend: str = "auto",
) -> TreeLogProbs:
    """The log-probability of each token of a tree (or forest) given the tokens on its path, each token computed once.

    Args:
        model: Qwen2-VL, Qwen2.5-VL or Qwen3-VL of Transformers, or a peft model around it; its gradients are kept where
            autograd is on.
        tree: T tokens; video tokens stand in the roots.
        video: of each tree, None for a tree without.
        features: of each tree's video if :func:`stkit.vlm.vision.encode_video` was called already (so that a policy and
            its reference share them); None: it is called here, with a graph if the tower is trained.
        temperature: the logits are divided by it.
        entropy: also the entropy at each token.
        tokens: "all", or "weighted" for those whose weight isn't 0 (the head is then run on those only).
        backend: of the attention, see :func:`stkit_kernels.backends.choose_backend`.

    Returns:
        :class:`TreeLogProbs`.

    Raises:
        StkitError: see :func:`stkit.vlm.attention.pack_for` and :func:`stkit.vlm.attention.tree_forward`.
    """
    if tokens not in TOKENS:
        raise BadUse(f"tokens={tokens!r} is unknown: use {' or '.join(TOKENS)}")
    trees, videos, encoded = as_lists(tree, video, features)
    packed = pack_for(model, trees, videos)
    attention = TreeAttention(packed.end, model, backend)
    if features is None:
        encoded = [encode_video(model, v) for v in videos]
    hidden = tree_forward(model, packed, encoded, attention)
    wanted = packed.prev >= 0
    if tokens == "weighted":
        wanted &= packed.weight != 0
    rows = wanted.nonzero().flatten().to(hidden.device)
    chosen = hidden[packed.prev.to(hidden.device)[rows]]
    targets = packed.ids.to(hidden.device)[rows]
    with memory_explained(packed):
        found = selected_log_probs(chosen, head_weight(model), targets, temperature=temperature, entropy=entropy)
    path = {"attention": attention.backend.name, "attention_why": attention.backend.why, "log_probs": found.backend}
    spread = None if found.entropy is None else _placed(found.entropy, rows, len(packed))
    return TreeLogProbs(_placed(found.log_probs, rows, len(packed)), spread, packed, path)


def as_lists(tree, video, features) -> tuple[list[Tree], list, list]:
    """One tree or several, with a video and features (or None) for each."""
    if isinstance(tree, Tree):
        return [tree], [video], [features]
    trees = list(tree)
    none = [None] * len(trees)
    return trees, none if video is None else list(video), none if features is None else list(features)


def head_weight(model) -> torch.Tensor:
    """The output head's matrix ``(V, E)``.

    Raises:
        StkitError: a head that is more than a matrix (an adapter on it, 4 bits, a bias).
    """
    head = base_model(model).lm_head
    if type(head).forward is not nn.Linear.forward or head.bias is not None:  # sharded, its class is one of its own
        kind = type(head).__name__
        raise StkitError(
            f"the head is a {kind}, a plain matrix was expected: leave lm_head out of the adapter and of 4 bits"
        )
    return head.weight


def _placed(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_copy(0, rows, values)


@torch.inference_mode()
def next_log_probs(
    model, trees: Sequence[Tree], videos: Sequence, features: Sequence, ends: Sequence[Tree], ids: Sequence[Sequence[int]],
    backend: str = "auto",
) -> list[torch.Tensor]:  # fmt: skip
    """Log-probabilities of some tokens as the next one after certain nodes: the letters after each prompt.

    Args:
        trees, videos, features: as in :func:`tree_logps`.
        ends: nodes of the trees. ids: for each of them the token ids that are asked for, at least one.

    Returns:
        For each of ``ends`` a float tensor ``(len(ids of it),)`` on the CPU, natural log, over the whole vocabulary.
    """
    packed = pack_for(model, trees, videos)
    hidden = tree_forward(model, packed, features, TreeAttention(packed.end, model, backend))
    last = {id(node): piece.stop - 1 for node, piece in zip(packed.nodes, packed.slices)}
    rows = hidden[[last[id(node)] for node in ends]]
    width = max(map(len, ids))
    asked = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in ids], device=hidden.device)
    found = log_probs_of(rows, head_weight(model), asked).cpu()
    return [found[k, : len(row)] for k, row in enumerate(ids)]
