"""The tiny model is a real Qwen2.5-VL: its files come from one command, its tokenizer writes any text, its first
weights are the same in every process, and Transformers' own classes load it. What ships is tested in test_shipped.py."""

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from teammaker import run_team
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from stkit import load_model
from stkit.bench import questions, routes
from stkit.bench.schema import Route, Step
from stkit.vlm import prompts, tiny

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def loaded():
    return load_model("tiny-untrained")


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded.processor.tokenizer


def digest(model) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def video_messages():
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which way did you turn?"}]}]


def video_inputs(processor, frames=8, height=120, width=160):
    video = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    prompt = processor.apply_chat_template(video_messages(), tokenize=False, add_generation_prompt=True)
    return processor(
        text=[prompt], videos=[video], video_metadata=[{"total_num_frames": frames, "fps": 4.0}], return_tensors="pt"
    )


def test_it_is_transformers_own_qwen2_5_vl_of_a_few_million_parameters(loaded):
    model, processor, record = loaded
    assert type(model) is Qwen2_5_VLForConditionalGeneration and type(processor) is Qwen2_5_VLProcessor
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 8_000_000
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.num_key_value_heads) == (
        4,
        192,
        6,
        2,
    )
    assert (vision.depth, vision.hidden_size, vision.patch_size) == (3, 128, 14)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert record["context"] == 4096 and not model.training


def test_untrained_it_says_so(loaded):
    assert loaded.record["untrained"] is True
    assert "expect chance" in loaded.record["why"]["untrained"]
    assert loaded.record["weights"] == "seed 0"


def write_and_tell(folder):
    folder.mkdir()
    tiny.write_folder(folder)
    print(digest(load_model("tiny-untrained").model))


def test_its_weights_and_files_are_the_same_in_another_process(loaded, tmp_path):
    [(code, told)] = run_team(tmp_path, write_and_tell, tmp_path / "tiny", count=1)
    assert code == 0 and told.split()[-1] == digest(loaded.model), told
    shipped = {file.name for file in tiny.folder().iterdir()} - {"model.safetensors", "manifest.json", "README.md"}
    assert {file.name for file in (tmp_path / "tiny").iterdir()} == shipped
    for name in shipped:
        assert unversioned(tmp_path / "tiny" / name) == unversioned(tiny.folder() / name), name


def unversioned(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return text
    return {key: value for key, value in json.loads(text).items() if key != "transformers_version"}


def test_its_seed_leaves_the_global_generator_alone(loaded):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = load_model("tiny-untrained").model
    assert torch.equal(torch.rand(3), expected)
    assert digest(model) == digest(loaded.model)


def test_its_matrices_are_three_times_as_wide_as_transformers_default(loaded):
    weight = loaded.model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.std().item() == pytest.approx(0.06, rel=0.02)
    assert torch.equal(loaded.model.model.language_model.norm.weight, torch.ones(192))


def test_plain_transformers_loads_the_same_folder_and_computes_the_same(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    inputs = video_inputs(processor)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded.model(**video_inputs(loaded.processor)).logits)


def test_a_walk_of_32_frames_costs_192_video_tokens_and_changes_the_logits(loaded):
    model, processor, _ = loaded
    inputs = video_inputs(processor, frames=32)
    # 160 x 120 becomes 112 x 84, that is 4 x 3 tokens for each of 16 temporal patches
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 192
    with torch.no_grad():
        seen = model(**inputs).logits[0, -1]
        blank = model(**inputs | {"pixel_values_videos": torch.zeros_like(inputs["pixel_values_videos"])}).logits[0, -1]
    assert torch.isfinite(seen).all() and (seen - blank).abs().max() > 1e-3


def test_it_generates_and_stops_at_the_end_of_its_turn(loaded):
    model, processor, _ = loaded
    tokenizer = processor.tokenizer
    config = model.generation_config
    assert config.eos_token_id == [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    with torch.no_grad():
        ids = model.generate(**video_inputs(processor), max_new_tokens=3)
    assert ids.shape[1] <= video_inputs(processor)["input_ids"].shape[1] + 3


def test_its_chat_template_has_qwens_shape(loaded):
    messages = [*video_messages(), {"role": "assistant", "content": "Left."}]
    assert loaded.processor.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Which way did you turn?<|im_end|>\n"
        "<|im_start|>assistant\nLeft.<|im_end|>\n"
    )
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert loaded.processor.apply_chat_template(own, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@given(st.text(max_size=60))
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_the_hard_texts_come_back_too(tokenizer):
    for text in (
        "e\u0301 is not \u00e9",
        "  two\n\n\tlines ",
        "\x00\x7f",
        "日本語 🎉 ﬁ",
        "Don't , stop .",
        "<|im_end|>",
    ):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(
            tokenizer.all_special_ids + tokenizer.convert_tokens_to_ids(list(tiny.SPECIAL_TOKENS))
        )


def test_every_special_token_is_one_token(tokenizer):
    for token in tiny.SPECIAL_TOKENS:
        assert tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"][1:2] == [
            tokenizer.convert_tokens_to_ids(token)
        ]


def test_the_kits_words_and_letters_are_one_token_each(tokenizer):
    words = "straight left right turn pass wall brick wood marble metal computer fire torch column tree look up"
    words = f"{words} down step back pause pick put open close door then reverse forward route answer none".split()
    letters = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
    for piece in [f" {word}" for word in words + letters] + letters:
        assert len(tokenizer.tokenize(piece)) == 1, piece
    assert len(tokenizer.tokenize("go straight, turn left, pass the brick wall on your right, then step back")) == 17
    assert 1000 <= len(tokenizer) <= 1500


def test_every_word_of_the_kits_own_sentences_is_one_token(tokenizer):
    sentences = [text for texts in questions.TEMPLATES.values() for text in texts]
    sentences += [prompts.THINK, prompts.OURS, prompts.PUBLISHED_OPENING, prompts.PUBLISHED, "Options:\nA. B. C. D."]
    sentences += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    route = [Step("landmark", kind, side) for kind in routes.LANDMARKS for side in ("left", "right")]
    route += [Step("action", kind) for action in routes.ACTIONS for kind in (action, routes.UNDO.get(action, action))]
    route += [Step("move", move) for move in ("straight", "left", "right")]
    for style in range(routes.STYLES):
        sentences += [routes.render(Route((step,)), style, order) for step in route for order in ("forward", "reverse")]
        sentences.append(routes.render(Route(tuple(route)), style))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    pieces = {piece for sentence in sentences for piece, _ in cut(sentence)}
    unknown = sorted(pieces - set(tokenizer.get_vocab()))
    assert not unknown, f"add {unknown} to words.txt and run: python -m stkit.vlm.tiny --out stkit/data/tiny"


def test_its_folder_is_small():
    assert sum(file.stat().st_size for file in tiny.folder().iterdir()) < 8_000_000
