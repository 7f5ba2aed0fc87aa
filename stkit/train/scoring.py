"""Scores of a held-out split while a model is training, with the blind score and the interval beside each.

scorer = Scorer(benchmark, settings, watcher, mode="generate")
row = scorer.score(policy, processes)      # accuracy, low, high, blind, chance, n, clusters
"""

import torch

from ..bench.schema import Benchmark, Question
from ..runtime import BadUse, StkitError
from ..stats import clustered_interval
from ..vlm.interview import BLIND, Interview
from ..vlm.interview import Settings as Asked
from .data import Watcher
from .policy import Policy
from .processes import Processes
from .settings import Settings


class Scorer:
    """Multiple-choice questions of ``train.eval_split``, of the tasks and orders that are learned.

    Args:
        mode: "letter" for models that learn to answer with a letter, "generate" for those that think first.

    Raises:
        BadUse: the split is learned from. StkitError: there is no such question.
    """

    def __init__(self, benchmark: Benchmark, settings: Settings, watcher: Watcher, mode: str):
        train, data = settings.train, settings.data
        if data.split in (None, train.eval_split):
            raise BadUse(
                f"train.eval_split={train.eval_split!r} is learned from (data.split={data.split!r}): hold another split out"
            )
        asked = [q for q in benchmark.select(train.eval_split) if q.task in data.tasks and q.order in data.orders]
        self.questions = [q for q in asked if not q.is_open][: train.eval_limit]
        if not self.questions:
            there = ", ".join(sorted({q.split for q in benchmark.questions}))
            raise StkitError(
                f"{benchmark.path}: no multiple-choice question of split {train.eval_split!r} to score (there are {there}): "
                "set train.eval_split, or train.eval_every=0"
            )
        chosen = {k: v for k, v in watcher.chosen.items()}
        self.asked = Asked(mode=mode, prompt=data.prompt, max_new_tokens=train.eval_tokens, **chosen)
        self.benchmark, self.cache = benchmark, watcher.cache

    def score(self, policy: Policy, processes: Processes) -> dict:
        """Ask all of them.

        Returns:
            accuracy with its clustered interval (low, high), blind (asked without frames, by letter), chance, unparsed,
            n and clusters.
        """
        interview = Interview(policy.loaded, self.asked, cache=self.cache)
        clips: dict[str, list[Question]] = {}
        for question in self.questions:
            clips.setdefault(question.video, []).append(question)
        rows = []
        with torch.no_grad(), policy.whole():
            for video, questions in processes.share(list(clips.items())):
                shown = interview.watch(self.benchmark.video_path(video), questions[0].clip_id)
                said = interview.ask(questions, shown)
                blind = interview.blindfolded().ask(questions, BLIND)
                rows += [(q.group, bool(s.correct), bool(b.correct), s.parsed is None, 1 / len(q.options))
                         for q, s, b in zip(questions, said, blind, strict=True)]  # fmt: skip
        groups, right, blind, unparsed, chance = zip(*processes.gathered(rows))
        interval, n = clustered_interval([float(r) for r in right], groups), len(right)
        found = {"accuracy": interval.mean, "low": interval.low, "high": interval.high, "blind": sum(blind) / n}
        return found | {"chance": sum(chance) / n, "unparsed": sum(unparsed) / n, "n": n, "clusters": interval.clusters}
