"""The command line: exit codes, one line for each error, one JSON object for --json."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stkit
from stkit import cli

COMMANDS = ["build", "import", "audit", "eval", "report", "doctor"]
ROW = dict(
    id="q1", clip_id="c1", video="c1.mp4", group="g1", task="direction", order="forward", question="Which turns?",
    options=["left", "right"], answer=1, split="test",
)  # fmt: skip


def fails(capsys, arguments, code, *words):
    """Run a command that must fail with this code, saying these words in one line on stderr and nothing on stdout."""
    assert cli.run([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("stkit: ") and all(w in last for w in words), err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_of_each_command(command, capsys):
    assert cli.run([command, "--help"]) == 0
    assert f"Example: stkit {command}" in " ".join(capsys.readouterr().out.split())


def test_no_arguments_show_the_commands(capsys):
    assert cli.run([]) == 0
    out = capsys.readouterr().out
    assert all(c in out for c in COMMANDS)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["eval"], "bench"),
        (["bogus"], "bogus"),
        (["eval", "b", "--out", "o", "--mode", "guess"], "guess"),
        (["eval", "b", "--out", "o", "--control", "upside-down"], "upside-down"),
        (["build", "--out", "o", "--clips", "many"], "--clips"),
        (["build", "--out", "o", "--clips", "0"], "0"),
        (["build", "--out", "o", "--clips", "-3"], "-3"),
        (["build", "--out", "o", "--turns", "two"], "two"),
        (["build", "--out", "o", "--turns", "\u00b2"], "\u00b2"),
        (["build", "--out", "o", "--textures", ""], "textures"),
        (["build", "--out", "o", "--textures", "rust"], "--ood"),
        (["build", "--out", "o", "--light", "0-100"], "115"),
        (["build", "--out", "o", "--preset", "huge"], "huge"),
    ],
)
def test_bad_use_is_exit_code_2(arguments, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(capsys, arguments, 2, word)
    assert not list(tmp_path.iterdir())


def test_a_million_clips_ask_for_yes_and_say_what_they_cost(capsys, tmp_path):
    text = fails(capsys, ["build", "--out", tmp_path / "b", "--clips", "1000000"], 2, "--yes")
    assert "GB" in text or "TB" in text
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("command", [["eval", "--out", "r"], ["audit"], ["import", "--out", "i"], ["report"]], ids=lambda c: c[0])
def test_no_such_file_is_one_line(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(capsys, [command[0], tmp_path / "nowhere", *command[1:]], 1, "nowhere")


@pytest.mark.parametrize("content, word", [("", "empty"), ("{broken\n", "JSON")])
@pytest.mark.parametrize("command", [["eval", "--out", "r"], ["audit"], ["import", "--out", "i"]], ids=lambda c: c[0])
def test_a_file_that_is_empty_or_no_json_is_one_line(command, content, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text(content)
    text = fails(capsys, [command[0], "q.jsonl", *command[1:]], 1)
    assert word in text and "q.jsonl" in text


def test_bad_rows_are_all_listed_and_nothing_is_scored(capsys, tmp_path):
    rows = [ROW, ROW | {"id": "q2", "options": "A. left, B. right"}, ROW | {"id": "q3", "answer": 5}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"id": "q4", "cl')
    assert cli.run(["eval", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "r")]) == 1
    err = capsys.readouterr().err
    assert "q.jsonl:2: options=" in err and "q.jsonl:3: answer=5" in err and "q.jsonl:4:" in err and "--skip-bad" in err
    assert not (tmp_path / "r").exists()


def test_full_and_read_only_disks_are_one_line(capsys, monkeypatch, tmp_path):
    for code, word in ((errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only")):

        def fail(*_, code=code, **__):
            raise OSError(code, "said the system", str(tmp_path / "b"))

        monkeypatch.setattr(stkit, "build_benchmark", fail, raising=False)
        fails(capsys, ["build", "--out", tmp_path / "b"], 1, word)


def test_a_fault_of_ours_is_one_line_and_debug_shows_the_traceback(capsys, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(stkit, "build_benchmark", fail, raising=False)
    fails(capsys, ["build", "--out", tmp_path / "b"], 1, "ZeroDivisionError", "--debug")
    assert cli.run(["build", "--out", str(tmp_path / "b"), "--debug"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" in err and "ZeroDivisionError: a bug" in err


def test_debug_keeps_the_exit_code(capsys, tmp_path):
    assert cli.run(["--debug", "build", "--out", str(tmp_path / "b"), "--clips", "0"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_several_lines_is_said_in_one(capsys, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(stkit, "build_benchmark", fail, raising=False)
    err = fails(capsys, ["build", "--out", tmp_path / "b"], 1, "first line second line")
    assert len(err.strip().splitlines()) == 1


def test_ctrl_c_is_one_line_and_exit_code_130(tmp_path):
    command = [str(Path(sys.executable).with_name("stkit")), "build", "--out", str(tmp_path / "b"), "--clips", "300"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + 600
    while not list(tmp_path.glob("b/.chunks/*")) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Ctrl-C" in err.splitlines()[-1] and "Traceback" not in err
    assert (tmp_path / "b" / "benchmark.json").exists() is False


def test_json_is_one_object_on_stdout_and_nothing_else(capsys):
    assert cli.run(["doctor", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_stkit_is_on_the_path_of_the_environment():
    done = subprocess.run([str(Path(sys.executable).with_name("stkit")), "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"stkit {stkit.__version__}"
