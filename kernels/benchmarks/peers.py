"""The same work three ways: as published code does it, as plain Transformers can do it at best, and on a prefix tree.

*As published* is what TRL's GRPO, Video-R1 and ST-R1 share: the prompt and its pixels repeated for every rollout, all
of it through tower and model, logits of every position, ``generate`` with ``num_return_sequences``. *Lean* spares what
Transformers can spare: the tower runs once and its output is repeated, logits are computed of the rollouts only.
"""

import torch
from setting import END, IMAGE, START, VIDEO, Setting
from transformers import GenerationConfig

from stkit.vlm.ask import letter_log_probs
from stkit.vlm.generate import Sampling, generate
from stkit.vlm.load import Loaded
from stkit.vlm.logps import tree_logps
from stkit.vlm.prompts import Prompt
from stkit.vlm.tree import Tree
from stkit.vlm.vision import encode_video

LETTERS = (30, 31, 32, 33)
SPECIAL = (IMAGE, VIDEO, START, END)


def inputs_of(setting: Setting, ids: torch.Tensor, features=None) -> dict:
    """What Transformers takes for ``(B, S)`` ids that each hold the video: its pixels B times, or its features B times."""
    video, count = setting.video, len(ids)
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == VIDEO).long() * 2,
        "video_grid_thw": video.grid_thw.expand(count, -1), "second_per_grid_ts": torch.full((count,), video.second_per_grid_s),
    }  # fmt: skip
    if features is None:
        return inputs | {"pixel_values_videos": video.pixel_values.repeat(count, 1)}
    repeated = type(features)(pooler_output=tuple(features.pooler_output) * count)
    return inputs | {"mm_encoder_outputs": {"video": repeated}}


def whole(setting: Setting) -> torch.Tensor:
    """Prompt and rollout of every member of the group, ``(G, P + C)``."""
    prompt = torch.tensor(setting.prompt).expand(len(setting.rollouts), -1)
    return torch.cat([prompt, setting.rollouts], 1)


def published_log_probs(setting: Setting) -> torch.Tensor:
    """``(G, C)``: logits of every position, their log-softmax, then the rollout's."""
    ids = whole(setting)
    logits = setting.model(**inputs_of(setting, ids), use_cache=False).logits[:, :-1]
    every = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
    return every[:, len(setting.prompt) - 1 :]


def lean_log_probs(setting: Setting) -> torch.Tensor:
    """``(G, C)``: the video's features once, logits of the rollouts only."""
    ids = whole(setting)
    with torch.no_grad():
        features = setting.base.get_video_features(
            setting.video.pixel_values, setting.video.grid_thw[None], return_dict=True
        )
    kept = torch.arange(len(setting.prompt) - 1, ids.shape[1] - 1)
    logits = setting.model(**inputs_of(setting, ids, features), use_cache=False, logits_to_keep=kept).logits
    return torch.log_softmax(logits, -1).gather(-1, setting.rollouts[..., None])[..., 0]


def tree_log_probs(setting: Setting) -> torch.Tensor:
    """``(G, C)``: one tree."""
    tree = Tree(setting.prompt)
    for rollout in setting.rollouts.tolist():
        tree.branch(rollout, weight=1.0)
    found = tree_logps(setting.model, tree, setting.video, tokens="weighted")
    return found.log_probs[len(setting.prompt) :].view(setting.rollouts.shape)


def update(setting: Setting, log_probs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forward and backward pass of a policy gradient: log-probs, and the gradient of every weight of the LoRA."""
    setting.model.zero_grad(set_to_none=True)
    found = log_probs(setting)
    advantages = torch.linspace(-1, 1, len(found))[:, None]
    (found * advantages).mean().backward()
    return found.detach(), {n: p.grad for n, p in setting.model.named_parameters() if p.grad is not None}


@torch.no_grad()
def reference(setting: Setting, log_probs) -> torch.Tensor:
    """The same log-probs without gradients and without the adapter."""
    with setting.model.disable_adapter():
        return log_probs(setting)


def published_rollouts(setting: Setting) -> torch.Tensor:
    """``(G, C)`` by ``generate`` with ``num_return_sequences``, which expands the prompt before it is computed.

    A video token among the new ones would want frames of its own in the passes to come: none may be drawn.
    """
    new = setting.sizes.new
    how = GenerationConfig(do_sample=True, num_return_sequences=setting.sizes.group, max_new_tokens=new, min_new_tokens=new,
                           top_k=0, eos_token_id=2, pad_token_id=0, suppress_tokens=list(SPECIAL))  # fmt: skip
    ids = torch.tensor([setting.prompt])
    with torch.no_grad():
        out = setting.model.generate(**inputs_of(setting, ids), generation_config=how)
    return out[:, len(setting.prompt) :]


def tree_rollouts(setting: Setting, greedy: bool = False) -> torch.Tensor:
    """``(G, C)`` over one stored prompt."""
    how = Sampling(max_new_tokens=setting.sizes.new, greedy=greedy)
    (group,) = generate(setting.model, [setting.prompt], setting.video, group=setting.sizes.group, sampling=how)
    return torch.tensor([rollout.ids for rollout in group])


def every_prompt(setting: Setting) -> list[tuple[int, ...]]:
    """Each question under each rotation of its options, with the video in front."""
    video = setting.prompt[: setting.prompt.index(13) + 1]
    return [(*video, *asked, *options) for asked, rotations in setting.questions for options in rotations]


def published_letters(setting: Setting, batch: int = 8) -> torch.Tensor:
    """``(questions x rotations, 4)``: log-probs of the letters, every prompt by itself in batches of equal length."""
    prompts = torch.tensor(every_prompt(setting))
    found = []
    with torch.no_grad():
        for ids in prompts.split(batch):
            logits = setting.model(**inputs_of(setting, ids), use_cache=False).logits[:, -1]
            found.append(torch.log_softmax(logits, -1)[:, list(LETTERS)])
    return torch.cat(found)


def tree_letters(setting: Setting) -> torch.Tensor:
    """The same by one tree, as ``stkit eval`` does it."""
    prompts = [Prompt(ids, tuple(2 * (i == VIDEO) for i in ids), LETTERS, "", "") for ids in every_prompt(setting)]
    loaded = Loaded(setting.model, None, {})
    with torch.no_grad():
        features = encode_video(setting.model, setting.video)
    rows = letter_log_probs(loaded, prompts, setting.video, features)
    return torch.stack([torch.from_numpy(row) for row in rows])
