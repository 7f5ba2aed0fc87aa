"""The command line: each command calls the function of the same name in Python and prints what it returns.

    stkit build --out runs/walks --clips 40 --seed 0
    stkit eval runs/walks --model tiny --out runs/first
    stkit report runs/first --out runs/first/report.html

Exit code 0: done; 1: it failed, one line on stderr says why; 2: the call makes no sense; 130: Ctrl-C, the state is on disk.
Tracebacks only with --debug.
"""

import sys
import traceback
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .bench.schema import BadRows
from .cli_options import AsJson, Out, Seed, SkipBad, stdout_for_json_only
from .cli_tiny import commands as tiny_commands
from .cli_train import commands
from .runs import explain, to_json
from .runtime import BadUse, StkitError, StkitWarning

app = typer.Typer(
    name="stkit",
    help="Build a benchmark of walks, ask a Qwen-VL about them, and report its answers by category.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Mode(StrEnum):
    """How a question is answered."""

    letter = "letter"
    generate = "generate"


class Control(StrEnum):
    """What is done to the frames (or, for circular, to the options) to see what an accuracy rests on."""

    none = "none"
    blind = "blind"
    shuffled = "shuffled"
    reversed = "reversed"
    single_frame = "single-frame"
    circular = "circular"


class Split(StrEnum):
    """Maps are split by their hash: 0 to 7 train, 8 dev, 9 test."""

    train = "train"
    dev = "dev"
    test = "test"


def _version(show: bool):
    if show:
        print(f"stkit {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails (any place).")] = False,
):
    pass


def _pair(text: str | None, name: str, separator: str = "-") -> tuple[int, int] | None:
    """"2-5" as (2, 5), "3" as (3, 3)."""
    if text is None:
        return None
    parts = text.split(separator)
    if len(parts) > 2 or not all(p.strip().isdecimal() for p in parts):
        raise BadUse(f"--{name} {text!r}: give two numbers such as 2{separator}5")
    return int(parts[0]), int(parts[-1])


@app.command(epilog="Example: stkit build --out runs/walks --clips 200 --seed 0 --preset tiny")
def build(
    out: Out,
    clips: Annotated[int, typer.Option("--clips", help="How many walks to film.")] = 40,
    seed: Seed = 0,
    preset: Annotated[str, typer.Option("--preset", help="tiny or default.")] = "tiny",
    split: Annotated[Split | None, typer.Option("--split", help="Only maps of this split.")] = None,
    ood: Annotated[bool, typer.Option("--ood", help="Out of distribution: unseen textures, longer routes, darker.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes; the result doesn't depend on it.")] = None,
    turns: Annotated[str | None, typer.Option("--turns", help="Turns of a walk, e.g. 2-5.")] = None,
    landmarks: Annotated[str | None, typer.Option("--landmarks", help="Landmarks of a walk, e.g. 3-5.")] = None,
    actions: Annotated[str | None, typer.Option("--actions", help="Actions of a walk, e.g. 2-3.")] = None,
    light: Annotated[str | None, typer.Option("--light", help="Light level from 115 to 255, e.g. 160-240.")] = None,
    resolution: Annotated[str | None, typer.Option("--resolution", help="Width x height, e.g. 160x120.")] = None,
    textures: Annotated[str | None, typer.Option("--textures", help="Texture sets with commas between.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Build it even when it is very large.")] = False,
    as_json: AsJson = False,
):
    """Film walks through generated maps and write questions on them: a benchmark folder."""
    from . import build_benchmark

    ranges = {"turns": turns, "landmarks": landmarks, "actions": actions, "light": light}
    knobs = {name: _pair(text, name) for name, text in ranges.items()} | {"resolution": _pair(resolution, "resolution", "x")}
    knobs["textures"] = None if textures is None else tuple(t.strip() for t in textures.split(","))
    knobs = {name: value for name, value in knobs.items() if value is not None}
    with stdout_for_json_only(as_json):
        result = build_benchmark(
            out, clips=clips, seed=seed, preset=preset, split=split and split.value, ood=ood, workers=workers, yes=yes, **knobs
        )
    if as_json:
        print(to_json(result))
        return
    print(f"{result['clips']} clips and {result['questions']} questions are in {out}")
    print("  " + ", ".join(f"{kind} {n}" for kind, n in result["by_task"].items()))
    for reason, n in result["dropped"].items():
        print(f"  {n} questions dropped: {reason}")


