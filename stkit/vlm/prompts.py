"""The one place where a question becomes the ids that a model reads.

The model's own chat template gives the frame, with the video in front of the question as Qwen puts it. What comes from
a benchmark's file (question, options) is encoded without the tokenizer's added tokens: ``<|im_end|>`` in a question is
plain text of ten characters, so that no row can end its turn, speak as the assistant or add a video::

    prompt = build_prompt(question, processor, family="qwen2_5_vl", video=inputs)
    prompt.ids, prompt.letter_ids, prompt.text, prompt.sha256
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer

from ..bench.schema import LETTERS, Question
from ..runtime import BadUse, StkitError
from .video import VideoInputs

STYLES = ("stkit", "published", "plain")
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
THINK = "Output the thinking process in <think> </think> and the final answer in <answer> </answer> tags."
OURS = "Answer with the letter of the right option only."
ROUTE = "Answer with the steps in order, as in: go straight, turn left, pass the tree on your right, look up."
PUBLISHED_OPENING = "Please take a egocentric view to understand the following questions. "
PUBLISHED = (
    "Instructions: Please select the most appropriate answer from the options above and return only the option number "
    "(e.g. A, B, C or D)."
)
USER_TEXT = "stkit-user-text"  # stands for the question while the template is rendered


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    ids: token ids, ``(S,)``. mm_token_type_ids: ``(S,)``, 2 where a video token stands, else 0 (for M-RoPE).
    letter_ids: the token of each option's letter, ``(n,)``, empty for an open-ended question. text: the prompt to show,
    one video token for all of them. sha256: over the ids and the video's grid, timestamps and seconds a temporal patch.
    """

    ids: tuple[int, ...]
    mm_token_type_ids: tuple[int, ...]
    letter_ids: tuple[int, ...]
    text: str
    sha256: str


def build_prompt(
    question: Question,
    processor,
    family: str,
    video: VideoInputs | None,
    style: str = "stkit",
    think: bool = False,
    context: int | None = None,
    max_new_tokens: int = 0,
) -> Prompt:
    """The prompt for one question.

    Args:
        question: its question and options are taken for plain text, whatever they hold.
        processor: of the model; its chat template, tokenizer and merge size are used.
        family: "qwen2_vl", "qwen2_5_vl" or "qwen3_vl" (which writes the time of each temporal patch as text).
        video: what :func:`stkit.vlm.video.prepare` gave; None asks the same without the video (blind).
        style: "stkit" (options on lines of their own), "published" (as in ST-R1's files) or "plain" (the question's
            text and options without an instruction).
        think: ask for think and answer tags instead of a letter alone.
        context: tokens that the model can take; None: what the tokenizer says.
        max_new_tokens: room that must be left for an answer.

    Raises:
        StkitError: prompt and answer do not fit into the context (nothing is ever cut off).
        BadUse: unknown style or family.
    """
    if style not in STYLES:
        raise BadUse(f"prompt style {style!r} is unknown: use {' or '.join(STYLES)}")
    if family not in FAMILIES:
        raise BadUse(f"model family {family!r} is unknown: use {', '.join(FAMILIES)}")
    tokenizer = processor.tokenizer
    asked, instruction = user_text(question, style, think)
    asked = asked.encode("utf-8", "replace").decode()  # JSON can hold half a character (a lone surrogate), no token can
    before, after = _template(processor, video is not None)
    pad = tokenizer.convert_tokens_to_ids(processor.video_token)
    head = tokenizer.encode(_timestamps(before, processor, family, video), add_special_tokens=False)
    ids = _expanded(head, pad, _tokens_per_pad(processor, family, video))
    ids += _plain(tokenizer, asked)
    ids += tokenizer.encode(instruction + after, add_special_tokens=False)
    _check_length(question, len(ids), max_new_tokens, context or tokenizer.model_max_length)
    return Prompt(
        ids=tuple(ids),
        mm_token_type_ids=tuple(2 * (i == pad) for i in ids),
        letter_ids=letter_ids(tokenizer, len(question.options)),
        text=f"{before}{asked}{instruction}{after}",
        sha256=_hash(ids, video),
    )


def user_text(question: Question, style: str = "stkit", think: bool = False) -> tuple[str, str]:
    """What the user says: the question with its options (text from a file), and our instruction."""
    lettered = [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options)]
    asked = question.question
    if style == "published":
        if not asked.startswith(PUBLISHED_OPENING.rstrip()):
            asked = PUBLISHED_OPENING + asked
        asked += f" Options: {', '.join(lettered)}" * bool(lettered)
        instruction = " ".join([PUBLISHED] * bool(lettered) + [THINK] * think)
        return asked + "\n\n" * bool(instruction), instruction
    asked += "\nOptions:\n" * bool(lettered) + "\n".join(lettered)
    if style == "plain":
        return asked, ""
    wanted = [ROUTE] if question.is_open else [OURS] if not think else []
    instruction = " ".join(wanted + [THINK] * think)
    return asked + "\n" * bool(instruction), instruction


