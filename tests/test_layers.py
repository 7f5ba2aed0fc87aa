"""The rooms import downwards only, nothing heavy is imported with stkit itself, and nothing is unpickled anywhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["ground", "bench", "vlm", "train", "reporting", "evaluation", "tiny", "cli_options", "cli_train", "cli_tiny", "cli", "__main__"]
GROUND = {"runtime", "runs", "sampling", "stats"}
FILES = sorted((ROOT / "stkit").rglob("*.py"))


def room(parts: tuple[str, ...]) -> str:
    return "ground" if not parts or parts[0] in GROUND else parts[0]


def imported_rooms(path: Path) -> set[str]:
    """The rooms of stkit that a file imports, wherever in the file the import stands."""
    package = path.relative_to(ROOT).with_suffix("").parts
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [base + [a.name] for a in node.names]
        else:
            continue
        rooms |= {room(tuple(n[1:])) for n in names if n[0] == "stkit" and len(n) > 1}
    return rooms


def test_the_rule_sees_a_breach(tmp_path):
    file = ROOT / "stkit" / "bench" / "schema.py"
    assert imported_rooms(file) == {"ground"}
    assert "bench" in imported_rooms(ROOT / "stkit" / "evaluation.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards_only(path):
    own = room(path.relative_to(ROOT / "stkit").with_suffix("").parts)
    if own == "__init__":
        return
    known = {r for r in imported_rooms(path) if r in FLOORS}
    assert all(FLOORS.index(r) <= FLOORS.index(own) for r in known), f"{own} imports {known}"


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "stkit_kernels", *sys.stdlib_module_names}
    for path in (ROOT / "kernels" / "stkit_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {n.split(".")[0] for n in names} <= allowed, path


def test_kernels_is_not_a_package_since_it_would_shadow_hugging_faces():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_stkit_loads_nothing_heavy():
    heavy = ["torch", "transformers", "vizdoom", "sklearn", "flash_attn", "bitsandbytes", "decord", "av", "pandas"]
    code = f"import sys, stkit, stkit.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_asking_a_model_without_an_adapter_loads_no_adapters():
    """peft brings bitsandbytes, which writes a line of its own to stderr on some machines."""
    code = "import sys, stkit.evaluation; print([m for m in ('peft', 'bitsandbytes') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_nothing_is_unpickled():
    forbidden = re.compile(r"\bpickle\b|\bjoblib\b|\bdill\b|allow_pickle=True|weights_only=False|yaml\.load\(|trust_remote_code=True")
    for path in FILES + sorted((ROOT / "kernels").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("#")[0]
            found = forbidden.search(code)
            assert not found or found.group() == "pickle" and "safetensors" in line, f"{path}:{number}: {line}"


def test_torch_load_is_never_called_without_weights_only():
    for path in FILES:
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
            assert "weights_only=True" in call, path


def test_every_public_name_is_there():
    import stkit

    for name in stkit.__all__:
        assert callable(getattr(stkit, name)), name


def test_the_report_and_the_evaluation_are_functions_after_their_modules_were_imported():
    import stkit
    import stkit.evaluation
    import stkit.reporting.html  # noqa: F401
    from stkit import evaluate, report

    assert callable(report) and callable(evaluate)


def test_an_unknown_name_says_what_there_is():
    import stkit

    with pytest.raises(AttributeError, match="evaluate"):
        stkit.evaluat  # noqa: B018
