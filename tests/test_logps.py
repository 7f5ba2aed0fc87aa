"""A model on a tree against Transformers' own forward pass on each branch alone: log-probs, gradients, every family."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_ask import FAMILIES, MODELS, alone, make_video
from test_prompts import QUESTION
from torch import nn

from stkit.runtime import BadUse, StkitError
from stkit.vlm import logps
from stkit.vlm.ask import letter_log_probs
from stkit.vlm.attention import TreeAttention, pack_for, tree_forward
from stkit.vlm.logps import head_weight, next_log_probs, tree_logps
from stkit.vlm.prompts import build_prompt
from stkit.vlm.tree import Tree, trie
from stkit.vlm.vision import encode_video

SLOW_S = 90.0  # a temporal patch of so many seconds has positions far beyond those of the text after it


def model_of(family: str):
    return copy.deepcopy(MODELS[family].model)


def a_tree(family: str, video, seed: int = 0) -> Tree:
    """A video with two questions, of which one has three answers and the other one of a single token."""
    generator = torch.Generator().manual_seed(seed)
    known = len(MODELS[family].processor.tokenizer) - 20  # no special tokens

    def some(count):
        return torch.randint(known, (count,), generator=generator).tolist()

    prompt = build_prompt(QUESTION, MODELS[family].processor, family, video)
    root = Tree(prompt.ids, name="video")
    first, second = root.branch(some(7), 0.5, "first"), root.branch(some(4), name="second")
    for length in (5, 3, 8):
        first.branch(some(length), weight=1.0)
    second.branch(some(1), weight=2.0, name="short")
    return root


def unpacked(model, family: str, packed, video, grad: bool = False):
    """Transformers' own log-probs of each node's tokens, branch by branch: ``(T,)``, nodes computed with their paths."""
    found = [None] * len(packed.nodes)
    for leaf in range(len(packed.nodes)):
        ids = packed.ids[packed.path(leaf)].tolist()
        kinds = [2 * (i == model.config.video_token_id) for i in ids]
        prompt = type("P", (), {"ids": ids, "mm_token_type_ids": kinds})
        with torch.set_grad_enabled(grad):
            logits = model(**alone(MODELS[family], prompt, video)).logits[0]
            every = torch.log_softmax(logits[:-1].float(), -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        length = len(packed.nodes[leaf].ids)
        found[leaf] = nn.functional.pad(every, (1, 0))[-length:]
    return torch.cat(found)


def pairs(family):
    video = make_video(family)
    return [(video, a_tree(family, video))] + [(video._replace(second_per_grid_s=SLOW_S), a_tree(family, video, 1))]


@pytest.mark.parametrize("slow", [False, True], ids=["", "slow"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_each_branch_alone(family, slow):
    video, tree = pairs(family)[slow]
    model = model_of(family)
    found = tree_logps(model, tree, video)
    expected = unpacked(model, family, found.packed, video)
    assert found.log_probs.std() > 0.1 and (found.log_probs - expected).abs().max() < 1e-5
    assert found.path["attention"] == "cpu-flash" and found.path["log_probs"] == "torch"


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_that_transformers_counts_on_each_path(family):
    """Text after a video goes on by its height and width, not from the largest position: slow videos tell."""
    video, tree = pairs(family)[1]
    model = model_of(family)
    packed = pack_for(model, [tree], [video])
    for k in range(len(packed.nodes)):
        path = packed.path(k)
        kinds = (packed.ids[path] == model.config.video_token_id).long()[None] * 2
        timing = {"second_per_grid_ts": torch.tensor([SLOW_S])} if family == "qwen2_5_vl" else {}
        theirs, _ = model.model.get_rope_index(
            packed.ids[path][None], kinds, video_grid_thw=video.grid_thw[None], **timing
        )
        assert torch.equal(packed.position[:, path], theirs[:, 0])
    if family == "qwen2_5_vl":
        assert packed.position[0].max() > packed.following.max()


def prepared(family: str, what: str):
    """A model of which some weights are trained: "lora", "full" (language) or "tower" (everything, the tower too)."""
    model = model_of(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(what == "tower" or what == "full" and "visual" not in name)
    if what == "lora":
        torch.manual_seed(3)
        model = get_peft_model(
            model, LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "up_proj"])
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # it starts at zero, and A would have no gradient
                nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model, loss) -> dict[str, torch.Tensor]:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found) if g is not None}


def assert_close(found: dict, expected: dict, tolerance: float = 1e-4):
    """Equal to a relative norm for each tensor; what is all but zero (key biases, say) is measured by the largest."""
    assert found.keys() == expected.keys() and expected
    largest = max(g.norm().item() for g in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).norm() <= tolerance * max(expected[name].norm().item(), 1e-4 * largest), (
            name
        )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("what", ["lora", "full", "tower"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_each_branch_alone(family, what, checkpointing):
    video, tree = pairs(family)[0]
    model = prepared(family, what).train()
    plain = model.get_base_model() if what == "lora" else model
    packed = pack_for(model, [tree], [video])
    loss = (unpacked(plain, family, packed, video, grad=True) * packed.weight).sum()
    expected = gradients(model, loss)
    assert what == "lora" or any("visual" in n for n in expected) == (what == "tower")
    if checkpointing:
        plain.gradient_checkpointing_enable({"use_reentrant": False})
        plain.enable_input_require_grads()
    for tokens in ("all", "weighted"):
        found = tree_logps(model, tree, video, tokens=tokens)
        assert_close(gradients(model, (found.log_probs * packed.weight).sum()), expected)
    assert abs(loss.item() - (found.log_probs * packed.weight).sum().item()) < 1e-4


def test_checkpointing_computes_the_layers_again_with_the_trees_attention(monkeypatch):
    video, tree = pairs("qwen2_5_vl")[0]
    model = prepared("qwen2_5_vl", "full").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    attend = TreeAttention.attend
    monkeypatch.setattr(TreeAttention, "attend", lambda self, layer, *x: calls.append(layer) or attend(self, layer, *x))
    found = tree_logps(model, tree, video)
    assert calls == [0, 1, 2]
    found.log_probs.sum().backward()
    assert calls == [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forest_of_two_videos_has_the_log_probs_of_each_tree(family):
    (video, tree), (slow, other) = pairs(family)
    text = Tree([5, 6, 7], name="blind")
    text.branch([8, 9])
    model = model_of(family)
    found = tree_logps(model, [tree, text, other], [video, None, slow]).log_probs
    expected = [tree_logps(model, t, v).log_probs for t, v in ((tree, video), (text, None), (other, slow))]
    assert (found - torch.cat(expected)).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_never_sees_its_sibling(family):
    video, tree = pairs(family)[0]
    model = model_of(family)
    before = tree_logps(model, tree, video)
    node = tree.children[0].children[1]
    node.ids = tuple(i + 1 for i in node.ids)
    after = tree_logps(model, tree, video)
    same = torch.ones(len(before.packed), dtype=torch.bool)
    same[before.packed.slices[before.packed.index(node)]] = False
    assert (before.log_probs - after.log_probs)[same].abs().max() < 1e-6
    assert (before.log_probs - after.log_probs)[~same].abs().max() > 1e-3


def test_nf4_with_float32_compute_is_the_same_on_a_tree():
    from bitsandbytes.nn import Linear4bit

    video, tree = pairs("qwen2_5_vl")[0]
    model = model_of("qwen2_5_vl")
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    small = Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        linear.bias is not None,
                        torch.float32,
                        quant_type="nf4",
                    )
                    small.load_state_dict(linear.state_dict())
                    setattr(part, name, small.to("cpu"))
    model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.05) if "lora_B" in name else None
    found = tree_logps(model, tree, video)
    assert type(model.get_base_model().model.language_model.layers[0].mlp.up_proj) is Linear4bit
    expected = unpacked(model.get_base_model(), "qwen2_5_vl", found.packed, video, grad=True)
    assert (found.log_probs - expected).abs().max() < 1e-4
    weight = found.packed.weight
    assert_close(gradients(model, (found.log_probs * weight).sum()), gradients(model, (expected * weight).sum()), 1e-3)


def test_features_that_are_given_are_used_and_the_tower_does_not_run_again(monkeypatch):
    video, tree = pairs("qwen2_5_vl")[0]
    model = model_of("qwen2_5_vl")
    expected = tree_logps(model, tree, video).log_probs
    features = encode_video(model, video)
    monkeypatch.setattr("stkit.vlm.logps.encode_video", lambda *_: 1 / 0)
    assert torch.equal(tree_logps(model, tree, video, features).log_probs, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_ever_scored_without_the_frames(family):
    """An exception in a sibling project's trainer retried without the video; features left out would do the same."""
    video, tree = pairs(family)[0]
    model = model_of(family)
    packed = pack_for(model, [tree], [video])
    other = encode_video(model, make_video(family)._replace(grid_thw=video.grid_thw, pixel_values=video.pixel_values))
    short = type(other)(**{**other, "pooler_output": tuple(part[:-1] for part in other.pooler_output)})
    for features in (None, short):
        with pytest.raises(StkitError, match=r"hold 24 video tokens, the features are of (0|23): give encode_video's"):
            tree_forward(model, packed, [features], TreeAttention(packed.end, model))
    with pytest.raises(StkitError, match="the features are of 0"):
        next_log_probs(model, [tree], [video], [None], [tree], [[1]])
    prompt = build_prompt(QUESTION, MODELS[family].processor, family, video)
    left_out, given = (letter_log_probs(MODELS[family], [prompt], video, f)[0] for f in (None, other))
    assert (left_out == given).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_precision_is_as_close_as_transformers_own(family):
    """Under autocast keys are float32 after their rotation and values bfloat16; torch's attention casts them alike."""
    video, tree = pairs(family)[0]
    model = model_of(family)
    exact = tree_logps(model, tree, video).log_probs
    with torch.autocast("cpu", torch.bfloat16):
        found = tree_logps(model, tree, video)
        theirs = unpacked(model, family, found.packed, video)
    error, usual = (found.log_probs - exact).abs().mean(), (theirs - exact).abs().mean()
    assert 0 < error < 1.5 * usual


