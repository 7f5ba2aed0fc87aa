"""The memory planner: what it predicts is what is measured, what it chooses fits, and it names what to change."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import save_small
from plan_probe import ALL, TEXT, cases

from stkit.runtime import BadUse, StkitError
from stkit.train import needs
from stkit.train.anatomy import config_names, read_anatomy
from stkit.train.memory import Compute, trainable, weight_bytes
from stkit.train.plan import check_plan, plan
from stkit.train.policy import make_policy
from stkit.train.reading import load_settings
from stkit.train.settings import GrpoSettings, LoraSettings, Settings, TrainSettings
from stkit.vlm import tiny
from stkit.vlm.load import FAMILIES, load_model

CONFIGS = Path(needs.__file__).parents[1] / "data" / "configs"
PUBLISHED = {  # weights, as the hub's pages and indices give them
    "Qwen2-VL-2B-Instruct": 2_208_985_600, "Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976, "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen3-VL-2B-Instruct": 2_127_532_032, "Qwen3-VL-4B-Instruct": 4_437_815_808, "Qwen3-VL-8B-Instruct": 8_767_123_696,
}  # fmt: skip
FIRST_HALF = "bfloat16, LoRA, reference"
GPU = {"model.dtype": "auto", "lora.rank": 16, "train.tower": False, "train.projector": False}


@pytest.fixture(scope="module")
def measured() -> dict:
    """What the probe measured, by case. Freed memory goes back to the system at once there, so that it isn't there."""
    own = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(folder / "plan_probe.py")], capture_output=True, text=True, timeout=600,
        env=os.environ | own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder.parent), *sys.path])},
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == len(cases()), done.stderr[-3000:]
    return {row.pop("name"): row for row in rows}


def predicted(name: str):
    """The plan of a case: what its probe does, told in the planner's words."""
    config, dtype, settings, stage, grid = cases()[name]
    tokens = grid[0] * grid[1] * grid[2] // config.vision_config.spatial_merge_size**2
    settings = replace(settings, model=replace(settings.model, dtype=dtype, device="cpu"))
    settings = replace(settings, grpo=replace(settings.grpo, group=4, max_new_tokens=24))
    return plan(config, settings, stage, video_tokens=tokens, text_tokens=TEXT, questions=10**6)


def total(found, *phases: str) -> float:
    return max(sum(found.phases[phase].values()) for phase in phases)


@pytest.mark.parametrize("name", cases())
def test_the_peak_of_an_update_is_predicted(measured, name):
    found = predicted(name)
    assert found.peak == pytest.approx(measured[name]["live"], rel=0.15)


@pytest.mark.parametrize("name", [name for name in cases() if name != FIRST_HALF])
def test_the_process_grows_by_what_is_predicted(measured, name):
    assert predicted(name).peak == pytest.approx(measured[name]["resident"], rel=0.15)


def test_the_first_case_in_bfloat16_leaves_kernels_behind_that_are_no_tensors(measured):
    """oneDNN compiles kernels for half precision and keeps them: a constant, which later cases don't pay again."""
    row = measured[FIRST_HALF]
    kernels = row["resident_rollouts"] - row["live_rollouts"]
    assert row["resident"] - kernels == pytest.approx(predicted(FIRST_HALF).peak, rel=0.15)


@pytest.mark.parametrize("name", ["qwen2_vl, LoRA everywhere, reference", "qwen3_vl, all weights, reference"])
def test_the_peak_of_rollouts_is_predicted(measured, name):
    settings = cases()[name][2]
    config, grid = cases()[name][0], cases()[name][4]
    tokens = grid[0] * grid[1] * grid[2] // config.vision_config.spatial_merge_size**2
    settings = replace(
        settings, model=replace(settings.model, dtype="float32", device="cpu"),
        grpo=GrpoSettings(group=4, max_new_tokens=24),
    )  # fmt: skip
    found = plan(config, settings, "grpo", video_tokens=tokens, text_tokens=TEXT, questions=1)
    assert total(found, "tower", "rollouts") == pytest.approx(measured[name]["live_rollouts"], rel=0.15)
    assert total(found, "tower", "rollouts") == pytest.approx(measured[name]["resident_rollouts"], rel=0.15)


