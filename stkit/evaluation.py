"""Evaluate a model on a benchmark: every question asked, every answer on disk as it comes, the blind score beside it.

    result = evaluate("runs/walks", model="tiny", out="runs/first")
    result.scores["by_task"]["direction/forward"], result.predictions, result.out

A run folder holds ``config.json`` (settings, the model's record, fingerprint of the benchmark), ``files.json`` (the
fingerprint, file by file), ``predictions.jsonl``, ``blind.jsonl`` (one line a question, flushed) and ``scores.json``. A
run that was killed goes on where it was when it is called again; other settings, or files that changed since, are
refused.
"""

import hashlib
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tqdm import tqdm

from .bench.schema import SPLITS, Benchmark, Prediction, Question, load_benchmark, row_of
from .reporting.scores import CONTROLS as CONTROL_NOTICES
from .reporting.scores import score
from .reporting.tables import text_table
from .runs import append_jsonl, claim, explain, read_json, read_partial_jsonl, refuse_other, to_json, write_json
from .runtime import BadUse, StkitError, versions
from .sampling import sample_indices
from .vlm.ask import MAX_TOKENS
from .vlm.cache import FrameCache, content_hash
from .vlm.controls import CONTROLS
from .vlm.interview import BLIND, Interview, Settings, Shown
from .vlm.load import Loaded, load_model
from .vlm.prompts import STYLES
from .vlm.video import PUBLISHED_MAX_PIXELS, READERS

MODES = ("letter", "generate")


class Result(NamedTuple):
    """What :func:`evaluate` returns: the scores (a JSON object), one row a question, and the run's folder."""

    scores: dict
    predictions: pd.DataFrame
    out: Path

    def text(self) -> str:
        """The scores for a terminal; what a reader must know first stands in the first line."""
        first = "; ".join(self.scores["notices"]) or f"{self.scores['n']} questions scored"
        return f"{first}\n\n{text_table(self.scores)}\n\npredictions and scores are in {self.out}"


