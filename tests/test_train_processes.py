"""Several processes train as one: the same command under accelerate launch gives the same metrics.

One test starts the launcher, the others fork what it would start.
"""

import os
import subprocess
import sys

import pytest
import torch
from benchmaker import lines, write_bench
from teammaker import run_team
from trainmaker import metrics

from stkit import cli, grpo, sft
from stkit.bench.schema import load_benchmark
from stkit.train.processes import Processes
from stkit.train.reading import load_settings

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "stkit"]  # fmt: skip
QUICK = {"data.split": None, "data.tasks": ["direction", "landmark"], "train.batch": 3, "train.save_every": 100}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("team") / "bench")


def command(stage, bench, out, overrides, steps=3):
    texts = [text for k, v in overrides.items() for text in ("--set", f"{k}={'null' if v is None else v}")]
    return [stage, str(bench), "--model", "tiny-untrained", "--steps", str(steps), "--out", str(out), *texts]


def launched(arguments):
    own = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*LAUNCH, *arguments], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def as_launched(arguments):
    """One of the processes that the launcher starts."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    assert cli.run(arguments) == 0


def assert_same(one, two):
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == (value if value is None else pytest.approx(value, rel=1e-5, abs=1e-5)), name


def test_two_processes_run_sft_as_one_does(bench, tmp_path):
    own = QUICK | {"sft.form": "answer"}
    whole = sft(bench, "tiny-untrained", out=tmp_path / "one", steps=3, overrides=own, progress=False)
    done = launched(command("sft", bench, tmp_path / "two", own))
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
    team = run_team(tmp_path / "team", as_launched, command("grpo", bench, tmp_path / "two", own))
    assert [code for code, _ in team] == [0, 0], team
    assert_same(metrics(one.out), metrics(tmp_path / "two"))
    ids = [
        [(row["step"], row["id"], row["reward"]) for row in lines(tmp_path / name / "rollouts.jsonl")]
        for name in ("one", "two")
    ]
    assert ids[0] == ids[1] and len({q.id for q in load_benchmark(bench).questions if q.task == "direction"}) == 6


def test_more_processes_than_clips_of_an_update_are_refused(bench, tmp_path):
    arguments = command("sft", bench, tmp_path / "a", {"train.batch": 1}, steps=1)
    (first, told), (second, also) = run_team(tmp_path / "team", as_launched, arguments)
    assert first != 0 != second and "2 processes share 1 clips of an update: raise train.batch to 2" in told + also


def add_up(out):
    """Of three parameters one has a gradient in both processes, one in process 0, one in neither."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    processes = Processes(load_settings("tiny", "sft"), out)
    both, first, neither = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    both.grad = torch.full((2,), 1.0 + processes.rank)
    first.grad = torch.full((2,), 5.0) if processes.first else None
    processes.sum_gradients([both, first, neither])
    assert both.grad.tolist() == [3.0, 3.0] and first.grad.tolist() == [5.0, 5.0] and neither.grad is None


def test_a_gradient_that_no_process_has_stays_away_so_that_its_weights_do_not_decay(tmp_path):
    for code, told in run_team(tmp_path, add_up, tmp_path):
        assert code == 0, told