@pytest.mark.parametrize("name", config_names())
def test_a_published_model_has_the_weights_that_transformers_gives_it(name):
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    assert raw.pop("source")["url"] == f"https://huggingface.co/Qwen/{name}/blob/main/config.json"
    kind = FAMILIES[raw["model_type"]][0]
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(raw))
    anatomy, source = read_anatomy(f"Qwen/{name}")
    assert anatomy.parameters == sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    assert name in source
    visual = {True: 0, False: 0}
    for part, p in model.model.visual.named_parameters():
        visual["merger" in part] += p.numel()
    assert (anatomy.part("tower"), anatomy.part("projector")) == (visual[False], visual[True])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    tokenizer = load_model("tiny-untrained").processor.tokenizer
    made = {f: save_small(f, tokenizer, tmp_path_factory.mktemp(f)) for f in ("qwen2_vl", "qwen3_vl")}
    return made | {"qwen2_5_vl": "tiny-untrained"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("vision", [False, True])
def test_what_learns_is_counted_to_the_weight(folders, family, rank, vision):
    train = TrainSettings(tower=vision, projector=vision)
    settings = Settings(lora=LoraSettings(rank=rank, targets=ALL), train=train)
    policy = make_policy(folders[family], settings, reference=False)
    anatomy, _ = read_anatomy(folders[family])
    assert trainable(anatomy, settings) == sum(p.numel() for p in policy.trainable)


def test_weights_in_nf4_take_what_bitsandbytes_makes_of_them():
    model = load_model("tiny-untrained", four_bit=True, device="cpu").model
    states = [m.weight.quant_state for m in model.modules() if type(m).__name__ == "Linear4bit"]
    scales = sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    real = scales + sum(p.nbytes for p in model.parameters())
    assert weight_bytes(read_anatomy("tiny")[0], Compute(2, 2, four_bit=True)) == pytest.approx(real, rel=1e-3)


def test_a_7b_in_nf4_weighs_what_its_matrices_and_embeddings_do():
    found = plan("Qwen/Qwen2.5-VL-7B-Instruct", load_settings("tiny", "grpo", GPU), "grpo", gpu_gb=24)
    embeddings = 2 * 152_064 * 3584
    assert found.parts["weights"] == pytest.approx((8.292e9 - embeddings) * 0.516 + embeddings * 2, rel=0.01)
    assert found.parts["adapter"] == 28 * 4 * 16 * ((3584 + 3584) * 2 + (3584 + 512) * 2)
    assert found.parts["optimizer"] == 2 * found.parts["adapter"]


def test_all_weights_with_a_reference_are_held_twice_and_states_once_more_each():
    found = plan("tiny", load_settings("tiny", "grpo", {"train.optimizer": "adamw"}), "grpo")
    parts, size = found.parts, 4 * 2_996_224
    assert parts["weights"] == parts["reference"] == parts["gradients"] == size
    assert parts["optimizer"] == 2 * size
    assert "reference" not in plan("tiny", load_settings("tiny", "grpo", {"grpo.beta": 0}), "grpo").parts
    assert "reference" not in plan("tiny", load_settings("tiny", "sft"), "sft").parts
    small = plan("tiny", load_settings("tiny", "sft", {"train.optimizer": "adamw_8bit"}), "sft")
    assert small.parts["optimizer"] == pytest.approx(2.996e6 * 2, rel=0.03)


def test_keys_and_values_are_those_of_a_prompt_once_and_of_each_rollout():
    own = load_settings("tiny", "grpo", {"grpo.max_new_tokens": 64})
    found = plan("tiny", own, "grpo", video_tokens=100, text_tokens=20, questions=1)
    a_token = 4 * 2 * 2 * 32 * 4  # layers, keys and values, their heads, numbers of a head, bytes
    assert found.phases["rollouts"]["kv"] == a_token * (120 + 8 * 64)


def test_what_is_chosen_fits_with_a_tenth_to_spare_and_twice_as_much_does_not():
    settings = load_settings("tiny", "grpo", GPU)
    found = plan("Qwen/Qwen2.5-VL-7B-Instruct", settings, "grpo", gpu_gb=24)
    chosen = found.chosen
    assert chosen["checkpointing"] and chosen["max_tokens"] % 256 == 0 and chosen["rollouts"] % settings.grpo.group == 0

    def peak(tokens, checkpointing):
        keys = {"train.max_tokens": tokens, "train.checkpointing": checkpointing}
        return plan(found.model, load_settings("tiny", "grpo", GPU | keys), "grpo", gpu_gb=24).peak

    assert peak(chosen["max_tokens"], True) == pytest.approx(chosen["peak"], abs=1) and chosen["peak"] <= 0.9 * 24e9
    assert peak(2 * chosen["max_tokens"], True) > 0.9 * 24e9
    assert peak(found.request.least, False) > 0.9 * 24e9
    assert f"train.max_tokens={chosen['max_tokens']}" in found.text()


def test_checkpointing_is_left_off_where_there_is_room_and_nothing_is_chosen_where_there_is_none():
    settings = load_settings("tiny", "sft", GPU)
    assert plan("Qwen3-VL-2B-Instruct", settings, "sft", gpu_gb=80).chosen["checkpointing"] is False
    none = plan("Qwen3-VL-8B-Instruct", settings, "sft", gpu_gb=4)
    assert none.chosen is None and "no max_tokens" in none.text()


@pytest.mark.parametrize(
    ("model", "gpu", "keys"),
    [
        ("Qwen2.5-VL-7B-Instruct", 24, {}),
        ("Qwen2.5-VL-7B-Instruct", 14, {"model.four_bit": False, "train.checkpointing": True}),
        ("Qwen3-VL-8B-Instruct", 40, {"lora.rank": 0, "model.four_bit": False, "train.checkpointing": True}),
        ("Qwen2.5-VL-3B-Instruct", 6, {"train.checkpointing": True, "video.frames": 64, "train.max_tokens": 32_768}),
        ("Qwen3-VL-8B-Instruct", 20, {"lora.rank": 0, "model.four_bit": False}),
    ],
)
def test_what_it_says_to_set_makes_it_fit(model, gpu, keys):
    keys = GPU | keys
    found = plan(model, load_settings("tiny", "grpo", keys), "grpo", gpu_gb=gpu)
    with pytest.raises(StkitError, match="would need .* there are") as caught:
        check_plan(found)
    said = str(caught.value).split(": set ")[1]
    first = said.split(" or ")[0]
    fixes = dict(re.findall(r"([a-z]+\.[a-z_]+)=([\w.]+)", first))
    assert fixes
    better = load_settings("tiny", "grpo", keys | {k: json.loads(v) for k, v in fixes.items()})
    check_plan(plan(model, better, "grpo", gpu_gb=gpu))


def test_what_helps_most_is_said_first():
    keys = GPU | {"model.four_bit": False, "train.checkpointing": False}
    with pytest.raises(StkitError) as caught:
        check_plan(plan("Qwen2.5-VL-3B-Instruct", load_settings("tiny", "sft", keys), "sft", gpu_gb=40))
    sizes = [float(size) for size in re.findall(r"\(([\d.]+) GB\)", str(caught.value))]
    assert len(sizes) >= 2 and sizes == sorted(sizes)
    assert "set train.checkpointing=true" in str(caught.value)


def test_a_model_too_large_for_a_card_is_refused_with_what_was_tried():
    with pytest.raises(StkitError, match="even with .*: take a smaller model or a larger device"):
        check_plan(plan("Qwen3-VL-8B-Instruct", load_settings("tiny", "grpo", GPU), "grpo", gpu_gb=3))


def test_fewer_tokens_than_a_prompt_with_its_group_are_refused():
    keys = GPU | {"train.max_tokens": 2048, "train.checkpointing": True, "grpo.max_new_tokens": 64}
    settings = load_settings("tiny", "grpo", keys)
    # 16 temporal patches of 360 * 420 // 28**2 tokens, 200 of text, 8 answers of 64
    refusal = f"max_tokens=2048 is less than the {16 * 192 + 200 + 8 * 64} tokens"
    guessed = plan("Qwen2.5-VL-3B-Instruct", settings, "grpo", gpu_gb=80)
    assert not guessed.fits and refusal in guessed.text()
    check_plan(guessed)  # the clips may be smaller: the run will see
    with pytest.raises(StkitError, match=refusal):
        check_plan(plan("Qwen2.5-VL-3B-Instruct", settings, "grpo", gpu_gb=80, video_tokens=16 * 192))


def test_the_limit_is_what_is_free_where_no_size_is_given(monkeypatch):
    settings = load_settings("tiny", "sft")
    there = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    assert plan("tiny", settings, "sft").limit == pytest.approx(there, rel=0.2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7_000_000_000, 16_000_000_000))
    assert needs.free_bytes("cuda:0") == 7_000_000_000