def evaluate(
    bench: str | Path,
    model: str | Path | Loaded = "tiny",
    out: str | Path | None = None,
    mode: str = "letter",
    control: str = "none",
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    blind: bool = True,
    batch_size: int | None = None,
    max_tokens: int = MAX_TOKENS,
    sampling: str | None = None,
    frames: int | None = None,
    fps: float | None = None,
    max_pixels: int | None = None,
    max_new_tokens: int = 512,
    prompt: str = "stkit",
    reader: str = "auto",
    four_bit: bool | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    adapter: str | Path | None = None,
    skip_bad: bool = False,
    cache: bool = True,
    progress: bool = True,
) -> Result:
    """Ask a model every question of a benchmark and score it by category.

    Args:
        bench: a benchmark folder or a question file.
        model: a name or folder for :func:`stkit.load_model` (which takes four_bit, device, dtype, attention, adapter),
            or what it returned.
        out: the run's folder; None for a temporary one.
        mode: "letter" compares the log-probabilities of the options' letters (routes are not asked), "generate"
            decodes greedily with think and answer.
        control: "none", "blind", "shuffled", "reversed", "single-frame" or "circular" (letter mode: right means right
            under every rotation of the options).
        split, limit: only that split, only the first questions.
        seed: of the "shuffled" control.
        blind: ask everything without frames too (letter mode), so that no accuracy stands alone.
        batch_size: questions of a clip that are asked and saved together; None for all. Results don't depend on it.
        max_tokens: of a tree (a video with the questions on it) that is computed at once, which bounds the memory;
            results don't depend on it.
        sampling, frames, fps: as in :func:`stkit.sampling.sample_indices`; None for what the benchmark records, else 32
            uniform ones.
        max_pixels: of a frame; None for 360 * 420, or what the model's processor takes if that is less.
        max_new_tokens: of a decoded answer.
        prompt: "stkit" or "published".
        reader: "auto", "decord" or "pyav".
        skip_bad: go on without malformed rows.
        cache: keep decoded and resized frames in $STKIT_CACHE or ~/.cache/stkit/frames (4 GiB, the oldest leave).
        progress: bar and estimate on stderr.

    Returns:
        :class:`Result`.

    Raises:
        BadUse: a value that makes no sense.
        StkitError: no such benchmark or model, malformed rows, a folder of another run, files that changed since the
            run started, a prompt longer than the model's context, a full disk.
    """
    _check({"mode": mode, "control": control, "split": split, "prompt": prompt, "reader": reader},
           {"seed": seed, "limit": limit, "batch_size": batch_size, "max_new_tokens": max_new_tokens,
            "max_tokens": max_tokens,
            "max_pixels": max_pixels})  # fmt: skip
    benchmark = load_benchmark(bench, skip_bad)
    questions = benchmark.select(split, limit)
    if not questions:
        there = ", ".join(sorted({q.split for q in benchmark.questions}))
        raise StkitError(f"{bench}: no question of split {split!r} (there are {there}): choose another --split")
    sampled = _sampling(benchmark, sampling, frames, fps)
    asked = {"four_bit": four_bit, "device": device, "dtype": dtype, "attention": attention, "adapter": adapter}
    chosen = {"bench": str(Path(bench).resolve()), "split": split, "limit": limit, "blind": blind, "skip_bad": skip_bad}
    chosen |= {"mode": mode, "control": control, "seed": seed, "reader": reader, "prompt": prompt, **sampled}
    chosen |= {"max_new_tokens": max_new_tokens}
    out = Path(out if out is not None else tempfile.mkdtemp(prefix="stkit-run-"))
    try:
        refuse_other(out, chosen, part="settings")  # before a model is loaded
        loaded = _loaded(model, asked)
        chosen |= {"model": loaded.record["name"], **_pixels(loaded, max_pixels)}
        settings = Settings(**{k: chosen[k] for k in Settings.__dataclass_fields__})
        files = _fingerprint(benchmark, questions, with_videos=control != "blind")
        _start(out, chosen, loaded.record, files, {"batch_size": batch_size, "max_tokens": max_tokens})
        interview = Interview(loaded, settings, max_tokens, FrameCache() if cache else None)
        run = _Run(out, benchmark, interview, files["videos"], blind, batch_size)
        run.ask(questions, progress)
        scores = _scores(run, questions, loaded.record, settings.control, benchmark)
        write_json(out / "scores.json", scores)
    except OSError as error:
        raise StkitError(explain(error)) from error
    return Result(scores, _frame(run.said, questions), out)


def _check(names: dict, numbers: dict) -> None:
    """Refuse what makes no sense before anything is loaded."""
    for (name, value), known in zip(names.items(), (MODES, CONTROLS, (None, *SPLITS), STYLES, READERS), strict=True):
        if value not in known:
            raise BadUse(f"{name} {value!r} is unknown: use {', '.join(k for k in known if k)}")
    for name, value in numbers.items():
        least = 0 if name == "seed" else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise BadUse(f"{name}={value!r}: give a whole number of at least {least}")
    if names["control"] == "circular" and names["mode"] != "letter":
        raise BadUse("control 'circular' compares letters: use mode 'letter' with it")


def _sampling(benchmark: Benchmark, sampling: str | None, frames: int | None, fps: float | None) -> dict:
    """Which frames are looked at: what was asked for, else what the benchmark was made for, else 32 uniform ones."""
    info = benchmark.info
    chosen = sampling or info.get("sampling") or "uniform"
    for name, given, fits in (("frames", frames, "uniform"), ("fps", fps, "fps")):
        if given is not None and chosen != fits:
            raise BadUse(
                f"{name}={given} has no meaning with sampling {chosen!r}: leave it out or use sampling {fits!r}"
            )
    if chosen == "uniform" and frames is None:
        frames = 32 if sampling else info.get("n_frames") or 32
    if chosen == "fps" and fps is None:
        fps = 1.0
    sample_indices(1, 1.0, chosen, n=2 if frames is None else frames, fps=1.0 if fps is None else fps)
    return {"sampling": chosen, "frames": frames, "fps": fps}


