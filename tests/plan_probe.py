"""Measures what updates of small models really hold, for the tests of the memory planner; run as a script.

Of every case one JSON object is printed: ``live``, the bytes of all tensors at their most, and ``resident``, by how
much the process grew at its most.
"""

import gc
import json
import re
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
import transformers
from families import small_config
from stkit_kernels.memory import LiveStorages

from stkit.train.loop import make_optimizer
from stkit.train.policy import make_policy
from stkit.train.settings import LoraSettings, Settings, TrainSettings
from stkit.vlm import tiny
from stkit.vlm.generate import Sampling, generate
from stkit.vlm.load import FAMILIES, Loaded, Source, read_config
from stkit.vlm.logps import tree_logps
from stkit.vlm.tree import Tree
from stkit.vlm.video import VideoInputs
from stkit.vlm.vision import encode_video

TEXT = 40  # tokens of the question
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def vocabulary():
    """A stand-in for a tokenizer: the special tokens' ids."""
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = {f"<|{name}|>": 10 + k for k, name in enumerate(names)}
    return type("Ids", (), {"convert_tokens_to_ids": lambda self, name: ids[name], "__len__": lambda self: 3000})()


def grown(family: str, vocab: int, tied: bool, text: dict, vision: dict):
    """A random small configuration with other sizes."""
    if family == "qwen2_5_vl":
        config = read_config(Source("tiny", tiny.folder()))
    else:
        config = small_config(family, vocabulary())
    raw = config.to_dict()
    raw["text_config"].pop("layer_types", None)
    raw["text_config"] |= {"vocab_size": vocab, "max_position_embeddings": 8192} | text
    raw["vision_config"] |= vision
    raw["tie_word_embeddings"] = raw["text_config"]["tie_word_embeddings"] = tied
    return type(config).from_dict(raw)


