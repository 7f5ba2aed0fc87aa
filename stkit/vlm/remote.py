"""Put a benchmark's questions to a model behind a server: the frames as pictures, the question as text after them.

    interview = RemoteInterview(Endpoint(url, name), Settings(mode="generate", frames=8))
    shown = interview.watch("walk.mp4", clip_id="walk")
    predictions = interview.ask(questions, shown)

A question without an answer is a prediction that says why (``failed``): it is counted, never scored as wrong.
"""

import base64
import copy
import hashlib
import io
import json
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..bench.schema import LETTERS, Prediction, Question
from ..runtime import StkitError, versions
from .ask import Said
from .cache import FrameCache, load_frames
from .controls import control_frames, rotated
from .endpoint import Endpoint, NoAnswer, Reply, chat
from .interview import Interview, Settings, Shown, _from_letters, _from_text
from .load import Loaded
from .prompts import user_text

FACTOR = 28  # sides of a frame are multiples of it, as for Qwen2-VL and Qwen2.5-VL
LEAST_PIXELS = 128 * FACTOR * FACTOR
QUALITY = 95
IMAGES = f"JPEG of quality {QUALITY}, colours not subsampled"
PATIENCE = 5  # so many questions may fail before the first answer
COSTS = ("requests", "retries", "prompt_tokens", "completion_tokens")
TOP = 20  # tokens whose log-probabilities are asked for, the most that servers give
CONTROL_TOKEN = re.compile(r"<\|[^<>|]{1,40}\|>")


class Asked(NamedTuple):
    """What is sent for one question, with a hash over all of it."""

    messages: list[dict]
    sha256: str


class Tally:
    """Answers and failures of all threads: when asking on makes no sense, it says so."""

    def __init__(self, patience: int = PATIENCE):
        self.patience, self.answered, self.failed, self.unreachable = patience, 0, 0, 0
        self.lock = threading.Lock()

    def answer(self) -> None:
        with self.lock:
            self.answered, self.unreachable = self.answered + 1, 0

    def failure(self, error: NoAnswer) -> None:
        """Count a failure.

        Raises:
            StkitError: no key or a wrong one, nothing answered so far, or nobody there any more.
        """
        with self.lock:
            self.failed += 1
            self.unreachable = self.unreachable + 1 if error.kind == "unreachable" else 0
            if error.kind == "key":
                raise StkitError(str(error))
            if not self.answered and self.failed >= self.patience:
                raise StkitError(f"nothing was answered, {self.failed} questions failed, the last with: {error}")
            if self.unreachable >= self.patience:
                raise StkitError(f"the server is gone ({error}): run the same command again when it is back")