@lru_cache(maxsize=4)
def plain_tokenizer(tokenizer) -> Tokenizer:
    """The same tokenizer with no added token, special or not: every text is plain text to it.

    (Transformers' ``split_special_tokens`` leaves added tokens that aren't special, such as ``<tool_call>``, in force.)
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(described))


def encode_answer(tokenizer, text: str) -> tuple[int, ...]:
    """What an assistant writes for a text, the end of its turn included: ids that a model can be taught.

    The text is plain text whatever it holds, but for the tags think and answer where the tokenizer has tokens for them.
    """
    text = text.encode("utf-8", "replace").decode()
    added = tokenizer.get_added_vocab()
    tags = [tag for tag in ("<think>", "</think>", "<answer>", "</answer>") if tag in added]
    pieces = re.split(f"({'|'.join(tags)})", text) if tags else [text]
    ids = [i for piece in pieces for i in ([added[piece]] if piece in tags else _plain(tokenizer, piece))]
    return (*ids, turn_end(tokenizer))


def turn_end(tokenizer) -> int:
    """The token that ends a turn in Qwen's chat."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return tokenizer.eos_token_id if end is None or end == tokenizer.unk_token_id else end


def _plain(tokenizer, text: str) -> list[int]:
    return plain_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids


@lru_cache(maxsize=4)
def letter_ids(tokenizer, count: int) -> tuple[int, ...]:
    """The token of each of the first ``count`` letters, as an answer that begins with it has it."""
    found = [tokenizer.encode(letter, add_special_tokens=False) for letter in LETTERS[:count]]
    if long := [letter for letter, ids in zip(LETTERS, found) if len(ids) != 1]:
        raise StkitError(
            f"the tokenizer has no single token for the letter {long[0]}: use mode='generate' with this model"
        )
    return tuple(ids[0] for ids in found)


def _template(processor, with_video: bool) -> tuple[str, str]:
    """The chat template before and after the user's text."""
    content = [{"type": "video"}] * with_video + [{"type": "text", "text": USER_TEXT}]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    parts = rendered.split(USER_TEXT)
    if len(parts) != 2 or parts[0].count(processor.video_token) != with_video or processor.video_token in parts[1]:
        raise StkitError(
            "the chat template does not put one video in front of the user's text: use the model's own one"
        )
    return parts[0], parts[1]


def _timestamps(before: str, processor, family: str, video: VideoInputs | None) -> str:
    """For Qwen3-VL, the video as one block a temporal patch, each after its time.

    Source: Transformers 5.23, Qwen3VLProcessor.replace_video_token, which keeps the template's own vision tokens around
    all blocks (before 5.12 they were replaced).
    """
    if family != "qwen3_vl" or video is None:
        return before
    block = f"{processor.vision_start_token}{processor.video_token}{processor.vision_end_token}"
    blocks = "".join(f"<{float(time_s):.1f} seconds>{block}" for time_s in video.timestamps_s)
    return before.replace(processor.video_token, blocks)


def _tokens_per_pad(processor, family: str, video: VideoInputs | None) -> int:
    """Video tokens that stand for each placeholder: of a temporal patch in Qwen3-VL, of the whole video else."""
    if video is None:
        return 0
    time, height, width = (int(n) for n in video.grid_thw)
    return height * width * (1 if family == "qwen3_vl" else time) // processor.video_processor.merge_size**2


def _expanded(ids: list[int], pad: int, count: int) -> list[int]:
    return [i for token in ids for i in ([token] * count if token == pad else [token])]


def _check_length(question: Question, length: int, max_new_tokens: int, context: int) -> None:
    if length + max_new_tokens <= context:
        return
    answer = f" and {max_new_tokens} for the answer" if max_new_tokens else ""
    lower = "frames or max_pixels" + (" or max_new_tokens" if max_new_tokens else "")
    raise StkitError(
        f"question {question.id!r}: the prompt has {length} tokens{answer}, the model's context is {context}: "
        f"lower {lower}, or use a model with a longer context (a prompt is never cut)"
    )


def _hash(ids: list[int], video: VideoInputs | None) -> str:
    frames = None
    if video is not None:
        times = [round(float(t), 6) for t in video.timestamps_s]
        frames = [[int(n) for n in video.grid_thw], times, round(video.second_per_grid_s, 6)]
    return hashlib.sha256(json.dumps([list(ids), frames]).encode()).hexdigest()
