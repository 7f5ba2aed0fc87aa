"""A run that is killed goes on to the bit; what must not be mixed is refused; what goes wrong loses nothing."""

import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from benchmaker import lines, write_bench
from teammaker import CONTEXT
from trainmaker import edit_row, metrics

from stkit import cli, grpo, load_model, open_run, sft
from stkit.runtime import OutOfMemory, StkitError
from stkit.train import checkpoint, loop
from stkit.train import sft as sft_module
from stkit.train.loop import Loop

STEPS, KILLS = 8, 5
SFT = {"data.split": None, "sft.form": "answer", "train.batch": 1, "data.per_clip": 3}
GRPO = {"data.split": None, "data.tasks": ["direction"], "grpo.group": 4, "grpo.max_new_tokens": 6, "train.batch": 1,
        "grpo.updates": 2, "rewards.correct": 0, "rewards.format": 0, "rewards.length": 0.0}  # fmt: skip
STAGES = {"sft": SFT, "grpo": GRPO}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("resume") / "bench")


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    file = tmp_path_factory.mktemp("reward") / "mine.py"
    file.write_text("def parity(rollouts):\n    return [len(r.text) % 3 for r in rollouts]\n")
    return {f"rewards.{file}:parity": 1.0}


def command(stage, bench, out, own, steps=STEPS):
    texts = [text for k, v in own.items() for text in ("--set", f"{k}={'null' if v is None else json.dumps(v)}")]
    texts += ["--model", "tiny-untrained", "--steps", str(steps), "--out", str(out)]
    return [sys.executable, "-m", "stkit", stage, str(bench), *texts]


