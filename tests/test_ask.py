"""Asking a model: the same answers as Transformers gives to each question alone, whatever the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from test_prompts import PROCESSORS, QUESTION, ROUTE, make_frames

from stkit.bench import routes
from stkit.bench.schema import Prediction, Question, Route, Step
from stkit.runtime import StkitError
from stkit.vlm import interview as module
from stkit.vlm import logps
from stkit.vlm.ask import Said, bounded, decode, letter_log_probs
from stkit.vlm.controls import control_frames, rotated, turns, turns_seen_backwards
from stkit.vlm.interview import BLIND, Interview, Settings
from stkit.vlm.load import Loaded
from stkit.vlm.prompts import Prompt, build_prompt
from stkit.vlm.tree import pack, trie
from stkit.vlm.video import Frames, prepare, video_spec
from stkit.vlm.vision import encode_video

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
QUESTIONS = [
    QUESTION,
    replace(QUESTION, id="q2", question="Which way?", options=("left", "right")),
    replace(QUESTION, id="q3", question="What did you pass? " * 6, options=("a tree", "a wall", "a torch")),
    ROUTE,
]


def make_model(family: str) -> Loaded:
    """A few thousand weights of the family's own classes, spread wide so that every input matters."""
    processor = PROCESSORS[family, False]
    ids = processor.tokenizer.convert_tokens_to_ids
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": len(processor.tokenizer),
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {
        "qwen2_vl": {"embed_dim": 32, "hidden_size": 32, "patch_size": 14, "mlp_ratio": 2},
        "qwen2_5_vl": {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "patch_size": 14,
        "fullatt_block_indexes": [1], "tokens_per_second": 4},
        "qwen3_vl": {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "patch_size": 16,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
    }[family]  # fmt: skip
    if family == "qwen3_vl":
        text |= {"head_dim": 8}
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    config = getattr(transformers, f"{names[family]}Config")(
        text_config=text, vision_config=vision, image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    torch.manual_seed(1)
    model = getattr(transformers, f"{names[family]}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else None
    model.generation_config.eos_token_id = [ids("<|im_end|>"), ids("<|endoftext|>")]
    return Loaded(model, processor, {"family": family, "context": 4096, "name": "test", "untrained": True})


MODELS = {family: make_model(family) for family in FAMILIES}


def make_video(family: str, frames: Frames | None = None):
    return prepare(
        frames or make_frames(family), video_spec(PROCESSORS[family, False]), min_pixels=784, max_pixels=10**6
    )


def alone(loaded: Loaded, prompt, video) -> dict:
    """One question as Transformers takes it: unpadded, with the pixels themselves."""
    inputs = {
        "input_ids": torch.tensor([prompt.ids]),
        "attention_mask": torch.ones(1, len(prompt.ids), dtype=torch.long),
    }
    if video is not None:
        inputs |= {
            "mm_token_type_ids": torch.tensor([prompt.mm_token_type_ids]),
            "pixel_values_videos": video.pixel_values,
            "video_grid_thw": video.grid_thw[None],
        }
        if loaded.record["family"] == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([video.second_per_grid_s])
    return inputs


@pytest.mark.parametrize("seen", [True, False], ids=["video", "blind"])
@pytest.mark.parametrize("family", FAMILIES)
def test_letters_have_the_log_probs_that_transformers_gives_each_question_alone(family, seen):
    loaded, video = MODELS[family], make_video(family) if seen else None
    prompts = [build_prompt(q, loaded.processor, family, video) for q in QUESTIONS[:3]]
    with torch.no_grad():
        logits = [loaded.model(**alone(loaded, p, video)).logits[0, -1].double() for p in prompts]
    expected = [torch.log_softmax(row, -1)[list(p.letter_ids)].numpy() for row, p in zip(logits, prompts)]
    assert np.ptp(expected[0]) > 0.01
    features = encode_video(loaded.model, video)
    longest = max(len(p.ids) for p in prompts)
    for size, order in ((longest, [0, 1, 2]), (longest + 9, [2, 0, 1]), (16_384, [1, 2, 0])):
        found = letter_log_probs(loaded, [prompts[k] for k in order], video, features, max_tokens=size)
        for k, row in zip(order, found):
            assert np.abs(row - expected[k]).max() < 1e-5, (size, order)
            margin = np.diff(np.sort(expected[k]))[-1]
            assert margin < 1e-4 or row.argmax() == expected[k].argmax()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_frame_reaches_the_model(family):
    """An exception in a sibling project's trainer retried without the video: scores came from text alone."""
    loaded, frames = MODELS[family], make_frames(family)
    prompt = build_prompt(QUESTION, loaded.processor, family, make_video(family))
    seen = []
    for k in range(len(frames.pixels) + 1):
        pixels = frames.pixels.copy()
        pixels[k : k + 1] = 255 - pixels[k : k + 1]
        video = make_video(family, replace(frames, pixels=pixels))
        seen.append(letter_log_probs(loaded, [prompt], video, encode_video(loaded.model, video))[0])
    assert all(np.abs(seen[i] - seen[k]).max() > 1e-6 for i in range(len(seen)) for k in range(i))


def test_qwen25_is_told_the_seconds_of_the_frames_really_sampled():
    loaded, video = MODELS["qwen2_5_vl"], make_video("qwen2_5_vl")
    prompt = build_prompt(QUESTION, loaded.processor, "qwen2_5_vl", video)
    features = encode_video(loaded.model, video)
    slow = video._replace(second_per_grid_s=video.second_per_grid_s * 9)
    assert (
        np.abs(
            letter_log_probs(loaded, [prompt], video, features)[0]
            - letter_log_probs(loaded, [prompt], slow, features)[0]
        ).max()
        > 1e-5
    )


@pytest.mark.parametrize("seen", [True, False], ids=["video", "blind"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_greedy_and_the_same_in_a_batch_as_alone(family, seen):
    loaded, video = MODELS[family], make_video(family) if seen else None
    prompts = [build_prompt(q, loaded.processor, family, video, think=True) for q in QUESTIONS]
    ends = loaded.model.generation_config.eos_token_id
    expected = []
    for prompt in prompts:
        new = []
        while len(new) < 6 and (not new or new[-1] not in ends):  # the plain definition: all anew for every token
            longer = replace(
                prompt, ids=(*prompt.ids, *new), mm_token_type_ids=(*prompt.mm_token_type_ids, *[0] * len(new))
            )
            with torch.no_grad():
                new.append(int(loaded.model(**alone(loaded, longer, video)).logits[0, -1].argmax()))
        finished = new[-1] in ends
        assert loaded.model.config.video_token_id not in new  # it would count as a video in a new pass
        new = new[: len(new) - finished]
        expected.append(Said(loaded.processor.tokenizer.decode(new, skip_special_tokens=True), len(new), finished))
    features = encode_video(loaded.model, video)
    for size in (max(len(p.ids) for p in prompts) + 6, 16_384):
        assert decode(loaded, prompts, video, features, max_tokens=size, max_new_tokens=6) == expected


def test_prompts_are_computed_together_as_far_as_the_bound_allows():
    prompts = [Prompt(ids, (0,) * len(ids), (), "", "") for ids in ((1, 2, 3), (1, 2, 4), (1, 5), (1, 5, 6, 7), (8, 9))]

    def sizes(*bound):
        return [len(batch) for batch in bounded(prompts, *bound)]

    assert sizes(100) == [5]
    assert sizes(4) == [2, 2, 1]  # 3 + 1, then 2 + 2, then 2
    assert sizes(7) == [4, 1]
    assert sizes(8, 4) == [1, 1, 1, 1, 1]
    for bound in (4, 5, 6, 7):
        assert all(len(pack(trie([p.ids for p in batch])[0])) <= bound for batch in bounded(prompts, bound))
    with pytest.raises(StkitError, match="a prompt of 4 tokens is over max_tokens=3: raise max_tokens to 4"):
        sizes(3)
    with pytest.raises(StkitError, match="a prompt of 3 tokens and 6 for its answer is over max_tokens=8"):
        sizes(8, 6)


def test_a_clips_questions_and_rotations_are_one_forward_pass_on_one_encoded_video(monkeypatch):
    """And each letter's log-prob is that of the prompt alone."""
    loaded = MODELS["qwen2_5_vl"]
    passes, encoded = [], []
    forward, encode = logps.tree_forward, module.encode_video
    monkeypatch.setattr(logps, "tree_forward", lambda m, packed, *x: passes.append(len(packed)) or forward(m, packed, *x))
    monkeypatch.setattr(module, "encode_video", lambda *x: encoded.append(1) or encode(*x))
    monkeypatch.setattr(module, "load_frames", lambda *_, **__: make_frames("qwen2_5_vl"))
    interview = Interview(loaded, Settings(control="circular", max_pixels=10**6, min_pixels=784))
    shown = interview.watch("walk.mp4", "walk")
    asked = interview.ask(QUESTIONS[:3], shown)
    assert len(passes) == 1 and len(encoded) == 1
    prompts = [build_prompt(rotated(q, s)[0], loaded.processor, "qwen2_5_vl", shown.inputs) for q in QUESTIONS[:3] for s in range(len(q.options))]
    assert len(prompts) == 9 and passes[0] < 0.5 * sum(len(p.ids) for p in prompts)
    rows = [row for p in asked for row in p.extra["rotations"]]
    for k, (question, shift) in enumerate((q, s) for q in QUESTIONS[:3] for s in range(len(q.options))):
        back = rotated(question, shift)[1]
        with torch.no_grad():
            logits = loaded.model(**alone(loaded, prompts[k], shown.inputs)).logits[0, -1].double()
        expected = torch.log_softmax(logits, -1)[list(prompts[k].letter_ids)].numpy()
        assert np.abs(np.array(rows[k]["log_probs"])[back] - expected).max() < 1e-5


def test_decoding_stops_where_the_model_ends_its_turn():
    loaded = MODELS["qwen2_5_vl"]
    prompts = [build_prompt(q, loaded.processor, "qwen2_5_vl", None) for q in QUESTIONS]
    with torch.no_grad():
        first = int(loaded.model(**alone(loaded, prompts[0], None)).logits[0, -1].argmax())
    kept = loaded.model.generation_config.eos_token_id
    loaded.model.generation_config.eos_token_id = [*kept, first]
    try:
        stopped = decode(loaded, prompts, None, max_new_tokens=6)
    finally:
        loaded.model.generation_config.eos_token_id = kept
    assert stopped[0] == Said("", 0, True)


def numbered_frames(count: int = 8) -> Frames:
    """Frames whose pixels say which they are."""
    pixels = np.repeat(np.arange(count, dtype=np.uint8), 4 * 4 * 3).reshape(count, 4, 4, 3)
    return Frames(pixels, np.arange(count) / 2, "pyav", "uniform", 2.0, count, np.arange(count))


def test_controls_change_the_pictures_and_leave_the_times():
    frames = numbered_frames()
    order = {
        c: control_frames(frames, c, 0, "walk").pixels[:, 0, 0, 0].tolist()
        for c in ("none", "shuffled", "reversed", "single-frame", "circular", "blind")
    }
    assert (
        order["none"] == order["circular"] == order["blind"] == list(range(8))
        and order["reversed"] == list(range(8))[::-1]
    )
    assert (
        sorted(order["shuffled"]) == list(range(8))
        and order["shuffled"] != list(range(8))
        and order["single-frame"] == [4, 4]
    )
    for control in ("shuffled", "reversed"):
        assert control_frames(frames, control, 0, "walk").timestamps_s.tolist() == frames.timestamps_s.tolist()
    assert control_frames(frames, "single-frame", 0, "walk").timestamps_s.tolist() == [2.0, 2.0]


def test_shuffling_is_one_permutation_for_each_clip_and_seed():
    def order(seed, clip):
        return control_frames(numbered_frames(), "shuffled", seed, clip).pixels[:, 0, 0, 0].tolist()

    assert order(0, "a") == order(0, "a") and len({tuple(order(s, c)) for s in (0, 1) for c in ("a", "b")}) == 4


def test_rotation_puts_every_option_under_every_letter_once():
    versions = [rotated(QUESTION, shift) for shift in range(4)]
    assert all(turned.options[turned.answer] == QUESTION.options[0] for turned, _ in versions)
    assert all([QUESTION.options[k] for k in back] == list(turned.options) for turned, back in versions)
    assert {turned.answer for turned, _ in versions} == {0, 1, 2, 3}


def test_reversed_frames_show_the_turns_the_other_way_round_and_in_reverse():
    """Left, left, right, played backwards: the last turn comes first, and a right one is to the left."""
    route = routes.parse(
        "go straight, turn left, go straight, turn left, pass the tree on your right, turn right, go straight"
    )
    assert turns(route) == ["left", "left", "right"] and turns_seen_backwards(route) == ["left", "right", "right"]


def ask_canned(monkeypatch, questions, texts, **settings) -> list[Prediction]:
    """Interview a model that says these texts."""
    monkeypatch.setattr(module, "decode", lambda *_: [Said(t, 3, not t.endswith("…")) for t in texts])
    return Interview(MODELS["qwen2_5_vl"], Settings(mode="generate", max_new_tokens=8, **settings)).ask(
        questions, BLIND
    )


def test_decoded_answers_are_read_and_the_unresolved_is_wrong(monkeypatch):
    texts = [
        "<think>A</think><answer>A</answer>",
        "<answer>B</answer>",
        "A or B",
        "I can't tell",
        "<think>The answer is A…",
    ]
    said = ask_canned(monkeypatch, [QUESTION] * 5, texts)
    assert [p.parsed for p in said] == [0, 1, None, None, None]
    assert [p.correct for p in said] == [True, False, False, False, False]
    assert [p.text for p in said] == texts and [p.extra.get("cut_off", False) for p in said] == [False] * 4 + [True]


def route_question(answer: str, order: str = "forward") -> Question:
    return replace(ROUTE, answer=answer, order=order)


def test_a_route_is_scored_by_exact_match_and_edit_distance(monkeypatch):
    truth = routes.render(Route((Step("move", "straight"), Step("move", "left"), Step("landmark", "tree", "right"))))
    texts = [
        "<think>hm</think><answer>Walk forward. Turn left, then walk past the tree on your right.</answer>",
        "go straight, turn right, pass the tree on your right", "turn left", "I can't tell",
    ]  # fmt: skip
    said = ask_canned(monkeypatch, [route_question(truth)] * 4, texts)
    assert [p.correct for p in said] == [True, False, False, False]
    assert (
        [p.edit_distance for p in said] == [0.0, 1.0, 2.0, None]
        and said[3].parsed is None
        and said[2].parsed == "turn left"
    )


def test_a_released_route_in_free_words_is_compared_as_words(monkeypatch):
    texts = ["You leave the kitchen, and WALK to the sofa", "<answer>the garden</answer>", ""]
    said = ask_canned(monkeypatch, [route_question("You leave the kitchen and walk to the sofa.")] * 3, texts)
    assert [p.correct for p in said] == [True, False, False] and [p.edit_distance for p in said] == [None] * 3
    assert [p.parsed is None for p in said] == [False, False, True]


def test_reversed_frames_are_scored_on_turn_order(monkeypatch):
    truth = "go straight, turn left, go straight, turn left, go straight, turn right, go straight"
    texts = ["turn left, turn right, turn right", truth, "I can't tell"]
    said = ask_canned(monkeypatch, [route_question(truth)] * 3, texts, control="reversed")
    assert [p.extra["turn_order_match"] for p in said] == [True, False, False] and [p.correct for p in said] == [
        False,
        True,
        False,
    ]
    assert "turn_order_match" not in ask_canned(monkeypatch, [route_question(truth)], texts[:1])[0].extra


@pytest.mark.parametrize("prefers, right", [("letter", False), ("text", True)])
def test_circular_is_right_only_under_every_rotation(monkeypatch, prefers, right):
    """A model that likes the letter A is right by luck; one that likes the right text is right each time."""
    shown = []

    def log_probs(loaded, prompts, *_):
        found = []
        for prompt in prompts:
            options = [line[3:] for line in prompt.text.splitlines() if line[1:3] == ". "]
            shown.append(options)
            found.append(
                np.array(
                    [
                        -1.0 if (k == 0 if prefers == "letter" else o == QUESTION.options[0]) else -2.0
                        for k, o in enumerate(options)
                    ]
                )
            )
        return found

    monkeypatch.setattr(module, "letter_log_probs", log_probs)
    (said,) = Interview(MODELS["qwen2_5_vl"], Settings(control="circular")).ask([QUESTION], BLIND)
    assert said.correct is right and len(shown) == 4 and len(said.extra["rotations"]) == 4
    chosen = [r["parsed"] for r in said.extra["rotations"]]
    assert chosen == ([0, 1, 2, 3] if prefers == "letter" else [0, 0, 0, 0])
    assert said.parsed == 0 and said.log_probs[0] == -1.0


def test_the_blindfolded_model_gets_the_same_prompt_by_letter():
    interview = Interview(MODELS["qwen2_5_vl"], Settings(mode="generate", prompt="published"))
    blind = interview.blindfolded()
    (said,) = blind.ask([QUESTION], BLIND)
    assert said.control == "blind" and said.mode == "letter" and said.timestamps_s == () and len(said.log_probs) == 4
    assert interview.asks(ROUTE) and not blind.asks(ROUTE)
