"""Rollouts from an OpenAI-compatible server (vLLM, SGLang, ``transformers serve``, any vendor) in place of our own.

    stkit grpo BENCH --set grpo.endpoint=http://localhost:8000/v1 --set grpo.served=my-model ...

The server gets the frames as pictures and the text after them. What it says is encoded by the policy's tokenizer, and the
policy's own log-probs before the update stand for those sampled from: exact where the server has the policy's weights,
and off-policy by as much as it has others.
"""

from collections.abc import Sequence

from ..bench.schema import Question
from ..runtime import StkitError, child_seed
from ..vlm.endpoint import Endpoint, NoAnswer, Reply, chat, in_threads
from ..vlm.interview import Settings as Asked
from ..vlm.load import Loaded
from ..vlm.remote import CONTROL_TOKEN, RemoteInterview, asked_of
from .data import Item, Seen, Watcher
from .rollouts import Group, prompts_of, rollout_of
from .settings import Settings


class Served:
    """A server that draws rollouts.

    Args:
        settings: grpo.endpoint, served, concurrency, and how is sampled.
        watcher: which frames are shown.

    Raises:
        BadUse: a URL that makes no sense, or one that holds a key (keys come from the environment).
    """

    def __init__(self, settings: Settings, watcher: Watcher):
        how = settings.grpo
        self.how, self.seed = how, settings.train.seed
        self.endpoint = Endpoint(how.endpoint, how.served or "")
        asked = Asked(mode="generate", prompt=settings.data.prompt, max_new_tokens=how.max_new_tokens, **watcher.chosen)
        self.interview = RemoteInterview(self.endpoint, asked, watcher.cache)
        self.benchmark = watcher.benchmark

    def groups(self, step: int, loaded: Loaded, item: Item, seen: Seen, style: str, limit: int) -> list[Group]:
        """A group for each question of a clip.

        Raises:
            StkitError: the server gave no answer after all retries; what is on disk is whole, a re-run goes on.
        """
        for question in item.questions:
            if found := CONTROL_TOKEN.search("\n".join([question.question, *question.options])):
                raise StkitError(
                    f"question {question.id!r} holds {found[0]}, which a server may take for a control token"
                )
        shown = self.interview.watch(self.benchmark.video_path(item.video), item.clip_id)
        messages = [asked_of(question, shown, style, think=True).messages for question in item.questions]
        wanted = [(q, k) for q in range(len(item.questions)) for k in range(self.how.group)]

        def ask(one: tuple[int, int]) -> tuple[tuple[int, int], Reply]:
            q, k = one
            seed = child_seed(self.seed, step, item.questions[q].id, k) % 2**31
            return one, chat(self.endpoint, messages[q], limit, self.how.temperature, top_p=1.0, seed=seed)

        try:
            replies = dict(in_threads(ask, wanted, self.how.concurrency))
        except NoAnswer as error:
            raise StkitError(
                f"rollouts of clip {item.clip_id!r}: {error}: run the same command again when it is well"
            ) from error
        prompts = prompts_of(loaded, item, seen, style, limit)
        return [
            self._group(question, prompts[q], [replies[q, k] for k in range(self.how.group)], loaded, limit)
            for q, question in enumerate(item.questions)
        ]

    def _group(self, question: Question, prompt, replies: Sequence[Reply], loaded: Loaded, limit: int) -> Group:
        tokenizer = loaded.processor.tokenizer
        rows = [{"id": question.id, "text": reply.text, "finished": reply.finished} for reply in replies]
        return Group(
            question, prompt, [rollout_of(row, tokenizer, limit) for row in rows], [row["text"] for row in rows]
        )
