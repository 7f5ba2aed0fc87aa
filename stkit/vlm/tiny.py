"""The tiny models that need no download: real Qwen2.5-VLs of a few million parameters, and how their folders are made.

CI, classrooms without a network and planes cannot fetch Qwen's weights. ``stkit/data/tiny`` therefore holds all that a
Qwen2.5-VL folder holds, small: configuration, byte-level tokenizer with Qwen's special tokens, chat template, processor.
Transformers' own classes load it. Three have trained weights: "tiny", the same stopped early ("tiny-cold") and that one
after GRPO ("tiny-r1"); :mod:`stkit.tiny` made them. "tiny-untrained" has weights drawn from a fixed seed.

    >>> folder("tiny-untrained").name
    'tiny'

Make the files beside the weights anew (they come out the same, byte for byte)::

    python -m stkit.vlm.tiny --out stkit/data/tiny
"""

import argparse
import copy
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from ..runs import read_json, replace_folder, write_json, write_text
from ..runtime import BadUse, StkitError
from .cache import content_hash

SHIPPED = ("tiny", "tiny-cold", "tiny-r1")
UNTRAINED = "tiny-untrained"
WEIGHTS = "model.safetensors"
MAX_BYTES = 8_000_000  # of a folder that ships
MANIFEST = {  # what manifest.json says, with the keys of its objects; sha256 (of the weights) is added on export
    "name": (), "command": (), "commit": (), "seed": (), "recipe": (),
    "benchmark": ("name", "seed", "clips", "split", "preset", "hash"),  # filmed
    "told": ("seed", "walks", "split"),  # learned from without a film
    "stages": (),  # of each its commit and minutes
}  # fmt: skip

SEED = 0
SCALE = 3.0  # at width 192 Transformers' default spread of 0.02 is too small: attention patterns hardly form
CONTEXT = 4096
# Frames of 160x120 become 112x84: 3 x 4 video tokens for every two frames. (The bound lies a little above 112 x 84,
# because smart resize rounds down.)
MIN_PIXELS, MAX_PIXELS = 28 * 28, 98 * 98

# The special tokens of Qwen2.5-VL, in its order. Its other added tokens (tools, code) have no use here.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

# How Qwen2 cuts text into words before the byte pairs are merged (each digit alone, a space goes with its word).
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def is_own(model: object) -> bool:
    """Whether this is the name of one of the models that need no download."""
    return isinstance(model, str) and model in (*SHIPPED, UNTRAINED)


def is_untrained(name: str) -> bool:
    """Whether the weights of a model are drawn from the seed."""
    return name == UNTRAINED


def folder(name: str = "tiny") -> Path:
    """The folder with the files of one of our models, whether its weights are there or not."""
    if not is_own(name):
        raise BadUse(f"model {name!r} does not ship: use {', '.join((*SHIPPED, UNTRAINED))}")
    return Path(str(resources.files("stkit"))) / "data" / ("tiny" if name == UNTRAINED else name)


def find_folder(name: str) -> Path:
    """The folder of one of our models, ready to be loaded.

    Raises:
        StkitError: its weights are not there.
    """
    place = folder(name)
    if not is_untrained(name) and not (place / WEIGHTS).exists():
        raise StkitError(f"model {name!r}: no {place / WEIGHTS}: install stkit anew, or run 'stkit tiny train'")
    return place


def check_manifest(place: Path, required: bool = False) -> dict | None:
    """Check a folder's weights against the checksum in its manifest.

    Args:
        place: the folder.
        required: refuse a folder that has no manifest.json with a checksum.

    Returns:
        What a run's record keeps: commit, seed and sha256; None without a manifest.

    Raises:
        StkitError: other weights than the manifest's; no manifest where one is required.
    """
    path, repair = place / "manifest.json", "install stkit anew, or 'git checkout' the folder"
    manifest = read_json(path) if path.is_file() else None
    told = manifest.get("sha256") if isinstance(manifest, dict) else None
    if told is None:
        if required:
            raise StkitError(f"{path}: no sha256 of {WEIGHTS} there: {repair}")
        return None
    if (found := content_hash(place / WEIGHTS)) != told:
        raise StkitError(f"{place / WEIGHTS}: its sha256 is {found}, but manifest.json says {told}: {repair}")
    return {key: manifest.get(key) for key in ("commit", "seed", "sha256")}


