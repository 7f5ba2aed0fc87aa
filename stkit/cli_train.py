"""The commands of training: each calls the function of the same name in Python.

stkit plan tiny --preset tiny
stkit sft runs/walks --model tiny --preset tiny --out runs/sft
stkit grpo runs/walks --model runs/sft --preset tiny --out runs/grpo
stkit merge runs/grpo --out runs/merged
stkit export runs/walks --lmms-eval runs/lmms
"""

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import AsJson, Out, stdout_for_json_only
from .runs import to_json

commands = typer.Typer(add_completion=False, rich_markup_mode=None)

Bench = Annotated[
    Path, typer.Argument(help="A benchmark folder, a question file, or a JSONL of video, prompt, completion.")
]
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
    from .vlm.processes import speaks

    with stdout_for_json_only(as_json):
        run = getattr(stkit, stage)(
            bench, model=model, preset=preset, out=out, steps=steps, seed=seed, eval_every=eval_every,
            overrides=parse_overrides(texts or ()),
        )  # fmt: skip
    if speaks():
        print(to_json(run.summary()) if as_json else run.text())


@commands.command(epilog="Example: stkit merge runs/grpo --out runs/merged --scores runs/eval")
def merge(
    run: Annotated[Path, typer.Argument(help="The folder of a training run.")],
    out: Out,
    source: Annotated[str, typer.Option("--from", help="final, best or latest.")] = "final",
    scores: Annotated[
        list[Path] | None, typer.Option("--scores", help="An evaluation for the model card (again for more).")
    ] = None,
    as_json: AsJson = False,
):
    """Write a run's weights as a model folder that plain Transformers loads, with a model card."""
    from . import merge as run_merge

    with stdout_for_json_only(as_json):
        found = run_merge(run, out, source=source, scores=scores or ())
    if as_json:
        print(to_json(found))
        return
    print(f"the model is in {found['out']}, its card in {Path(found['out']) / 'README.md'}")
    if found.get("difference"):
        lost = found["difference"]
        print(
            f"  log-probabilities differ from the trained model's by {lost['mean']:.2g} nats (at most {lost['max']:.2g})"
        )


@commands.command(epilog="Example: stkit export runs/walks --lmms-eval runs/walks-lmms")
def export(
    bench: Annotated[Path, typer.Argument(help="A benchmark folder or a question file.")],
    lmms_eval: Annotated[Path, typer.Option("--lmms-eval", help="Folder of the task that lmms-eval runs.")],
    split: Annotated[str | None, typer.Option("--split", help="Only this split.")] = None,
    as_json: AsJson = False,
):
    """Write a benchmark as a task of lmms-eval."""
    from . import export_lmms_eval

    with stdout_for_json_only(as_json):
        found = export_lmms_eval(bench, lmms_eval, split)
    print(
        to_json(found)
        if as_json
        else f"the tasks {', '.join(found['tasks'])} are in {found['out']}; run:\n  {found['command']}"
    )


@commands.command("plan", epilog="Example: stkit plan Qwen/Qwen2.5-VL-3B-Instruct --preset t4-16gb --gpu 16")
def plan_(
    model: Annotated[str, typer.Argument(help="tiny, a local folder, or a published Qwen-VL's hub name.")],
    preset: Preset = "tiny",
    stage: Annotated[str, typer.Option("--stage", help="sft or grpo.")] = "grpo",
    gpu: Annotated[
        float | None, typer.Option("--gpu", help="Memory of the GPU in GB; this machine's without it.")
    ] = None,
    set_: Set = None,
    as_json: AsJson = False,
):
    """Say what a training run will need of memory, part by part, before anything is loaded."""
    from . import plan as run_plan
    from .train.reading import load_settings, parse_overrides

    with stdout_for_json_only(as_json):
        found = run_plan(model, load_settings(preset, stage, parse_overrides(set_ or ())), stage, gpu_gb=gpu)
    print(to_json(found.to_json()) if as_json else found.text())