@app.command("import", epilog="Example: stkit import Part1_forward_mcq.json --out runs/egost --videos ~/egost/videos")
def import_(
    file: Annotated[Path, typer.Argument(help="A released Ego-ST file (JSON or JSONL; its form is detected).")],
    out: Out,
    videos: Annotated[Path | None, typer.Option("--videos", help="Folder that holds the videos.")] = None,
    as_json: AsJson = False,
):
    """Read a released Ego-ST file into a benchmark folder; every row ends as a question or as a rejection."""
    from . import import_egost

    with stdout_for_json_only(as_json):
        result = import_egost(file, out, videos)
    if as_json:
        print(to_json(result))
        return
    print(f"{result['rows']} rows read, {result['questions']} questions are in {out}")
    for name in ("rejected", "doubtful"):
        print(f"{len(result[name])} rows {name}")
        for item in result[name]:
            print(f"  row {item['row']}: {item['reason']}")


@app.command(epilog="Example: stkit audit runs/walks --json")
def audit(
    path: Annotated[Path, typer.Argument(help="A benchmark folder, a question file or a released Ego-ST file.")],
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
):
    """Try to answer the questions without the video; a benchmark whose text gives the answers away is told apart here."""
    from . import audit as run

    with stdout_for_json_only(as_json):
        result = run(path, seed=seed, skip_bad=skip_bad)
    print(to_json(result.to_json()) if as_json else result.text())


@app.command("eval", epilog="Example: stkit eval runs/walks --model tiny --out runs/first --split test")
def eval_(
    bench: Annotated[Path, typer.Argument(help="A benchmark folder or a question file.")],
    out: Out,
    model: Annotated[str, typer.Option("--model", help="tiny, a local folder, a hub name, or the endpoint's name for it.")] = "tiny",
    mode: Annotated[Mode, typer.Option("--mode", help="Compare the letters' log-probabilities, or decode greedily.")] = Mode.letter,
    control: Annotated[Control, typer.Option("--control", help="What is done to the frames or options.")] = Control.none,
    split: Annotated[Split | None, typer.Option("--split", help="Only this split (all rows without it).")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N questions.")] = None,
    seed: Seed = 0,
    blind: Annotated[bool, typer.Option("--blind/--no-blind", help="Ask everything without frames too.")] = True,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Questions of a clip asked and saved together (all without it).")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens of a clip's tree computed at once: bounds the memory.")] = 16_384,
    sampling: Annotated[str | None, typer.Option("--sampling", help="published, uniform or fps.")] = None,
    frames: Annotated[int | None, typer.Option("--frames", help="Frames for uniform sampling, even.")] = None,
    fps: Annotated[float | None, typer.Option("--fps", help="Frames a second for fps sampling.")] = None,
    max_pixels: Annotated[int | None, typer.Option("--max-pixels", help="Pixels a frame at most.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Length of a decoded answer.")] = 512,
    prompt: Annotated[str, typer.Option("--prompt", help="stkit or published.")] = "stkit",
    four_bit: Annotated[bool | None, typer.Option("--four-bit/--no-four-bit", help="NF4 weights.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, mps, cuda, cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, float16, bfloat16.")] = "auto",
    attention: Annotated[str, typer.Option("--attention", help="auto, sdpa, eager, flash_attention_2.")] = "auto",
    adapter: Annotated[str | None, typer.Option("--adapter", help="Folder of a LoRA adapter.")] = None,
    skip_bad: SkipBad = False,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Keep decoded frames in ~/.cache/stkit or $STKIT_CACHE.")] = True,
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="Ask an OpenAI-compatible server, e.g. http://localhost:8000/v1; key in $STKIT_API_KEY or $OPENAI_API_KEY.")] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", help="Requests to the endpoint at a time.")] = 4,
    timeout_s: Annotated[float, typer.Option("--endpoint-timeout", help="Seconds that one request may take.")] = 120.0,
    retries: Annotated[int, typer.Option("--retries", help="How often a request is sent again.")] = 5,
    as_json: AsJson = False,
):
    """Ask a model every question and score it by category, its blind score beside it."""
    from . import evaluate
    from .vlm.processes import speaks

    with stdout_for_json_only(as_json):
        result = evaluate(
            bench, model=model, out=out, mode=mode.value, control=control.value, split=split and split.value, limit=limit,
            seed=seed, blind=blind, batch_size=batch_size, max_tokens=max_tokens, sampling=sampling, frames=frames, fps=fps, max_pixels=max_pixels,
            max_new_tokens=max_new_tokens, prompt=prompt, four_bit=four_bit, device=device, dtype=dtype,
            attention=attention, adapter=adapter, skip_bad=skip_bad, cache=cache, endpoint=endpoint, concurrency=concurrency,
            timeout_s=timeout_s, retries=retries,
        )  # fmt: skip
    if speaks():  # of several processes one
        print(to_json(result.scores) if as_json else result.text())


