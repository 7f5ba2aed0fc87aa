"""Show a model a clip and put its questions to it: what one evaluation does, without folders and scores.

interview = Interview(loaded, Settings(mode="letter", frames=8), max_tokens=16_384)
shown = interview.watch("walk.mp4", clip_id="walk")
predictions = interview.ask(questions, shown)          # shown=BLIND asks the same without the video
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..bench import routes
from ..bench.schema import LETTERS, Prediction, Question
from .answers import answer_parts, parse, parse_route
from .ask import MAX_TOKENS, Said, decode, letter_log_probs
from .cache import FrameCache, load_frames
from .controls import control_frames, rotated, turns, turns_seen_backwards
from .load import Loaded
from .prompts import Prompt, build_prompt
from .video import PUBLISHED_MAX_PIXELS, VideoInputs, prepare, video_spec
from .vision import encode_video


@dataclass(frozen=True)
class Settings:
    """What decides an answer, besides the model: which frames, which prompt, how the answer is got."""

    mode: str = "letter"
    control: str = "none"
    seed: int = 0
    sampling: str = "uniform"
    frames: int | None = 32
    fps: float | None = None
    min_pixels: int | None = None
    max_pixels: int = PUBLISHED_MAX_PIXELS
    reader: str = "auto"
    prompt: str = "stkit"
    max_new_tokens: int = 512


class Shown(NamedTuple):
    """A video as the model sees it, with what is told of it in each prediction."""

    inputs: VideoInputs | None
    features: object
    timestamps_s: tuple[float, ...]
    told: dict


BLIND = Shown(None, None, (), {})


class Interview:
    """A model that is asked under fixed settings.

    Args:
        loaded: model, processor and record.
        settings: see :class:`Settings`.
        max_tokens: of the tree of questions (and rotations of options) that is computed at once; the answers don't
            depend on it.
        cache: where decoded and resized frames are kept; None for nowhere. The answers don't depend on it.
    """

    def __init__(self, loaded: Loaded, settings: Settings, max_tokens: int = MAX_TOKENS, cache: FrameCache | None = None):
        self.loaded, self.settings, self.max_tokens, self.cache = loaded, settings, max_tokens, cache

    def blindfolded(self) -> "Interview":
        """The blind control of this interview: the same prompts without the video, by letter."""
        return Interview(self.loaded, replace(self.settings, mode="letter"), self.max_tokens)

    def watch(self, path: str | Path, clip_id: str) -> Shown:
        """Read a video, do to its frames what the control says, and run the vision tower on it, once.

        Raises:
            StkitError: the video cannot be read.
        """
        s = self.settings
        spec = video_spec(self.loaded.processor)
        reading = {"n": s.frames, "fps": s.fps}
        frames = load_frames(
            path, spec.patch * spec.merge, s.min_pixels, s.max_pixels, cache=self.cache, sampling=s.sampling,
            reader=s.reader, **{k: v for k, v in reading.items() if v is not None},
        )  # fmt: skip
        frames = control_frames(frames, s.control, s.seed, clip_id)
        inputs = prepare(frames, spec, s.min_pixels, s.max_pixels)
        told = {"reader": frames.reader} | ({"note": frames.note} if frames.note else {})
        times = tuple(round(float(t), 4) for t in frames.timestamps_s)
        return Shown(inputs, encode_video(self.loaded.model, inputs), times, told)

    def asks(self, question: Question) -> bool:
        """Whether these settings can ask it: an open-ended question has no letters."""
        return self.settings.mode == "generate" or not question.is_open

    def ask(self, questions: Sequence[Question], shown: Shown) -> list[Prediction]:
        """A prediction for each question on one video.

        Raises:
            StkitError: a prompt does not fit into the model's context.
        """
        if not questions:
            return []
        begin = time.monotonic()
        found = (self._by_letter if self.settings.mode == "letter" else self._by_text)(questions, shown)
        seconds = round((time.monotonic() - begin) / len(questions), 4)
        control = "blind" if shown.inputs is None else self.settings.control
        facts = {"mode": self.settings.mode, "control": control, "seconds": seconds, "timestamps_s": shown.timestamps_s}
        return [replace(p, **facts, extra=p.extra | shown.told) for p in found]

    def failed(self, question: Question, reason: str) -> Prediction:
        """The record of a question whose video could not be shown."""
        return Prediction(question.id, self.settings.mode, self.settings.control, "", None, None, failed=reason)

    def _prompt(self, question: Question, shown: Shown) -> Prompt:
        think = self.settings.mode == "generate"
        record = self.loaded.record
        return build_prompt(
            question, self.loaded.processor, record["family"], shown.inputs, self.settings.prompt, think=think,
            context=record["context"], max_new_tokens=self.settings.max_new_tokens if think else 0,
        )  # fmt: skip

    def _by_letter(self, questions: Sequence[Question], shown: Shown) -> list[Prediction]:
        circular = self.settings.control == "circular"
        turned = [[rotated(q, shift) for shift in range(len(q.options) if circular else 1)] for q in questions]
        prompts = [[self._prompt(version, shown) for version, _ in versions] for versions in turned]
        flat = [prompt for row in prompts for prompt in row]
        scores = iter(letter_log_probs(self.loaded, flat, shown.inputs, shown.features, self.max_tokens))
        found = []
        for question, versions, asked in zip(questions, turned, prompts, strict=True):
            by_option = []
            for _, back in versions:
                placed = np.empty(len(back))
                placed[back] = next(scores)
                by_option.append(placed)
            found.append(_from_letters(question, by_option, asked[0]))
        return found

    def _by_text(self, questions: Sequence[Question], shown: Shown) -> list[Prediction]:
        prompts = [self._prompt(q, shown) for q in questions]
        limit = self.settings.max_new_tokens
        said = decode(self.loaded, prompts, shown.inputs, shown.features, self.max_tokens, limit)
        backwards = self.settings.control == "reversed"
        return [_from_text(q, s, p, backwards) for q, s, p in zip(questions, said, prompts, strict=True)]


def _from_letters(question: Question, by_option: list[np.ndarray], prompt: Prompt) -> Prediction:
    """``by_option``: the options' log-probabilities in their own order, once for each rotation that was asked."""
    choices = [int(np.argmax(scores)) for scores in by_option]
    log_probs = [tuple(float(x) for x in scores) for scores in by_option]
    rotations = [{"parsed": k, "log_probs": scores} for k, scores in zip(choices, log_probs)]
    return Prediction(
        id=question.id, mode="letter", control="", text=LETTERS[choices[0]], parsed=choices[0],
        correct=all(k == question.answer for k in choices), log_probs=log_probs[0], prompt_sha256=prompt.sha256,
        extra={"rotations": rotations} if len(rotations) > 1 else {},
    )  # fmt: skip


def _from_text(question: Question, said: Said, prompt: Prompt, backwards: bool) -> Prediction:
    extra = {"tokens": said.tokens} | ({} if said.finished else {"cut_off": True})
    distance = None
    if question.is_open:
        route, truth = parse_route(said.text), parse_route(str(question.answer))
        parsed = None if route is None else routes.render(route)
        if truth is None:  # a released answer in free words: equal words or not is all that can be told
            parsed = " ".join(answer_parts(said.text)).strip() or None
            right = parsed is not None and _words(parsed) == _words(str(question.answer))
        else:
            right = route == truth
            distance = None if route is None else float(routes.edit_distance(route, truth))
        if backwards and truth is not None:
            extra["turn_order_match"] = route is not None and turns(route) == turns_seen_backwards(truth)
    else:
        parsed = parse(said.text, question.options)
        right = parsed == question.answer
    return Prediction(
        id=question.id, mode="generate", control="", text=said.text, parsed=parsed, correct=right,
        edit_distance=distance, prompt_sha256=prompt.sha256, extra=extra,
    )  # fmt: skip


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
