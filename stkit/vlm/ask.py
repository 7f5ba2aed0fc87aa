"""Ask a model many questions on one video: the log-probabilities of the options' letters, or a text decoded greedily.

The vision tower runs once a video; the questions share its output. Prompts of unequal length are padded on the left and
masked, with M-RoPE positions that don't count the padding, so that an answer doesn't depend on its neighbours::

    features = encode_video(loaded, inputs)
    log_probs = letter_log_probs(loaded, prompts, inputs, features, batch_size=8)
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig

from .load import Loaded
from .prompts import Prompt
from .video import VideoInputs


class Said(NamedTuple):
    """A decoded answer. ``finished``: it ended by itself, not at the limit of tokens."""

    text: str
    tokens: int
    finished: bool


@torch.inference_mode()
def encode_video(loaded: Loaded, video: VideoInputs | None):
    """The output of the vision tower for one video (None for None), to be shared by all its questions."""
    if video is None:
        return None
    model = _base(loaded.model)
    pixels, grid = video.pixel_values.to(model.device), video.grid_thw[None].to(model.device)
    return model.get_video_features(pixels, grid, return_dict=True)


@torch.inference_mode()
def letter_log_probs(
    loaded: Loaded, prompts: Sequence[Prompt], video: VideoInputs | None, features=None, batch_size: int = 8
) -> list[np.ndarray]:
    """Natural-log probabilities of each prompt's letters as the answer's first token.

    Args:
        loaded: model, processor, record.
        prompts: multiple-choice prompts, all with this video (or all without).
        video, features: as prepared, and what :func:`encode_video` made of it; None for prompts without a video.
        batch_size: prompts at a time; the result doesn't depend on it (in float32 to 1e-5).

    Returns:
        One float64 array ``(n options,)`` a prompt: log-softmax in float32 over the whole vocabulary.
    """
    found = []
    for batch in _batches(prompts, batch_size):
        inputs = _inputs(loaded, batch, video, features)
        if video is None:  # with a video the model itself computes them, from the mask and the grid
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        logits = loaded.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        log_probs = torch.log_softmax(logits.float(), dim=-1).cpu().double().numpy()
        found += [row[list(prompt.letter_ids)] for row, prompt in zip(log_probs, batch)]
    return found


@torch.inference_mode()
def decode(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    video: VideoInputs | None,
    features=None,
    batch_size: int = 8,
    max_new_tokens: int = 512,
) -> list[Said]:
    """Greedy answers: the likeliest token each time, until the model ends its turn or ``max_new_tokens`` are there."""
    own = loaded.model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    greedy = GenerationConfig(
        do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0,
        max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=_pad(loaded),
    )  # fmt: skip
    found = []
    for batch in _batches(prompts, batch_size):
        inputs = _inputs(loaded, batch, video, features)
        ids = loaded.model.generate(**inputs, generation_config=greedy)[:, inputs["input_ids"].shape[1] :]
        found += [_said(loaded, row, ends) for row in ids.tolist()]
    return found


def _said(loaded: Loaded, ids: list[int], ends: list[int]) -> Said:
    length = next((k for k, i in enumerate(ids) if i in ends), len(ids))
    text = loaded.processor.tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Said(text, length, length < len(ids))


def _base(model):
    """The Transformers model, inside of a peft one or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _pad(loaded: Loaded) -> int:
    tokenizer = loaded.processor.tokenizer
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


def _inputs(loaded: Loaded, prompts: Sequence[Prompt], video: VideoInputs | None, features) -> dict:
    """What the model takes: ids ``(B, S)`` padded on the left, mask, and the one video once for each prompt."""
    model, longest, count = _base(loaded.model), max(len(p.ids) for p in prompts), len(prompts)

    def padded(rows, value: int) -> torch.Tensor:
        return torch.tensor([[value] * (longest - len(row)) + list(row) for row in rows], device=model.device)

    inputs = {
        "input_ids": padded([p.ids for p in prompts], _pad(loaded)),
        "attention_mask": padded([[1] * len(p.ids) for p in prompts], 0),
    }
    if video is None:
        return inputs
    inputs["mm_token_type_ids"] = padded([p.mm_token_type_ids for p in prompts], 0)
    inputs["video_grid_thw"] = video.grid_thw[None].expand(count, -1).to(model.device)
    inputs["mm_encoder_outputs"] = {"video": _repeated(features, count)}
    if loaded.record["family"] == "qwen2_5_vl":  # the only one that counts time in its positions
        inputs["second_per_grid_ts"] = torch.full((count,), video.second_per_grid_s, device=model.device)
    return inputs


def _repeated(features, count: int):
    """The tower's output for one video as if it had run on ``count`` copies (no copy is made here)."""
    values = {"pooler_output": tuple(features.pooler_output) * count}
    if getattr(features, "deepstack_features", None) is not None:
        values["deepstack_features"] = [tuple(layer) * count for layer in features.deepstack_features]
    return type(features)(**values)