def cases() -> dict:
    """name: (configuration, dtype, settings, stage, video's grid)."""
    tiny_config = read_config(Source("tiny", tiny.folder()))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    text = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 2, "rope_parameters": rope}
    wide = text | {"hidden_size": 384, "num_attention_heads": 12}
    three = text | {"hidden_size": 192, "num_hidden_layers": 5, "head_dim": 32, "num_key_value_heads": 4}
    three |= {"rope_parameters": rope | {"mrope_interleaved": True}}
    two, tower = {"hidden_size": 256, "embed_dim": 64}, {"hidden_size": 64, "intermediate_size": 128}
    tower |= {"out_hidden_size": 192}
    grid, train = (4, 16, 16), TrainSettings(max_tokens=700)
    learning, cast = replace(train, tower=True, projector=True), replace(train, precision="bf16")
    again = replace(train, max_tokens=1800, checkpointing=True)
    half = grown("qwen2_5_vl", 4000, True, text, {"out_hidden_size": 256})
    full, lora, everywhere = LoraSettings(rank=0), LoraSettings(rank=8), LoraSettings(rank=8, targets=ALL)
    return {
        "tiny, all weights": (tiny_config, "float32", Settings(lora=full, train=learning), "sft", grid),
        "tiny, LoRA, checkpointing": (tiny_config, "float32", Settings(lora=lora, train=again), "sft", (8, 16, 16)),
        "qwen2_vl, LoRA everywhere, reference": (
            grown("qwen2_vl", 3000, True, text, two), "float32", Settings(lora=everywhere, train=train), "grpo", grid),
        "qwen3_vl, all weights, reference": (
            grown("qwen3_vl", 6000, False, three, tower), "float32", Settings(lora=full, train=train), "grpo", grid),
        "qwen2_5_vl, wide, large vocabulary": (
            grown("qwen2_5_vl", 24_000, True, wide, {"out_hidden_size": 384}), "float32",
            Settings(lora=full, train=train), "sft", grid),
        "bfloat16, LoRA, reference": (half, "bfloat16", Settings(lora=lora, train=train), "grpo", grid),
        "bfloat16, autocast, LoRA": (half, "bfloat16", Settings(lora=lora, train=cast), "sft", grid),
        "autocast, all weights": (half, "float32", Settings(lora=full, train=cast), "sft", grid),
    }  # fmt: skip


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def forget_peak() -> None:
    """Let VmHWM start anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def forest(config, tokens: int, grid: tuple) -> Tree:
    """A prompt with its video and four answers, of exactly so many tokens."""
    video_tokens = prod(grid) // config.vision_config.spatial_merge_size**2
    pads, parts = [config.video_token_id] * video_tokens, 1
    if config.model_type == "qwen3_vl":  # which puts a time before each temporal patch
        parts = grid[0]
    seen = [i for k in range(parts) for i in [20, *pads[k::parts]]]
    root = Tree(seen + [21] * (TEXT - parts))
    left = tokens - len(root.ids)
    for k in range(4):
        root.branch([30 + k] * (left // 4 + (k < left % 4)), weight=1.0)
    return root


def measure(config, dtype: str, settings: Settings, stage: str, grid: tuple) -> dict:
    """Two updates; the second has everything that there is, and rollouts before it for GRPO."""
    before = resident("VmRSS")
    with LiveStorages() as storages:
        net = FAMILIES[config.model_type][0](config).to(getattr(torch, dtype))
        record = {"four_bit": False, "dtype": dtype, "name": "small", "adapter": None}
        policy = make_policy(Loaded(net, None, record), settings, stage == "grpo" and settings.grpo.beta > 0)
        optimizer = make_optimizer(policy.trainable, settings)
        vision = config.vision_config
        columns = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        video = VideoInputs(torch.randn(prod(grid), columns), torch.tensor(grid), 1.0, None)
        tree = forest(config, settings.train.max_tokens, grid)
        found = {}
        for pieces in (1, 2):
            storages.peak = storages.live
            forget_peak()
            if stage == "grpo" and pieces == 2:
                with torch.no_grad():
                    generate(policy.model, [tree.ids], video, group=4, sampling=Sampling(max_new_tokens=24))
                found |= {"live_rollouts": storages.peak, "resident_rollouts": resident("VmHWM") - before}
                storages.peak = storages.live
                forget_peak()
            for _ in range(pieces):
                with torch.autocast("cpu", torch.bfloat16, enabled=settings.train.precision == "bf16"):
                    loss = piece(policy, tree, video, settings, stage)
                loss.backward()
                del loss
            torch.nn.utils.clip_grad_norm_(policy.trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return found | {"live": storages.peak, "resident": resident("VmHWM") - before}


def piece(policy, tree: Tree, video, settings: Settings, stage: str) -> torch.Tensor:
    """The loss on one forest, as training computes it."""
    features = None if policy.tower else encode_video(policy.model, video)
    found = tree_logps(policy.model, tree, video, features, entropy=True, tokens="weighted")
    loss = -found.log_probs.sum()
    if stage == "grpo" and settings.grpo.beta > 0:
        with policy.reference() as model:
            reference = tree_logps(model, tree, video, features, tokens="weighted").log_probs
        loss = loss + (found.log_probs - reference).exp().sum()
    return loss / 1000


def warm_up(dtype: str = "float32") -> None:
    """A small update, so that what libraries load and keep is there before anything is measured."""
    config = read_config(Source("tiny", tiny.folder()))
    settings = Settings(lora=LoraSettings(rank=2), train=TrainSettings(max_tokens=96))
    measure(config, dtype, settings, "grpo", (1, 4, 4))


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for dtype in ("float32", "bfloat16"):
        warm_up(dtype)
    for name, case in cases().items():
        if len(sys.argv) > 1 and sys.argv[1] not in name:
            continue
        gc.collect()
        print(json.dumps({"name": name} | measure(*case)), flush=True)


if __name__ == "__main__":
    main()