def test_temperature_and_entropy_are_those_of_the_distribution():
    video, tree = pairs("qwen2_5_vl")[0]
    model = model_of("qwen2_5_vl")
    found = tree_logps(model, tree, video, temperature=0.7, entropy=True)
    with torch.no_grad():
        packed = found.packed
        hidden = tree_forward(model, packed, [encode_video(model, video)], TreeAttention(packed.end, model))
        log_p = torch.log_softmax(hidden[packed.prev[1:]] @ head_weight(model).T / 0.7, -1)
    assert torch.allclose(found.entropy[1:], -(log_p.exp() * log_p).sum(-1), atol=1e-5)
    assert torch.allclose(found.log_probs[1:], log_p.gather(1, packed.ids[1:, None])[:, 0], atol=1e-5)
    assert found.log_probs[0] == found.entropy[0] == 0


def test_weighted_tokens_are_computed_and_no_others():
    video, tree = pairs("qwen2_5_vl")[0]
    model = model_of("qwen2_5_vl")
    every, some = tree_logps(model, tree, video), tree_logps(model, tree, video, tokens="weighted")
    kept = every.packed.weight != 0
    assert torch.allclose(some.log_probs[kept], every.log_probs[kept], atol=1e-6) and not some.log_probs[~kept].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_tokens_after_each_prompt_are_those_of_the_prompt_alone(family):
    video = make_video(family)
    loaded = MODELS[family]
    prompts = [build_prompt(q, loaded.processor, family, video) for q in (QUESTION, QUESTION)]
    prompts = [p.ids for p in prompts] + [(*prompts[0].ids, 5, 6), (*prompts[0].ids, 5, 9, 4)]
    roots, last = trie(prompts)
    ids = [[1, 2, 3], [2, 1, 7], [5], [4, 8]]
    found = next_log_probs(loaded.model, roots, [video], [encode_video(loaded.model, video)], last, ids)
    for prompt, asked, row in zip(prompts, ids, found):
        kinds = [2 * (i == loaded.model.config.video_token_id) for i in prompt]
        with torch.no_grad():
            logits = loaded.model(
                **alone(loaded, type("P", (), {"ids": prompt, "mm_token_type_ids": kinds}), video)
            ).logits
        assert (row - torch.log_softmax(logits[0, -1], -1)[asked]).abs().max() < 1e-5


