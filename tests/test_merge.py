"""A merged folder is a model of its own: plain Transformers loads it, and it answers as the trained one did."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from families import save_small
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from stkit import load_model
from stkit.runtime import BadUse, StkitError
from stkit.train import merge as module
from stkit.train.merge import merge
from stkit.vlm.prompts import build_prompt
from stkit.vlm.video import Frames, prepare, video_spec

torch.set_num_threads(1)
CLASSES = {
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
}
LANGUAGE = ["q_proj", "v_proj", "down_proj"]
TOWER = r".*visual.*(attn\.qkv|attn\.proj|mlp\.(gate_proj|down_proj|fc1))|.*language_model.*q_proj"


def write_run(
    folder: Path, model="tiny-untrained", four_bit=False, dtype="float32", targets=LANGUAGE, to="adapter", **lora
):
    """A training run's folder by hand: config.yaml, and an adapter of random numbers that changes what is said."""
    loaded = load_model(model, four_bit=four_bit, device="cpu", dtype=dtype)
    adapted = get_peft_model(loaded.model, LoraConfig(r=4, **{"lora_alpha": 6, "target_modules": targets} | lora))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if "modules_to_save" in name:
                parameter.mul_(1.2)
    adapted.save_pretrained(folder / to, save_embedding_layers=False)
    config = {"stage": "sft", "settings": {"train": {"lr": 1e-3}}, "bench": "runs/walks", "command": "stkit sft"}
    config["model"] = {k: v for k, v in loaded.record.items() if k not in ("why", "versions")}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "lora")


@pytest.fixture(scope="module")
def merged(lora_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out"
    return out, merge(lora_run, out)


def question(loaded) -> tuple:
    """A question on a video."""
    pixels = np.random.default_rng(3).integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
    frames = Frames(pixels, np.arange(4.0), "test", "uniform", 1.0, 4, np.arange(4))
    video = prepare(frames, video_spec(loaded.processor), min_pixels=56 * 56, max_pixels=96 * 128)
    return build_prompt(module.PROBE, loaded.processor, loaded.record["family"], video), video


def inputs(loaded, prompt, video) -> dict:
    """A prompt with its video, as Transformers takes it."""
    found = {
        "input_ids": torch.tensor([prompt.ids]), "attention_mask": torch.ones(1, len(prompt.ids), dtype=torch.long),
        "mm_token_type_ids": torch.tensor([prompt.mm_token_type_ids]),
        "pixel_values_videos": video.pixel_values, "video_grid_thw": video.grid_thw[None],
    }  # fmt: skip
    if loaded.record["family"] == "qwen2_5_vl":
        found["second_per_grid_ts"] = torch.tensor([video.second_per_grid_s])
    return found


def logits(model, loaded, *asked) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(loaded, *(asked or question(loaded)))).logits.float()


def answer(model, loaded) -> list[int]:
    return model.generate(**inputs(loaded, *question(loaded)), max_new_tokens=12, do_sample=False)[0].tolist()


def trained(run: Path, **how):
    record = yaml.safe_load((run / "config.yaml").read_text())["model"]
    how = {"four_bit": record["four_bit"], "dtype": record["dtype"], "device": "cpu"} | how
    loaded = load_model(record["name"], adapter=run / "adapter", **how)
    for layer in loaded.model.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.training = True  # else bitsandbytes computes in bfloat16 on some CPUs, whatever the dtype
    return loaded


def in_plain_transformers(folder: Path, family="qwen2_5_vl"):
    return CLASSES[family].from_pretrained(folder, dtype="auto", local_files_only=True).eval()


def test_plain_transformers_loads_the_folder_and_gives_the_trained_models_logits_and_answers(lora_run, merged):
    out, facts = merged
    adapted, plain = trained(lora_run), in_plain_transformers(out)
    expected = logits(adapted.model, adapted)
    assert (logits(plain, adapted) - expected).abs().max() < 1e-5
    assert answer(plain, adapted) == answer(adapted.model, adapted)
    with adapted.model.disable_adapter():
        assert (logits(adapted.model, adapted) - expected).abs().max() > 0.1  # the adapter had something to say
    assert facts["method"] == "lora" and facts["layers"] > 0 and facts["difference"]["max"] < 1e-5
    assert facts["original_difference"] is None


