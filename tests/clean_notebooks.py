"""Leave in run notebooks what they say, and nothing of when and where they ran: `make notebooks` ends with it.

    python tests/clean_notebooks.py notebooks/*.ipynb
"""

import sys
from pathlib import Path

import nbformat

LANGUAGE = {"name": "python"}  # not the version of the Python that happened to run it


def clean(notebook: nbformat.NotebookNode) -> None:
    """Remove times of execution and the Python's version, and join what a cell printed in pieces; in place."""
    notebook.metadata.language_info = nbformat.from_dict(LANGUAGE)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)


def _joined(outputs: list) -> list:
    """Neighbours on one stream as one output: a kernel cuts them where it likes."""
    found = []
    for output in outputs:
        last = found[-1] if found else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
        else:
            found.append(output)
    return found


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        notebook = nbformat.read(path, as_version=4)
        clean(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
