"""What the paper (arXiv 2503.12542) reports, read off a radar chart to about 2 points, for ours to stand beside."""

KINDS = tuple(f"{task}/{order}" for task in ("direction", "landmark", "action") for order in ("forward", "reverse"))
READ_OFF = 2  # points by which a figure read off the chart may be wrong
FIGURES = {  # accuracies of multiple choice in percent, in the order of KINDS
    "Qwen2-VL-7B": (52, 62, 69, 67, 75, 77),
    "CoT-SFT": (47, 48, 53, 56, 59, 61),
    "SFT+GRPO": (76, 84, 84, 84, 81, 81),
    "ST-R1": (82, 86, 88, 86, 89, 87),
}
MEANT = {
    "Qwen2-VL-7B": "the base model as it is",
    "CoT-SFT": "the cold start with reverse thinking alone",
    "SFT+GRPO": "SFT, then GRPO; taken here for the recipe without reverse thinking",
    "ST-R1": "the cold start with reverse thinking, then GRPO",
}


def mean(model: str) -> float:
    """Mean of the six multiple-choice accuracies of a model, in percent."""
    return sum(FIGURES[model]) / len(FIGURES[model])