def test_a_video_token_that_was_sampled_is_a_token_like_any_other():
    """Untrained models sample them; Transformers would look for another video."""
    video, tree = pairs("qwen2_5_vl")[0]
    model = model_of("qwen2_5_vl")
    plain = tree_logps(model, tree, video).log_probs
    tree.branch([model.config.video_token_id, 7], weight=1.0)
    found = tree_logps(model, tree, video).log_probs
    assert torch.allclose(found[:-2], plain, atol=1e-6) and (found[-2:] < 0).all()


def test_the_model_is_left_as_it_was():
    video, tree = pairs("qwen2_5_vl")[0]
    model = model_of("qwen2_5_vl")
    before = {n: (type(m), m.__dict__.get("forward")) for n, m in model.named_modules()}
    backend = model.config.text_config._attn_implementation
    tree_logps(model, tree, video)
    assert before == {n: (type(m), m.__dict__.get("forward")) for n, m in model.named_modules()}
    assert (
        model.model.language_model.config._attn_implementation
        == model.config.text_config._attn_implementation
        == backend
    )


def test_dropout_is_refused_in_training_and_does_not_matter_in_evaluation():
    video, tree = pairs("qwen2_5_vl")[0]
    model = get_peft_model(model_of("qwen2_5_vl"), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]))
    with pytest.raises(StkitError, match=r"q_proj.*drops out with p=0.1: .*lora_dropout=0"):
        tree_logps(model.train(), tree, video)
    tree_logps(model.eval(), tree, video)
    plain = model_of("qwen2_5_vl").train()
    plain.model.language_model.layers[1].self_attn.attention_dropout = 0.2
    with pytest.raises(StkitError, match=r"layers.1.*attention_dropout=0.2"):
        tree_logps(plain, tree, video)


