"""Rollouts: prompts that share a video computed once, and groups of answers decoded from them in one batch.

The prompts of one video are laid out as a tree, so that what they have in common is computed and stored once; every
prompt's group then reads the same keys and values::

    groups = generate(model, [prompt.ids], video, group=8, sampling=Sampling(max_new_tokens=64, stop=(im_end,), seed=0))
    groups[0][3].ids, groups[0][3].log_probs, groups[0][3].finished
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..runtime import BadUse, StkitError, child_seed
from .attention import TreeAttention, memory_explained, pack_for, tree_forward, with_tree_attention
from .few_rows import product, with_few_rows
from .kvcache import TreeCache
from .logps import head_weight
from .tree import trie
from .video import VideoInputs
from .views import base_model
from .vision import encode_video


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    max_new_tokens: the most a rollout can have. greedy: the likeliest token each time. temperature, top_k (0 for all),
    top_p (1 for all): the distribution that is sampled from, in that order, as Transformers applies them. stop: token
    ids that end a rollout (the token is kept). seed: rollout i of prompt p draws from a generator of its own, made of
    (seed, p, i). think_budget: a rollout that has so many tokens without ``think_end`` among them gets ``forced`` next
    (say the tokens of "</think> <answer>"), and goes on freely after it.
    """

    max_new_tokens: int = 256
    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    seed: int = 0
    think_budget: int | None = None
    think_end: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise BadUse(f"max_new_tokens={self.max_new_tokens}: give at least 1")
        if not self.temperature > 0:
            raise BadUse(f"temperature={self.temperature}: give a number above 0, or greedy=True")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise BadUse(
                f"top_k={self.top_k}, top_p={self.top_p}: give top_k of 0 (all) or more, top_p above 0 up to 1"
            )
        if self.think_budget is None:
            return
        if not self.think_end or not self.forced:
            raise BadUse(
                f"think_budget={self.think_budget}: give think_end and forced with it, the tokens that end a think"
            )
        if not 0 <= self.think_budget < self.max_new_tokens - len(self.forced):
            raise BadUse(
                f"think_budget={self.think_budget} and {len(self.forced)} forced tokens leave no room for an answer in "
                f"max_new_tokens={self.max_new_tokens}: raise it, or lower the budget"
            )


class Rollout(NamedTuple):
    """One answer.

    ids: token ids, the stop token included. log_probs: float32 ``(len(ids),)`` on the CPU, natural log, of each token
    under the distribution that it was sampled from (greedy: the model's own, at temperature 1). forced: which tokens
    were not sampled but put there when the think budget ran out (their log_probs are what the model gave them).
    finished: it ended by a stop token, not at the limit.
    """

    ids: tuple[int, ...]
    log_probs: torch.Tensor
    forced: tuple[bool, ...]
    finished: bool


@torch.inference_mode()
def generate(
    model,
    prompts: Sequence[Sequence[int]],
    video: VideoInputs | None = None,
    features=None,
    group: int = 1,
    sampling: Sampling = Sampling(),
    backend: str = "auto",
) -> list[list[Rollout]]:
    """Decode a group of rollouts from each prompt on one video.

    Args:
        model: Qwen2-VL, Qwen2.5-VL or Qwen3-VL of Transformers, or a peft model around it.
        prompts: token ids of each; what they have in common from their start is computed and stored once.
        video: which all of them show, or None.
        features: what :func:`stkit.vlm.vision.encode_video` made of it; None: it is called here.
        group: rollouts a prompt.
        sampling: see :class:`Sampling`. A rollout doesn't depend on the group's size or on the other prompts, up to
            rounding.
        backend: of the attention over the prompts.

    Returns:
        For each prompt its group. Positions go on as in the model's forward pass over prompt and answer. (Transformers'
        ``generate`` goes on from the largest position instead, which differs for videos whose time positions exceed
        those of the text behind them.)

    Raises:
        StkitError: as :func:`stkit.vlm.logps.tree_logps`; prompt and max_new_tokens exceed the context; out of memory.
    """
    if group < 1 or not prompts:
        raise BadUse(f"{len(prompts)} prompts and group={group}: give at least one of each")
    _check_context(model, prompts, sampling)
    trees, last = trie(prompts)
    if video is not None and len(trees) > 1:
        raise StkitError(f"{len(prompts)} prompts begin in {len(trees)} ways: prompts on one video begin with it")
    videos = [video] * len(trees)
    packed = pack_for(model, trees, videos)
    if features is None:
        features = encode_video(model, video)
    number = {id(node): k for k, node in enumerate(packed.nodes)}
    seats = sorted((number[id(node)], p, i) for p, node in enumerate(last) for i in range(group))
    ends = [seat[0] for seat in seats]
    attention = TreeAttention(packed.end, model, backend)
    cache = TreeCache(packed, ends, attention, sampling.max_new_tokens)
    hidden = tree_forward(model, packed, [features] * len(trees), cache)
    first = hidden[[packed.slices[end].stop - 1 for end in ends]]
    decoder = _Decoder(model, cache, sampling, packed.following[:, ends])
    with memory_explained(packed):
        rollouts = decoder.run(first, [seat[1:] for seat in seats])
    groups: list[list[Rollout]] = [[None] * group for _ in prompts]
    for (_, p, i), rollout in zip(seats, rollouts):
        groups[p][i] = rollout
    return groups


def _check_context(model, prompts, sampling: Sampling) -> None:
    context = base_model(model).config.get_text_config().max_position_embeddings
    longest = max(map(len, prompts))
    if longest + sampling.max_new_tokens > context:
        raise StkitError(
            f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones exceed the model's context of {context}: "
            "lower max_new_tokens, frames or max_pixels"
        )


