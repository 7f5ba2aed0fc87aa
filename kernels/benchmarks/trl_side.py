"""A whole step by TRL's GRPOTrainer, as the registry has it, on the same clip's frames as images (it takes no video).

    measured(folder, SMALL, repeats=3, checkpointing=True)     # in a process of its own: its times are its step's own

Its settings are its own but for what the bench fixes: G, C, learning rate, beta (so that it makes a reference pass), LoRA,
float32 on a CPU, and one update a batch of rollouts. A frame as an image takes as many tokens as two frames of a video,
which is the price of taking no video and is left in.
"""

import importlib.util
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import measure
import torch
from material import frames, texts
from peft import LoraConfig
from setting import LORA, Sizes
from sides import BETA, PARTS, RATE, clocked, every_second
from stkit_kernels.memory import LiveStorages
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, TrainerCallback

INSTALL = "not installed: pip install -e '.[bench]'"


def installed() -> bool:
    return importlib.util.find_spec("trl") is not None


def reward(completions, **_) -> list[float]:
    return every_second(completions)


class Watch(TrainerCallback):
    """Looks at the steps from outside: memory of the first, seconds of the next and of their parts, live tensors of the
    last."""

    def __init__(self, repeats: int):
        self.repeats, self.found, self.spent, self.log = repeats, {"seconds": []}, {}, []

    def on_step_begin(self, args, state, control, **kwargs):
        number, self.stack = state.global_step, ExitStack()
        if number == 0:
            self.mark = measure.ResidentMark()
        elif number == self.repeats + 1:
            self.live = self.stack.enter_context(LiveStorages())
        self.spent.clear()
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        seconds, number = time.perf_counter() - self.begin, state.global_step - 1
        self.stack.close()
        if number == 0:
            self.found["resident_mb"] = self.mark.above()
        elif number <= self.repeats:
            drawn, scored = self.spent["rollouts"], self.spent["scored"]
            self.found["seconds"].append(seconds)
            self.log.append((drawn, scored - drawn, seconds - scored))
        else:
            self.found["live_mb"] = self.live.peak / 1e6
            self.found["parts"] = dict(zip(PARTS, map(statistics.median, zip(*self.log))))


def make_trainer(folder: Path, sizes: Sizes, steps: int, checkpointing: bool, watch: Watch):
    """TRL's trainer on one prompt with the clip's frames."""
    from datasets import Dataset, Features, Image, Sequence, Value
    from PIL import Image as Pictures
    from trl import GRPOConfig, GRPOTrainer

    pictures = [Pictures.fromarray(frame) for frame in frames(folder, sizes)]
    asked = [{"prompt": [{"role": "user", "content": texts(sizes)[0]}], "images": pictures}]
    message = [{"role": Value("string"), "content": Value("string")}]
    data = Dataset.from_list(asked, features=Features({"prompt": message, "images": Sequence(Image())}))
    how = GRPOConfig(
        output_dir=str(folder / f"trl-{checkpointing}"), use_cpu=True, bf16=False, beta=BETA, loss_type="grpo",
        learning_rate=RATE, lr_scheduler_type="constant", num_generations=sizes.group, max_completion_length=sizes.new,
        per_device_train_batch_size=sizes.group, gradient_accumulation_steps=1, max_steps=steps, save_strategy="no",
        report_to=[], disable_tqdm=True, gradient_checkpointing=checkpointing, dataloader_pin_memory=False,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    processor = Qwen2_5_VLProcessor.from_pretrained(folder / "model")
    return GRPOTrainer(
        model, reward, how, data, processing_class=processor, callbacks=[watch], peft_config=LoraConfig(**LORA)
    )


def measured(folder: Path, sizes: Sizes, repeats: int, checkpointing: bool) -> dict:
    """As :func:`sides.measured`, with the tokens that its rollouts and prompts had."""
    watch = Watch(repeats)
    trainer = make_trainer(folder, sizes, repeats + 2, checkpointing, watch)
    lengths = []
    watched(trainer, "_generate", watch.spent, "rollouts")
    watched(trainer, "_generate_and_score_completions", watch.spent, "scored", lengths)
    trainer.train()
    prompt, new = {n[0] for n in lengths}, {n[1] for n in lengths}
    if new != {sizes.new}:
        raise RuntimeError(f"TRL's rollouts had {sorted(new)} tokens, {sizes.new} were asked for")
    return watch.found | {"prompt_tokens": prompt.pop(), "version": importlib.import_module("trl").__version__}


def watched(trainer, name: str, spent: dict, part: str, lengths: list | None = None) -> None:
    """Time a method of the trainer's, and note how long the prompts and rollouts are that it returns."""
    method = getattr(trainer, name)

    def call(*args, **kwargs):
        with clocked(spent, part):
            found = method(*args, **kwargs)
        if lengths is not None:
            masks = (found[f"{kind}_mask"].sum(1) for kind in ("prompt", "completion"))
            lengths.extend(zip(*(mask.tolist() for mask in masks)))
        return found

    setattr(trainer, name, call)
