"""A whole step of GRPO (rollouts, reference, update) by two sides: ours as `stkit grpo` runs it, and the plain recipe.

    write(folder, SMALL)
    side = Ours(folder, SMALL, questions=1)
    side.step()                      # draws rollouts on one clip and learns from them
    side.parts()                     # seconds of each part of a step
    measured(side, repeats=3)        # a step's memory, then times of steps: for a process of its own

The plain recipe is what published code shares (see peers.py): for each prompt the video repeated G times, ``generate``,
a reference pass and a pass with gradients over prompt and rollout of each of the group, the tower in all three.
"""

import statistics
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import measure
import peers
import torch
from material import frames, texts
from peft import LoraConfig, get_peft_model
from setting import LORA, Setting, Sizes
from stkit_kernels.memory import peak_bytes
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from stkit.runs import write_yaml
from stkit.train import grpo
from stkit.train.start import begin
from stkit.vlm.video import VideoInputs

BETA, RATE = 0.04, 1e-5
PARTS = ("rollouts", "reference", "update")


def every_second(rollouts: list) -> list[float]:
    """A reward that gives every group an advantage, whatever was said."""
    return [float(k % 2) for k in range(len(rollouts))]


class Side:
    """Steps that note what they spend: ``spent`` of the step under way, ``log`` of those done, seconds by part."""

    def __init__(self):
        self.spent, self.log = {}, []

    def step(self) -> None:
        self.spent.clear()
        self.work()
        self.log.append(dict(self.spent))

    def parts(self) -> dict[str, float]:
        """Of a step, medians over those done."""
        return {name: statistics.median(row[name] for row in self.log) for name in PARTS}


class Ours(Side):
    """`stkit grpo` on the folder's clip: what its loop does at each update, called by hand."""

    def __init__(self, folder: Path, sizes: Sizes, questions: int):
        super().__init__()
        chosen = {
            "lora": {"rank": LORA["r"], "alpha": LORA["lora_alpha"]}, "rewards": {"every_second": 1.0},
            "train": {"batch": 1, "steps": 10_000, "schedule": "constant", "lr": RATE, "warmup": 0.0},
            "data": {"prompt": "plain", "limit": questions},
            "grpo": {"group": sizes.group, "max_new_tokens": sizes.new, "beta": BETA},
        }  # fmt: skip
        out = folder / f"run-{questions}-{time.monotonic_ns()}"
        write_yaml(out.with_suffix(".yaml"), chosen)  # a preset of its own: those that ship may change
        beside = {"functions": {"every_second": "sides.py"}}
        overrides = {"rewards.correct": 0.0, "rewards.format": 0.0}
        self.job = begin("grpo", folder / "walks", str(folder / "model"), out.with_suffix(".yaml"), out, overrides, False, beside)

    def draw(self) -> grpo.Batch:
        return grpo.draw(self.job, {"every_second": every_second})

    def work(self) -> None:
        with clocked(self.spent, "rollouts"):
            batch = self.draw()
        policy, reference = self.job.policy, self.job.policy.reference

        @contextmanager
        def watched():
            with clocked(self.spent, "reference"), reference() as model:
                yield model

        policy.reference = watched
        try:
            with clocked(self.spent, "update"):
                grpo._learn(self.job, batch, 0)
        finally:
            del policy.reference  # the class's own again
        self.spent["update"] -= self.spent["reference"]