class _Decoder:
    """R rollouts under way. ``position``: int64 ``(3, R)``, of each one's first new token."""

    def __init__(self, model, cache: TreeCache, sampling: Sampling, position: torch.Tensor):
        self.cache, self.how = cache, sampling
        self.language, self.embed = with_tree_attention(model), base_model(model).get_input_embeddings()
        self.head, self.device = head_weight(model), self.embed.weight.device
        self.position = position.to(self.device)
        if self.device.type == "cpu":
            self.language = with_few_rows(self.language)

    def run(self, hidden: torch.Tensor, names: Sequence[tuple]) -> list[Rollout]:
        """Decode all to their end; ``hidden`` ``(R, E)`` predicts the first token of each."""
        how, count = self.how, len(names)
        draws = torch.stack([_uniforms(how, name) for name in names]).to(self.device)
        ids: list[list[int]] = [[] for _ in names]
        log_probs = torch.empty(count, how.max_new_tokens)
        thinks = [_Think(how) for _ in names]
        alive = list(range(count))
        self.cache.start()
        while True:
            step = self.cache.step
            logits = product(self.head, hidden).T.contiguous()
            tokens, chosen = choose_tokens(logits, how, draws[alive, step], [thinks[r].next for r in alive])
            log_probs[alive, step] = chosen.float().cpu()
            going = []
            for place, (row, token) in enumerate(zip(alive, tokens.tolist())):
                ids[row].append(token)
                thinks[row].saw(token)
                if token not in how.stop and step + 1 < how.max_new_tokens:
                    going.append(place)
            if not going:
                break
            if len(going) < len(alive):
                self._leave(going)
                tokens, alive = tokens[going], [alive[place] for place in going]
            hidden = self._step(tokens, step)
            self.cache.advance()
        return [
            Rollout(tuple(row), log_probs[r, : len(row)].clone(), tuple(thinks[r].log), row[-1] in how.stop)
            for r, row in enumerate(ids)
        ]

    def _leave(self, going: list[int]) -> None:
        """Go on with these places only."""
        self.cache.keep(going)
        self.position = self.position[:, going]

    def _step(self, tokens: torch.Tensor, step: int) -> torch.Tensor:
        """The hidden states ``(R, E)`` after one more token each."""
        inputs = {"inputs_embeds": self.embed(tokens[:, None]), "position_ids": (self.position + step)[..., None]}
        hidden = self.language(**inputs, use_cache=False, tree=self.cache).last_hidden_state[:, 0]
        if not torch.isfinite(hidden).all():
            raise StkitError(
                f"a hidden state is not finite at new token {step}: use bfloat16 or float32 if it is float16"
            )
        return hidden


class _Think:
    """Whether a rollout still thinks, and what it has to say when its budget is spent."""

    def __init__(self, how: Sampling):
        self.how, self.said, self.log, self.waiting = how, [], [], []
        self.open = how.think_budget is not None
        self._look()

    @property
    def next(self) -> int:
        """The token that is put there now, -1 for none."""
        return self.waiting[0] if self.waiting else -1

    def saw(self, token: int) -> None:
        self.log.append(bool(self.waiting))
        self.said.append(token)
        del self.waiting[:1]
        self._look()

    def _look(self) -> None:
        ending = self.how.think_end
        if self.open and tuple(self.said[-len(ending) :]) == ending:
            self.open = False
        if self.open and len(self.said) >= self.how.think_budget:
            self.open, self.waiting = False, list(self.how.forced)


def _uniforms(how: Sampling, name: tuple) -> torch.Tensor:
    """The random numbers of one rollout, float64 ``(max_new_tokens,)``, the same whatever else is decoded."""
    generator = torch.Generator().manual_seed(child_seed(how.seed, "rollout", *name))
    return torch.rand(how.max_new_tokens, generator=generator, dtype=torch.float64)


def choose_tokens(
    logits: torch.Tensor, how: Sampling, draws: torch.Tensor, forced: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a token for each row.

    Args:
        logits: ``(R, V)``. draws: uniform in [0, 1), float64 ``(R,)``. forced: token ids to take instead, -1 for none.

    Returns:
        ``(tokens int64 (R,), log_probs float32 (R,))``.

    Raises:
        StkitError: logits that are not numbers.
    """
    logits = logits.float()
    warmed = logits if how.greedy else logits / how.temperature
    shares = torch.softmax(warmed if how.greedy else filter_logits(warmed, how.top_k, how.top_p), -1)
    if how.greedy:
        tokens = shares.argmax(-1)
    else:
        reached = shares.cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(reached, (draws * reached[:, -1])[:, None], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    given = torch.tensor(forced, device=logits.device)
    tokens = torch.where(given >= 0, given, tokens)
    chosen = shares.gather(-1, tokens[:, None])[:, 0].log()
    if max(forced) >= 0:  # what was put there may lie outside of top-k and top-p: its log-prob is the model's own
        plain = torch.log_softmax(warmed, -1)
        chosen = torch.where(given >= 0, plain.gather(-1, tokens[:, None])[:, 0], chosen)
    if torch.isnan(chosen).any():
        raise StkitError("the logits hold NaN: look for NaN in the head's weights")
    return tokens, chosen


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Logits with minus infinity on all but the top k, and on all but the fewest that have a mass of top_p.

    Source: Transformers, TopKLogitsWarper and TopPLogitsWarper (the likeliest token is always kept).
    """
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, places = logits.sort(-1)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, places, dropped), float("-inf"))
    return logits
