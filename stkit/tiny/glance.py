"""What the frames show, read off the vision tower's output alone.

A video token stands for a square of two frames; the mean of all that stand for the same two is compared with the embeddings of
words: as it is for the first frame's motion, with its channels rotated for its landmark, rotated further for the side, and so on
for the second frame. So each of the six words has a place of its own, nothing is added to the model, and the language part finds
words that it knows. For a tower that has never seen anything this is learned many times sooner than the same words said by the
language part, which must find the place first; and learned beside it, it keeps what the tower says readable.
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

WORD_SETS = (tuple(WORDS.values()), (NO_MARK, *LANDMARKS), (NO_MARK, *MIRROR))  # motion, landmark, side
PLACES = 6  # words of two frames
ROTATION = 32  # channels from one word's place to the next one's


def word_tokens(tokenizer) -> list[list[int]]:
    """The tokens of the words of each of :data:`WORD_SETS`.

    Raises:
        StkitError: a word of several tokens.
    """
    found = [[tokenizer.encode(f" {word}", add_special_tokens=False) for word in words] for words in WORD_SETS]
    if several := [word for words, ids in zip(WORD_SETS, found) for word, id in zip(words, ids) if len(id) != 1]:
        raise StkitError(f"the tokenizer has no token of its own for {', '.join(several)}")
    return [[id[0] for id in ids] for ids in found]


def glance_loss(
    table: torch.Tensor, features: Sequence[torch.Tensor], wanted: Sequence[Sequence[int]], shares: Sequence[float],
    words: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """How well words are read off features.

    Args:
        table: embeddings, ``(vocabulary, hidden)``; they are not learned here.
        features: of each of C clips ``(N, hidden)``, N a multiple of its T patches of time, in the order of time.
        wanted: of each clip the tokens of ``6 T`` words: motion, landmark and side of each frame.
        shares: what each clip's mean loss counts.
        words: what may stand in each place, see :func:`word_tokens`.

    Returns:
        The loss, a scalar, and which words have a probability over one half, bool ``(C, T, 6)``.
    """
    goal = torch.tensor(wanted, device=table.device).unflatten(1, (-1, PLACES))
    seen = torch.stack([part.unflatten(0, (goal.shape[1], -1)).mean(1) for part in features]).float()
    log_probs = []
    for place in range(PLACES):
        choice = torch.tensor(words[place % len(words)], device=table.device)
        scores = seen.roll(-ROTATION * place, -1) @ table[choice].detach().float().T
        index = (goal[..., place, None] == choice).int().argmax(-1)
        log_probs.append(-F.cross_entropy(scores.flatten(0, 1), index.flatten(), reduction="none").view_as(index))
    log_probs = torch.stack(log_probs, -1)
    weights = torch.tensor(shares, device=table.device)
    return -(log_probs.mean((1, 2)) * weights).sum(), log_probs.detach() > math.log(0.5)


def glance_on(model, forest: Sequence[Plant], told: Sequence, words: Sequence[Sequence[int]]) -> tuple[torch.Tensor, dict]:
    """The loss of some films, a scalar, and numbers that add up, as of :func:`stkit.tiny.recipe.loss_on`."""
    clips = [told[one.clip] for one in forest]
    features = [found.pooler_output[0] for found in encode_videos(model, [clip.video for clip in clips])]
    table, shares = model.get_input_embeddings().weight, [clip.share for clip in clips]
    loss, right = glance_loss(table, features, [clip.words for clip in clips], shares, words)
    numbers = {
        "lines": len(clips), "exact": int(right.flatten(1).all(1).sum()),
        "learned_tokens": right.numel(), "words": int(right.sum()),
    }  # fmt: skip
    return loss, numbers
