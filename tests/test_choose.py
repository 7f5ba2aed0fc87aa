"""What is chosen on machines that are not this one, what 4 bits do, and what doctor says."""

import json
import sys
from types import ModuleType

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from stkit import doctor, load_model
from stkit.runtime import BadUse, StkitError
from stkit.vlm import choose as choices

torch.set_num_threads(1)


def pretend(monkeypatch, capability=None, mps=False, flash=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: flash)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setattr(choices, "nf4_usable", lambda device: (True, "works"))


def chosen(**arguments):
    choice = choices.choose(3_000_000_000, **arguments)
    return choice.device, str(choice.dtype).removeprefix("torch."), choice.attention, choice.four_bit


def test_a_t4_gets_float16_and_sdpa_even_with_flash_attn_installed(monkeypatch):
    pretend(monkeypatch, capability=(7, 5), flash=True)
    assert chosen() == ("cuda", "float16", "sdpa", True)
    assert "T4" in choices.choose().why["attention"]


def test_a_newer_gpu_gets_bfloat16_and_flash_attn_where_it_is_installed(monkeypatch):
    pretend(monkeypatch, capability=(8, 0), flash=True)
    assert chosen() == ("cuda", "bfloat16", "flash_attention_2", True)
    assert chosen(dtype="float32")[2] == "sdpa"
    pretend(monkeypatch, capability=(8, 0), flash=False)
    assert chosen() == ("cuda", "bfloat16", "sdpa", True)
    assert "pip install 'stkit[gpu]'" in choices.choose().why["attention"]


def test_a_flash_attn_that_cannot_be_imported_is_not_chosen(monkeypatch):
    pretend(monkeypatch, capability=(8, 0), flash=True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert chosen()[2] == "sdpa"
    with pytest.raises(StkitError, match="installed but broken .*: pip install --force-reinstall flash-attn"):
        chosen(attention="flash_attention_2")


def test_an_apple_gpu_gets_bfloat16_without_4_bits(monkeypatch):
    pretend(monkeypatch, mps=True)
    assert chosen() == ("mps", "bfloat16", "sdpa", False)


def test_a_cpu_gets_float32_and_sdpa_even_with_flash_attn_installed(monkeypatch):
    pretend(monkeypatch, flash=True)
    assert chosen() == ("cpu", "float32", "sdpa", False)
    assert chosen(four_bit=True) == ("cpu", "bfloat16", "sdpa", True)
    assert load_model("tiny-untrained").model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"attention": "flash_attention_2"}, StkitError, "cannot be used: flash-attn needs a CUDA GPU, this is cpu"),
        ({"attention": "flash"}, BadUse, "attention 'flash' is unknown: use auto, sdpa"),
        ({"dtype": "int8"}, BadUse, "dtype 'int8' is unknown"),
        ({"device": "tpu"}, BadUse, "device 'tpu' is unknown"),
        ({"device": "cuda"}, StkitError, "device 'cuda' is not usable here"),
    ],
)
def test_what_was_asked_for_is_never_replaced(arguments, kind, message, monkeypatch):
    pretend(monkeypatch)
    with pytest.raises(kind, match=message) as error:
        load_model("tiny-untrained", **arguments)
    assert "\n" not in str(error.value)


# ---- 4 bits


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


@pytest.fixture(scope="module")
def quantised():
    return load_model("tiny-untrained", four_bit=True, device="cpu")


def test_nf4_takes_about_a_quarter_of_the_memory_of_16_bits(quantised):
    import bitsandbytes as bnb

    assert quantised.record["four_bit"] and quantised.record["dtype"] == "bfloat16"
    packed = whole = 0
    for module in quantised.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            assert state.quant_type == "nf4" and state.nested and module.compute_dtype == torch.bfloat16
            scales = (state.absmax, state.state2.absmax)
            packed += module.weight.nbytes + sum(scale.nbytes for scale in scales)
            whole += 2 * state.shape.numel()
    assert whole > 2 * 0.7 * quantised.record["parameters"]  # all but embeddings and norms
    assert 0.25 < packed / whole < 0.3


