"""A LoRA adapter goes on the model that it was made for, whole, and on no other."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from stkit import load_model
from stkit.runtime import StkitError
from stkit.vlm import adapter as adapters

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def loaded():
    return load_model("tiny-untrained")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """An adapter of the tiny model that changes what it says, and its logits."""
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    model = get_peft_model(load_model("tiny-untrained").model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder, logits(model.eval())


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


def edit(path: Path, **changes) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({key: v for key, v in (value | changes).items() if v is not None}))


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_an_adapter_gives_back_the_logits_of_the_model_that_was_saved(lora, loaded):
    folder, expected = lora
    model, _, record = load_model("tiny-untrained", adapter=folder)
    assert torch.equal(logits(model), expected) and not torch.equal(expected, logits(loaded.model))
    assert record["adapter"] == str(folder.resolve()) and not model.training
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert record["adapter_sha256"] == hashlib.sha256(weights).hexdigest()


def test_an_adapter_loads_on_a_4_bit_base(lora):
    model = load_model("tiny-untrained", four_bit=True, device="cpu", adapter=lora[0]).model
    with_it = logits(model)
    assert torch.isfinite(with_it).all()
    with model.disable_adapter():
        without = logits(model)
    assert torch.equal(without, logits(load_model("tiny-untrained", four_bit=True, device="cpu").model))
    assert not torch.equal(with_it, without)


@pytest.fixture
def lora_copy(lora, tmp_path):
    return Path(shutil.copytree(lora[0], tmp_path / "lora"))


def adapter_fails(folder, *words, model="tiny-untrained") -> None:
    with pytest.raises(StkitError) as error:
        load_model(model, adapter=folder)
    message = one_line(error)
    assert all(word in message for word in words), message


def test_an_adapter_for_another_base_is_refused_by_name_though_its_shapes_fit(lora_copy):
    edit(lora_copy / "adapter_config.json", base_model_name_or_path="Qwen/Qwen2-VL-7B-Instruct")
    adapter_fails(lora_copy, "made for Qwen/Qwen2-VL-7B-Instruct, not for tiny")


def test_an_adapter_of_another_shape_is_refused_though_its_name_fits(lora_copy):
    weights = load_file(lora_copy / "adapter_model.safetensors")
    wide = {key: torch.zeros(*[2 * n if n == 192 else n for n in value.shape]) for key, value in weights.items()}
    save_file(wide, lora_copy / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter_fails(lora_copy, "does not fit tiny", "size mismatch")


@pytest.mark.parametrize("fault", ["missing", "left over"])
def test_an_adapter_with_a_tensor_missing_or_left_over_is_refused(lora_copy, fault):
    weights = load_file(lora_copy / "adapter_model.safetensors")
    key = min(weights)
    extra = {key.replace("layers.0", "layers.7"): weights[key].clone()}
    changed = {k: v for k, v in weights.items() if k != key} if fault == "missing" else weights | extra
    save_file(changed, lora_copy / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter_fails(lora_copy, f"1 tensors {fault}", "lora_A")


def test_an_adapter_for_modules_that_the_base_lacks_is_refused(lora_copy):
    edit(lora_copy / "adapter_config.json", target_modules=["query_key_value"])
    adapter_fails(lora_copy, "does not fit tiny", "query_key_value")


def test_a_pickled_adapter_is_refused_and_never_opened(lora_copy):
    (lora_copy / "adapter_model.safetensors").unlink()
    (lora_copy / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(lora_copy / "opened")))
    adapter_fails(lora_copy, "only pickled weights")
    assert not (lora_copy / "opened").exists()


def test_a_folder_that_is_no_lora_adapter_is_refused(lora_copy, tmp_path):
    adapter_fails(tmp_path / "nowhere", "no adapter_config.json")
    get_peft_model(
        load_model("tiny-untrained").model, IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ).save_pretrained(tmp_path / "ia3", save_embedding_layers=False)
    adapter_fails(tmp_path / "ia3", "not a LoRA adapter")
    (lora_copy / "adapter_model.safetensors").unlink()
    adapter_fails(lora_copy, "no adapter_model.safetensors")


def test_an_adapter_follows_its_base_into_another_folder_but_not_to_a_namesake(tmp_path):
    assert adapters.same_base("tiny", "tiny")
    assert adapters.same_base("Qwen/Qwen2.5-VL-3B-Instruct", str(tmp_path / "Qwen2.5-VL-3B-Instruct"))
    assert adapters.same_base("/gone/merged", str(tmp_path / "merged"))
    assert not adapters.same_base("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")
    for run in ("a", "b"):
        (tmp_path / run / "merged").mkdir(parents=True)
    assert not adapters.same_base(str(tmp_path / "a" / "merged"), str(tmp_path / "b" / "merged"))


def test_an_adapters_folder_given_as_the_model_is_refused(lora):
    with pytest.raises(StkitError) as error:
        load_model(lora[0])
    assert "give this folder as adapter=" in one_line(error)