def learn_tokenizer(sentences: list[str]) -> Tokenizer:
    """A byte-level tokenizer in which every word of the sentences is one token, and any text at all can be written.

    Unlike Qwen's it has no Unicode normaliser, so that decoding gives back exactly the text that was encoded.

    Args:
        sentences: lines of text; a word counts with the space before it, so " turn" and "turn" are two.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,  # never reached: learning stops when every word is one token
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def make_processor(sentences: list[str]) -> Qwen2_5_VLProcessor:
    """Tokenizer, frame settings and chat template in Transformers' own processor."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learn_tokenizer(sentences),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    pixels = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **pixels),
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """The architecture: vision 3 layers of 128, language 4 layers of 192 with 6 heads and 2 K/V heads."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config={
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CONTEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "out_hidden_size": 192,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [2],
            "tokens_per_second": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return in_float32(config)


def in_float32(config: Qwen2_5_VLConfig) -> Qwen2_5_VLConfig:
    """The same, so that Transformers loads weights that are float16 on disk as float32 where nothing is asked for."""
    config = copy.deepcopy(config)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.float32
    return config


def seeded_model(config: Qwen2_5_VLConfig, seed: int = SEED) -> Qwen2_5_VLForConditionalGeneration:
    """Untrained weights, the same in every process: Transformers' initialisation with all matrices times 3."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(SCALE)
    return model.eval()


def write_folder(out: str | Path) -> None:
    """Write the folder that Transformers loads, without weights; the same bytes every time.

    Args:
        out: folder to write; if it holds a ``words.txt`` the tokenizer is learnt from that, else from the shipped one.
    """
    out = Path(out)
    words = out / "words.txt" if (out / "words.txt").exists() else folder() / "words.txt"
    text = words.read_text(encoding="utf-8")
    processor = make_processor(text.splitlines(keepends=True))
    _write_files(out, text, processor, make_config(processor.tokenizer))


def _write_files(out: Path, words: str, processor: Qwen2_5_VLProcessor, config: Qwen2_5_VLConfig) -> None:
    """Everything but the weights."""
    write_text(out / "words.txt", words)
    processor.save_pretrained(out)
    config.save_pretrained(out)
    write_json(
        out / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": [config.text_config.eos_token_id, config.text_config.pad_token_id],
            "pad_token_id": config.text_config.pad_token_id,
        },
    )


def export(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, out: str | Path, manifest: Mapping
) -> Path:
    """Write a folder that ships, whole or not at all; float16 on disk, float32 where it is loaded.

    Args:
        model: in float32, without an adapter.
        processor: the model's, its tokenizer learnt from the shipped ``words.txt``: the folder gets one like it.
        out: folder to write. A model folder that is there is replaced, but for its README.md.
        manifest: the values of :data:`MANIFEST`, and what else is worth telling; sha256 is filled in.

    Returns:
        The folder.

    Raises:
        BadUse: a manifest that lacks a value. StkitError: another kind of model or tokenizer, a weight that float16
            cannot hold, another kind of folder in the way, more than 8 MB.
    """
    out = Path(out)
    words = (folder() / "words.txt").read_text(encoding="utf-8")
    _check_export(processor, out, manifest, words)
    half, fresh = _halved(model), make_processor(words.splitlines(keepends=True))  # one that was loaded notes where from

    def write(place: Path) -> None:
        _write_files(place, words, fresh, in_float32(model.config))
        if (out / "README.md").exists():
            write_text(place / "README.md", (out / "README.md").read_bytes())
        write_text(place / WEIGHTS, save(half, metadata={"format": "pt"}))
        write_json(place / "manifest.json", {**manifest, "sha256": content_hash(place / WEIGHTS)})
        if (size := sum(file.stat().st_size for file in place.iterdir())) > MAX_BYTES:
            raise StkitError(f"{out}: {size:,} bytes, a model that ships has at most {MAX_BYTES:,}: make it smaller")

    return replace_folder(out, write)


def _check_export(processor: Qwen2_5_VLProcessor, out: Path, manifest: Mapping, words: str) -> None:
    for key, parts in MANIFEST.items():
        value = manifest.get(key)
        told = value if isinstance(value, Mapping) else {}
        if value is None or any(told.get(part) is None for part in parts):
            needs = f" with {', '.join(parts)}" * bool(parts)
            raise BadUse(f"manifest {key}={value!r}: a model that ships says how it was made, give {key}{needs}")
    if learn_tokenizer(words.splitlines(keepends=True)).get_vocab() != processor.tokenizer.get_vocab():
        raise StkitError(f"the tokenizer was learnt from other words than {folder() / 'words.txt'}: use that one")
    if out.exists() and not (out / "config.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise StkitError(f"{out}: holds something else than a model: choose another folder")


def _halved(model: Qwen2_5_VLForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The weights in float16 by name, tied ones once."""
    if type(model) is not Qwen2_5_VLForConditionalGeneration or model.dtype != torch.float32:
        raise StkitError(f"a {type(model).__name__} in {model.dtype}: merge adapters, and load with dtype='float32'")
    half = {name: weight.detach().to("cpu", torch.float16).contiguous() for name, weight in model.named_parameters()}
    for name, weight in half.items():
        if not torch.isfinite(weight).all():
            raise StkitError(f"{name}: values that float16 cannot hold: train with a smaller learning rate")
    return half


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tiny model's folder anew, but for its weights.")
    parser.add_argument("--out", required=True, help="folder to write, e.g. stkit/data/tiny")
    write_folder(parser.parse_args().out)


if __name__ == "__main__":
    main()