def test_processor_generation_config_and_template_are_the_bases(merged):
    out, base = merged[0], load_model("tiny-untrained")
    processor = transformers.AutoProcessor.from_pretrained(out, local_files_only=True)
    assert type(processor) is type(base.processor) and processor.chat_template == base.processor.chat_template
    assert processor.tokenizer.get_vocab() == base.processor.tokenizer.get_vocab()
    assert processor.video_processor.to_dict() == base.processor.video_processor.to_dict()
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == base.model.generation_config.eos_token_id
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"] and "quantization_config" not in config
    assert load_model(out).record["untrained"] is False


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scaling_is_the_adapters(tmp_path, rslora):
    run = write_run(tmp_path / "run", use_rslora=rslora, targets=["v_proj"])
    merge(run, tmp_path / "out")
    key = "model.language_model.layers.0.self_attn.v_proj"
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    low, high = (adapter[f"base_model.model.{key}.lora_{k}.weight"].double() for k in "AB")
    base = load_model("tiny-untrained").model.get_parameter(f"{key}.weight").double()
    expected = base + (6 / math.sqrt(4) if rslora else 6 / 4) * high @ low
    found = in_plain_transformers(tmp_path / "out").get_parameter(f"{key}.weight").double()
    assert (found - expected).abs().max() < 1e-6 < (found - base).abs().max()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_adapters_on_the_tower_and_modules_trained_whole_are_merged_too(tmp_path, family):
    model = "tiny-untrained"
    if family == "qwen2_vl":
        model = str(save_small(family, load_model("tiny-untrained").processor.tokenizer, tmp_path / "base"))
    run = write_run(tmp_path / "run", model, targets=TOWER, modules_to_save=["merger"])
    facts = merge(run, tmp_path / "out")
    adapted, plain = trained(run), in_plain_transformers(tmp_path / "out", family)
    assert (logits(plain, adapted) - logits(adapted.model, adapted)).abs().max() < 1e-5
    changed = [n for n, p in load_model(model).model.named_parameters() if not torch.equal(p, plain.get_parameter(n))]
    assert {n.split(".")[1] for n in changed} == {"visual", "language_model"} and any("merger" in n for n in changed)
    mlp = ["fc1"] if family == "qwen2_vl" else ["down_proj", "gate_proj"]
    assert facts["adapter"]["saved_whole"] == ["merger"]
    assert facts["adapter"]["targets"] == sorted(["q_proj", "qkv", "proj", *mlp])


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def four_bit(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4")
    run = write_run(folder / "run", four_bit=True, dtype=request.param)
    return run, folder / "out", merge(run, folder / "out"), getattr(torch, request.param)


def test_an_nf4_trained_adapter_is_nearer_on_the_dequantised_base_than_on_the_original(four_bit):
    run, out, facts, dtype = four_bit
    adapted, plain = trained(run), in_plain_transformers(out)
    expected = logits(adapted.model, adapted)
    gap = (logits(plain, adapted) - expected).abs()
    original = (logits(trained(run, four_bit=False).model, adapted) - expected).abs()
    assert gap.mean() < original.mean() / 3 and gap.max() < original.max()
    assert facts["difference"]["mean"] < facts["original_difference"]["mean"] / 3
    if dtype == torch.float32:
        assert max(gap.max(), facts["difference"]["max"]) < 1e-4
        assert answer(plain, adapted) == answer(adapted.model, adapted)
    card = (out / "README.md").read_text()
    assert f"{facts['difference']['max']:.2g}" in card and f"{facts['original_difference']['mean']:.2g}" in card


def test_the_measured_differences_are_those_of_transformers_own_log_probs(four_bit):
    run, out, facts, dtype = four_bit
    adapted, original = trained(run), trained(run, four_bit=False)
    prompt, video = module.probe_inputs(adapted)
    text = torch.tensor([i for i, kind in enumerate(prompt.mm_token_type_ids) if i and kind == 0])

    def log_probs(model):
        found = logits(model, adapted, prompt, video).log_softmax(-1)[0]
        return found[text - 1, torch.tensor(prompt.ids)[text]]

    before = log_probs(adapted.model)
    for said, model in (("difference", in_plain_transformers(out)), ("original_difference", original.model)):
        gap = (before - log_probs(model)).abs()
        near = 1e-5 if dtype == torch.float32 else 0.2 * gap.mean().item()
        assert facts[said]["mean"] == pytest.approx(gap.mean().item(), abs=near)
        assert facts[said]["tokens"] == len(text) > 50


def test_the_dtype_is_that_of_the_run(four_bit):
    _, out, facts, dtype = four_bit
    weights = load_file(out / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {dtype} and facts["dtype"] == str(dtype).removeprefix("torch.")
    assert len(weights) >= len(list(load_model("tiny-untrained").model.named_parameters())) - 1  # the head may be tied


def test_a_full_run_is_copied_as_it_is(tmp_path):
    run = tmp_path / "run"
    loaded = load_model("tiny-untrained")
    for part in (loaded.model, loaded.processor):
        part.save_pretrained(run / "model")
    record = {"name": "tiny-untrained", "dtype": "float32", "four_bit": False}
    (run / "config.yaml").write_text(yaml.safe_dump({"stage": "grpo", "model": record}))
    facts = merge(run, tmp_path / "out")
    for file in (run / "model").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert facts["method"] == "full" and "nothing is lost" in (tmp_path / "out/README.md").read_text()
    (run / "model" / "tokenizer.json").unlink()
    with pytest.raises(StkitError, match="no usable processor"):
        merge(run, tmp_path / "other")


def test_a_checkpoint_of_full_training_is_taken_in_the_dtype_that_it_has(tmp_path):
    run, loaded = tmp_path / "run", load_model("tiny-untrained", dtype="bfloat16", device="cpu")
    for part in (loaded.model, loaded.processor):
        part.save_pretrained(run / "checkpoints/step-000002/weights")
    (run / "checkpoints/step-000002/state.json").write_text('{"step": 2}')
    record = {"name": "tiny-untrained", "dtype": "float32", "four_bit": False}
    (run / "config.yaml").write_text(yaml.safe_dump({"stage": "sft", "model": record}))
    assert merge(run, tmp_path / "out", "latest")["dtype"] == "bfloat16"
    merged = load_model(tmp_path / "out", device="cpu", dtype="bfloat16")
    assert logits(merged.model, merged).equal(logits(loaded.model, loaded))


def test_best_and_latest_are_taken_where_they_are_asked_for_and_a_missing_one_says_what_to_do(tmp_path):
    run = write_run(tmp_path / "run", targets=["v_proj"], to="checkpoints/step-000010/weights")
    with pytest.raises(StkitError, match="not finished.*--from latest"):
        merge(run, tmp_path / "out")
    with pytest.raises(StkitError, match="no whole checkpoint"):
        merge(run, tmp_path / "out", "latest")  # state.json is written last
    (run / "checkpoints/step-000010/state.json").write_text('{"step": 10}')
    shutil.copytree(run / "checkpoints/step-000010", run / "checkpoints/step-000002")
    assert merge(run, tmp_path / "out", "latest")["merged_from"]["weights"] == "checkpoints/step-000010/weights"
    with pytest.raises(StkitError, match="no best weights"):
        merge(run, tmp_path / "best", "best")
    shutil.copytree(run / "checkpoints/step-000010/weights", run / "best")
    assert merge(run, tmp_path / "best", "best")["merged_from"]["weights"] == "best"
    with pytest.raises(BadUse, match="final, best, latest"):
        merge(run, tmp_path / "x", "newest")


def test_the_same_merge_again_keeps_the_weights_and_any_other_is_refused(lora_run, merged, tmp_path):
    out = Path(shutil.copytree(merged[0], tmp_path / "out"))
    before = (out / "model.safetensors").stat().st_mtime_ns
    (out / "README.md").unlink()
    again = merge(lora_run, out)
    assert again["reused"] and (out / "model.safetensors").stat().st_mtime_ns == before
    assert (out / "README.md").read_text() == (merged[0] / "README.md").read_text()
    other = Path(shutil.copytree(lora_run, tmp_path / "other"))
    with pytest.raises(StkitError, match="merged_from.run"):
        merge(other, out)
    with pytest.raises(StkitError, match="not empty"):
        merge(lora_run, other)
    assert sorted(os.listdir(other)) == ["adapter", "config.yaml"]


def test_nothing_half_is_left_when_writing_fails(lora_run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(module, "sync", full)
    with pytest.raises(StkitError, match="disk is full"):
        merge(lora_run, tmp_path / "out")
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    (tmp_path / ".out.merging").mkdir()  # what a killed merge leaves
    (tmp_path / ".out.merging" / "model.safetensors").write_text("half")
    assert not merge(lora_run, tmp_path / "out")["reused"] and os.listdir(tmp_path) == ["out"]


def edited(run: Path, to: Path, file: str, change) -> Path:
    copy = Path(shutil.copytree(run, to))
    read, write = (yaml.safe_load, yaml.safe_dump) if file.endswith("yaml") else (json.loads, json.dumps)
    value = read((copy / file).read_text())
    change(value)
    (copy / file).write_text(write(value))
    return copy


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("adapter/adapter_config.json", lambda c: c.update(base_model_name_or_path="Qwen/Other"), "made for Qwen/O"),
        ("adapter/adapter_config.json", lambda c: c.update(r=3), "does not fit tiny"),
        ("config.yaml", lambda c: c["model"].update(name="/gone/base"), "needs its base: model '/gone/base': no such"),
        ("config.yaml", lambda c: c["model"].pop("dtype"), "model.dtype is missing"),
        ("config.yaml", lambda c: c["model"].update(adapter="a", four_bit=True), "started from a on a 4-bit base"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name(lora_run, tmp_path, file, change, words):
    run = edited(lora_run, tmp_path / "run", file, change)
    with pytest.raises(StkitError) as error:
        merge(run, tmp_path / "out")
    assert words in str(error.value) and "\n" not in str(error.value) and os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"bias": "lora_only"}])
def test_an_adapter_that_is_more_than_a_product_is_refused(tmp_path, kind):
    run = write_run(tmp_path / "run", **kind)
    with pytest.raises(StkitError, match=f"{next(iter(kind))}=.* cannot be merged"):
        merge(run, tmp_path / "out")


def test_a_sum_that_its_dtype_cannot_hold_is_refused_by_name(lora_run):
    adapted, plain = trained(lora_run).model, load_model("tiny-untrained", dtype="float16", device="cpu").model
    key = "model.language_model.layers.2.self_attn.v_proj"
    adapted.get_parameter(f"base_model.model.{key}.lora_B.default.weight").data.fill_(1e9)
    with pytest.raises(StkitError, match=f"{key}.weight is not finite .*float16"):
        module._fill(plain, adapted, quantised=True)


def test_a_run_that_has_diverged_is_refused(tmp_path):
    run = write_run(tmp_path / "run", targets=["v_proj"], lora_alpha=float("inf"))
    with pytest.raises(StkitError, match="not finite"):
        merge(run, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(StkitError, match="no such run"):
        merge(tmp_path / "gone", tmp_path / "out")
    with pytest.raises(StkitError, match="no config.yaml"):
        merge(tmp_path, tmp_path / "out")


def test_a_run_that_started_from_an_adapter_has_both_in_it(lora_run, tmp_path):
    def second(config):
        start = load_model("tiny-untrained", adapter=lora_run / "adapter").record
        config["model"].update(adapter=start["adapter"], adapter_sha256=start["adapter_sha256"])

    run = edited(lora_run, tmp_path / "run", "config.yaml", second)
    merge(run, tmp_path / "out")
    key = "model.language_model.layers.1.self_attn.q_proj.weight"
    base = load_model("tiny-untrained").model.get_parameter(key)
    once = trained(lora_run).model.merge_and_unload().get_parameter(key)
    found = in_plain_transformers(tmp_path / "out").get_parameter(key)
    assert (found - (base + 2 * (once - base))).abs().max() < 1e-5 < (once - base).abs().max()
    changed = edited(run, tmp_path / "changed", "config.yaml", lambda c: c["model"].update(adapter_sha256="0"))
    with pytest.raises(StkitError, match="changed since"):
        merge(changed, tmp_path / "new")
