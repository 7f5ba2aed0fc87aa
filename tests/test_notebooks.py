"""The notebooks run from top to bottom in a fresh kernel, and what is committed is what they say today."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from clean_notebooks import clean
from jupyter_client.provisioning import LocalProvisioner
from kernelmaker import fork_kernel
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))
EVERY = [pytest.param(p, id=str(p.relative_to(FOLDER))) for p in NOTEBOOKS + SOLUTIONS]


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def said(cell) -> str:
    """What a cell printed or returned as text (pictures, progress bars and addresses of objects left out)."""
    texts = [o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in cell.outputs if o.get("name") != "stderr"]
    shown = re.sub(r"<[^<>]* at 0x[0-9a-f]+>|<Figure[^>]*>|<Axes[^>]*>", "", " ".join(texts))
    return " ".join(shown.split())  # a kernel cuts what is printed into pieces as it likes


def test_the_notebooks_and_their_solutions_are_there():
    wanted = {"00_quickstart", "01_build_a_benchmark", "02_ask_a_model", "03_encode_once", "04_cold_start",
              "05_grpo_reverse_thinking", "06_category_analysis", "07_kernels"}  # fmt: skip
    assert wanted <= {p.stem for p in NOTEBOOKS} == {p.stem for p in SOLUTIONS}


@pytest.mark.parametrize("path", EVERY)
def test_committed_outputs_are_whole_counted_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 500_000
    assert [c.execution_count for c in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert not [o for c in code_cells(notebook) for o in c.outputs if o.output_type == "error"]
    assert all(len(c.source.splitlines()) <= 40 for c in code_cells(notebook))
    text = json.dumps(notebook)
    assert "/root/" not in text and "/tmp/" not in text and "/work/" not in text, "a path of the author's machine"


def test_cleaning_takes_times_and_versions_and_joins_what_was_printed_in_pieces():
    pieces = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in (("stdout", "a"), ("stdout", "b\n"))]
    pieces += [nbformat.v4.new_output("display_data", {"text/plain": "c"}), nbformat.v4.new_output("stream", name="stdout", text="d")]
    pieces += [nbformat.v4.new_output("stream", name="stderr", text="e")]
    cell = nbformat.v4.new_code_cell("x", outputs=pieces, metadata={"execution": {"shell": "today"}, "tags": ["volatile"]})
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python", "version": "3.11.7"}})
    clean(notebook)
    assert notebook.metadata.language_info == {"name": "python"} and cell.metadata == {"tags": ["volatile"]}
    assert [o.get("text") or o.data["text/plain"] for o in cell.outputs] == ["ab\n", "c", "d", "e"]


@pytest.mark.parametrize("path", EVERY)
def test_what_is_committed_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    clean(notebook)
    assert nbformat.writes(notebook) + "\n" == path.read_text(encoding="utf-8"), "run 'make notebooks'"


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in NOTEBOOKS])
def test_a_notebook_opens_in_colab_installs_and_sets_up_first(path):
    notebook = nbformat.read(path, as_version=4)
    assert "colab" in notebook.cells[0].source and path.name in notebook.cells[0].source
    install, start = code_cells(notebook)[:2]
    assert len(install.source.splitlines()) <= 6 and "pip" in install.source and "constraints" not in install.source
    assert "setup(seed=0)" in start.source and {"device", "dtype", "attention"} <= set(said(start).split())
    assert any("Exercise" in c.source for c in notebook.cells if c.cell_type == "markdown")


@pytest.mark.parametrize("path", EVERY)
def test_it_runs_from_a_fresh_kernel_and_says_what_is_committed(path, monkeypatch):
    committed = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    if "TRITON_INTERPRET" not in path.read_text(encoding="utf-8"):  # which has to be set before anything is imported
        monkeypatch.setattr(LocalProvisioner, "launch_kernel", fork_kernel)
    patience = {"timeout": 1800, "startup_timeout": 600}  # of a cell, of a kernel: the machine may be busy
    client = NotebookClient(notebook, **patience, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})  # the suite runs on every core already
    for before, after in zip(code_cells(committed), code_cells(notebook), strict=True):
        if "volatile" not in before.metadata.get("tags", []):  # times, versions and an untrained model's rounding may change
            assert said(after) == said(before), f"run 'make notebooks': this cell says something else now:\n{before.source}"
