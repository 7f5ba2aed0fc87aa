"""Sharded weights: each process has its part, and what comes out is what one process writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmaker import lines, write_bench
from safetensors.torch import load_file
from teammaker import run_team
from trainmaker import metrics

import stkit
from stkit import grpo, sft
from stkit.runtime import BadUse, StkitError
from stkit.train.policy import make_policy
from stkit.train.reading import load_settings
from stkit.vlm.logps import tree_logps
from stkit.vlm.tree import Tree
from stkit.vlm.views import base_model

FILE = Path(stkit.__file__).parent / "train" / "accelerate" / "fsdp.yaml"
QUICK = {"data.split": None, "data.tasks": ["direction"], "train.batch": 3, "train.save_every": 2}
SFT = QUICK | {"sft.form": "answer"}
GRPO = QUICK | {"grpo.group": 4, "grpo.max_new_tokens": 6, "rewards.correct": 0, "rewards.format": 0}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("shards") / "bench")


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    file = tmp_path_factory.mktemp("reward") / "mine.py"
    file.write_text("def parity(rollouts):\n    return [len(r.text) % 3 for r in rollouts]\n")
    return {f"rewards.{file}:parity": 1.0}


@pytest.fixture(scope="module")
def sharded(bench, tmp_path_factory):
    """SFT of all weights in two processes, by the command that a user gives."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    texts = [text for k, v in SFT.items() for text in ("--set", f"{k}={json.dumps(v)}")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILE), "-m", "stkit"]
    own = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, "sft", str(bench), "--model", "tiny-untrained", "--steps", "3", "--out", str(out), *texts]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def as_launched(function, *args, **named):
    """What one of two processes of the launcher does under the file."""
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}
    function(*args, **named, progress=False)


def train(stage, bench, out, own):
    as_launched({"sft": sft, "grpo": grpo}[stage], bench, "tiny-untrained", out=out, steps=3, overrides=own)


def assert_same(one, two):
    """The norm is less exact: torch sums it up in float32, in one process more of it at once."""
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name, value in a.items():
            near = 3e-5 if name == "grad_norm" else 1e-5
            assert b[name] == (value if value is None else pytest.approx(value, rel=near, abs=1e-5)), name


def assert_team(told):
    assert [code for code, _ in told] == [0, 0], told


def test_two_sharded_processes_run_sft_as_one_does(bench, sharded, tmp_path):
    one = sft(bench, "tiny-untrained", out=tmp_path / "one", steps=3, overrides=SFT, progress=False)
    assert_same(metrics(one.out), metrics(sharded))