def _loaded(model: str | Path | Loaded, asked: dict) -> Loaded:
    """The model, loaded if it isn't yet."""
    if isinstance(model, (str, Path)):
        return load_model(model, **asked)
    if given := [name for name, value in asked.items() if value not in (None, "auto")]:
        raise BadUse(f"{given[0]}={asked[given[0]]!r} comes too late for a loaded model: give it to load_model")
    return Loaded(*model)


def _pixels(loaded: Loaded, max_pixels: int | None) -> dict:
    """Bounds on a frame's pixels: the published ones, or the processor's own where it takes less."""
    size = loaded.processor.video_processor.size
    if max_pixels is None:
        max_pixels = min(PUBLISHED_MAX_PIXELS, size["longest_edge"])
    return {"min_pixels": min(size["shortest_edge"], max_pixels), "max_pixels": max_pixels}


def _fingerprint(benchmark: Benchmark, questions: Sequence[Question], with_videos: bool) -> dict:
    """SHA-256 of every question and every video file of a run ("" where there is none)."""
    videos = {}
    for name in sorted({q.video for q in questions} if with_videos else ()):
        try:
            videos[name] = content_hash(benchmark.video_path(name))
        except StkitError:  # what is wrong with it is said where it is read, and recorded with its questions
            videos[name] = ""
    rows = {q.id: hashlib.sha256(to_json(row_of(q)).encode()).hexdigest() for q in questions}
    return {"questions": rows, "videos": videos}


def _start(out: Path, settings: dict, record: dict, files: dict, sizes: dict) -> None:
    """Claim the run's folder; refuse files that changed since it was started, by name."""
    recorded = out / "files.json"
    if recorded.exists():
        before = read_json(recorded)
        changed = [k for part in files for k, v in files[part].items() if before.get(part, {}).get(k, v) != v]
        if changed:
            names = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
            raise StkitError(
                f"{settings['bench']} changed since the run in {out} was started ({names}): choose another --out"
            )
    model = {k: v for k, v in record.items() if k not in ("why", "versions")}
    used = {k: v for k, v in versions().items() if k != "platform"}
    digest = hashlib.sha256(to_json(files).encode()).hexdigest()
    counts = {part: len(files[part]) for part in files}
    compared = {"settings": settings, "model": model, "versions": used, "benchmark": counts | {"sha256": digest}}
    beside = {"command": shlex.join(sys.argv), **sizes, "why": record.get("why", {})}
    beside["platform"] = versions()["platform"]
    claim(out, compared, beside=beside)
    if not recorded.exists():
        write_json(recorded, files)


