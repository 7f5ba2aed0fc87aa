"""What several commands of the command line share."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write into; a started job goes on in it.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on without malformed rows, and count them.")]
Seed = Annotated[int, typer.Option("--seed", help="Everything random follows from it.")]


@contextlib.contextmanager
def stdout_for_json_only(as_json: bool):
    """With --json everything that is said on the way goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield
