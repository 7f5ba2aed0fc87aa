"""The commands that make and score the models that ship: each calls a function of stkit.tiny.

stkit tiny train --out runs/tiny --quick
stkit tiny score --out runs/tiny-scores --clips 200 --seed 7
"""

from typing import Annotated

import typer

from .cli_options import AsJson, Out, Seed, stdout_for_json_only
from .runs import to_json
from .runtime import BadUse

commands = typer.Typer(add_completion=False, rich_markup_mode=None)


@commands.command(epilog="Example: stkit tiny train --out runs/tiny --quick")
def train(
    out: Out,
    quick: Annotated[bool, typer.Option("--quick", help="A small recipe, to see that it runs: little is learned.")] = False,
    seed: Seed = 0,
    recipe: Annotated[str | None, typer.Option("--recipe", help="full, quick or a YAML file.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="The last stage to run; grpo: all of the training.")] = None,
    as_json: AsJson = False,
):
    """Make the tiny models from nothing, stage by stage; the same command goes on where it was stopped."""
    from .tiny.recipe import train_tiny
    from .tiny.ship import how, told

    if quick and recipe:
        raise BadUse(f"--quick and --recipe {recipe} both choose a recipe: leave one out")
    with stdout_for_json_only(as_json):
        found = train_tiny(out, recipe or ("quick" if quick else "full"), seed, until)
    folders = {part: {name: str(folder) for name, folder in found.get(part, {}).items()} for part in ("stages", "models")}
    print(to_json(how() | found | folders) if as_json else told(found))


@commands.command(epilog="Example: stkit tiny score --out runs/tiny-scores --clips 200 --seed 7")
def score(
    out: Out,
    models: Annotated[list[str] | None, typer.Argument(help="Names or folders of models; the three that ship without it.")] = None,
    clips: Annotated[int, typer.Option("--clips", help="Fresh walks in distribution, and as many out of it.")] = 200,
    seed: Annotated[int, typer.Option("--seed", help="Of the walks: choose your own.")] = 1,
    controls: Annotated[bool, typer.Option("--controls/--no-controls", help="Also without frames, and with shuffled and reversed ones.")] = True,
    as_json: AsJson = False,
):
    """Score models on walks that nobody has seen, with the blind score and the controls beside."""
    from .tiny.scores import score_tiny, text
    from .vlm.tiny import SHIPPED

    with stdout_for_json_only(as_json):
        found = score_tiny(out, clips, seed, models or SHIPPED, controls)
    print(to_json(found) if as_json else text(found))
