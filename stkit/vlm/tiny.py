"""The tiny model that needs no download: a real Qwen2.5-VL of a few million parameters, and how its folder is made.

CI, classrooms without a network and planes cannot fetch Qwen's weights. ``stkit/data/tiny`` therefore holds everything
that a Qwen2.5-VL folder holds, small: configuration, byte-level tokenizer with Qwen's special tokens, chat template and
processor. Transformers' own classes load it. While it has no ``model.safetensors``, the weights come from a fixed seed.

    >>> folder().name
    'tiny'

Make the folder anew (the files come out the same, byte for byte)::

    python -m stkit.vlm.tiny --out stkit/data/tiny
"""

import argparse
from importlib import resources
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from ..runs import write_json, write_text

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


def folder() -> Path:
    """The folder that ``load_model("tiny")`` loads."""
    return Path(str(resources.files("stkit"))) / "data" / "tiny"


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
    return Qwen2_5_VLConfig(
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
    config = make_config(processor.tokenizer)
    write_text(out / "words.txt", text)
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tiny model's folder (without weights) anew.")
    parser.add_argument("--out", required=True, help="folder to write, e.g. stkit/data/tiny")
    write_folder(parser.parse_args().out)


if __name__ == "__main__":
    main()