def test_nf4_computes_with_its_rounded_weights_and_rounds_them_to_the_nearest(quantised):
    from bitsandbytes import functional, nn

    original = load_model("tiny-untrained").model
    rounded = load_model("tiny-untrained", dtype="bfloat16").model
    for name, module in quantised.model.named_modules():
        if isinstance(module, nn.Linear4bit):
            weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            exact = original.get_submodule(name).weight
            largest = exact.reshape(-1, 64).abs().amax(1, keepdim=True)
            # half the widest gap between two of NF4's 16 values (-1 and -0.696), and what rounding the scales adds
            assert ((weight - exact).reshape(-1, 64).abs() <= 0.152 * largest + 0.05 * largest.max()).all()
            rounded.get_submodule(name).weight.data = weight
    agreement = torch.nn.functional.cosine_similarity(
        logits(rounded).float().flatten(), logits(quantised.model).float().flatten(), dim=0
    )
    assert agreement > 0.999


def test_a_lora_on_nf4_learns_and_leaves_the_base_alone():
    """In training mode: in evaluation bitsandbytes lays weights of 4 bits out anew on CPUs with AVX-512 for bfloat16."""
    model = load_model("tiny-untrained", four_bit=True, device="cpu").model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(5, 25)[None]
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
        assert all(g is not None and torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_4_bits_are_chosen_for_big_models_on_a_gpu_only(monkeypatch):
    monkeypatch.setattr(choices, "nf4_usable", lambda device: (True, "works"))
    assert choices.pick_four_bit(None, "cuda", 3_000_000_000)[0] is True
    assert choices.pick_four_bit(None, "cuda", 1_000_000_000)[0] is False
    assert choices.pick_four_bit(None, "cpu", 3_000_000_000)[0] is False
    assert choices.pick_four_bit(False, "cuda", 3_000_000_000)[0] is False


def test_4_bits_that_cannot_be_had_are_an_error_and_never_dropped_silently(monkeypatch):
    monkeypatch.setattr(
        choices, "nf4_usable", lambda device: (False, "bitsandbytes does not work here (ImportError: no)")
    )
    with pytest.raises(StkitError, match="four_bit=True cannot be used: bitsandbytes does not work here"):
        choices.pick_four_bit(True, "cuda", 0)
    chosen, why = choices.pick_four_bit(None, "cuda", 3_000_000_000)
    assert chosen is False and "does not work here" in why


def test_a_broken_bitsandbytes_is_found_out_by_trying(monkeypatch):
    import bitsandbytes.functional

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel\nfor this device")

    assert choices.nf4_usable("cpu") == (True, "bitsandbytes works on this device")
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    assert choices.nf4_usable("cpu") == (
        False,
        "bitsandbytes does not work here (RuntimeError: no kernel for this device)",
    )
    assert choices.nf4_usable("mps")[0] is False


# ---- doctor


def test_doctor_names_the_machine_the_backends_and_what_load_model_would_choose():
    result = doctor()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["machine"]["cpu_cores"] >= 1 and result["machine"]["memory_gb"] > 0
    assert set(result["backends"]) == {
        "attention: sdpa",
        "attention: flash-attn",
        "4 bits: NF4",
        "decord",
        "av",
        "vizdoom",
    }
    assert result["backends"]["4 bits: NF4"]["usable"] and result["backends"]["vizdoom"]["usable"]
    choice = choices.choose(3_750_000_000)
    assert (result["choice"]["device"], result["choice"]["attention"]) == (choice.device, choice.attention)
    for words in ("torch 2.", "cores", "would choose", "float32", "flash-attn needs a CUDA GPU"):
        assert words in result["text"]


def test_doctor_says_what_to_install_only_where_it_helps(monkeypatch):
    from stkit.vlm import doctor as module

    pretend(monkeypatch, capability=(8, 0), flash=False)
    monkeypatch.setattr(module, "nf4_usable", lambda device: (False, "bitsandbytes does not work here (no)"))
    found = module.backends(choices.choose(0))
    found["vizdoom"] = {"usable": False, "why": "cannot be imported"}
    advice = module.advice(found, choices.choose(0))
    assert [line.split(": ")[-1] for line in advice] == [
        "pip install 'stkit[gpu]'",
        "pip install --upgrade bitsandbytes",
        "pip install vizdoom",
    ]
    pretend(monkeypatch, flash=False)
    found = {name: {"usable": True, "why": ""} for name in found}
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert module.advice(found, choices.choose(0)) == []
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "CUDA build" in module.advice(found, choices.choose(0))[0]


def test_doctor_reports_a_package_that_cannot_be_imported(monkeypatch):
    from stkit.vlm import doctor as module

    def broken(name):
        raise OSError("libGL.so.1: cannot open\nshared object file")

    monkeypatch.setattr(module, "import_module", broken)
    state = module.backends(choices.choose(0))["vizdoom"]
    assert state == {"usable": False, "why": "cannot be imported (OSError: libGL.so.1: cannot open shared object file)"}
