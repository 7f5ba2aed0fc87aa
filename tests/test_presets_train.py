"""Presets of training: what each sets, written down by hand, and that each fits the card it is named after."""

import re

import pytest

from stkit.train.plan import plan
from stkit.train.reading import PRESETS, load_settings

CARDS = {"t4-16gb": 16, "workstation-24gb": 24, "server-80gb": 80}
MOST = {"Qwen2-VL-2B", "Qwen2-VL-7B", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen3-VL-2B", "Qwen3-VL-4B"}
MODELS = {"t4-16gb": MOST, "workstation-24gb": MOST | {"Qwen3-VL-8B"}, "server-80gb": MOST | {"Qwen3-VL-8B"}}


def first_comment(preset: str) -> str:
    lines = (PRESETS / f"{preset}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines[: next(k for k, x in enumerate(lines) if x[0] != "#")])


@pytest.mark.parametrize("preset", CARDS)
def test_a_card_preset_says_which_models_it_is_for(preset):
    assert set(re.findall(r"Qwen[\d.]+-VL-\d+B", first_comment(preset))) == MODELS[preset]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("preset", CARDS)
def test_a_card_preset_fits_its_card_with_each_of_its_models(preset, stage):
    settings = load_settings(preset, stage)
    for model in MODELS[preset]:
        found = plan(f"Qwen/{model}-Instruct", settings, stage, gpu_gb=CARDS[preset])
        assert found.fits and found.peak <= 0.9 * CARDS[preset] * 1e9, found.text()


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_largest_models_would_not_fit_the_smaller_card_as_the_larger_one_runs_them(stage):
    settings = load_settings("server-80gb", stage)
    assert not plan("Qwen/Qwen3-VL-8B-Instruct", settings, stage, gpu_gb=24).fits


@pytest.mark.parametrize("preset", CARDS)
def test_a_card_preset_trains_lora_of_rank_16(preset):
    for stage, lr in (("sft", 1e-4), ("grpo", 1e-5)):
        made = load_settings(preset, stage)
        assert (made.lora.rank, made.lora.dropout, made.train.lr) == (16, 0.0, lr)
        assert made.train.checkpointing and not made.train.tower and not made.train.projector
        assert made.model.four_bit is (preset != "server-80gb")


def test_a_t4_computes_in_float16_and_the_others_in_bfloat16():
    for preset in CARDS:
        made, half = load_settings(preset, "grpo"), preset == "t4-16gb"
        assert (made.model.dtype, made.train.precision) == (("float16", "fp16") if half else ("bfloat16", "bf16"))


def test_the_published_cold_start_is_set_to_the_letter():
    made = load_settings("st-r1-published", "sft")
    assert (made.lora.rank, made.lora.alpha) == (8, 8.0)
    assert made.lora.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert made.model.four_bit is True and made.model.dtype == "bfloat16"
    train = made.train
    assert (train.lr, train.schedule, train.warmup, train.clip_norm) == (8e-5, "cosine", 0.1, 0.3)
    assert (train.batch, train.accumulation, train.epochs, train.steps) == (1, 4, 1.0, None)
    assert made.sft.form == "paper"


def test_the_published_grpo_is_set_to_the_letter():
    made = load_settings("st-r1-published", "grpo")
    assert (made.train.lr, made.train.epochs, made.train.batch, made.train.seed) == (1e-5, 1.0, 1, 42)
    grpo = made.grpo
    assert (grpo.beta, grpo.temperature, grpo.group, grpo.max_new_tokens) == (0.1, 1.0, 8, 256)
    assert (grpo.variant, grpo.updates, grpo.kl) == ("grpo", 1, "k3")
    assert made.rewards == {"correct": 1.0}  # a format reward was there, and off


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_published_frames_and_prompt_are_shown(stage):
    made = load_settings("st-r1-published", stage)
    assert (made.video.sampling, made.video.max_pixels) == ("published", 360 * 420)
    assert made.video.frames is None and made.video.fps is None  # 8 of one a second: what "published" means
    assert made.data.prompt == "published"


def test_what_deviates_from_the_published_recipe_is_listed_in_the_file():
    said = first_comment("st-r1-published")
    assert load_settings("st-r1-published", "sft").lora.dropout == 0.0
    for words in ("lora.dropout is 0, published 0.1", "One GPU, published 4 x H100", "answers alone are learned"):
        assert words in said


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_published_recipe_fits_16_gb_and_would_not_fit_80_with_all_weights_in_training(stage):
    model = "Qwen/Qwen2-VL-7B-Instruct"
    assert plan(model, load_settings("st-r1-published", stage), stage, gpu_gb=16).fits
    whole = load_settings("st-r1-published", "grpo", {"lora.rank": 0, "model.four_bit": False})
    assert not plan(model, whole, "grpo", gpu_gb=80).fits


def test_the_released_rows_are_learned_as_they_stand_where_that_is_asked_for():
    assert load_settings("st-r1-published", "sft", {"sft.form": "solution"}).sft.form == "solution"
