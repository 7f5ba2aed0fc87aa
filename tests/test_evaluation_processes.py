"""An evaluation that several processes share: one set of predictions, equal to one process's, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from benchmaker import lines, write_bench
from teammaker import free_port, run_team

from stkit import cli
from stkit.evaluation import evaluate
from stkit.runtime import BadUse, StkitError
from stkit.vlm.interview import Interview
from stkit.vlm.load import load_model
from stkit.vlm.processes import Team, join_team, own_device

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("bench") / "walks")


@pytest.fixture(scope="module")
def alone(bench, tmp_path_factory):
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    return evaluate(bench, load_model("tiny-untrained", device="cpu"), out, progress=False)


def ids(folder: Path) -> list[str]:
    return [row["id"] for row in lines(folder / "predictions.jsonl")]


def same(folder: Path, alone) -> bool:
    """The same predictions, whatever their order and the seconds that they took."""
    for name in ("predictions", "blind"):
        old, new = (sorted(lines(out / f"{name}.jsonl"), key=lambda row: row["id"]) for out in (alone.out, folder))
        assert [row["id"] for row in new] == [row["id"] for row in old]
        for a, b in zip(old, new, strict=True):
            assert np.allclose(a.pop("log_probs"), b.pop("log_probs"), atol=1e-5)
            assert a | {"seconds": 0} == b | {"seconds": 0}
    return True


def test_accelerate_launch_gives_what_one_process_gives_and_one_process_speaks(bench, alone, tmp_path):
    launch = [Path(sys.executable).parent / "accelerate", "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", "1", "--main_process_port", str(free_port()), "-m", "stkit"]
    command = [*map(str, launch), "eval", str(bench), "--model", "tiny-untrained", "--out", str(tmp_path / "r")]
    command += ["--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "r" / "scores.json").read_text()) == alone.scores
    assert done.stderr.count("model tiny-untrained") == 1 and done.stderr.count("measured on the first clip") == 1
    assert same(tmp_path / "r", alone) and ids(tmp_path / "r") == ids(alone.out)
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == {path.name for path in alone.out.iterdir()}, "parts were left"


def _ask(bench, out, events):
    """Note which clips this process asks, and what evaluate returns."""
    ask = Interview.ask

    def noted(self, questions, shown):
        with open(events / f"asked-{os.environ['RANK']}", "a") as file:
            file.writelines(f"{q.id}\n" for q in questions)
        return ask(self, questions, shown)

    Interview.ask = noted
    result = evaluate(bench, "tiny-untrained", out, device="cpu", progress=False)
    (events / f"result-{os.environ['RANK']}").write_text(json.dumps(result.scores) + result.predictions.to_json())


def test_each_process_asks_its_own_clips_and_all_return_the_whole_result(bench, alone, tmp_path):
    assert [code for code, _ in run_team(tmp_path / "told", _ask, bench, tmp_path / "r", tmp_path)] == [0, 0]
    asked = [{line[0] for line in (tmp_path / f"asked-{rank}").read_text().splitlines()} for rank in (0, 1)]
    assert asked == [{"a", "c"}, {"b"}]
    results = [(tmp_path / f"result-{rank}").read_text() for rank in (0, 1)]
    assert results[0] == results[1] and '"c-landmark-reverse"' in results[0]
    assert same(tmp_path / "r", alone)


def _die(bench, out, number):
    """Process 1 is killed as it appends its second answer: a half-written line stays."""
    from stkit.vlm import inquiry

    append, calls = inquiry.append_jsonl, []

    def dying(path, row):
        calls.append(row)
        if os.environ["RANK"] == "1" and len(calls) == 2:
            with open(path, "a") as file:
                file.write(json.dumps(row)[:20])
            os.kill(os.getpid(), number)
        append(path, row)

    inquiry.append_jsonl = dying
    evaluate(bench, "tiny-untrained", out, device="cpu", progress=False)


@pytest.mark.parametrize("later", [1, 2])
def test_a_killed_process_ends_the_others_and_loses_nothing(bench, alone, tmp_path, later, monkeypatch):
    (first, told), (killed, _) = run_team(tmp_path / "told", _die, bench, tmp_path / "r", signal.SIGKILL)
    assert killed == -signal.SIGKILL and first == 1 and "another process ended without a word" in told
    parts = {path.name: lines_but_the_last(path) for path in (tmp_path / "r").glob("*.part-*.jsonl")}
    done = [row["id"] for rows in parts.values() for row in rows if row["control"] == "none"]
    assert len(done) == 9 and not (tmp_path / "r" / "scores.json").exists()  # 8 of process 0, and 1
    if later == 2:
        run_team(tmp_path / "again", _ask, bench, tmp_path / "r", tmp_path)
        asked = "".join(path.read_text() for path in tmp_path.glob("asked-*")).splitlines()
    else:
        ask, asked = Interview.ask, []

        def noted(self, questions, shown):
            asked.extend(q.id for q in questions)
            return ask(self, questions, shown)

        monkeypatch.setattr(Interview, "ask", noted)
        evaluate(bench, "tiny-untrained", tmp_path / "r", device="cpu", progress=False)
    unasked = [i for i in ids(alone.out) if i not in done]
    assert [asked.count(i) for i in unasked] == [2] * 3  # with the video and without
    assert set(asked) == {i for i in ids(alone.out) if i[0] == "b"}
    assert same(tmp_path / "r", alone) and json.loads((tmp_path / "r" / "scores.json").read_text()) == alone.scores
    assert not [*(tmp_path / "r").glob("*.part-*")]


def lines_but_the_last(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_parts_that_were_merged_but_not_yet_deleted_count_once(bench, alone, tmp_path):
    """Killed between the writing of the whole and the deleting of the parts, the answers are there twice."""
    evaluate(bench, "tiny-untrained", tmp_path / "r", device="cpu", progress=False)
    whole = (tmp_path / "r" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "r" / "predictions.part-1.jsonl").write_text("".join(whole[4:8]) + '{"id": "ha')
    evaluate(bench, "tiny-untrained", tmp_path / "r", device="cpu", progress=False)
    assert (tmp_path / "r" / "predictions.jsonl").read_text() == "".join(whole)


def _fail(bench, out):
    def failing(*_):
        raise RuntimeError("this clip is not for me")

    if os.environ["RANK"] == "1":
        Interview.watch = failing
    evaluate(bench, "tiny-untrained", out, device="cpu", progress=False)


def test_an_error_in_one_process_is_told_by_all_and_none_waits(bench, tmp_path):
    begin = time.monotonic()
    (first, told), (second, why) = run_team(tmp_path / "told", _fail, bench, tmp_path / "r")
    assert (first, second) == (1, 1) and time.monotonic() - begin < 300
    assert "StkitError: process 1 of 2 stopped (this clip is not for me): run the same command again" in told
    assert "RuntimeError: this clip is not for me" in why


def _gather(out):
    team = join_team()
    every = team.gather({"rank": team.rank, "text": "é" * (1 + 5 * team.rank), "number": 0.1 + team.rank})
    once = team.first(lambda: (out / "once").write_text(f"{team.rank}"))
    shares = team.gather(team.share(list(range(7))))
    (out / f"found-{team.rank}").write_text(json.dumps([every, once, shares]))


def test_a_team_gathers_values_in_order_shares_all_and_does_a_thing_once(tmp_path):
    assert [code for code, _ in run_team(tmp_path, _gather, tmp_path, count=3)] == [0] * 3
    found = [json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(3)]
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[0][0] == [{"rank": k, "text": "é" * (1 + 5 * k), "number": 0.1 + k} for k in range(3)]
    assert (tmp_path / "once").read_text() == "0" and [f[1] for f in found] == [1, None, None]
    assert found[2][2] == [[0, 3, 6], [1, 4], [2, 5]]


def test_alone_nothing_is_connected_and_an_error_comes_as_it_is(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = join_team()
    assert team == Team() and team.gather(3) == [3] and team.share([1, 2]) == [1, 2] and team.first(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        team.each(lambda: 1 / 0)


@pytest.mark.parametrize("rank", ["2", "x", ""])
def test_an_environment_that_fits_no_process_is_refused(bench, tmp_path, monkeypatch, rank, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadUse, match=f"RANK='{rank}', WORLD_SIZE='2'.*accelerate launch"):
        join_team()
    assert cli.run(["eval", str(bench), "--out", str(tmp_path / "r")]) == 2 and not (tmp_path / "r").exists()


def test_several_processes_need_a_folder_that_all_see(bench, monkeypatch):
    from stkit import evaluation

    monkeypatch.setattr(evaluation, "join_team", lambda: Team(0, 2))
    with pytest.raises(BadUse, match="name one that all of them see"):
        evaluate(bench, "tiny-untrained", progress=False)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [own_device("auto", Team(k, 2, k)) for k in (0, 1)] == ["cuda:0", "cuda:1"]
    assert own_device("auto", Team()) == "auto" and own_device("cpu", Team(1, 2, 1)) == "cpu"
    with pytest.raises(StkitError, match="process 2 of this machine finds no GPU, 2 are there"):
        own_device("auto", Team(2, 3, 2))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert own_device("auto", Team(1, 2, 1)) == "cpu"