def test_a_clip_with_few_questions_bounds_what_is_computed_at_once():
    settings = load_settings("tiny", "sft", GPU | {"train.batch": 2, "train.max_tokens": 16_384})
    found = plan("Qwen3-VL-2B-Instruct", settings, "sft", gpu_gb=80, video_tokens=500, text_tokens=100, questions=3)
    assert found.request.load().tokens == 2 * (500 + 3 * (100 + 256))
    assert found.request.load().videos == 2
    assert found.peak < plan("Qwen3-VL-2B-Instruct", settings, "sft", gpu_gb=80, video_tokens=500).peak


def test_a_model_in_the_hubs_cache_is_read_there(tmp_path, monkeypatch):
    folder = tmp_path / "models--me--mine"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc" / "config.json").write_text((tiny.folder() / "config.json").read_text())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert read_anatomy("me/mine")[0].parameters == 2_996_224


def test_what_makes_no_sense_is_refused_by_name():
    settings = load_settings("tiny", "sft")
    with pytest.raises(BadUse, match="stage 'dpo'"):
        plan("tiny", settings, "dpo")
    for size in (0, -1, float("nan")):
        with pytest.raises(BadUse, match="gpu_gb="):
            plan("tiny", settings, "sft", gpu_gb=size)
    with pytest.raises(BadUse, match="lora.rank=0 .*model.four_bit=false"):
        plan("Qwen3-VL-2B-Instruct", load_settings("tiny", "sft", {"model.dtype": "auto"}), "sft", gpu_gb=24)
    with pytest.raises(StkitError, match="'Qwen/Qwen9'.*Qwen3-VL-8B-Instruct"):
        plan("Qwen/Qwen9", settings, "sft")


def test_a_plan_can_be_printed_and_written_down():
    found = plan("Qwen/Qwen3-VL-4B-Instruct", load_settings("tiny", "grpo", GPU), "grpo", gpu_gb=24)
    row = json.loads(json.dumps(found.to_json()))
    assert row["peak"] == pytest.approx(sum(row["parts"].values()), abs=10)
    assert row["peak"] == pytest.approx(max(sum(parts.values()) for parts in row["phases"].values()), abs=10)
    lines = found.text().splitlines()
    totals = next(line.split()[1:] for line in lines if line.startswith("total"))
    assert [float(t) for t in totals] == [round(sum(p.values()) / 1e9, 2) for p in found.phases.values()]
    assert "config.json" in lines[0] and any("32 frames of 151,200 pixels" in line for line in lines)
