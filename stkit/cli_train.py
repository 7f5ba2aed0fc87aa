"""The commands of training: each calls the function of the same name in Python.

    stkit plan tiny --preset tiny
    stkit sft runs/walks --model tiny --preset tiny --out runs/sft
    stkit grpo runs/walks --model runs/sft --preset tiny --out runs/grpo
    stkit merge runs/grpo --out runs/merged
    stkit export runs/walks --lmms-eval runs/lmms
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import AsJson, Out, stdout_for_json_only
from .runs import to_json

commands = typer.Typer(add_completion=False, rich_markup_mode=None)

Bench = Annotated[Path, typer.Argument(help="A benchmark folder, a question file, or a JSONL of video, prompt, completion.")]
Model = Annotated[str, typer.Option("--model", help="tiny, a local folder, a training run or a hub name.")]
Preset = Annotated[str, typer.Option("--preset", help="A preset that ships, or a YAML file.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Updates (train.steps).")]
RunSeed = Annotated[int | None, typer.Option("--seed", help="Everything random follows from it (train.seed).")]
EvalEvery = Annotated[int | None, typer.Option("--eval-every", help="Score a held-out split every N updates.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any setting, e.g. train.lr=1e-5 (again for more).")]


@commands.command(epilog="Example: stkit sft runs/walks --model tiny --preset tiny --steps 60 --out runs/sft")
def sft(
    bench: Bench, out: Out, model: Model = "tiny", preset: Preset = "tiny", steps: Steps = None, seed: RunSeed = None,
    eval_every: EvalEvery = None, set_: Set = None, as_json: AsJson = False,
):  # fmt: skip
    """Train on answers, the cold start; the same command goes on with a run that was stopped."""
    _train("sft", bench, model, preset, out, steps, seed, eval_every, set_, as_json)


@commands.command(epilog="Example: stkit grpo runs/walks --model runs/sft --preset tiny --out runs/grpo")
def grpo(
    bench: Bench, out: Out, model: Model = "tiny", preset: Preset = "tiny", steps: Steps = None, seed: RunSeed = None,
    eval_every: EvalEvery = None, set_: Set = None, as_json: AsJson = False,
):  # fmt: skip
    """Train on rewarded rollouts; the same command goes on with a run that was stopped."""
    _train("grpo", bench, model, preset, out, steps, seed, eval_every, set_, as_json)


def _train(stage: str, bench, model, preset, out, steps, seed, eval_every, texts, as_json: bool) -> None:
    import stkit

    from .train.reading import parse_overrides

    with stdout_for_json_only(as_json):
        run = getattr(stkit, stage)(
            bench, model=model, preset=preset, out=out, steps=steps, seed=seed, eval_every=eval_every,
            overrides=parse_overrides(texts or ()),
        )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(to_json(run.summary()) if as_json else run.text())
