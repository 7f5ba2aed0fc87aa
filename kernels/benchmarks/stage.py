"""The last supervised stage of the tiny model's recipe, by two sides: lessons on trees, and plain Transformers.

    rows(small, timed, explain)

The plain loop is what a Trainer does with the same lines: every question is a row of its own with its video, padded to
the batch's longest, the tower and the logits of every position for each. The answer to both is one gradient.
"""

import numpy as np
import torch

from stkit.bench.presets import PRESETS
from stkit.tiny.lessons import Reader, lesson
from stkit.tiny.recipe import MAX_TOKENS, Told, loss_on, plants_of
from stkit.tiny.walks import planned_walks
from stkit.train.forest import forests
from stkit.vlm.load import load_model
from stkit.vlm.tiny import UNTRAINED
from stkit.vlm.video import Frames, prepare, video_spec

IGNORED = -100


def lessons(loaded, walks: int, questions: int) -> list[Told]:
    """Lines on walks with frames of noise: what they show costs the same."""
    rng, spec, found = np.random.default_rng(0), video_spec(loaded.processor), []
    times, size = np.linspace(0, 25, 32), loaded.processor.video_processor.size
    for walk in planned_walks(walks, seed=0):
        pixels = rng.integers(0, 256, (32, 84, 112, 3)).astype(np.uint8)
        frames = Frames(pixels, times, "", "uniform", 7.0, 176, np.arange(32))
        video = prepare(frames, spec, size["shortest_edge"], size["longest_edge"])
        asked = walk.questions(PRESETS["tiny"], 0)[:questions]
        lines = lesson(asked, walk, "answer", Reader(loaded.processor, "qwen2_5_vl"), video)
        found.append(Told(lines, video, 1 / (walks * questions)))
    return found


def on_trees(model, told: list[Told]) -> torch.Tensor:
    """The loss as the recipe computes it, forest by forest; the gradient is accumulated."""
    total = torch.zeros(())
    for forest in forests(plants_of(told, MAX_TOKENS), MAX_TOKENS):
        loss = loss_on(model, forest, told)[0]
        loss.backward()
        total = total + loss.detach()
    return total


def plain(model, told: list[Told], batch: int) -> torch.Tensor:
    """The same loss, row by row in padded batches; the gradient is accumulated."""
    rows = [(one, line) for one in told for line in one.lines]
    total = torch.zeros(())
    for begin in range(0, len(rows), batch):
        part = rows[begin : begin + batch]
        width = max(len(line.prompt) + len(line.ids) for _, line in part)
        ids, mask = torch.zeros(2, len(part), width, dtype=torch.long)
        labels = torch.full((len(part), width), IGNORED)
        for k, (_, line) in enumerate(part):
            whole = torch.tensor([*line.prompt, *line.ids])
            ids[k, : len(whole)], mask[k, : len(whole)] = whole, 1
            labels[k, len(line.prompt) : len(whole)] = torch.tensor(line.ids)
        logits = model(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=2 * (ids == model.config.video_token_id).long(),
            pixel_values_videos=torch.cat([one.video.pixel_values for one, _ in part]),
            video_grid_thw=torch.stack([one.video.grid_thw for one, _ in part]),
            second_per_grid_ts=torch.tensor([one.video.second_per_grid_s for one, _ in part]), use_cache=False,
        ).logits  # fmt: skip
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
        )
        counts = (labels != IGNORED).sum(1)
        loss = sum(one.share * row.sum() / count for (one, _), row, count in zip(part, each, counts))
        loss.backward()
        total = total + loss.detach()
    return total


def rows(small: bool, timed, explain) -> list[dict]:
    """Seconds for the same samples. ``explain``: says of a row why its goal is not met, from a profile of our call."""
    walks, questions, batch = (2, 2, 2) if small else (16, 8, 12)
    loaded = load_model(UNTRAINED, device="cpu")
    model = loaded.model.train()
    told = lessons(loaded, walks, questions)

    def ours():
        model.zero_grad(set_to_none=True)
        return on_trees(model, told)

    def theirs():
        model.zero_grad(set_to_none=True)
        return plain(model, told, batch)

    mine = ours()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    other = theirs()
    apart = max(float((p.grad - gradients[n]).abs().max()) for n, p in model.named_parameters())
    found = timed(f"tiny's last stage, {walks} walks x {questions} questions", theirs, ours, 1 if small else 3, ">= 3",
                  abs(float(mine - other)))  # fmt: skip
    count = sum(len(one.lines) for one in told)
    found |= {"max_abs_diff_gradients": apart, "samples_a_second": [count / found["peer"], count / found["ours"]]}
    explain(found, ours)
    return [found]
