"""Load a Qwen2-VL, Qwen2.5-VL or Qwen3-VL: from the hub, from a folder, or a tiny one that ships with the kit.

One call gives the model, its processor and a record of what was chosen and why. Nothing is taken for granted: a weight
that the checkpoint lacks, an adapter made for another model or a backend that isn't there is an error, never a warning.
Only safetensors are read; no remote code, nothing unpickled.

    >>> loaded = load_model("tiny")
    >>> loaded.record["family"]
    'qwen2_5_vl'
"""

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.utils import logging as transformers_logging

from ..runs import read_json, read_yaml
from ..runtime import StkitError, versions
from . import tiny
from .cache import content_hash
from .choose import Choice, choose, memory_gb, one_line

FAMILIES = {
    "qwen2_vl": (transformers.Qwen2VLForConditionalGeneration, transformers.Qwen2VLProcessor),
    "qwen2_5_vl": (transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLProcessor),
    "qwen3_vl": (transformers.Qwen3VLForConditionalGeneration, transformers.Qwen3VLProcessor),
}
FAULTS = {"missing_keys": "missing", "unexpected_keys": "left over", "mismatched_keys": "of another shape"}
SMALL_FILES = ["*.json", "*.txt", "*.jinja"]
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Loaded(NamedTuple):
    """What :func:`load_model` returns.

    ``record`` is a plain dict for a run's config: name, family, untrained, weights, revision, manifest (of a model that
    ships: commit, seed, sha256), parameters, context, vocabulary, device, dtype, attention, tree_attention, four_bit,
    adapter (and its adapter_sha256), why (a sentence for each choice) and versions.
    """

    model: Any
    processor: Any
    record: dict


@dataclass(frozen=True)
class Source:
    """Where a model's files are. ``name`` is what the record, the model and its adapters call it."""

    name: str
    folder: Path
    revision: str | None = None


def load_model(
    name_or_path: str | Path,
    four_bit: bool | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    adapter: str | Path | None = None,
) -> Loaded:
    """Load a model with its processor, in evaluation mode.

    Args:
        name_or_path: "tiny", "tiny-cold", "tiny-r1", "tiny-untrained", a hub name such as "Qwen/Qwen2.5-VL-3B-Instruct",
            a folder, or the folder of a training run (its end result: a whole model, or its base with its adapter).
        four_bit: NF4 with double quantisation; None: for models of 1.5 billion parameters and more on a CUDA GPU.
        device: "auto", "cpu", "mps", "cuda" or "cuda:N".
        dtype: "auto" (bfloat16 on GPUs, float16 on those without it, float32 on a CPU), or one of those names.
        attention: "auto" (flash-attn where it can be used, else sdpa), "sdpa", "flash_attention_2" or "eager".
        adapter: folder of a LoRA adapter saved by peft for this very model.

    Raises:
        StkitError: the model, a weight in it, the adapter or what was asked for is not there or does not fit.
    """
    name, adapter = result_of_run(str(name_or_path), adapter)
    source = find(name)
    config = read_config(source)
    untrained = tiny.is_untrained(source.name)
    manifest = None if untrained else tiny.check_manifest(source.folder, required=tiny.is_own(source.name))
    parameters = 0 if untrained else count_parameters(source)
    choice = choose(parameters, four_bit, device, dtype, attention, head_size(config))
    check_memory(source, parameters, choice)
    with quiet(progress=parameters > 100_000_000):
        processor = load_processor(source, config.model_type)
        model = load_weights(source, config, choice, untrained)
    model.name_or_path = model.config._name_or_path = source.name
    record = describe(source, model, choice, untrained, manifest)
    if adapter is not None:
        from .adapter import check_base, load_adapter

        folder = Path(adapter).expanduser()
        check_base(folder, source.name, manifest)
        with quiet(progress=False):
            model = load_adapter(model, source.name, folder, choice.device)
        record["adapter"] = str(folder.resolve())
        record["adapter_sha256"] = content_hash(folder / "adapter_model.safetensors")  # one trained on is another
    print(summary(record), file=sys.stderr)
    return Loaded(model, processor, record)


