"""What is measured: a Qwen2.5-VL of 54 M parameters with a LoRA, a video, a prompt, rollouts, questions; from a seed.

Weights are random: what a pass costs doesn't depend on what they are.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from stkit.vlm.video import VideoInputs

IMAGE, VIDEO, START, END = 10, 11, 12, 13


@dataclass(frozen=True)
class Sizes:
    """frames of height x width pixels; a prompt's words of text; G rollouts of C new tokens; questions x rotations; asked:
    questions of a clip in one step of training."""

    frames: int = 8
    height: int = 224
    width: int = 280
    text: int = 80
    group: int = 8
    new: int = 64
    questions: int = 8
    rotations: int = 4
    question: int = 40
    options: int = 40
    vocabulary: int = 32_000
    hidden: int = 512
    layers: int = 8
    tower: int = 320
    repeats: int = 5
    asked: int = 4


FULL = Sizes()
SMALL = Sizes(frames=4, height=56, width=84, text=9, group=3, new=4, questions=2, rotations=2, question=5, options=3,
              vocabulary=300, hidden=64, layers=2, tower=40, repeats=1, asked=2)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A model in training mode with a LoRA on q, k, v, o, and what it is asked.

    prompt: ids (P,). rollouts: int64 (G, C). questions: for each question its ids, and those of each rotation of its
    options.
    """

    sizes: Sizes
    model: torch.nn.Module
    video: VideoInputs
    prompt: tuple[int, ...]
    rollouts: torch.Tensor
    questions: list[tuple[list[int], list[list[int]]]]

    @property
    def base(self):
        return self.model.get_base_model()

    @property
    def head_size(self) -> int:
        config = self.base.config.text_config
        return config.hidden_size // config.num_attention_heads


LORA = {"r": 8, "lora_alpha": 8, "target_modules": r".*language_model.*\.(q|k|v|o)_proj"}


def make_base(vocabulary: int, hidden: int, layers: int, tower: int) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with 8 heads of 64 (2 of keys and values) at the full size, without a LoRA."""
    text = {
        "hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": vocabulary,
        "max_position_embeddings": 32_768, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections(hidden // 16)},
    }  # fmt: skip
    vision = {
        "depth": layers, "hidden_size": tower, "intermediate_size": 4 * tower, "num_heads": 5,
        "out_hidden_size": hidden, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "window_size": 112, "fullatt_block_indexes": [layers - 1],
    }  # fmt: skip
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


@cache
def make_model(vocabulary: int, hidden: int, layers: int, tower: int):
    """The same with a LoRA that isn't zero."""
    model = get_peft_model(make_base(vocabulary, hidden, layers, tower), LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def sections(half: int) -> list[int]:
    """How M-RoPE shares out half a head between time, height and width."""
    time = half // 4
    rest = (half - time) // 2
    return [half - 2 * rest, rest, rest]


def make_setting(sizes: Sizes = FULL, **changes) -> Setting:
    """A setting of these sizes."""
    sizes = replace(sizes, **changes)
    model = make_model(sizes.vocabulary, sizes.hidden, sizes.layers, sizes.tower)
    draw = torch.Generator().manual_seed(1)
    grid = torch.tensor([sizes.frames // 2, sizes.height // 14, sizes.width // 14])
    pixels = torch.randn(int(grid.prod()), 3 * 2 * 14 * 14, generator=draw)
    video = VideoInputs(pixels, grid, 1.0, np.arange(sizes.frames // 2) + 0.5)

    def words(*shape):
        return torch.randint(20, sizes.vocabulary, shape, generator=draw)

    prompt = (5, START, *[VIDEO] * (int(grid.prod()) // 4), END, *words(sizes.text).tolist())
    rollouts = words(sizes.group, sizes.new)
    questions = [
        (words(sizes.question).tolist(), [words(sizes.options).tolist() for _ in range(sizes.rotations)])
        for _ in range(sizes.questions)
    ]
    return Setting(sizes, model, video, prompt, rollouts, questions)