class RemoteInterview(Interview):
    """A model behind a server that is asked under fixed settings, one request a question.

    Args:
        endpoint: where it is.
        settings: see :class:`stkit.vlm.interview.Settings`; in letter mode the server must give log-probabilities.
        cache: where decoded and resized frames are kept; None for nowhere.
        patience: questions that may fail before the first answer.
    """

    def __init__(
        self, endpoint: Endpoint, settings: Settings, cache: FrameCache | None = None, patience: int = PATIENCE
    ):
        super().__init__(Loaded(None, None, describe(endpoint)), settings, cache=cache)
        self.endpoint, self.tally = endpoint, Tally(patience)

    def blindfolded(self) -> "RemoteInterview":
        """The blind control: the same questions without frames, in the same mode."""
        return copy.copy(self)

    def watch(self, path: str | Path, clip_id: str) -> Shown:
        """Read a video, do to its frames what the control says, and make pictures of them (``Shown.inputs``)."""
        s = self.settings
        reading = {"n": s.frames, "fps": s.fps}
        frames = load_frames(
            path, FACTOR, s.min_pixels, s.max_pixels, cache=self.cache, sampling=s.sampling, reader=s.reader,
            **{k: v for k, v in reading.items() if v is not None},
        )  # fmt: skip
        frames = control_frames(frames, s.control, s.seed, clip_id)
        count, height, width, _ = frames.pixels.shape
        told = {"reader": frames.reader, "images": [count, width, height]}
        told |= {"note": frames.note} if frames.note else {}
        times = tuple(round(float(t), 4) for t in frames.timestamps_s)
        return Shown(tuple(map(data_uri, frames.pixels)), None, times, told)

    def ask(self, questions: Sequence[Question], shown: Shown) -> list[Prediction]:
        """A prediction for each question on one video, with the reason in ``failed`` where there is no answer.

        Raises:
            StkitError: asking on makes no sense, see :class:`Tally`; no log-probabilities in letter mode.
        """
        return [self._ask_one(question, shown) for question in questions]

    def _ask_one(self, question: Question, shown: Shown) -> Prediction:
        if found := CONTROL_TOKEN.search("\n".join([question.question, *question.options])):
            reason = f"its text holds {found[0]}, which a server may take for a control token"
            return self._without_answer(question, shown, reason, {})
        begin = time.monotonic()
        try:
            (prediction,) = super().ask([question], shown)
        except NoAnswer as error:
            self.tally.failure(error)
            lost = {"requests": error.requests, "retries": max(0, error.requests - 1)}
            failed = self._without_answer(question, shown, str(error), total_costs([_costs(error.before), lost]))
            return replace(failed, seconds=round(time.monotonic() - begin, 4))
        self.tally.answer()
        return prediction

    def _without_answer(self, question: Question, shown: Shown, reason: str, sent: dict) -> Prediction:
        control = "blind" if shown.inputs is None else self.settings.control
        return replace(self.failed(question, reason), control=control, timestamps_s=shown.timestamps_s, extra=sent)

    def _by_text(self, questions: Sequence[Question], shown: Shown) -> list[Prediction]:
        found = []
        for question in questions:
            asked = asked_of(question, shown, self.settings.prompt, think=True)
            reply = chat(self.endpoint, asked.messages, self.settings.max_new_tokens)
            said = Said(reply.text, reply.completion_tokens, reply.finished)
            prediction = _from_text(question, said, asked, self.settings.control == "reversed")
            found.append(replace(prediction, extra=prediction.extra | _costs([reply])))
        return found

    def _by_letter(self, questions: Sequence[Question], shown: Shown) -> list[Prediction]:
        found = []
        for question in questions:
            turns = len(question.options) if self.settings.control == "circular" else 1
            by_option, first, replies = [], None, []
            try:
                for version, back in (rotated(question, shift) for shift in range(turns)):
                    asked = asked_of(version, shown, self.settings.prompt, think=False)
                    first = first or asked
                    replies.append(chat(self.endpoint, asked.messages, 1, logprobs=True, top_logprobs=TOP))
                    placed = np.empty(len(back))
                    placed[back] = letters(replies[-1], len(back), self.endpoint)
                    by_option.append(placed)
            except NoAnswer as error:
                error.before = tuple(replies)
                raise
            prediction = _from_letters(question, by_option, first)
            found.append(replace(prediction, extra=prediction.extra | _costs(replies)))
        return found


def describe(endpoint: Endpoint) -> dict:
    """The record of a model of which only name and address are known."""
    return {
        "name": endpoint.model,
        "family": "behind an endpoint",
        "endpoint": endpoint.url,
        "images": IMAGES,
        "untrained": False,
        "why": {},
        "versions": versions(),
    }


def data_uri(pixels: np.ndarray) -> str:
    """A frame ``(H, W, 3)``, uint8, as a picture within a URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def asked_of(question: Question, shown: Shown, style: str, think: bool) -> Asked:
    """The message for one question: the frames in their order, then the text."""
    text = "".join(user_text(question, style, think)).encode("utf-8", "replace").decode()
    pictures = [{"type": "image_url", "image_url": {"url": uri}} for uri in shown.inputs or ()]
    messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
    return Asked(messages, hashlib.sha256(json.dumps(messages).encode()).hexdigest())


def letters(reply: Reply, count: int, endpoint: Endpoint) -> list[float]:
    """Log-probabilities of the first ``count`` letters as the answer's first token.

    Raises:
        StkitError: the server gives none at all. NoAnswer: a letter is not among the likeliest tokens.
    """
    if reply.first_token is None:
        raise StkitError(f"{endpoint.url} gives no log-probabilities: ask with mode 'generate' (--mode generate)")
    if lacking := [letter for letter in LETTERS[:count] if letter not in reply.first_token]:
        held = f"{', '.join(lacking)} not among the {len(reply.first_token)} likeliest first tokens"
        raise NoAnswer(f"{held}: mode 'generate' needs no letters", "refused")
    return [reply.first_token[letter] for letter in LETTERS[:count]]


def _costs(replies: Sequence[Reply]) -> dict:
    """What replies took, for a prediction's ``extra``."""
    return total_costs({**r._asdict(), "retries": r.requests - 1} for r in replies)


def total_costs(each: Iterable[Mapping]) -> dict:
    """The sums of ``COSTS``; what one of them lacks counts as 0."""
    each = list(each)
    return {name: sum(one.get(name, 0) for one in each) for name in COSTS}
