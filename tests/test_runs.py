"""Folders that survive a crash."""

import errno
import json
import os

import pytest

from stkit import runs
from stkit.runtime import StkitError


def test_a_fresh_folder_is_claimed_and_the_same_settings_go_on(tmp_path):
    folder = tmp_path / "a" / "b"
    assert runs.claim(folder, {"seed": 1, "shape": (2, 3)}) is False
    assert runs.claim(folder, {"seed": 1, "shape": (2, 3)}) is True


def test_other_settings_are_refused_and_the_difference_is_named(tmp_path):
    runs.claim(tmp_path / "r", {"seed": 1, "model": {"name": "tiny"}, "bits": 4})
    with pytest.raises(StkitError) as error:
        runs.claim(tmp_path / "r", {"seed": 2, "model": {"name": "big"}, "bits": 4})
    text = str(error.value)
    assert "seed: 1 -> 2" in text and "model.name: 'tiny' -> 'big'" in text and "bits" not in text and "\n" not in text


def test_a_folder_of_quite_another_job_is_refused_in_a_short_line(tmp_path):
    runs.claim(tmp_path / "r", {f"key{i}": "long " * 100 for i in range(30)})
    with pytest.raises(StkitError, match="and 25 more") as error:
        runs.claim(tmp_path / "r", {"clips": 40})
    assert len(str(error.value)) < 1200 + len(str(tmp_path))


def test_what_stands_beside_the_settings_is_kept_and_never_compared(tmp_path):
    assert not runs.claim(tmp_path / "run", {"seed": 0}, beside={"command": "stkit eval a"})
    assert runs.claim(tmp_path / "run", {"seed": 0}, beside={"command": "stkit eval b"})
    assert runs.read_json(tmp_path / "run" / "config.json") == {"seed": 0, "command": "stkit eval a"}
    with pytest.raises(StkitError, match="seed: 0 -> 1"):
        runs.claim(tmp_path / "run", {"seed": 1}, beside={"command": "stkit eval a"})


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StkitError, match="not empty"):
        runs.claim(tmp_path, {})
    with pytest.raises(StkitError, match="is a file"):
        runs.claim(tmp_path / "thesis.tex", {})


def test_a_half_written_last_line_is_cut_off_and_the_rest_is_kept(tmp_path):
    path = tmp_path / "p.jsonl"
    runs.append_jsonl(path, {"id": 1})
    runs.append_jsonl(path, {"id": 2})
    with open(path, "a") as file:
        file.write('{"id": 3, "te')
    assert [r["id"] for r in runs.read_partial_jsonl(path)] == [1, 2]
    runs.append_jsonl(path, {"id": 3})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": 1}\nbroken\n{"id": 2}\n')
    with pytest.raises(StkitError, match="p.jsonl:2"):
        runs.read_partial_jsonl(tmp_path / "p.jsonl")


def test_json_on_disk_never_holds_nan(tmp_path):
    import numpy as np

    row = {"a": float("nan"), "b": [float("inf"), 1], "c": np.float32(0.5), "d": np.arange(2), 3: (1, 2)}
    runs.write_json(tmp_path / "x.json", row)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1], "c": 0.5, "d": [0, 1], "3": [1, 2]}


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    runs.write_json(path, {"old": True})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        runs.write_json(path, {"new": True})
    assert json.loads(path.read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert runs.explain(error.value).startswith(f"{path}: the disk is full")
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:
        runs.write_text(tmp_path / "file" / "x.html", "page")
    assert runs.explain(error.value) == f"{tmp_path / 'file'}: a file is in the way, a folder was expected"


@pytest.mark.parametrize("code, word", [(errno.EROFS, "read-only"), (errno.EACCES, "permission"), (errno.ENOENT, "no such file")])
def test_disk_errors_are_one_line_with_a_fix(code, word):
    text = runs.explain(OSError(code, os.strerror(code), "/some/where"))
    assert word in text and "/some/where" in text and "\n" not in text


@pytest.mark.parametrize("content, word", [("", "empty"), ("{", "not JSON"), ("[" * 100000, "not JSON"), ("9" * 5000, "not JSON")])
def test_reading_bad_json_names_the_file(tmp_path, content, word):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(StkitError, match=word) as error:
        runs.read_json(tmp_path / "x.json")
    assert "x.json" in str(error.value)
