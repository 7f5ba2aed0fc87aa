"""What a run of training starts from, at the sizes of the bench: a folder with a model, its processor and a benchmark.

    write(folder, FULL)       # folder/model: Transformers and load_model load it; folder/walks: one clip, its questions
    frames(folder, FULL)      # the clip's pictures, for who takes images

The model is that of the other measures. Its tokenizer knows a word for each id, and one token more that ends a turn and
that the model cannot say: every rollout has its C tokens, whoever draws it.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np
from setting import END, IMAGE, START, VIDEO, Sizes, make_base
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from stkit.bench.film import encode
from stkit.bench.schema import Question, row_of
from stkit.runs import write_json, write_jsonl, write_text
from stkit.vlm.video import read_video

TURN, SAY, UNKNOWN = 5, 6, 7
NAMES = {
    0: "<|endoftext|>", TURN: "<|im_start|>", SAY: "<|say|>", UNKNOWN: "<|unknown|>", IMAGE: "<|image_pad|>",
    VIDEO: "<|video_pad|>", START: "<|vision_start|>", END: "<|vision_end|>",
}  # fmt: skip
NEVER = "<|never|>"
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' -}}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{- part['text'] -}}
{%- else -%}{{- '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' -}}{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|say|>' -}}{%- endif -%}
"""
PIXELS = {"min_pixels": 28 * 28, "max_pixels": 360 * 420}


def word(number: int) -> str:
    return NAMES.get(number, f"w{number}")


def make_processor(sizes: Sizes) -> Qwen2_5_VLProcessor:
    """One word for each id of the model's vocabulary, one token for each word."""
    known = {word(k): k for k in range(sizes.vocabulary)} | {NEVER: sizes.vocabulary}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token=NAMES[UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*NAMES.values(), NEVER])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=NEVER, pad_token=NAMES[0], unk_token=NAMES[UNKNOWN], model_max_length=32_768
    )
    videos = Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **PIXELS)
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**PIXELS), fast, videos, chat_template=TEMPLATE)


def texts(sizes: Sizes) -> list[str]:
    """What is asked, ``sizes.text`` tokens each with the one that lets the model speak."""
    draw = np.random.default_rng(2)
    return [" ".join(map(word, draw.integers(20, sizes.vocabulary, sizes.text - 1))) for _ in range(sizes.asked)]


def write(folder: Path, sizes: Sizes) -> Path:
    """The model's folder and the benchmark's."""
    model = make_base(sizes.vocabulary, sizes.hidden, sizes.layers, sizes.tower)
    model.save_pretrained(folder / "model")
    make_processor(sizes).save_pretrained(folder / "model")
    write_json(folder / "model" / "generation_config.json", {"pad_token_id": 0, "eos_token_id": sizes.vocabulary})
    pictures = np.random.default_rng(3).integers(0, 256, (sizes.frames, sizes.height // 7, sizes.width // 7, 3), np.uint8)
    (folder / "walks" / "videos").mkdir(parents=True)
    write_text(folder / "walks" / "videos" / "walk.mp4", encode(pictures.repeat(7, 1).repeat(7, 2), Fraction(2)))
    questions = [
        Question(id=f"walk-{k}", clip_id="walk", video="walk.mp4", group="walk", task="route", order="forward", question=text,
                 options=(), answer="go straight", split="train")
        for k, text in enumerate(texts(sizes))
    ]  # fmt: skip
    write_jsonl(folder / "walks" / "questions.jsonl", map(row_of, questions))
    write_json(folder / "walks" / "benchmark.json", {"format_version": 1, "sampling": "uniform", "n_frames": sizes.frames})
    return folder


def frames(folder: Path, sizes: Sizes) -> np.ndarray:
    """uint8 ``(frames, height, width, 3)``, those that the other sides see."""
    return read_video(folder / "walks" / "videos" / "walk.mp4", sampling="uniform", n=sizes.frames).pixels