def run_until(condition, arguments, number):
    """Start a command and send it a signal as soon as a condition holds; returns its exit code."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    while process.poll() is None and not condition():
        time.sleep(0.01)
    process.send_signal(number)
    told = process.communicate()[1]
    return process.returncode, told


def run_command(arguments, told):
    """In a process of its own: one stkit command, what it says in a file."""
    torch.set_num_threads(1)
    with open(told, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = cli.run(arguments)
    sys.exit(code)


def run_limited(arguments, told):
    """The same, with no room on the disk from the checkpoint of step 4 on."""
    save = checkpoint.save

    def limited(folder, step, *rest):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        return save(folder, step, *rest)

    checkpoint.save = limited
    run_command(arguments, told)


def killed_when(condition, arguments, told):
    """Start a command in a forked process and kill it as soon as a condition holds; returns its exit code."""
    process = CONTEXT.Process(target=run_command, args=(arguments, told))
    process.start()
    while process.is_alive() and not condition():
        time.sleep(0.01)
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_killed_five_times_it_writes_what_a_run_never_killed_writes(bench, reward, tmp_path, stage):
    own = STAGES[stage] | (reward if stage == "grpo" else {})
    torch.set_num_threads(1)
    whole = (sft if stage == "sft" else grpo)(
        bench, "tiny-untrained", out=tmp_path / "whole", steps=STEPS, overrides=own, progress=False
    )
    arguments, out = command(stage, bench, tmp_path / "killed", own), tmp_path / "killed"
    draws, killed = random.Random(stage), 0

    def rows():
        return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0

    for at in sorted(draws.sample(range(1, STEPS), KILLS)):
        moment = time.monotonic() + draws.random() * 0.2

        def due(at=at, moment=moment):
            return rows() >= at and time.monotonic() > moment

        killed += killed_when(due, arguments[3:], tmp_path / "told.txt") == -signal.SIGKILL
    assert killed == KILLS
    last = tmp_path / "last.txt"
    assert killed_when(lambda: False, arguments[3:], last) == 0, last.read_text()
    assert metrics(out) == metrics(whole.out)
    assert any("resumed_from_step" in row for row in lines(out / "metrics.jsonl"))
    assert "resumed from step" in last.read_text()
    if stage == "grpo":
        assert lines(out / "rollouts.jsonl") == lines(whole.out / "rollouts.jsonl")
    first, second = (load_model(p / "model").model.state_dict() for p in (whole.out, out))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize(
    "own", [{"lora.rank": 4, "train.tower": False}, {"train.optimizer": "adamw_8bit", "train.schedule": "linear"}]
)
def test_lora_and_8_bit_optimisers_resume_to_the_bit_too(bench, tmp_path, monkeypatch, own):
    own = SFT | own
    whole = sft(bench, "tiny-untrained", out=tmp_path / "whole", steps=4, overrides=own, progress=False)
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        sft(bench, "tiny-untrained", out=tmp_path / "stopped", steps=4, overrides=own, progress=False)
    monkeypatch.undo()
    again = sft(bench, "tiny-untrained", out=tmp_path / "stopped", steps=4, overrides=own, progress=False)
    assert metrics(again.out) == metrics(whole.out)
    assert [row.get("resumed_from_step") for row in lines(again.out / "metrics.jsonl")] == [None, None, 2, None]


def stop_at(monkeypatch, step):
    """As if the process ended while this step was computed."""
    learn = Loop.learn

    def once(self, *arguments):
        if self.step + 1 == step:
            raise KeyboardInterrupt
        return learn(self, *arguments)

    monkeypatch.setattr(Loop, "learn", once)


def test_ctrl_c_saves_a_checkpoint_and_exits_with_130(bench, tmp_path):
    out = tmp_path / "run"
    own = SFT | {"train.save_every": 100}
    code, told = run_until(
        lambda: (out / "metrics.jsonl").exists(), command("sft", bench, out, own, 200), signal.SIGINT
    )
    assert code == 130 and "stopping after this update" in told and "Traceback" not in told
    done = len(metrics(out))
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{done:06d}"]


def test_the_last_checkpoints_are_kept_and_a_finished_run_is_not_run_again(bench, tmp_path):
    out = tmp_path / "run"
    sft(bench, "tiny-untrained", out=out, steps=6, overrides=SFT | {"train.keep": 2}, progress=False)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    before = (out / "metrics.jsonl").read_text()
    sft(bench, "tiny-untrained", out=out, steps=6, overrides=SFT | {"train.keep": 2}, progress=False)
    assert (out / "metrics.jsonl").read_text() == before


def test_another_runs_folder_is_refused_with_the_difference(bench, tmp_path):
    sft(bench, "tiny-untrained", out=tmp_path / "run", steps=2, overrides=SFT, progress=False)
    with pytest.raises(StkitError, match=r"made with other settings \(settings.train.lr: 0.001 -> 0.01\)"):
        sft(bench, "tiny-untrained", out=tmp_path / "run", steps=2, overrides=SFT | {"train.lr": 0.01}, progress=False)
    with pytest.raises(StkitError, match="stage: 'sft' -> 'grpo'"):
        grpo(
            bench, "tiny-untrained", out=tmp_path / "run", steps=2, progress=False,
            overrides=GRPO | {"rewards.correct": 1},
        )  # fmt: skip
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(StkitError, match="is not empty"):
        sft(bench, "tiny-untrained", out=tmp_path / "other", steps=2, overrides=SFT, progress=False)


def test_a_benchmark_that_changed_is_refused_and_named(tmp_path):
    bench = write_bench(tmp_path / "bench")
    sft(bench, "tiny-untrained", out=tmp_path / "run", steps=2, overrides=SFT, progress=False)
    edit_row(bench / "questions.jsonl", 0, question="Another one?")
    with pytest.raises(
        StkitError, match=r"changed since the run in .* was started \(a-direction-forward\): choose another --out"
    ):
        sft(bench, "tiny-untrained", out=tmp_path / "run", steps=2, overrides=SFT, progress=False)


def test_a_benchmark_without_its_videos_is_refused(tmp_path):
    bench = write_bench(tmp_path / "bench")
    (bench / "videos" / "b.mp4").unlink()
    with pytest.raises(
        StkitError,
        match=r"1 of 3 clips have no file in videos/ \(first 'b.mp4'\).*nothing is learned without the video",
    ):
        sft(bench, "tiny-untrained", out=tmp_path / "run", overrides=SFT, progress=False)


def test_a_video_that_cannot_be_read_stops_the_run(tmp_path):
    """A sibling project's trainer retried without the video, and said nothing."""
    bench = write_bench(tmp_path / "bench")
    (bench / "videos" / "a.mp4").write_bytes(b"no video")
    with pytest.raises(StkitError, match="a.mp4"):
        sft(bench, "tiny-untrained", out=tmp_path / "run", steps=3, overrides=SFT, progress=False)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_questions(bench, tmp_path, monkeypatch):
    own = SFT | {"train.save_every": 1}
    real, count = sft_module.tree_logps, []

    def poisoned(*arguments, **options):
        found = real(*arguments, **options)
        count.append(1)
        return found._replace(log_probs=found.log_probs * float("nan")) if len(count) == 3 else found

    monkeypatch.setattr(sft_module, "tree_logps", poisoned)
    with pytest.raises(
        StkitError, match=r"step 3 of 6: the loss is nan on question [abc]-.*\(the last checkpoint is .*step-000002\)"
    ):
        sft(bench, "tiny-untrained", out=tmp_path / "run", steps=6, overrides=own, progress=False)
    assert len(metrics(tmp_path / "run")) == 2
    monkeypatch.undo()
    assert len(sft(bench, "tiny-untrained", out=tmp_path / "run", steps=6, overrides=own, progress=False).metrics) == 6


