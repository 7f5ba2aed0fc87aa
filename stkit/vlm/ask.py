"""Ask a model many questions on one video: the log-probabilities of the options' letters, or a text decoded greedily.

The video is encoded once. All prompts on it (questions, and rotations of their options) are packed into one prefix
tree, in which whatever they have in common stands once, and are scored in one forward pass or decoded in one batch::

    features = encode_video(loaded.model, inputs)
    log_probs = letter_log_probs(loaded, prompts, inputs, features, max_tokens=16_384)
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..runtime import StkitError
from .generate import Sampling, generate
from .load import Loaded
from .logps import next_log_probs
from .prompts import Prompt
from .tree import trie
from .video import VideoInputs
from .vision import encode_video

MAX_TOKENS = 16_384


class Said(NamedTuple):
    """A decoded answer. ``finished``: it ended by itself, not at the limit of tokens."""

    text: str
    tokens: int
    finished: bool


def letter_log_probs(
    loaded: Loaded, prompts: Sequence[Prompt], video: VideoInputs | None, features=None, max_tokens: int = MAX_TOKENS
) -> list[np.ndarray]:
    """Natural-log probabilities of each prompt's letters as the answer's first token.

    Args:
        loaded: model, processor, record.
        prompts: multiple-choice prompts, all with this video (or all without).
        video: as prepared; None for prompts without.
        features: what :func:`stkit.vlm.vision.encode_video` made of it; None: it is called here.
        max_tokens: of a tree, computed at once; more prompts make more trees. The result doesn't depend on it (in
            float32 to 1e-5).

    Returns:
        One float64 array ``(n options,)`` a prompt: log-softmax in float32 over the whole vocabulary.

    Raises:
        StkitError: a single prompt is longer than ``max_tokens``.
    """
    found = []
    features = encode_video(loaded.model, video) if features is None else features
    for batch in bounded(prompts, max_tokens):
        trees, last = trie([prompt.ids for prompt in batch])
        both = [video] * len(trees), [features] * len(trees)
        rows = next_log_probs(loaded.model, trees, *both, last, [prompt.letter_ids for prompt in batch])
        found += [row.double().numpy() for row in rows]
    return found


def decode(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    video: VideoInputs | None,
    features=None,
    max_tokens: int = MAX_TOKENS,
    max_new_tokens: int = 512,
) -> list[Said]:
    """Greedy answers: the likeliest token each time, until the model ends its turn or ``max_new_tokens`` are there.

    ``max_tokens`` bounds the tokens whose keys and values are held: of the tree, and ``max_new_tokens`` for each
    prompt.
    """
    own = loaded.model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    greedy = Sampling(max_new_tokens, greedy=True, stop=tuple(end for end in ends if end is not None))
    found = []
    features = encode_video(loaded.model, video) if features is None else features  # once, not for every batch
    for batch in bounded(prompts, max_tokens, max_new_tokens):
        groups = generate(loaded.model, [prompt.ids for prompt in batch], video, features, sampling=greedy)
        found += [_said(loaded, rollout.ids, rollout.finished) for (rollout,) in groups]
    return found


def bounded(prompts: Sequence[Prompt], max_tokens: int, each: int = 0) -> Iterator[Sequence[Prompt]]:
    """Prompts in their order, as many at a time as a tree of ``max_tokens`` holds, with ``each`` more for every one.

    Raises:
        StkitError: a prompt that is longer by itself.
    """
    begin = held = 0
    before: tuple[int, ...] = ()
    for k, prompt in enumerate(prompts):
        whole = len(prompt.ids) + each
        if whole > max_tokens:
            room = f" and {each} for its answer" if each else ""
            raise StkitError(
                f"a prompt of {len(prompt.ids)} tokens{room} is over max_tokens={max_tokens}: raise max_tokens to {whole}, "
                "or lower frames or max_pixels"
            )
        new = whole - in_common(before, prompt.ids)
        if held + new > max_tokens:
            yield prompts[begin:k]
            begin, held, new = k, 0, whole
        held, before = held + new, prompt.ids
    if len(prompts) > begin:
        yield prompts[begin:]


def in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common from their start."""
    length = min(len(a), len(b))
    differs = np.not_equal(a[:length], b[:length])
    return int(differs.argmax()) if differs.any() else length


def _said(loaded: Loaded, ids: Sequence[int], finished: bool) -> Said:
    length = len(ids) - finished
    text = loaded.processor.tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Said(text, length, finished)
