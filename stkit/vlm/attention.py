"""The bridge from Transformers' Qwen-VL to attention over a tree: one forward pass over packed trees.

Transformers computes everything but the attention, on a view of the model whose layers call ours. It gets the positions
of each branch, the video's features once, and no mask::

    packed = pack_for(model, [tree], [video])
    plan = TreeAttention(packed.end, model)
    hidden = tree_forward(model, packed, [features], plan)      # (T, E)
"""

import copy
import functools
from collections.abc import Sequence

import torch
from stkit_kernels.backends import choose_backend
from stkit_kernels.cascade import cascade_attention
from stkit_kernels.plan import plan_tree
from torch import nn
from transformers import AttentionInterface

from ..runtime import StkitError, explain_memory
from .load import head_size
from .tree import Packed, Tree, pack
from .video import VideoInputs
from .views import active, base_model, view

NAME = "stkit_tree"  # a name with "flash" in it would be looked for on the hub


class TreeAttention:
    """Attention over one packed tree: planned once, called by every layer.

    Args:
        end: int64 ``(T,)``, of :class:`stkit.vlm.tree.Packed`.
        model: gives device, dtype and head size.
        backend: "auto" or a name of :data:`stkit_kernels.backends.NAMES`.

    Raises:
        StkitError: the backend cannot be used here, with the reason.
    """

    def __init__(self, end: torch.Tensor, model, backend: str = "auto"):
        base = base_model(model)
        weight = base.get_input_embeddings().weight
        device, dtype = weight.device, weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        try:
            self.backend = choose_backend(device, dtype, head_size(base.config), backend)
        except ValueError as error:
            raise StkitError(str(error)) from error
        self.plan = plan_tree(end.to(weight.device))

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Shapes ``(1, H, T, D)`` and ``(1, KV, T, D)``; returns ``(1, H, T, D)``."""
        return cascade_attention(query, key, value, self.plan, scale, self.backend)


def _interface(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tree=None, **others):
    """What Transformers' layers call: ``tree`` is whatever has an ``attend``."""
    if window := others.get("sliding_window"):
        raise StkitError(f"layer {module.layer_idx} attends within {window} tokens: trees have no sliding windows")
    if torch.is_autocast_enabled(query.device.type):  # as torch's own attention does there
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    return tree.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, _interface)


def pack_for(model, trees: Sequence[Tree], videos: Sequence[VideoInputs | None], context: int | None = None) -> Packed:
    """Trees packed with the M-RoPE positions that the model's own ``get_rope_index`` gives each of their paths.

    Args:
        trees: their roots; a root holds all tokens of its video.
        videos: one for each tree, None for a tree without.
        context: tokens from a root to a leaf at most; None for what the model's configuration says.

    Raises:
        StkitError: a root with another number of video tokens than its video has, or with an image; a path too long; an
            unknown token.
    """
    base = base_model(model)
    if len(trees) != len(videos):
        raise StkitError(f"{len(trees)} trees and {len(videos)} videos: give one video, or None, for each tree")
    known = base.config.get_text_config().vocab_size
    for tree in trees:
        for node, _ in tree.walk():
            if max(node.ids) >= known:
                raise StkitError(f"branch {node.name!r} holds the id {max(node.ids)}: the vocabulary has {known}")
    positions = [_root_positions(base, tree, video) for tree, video in zip(trees, videos)]
    return pack(trees, positions, context or base.config.get_text_config().max_position_embeddings)


def _root_positions(base, root: Tree, video: VideoInputs | None) -> torch.Tensor | None:
    """``(3, P + 1)``: of the root's tokens and of a text token after them, as Transformers counts."""
    pad = base.config.video_token_id
    count, merge = root.ids.count(pad), base.config.vision_config.spatial_merge_size
    wanted = 0 if video is None else int(video.grid_thw.prod()) // merge**2
    if base.config.image_token_id in root.ids:
        raise StkitError(f"branch {root.name!r} holds image tokens: trees take videos only")
    if count != wanted:
        grid = "no video" if video is None else f"a video of {wanted} tokens (grid {video.grid_thw.tolist()})"
        raise StkitError(
            f"branch {root.name!r} holds {count} video tokens and comes with {grid}: build both from one video"
        )
    if video is None:
        return None
    ids = torch.tensor([[*root.ids, 0 if pad else 1]])
    kinds = (ids == pad).long() * 2
    timing = {}
    if base.config.model_type == "qwen2_5_vl":  # the only family that counts time in its positions
        timing["second_per_grid_ts"] = torch.tensor([video.second_per_grid_s])
    return base.model.get_rope_index(ids, kinds, video_grid_thw=video.grid_thw[None].cpu(), **timing)[0][:, 0]