class Plain(Side):
    """The published recipe with Transformers and peft alone."""

    def __init__(self, folder: Path, sizes: Sizes, questions: int):
        super().__init__()
        base = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
        self.model = get_peft_model(base, LoraConfig(**LORA)).train()
        processor = Qwen2_5_VLProcessor.from_pretrained(folder / "model")
        self.settings = [plain_setting(self.model, processor, folder, sizes, text) for text in texts(sizes)[:questions]]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=0.0)

    def work(self) -> None:
        for setting in self.settings:
            with clocked(self.spent, "rollouts"):
                rollouts = peers.published_rollouts(setting)
            drawn = replace(setting, rollouts=rollouts)
            with clocked(self.spent, "reference"):
                reference = peers.reference(drawn, peers.published_log_probs)
            with clocked(self.spent, "update"):
                loss = plain_loss(peers.published_log_probs(drawn), reference, every_second(list(rollouts)))
                (loss / len(self.settings)).backward()
        with clocked(self.spent, "update"):
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def plain_setting(model, processor, folder: Path, sizes: Sizes, text: str) -> Setting:
    """One prompt with its video, as Transformers' processor makes them."""
    content = [{"type": "video"}, {"type": "text", "text": text}]
    asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    videos = [torch.from_numpy(frames(folder, sizes)).permute(0, 3, 1, 2)]
    made = processor(text=[asked], videos=videos, do_sample_frames=False, return_tensors="pt")
    inputs = VideoInputs(made["pixel_values_videos"], made["video_grid_thw"][0], 1.0, None)
    return Setting(sizes, model, inputs, tuple(made["input_ids"][0].tolist()), torch.empty(0), [])


def plain_loss(new: torch.Tensor, reference: torch.Tensor, rewards: list[float]) -> torch.Tensor:
    """GRPO's loss of one group ``(G, C)``, where every rollout has C tokens, as published code writes it."""
    given = torch.tensor(rewards)
    gains = ((given - given.mean()) / given.std())[:, None]
    apart = reference - new
    return (BETA * (apart.exp() - apart - 1) - (new - new.detach()).exp() * gains).mean()


@contextmanager
def clocked(spent: dict[str, float], name: str):
    """Adds the block's seconds to what is spent on ``name``."""
    begin_s = time.perf_counter()
    try:
        yield
    finally:
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - begin_s


def measured(side: Side, repeats: int) -> dict:
    """In a fresh process: resident memory of the first step, seconds of the next ones, live tensors of the last."""
    resident = measure.peak_resident_mb(side.step)
    side.log.clear()
    seconds = measure.times(side.step, repeats)
    parts = side.parts() if repeats else {}
    return {"resident_mb": resident, "seconds": seconds, "parts": parts, "live_mb": peak_bytes(side.step) / 1e6}


def same_step(folder: Path, sizes: Sizes, questions: int) -> tuple[float, float, int]:
    """How far one step of ours and the plain recipe's on the same weights and rollouts are apart.

    Returns:
        The largest difference of the loss, of any entry of the gradient, and the tokens that were learned from.
    """
    side = Ours(folder, sizes, questions)
    model, loop = side.job.policy.model, side.job.loop
    with torch.no_grad():
        for k, parameter in enumerate(p for n, p in model.named_parameters() if "lora_B" in n):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(k))  # so that there is a KL
    batch = side.draw()
    while any(set(peers.SPECIAL) & set(r.ids) for g in batch.learned[0] for r in g.rollouts):  # see published_rollouts
        batch = side.draw()
    loss = 0.0
    for group in batch.learned[0]:
        rollouts = torch.tensor([rollout.ids for rollout in group.rollouts])
        setting = Setting(sizes, model, batch.shots[0].seen.inputs, group.prompt.ids, rollouts, [])
        reference = peers.reference(setting, peers.published_log_probs)
        part = plain_loss(peers.published_log_probs(setting), reference, group.rewards) / len(batch.learned[0])
        part.backward()
        loss += float(part.detach())
    theirs = [p.grad.clone() for p in loop.parameters]
    loop.optimizer.zero_grad(set_to_none=True)
    row, ours = learned(side, batch)
    return abs(row["loss"] - loss), max(float((a - b).abs().max()) for a, b in zip(ours, theirs)), row["learned_tokens"]


def learned(side: Ours, batch: grpo.Batch) -> tuple[dict, list[torch.Tensor]]:
    """Learn from a batch: the row of metrics that it writes, and the gradients just before the optimiser's step."""
    job, rows, gradients = side.job, [], []
    advance, log = job.loop._advance, job.loop.log

    def looked() -> float:
        gradients.extend(p.grad.clone() for p in job.loop.parameters)
        return advance()

    def logged(row: dict) -> dict:
        rows.append(log(row))
        return rows[-1]

    job.loop._advance, job.loop.log = looked, logged
    grpo._learn(job, batch, 0)
    return rows[0], gradients
