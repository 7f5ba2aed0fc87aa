"""Put a LoRA adapter on the model that it was made for, and on no other.

peft only warns when an adapter's tensors are missing or find no place, and an adapter for another model of the same
shape loads without a word. Here the base's name, every key and every shape have to agree.

    >>> same_base("Qwen/Qwen2.5-VL-3B-Instruct", "/models/Qwen2.5-VL-3B-Instruct")
    True
"""

from pathlib import Path

from ..runs import read_json, read_yaml
from ..runtime import StkitError
from .choose import one_line


def load_adapter(model, base: str, folder: Path, device: str):
    """The model with the adapter on it, in evaluation mode.

    Args:
        model: the loaded base.
        base: the base's name in the record: "tiny", a hub name or a folder's path.
        folder: what peft's ``save_pretrained`` wrote.
        device: where the model is.

    Raises:
        StkitError: no adapter there, only pickled weights, not a LoRA, made for another base, or a tensor that is
            missing, left over or of another shape.
    """
    from peft import LoraConfig, PeftModel

    check_folder(folder)
    settings = read_json(folder / "adapter_config.json")
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise StkitError(f"{folder}: not a LoRA adapter: stkit loads adapters of peft_type LORA")
    made_for = settings.get("base_model_name_or_path")
    if made_for and not same_base(made_for, base):
        raise StkitError(f"adapter {folder} was made for {made_for}, not for {base}: load {made_for} with it")
    other = f"adapter {folder} does not fit {base}, it was made for another model"
    try:
        config = LoraConfig.from_pretrained(str(folder), local_files_only=True)
        adapted = PeftModel.from_pretrained(model, str(folder), config=config, torch_device=device)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise StkitError(f"{other} ({one_line(error)})") from error
    faults = differences(adapted, folder)
    if faults:
        raise StkitError(f"{other}: {faults}")
    return adapted.eval()


def check_base(adapter: Path, base: str, manifest: dict | None) -> None:
    """Refuse weights with a manifest that are not those on which a run trained its adapter, whatever their name is."""
    config = adapter.parent / "config.yaml"
    if not config.is_file():
        return
    facts = read_yaml(config)
    record = facts.get("model") if isinstance(facts, dict) else None
    trained_on = ((record or {}).get("manifest") or {}).get("sha256")
    if trained_on != (now := (manifest or {}).get("sha256")):
        raise StkitError(
            f"{adapter} was trained on weights of {base} with sha256 {trained_on or 'unknown'}, here they have "
            f"{now or 'none in a manifest'}: install the stkit that it was trained with, or train it anew"
        )


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no adapter, or one whose weights could only be unpickled."""
    if not (folder / "adapter_config.json").exists():
        raise StkitError(
            f"adapter {folder}: no adapter_config.json there: give the folder that peft's save_pretrained wrote"
        )
    if not (folder / "adapter_model.safetensors").exists():
        pickled = (folder / "adapter_model.bin").exists()
        fault = "only pickled weights, which are never read" if pickled else "no adapter_model.safetensors"
        raise StkitError(
            f"adapter {folder}: {fault}: save it anew with peft's save_pretrained (that writes safetensors)"
        )


def same_base(made_for: str, base: str) -> bool:
    """Whether two names mean one model: equal, or the same last part (a hub name and a folder it was copied to).

    Two folders that are both here, "runs/a/merged" and "runs/b/merged", are two models.
    """
    first, second = Path(made_for), Path(base)
    if first.is_dir() and second.is_dir():
        return first.resolve() == second.resolve()
    return made_for == base or first.name == second.name


def differences(adapted, folder: Path) -> str:
    """How the tensors in the file differ from those that the model has a place for ("" when they agree)."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        found = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    wanted = {k: tuple(v.shape) for k, v in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()}
    missing, left_over = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    reshaped = sorted(key for key in wanted.keys() & found.keys() if wanted[key] != found[key])
    named = {"missing": missing, "left over": left_over, "of another shape": reshaped}
    return ", ".join(f"{len(keys)} tensors {word} ({keys[0]})" for word, keys in named.items() if keys)
