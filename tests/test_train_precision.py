"""Precisions, schedules and optimisers of the loop; what the planner says stands in the run's folder."""

import math

import pytest
import torch
from benchmaker import lines, write_bench
from trainmaker import metrics

from stkit import grpo, load_model, open_run, sft
from stkit.runs import read_yaml
from stkit.runtime import BadUse, StkitError
from stkit.train import loop
from stkit.train.loop import make_optimizer, pick_precision, rate_factor
from stkit.train.policy import make_policy
from stkit.train.reading import load_settings

QUICK = {"data.split": None, "sft.form": "answer", "data.tasks": ["direction"]}
LORA = {"lora.rank": 4, "train.tower": False, "train.projector": False}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("precision") / "bench")


@pytest.mark.parametrize("schedule, wanted", [
    ("constant", [0.5, 1, 1, 1, 1, 1]),
    ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
    ("cosine", [0.5, 1, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
])  # fmt: skip
def test_the_rate_rises_and_falls_as_its_schedule_says(schedule, wanted):
    assert [rate_factor(schedule, step, 6, 2) for step in range(6)] == pytest.approx(wanted)


def test_the_rate_that_was_used_is_written_down(bench, tmp_path):
    own = QUICK | {"train.schedule": "linear", "train.warmup": 0.25, "train.lr": 0.01}
    run = sft(bench, "tiny-untrained", out=tmp_path / "run", steps=4, overrides=own, progress=False)
    assert run.metrics["lr"].tolist() == pytest.approx([0.01, 0.01, 0.01 * 2 / 3, 0.01 / 3])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("lora", [{}, LORA])
def test_half_precision_trains_float32_weights_near_to_float32(bench, tmp_path, precision, lora):
    """fp16's gradients go through a scaler, as on a T4."""
    whole = sft(bench, "tiny-untrained", out=tmp_path / "whole", steps=3, overrides=QUICK | lora, progress=False)
    half = sft(
        bench, "tiny-untrained", out=tmp_path / "half", steps=8, progress=False,
        overrides=QUICK | lora | {"train.precision": precision},
    )  # fmt: skip
    rows, taken = (
        lines(half.out / "metrics.jsonl"),
        [row["grad_norm"] is not None for row in lines(half.out / "metrics.jsonl")],
    )
    assert (
        rows[0]["loss"] == pytest.approx(whole.metrics["loss"][0], rel=0.01)
        and rows[0]["loss"] != whole.metrics["loss"][0]
    )
    assert taken[-1] and rows[-1]["loss"] < rows[0]["loss"] - 0.1
    if precision == "bf16":
        assert all(taken) and "scale" not in rows[0]
    else:  # the first scale is too large by design: those steps are left out, and the scale is halved
        assert [row["scale"] for row in rows] == [2.0 ** (16 - sum(not t for t in taken[: k + 1])) for k in range(8)]
    assert half.config["why"]["precision"] == f"{precision}: asked for"
    kinds = {p.dtype for p in load_model(half.model if not lora else "tiny-untrained").model.parameters()}
    assert kinds == {torch.float32}


def test_fp16_resumes_with_its_scaler(bench, tmp_path):
    own = QUICK | {"train.precision": "fp16", "train.save_every": 1}
    whole = sft(bench, "tiny-untrained", out=tmp_path / "whole", steps=3, overrides=own, progress=False)
    (tmp_path / "part").mkdir()
    part = sft(bench, "tiny-untrained", out=tmp_path / "part" / "run", steps=3, overrides=own, progress=False)
    for folder in sorted((part.out / "checkpoints").iterdir())[1:]:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        folder.rmdir()
    again = sft(bench, "tiny-untrained", out=part.out, steps=3, overrides=own, progress=False)
    assert metrics(again.out) == metrics(whole.out)


@pytest.mark.parametrize("precision", ["bf16"])
def test_grpo_in_half_precision_samples_and_learns_in_the_same(bench, tmp_path, precision):
    own = {"data.split": None, "data.tasks": ["direction"], "grpo.group": 4, "grpo.max_new_tokens": 6, "train.precision": precision,
           "rewards.correct": 0, "rewards.format": 0, "rewards.length": 0}  # fmt: skip
    run = grpo(
        bench,
        "tiny-untrained",
        out=tmp_path / "run",
        steps=1,
        overrides=own,
        rewards={"n": lambda rs: [len(r.text) % 3 for r in rs]},
        progress=False,
    )
    assert run.metrics["ratio"][0] == pytest.approx(1, abs=0.05)


def test_precision_follows_the_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert pick_precision("auto", "cuda")[0] == "fp16" and "T4" in pick_precision("auto", "cuda")[1]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert pick_precision("auto", "cuda:1")[0] == "bf16"
    assert pick_precision("auto", "cpu")[0] == "no" and pick_precision("bf16", "cpu") == ("bf16", "asked for")


def test_weights_in_float16_are_not_trained_as_they_are(bench, tmp_path):
    with pytest.raises(BadUse, match="float16 weights loses small steps: set model.dtype=float32"):
        sft(
            bench, "tiny-untrained", out=tmp_path / "run", steps=1, progress=False,
            overrides=QUICK | {"model.dtype": "float16"},
        )  # fmt: skip


def test_matrices_decay_and_vectors_do_not():
    policy = make_policy("tiny-untrained", load_settings("tiny", "sft"), reference=False)
    optimizer = make_optimizer(policy.trainable, load_settings("tiny", "sft", {"train.weight_decay": 0.1}))
    decayed, kept = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in kept["params"])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_both_optimisers_lower_the_loss(bench, tmp_path, optimizer):
    run = sft(
        bench, "tiny-untrained", out=tmp_path / "run", steps=4, progress=False,
        overrides=QUICK | {"train.optimizer": optimizer},
    )  # fmt: skip
    assert run.metrics["loss"].iloc[-1] < run.metrics["loss"].iloc[0] - 0.5


def test_nf4_weights_stay_and_the_adapter_learns(bench, tmp_path):
    own = QUICK | LORA | {"model.four_bit": True, "model.dtype": "auto", "train.lr": 0.01, "train.checkpointing": True}
    run = sft(bench, "tiny-untrained", out=tmp_path / "run", steps=4, overrides=own, progress=False)
    assert run.config["model"]["four_bit"] is True and run.metrics["loss"].iloc[-1] < run.metrics["loss"].iloc[0] - 0.05
    with pytest.raises(BadUse, match="lora.rank=0 trains all weights, (which )?4-bit ones cannot be"):
        sft(
            bench, "tiny-untrained", out=tmp_path / "full", steps=1, progress=False,
            overrides=QUICK | {"model.four_bit": True},
        )  # fmt: skip
    with pytest.raises(StkitError, match="merging into 4-bit weights would round it"):
        grpo(
            bench,
            model=tmp_path / "run",
            out=tmp_path / "g",
            steps=1,
            overrides=LORA | {"data.split": None, "model.four_bit": True},
            progress=False,
        )


def test_a_run_folder_is_a_model(bench, tmp_path):
    full = sft(bench, "tiny-untrained", out=tmp_path / "full", steps=1, overrides=QUICK, progress=False)
    lora = sft(bench, "tiny-untrained", out=tmp_path / "lora", steps=1, overrides=QUICK | LORA, progress=False)
    assert load_model(full.out).record["name"] == str((full.out / "model").resolve())
    assert load_model(lora.out).record["adapter"] == str((lora.out / "adapter").resolve())
    (lora.out / "adapter").rename(lora.out / "gone")
    with pytest.raises(StkitError, match="this training run is not finished"):
        load_model(lora.out)


def test_what_is_needed_of_memory_is_said_written_down_and_refused(bench, tmp_path, monkeypatch, capsys):
    run = sft(bench, "tiny-untrained", out=tmp_path / "run", steps=1, overrides=QUICK, progress=False)
    told = read_yaml(run.out / "config.yaml")["plan"]
    assert told["fits"] and told["peak"] < told["limit"] and "memory: about" in capsys.readouterr().err
    monkeypatch.setattr("stkit.train.plan.free_bytes", lambda device: 50e6)
    with pytest.raises(StkitError, match=r"tiny-untrained would need \d+ MB .* there are 50 MB: .*(train|video)\."):
        sft(bench, "tiny-untrained", out=tmp_path / "small", steps=1, overrides=QUICK, progress=False)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_said(bench, tmp_path, monkeypatch, tracker):
    monkeypatch.setattr("stkit.train.processes.find_spec", lambda name: None)
    with pytest.raises(
        StkitError, match=f"train.tracker={tracker}: it is not installed: pip install {tracker}, or use none"
    ):
        sft(
            bench, "tiny-untrained", out=tmp_path / "run", steps=1, progress=False,
            overrides=QUICK | {"train.tracker": tracker},
        )  # fmt: skip


def test_a_tracker_gets_the_rows(bench, tmp_path, monkeypatch):
    from accelerate import Accelerator

    rows = []
    monkeypatch.setattr("stkit.train.processes.find_spec", lambda name: name)
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config=None: rows.append((name, config)))
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step=None: rows.append((step, values)))
    sft(
        bench, "tiny-untrained", out=tmp_path / "run", steps=2, progress=False,
        overrides=QUICK | {"train.tracker": "wandb"},
    )  # fmt: skip
    assert rows[0][0] == "stkit" and [step for step, _ in rows[1:]] == [1, 2] and rows[1][1]["loss"] > 0


def test_what_ran_is_in_the_folder(bench, tmp_path):
    run = open_run(sft(bench, "tiny-untrained", out=tmp_path / "run", steps=1, overrides=QUICK, progress=False).out)
    assert run.config["model"]["tree_attention"] == "cpu-flash" and run.config["shown"]["sampling"] == "uniform"
    assert {
        "stage",
        "settings",
        "versions",
        "benchmark",
        "command",
        "platform",
        "threads",
        "processes",
    } <= run.config.keys()
    assert loop.LOGS[0] == "metrics.jsonl"
