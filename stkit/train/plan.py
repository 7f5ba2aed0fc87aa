"""What a training run will need of a device's memory, before anything is loaded, and which settings make it fit.

    found = plan("Qwen/Qwen2.5-VL-7B-Instruct", load_settings("workstation-24gb", "grpo"), "grpo", gpu_gb=24)
    found.peak, found.phase, found.parts, found.fits, found.chosen
    print(found.text())
    check_plan(found)                                 # StkitError where it cannot fit, with what to change

Counted is what torch holds (see :mod:`stkit.train.memory`); on a CPU it was measured to be right within 15 %. CUDA was
not run: a GPU's libraries are put at :data:`stkit.train.needs.CUDA_BYTES`, and what its allocator wastes has to find
room in what is left to spare.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ..runtime import BadUse, StkitError, pick_device
from .anatomy import read_anatomy
from .needs import Request, compute_of, free_bytes, most_pixels
from .settings import STAGES, Settings

SPARE = 0.1  # of the limit, in what is chosen
TEXT_TOKENS = 200  # of a question with its options and the instruction
LETTER_TOKENS, ANSWER_TOKENS = 4, 256  # of an answer that is learned: a letter, or a text with it
STEP = 256  # tokens


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` returns.

    phases: bytes by part in each phase. chosen: settings that fit with something to spare (max_tokens, checkpointing,
    rollouts at a time, their peak, and why), None where none do. request: what was asked.
    """

    model: str
    source: str
    stage: str
    phases: dict[str, dict[str, float]]
    limit: float
    chosen: dict | None
    request: Request = field(repr=False)

    @cached_property
    def phase(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part at the peak."""
        return self.phases[self.phase]

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the settings as they stand can run."""
        return self.peak <= self.limit and not self.short

    @property
    def short(self) -> str:
        """What stands in the way if train.max_tokens is less than a prompt with its answers, else ""."""
        most, least = self.request.settings.train.max_tokens, self.request.least
        if most >= least:
            return ""
        lower = "video.frames, video.max_pixels" + " or grpo.group" * (self.stage == "grpo")
        return (
            f"train.max_tokens={most} is less than the {least} tokens of a prompt with its answers ({self.assumed()}): "
            f"raise it, or lower {lower}"
        )

    def assumed(self) -> str:
        """What was taken for granted about the data."""
        r = self.request
        seen = f"{r.video_tokens:,} tokens a video"
        if r.video is None:
            seen += f" ({r.frames} frames of {r.max_pixels:,} pixels)"
        return f"{seen}, {r.text} a question, {r.answer} an answer, forests of {r.load().tokens:,} tokens"

    def to_json(self) -> dict:
        """Plain values."""
        rounded = {name: {part: round(size) for part, size in parts.items()} for name, parts in self.phases.items()}
        return {
            "model": self.model, "source": self.source, "stage": self.stage, "fits": self.fits,
            "parameters": self.request.anatomy.parameters, "four_bit": self.request.how.four_bit,
            "peak": round(self.peak), "limit": round(self.limit), "phase": self.phase, "parts": rounded[self.phase],
            "phases": rounded, "chosen": self.chosen, "assumed": self.assumed(), "advice": self.advice(),
        }  # fmt: skip

    def advice(self) -> str:
        """What to change where the settings cannot run, "" where they can."""
        try:
            check_plan(self)
        except StkitError as error:
            return str(error)
        return ""

    def text(self) -> str:
        """A table for a terminal."""
        bits, count = " in NF4" * self.request.how.four_bit, self.request.anatomy.parameters
        verdict = "it fits" if self.fits else "it does not fit"
        chosen = "no max_tokens leaves enough to spare, with checkpointing or without"
        return "\n".join([
            f"{self.model}: {count / 1e6:,.1f} M parameters{bits}, {self.stage}, from {self.source}", "",
            self._table(), "",
            f"peak {said(self.peak)} (in {self.phase}) of {said(self.limit)}: {verdict}",
            *([self.short] if self.short else [f"assumed: {self.assumed()}"]),
            f"chosen: {self.chosen['why'] if self.chosen else chosen}",
            *([f"advice: {self.advice()}"] if self.advice() else ()),
        ])  # fmt: skip

    def _table(self) -> str:
        unit, name = (1e9, "GB") if self.peak > 1e9 else (1e6, "MB")
        phases = self.phases.values()
        rows = [[f"{name} of", *self.phases]]
        for part in dict.fromkeys(part for phase in phases for part, size in phase.items() if size):
            rows.append([part, *(f"{phase[part] / unit:.2f}" if phase.get(part) else "" for phase in phases)])
        rows.append(["total", *(f"{sum(phase.values()) / unit:.2f}" for phase in phases)])
        return "\n".join("  ".join([f"{row[0]:<12}", *(f"{c:>9}" for c in row[1:])]).rstrip() for row in rows)


def said(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def plan(
    model, settings: Settings, stage: str = "grpo", gpu_gb: float | None = None, video_tokens: int | None = None,
    text_tokens: int = TEXT_TOKENS, answer_tokens: int | None = None, questions: int | None = None,
) -> Plan:  # fmt: skip
    """Predict the peak of memory of a run, and choose settings that fit.

    Args:
        model: "tiny" or another that ships, a folder, a published name, or a configuration of Transformers.
        settings: of the run; train.max_tokens is taken as computed in full.
        stage: "sft" or "grpo".
        gpu_gb: the GPU's size, 10**9 bytes each; None: what is free on the device of ``settings.model.device``.
        video_tokens: of a clip; None: from settings.video, 32 frames where it doesn't say.
        text_tokens: of a question with its instruction. answer_tokens: None: grpo.max_new_tokens, or what is usual.
        questions: of a clip at most, None if unknown.

    Raises:
        BadUse: a stage or size that makes no sense, all weights to be trained in 4 bits.
        StkitError: no such model.
    """
    if stage not in STAGES:
        raise BadUse(f"stage {stage!r} is unknown: use {' or '.join(STAGES)}")
    if gpu_gb is not None and not (math.isfinite(gpu_gb) and gpu_gb > 0):
        raise BadUse(f"gpu_gb={gpu_gb!r}: give a number above 0, such as 24")
    anatomy, source = read_anatomy(model)
    device = "cuda" if gpu_gb is not None else pick_device(settings.model.device)[0]
    how = compute_of(anatomy, settings, device, real=gpu_gb is None)
    if answer_tokens is None:
        usual = LETTER_TOKENS if settings.sft.form == "answer" else ANSWER_TOKENS
        answer_tokens = settings.grpo.max_new_tokens if stage == "grpo" else usual
    named = str(model) if isinstance(model, (str, Path)) else anatomy.family
    limit = free_bytes(device) if gpu_gb is None else gpu_gb * 1e9
    request = Request(
        named, anatomy, source, settings, stage, how, limit, gpu_gb is not None, most_pixels(model), text_tokens,
        answer_tokens, video_tokens, questions,
    )  # fmt: skip
    return Plan(named, source, stage, request.phases(), request.limit, choose_settings(request), request)


def choose_settings(request: Request) -> dict | None:
    """The most tokens at once that leave something to spare: without checkpointing, if a prompt with its answers fits
    so, else with it (which takes a third longer)."""
    room = request.limit * (1 - SPARE)
    least = -(-request.least // STEP) * STEP
    sizes = [n for n in (1024 * 2**k for k in range(5, -1, -1)) if n >= least] + [least]
    for checkpointing in (False, True):
        for size in sizes:
            tried = request.changed("train", max_tokens=size, checkpointing=checkpointing)
            if (peak := tried.peak()) <= room:
                return _chosen(tried, peak)
    return None


def _chosen(tried: Request, peak: float) -> dict:
    train, load = tried.settings.train, tried.load()
    why = f"train.max_tokens={train.max_tokens}, train.checkpointing={str(train.checkpointing).lower()}"
    why += f", {load.rollouts} rollouts at a time" * (tried.stage == "grpo")
    why += f": {said(peak)} at the peak, {1 - peak / tried.limit:.0%} to spare"
    if train.checkpointing:
        without = tried.changed("train", max_tokens=-(-tried.least // STEP) * STEP, checkpointing=False).peak()
        why += f" (without checkpointing a prompt with its answers would need {said(without)})"
    found = {"max_tokens": train.max_tokens, "checkpointing": train.checkpointing}
    if tried.stage == "grpo":
        found["rollouts"] = load.rollouts
    return found | {"peak": round(peak), "why": why}


def check_plan(found: Plan) -> None:
    """Refuse a run that cannot fit, with what to change, what helps most first.

    Raises:
        StkitError: it needs more than there is, or (where the video's tokens were given) ``train.max_tokens`` holds no
            prompt with its answers.
    """
    request = found.request
    if found.short and request.video is not None:  # else the tokens of a video are a guess: the run itself will see
        raise StkitError(found.short)
    if found.peak <= found.limit:
        return
    need = f"{found.model} would need {said(found.peak)} (in {found.phase}), there are {said(found.limit)}"
    alone = [f"{text} ({said(r.peak())})" for text, r in _sorted(request) if r.peak() <= request.limit]
    if alone:
        raise StkitError(f"{need}: set {' or '.join(alone[:3])}")
    taken: dict[str, str] = {}
    while request.peak() > request.limit:
        best = next(iter(_sorted(request)), None)
        if best is None or best[1].peak() >= 0.995 * request.peak():
            even = f"; even with {', '.join(taken.values())} it is {said(request.peak())}" if taken else ""
            raise StkitError(f"{need}{even}: take a smaller model or a larger device")
        text, request = best
        taken[text.split("=")[0]] = text
    raise StkitError(f"{need}: set {', '.join(taken.values())} ({said(request.peak())})")


def _sorted(request: Request) -> list[tuple[str, Request]]:
    return sorted(levers(request), key=lambda lever: lever[1].peak())


def levers(request: Request) -> Iterator[tuple[str, Request]]:
    """What can be changed, one thing at a time: the setting as it is written, and the request with it."""
    s, how = request.settings, request.how
    if not s.lora.rank:
        yield "lora.rank=16", request.changed("lora", rank=16)
    elif not how.four_bit:
        yield "model.four_bit=true", replace(request.changed("model", four_bit=True), how=replace(how, four_bit=True))
    if not s.train.checkpointing:
        yield "train.checkpointing=true", request.changed("train", checkpointing=True)
    least = -(-request.least // STEP) * STEP
    if least < s.train.max_tokens:
        yield f"train.max_tokens={least}", request.changed("train", max_tokens=least)
    if request.stage == "grpo" and s.grpo.group > 2:
        yield f"grpo.group={s.grpo.group // 2}", _shrunk(request, "grpo", group=s.grpo.group // 2)
    if request.video is None and request.frames > 2:
        yield f"video.frames={request.frames // 2}", _shrunk(request, "video", frames=request.frames // 2)
    if request.video is None and request.max_pixels > 4 * (request.anatomy.patch * request.anatomy.merge) ** 2:
        half = request.max_pixels // 2
        yield f"video.max_pixels={half}", _shrunk(request, "video", max_pixels=half)


def _shrunk(request: Request, section: str, **values) -> Request:
    """Fewer tokens a prompt or a group, and as many fewer at once if no more than those were computed at once."""
    made, train = request.changed(section, **values), request.settings.train
    if train.max_tokens < 2 * request.least:
        made = made.changed("train", max_tokens=max(made.least, train.max_tokens - request.least + made.least))
    return made
