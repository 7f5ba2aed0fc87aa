"""Rollouts of a clip: sampled from the policy or taken from a file, rewarded, and compared within their group.

groups = sample(job, item, seen, features, step=3)       # one group a question
score(groups, weights, functions, moments)               # fills in rewards
advantages(groups, "grpo")
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..bench.schema import Question
from ..runs import read_lines
from ..runtime import StkitError, child_seed
from ..vlm.ask import bounded
from ..vlm.generate import Rollout, Sampling, generate
from ..vlm.load import Loaded
from ..vlm.prompts import Prompt, build_prompt, encode_answer, turn_end
from .data import Item, Seen
from .losses import group_advantages, overlong_penalty
from .rewards import Answered, combine
from .settings import GrpoSettings

FORCED = "</think> <answer>"


@dataclass
class Group:
    """The rollouts of one question. rewards, advantages: one each; parts: each one's rewards by name (None: has none)."""

    question: Question
    prompt: Prompt
    rollouts: list[Rollout]
    texts: list[str]
    rewards: list[float] = field(default_factory=list)
    parts: list[dict] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)

    @property
    def flat(self) -> bool:
        """All rewards are equal: nothing can be learned from it."""
        return not any(self.advantages)

    def learned(self) -> list[int]:
        """Tokens of each rollout that were sampled (not forced): those that are learned from."""
        return [len(r.forced) - sum(r.forced) for r in self.rollouts]

    def rows(self, step: int) -> Iterable[dict]:
        """The lines of rollouts.jsonl."""
        for rollout, text, reward, parts, advantage in zip(
            self.rollouts, self.texts, self.rewards, self.parts, self.advantages, strict=True
        ):
            yield {
                "step": step, "id": self.question.id, "text": text, "rewards": parts, "reward": reward,
                "advantage": advantage, "log_prob": float(rollout.log_probs.double().sum()), "tokens": len(rollout.ids),
                "finished": rollout.finished, "ids": list(rollout.ids), "log_probs": rollout.log_probs.tolist(),
                "forced": [k for k, forced in enumerate(rollout.forced) if forced],
            }  # fmt: skip


def prompts_of(loaded: Loaded, item: Item, seen: Seen, style: str, max_new_tokens: int) -> list[Prompt]:
    """What is asked on a clip, in think and answer tags."""
    record = loaded.record
    return [
        build_prompt(q, loaded.processor, record["family"], seen.inputs, style, True, record["context"], max_new_tokens)
        for q in item.questions
    ]


def sampling_of(settings: GrpoSettings, tokenizer) -> Sampling:
    """The whole distribution at the temperature of the training: no top-p, no top-k."""
    budget = {}
    if settings.think_budget is not None:
        words = [tokenizer.encode(text, add_special_tokens=False) for text in ("</think>", FORCED)]
        budget = {"think_budget": settings.think_budget, "think_end": tuple(words[0]), "forced": tuple(words[1])}
    return Sampling(settings.max_new_tokens, temperature=settings.temperature, stop=(turn_end(tokenizer),), **budget)


def sample(
    loaded: Loaded, item: Item, seen: Seen, features, settings: GrpoSettings, style: str, seed: int, max_tokens: int
) -> list[Group]:
    """A group for each question of a clip, decoded from one tree of prompts.

    Args:
        seed: of this step; every clip draws from a seed of its own, so that the draws depend neither on the process nor
            on the clips beside it.
        max_tokens: prompts and rollouts whose keys and values are held at once.
    """
    prompts = prompts_of(loaded, item, seen, style, settings.max_new_tokens)
    how, found = sampling_of(settings, loaded.processor.tokenizer), []
    for batch in bounded(prompts, max_tokens, settings.max_new_tokens * settings.group):
        own = replace(how, seed=child_seed(seed, item.clip_id, len(found)))
        ids = [prompt.ids for prompt in batch]
        for rollouts in generate(loaded.model, ids, seen.inputs, features, settings.group, own):
            k = len(found)
            found.append(Group(item.questions[k], prompts[k], rollouts, [said(loaded, r) for r in rollouts]))
    return found


