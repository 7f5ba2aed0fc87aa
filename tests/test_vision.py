"""The vision tower against Transformers' own: the same features and gradients, fewer calls, the model left alone."""

import copy
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_ask import FAMILIES, MODELS, alone, make_video
from test_prompts import PROCESSORS, QUESTION
from transformers import AttentionInterface

from stkit.runtime import BadUse, StkitError
from stkit.vlm.load import load_model
from stkit.vlm.prompts import build_prompt
from stkit.vlm.video import VideoInputs
from stkit.vlm.vision import encode_video, group_windows

# patches in time, height and width; a window of Qwen2.5-VL is 8x8 patches, so 10x14 is cut into 4 sizes
GRIDS = [(1, 2, 2), (1, 10, 14), (3, 10, 14), (4, 8, 16), (2, 18, 6)]
ODD = (3, 10, 14)


def make_model(family: str, trainable: bool = False):
    return copy.deepcopy(MODELS[family].model).requires_grad_(trainable)


def tower_of(model):
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model.visual


def noise(model, grid: tuple[int, int, int], seed: int = 0) -> VideoInputs:
    columns = tower_of(model).patch_embed.proj.weight[0].numel()
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(int(np.prod(grid)), columns, generator=generator)
    return VideoInputs(pixels, torch.tensor(grid), 1.0, np.arange(grid[0]) + 0.5)


def theirs(model, video: VideoInputs):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_video_features(video.pixel_values, video.grid_thw[None], return_dict=True)


def parts(features) -> list[torch.Tensor]:
    """Everything the language model reads of the tower."""
    return [*features.pooler_output, *(part for layer in getattr(features, "deepstack_features", []) for part in layer)]


def gradients(model, features) -> dict[str, torch.Tensor]:
    """Gradients of a loss in which every number of every part has a weight of its own."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(7)
    sum((part * torch.randn(part.shape, generator=generator)).sum() for part in parts(features)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_features(found, expected, atol: float = 1e-5):
    assert type(found) is type(expected) and len(parts(found)) == len(parts(expected))
    for ours, other in zip(parts(found), parts(expected)):
        assert ours.dtype == other.dtype and ours.shape == other.shape
        assert other.std() > 0.01 and (ours - other).abs().max() < atol


def assert_same_gradients(model, video: VideoInputs):
    expected = gradients(model, theirs(model, video))
    found = gradients(model, encode_video(model, video))
    wanted = {name for name, p in model.named_parameters() if p.requires_grad and "visual" in name}
    assert wanted and found.keys() == expected.keys() == wanted
    for name, other in expected.items():
        assert 0 < other.norm() and (found[name] - other).norm() < 1e-4 * other.norm(), name


def count_calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the queries of every attention call from now on."""
    shapes, real = [], F.scaled_dot_product_attention

    def counted(query, *args, **kwargs):
        shapes.append(tuple(query.shape))
        return real(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return shapes


def lora(model, targets, **kwargs):
    """A LoRA whose second factor is not zero, so that it counts from the start."""
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **kwargs))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


