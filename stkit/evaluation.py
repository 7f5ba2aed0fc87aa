"""Evaluate a model on a benchmark: every question asked, every answer on disk as it comes, the blind score beside it.

    result = evaluate("runs/walks", model="tiny", out="runs/first")
    result.scores["by_task"]["direction/forward"], result.predictions, result.out

A run folder holds ``config.json`` (settings, the model's record, fingerprint of the benchmark), ``files.json`` (the
fingerprint, file by file), ``predictions.jsonl``, ``blind.jsonl`` (one line a question, flushed) and ``scores.json``. A
run that was killed goes on where it was when it is called again; other settings, or files that changed since, are
refused.
"""

import contextlib
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from .bench.schema import SPLITS, Prediction, Question, load_benchmark, row_of
from .reporting.scores import CONTROLS as CONTROL_NOTICES
from .reporting.scores import score
from .reporting.tables import text_table
from .runs import explain, read_json, refuse_other, write_json
from .runtime import BadUse, StkitError
from .vlm.ask import MAX_TOKENS
from .vlm.cache import FrameCache
from .vlm.controls import CONTROLS
from .vlm.endpoint import Endpoint
from .vlm.inquiry import Inquiry
from .vlm.interview import Interview, Settings
from .vlm.load import Loaded, load_model
from .vlm.processes import Team, join_team, own_device
from .vlm.prompts import STYLES
from .vlm.remote import IMAGES, LEAST_PIXELS, PATIENCE, RemoteInterview
from .vlm.sight import choose_pixels, choose_sampling, fingerprint
from .vlm.video import PUBLISHED_MAX_PIXELS, READERS

SMALL = (
    "a small model that ships: it learned from walks of this world, on other maps. Real are the films, its training, these "
    "scores and their intervals; small are the world, its language and the model, and nothing follows for other videos"
)
UNTAUGHT = (
    "this model was taught to think first, never to name a letter at once, so expect chance: ask it with mode 'generate'"
)
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
    endpoint: str | None = None,
    concurrency: int = 4,
    timeout_s: float = 120.0,
    retries: int = 5,
) -> Result:
    """Ask a model every question of a benchmark and score it by category.

    Under ``accelerate launch`` or ``torchrun`` every process calls it, asks its share of the clips and returns the
    result of all.

    Args:
        bench: a benchmark folder or a question file.
        model: a name or folder for :func:`stkit.load_model` (which takes four_bit, device, dtype, attention, adapter),
            or what it returned; with an endpoint the server's name for it. Of several processes each takes a GPU of its
            own with device "auto".
        out: the run's folder; None for a temporary one.
        mode: "letter" compares the log-probabilities of the options' letters (routes are not asked), "generate"
            decodes greedily with think and answer.
        control: "none", "blind", "shuffled", "reversed", "single-frame" or "circular" (letter mode: right means right
            under every rotation of the options).
        split, limit: only that split, only the first questions.
        seed: of the "shuffled" control.
        blind: ask everything without frames too, so that no accuracy stands alone (by letter; an endpoint in its mode).
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
        endpoint: an OpenAI-compatible server's URL such as "http://localhost:8000/v1", which is asked in place of a
            model that is loaded here; a key comes from $STKIT_API_KEY or $OPENAI_API_KEY. Questions that got no answer
            are asked again by a re-run.
        concurrency, timeout_s, retries: requests at a time, seconds for one, and how often one is sent again.

    Returns:
        :class:`Result`; ``scores["endpoint"]`` has the requests, failures and tokens of an endpoint.

    Raises:
        BadUse: a value that makes no sense.
        StkitError: no such benchmark or model, malformed rows, a folder of another run, files that changed since the
            run started, a prompt longer than the model's context, a full disk, a server that answers nothing, another
            process that stopped.
    """
    _check({"mode": mode, "control": control, "split": split, "prompt": prompt, "reader": reader},
           {"seed": seed, "limit": limit, "batch_size": batch_size, "max_new_tokens": max_new_tokens,
            "max_tokens": max_tokens, "max_pixels": max_pixels, "concurrency": concurrency})  # fmt: skip
    benchmark = load_benchmark(bench, skip_bad)
    questions = benchmark.select(split, limit)
    if not questions:
        there = ", ".join(sorted({q.split for q in benchmark.questions}))
        raise StkitError(f"{bench}: no question of split {split!r} (there are {there}): choose another --split")
    sampled = choose_sampling(benchmark.info, sampling, frames, fps)
    asked = {"four_bit": four_bit, "device": device, "dtype": dtype, "attention": attention, "adapter": adapter}
    chosen = {"bench": str(Path(bench).resolve()), "split": split, "limit": limit, "blind": blind, "skip_bad": skip_bad}
    chosen |= {"mode": mode, "control": control, "seed": seed, "reader": reader, "prompt": prompt, **sampled}
    chosen |= {"max_new_tokens": max_new_tokens}
    served = _served(endpoint, model, asked, timeout_s, retries)
    chosen |= {"model": served.model, "endpoint": served.url, "images": IMAGES} if served else {}
    sizes = {"batch_size": batch_size, "max_tokens": max_tokens}
    sizes |= {"concurrency": concurrency, "timeout_s": timeout_s, "retries": retries} if served else {}
    team = join_team()
    if out is None and team.count > 1:
        raise BadUse("out=None is another folder in every process: name one that all of them see")
    out = Path(out if out is not None else tempfile.mkdtemp(prefix="stkit-run-"))
    try:
        team.first(lambda: refuse_other(out, chosen, part="settings"))  # before a model is loaded
        loaded = None if served else team.each(lambda: _loaded(model, asked, team))
        size = loaded.processor.video_processor.size if loaded else {"shortest_edge": LEAST_PIXELS, "longest_edge": PUBLISHED_MAX_PIXELS}
        chosen |= choose_pixels(size, max_pixels) | ({"model": loaded.record["name"]} if loaded else {})
        settings = Settings(**{k: chosen[k] for k in Settings.__dataclass_fields__})
        frames_cache, patience = FrameCache() if cache else None, min(PATIENCE, len(questions))
        interview = Interview(loaded, settings, max_tokens, frames_cache) if loaded else RemoteInterview(
            served, settings, frames_cache, patience)  # fmt: skip
        files = fingerprint(benchmark, questions, with_videos=control != "blind")
        inquiry = Inquiry(out, benchmark, questions, interview, files["videos"], blind, batch_size, concurrency, team)
        team.first(lambda: inquiry.start(chosen, files, sizes))
        team.each(lambda: inquiry.ask(progress and team.rank == 0))
        scores = team.first(lambda: _finish(inquiry)) or read_json(out / "scores.json")
        said = inquiry.read()
    except OSError as error:
        raise StkitError(explain(error)) from error
    return Result(scores, _frame(said, questions), out)


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


