"""Several processes train as one: the same command under accelerate launch gives the same metrics."""

import os
import subprocess
import sys

import pytest
import torch
from benchmaker import lines, write_bench
from teammaker import run_team
from trainmaker import metrics

from stkit import grpo, sft
from stkit.bench.schema import load_benchmark
from stkit.train.processes import Processes
from stkit.train.reading import load_settings

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "stkit"]  # fmt: skip
QUICK = {"data.split": None, "data.tasks": ["direction", "landmark"], "train.batch": 3, "train.save_every": 100}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("team") / "bench")


def launched(stage, bench, out, overrides):
    texts = [text for k, v in overrides.items() for text in ("--set", f"{k}={'null' if v is None else v}")]
    own = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    texts += ["--model", "tiny-untrained", "--steps", "3", "--out", str(out)]
    done = subprocess.run([*LAUNCH, stage, str(bench), *texts], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def assert_same(one, two):
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == (value if value is None else pytest.approx(value, rel=1e-5, abs=1e-5)), name


def test_two_processes_run_sft_as_one_does(bench, tmp_path):
    own = QUICK | {"sft.form": "answer"}
    whole = sft(bench, "tiny-untrained", out=tmp_path / "one", steps=3, overrides=own, progress=False)
    done = launched("sft", bench, tmp_path / "two", own)
    assert_same(metrics(whole.out), metrics(tmp_path / "two"))
    assert done.stdout.count("steps are in") == 1 and (tmp_path / "two" / "model" / "config.json").exists()


def test_two_processes_run_grpo_on_recorded_rollouts_as_one_does(bench, tmp_path):
    own = QUICK | {
        "data.tasks": ["direction"],
        "grpo.group": 4,
        "grpo.max_new_tokens": 6,
        "rewards.correct": 0,
        "rewards.format": 0,
    }
    reward = tmp_path / "mine.py"
    reward.write_text("def parity(rollouts):\n    return [len(r.text) % 3 for r in rollouts]\n")
    own |= {f"rewards.{reward}:parity": 1.0}
    first = grpo(bench, "tiny-untrained", out=tmp_path / "first", steps=3, overrides=own, progress=False)
    own |= {"grpo.recorded": str(first.out / "rollouts.jsonl")}
    one = grpo(bench, "tiny-untrained", out=tmp_path / "one", steps=3, overrides=own, progress=False)
    launched("grpo", bench, tmp_path / "two", own)
    assert_same(metrics(one.out), metrics(tmp_path / "two"))
    ids = [
        [(row["step"], row["id"], row["reward"]) for row in lines(tmp_path / name / "rollouts.jsonl")]
        for name in ("one", "two")
    ]
    assert ids[0] == ids[1] and len({q.id for q in load_benchmark(bench).questions if q.task == "direction"}) == 6


def test_more_processes_than_clips_of_an_update_are_refused(bench, tmp_path):
    own = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*LAUNCH, "sft", str(bench), "--steps", "1", "--out", str(tmp_path / "a"), "--set", "train.batch=1"]
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    assert done.returncode != 0 and "2 processes share 1 clips of an update: raise train.batch to 2" in done.stderr


def add_up(out):
    """Of three parameters one has a gradient in both processes, one in process 0, one in neither."""
    processes = Processes(load_settings("tiny", "sft"), out)
    both, first, neither = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    both.grad = torch.full((2,), 1.0 + processes.rank)
    first.grad = torch.full((2,), 5.0) if processes.first else None
    processes.sum_gradients([both, first, neither])
    assert both.grad.tolist() == [3.0, 3.0] and first.grad.tolist() == [5.0, 5.0] and neither.grad is None


def test_a_gradient_that_no_process_has_stays_away_so_that_its_weights_do_not_decay(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for code, told in run_team(tmp_path, add_up, tmp_path):
        assert code == 0, told
