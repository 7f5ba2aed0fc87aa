"""Loading: three families, a record of what was chosen, and one line for everything that is wrong."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from families import save_small
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from stkit import load_model
from stkit.runtime import StkitError
from stkit.vlm import choose as choices
from stkit.vlm import load

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def loaded():
    return load_model("tiny-untrained")


@pytest.fixture(scope="module")
def checkpoint(loaded, tmp_path_factory):
    """The tiny model as a folder with safetensors: copied by the tests that damage it."""
    folder = tmp_path_factory.mktemp("models") / "base"
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "base"))


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


def edit(path: Path, **changes) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({key: v for key, v in (value | changes).items() if v is not None}))


# ---- what is loaded


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_the_other_two_families_load_and_compute_what_transformers_does(family, loaded, tmp_path):
    model, processor, record = load_model(save_small(family, loaded.processor.tokenizer, tmp_path))
    assert (record["family"], record["untrained"], record["context"]) == (family, False, 512)
    assert type(model) is load.FAMILIES[family][0] and type(processor) is load.FAMILIES[family][1]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Where?"}]}], tokenize=False
    )
    video = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)
    metadata = {"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3]}
    inputs = processor(text=[prompt], videos=[video], video_metadata=[metadata], return_tensors="pt")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours = model(**inputs).logits
        assert torch.isfinite(ours).all() and torch.equal(ours, plain(**inputs).logits)


def test_a_local_folder_loads_with_its_weights(loaded, checkpoint):
    model, _, record = load_model(checkpoint)
    assert record["name"] == str(checkpoint) and record["untrained"] is False and record["weights"] == "safetensors"
    assert record["parameters"] == loaded.record["parameters"]
    assert torch.equal(logits(model), logits(loaded.model))


def test_a_sharded_folder_loads(loaded, checkpoint, tmp_path):
    loaded.model.save_pretrained(tmp_path, max_shard_size="4MB")
    loaded.processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load_model(tmp_path).model), logits(loaded.model))


def test_a_folder_in_the_older_form_of_the_hub_loads(loaded, copy):
    config = json.loads((copy / "config.json").read_text())
    text, vision = config.pop("text_config"), config["vision_config"]
    rope = text.pop("rope_parameters")
    vision.pop("rope_parameters")
    flat = text | config | {"model_type": "qwen2_5_vl", "rope_theta": rope["rope_theta"], "torch_dtype": "bfloat16"}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat["vision_config"] = vision | {"model_type": "qwen2_5_vl", "in_chans": 3}
    (copy / "config.json").write_text(json.dumps(flat))
    weights = load_file(copy / "model.safetensors")
    old = {
        k.replace("model.language_model.", "model.").replace("model.visual.", "visual."): v for k, v in weights.items()
    }
    assert old.keys().isdisjoint(weights)
    save_file(old, copy / "model.safetensors", metadata={"format": "pt"})
    model, _, record = load_model(copy)
    assert torch.equal(logits(model), logits(loaded.model)) and record["context"] == loaded.record["context"]


def test_the_record_is_plain_json_with_a_reason_for_each_choice(loaded):
    record = json.loads(json.dumps(loaded.record, allow_nan=False))
    assert {
        "name",
        "family",
        "untrained",
        "manifest",
        "device",
        "dtype",
        "attention",
        "tree_attention",
        "four_bit",
        "adapter",
        "why",
        "versions",
    } <= set(record)
    assert {"device", "dtype", "attention", "tree_attention", "four_bit"} <= set(record["why"])
    assert (record["device"], record["dtype"], record["attention"]) == ("cpu", "float32", "sdpa")
    assert record["vocabulary"] == len(loaded.processor.tokenizer)
    assert record["versions"]["transformers"] == transformers.__version__


def test_loading_says_in_one_line_on_stderr_what_was_chosen(capfd):
    load_model("tiny-untrained")
    out, err = capfd.readouterr()
    assert out == ""
    assert (
        err
        == "model tiny-untrained (qwen2_5_vl): 3.0 M parameters, cpu, float32, cpu-flash attention on trees, sdpa in the tower, untrained weights: expect chance\n"
    )


def test_dtype_and_attention_can_be_asked_for():
    model, _, record = load_model("tiny-untrained", dtype="bfloat16", attention="eager")
    assert next(model.parameters()).dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert (record["dtype"], record["attention"]) == ("bfloat16", "eager")
    assert record["why"]["dtype"] == record["why"]["attention"] == "asked for"


# ---- bad folders


def fails(folder, *words) -> None:
    with pytest.raises(StkitError) as error:
        load_model(folder)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500 and all(word in message for word in words), message


def test_a_folder_without_a_config_is_refused(tmp_path):
    fails(tmp_path, str(tmp_path), "no config.json", "save_pretrained")


def test_a_config_that_is_not_json_or_no_configuration_is_refused(copy):
    edit(copy / "config.json", text_config={"hidden_size": "wide"})
    fails(copy, "config.json", "not a configuration of qwen2_5_vl")
    (copy / "config.json").write_text("{")
    fails(copy, "config.json", "not JSON")
    (copy / "config.json").write_text("[]")
    fails(copy, "model_type None")


def test_another_architecture_is_refused_by_name(copy):
    edit(copy / "config.json", model_type="llama")
    fails(copy, "'llama'", "qwen2_vl, qwen2_5_vl, qwen3_vl")


def test_weights_that_are_quantised_already_are_refused(copy):
    edit(copy / "config.json", quantization_config={"quant_method": "awq"})
    fails(copy, "awq", "four_bit=True")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_and_never_opened(copy, name):
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(pickle.dumps(Bomb(copy / "opened")))
    edit(copy / "config.json", transformers_weights="adapter_model.bin")
    (copy / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(copy / "opened")))
    fails(copy, "only pickled weights", "save_pretrained")
    assert not (copy / "opened").exists()


def test_pickled_weights_beside_safetensors_stay_closed(copy):
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        (copy / name).write_bytes(pickle.dumps(Bomb(copy / "opened")))
    edit(copy / "config.json", transformers_weights="adapter_model.bin")
    load_model(copy)
    assert not (copy / "opened").exists()


def test_code_in_a_folder_is_never_run(copy):
    (copy / "code.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\nclass Anything: pass\n")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        edit(copy / name, auto_map={kind: "code.Anything" for kind in ("AutoConfig", "AutoModel", "AutoProcessor")})
    edit(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Anything", "code.Anything"]})
    load_model(copy)
    assert not (copy / "ran").exists()


def test_a_folder_with_no_weights_at_all_is_refused(copy):
    (copy / "model.safetensors").unlink()
    fails(copy, "no model.safetensors")


def test_a_truncated_weights_file_is_refused(copy):
    data = (copy / "model.safetensors").read_bytes()
    for size in (len(data) // 2, 100, 0):
        (copy / "model.safetensors").write_bytes(data[:size])
        fails(copy, "model.safetensors", "not a whole safetensors file", "download it again")


def test_a_missing_shard_is_named(loaded, checkpoint, tmp_path):
    loaded.model.save_pretrained(tmp_path, max_shard_size="4MB")
    lost = min(tmp_path.glob("*.safetensors"))
    lost.unlink()
    fails(tmp_path, lost.name, "is missing")


def damage(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_weight_that_is_missing_is_an_error_and_not_made_up(copy):
    damage(copy, lambda weights: weights.pop(next(key for key in weights if "layers.1.mlp.up_proj" in key)))
    fails(copy, "1 missing", "layers.1.mlp.up_proj.weight")


def test_a_weight_that_has_no_place_is_an_error(copy):
    damage(copy, lambda weights: weights.update({"model.language_model.layers.9.extra": torch.ones(2)}))
    fails(copy, "1 left over", "layers.9.extra")


def test_a_weight_of_another_shape_is_an_error(copy):
    damage(copy, lambda weights: weights.update({"model.language_model.norm.weight": torch.ones(191)}))
    fails(copy, "1 of another shape", "norm.weight")


def test_a_folder_without_a_tokenizer_is_refused(copy):
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (copy / name).unlink()
    fails(copy, "no usable processor or tokenizer")


def test_a_file_and_a_name_that_is_neither_folder_nor_hub_are_refused(checkpoint):
    fails(checkpoint / "config.json", "is a file", "config.json")
    fails("no-such-model", "'no-such-model'", "no such folder")
    fails("./no/such/folder", "no such folder")


def test_a_model_that_cannot_fit_in_memory_is_refused_before_it_is_read(checkpoint, monkeypatch):
    monkeypatch.setattr(load, "memory_gb", lambda device: 0.01)
    fails(checkpoint, "needs about 0.012 GB", "has 0.01 GB", "four_bit=True")
    monkeypatch.setattr(load, "memory_gb", lambda device: 3.0)
    three_billion, in_four_bits = 3_000_000_000, choices.choose(four_bit=True, device="cpu")
    load.check_memory(load.Source("x", checkpoint), three_billion, in_four_bits)
    with pytest.raises(StkitError, match="needs about 3.9 GB, cpu has 3 GB: use a smaller model"):
        load.check_memory(load.Source("x", checkpoint), 7_000_000_000, in_four_bits)


# ---- the hub


def test_a_hub_model_without_a_network_is_one_line_with_three_ways_out():
    fails("Qwen/Qwen2.5-VL-3B-Instruct", "hf download Qwen/Qwen2.5-VL-3B-Instruct", "local folder", "'tiny'")


def test_a_hub_model_is_fetched_without_pickles_or_code_and_recorded_by_its_commit(checkpoint, monkeypatch):
    import huggingface_hub

    asked = []

    def fake(name, allow_patterns, ignore_patterns):
        asked.append((name, tuple(allow_patterns), tuple(ignore_patterns)))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    model, _, record = load_model("someone/Small-VL")
    assert record["name"] == model.name_or_path == "someone/Small-VL"
    assert record["revision"] == checkpoint.name
    small = ("*.json", "*.txt", "*.jinja")
    assert asked == [("someone/Small-VL", p, ("*/*",)) for p in (small, (*small, "*.safetensors"))]


def test_another_architecture_is_refused_before_its_weights_are_fetched(copy, monkeypatch):
    import huggingface_hub

    edit(copy / "config.json", model_type="llava")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.append(how) or str(copy))
    fails("someone/Other-VL", "'llava'")
    assert len(asked) == 1


@pytest.mark.parametrize("kind, words", [("RepositoryNotFoundError", "no such model"), ("GatedRepoError", "gated")])
def test_a_hub_model_that_is_not_there_or_closed_is_one_line(kind, words, monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise getattr(huggingface_hub.errors, kind).__new__(getattr(huggingface_hub.errors, kind))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    fails("someone/Closed-VL", words)