def test_its_result_is_a_whole_folder_that_transformers_loads(sharded):
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(sharded / "model", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration" == model.config.architectures[0]
    last = load_file(sharded / "checkpoints" / "step-000003" / "weights" / "model.safetensors")
    untrained = stkit.load_model("tiny-untrained", device="cpu").model.state_dict()
    for name, value in model.state_dict().items():
        assert name not in last or torch.equal(value, last[name]), name
        assert value.shape == untrained[name].shape and not torch.equal(value, untrained[name]), name


def test_a_sharded_run_that_was_stopped_goes_on_to_the_bit(bench, sharded, tmp_path):
    again = shutil.copytree(sharded, tmp_path / "run")
    shutil.rmtree(again / "checkpoints" / "step-000003")
    shutil.rmtree(again / "model")
    assert_team(run_team(tmp_path / "team", train, "sft", bench, again, SFT))
    assert lines(again / "metrics.jsonl")[2]["resumed_from_step"] == 2
    assert metrics(again) == metrics(sharded)
    weights = [folder / "model" / "model.safetensors" for folder in (sharded, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_process_without_a_clip_of_recorded_rollouts_computes_along(bench, reward, tmp_path):
    own = GRPO | reward
    first = grpo(bench, "tiny-untrained", out=tmp_path / "first", steps=3, overrides=own, progress=False)
    rows = lines(first.out / "rollouts.jsonl")
    clip = rows[0]["id"].rpartition("/")[0] or rows[0]["id"][:6]
    rows = [row for row in rows if row["step"] > 1 or row["id"].startswith(clip)]
    for row in rows:
        if row["step"] == 2:  # those of a server, say: the policy's own are computed before the update
            del row["log_probs"]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own |= {"grpo.recorded": str(tmp_path / "few.jsonl")}
    one = grpo(bench, "tiny-untrained", out=tmp_path / "one", steps=3, overrides=own, progress=False)
    assert [row["clips"] for row in metrics(one.out)] == [1, 3, 3] and metrics(one.out)[2]["kl"] > 0
    assert_team(run_team(tmp_path / "team", train, "grpo", bench, tmp_path / "two", own))
    assert_same(metrics(one.out), metrics(tmp_path / "two"))


def test_with_lora_sharded_processes_draw_and_learn_and_score_as_one_does(bench, reward, tmp_path):
    own = GRPO | reward | {"lora.rank": 4, "train.checkpointing": True, "data.split": "train", "train.eval_every": 3,
                           "train.eval_split": "test", "train.eval_tokens": 4, "train.tower": False}  # fmt: skip
    one = grpo(bench, "tiny-untrained", out=tmp_path / "one", steps=3, overrides=own, progress=False)
    assert_team(run_team(tmp_path / "team", train, "grpo", bench, tmp_path / "two", own))
    assert_same(metrics(one.out), metrics(tmp_path / "two"))
    both = one.out, tmp_path / "two"
    ids = [[(row["id"], row["ids"]) for row in lines(folder / "rollouts.jsonl")] for folder in both]
    assert ids[0] == ids[1] and lines(both[0] / "scores.jsonl") == lines(both[1] / "scores.jsonl")
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in both]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=1e-3, atol=1e-4)


def look_into(folder, bfloat16):
    """Write down how much of each parameter this process has, before, within and after it has all of them."""
    from torch.distributed import get_rank, init_process_group
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    init_process_group("gloo")
    rank = get_rank()
    settings = load_settings("tiny", "sft", {"lora.rank": 4, "model.dtype": "bfloat16"} if bfloat16 else {})
    policy = make_policy("tiny-untrained", settings, True, "cpu", shards=2)

    def held():
        found = {}
        for part, model in (("model", policy.model), *([("copy", policy.frozen)] if policy.frozen else [])):
            for name, p in model.named_parameters():
                local = p.to_local() if isinstance(p, DTensor) else p
                found[f"{part}.{name}"] = [isinstance(p, DTensor), local.numel(), p.numel(), len(p)]
        return found

    states = [held()]
    with policy.whole():
        states.append(held())
    states.append(held())
    (folder / f"held-{rank}.json").write_text(json.dumps(states))
    tree = Tree((0,))
    tree.branch((1, 2), 1.0)
    if rank == 0:  # where it began cannot be searched for without the other process
        norm = base_model(policy.model).model.language_model.norm
        norm.register_forward_hook(lambda module, given, out: out * float("nan"))
        with pytest.raises(StkitError, match="not finite: train in one process"):
            tree_logps(policy.model, tree)
    else:
        tree_logps(policy.model, tree)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_each_process_has_half_of_every_parameter_and_all_only_for_a_while(tmp_path, bfloat16):
    assert_team(run_team(tmp_path, look_into, tmp_path, bfloat16))
    (before, within, after), other = (json.loads((tmp_path / f"held-{k}.json").read_text()) for k in (0, 1))
    assert before == after and (bfloat16 or any(name.startswith("copy.") for name in before))
    total = 0
    for name, (is_part, mine, whole, rows) in before.items():
        theirs = other[0][name]
        assert is_part and mine + theirs[1] == whole and mine - theirs[1] in (0, whole // rows), name  # an odd row more
        assert within[name] == [name.startswith("copy."), mine if name.startswith("copy.") else whole, whole, rows]
        total += whole
    assert sum(mine for _, mine, _, _ in before.values()) == pytest.approx(total / 2, rel=0.01)


@pytest.mark.parametrize("own, fix", [
    ({"model.four_bit": True, "lora.rank": 4}, "4-bit weights cannot be sharded: set model.four_bit=false"),
    ({"train.optimizer": "adamw_8bit"}, "train.optimizer=adamw_8bit cannot be sharded: use adamw"),
])  # fmt: skip
def test_what_cannot_be_sharded_is_refused_before_a_model_is_loaded(own, fix):
    with pytest.raises(BadUse, match=fix):
        make_policy("no/such-model", load_settings("tiny", "sft", own), False, "cpu", shards=2)


def test_a_model_that_was_loaded_in_4_bits_is_refused():
    loaded = stkit.load_model("tiny-untrained", device="cpu")
    loaded = loaded._replace(record=loaded.record | {"four_bit": True})
    with pytest.raises(BadUse, match="model.four_bit=false"):
        make_policy(loaded, load_settings("tiny", "sft", {"lora.rank": 4}), False, "cpu", shards=2)


def test_deepspeed_is_refused_with_the_file_that_does_it(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(StkitError, match="DEEPSPEED: .* launch with stkit/train/accelerate/fsdp.yaml"):
        sft(bench, "tiny-untrained", out=tmp_path / "run", steps=1, overrides=SFT, progress=False)