def test_a_nan_is_named_where_it_arises():
    video, tree = pairs("qwen2_5_vl")[0]
    model = model_of("qwen2_5_vl")
    model.model.language_model.layers[1].mlp.up_proj.weight.data[3, 2] = float("nan")
    with pytest.raises(StkitError, match=r"not finite, first after layer 1 at token 0 \('video'\), in float32"):
        tree_logps(model, tree, video)
    model = model_of("qwen2_5_vl")
    model.get_input_embeddings().weight.data[tree.children[1].ids[2]] = float("nan")
    with pytest.raises(StkitError, match=r"after the token embeddings at token \d+"):
        tree_logps(model, tree, video)


def test_out_of_memory_says_what_the_plan_was_and_what_to_lower(monkeypatch):
    video, tree = pairs("qwen2_5_vl")[0]
    model = model_of("qwen2_5_vl")

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    for place in ((TreeAttention, "attend"), (logps, "selected_log_probs")):
        with monkeypatch.context() as patch, pytest.raises(StkitError) as error:
            patch.setattr(*place, full)
            tree_logps(model, tree, video)
        told = r"out of memory: \d+ tokens in 7 branches .* lower max_tokens, .* 20.00 GiB"
        assert re.search(told, str(error.value)), place


def test_an_error_that_has_nothing_to_do_with_memory_stays_as_it_is(monkeypatch):
    video, tree = pairs("qwen2_5_vl")[0]

    def broken(*_):
        raise RuntimeError("a fault of its own")

    monkeypatch.setattr(TreeAttention, "attend", broken)
    with pytest.raises(RuntimeError, match="^a fault of its own$") as error:
        tree_logps(model_of("qwen2_5_vl"), tree, video)
    assert error.value.__cause__ is None


def split_in_the_video(model, tree) -> Tree:
    middle = tree.ids.index(model.config.video_token_id) + 10
    half = Tree(tree.ids[:middle], name="half")
    half.branch(tree.ids[middle:])
    return half


def with_a_window(model):
    for attention in (layer.self_attn for layer in model.model.language_model.layers):
        attention.sliding_window = 4
    return model


def with_an_image(model, tree) -> Tree:
    return Tree((model.config.image_token_id, *tree.ids), name="both")


def with_head_adapter(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"])).eval()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m, t, v: (m, t, None), "holds 24 video tokens and comes with no video"),
        (lambda m, t, v: (m, Tree([1, 2], name="root"), v), "'root' holds 0 video tokens and comes with a video of 24"),
        (lambda m, t, v: (m, [t], [v, v]), "1 trees and 2 videos"),
        (lambda m, t, v: (m, split_in_the_video(m, t), v), "'half' holds 10 video tokens and comes with a video of 24"),
        (lambda m, t, v: (m, t.branch([10**6], name="big") and t, v), "'big' holds the id 1000000: the vocabulary has"),
        (lambda m, t, v: (m, t.branch([1] * 5000, name="long") and t, v), "the model's context is 4096"),
        (lambda m, t, v: (nn.Linear(2, 2), t, v), "Linear is no Qwen-VL"),
        (lambda m, t, v: (with_a_window(m), t, v), "layer 0 attends within 4 tokens: trees have no sliding windows"),
        (lambda m, t, v: (m, with_an_image(m, t), v), "'both' holds image tokens: trees take videos only"),
        (lambda m, t, v: (with_head_adapter(m), t, v), "leave lm_head out of the adapter"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change, told):
    video, tree = pairs("qwen2_5_vl")[0]
    with pytest.raises(StkitError) as error:
        tree_logps(*change(model_of("qwen2_5_vl"), tree, video))
    assert told in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("tokens", "some"), ("backend", "flsh"), ("backend", "flash-attn")])
def test_an_argument_of_no_meaning_is_refused(name, value):
    video, tree = pairs("qwen2_5_vl")[0]
    with pytest.raises(StkitError, match=f"'{value}'") as error:
        tree_logps(model_of("qwen2_5_vl"), tree, video, **{name: value})
    assert isinstance(error.value, BadUse) or name == "backend"