@app.command(epilog="Example: stkit report runs/first runs/second --out runs/both.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="One run folder, or two to compare: evaluations, or training runs.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file; tables go beside it (CSV; of evaluations LaTeX too).")] = Path("report.html"),
    as_json: AsJson = False,
):
    """Write the report of one run, category by category or step by step, or of two side by side."""
    from . import report as run

    with stdout_for_json_only(as_json):
        result = run(runs, out=out)
    print(to_json(result) if as_json else f"the report is {Path(result['report']).resolve()}")


@app.command(epilog="Example: stkit doctor")
def doctor(as_json: AsJson = False):
    """Say what this machine is, which backends work here, what would be chosen, and what to install for better ones."""
    from . import doctor as run

    with stdout_for_json_only(as_json):
        result = run()
    print(to_json(result) if as_json else result["text"])


app.add_typer(commands)
app.add_typer(tiny_commands, name="tiny", help="Make and score the models that ship.")


def _say(message: str, kind: str = "error"):
    print(f"stkit: {kind}: {message}", file=sys.stderr)


def _failure(error: BaseException) -> int:
    """Say in one line what went wrong, and give the exit code."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        _say("what was done is on disk; the same command goes on from there", "stopped by Ctrl-C")
        return 130
    if hasattr(error, "format_message"):  # a usage error of Typer's, whose classes moved between its versions
        _say(f"{error.format_message()} (see 'stkit --help')")
        return 2
    if isinstance(error, BadRows):  # a line for each of them
        _say(str(error))
        return 1
    if isinstance(error, (StkitError, OSError)):
        text = explain(error) if isinstance(error, OSError) else str(error)
    else:
        fault = "this is a fault of stkit's: run it again with --debug and report it"
        text = f"{type(error).__name__}: {error} ({fault})"
    _say(" ".join(text.splitlines()))
    return 2 if isinstance(error, BadUse) else 1


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: as in ``sys.argv[1:]``.
    """
    debug = "--debug" in arguments
    with warnings.catch_warnings():
        if not debug:  # what other packages warn about is not for the reader of a command's output
            warnings.showwarning = lambda w, *_, **__: _say(str(w), "warning") if isinstance(w, StkitWarning) else None
        try:
            code = app([a for a in arguments if a != "--debug"] or ["--help"], prog_name="stkit", standalone_mode=False)
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exception(error)
            return _failure(error)
    if code == 130:  # newer Typers turn Ctrl-C into this code
        return _failure(KeyboardInterrupt())
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the ``stkit`` command."""
    sys.exit(run(sys.argv[1:]))