def _served(endpoint: str | None, model, asked: dict, timeout_s: float, retries: int) -> Endpoint | None:
    """The endpoint, if one is asked for: what is chosen for a model that is loaded here has no meaning with it."""
    if endpoint is None:
        return None
    if not isinstance(model, (str, Path)):
        raise BadUse("a loaded model and an endpoint are both given: model is the server's name for the model")
    if given := [name for name, value in asked.items() if value not in (None, "auto")]:
        raise BadUse(f"{given[0]}={asked[given[0]]!r} has no meaning with an endpoint: the server decides it")
    return Endpoint(endpoint, str(model), timeout_s, retries)


def _loaded(model: str | Path | Loaded, asked: dict, team: Team) -> Loaded:
    """The model, loaded if it isn't yet; one process of several tells about it."""
    if not isinstance(model, (str, Path)):
        if given := [name for name, value in asked.items() if value not in (None, "auto")]:
            raise BadUse(f"{given[0]}={asked[given[0]]!r} comes too late for a loaded model: give it to load_model")
        return Loaded(*model)
    device = own_device(asked["device"], team)
    with contextlib.nullcontext() if team.rank == 0 else contextlib.redirect_stderr(io.StringIO()):
        loaded = load_model(model, **asked | {"device": device})
    if device == asked["device"]:
        return loaded
    return loaded._replace(record=loaded.record | {"device": device.split(":")[0]})  # as one process would record it


def _finish(inquiry: Inquiry) -> dict:
    """The JSON object of a run, written down: judge's figures, with what only the run knows."""
    inquiry.merge()
    said, benchmark, record = inquiry.read(), inquiry.benchmark, inquiry.interview.loaded.record
    scores = score(list(said.values()), list(inquiry.unseen.values()), inquiry.questions)
    asked = inquiry.interview.settings
    control = asked.control
    notices = ["untrained weights: expect chance"] * record["untrained"]
    notices += [text for name, text in CONTROL_NOTICES.items() if name == control] + scores["notices"]
    if record.get("manifest"):
        notices += [UNTAUGHT] * (asked.mode == "letter") + [SMALL]
    if benchmark.skipped:
        notices.append(f"{len(benchmark.skipped)} malformed rows were left out")
    if inquiry.remote:
        scores["endpoint"] = inquiry.costs()
    scores |= {"skipped": len(benchmark.skipped), "notices": notices}
    write_json(inquiry.out / "scores.json", scores)
    return scores


def _frame(said: dict[str, Prediction], questions: Sequence[Question]) -> pd.DataFrame:
    """One row a question: the question's fields, and the prediction's (missing where it was not asked)."""
    asked = pd.DataFrame([row_of(q) for q in questions]).drop(columns=["format_version", "solution"])
    if not said:
        return asked
    answers = pd.DataFrame([row_of(p) for p in said.values()]).drop(columns=["format_version"])
    return asked.merge(answers, on="id", how="left", validate="one_to_one")