def result_of_run(name: str, adapter: str | Path | None) -> tuple[str, str | Path | None]:
    """What to load of a training run's folder: the model in it, or its base and the adapter in it. Other names as given."""
    folder = Path(name).expanduser()
    if not (folder / "config.yaml").is_file() or (folder / "config.json").exists():
        return name, adapter
    if (folder / "model").is_dir():
        return str(folder / "model"), adapter
    if not (folder / "adapter").is_dir():
        raise StkitError(f"{folder}: this training run is not finished: run the same command again, or give a checkpoint")
    if adapter is not None:
        raise StkitError(f"{folder} is a run with an adapter of its own: give its base as the model, or leave {adapter} out")
    config = read_yaml(folder / "config.yaml")
    try:
        base, start = config["model"]["name"], config["model"]["adapter"]
    except (KeyError, TypeError) as error:
        raise StkitError(f"{folder}/config.yaml: the model's record is missing: give the base and the adapter") from error
    if start is not None:
        raise StkitError(f"{folder} was trained on {base} with {start} merged into it: merge it first ('stkit merge')")
    return base, folder / "adapter"


def head_size(config) -> int:
    """Of the language model's attention."""
    text = config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def find(name: str) -> Source:
    """The folder behind a name; a hub name is downloaded first (small files, then safetensors once they fit)."""
    if tiny.is_own(name):
        return Source(name, tiny.find_folder(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(str(folder.resolve()), folder)
    if folder.exists():
        raise StkitError(f"model {name!r} is a file: give the folder that holds its config.json")
    if not HUB_NAME.fullmatch(name):
        raise StkitError(f"model {name!r}: no such folder (a hub name looks like Qwen/Qwen2.5-VL-3B-Instruct)")
    folder = download(name, SMALL_FILES)
    read_config(Source(name, folder))
    folder = download(name, [*SMALL_FILES, "*.safetensors"])
    return Source(name, folder, revision=folder.name)


def download(name: str, patterns: list[str]) -> Path:
    """The files of a hub model that match, from the hub or from its cache on this machine."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except errors.GatedRepoError as error:
        raise StkitError(
            f"model {name!r} is gated: ask for access on huggingface.co, then run 'hf auth login'"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise StkitError(f"model {name!r}: no such folder, and the hub has no such model: check the name") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as error:
        raise StkitError(
            f"model {name!r}: no such folder, not in the hub's cache, and the hub cannot be reached: run "
            f"'hf download {name}' where there is a network, give a local folder, or use 'tiny'"
        ) from error


def read_config(source: Source):
    """The configuration of a model folder, as Transformers' class for its family."""
    path = source.folder / "config.json"
    if (source.folder / "adapter_config.json").exists():
        raise StkitError(f"{source.folder}: holds an adapter: load its base model and give this folder as adapter=")
    if not path.exists():
        raise StkitError(f"{source.folder}: no config.json: give a folder written by save_pretrained, or a hub name")
    raw = read_json(path)
    family = raw.get("model_type") if isinstance(raw, dict) else None
    if family not in FAMILIES:
        raise StkitError(f"{path}: model_type {family!r} is not supported: stkit loads {', '.join(FAMILIES)}")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise StkitError(f"{path}: the weights are quantised already ({method}): give the original and four_bit=True")
    raw.pop("transformers_weights", None)  # names a weights file of any format: only safetensors are read
    raw.pop("auto_map", None)  # names code in the folder: none is run
    try:
        return FAMILIES[family][0].config_class.from_dict(raw)
    except Exception as error:  # Transformers' validation raises types of many packages
        raise StkitError(f"{path}: not a configuration of {family} ({one_line(error)})") from error


def weight_files(source: Source) -> list[Path]:
    """The safetensors files of a model folder, all there."""
    single, index = source.folder / "model.safetensors", source.folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        if any(f for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in source.folder.glob(pattern)):
            raise StkitError(
                f"{source.folder}: only pickled weights, which can run code and are never read: on a machine that may "
                "run it, load it with Transformers and save_pretrained it anew (that writes safetensors)"
            )
        raise StkitError(f"{source.folder}: no model.safetensors: give a folder written by save_pretrained")
    shards = read_json(index).get("weight_map") or {}
    files = [source.folder / name for name in sorted(set(shards.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing or not files:
        raise StkitError(f"{index}: {', '.join(missing) or 'every shard'} is missing: download the model again")
    return files


def count_parameters(source: Source) -> int:
    """Number of weights in a checkpoint, read from the headers of its files (which checks that they are whole)."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in weight_files(source):
        try:
            with safe_open(file, framework="pt") as tensors:
                total += sum(torch.Size(tensors.get_slice(key).get_shape()).numel() for key in tensors.keys())
        except SafetensorError as error:
            raise StkitError(f"{file}: not a whole safetensors file ({error}): download it again") from error
    return total


def check_memory(source: Source, parameters: int, choice: Choice) -> None:
    """Refuse weights that cannot fit, instead of letting the system kill the process halfway through."""
    bytes_each = 0.55 if choice.four_bit else choice.dtype.itemsize
    needed, there = parameters * bytes_each / 1e9, memory_gb(choice.device)
    if needed > there:
        ways = "a smaller model" if choice.four_bit else "four_bit=True, dtype='bfloat16' or a smaller model"
        raise StkitError(
            f"model {source.name!r} needs about {needed:.2g} GB, {choice.device} has {there:.2g} GB: use {ways}"
        )


def load_processor(source: Source, family: str):
    """Tokenizer, frame settings and chat template, by the family's own class."""
    try:
        return FAMILIES[family][1].from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StkitError(f"{source.folder}: no usable processor or tokenizer there ({one_line(error)})") from error


def load_weights(source: Source, config, choice: Choice, untrained: bool):
    """The model with every weight from the checkpoint: one missing, left over or of another shape is an error."""
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=choice.dtype,
    )
    if untrained:
        origin = {"pretrained_model_name_or_path": None, "state_dict": tiny.seeded_model(config).state_dict()}
    else:
        origin = {"pretrained_model_name_or_path": str(source.folder), "use_safetensors": True}
    model, info = FAMILIES[config.model_type][0].from_pretrained(
        **origin,
        config=config,
        dtype=choice.dtype,
        device_map={"": choice.device},
        attn_implementation=choice.attention,
        quantization_config=quantised if choice.four_bit else None,
        ignore_mismatched_sizes=True,  # so that they come back in the report, and are refused just below
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    faults = [f"{len(info[kind])} {word} ({_first(info[kind])})" for kind, word in FAULTS.items() if info[kind]]
    if faults:
        raise StkitError(f"{source.folder}: the weights do not fit config.json: {', '.join(faults)}: download it again")
    if untrained:  # a model from a state dict has not read the folder's file
        model.generation_config = transformers.GenerationConfig.from_pretrained(source.folder)
    return model


def _first(keys) -> str:
    key = min(keys, key=str)
    return key if isinstance(key, str) else str(key[0])


def describe(source: Source, model, choice: Choice, untrained: bool, manifest: dict | None) -> dict:
    """The record of what was loaded and chosen, as plain JSON values."""
    text = model.config.get_text_config()
    why = dict(choice.why)
    if untrained:
        why["untrained"] = f"weights drawn from seed {tiny.SEED}, never trained: expect chance"
    return {
        "name": source.name,
        "family": model.config.model_type,
        "untrained": untrained,
        "weights": f"seed {tiny.SEED}" if untrained else "safetensors",
        "revision": source.revision,
        "manifest": manifest,
        "parameters": sum(_numel(p) for p in model.parameters()),
        "context": text.max_position_embeddings,
        "vocabulary": text.vocab_size,
        "device": choice.device,
        "dtype": str(choice.dtype).removeprefix("torch."),
        "attention": choice.attention,
        "tree_attention": choice.tree_attention,
        "four_bit": choice.four_bit,
        "adapter": None,
        "why": why,
        "versions": versions(),
    }


def _numel(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # two weights of 4 bits lie in one byte
    return parameter.numel() if state is None else state.shape.numel()


def summary(record: dict) -> str:
    """One line for people: what was loaded and what it computes with."""
    parts = [f"{record['parameters'] / 1e6:,.1f} M parameters", f"{record['device']}, {record['dtype']}"]
    parts += [f"{record['tree_attention']} attention on trees", f"{record['attention']} in the tower"]
    parts += ["NF4"] * record["four_bit"]
    if record["adapter"]:
        parts.append(f"adapter {record['adapter']}")
    if record["untrained"]:
        parts.append("untrained weights: expect chance")
    name = record["name"]
    if os.path.isabs(name) and Path(name).is_relative_to(Path.cwd()):
        name = os.path.relpath(name)
    return f"model {name} ({record['family']}): " + ", ".join(parts)


@contextmanager
def quiet(progress: bool) -> Iterator[None]:
    """Transformers' and peft's warnings stay silent: what they warn of is checked here, and is an error."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