def test_when_memory_runs_out_half_as_much_is_computed_at_once_and_it_is_recorded(bench, tmp_path, monkeypatch, capsys):
    own = SFT | {"train.max_tokens": 300}
    whole = sft(bench, "tiny-untrained", out=tmp_path / "whole", steps=3, overrides=own, progress=False)
    real, calls = sft_module.tree_logps, []

    def short(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OutOfMemory("out of memory: a test")
        return real(*arguments, **options)

    monkeypatch.setattr(sft_module, "tree_logps", short)
    run = sft(bench, "tiny-untrained", out=tmp_path / "run", steps=3, overrides=own, progress=False)
    assert "memory ran out: going on with train.max_tokens=150" in capsys.readouterr().err
    rows = lines(run.out / "metrics.jsonl")
    assert [row.get("max_tokens") for row in rows] == [None, 150, 150]
    assert [r["loss"] for r in rows] == pytest.approx(whole.metrics["loss"].tolist(), rel=1e-5)
    calls.clear()
    monkeypatch.setattr(
        sft_module, "tree_logps", lambda *a, **k: (_ for _ in ()).throw(OutOfMemory("out of memory: again"))
    )
    with pytest.raises(OutOfMemory, match="again"):
        sft(bench, "tiny-untrained", out=tmp_path / "twice", steps=3, overrides=own, progress=False)


def test_a_full_disk_while_a_checkpoint_is_written_leaves_the_one_before(bench, tmp_path):
    """RLIMIT_FSIZE stands for the full disk: no file may grow beyond it."""
    out, own = tmp_path / "run", SFT | {"train.save_every": 2}
    sft(bench, "tiny-untrained", out=tmp_path / "size", steps=2, overrides=own, progress=False)
    process = CONTEXT.Process(target=run_limited, args=(command("sft", bench, out, own, 4)[3:], tmp_path / "told.txt"))
    process.start()
    process.join()
    told = (tmp_path / "told.txt").read_text()
    assert process.exitcode == 1 and "checkpoint of step 4 was not written, earlier ones are whole" in told, told
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000002"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    again = sft(bench, "tiny-untrained", out=out, steps=4, overrides=own, progress=False)
    whole = sft(bench, "tiny-untrained", out=tmp_path / "whole", steps=4, overrides=own, progress=False)
    assert [r["step"] for r in metrics(again.out)] == [1, 2, 3, 4] and metrics(whole.out)[-1]["step"] == 4


def test_a_full_disk_at_a_row_is_one_clear_error_and_a_re_run_goes_on(bench, tmp_path, monkeypatch):
    real = loop.append_jsonl

    def full(path, row):
        if row["step"] == 3:
            raise OSError(errno.ENOSPC, "no space", str(path))
        real(path, row)

    monkeypatch.setattr(loop, "append_jsonl", full)
    with pytest.raises(StkitError, match="metrics.jsonl: the disk is full.*the last checkpoint is .*step-000002"):
        sft(bench, "tiny-untrained", out=tmp_path / "run", steps=4, overrides=SFT, progress=False)
    monkeypatch.undo()
    assert len(sft(bench, "tiny-untrained", out=tmp_path / "run", steps=4, overrides=SFT, progress=False).metrics) == 4


def test_an_adapter_from_another_base_is_refused(bench, tmp_path):
    lora = {"lora.rank": 2, "train.tower": False, "train.projector": False}
    run = sft(bench, "tiny-untrained", out=tmp_path / "lora", steps=2, overrides=SFT | lora, progress=False)
    (run.model / "adapter_config.json").write_text(
        (run.model / "adapter_config.json").read_text().replace('"tiny-untrained"', '"Qwen/Other"')
    )
    with pytest.raises(StkitError, match="was made for Qwen/Other, not for tiny-untrained"):
        sft(
            bench, "tiny-untrained", out=tmp_path / "run", steps=2, progress=False,
            overrides=SFT | {"model.adapter": str(run.model)},
        )  # fmt: skip


def test_a_start_adapter_is_part_of_the_reference(bench, tmp_path):
    lora = {"lora.rank": 2, "train.tower": False, "train.projector": False, "train.lr": 0.01}
    first = sft(bench, "tiny-untrained", out=tmp_path / "lora", steps=2, overrides=SFT | lora, progress=False)
    own = GRPO | {"model.adapter": str(first.model), "rewards.length": 1.0}
    row = metrics(grpo(bench, "tiny-untrained", out=tmp_path / "run", steps=1, overrides=own, progress=False).out)[0]
    assert row["kl"] == pytest.approx(0, abs=1e-6) and row["ratio"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--set", "train.learning_rte=1"], "train.lr"),
        (["--set", "train.lr=0"], "train.lr=0.0: give a number above 0"),
        (["--set", "train.lr=.nan"], "train.lr=nan"),
        (["--set", "grpo.group=1"], "a group of one has no advantage"),
        (["--preset", "tinny"], "preset 'tinny' is unknown"),
        (["--set", "lora.dropout=0.1"], "lora.dropout"),
        (["--set", "train.lr"], "give a key and a value such as train.lr=1e-5"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(bench, tmp_path, capsys, arguments, said):
    assert cli.run(["grpo", str(bench), "--out", str(tmp_path / "run"), *arguments]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_run_reads_back_as_tables(bench, tmp_path, capsys):
    out = tmp_path / "run"
    own = [text for k, v in SFT.items() for text in ("--set", f"{k}={'null' if v is None else v}")]
    assert cli.run(["sft", str(bench), "--out", str(out), "--steps", "2", "--seed", "3", "--json", *own]) == 0
    told = json.loads(capsys.readouterr().out)
    run = open_run(out)
    assert told["steps"] == 2 == len(run.metrics) and told["loss"]["last"] == run.metrics["loss"].iloc[-1]
    assert run.config["settings"]["train"]["seed"] == 3 and run.config["versions"]["torch"] and run.config["command"]
    assert told["result"] == str(out / "model")
    with pytest.raises(StkitError, match="no config.yaml in it"):
        open_run(tmp_path)