def tree_forward(model, packed: Packed, features: Sequence, tree) -> torch.Tensor:
    """The last hidden states of packed trees.

    Args:
        model: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL of Transformers, or a peft model around it.
        packed: T tokens, from :func:`pack_for`.
        features: of each tree's video, from :func:`stkit.vlm.vision.encode_video`; None for a tree without.
        tree: a :class:`TreeAttention`, or anything with its ``attend``.

    Returns:
        ``(T, E)`` in the model's dtype, after the final norm. Gradient checkpointing works as it does without trees.

    Raises:
        StkitError: features that are missing or of another video; dropout is active; a hidden state is not finite
            (says where that began); out of memory.
    """
    refuse_dropout(model)
    language = with_tree_attention(model)
    device = language.norm.weight.device
    inputs = _embedded(model, packed, features) | {"position_ids": packed.position[:, None].to(device)}
    with memory_explained(packed):
        hidden = language(**inputs, use_cache=False, tree=tree).last_hidden_state[0]
    if not torch.isfinite(hidden).all():
        raise StkitError(_where_not_finite(language, inputs, tree, packed))
    return hidden


def _embedded(model, packed: Packed, features: Sequence) -> dict:
    """Token embeddings ``(1, T, E)`` with the videos' features in the roots, and what DeepStack adds to deeper layers."""
    base = base_model(model)
    embedding = base.get_input_embeddings()
    ids = packed.ids.to(embedding.weight.device)
    values = embedding(ids[None])[0]
    there = [f for f in features if f is not None]
    seen = torch.zeros(len(packed), dtype=torch.bool, device=ids.device)
    for piece, parent in zip(packed.slices, packed.parents):
        if parent < 0:  # a video token that a branch holds was sampled, and is a token like any other
            seen[piece] = ids[piece] == base.config.video_token_id
    count, given = int(seen.sum()), sum(len(part) for f in there for part in f.pooler_output)
    if count != given:  # never without the frames
        raise StkitError(f"the roots hold {count} video tokens, the features are of {given}: give encode_video's output")
    if not there:
        return {"inputs_embeds": values[None]}
    shown = torch.cat([part for f in there for part in f.pooler_output]).to(values)
    found = {"inputs_embeds": values.index_copy(0, seen.nonzero().flatten(), shown)[None]}
    if getattr(there[0], "deepstack_features", None) is not None:
        levels = zip(*(f.deepstack_features for f in there))
        found["deepstack_visual_embeds"] = [torch.cat([part for f in level for part in f]) for level in levels]
        found["visual_pos_masks"] = seen[None]
    return found


def with_tree_attention(model) -> nn.Module:
    """A view of the model's language part whose layers attend by :data:`NAME`; called with ``tree=``."""
    language = active(base_model(model).model.language_model)
    config = copy.copy(language.config)
    config._attn_implementation_internal = NAME
    layers = []
    for layer in language.layers:
        attention = view(layer.self_attn)
        attention.config = config
        layers.append(view(layer, self_attn=attention))
    seen = view(language, layers=nn.ModuleList(layers))
    seen.config = config
    return seen


def refuse_dropout(model) -> None:
    """Raise StkitError where dropout is active: the branches of a tree share one mask, so nothing would be exact."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise StkitError(f"{name} drops out with p={module.p}: set it to 0 (lora_dropout=0), or call model.eval()")
        rate = getattr(module, "attention_dropout", 0)
        if module.training and isinstance(rate, float) and rate > 0:
            raise StkitError(f"{name} has attention_dropout={rate}: set it to 0, or call model.eval()")


def memory_explained(packed: Packed):
    """A context in which out of memory is told with what was to be computed and what to lower."""
    plan = f"{len(packed)} tokens in {len(packed.nodes)} branches were to be computed at once"
    lower = "lower max_tokens, frames or max_pixels, ask for fewer rollouts, or switch gradient checkpointing on"
    return explain_memory(plan, lower)


def _where_not_finite(language, inputs: dict, tree, packed: Packed) -> str:
    """Run once more without a graph and find the first part of the model whose output isn't finite."""
    found: list[tuple[str, int]] = []
    if hasattr(language.norm.weight, "full_tensor"):  # other processes would have to compute it once more too
        return "a hidden state is not finite: train in one process to see where it began (weights are sharded here)"

    def look(name, module, _, output):
        rows = (output[0] if isinstance(output, tuple) else output).detach()
        bad = ~torch.isfinite(rows.reshape(-1, rows.shape[-1])).all(-1)
        if not found and bad.any():
            found.append((name, int(bad.nonzero()[0])))

    parts = {f"layer {k}": layer for k, layer in enumerate(language.layers)} | {"the final norm": language.norm}
    look("the token embeddings", None, None, inputs["inputs_embeds"])
    hooks = [part.register_forward_hook(functools.partial(look, name)) for name, part in parts.items()]
    try:
        with torch.no_grad():
            language(**inputs, use_cache=False, tree=tree)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return "a hidden state is not finite, but was when computed again: the inputs or weights change meanwhile"
    name, token = found[0]
    node = next(
        (n.name or f"node {k}" for k, (n, s) in enumerate(zip(packed.nodes, packed.slices)) if token < s.stop), ""
    )
    dtype = str(language.norm.weight.dtype).removeprefix("torch.")
    return (
        f"a hidden state is not finite, first after {name} at token {token} ({node!r}), in {dtype}: look for NaN in the "
        "weights or features, or use bfloat16 or float32 if it is float16"
    )
