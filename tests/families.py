"""Random small models of the families that do not ship, saved as a folder that ``load_model`` loads."""

from pathlib import Path

import torch
import transformers

from stkit.vlm import tiny
from stkit.vlm.load import FAMILIES

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"depth": 2, "num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def small_config(family: str, tokenizer):
    """A random small model of a family, in Transformers' own configuration class."""
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    tokens = {"image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"]}
    tokens |= {"vision_start_token_id": ids["vision_start"], "vision_end_token_id": ids["vision_end"]}
    text = TEXT | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    if family == "qwen2_vl":
        vision = VISION | {"embed_dim": 32, "hidden_size": 64, "patch_size": 14}
        return transformers.Qwen2VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **tokens)
    text.pop("bos_token_id"), text.pop("eos_token_id")
    vision = VISION | {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 16}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text |= {"head_dim": 16, "rope_parameters": rope | {"mrope_interleaved": True}}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)


def small_processor(family: str, tokenizer):
    pixels = {"min_pixels": 28 * 28, "max_pixels": 98 * 98}
    if family == "qwen2_vl":
        video = transformers.Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **pixels)
        return transformers.Qwen2VLProcessor(
            transformers.Qwen2VLImageProcessor(**pixels), tokenizer, video, chat_template=tiny.CHAT_TEMPLATE
        )
    size = {"shortest_edge": 32 * 32, "longest_edge": 8 * 96 * 96}
    video = transformers.Qwen3VLVideoProcessor(size=size, do_sample_frames=False, cap_pixels_per_frame=False)
    image = transformers.Qwen2VLImageProcessor(patch_size=16, **pixels)
    return transformers.Qwen3VLProcessor(image, tokenizer, video, chat_template=tiny.CHAT_TEMPLATE)


def save_small(family: str, tokenizer, folder: Path) -> Path:
    """Write a random "qwen2_vl" or "qwen3_vl" with its processor (and the tiny model's tokenizer) into a folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        FAMILIES[family][0](small_config(family, tokenizer)).save_pretrained(folder)
    small_processor(family, tokenizer).save_pretrained(folder)
    return folder