def said(loaded: Loaded, rollout: Rollout) -> str:
    """A rollout's text, without the token that ended it."""
    ids = rollout.ids[: len(rollout.ids) - rollout.finished]
    return loaded.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def score(
    groups: Sequence[Group],
    settings: GrpoSettings,
    weights: Mapping[str, float],
    functions: Mapping[str, Callable],
    moments=None,
) -> None:
    """Reward the rollouts of one clip (all of its questions together: some rewards compare them), and their advantages.

    Args:
        weights: of each reward. functions: a user's own, by name. moments: the true time line, where it is known.
    """
    limit = settings.max_new_tokens
    answered = [
        Answered(group.question, text, len(rollout.ids), rollout.finished, limit, moments)
        for group in groups for rollout, text in zip(group.rollouts, group.texts, strict=True)
    ]  # fmt: skip
    scored = iter(combine(answered, weights, functions))
    for group in groups:
        found = [next(scored) for _ in group.rollouts]
        group.rewards, group.parts = [s.reward for s in found], [dict(s.parts) for s in found]
        if settings.variant == "dapo" and settings.overlong:
            for k, rollout in enumerate(group.rollouts):
                penalty = overlong_penalty(len(rollout.ids), limit, settings.overlong)
                group.parts[k]["overlong"], group.rewards[k] = penalty, group.rewards[k] + penalty
        values = torch.tensor([group.rewards], dtype=torch.float64)
        group.advantages = group_advantages(values, settings.variant)[0].tolist()


class Recorded:
    """Rollouts of a rollouts.jsonl in place of sampled ones, by the step at which they were drawn.

    A row has step, id and text; ids and log_probs where they are known (of a server's rollouts they are not: the text
    is encoded, and the policy's own log-probs before the update stand for those sampled from).
    """

    def __init__(self, path: str | Path, questions: Sequence[Question]):
        self.path, self.steps = Path(path), {}
        known = {q.id for q in questions}
        for number, row, problem in read_lines(path):
            if not problem and not (isinstance(row, dict) and {"step", "id", "text"} <= row.keys()):
                problem = "a row has step, id and text"
            if not problem and row["id"] not in known:
                problem = f"id={row['id']!r} is no question of this benchmark's chosen ones"
            if problem:
                raise StkitError(f"{path}:{number}: {problem}")
            self.steps.setdefault(row["step"], {}).setdefault(row["id"], []).append(row)

    def clips(self, step: int, questions: Sequence[Question]) -> list[Item]:
        """The clips whose rollouts were drawn at a step."""
        rows = self.steps.get(step)
        if not rows:
            there = f"{min(self.steps)} to {max(self.steps)}"
            raise StkitError(f"{self.path}: no rollouts of step {step} (there are those of {there}): lower train.steps")
        asked: dict[str, list[Question]] = {}
        by_id = {q.id: q for q in questions}
        for name in rows:
            asked.setdefault(by_id[name].video, []).append(by_id[name])
        return [Item(k, own[0].clip_id, video, tuple(own)) for k, (video, own) in enumerate(asked.items())]

    def groups(self, step: int, loaded: Loaded, item: Item, seen: Seen, style: str, limit: int) -> list[Group]:
        """The groups of a clip."""
        found = []
        for question, prompt in zip(item.questions, prompts_of(loaded, item, seen, style, limit), strict=True):
            rows = self.steps[step][question.id]
            if len(rows) < 2:
                raise StkitError(f"{self.path}: one rollout of {question.id!r} at step {step}: a group has 2 or more")
            rollouts = [rollout_of(row, loaded.processor.tokenizer, limit) for row in rows]
            found.append(Group(question, prompt, rollouts, [row["text"] for row in rows]))
        return found


def rollout_of(row: Mapping, tokenizer, limit: int) -> Rollout:
    """A rollout of a row with ids and log_probs, or of its text alone (log_probs are NaN then, until they are known)."""
    ids, log_probs = row.get("ids"), row.get("log_probs")
    finished = bool(row.get("finished", True))
    if ids is None:
        ids = encode_answer(tokenizer, row["text"])[: None if finished else -1][:limit]
    if log_probs is not None and len(log_probs) != len(ids):
        raise StkitError(f"rollout of {row['id']!r}: {len(log_probs)} log_probs for {len(ids)} ids: give one for each")
    values = (
        torch.full((len(ids),), float("nan")) if log_probs is None else torch.tensor(log_probs, dtype=torch.float32)
    )
    forced = set(row.get("forced") or ())
    return Rollout(tuple(ids), values, tuple(k in forced for k in range(len(ids))), finished)
