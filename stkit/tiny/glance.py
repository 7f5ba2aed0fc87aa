"""What a patch of time shows, read off the vision tower's output alone.

The mean of a patch's features is compared with the embeddings of words: as it is for the motion, with its channels
rotated for the landmark, and rotated further for the side. So the three have a place of their own, nothing is added to
the model, and the language part finds words that it knows. For a tower that has never seen anything this is learned many
times sooner than the same words said by the language part, which must find the patch first.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..bench.presets import MIRROR
from ..bench.routes import LANDMARKS
from ..bench.timeline import NO_MARK, WORDS
from ..runtime import StkitError
from ..train.forest import Plant
from ..vlm.vision import encode_videos

ROLES = (tuple(WORDS.values()), (NO_MARK, *LANDMARKS), (NO_MARK, *MIRROR))  # what each of the three words may be
ROTATION = 32  # channels from one word's place to the next one's


def role_tokens(tokenizer) -> list[list[int]]:
    """The tokens of the words of each of :data:`ROLES`.

    Raises:
        StkitError: a word of several tokens.
    """
    found = [[tokenizer.encode(f" {word}", add_special_tokens=False) for word in words] for words in ROLES]
    if several := [word for words, ids in zip(ROLES, found) for word, id in zip(words, ids) if len(id) != 1]:
        raise StkitError(f"the tokenizer has no token of its own for {', '.join(several)}")
    return [[id[0] for id in ids] for ids in found]


def glance_on(tokens: Sequence[Sequence[int]], model, forest: Sequence[Plant], told: Sequence) -> tuple[torch.Tensor, dict]:
    """The loss of some films, a scalar, and numbers that add up, as of :func:`stkit.tiny.recipe.loss_on`.

    Args:
        tokens: see :func:`role_tokens`. The embeddings themselves are not learned here.
    """
    shown = [told[one.clip] for one in forest]
    features = encode_videos(model, [one.video for one in shown])
    table = model.get_input_embeddings().weight.detach()
    right, sums = [], []
    wanted = torch.tensor([one.lines[0].ids for one in shown], device=table.device).unflatten(1, (-1, len(ROLES)))
    seen = torch.stack([f.pooler_output[0].unflatten(0, (wanted.shape[1], -1)).mean(1) for f in features])
    share = torch.tensor([one.share for one in shown], device=table.device)
    for k, words in enumerate(tokens):
        scores = seen.roll(-ROTATION * k, -1).float() @ table[torch.tensor(words)].float().T
        target = (wanted[..., k, None] == torch.tensor(words, device=table.device)).int().argmax(-1)
        log_probs = -F.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        right.append(log_probs.detach() > math.log(0.5))
        sums.append(-(log_probs.mean(1) * share).sum())
    right = torch.stack(right, -1)
    numbers = {
        "lines": len(shown), "exact": int(right.flatten(1).all(1).sum()),
        "learned_tokens": right.numel(), "words": int(right.sum()),
    }  # fmt: skip
    return sum(sums) / len(ROLES), numbers