# ---- the same numbers


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_features_equal_those_of_transformers(family, grid):
    model = MODELS[family].model
    video = noise(model, grid)
    with torch.no_grad():
        expected, found = theirs(model, video), encode_video(model, video)
    assert_same_features(found, expected)
    scale = expected.last_hidden_state.abs().max()
    assert (found.last_hidden_state - expected.last_hidden_state).abs().max() < 1e-5 * max(1, scale)
    assert (getattr(found, "deepstack_features", None) is not None) == (family == "qwen3_vl")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_answers_alike_from_features_and_from_pixels(family):
    model, video = MODELS[family].model, make_video(family)
    inputs = alone(MODELS[family], build_prompt(QUESTION, PROCESSORS[family, False], family, video), video)
    with torch.no_grad():
        expected = model(**inputs).logits
        del inputs["pixel_values_videos"]
        found = model(**inputs, mm_encoder_outputs={"video": encode_video(model, video)}).logits
    assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["stored", "checkpointed", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_whole_tower_equal_those_of_transformers(family, checkpointing):
    model = make_model(family, trainable=True)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()
    assert_same_gradients(model, noise(model, ODD))


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["stored", "checkpointed", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_lora_in_the_tower_equal_those_of_transformers(family, checkpointing):
    adapted = lora(make_model(family), r".*visual.*(qkv|attn\.proj|mlp\.\w*(fc\d|_proj))")
    if checkpointing is not None:
        adapted.get_base_model().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        # reentrant needs it; Transformers' enable_input_require_grads does the same, but not to Qwen3-VL's tower
        tower_of(adapted).patch_embed.register_forward_hook(lambda module, args, out: out.requires_grad_())
        adapted.train()
    video = noise(adapted, ODD)
    assert_same_gradients(adapted, video)
    assert_same_features(encode_video(adapted, video), theirs(adapted, video))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_on_the_convolution_of_the_patches_is_not_lost(family):
    adapted = lora(make_model(family), r".*patch_embed\.proj")
    video = noise(adapted, ODD)
    with adapted.disable_adapter():
        without = parts(encode_video(adapted, video))[0]
    assert (parts(encode_video(adapted, video))[0] - without).abs().max() > 1e-3
    assert_same_features(encode_video(adapted, video), theirs(adapted, video))
    assert_same_gradients(adapted, video)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("saved", ["visual", "patch_embed", "attn"])
def test_the_copy_that_peft_trains_is_the_one_that_runs(saved, attention, monkeypatch):
    model = make_model("qwen2_5_vl")
    model.set_attn_implementation(attention)  # before, as the copies have a configuration of their own
    adapted = lora(model, r".*language_model.*q_proj", modules_to_save=[saved])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.mul_(1.1) if "modules_to_save" in name else None
    video, calls = noise(adapted, ODD), count_calls(monkeypatch)
    found = encode_video(adapted, video)
    assert len(calls) == (5 if attention == "sdpa" else 0)
    assert found.pooler_output[0].requires_grad
    assert_same_features(found, theirs(adapted, video))
    with adapted.disable_adapter():
        assert_same_features(encode_video(adapted, video), theirs(adapted, video))
        assert (parts(encode_video(adapted, video))[0] - parts(found)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_it_errs_no_more_than_transformers(family):
    exact, model = MODELS[family].model, make_model(family).to(torch.bfloat16)
    video = noise(exact, ODD)
    with torch.no_grad():
        expected, rounded, found = theirs(exact, video), theirs(model, video), encode_video(model, video)
    for truth, other, ours in zip(parts(expected), parts(rounded), parts(found)):
        assert ours.dtype == torch.bfloat16
        assert (ours - truth).norm() < 1.2 * (other - truth).norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_nf4_tower_gives_what_it_gives_in_transformers(dtype):
    model = load_model("tiny-untrained", four_bit=True, device="cpu", dtype=dtype).model
    quantised = [module for module in tower_of(model).modules() if type(module).__name__ == "Linear4bit"]
    assert tower_of(model).blocks[0].attn.qkv in quantised
    for module in quantised:
        module.compute_dtype = getattr(torch, dtype)
    if dtype == "float32":
        model.train()  # in eval mode bitsandbytes takes a kernel in bfloat16 on CPUs that have one, whatever the dtype
    video = noise(model, ODD)
    with torch.no_grad():
        expected, found = theirs(model, video), encode_video(model, video)
    if dtype == "float32":
        assert_same_features(found, expected, atol=1e-4)
    else:
        assert F.cosine_similarity(parts(found)[0].float(), parts(expected)[0].float()).min() > 0.999


# ---- once, and in batches


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_calls_the_attention_once_for_each_length_of_window(family, monkeypatch):
    model, ran = make_model(family), []
    video = noise(model, ODD)
    tower_of(model).register_forward_hook(lambda *_: ran.append(1))
    monkeypatch.setattr(torch.nn.Conv3d, "forward", None)  # the patches are not to be convolved
    shapes = count_calls(monkeypatch)
    encode_video(model, video)
    frames = [(3, 2, 140, 16)]  # 3 temporal patches of 10x14, 2 heads of 16
    # 10x14 is 8+2 x 8+6: by hand, windows of 8x8, 8x6, 2x8 and 2x6 patches, one each a temporal patch
    cut = [(3, 2, 12, 16), (3, 2, 16, 16), (3, 2, 48, 16), (3, 2, 64, 16)]
    assert shapes == (cut + frames if family == "qwen2_5_vl" else frames + frames)
    assert ran == [1]


def test_windows_that_are_all_alike_are_one_call_and_are_not_moved(monkeypatch):
    model = make_model("qwen2_5_vl")
    shapes = count_calls(monkeypatch)
    encode_video(model, noise(model, (4, 8, 16)))
    assert shapes == [(8, 2, 64, 16), (4, 2, 128, 16)]
    assert group_windows(torch.arange(0, 4 * 128 + 1, 64)).order is None


def test_windows_are_grouped_once_a_video_and_not_once_a_layer(monkeypatch):
    model, grouped = make_model("qwen2_vl"), []
    monkeypatch.setattr("stkit.vlm.vision.group_windows", lambda cu: grouped.append(cu) or group_windows(cu))
    encode_video(model, noise(model, ODD))
    assert len(grouped) == 1 < len(tower_of(model).blocks)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(any))
def test_grouped_windows_hold_the_same_tokens_and_are_undone(lengths):
    cuts = [0, *np.cumsum(lengths).tolist()]
    windows = group_windows(torch.tensor(cuts, dtype=torch.int32))
    tokens = torch.arange(cuts[-1])
    rows = tokens if windows.order is None else tokens[windows.order]
    found, start = [], 0
    for number, length in windows.batches:
        found += rows[start : start + number * length].view(number, length).tolist()
        start += number * length
    expected = [list(range(a, b)) for a, b in zip(cuts, cuts[1:]) if b > a]
    assert sorted(found) == expected and start == cuts[-1]
    assert len(windows.batches) == len({n for n in lengths if n})
    assert windows.back is None or torch.equal(rows[windows.back], tokens)


def test_a_checkpointed_layer_is_computed_again_in_batches(monkeypatch):
    """An attention swapped for the length of the call only would be Transformers' loop in the backward pass."""
    model = make_model("qwen2_5_vl", trainable=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    features, shapes = encode_video(model.train(), noise(model, ODD)), count_calls(monkeypatch)
    features.pooler_output[0].sum().backward()
    assert [shape[0] for shape in shapes] == [3] * 5


def test_eager_attention_is_called_where_it_was_asked_for(monkeypatch):
    model = make_model("qwen2_5_vl")
    video = noise(model, ODD)
    expected = encode_video(model, video)
    model.set_attn_implementation("eager")
    shapes = count_calls(monkeypatch)
    assert_same_features(encode_video(model, video), expected)
    assert shapes == []


def test_flash_attention_keeps_the_call_that_transformers_makes():
    model, lengths = make_model("qwen2_5_vl"), []

    def flash(module, query, key, value, attention_mask, cu_seq_lens_q, **kwargs):
        lengths.append(cu_seq_lens_q.diff().tolist())
        return query.transpose(1, 2), None

    AttentionInterface.register("flash_in_this_test", flash)
    tower_of(model).config._attn_implementation = "flash_in_this_test"
    encode_video(model, noise(model, ODD))
    assert lengths == [[64, 48, 16, 12] * 3, [140] * 3]


# ---- with a graph or without


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("grad", [None, False, True])
def test_a_graph_is_kept_when_the_tower_is_trained_or_when_it_is_asked_for(grad, trainable, around):
    model, saved = make_model("qwen3_vl", trainable), []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with around(), keep:
        if grad and (not trainable or around is torch.inference_mode):
            with pytest.raises(BadUse, match="trainable" if not trainable else "no_grad"):
                encode_video(model, noise(model, ODD), grad)
            return
        features = encode_video(model, noise(model, ODD), grad)
        enabled = torch.is_grad_enabled()
    expected = bool(grad) or grad is None and trainable and around is nullcontext
    assert [part.requires_grad for part in parts(features)] == [expected] * 2
    assert bool(saved) == expected
    assert enabled == (around is nullcontext)


def test_features_of_a_frozen_tower_can_be_trained_on():
    """Features made under inference_mode cannot: autograd refuses to save them."""
    model = make_model("qwen2_5_vl")
    weight = torch.ones(32, requires_grad=True)
    (encode_video(model, noise(model, ODD)).pooler_output[0] * weight).sum().backward()
    assert weight.grad.abs().sum() > 0


# ---- the model is left alone


def state(model) -> list:
    """What each module holds, by identity: parts, weights, forward, hooks, mode, and the attention of its config."""
    found = []
    for name, module in model.named_modules():
        held = {key: id(value) for part in (module._modules, module._parameters) for key, value in part.items()}
        attention = getattr(getattr(module, "config", None), "_attn_implementation", "")
        found.append((name, id(module), held, sorted(vars(module)), len(module._forward_hooks), attention))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_as_it_was_even_after_an_exception(family):
    model = make_model(family, trainable=True)
    before, weights = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    encode_video(model, noise(model, ODD))
    assert state(model) == before
    hook = tower_of(model).blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode_video(model, noise(model, ODD))
    hook.remove()
    assert state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_two_threads_do_not_meet():
    model = make_model("qwen2_5_vl")
    videos = [noise(model, grid, seed) for seed, grid in enumerate([ODD, (2, 18, 6), (1, 10, 14), (4, 8, 16)])]
    expected, found = [encode_video(model, v).pooler_output[0] for v in videos], {}

    def work(k: int):
        for _ in range(5):
            found.setdefault(k, []).append(encode_video(model, videos[k]).pooler_output[0])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(len(found[k]) == 5 for k in range(4))
    assert all(torch.equal(out, expected[k]) for k in range(4) for out in found[k])


@pytest.mark.parametrize("family", FAMILIES)
def test_accelerates_hooks_run_and_the_windows_are_batched_all_the_same(family, monkeypatch):
    model = make_model(family)
    video = noise(model, ODD)
    expected, seen = encode_video(model, video), []

    class Watch(AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module).__name__)
            return super().pre_forward(module, *args, **kwargs)

    for module in list(tower_of(model).modules()):
        add_hook_to_module(module, Watch(execution_device="cpu"))
    theirs(model, video)
    wanted, calls = sorted(seen), count_calls(monkeypatch)
    seen.clear()
    assert_same_features(encode_video(model, video), expected)
    assert sorted(seen) == [name for name in wanted if name != "Conv3d"]
    assert len(calls) == (5 if family == "qwen2_5_vl" else 2)


# ---- bad input


def with_nan(pixels: torch.Tensor, row: int) -> torch.Tensor:
    pixels = pixels.clone()
    pixels[row, 5] = float("nan")
    return pixels


CHANGES = {
    "(419, 1176)": lambda v: {"pixel_values": v.pixel_values[:-1]},
    "3x10x14 patches for this tower are (420, 1176)": lambda v: {"pixel_values": v.pixel_values[:, :-1]},
    "4x10x14": lambda v: {"grid_thw": torch.tensor([4, 10, 14])},
    "[3, 10, 13]": lambda v: {"grid_thw": torch.tensor([3, 10, 13])},
    "[0, 10, 14]": lambda v: {"grid_thw": torch.tensor([0, 10, 14])},
    "[[3, 10, 14]]": lambda v: {"grid_thw": torch.tensor([[3, 10, 14]])},
    "[3.0, 10.0, 14.0]": lambda v: {"grid_thw": torch.tensor([3.0, 10, 14])},
    "torch.float64": lambda v: {"pixel_values": v.pixel_values.double()},
    "torch.uint8": lambda v: {"pixel_values": v.pixel_values.byte()},
    "are on meta, the vision tower on cpu": lambda v: {"pixel_values": v.pixel_values.to("meta")},
    "1 rows, first in row 141 (temporal patch 1,": lambda v: {"pixel_values": with_nan(v.pixel_values, 141)},
}


@pytest.mark.parametrize("told", CHANGES)
def test_bad_input_is_named(told):
    model = MODELS["qwen2_5_vl"].model
    video = noise(model, ODD)
    with pytest.raises(StkitError) as error:
        encode_video(model, video._replace(**CHANGES[told](video)))
    assert told in str(error.value) and ": " in str(error.value)


def test_an_output_that_is_not_finite_is_told_from_bad_pixels():
    model = make_model("qwen2_5_vl")
    video = noise(model, ODD)
    tower_of(model).merger.mlp[2].bias.data[3] = float("inf")
    with pytest.raises(StkitError, match=r"output is not finite \(in float32; the pixels are\).*weights"):
        encode_video(model, video)
    with pytest.raises(StkitError, match="load the model in float32 or bfloat16"):
        encode_video(model.half(), video)


def test_a_model_without_weights_or_without_a_tower_is_refused():
    model = make_model("qwen2_5_vl")
    video = noise(model, ODD)
    with pytest.raises(StkitError, match="Linear has no vision tower"):
        encode_video(torch.nn.Linear(2, 2), video)
    with pytest.raises(StkitError, match="the vision tower on meta: load the weights"):
        encode_video(model.to("meta"), video)


def test_a_block_with_a_forward_pass_of_its_own_is_refused():
    model = make_model("qwen2_5_vl")
    block = tower_of(model).blocks[0]
    block.forward = lambda *args, **kwargs: args[0]
    with pytest.raises(StkitError, match="Qwen2_5_VLVisionBlock was replaced"):
        encode_video(model, noise(model, ODD))


def test_no_video_has_no_features():
    assert encode_video(MODELS["qwen2_vl"].model, None) is None


def test_out_of_memory_in_the_tower_says_what_to_lower(monkeypatch):
    model = MODELS["qwen2_5_vl"].model

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr(F, "scaled_dot_product_attention", full)
    with pytest.raises(StkitError, match=r"out of memory: 32 patches .* tower: lower frames or max_pixels .*3.00 GiB"):
        encode_video(model, noise(model, (2, 4, 4)))