class _Run:
    """A run under way: what is on disk already, and what is still to be asked."""

    def __init__(
        self, out: Path, benchmark: Benchmark, interview: Interview, videos: dict[str, str], blind: bool, size: int | None
    ):
        self.benchmark, self.interview, self.videos, self.size = benchmark, interview, videos, size
        self.without = interview.blindfolded() if blind else None
        self.paths = {"said": out / "predictions.jsonl", "blind": out / "blind.jsonl"}
        self.said, self.unseen = _read(self.paths["said"]), _read(self.paths["blind"]) if blind else {}
        self.paths["said"].touch()

    def ask(self, questions: Sequence[Question], progress: bool) -> None:
        """Ask what has no answer yet, clip by clip."""
        clips: dict[str, list[Question]] = {}
        for question in questions:
            if self._open(question):
                clips.setdefault(question.video, []).append(question)
        left, done, begin = sum(map(len, clips.values())), 0, time.monotonic()
        with tqdm(total=left, unit="question", disable=not (progress and left), file=sys.stderr) as bar:
            for video, group in clips.items():
                self._ask_clip(video, group)
                done += len(group)
                if progress and done == len(group):
                    each = (time.monotonic() - begin) / done
                    bar.write(f"about {_duration(each * (left - done))} for {left - done} more questions ({each:.2f} s "
                              "each, measured on the first clip)", file=sys.stderr)  # fmt: skip
                bar.update(len(group))

    def _open(self, question: Question) -> bool:
        """Something about it is still to be asked."""
        seen = not self.interview.asks(question) or question.id in self.said
        return not seen or self._open_blind(question)

    def _open_blind(self, question: Question) -> bool:
        return self.without is not None and self.without.asks(question) and question.id not in self.unseen

    def _ask_clip(self, video: str, questions: Sequence[Question]) -> None:
        asked = [q for q in questions if self.interview.asks(q) and q.id not in self.said]
        shown = self._show(video, asked[0].clip_id) if asked else BLIND
        if isinstance(shown, str):
            for question in asked:
                self._keep("said", self.said, [self.interview.failed(question, shown)])
        else:
            for batch in self._batches(asked):
                self._keep("said", self.said, self.interview.ask(batch, shown))
        for batch in self._batches([q for q in questions if self._open_blind(q)]):
            self._keep("blind", self.unseen, self.without.ask(batch, BLIND))

    def _batches(self, questions: Sequence[Question]) -> list[Sequence[Question]]:
        size = self.size or max(1, len(questions))
        return [questions[start : start + size] for start in range(0, len(questions), size)]

    def _show(self, video: str, clip_id: str) -> Shown | str:
        """The video as the model sees it, or why it can't be shown."""
        if self.interview.settings.control == "blind":
            return BLIND
        try:
            path = self.benchmark.video_path(video)
            shown = self.interview.watch(path, clip_id)
        except BadUse:
            raise
        except StkitError as error:
            return str(error)
        if content_hash(path) != self.videos[video]:
            raise StkitError(f"{path} changed since the run was started: choose another --out")
        return shown

    def _keep(self, name: str, kept: dict[str, Prediction], predictions: Sequence[Prediction]) -> None:
        for prediction in predictions:
            append_jsonl(self.paths[name], row_of(prediction))
            kept[prediction.id] = prediction


def _read(path: Path) -> dict[str, Prediction]:
    """The answers of an earlier start; a half-written last line is dropped, its question is asked again."""
    rows = read_partial_jsonl(path)
    lists = ("log_probs", "timestamps_s")
    try:
        return {row["id"]: Prediction(**row | {name: tuple(row[name]) for name in lists}) for row in rows}
    except (KeyError, TypeError) as error:
        raise StkitError(f"{path}: a line is no prediction ({error}): choose another --out") from error


def _duration(seconds: float) -> str:
    """Seconds in words: "40 s", "3 min", "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _scores(run: _Run, questions: Sequence[Question], record: dict, control: str, benchmark: Benchmark) -> dict:
    """The JSON object of a run: judge's figures, with what only the run knows."""
    scores = score(list(run.said.values()), list(run.unseen.values()), questions)
    notices = ["untrained weights: expect chance"] * record["untrained"]
    notices += [text for name, text in CONTROL_NOTICES.items() if name == control] + scores["notices"]
    if benchmark.skipped:
        notices.append(f"{len(benchmark.skipped)} malformed rows were left out")
    return scores | {"skipped": len(benchmark.skipped), "notices": notices}


def _frame(said: dict[str, Prediction], questions: Sequence[Question]) -> pd.DataFrame:
    """One row a question: the question's fields, and the prediction's (missing where it was not asked)."""
    asked = pd.DataFrame([row_of(q) for q in questions]).drop(columns=["format_version", "solution"])
    if not said:
        return asked
    answers = pd.DataFrame([row_of(p) for p in said.values()]).drop(columns=["format_version"])
    return asked.merge(answers, on="id", how="left", validate="one_to_one")
