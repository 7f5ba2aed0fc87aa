"""Settings of training: what presets and --set may say, and what they are told when they err."""

import math

import pytest

from stkit.runtime import BadUse, StkitError
from stkit.train.reading import all_keys, load_settings, parse_overrides, preset_names


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_valid_for_both_commands(preset, stage):
    assert load_settings(preset, stage).train.save_every >= 1


def test_the_tiny_preset_saves_every_two_steps_and_trains_all_weights():
    settings = load_settings("tiny")
    assert (settings.train.save_every, settings.lora.rank) == (2, 0)


def test_what_only_one_command_takes_stays_with_it():
    sft, grpo = load_settings("tiny", "sft"), load_settings("tiny", "grpo")
    assert (sft.train.lr, grpo.train.lr) == (1e-3, 5e-5)
    assert "route" in sft.data.tasks and "route" not in grpo.data.tasks


def test_a_number_is_read_as_people_write_it():
    """YAML takes 1e-5 for a text."""
    assert load_settings("tiny", "sft", parse_overrides(["train.lr=1e-5"])).train.lr == 1e-5


def test_lists_none_and_no_are_read_as_meant():
    told = parse_overrides(["data.tasks=[direction, action]", "grpo.max_kl=null", "train.precision=no"])
    settings = load_settings("tiny", "sft", told)
    assert (settings.data.tasks, settings.grpo.max_kl) == (("direction", "action"), None)
    assert settings.train.precision == "no"


def test_a_reward_is_weighed_without_losing_the_others():
    assert load_settings("tiny", "grpo", {"rewards.format": 0.5}).rewards == {"correct": 1.0, "format": 0.5, "timeline": 0.5}


def test_the_rewards_that_a_preset_names_are_all_it_has(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("rewards: {length: 1}\n")
    assert load_settings(path, "grpo").rewards == {"length": 1.0}


@pytest.mark.parametrize("wrong, right", [
    ("train.lrr", "train.lr"), ("lr", "train.lr"), ("train.learning_rate", "train.lr"), ("grpo.num_generations", "grpo.group"),
    ("tran.lr", "train"), ("grpo.clip_hi", "grpo.clip_high"), ("lora.r", "lora.rank"), ("train.variant", "grpo.variant"),
])  # fmt: skip
def test_a_misspelled_key_is_named_with_the_nearest_right_one(wrong, right):
    with pytest.raises(BadUse, match="unknown key") as told:
        load_settings("tiny", "sft", {wrong: 1})
    assert f"did you mean {right!r}?" in str(told.value)


@pytest.mark.parametrize("key, value", [
    ("train.lr", 0), ("train.lr", math.nan), ("train.lr", "fast"), ("train.lr", True), ("train.steps", 0),
    ("train.batch", 1.5), ("train.warmup", 1.0), ("train.betas", [0.9]), ("train.betas", [0.9, 1.0]), ("lora.rank", -1),
    ("lora.dropout", 0.1), ("train.schedule", "sine"), ("train.optimizer", "sgd"), ("model.four_bit", "yes"),
    ("grpo.variant", "ppo"), ("grpo.kl", "k4"), ("grpo.clip_low", 1.0), ("grpo.overlong", 160), ("grpo.think_budget", 160),
    ("grpo.think_budget", -1), ("video.frames", 3), ("video.fps", 0), ("video.max_pixels", 0), ("video.reader", "ffmpeg"),
    ("video.sampling", "random"), ("data.prompt", "mine"), ("data.tasks", []), ("data.tasks", ["walk"]),
    ("data.split", "valid"), ("sft.form", "poem"), ("rewards.correct", math.inf), ("train.tracker", "mlflow"),
])  # fmt: skip
def test_a_value_that_makes_no_sense_is_refused_by_name(key, value):
    with pytest.raises(BadUse) as told:
        load_settings("tiny", "grpo", {key: value})
    assert key.rpartition(".")[2] in str(told.value) or "frames" in str(told.value)


def test_an_adapter_needs_a_place():
    with pytest.raises(BadUse, match="lora.targets"):
        load_settings("tiny", "sft", {"lora.rank": 8, "lora.targets": []})


def test_a_group_of_one_is_refused_where_groups_matter():
    with pytest.raises(BadUse, match="grpo.group=1: a group of one has no advantage"):
        load_settings("tiny", "grpo", {"grpo.group": 1})
    assert load_settings("tiny", "sft", {"grpo.group": 1}).grpo.group == 1


def test_rewards_of_no_weight_are_refused():
    with pytest.raises(BadUse, match="every weight is 0"):
        load_settings("tiny", "grpo", {"rewards": {"correct": 0, "format": 0, "timeline": 0}})


def test_an_unknown_preset_or_file_is_refused(tmp_path):
    with pytest.raises(BadUse, match="'tinny' is unknown: use .*tiny"):
        load_settings("tinny")
    with pytest.raises(StkitError, match="no such file"):
        load_settings(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("train: [1")
    with pytest.raises(StkitError, match="bad.yaml: not YAML"):
        load_settings(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(BadUse, match="sections"):
        load_settings(tmp_path / "list.yaml")


@pytest.mark.parametrize("text", ["train.lr", "=3", "train.lr=[1"])
def test_a_set_that_is_no_setting_is_refused(text):
    with pytest.raises(BadUse, match="--set"):
        parse_overrides([text])


def test_every_key_can_be_overridden():
    settings = load_settings("tiny")
    for key in all_keys():
        section, _, name = key.partition(".")
        value = getattr(getattr(settings, section), name) if name else getattr(settings, section)
        assert load_settings("tiny", "sft", {key: value}) == settings, key
