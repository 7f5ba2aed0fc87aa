"""What the cards say of the shipped weights holds: of the very weights that are here, and on walks made here and now."""

import math
from pathlib import Path

import pytest
import torch

from stkit.bench.build import build_benchmark
from stkit.evaluation import evaluate
from stkit.runs import read_json
from stkit.tiny import cards
from stkit.tiny.scores import MAX_NEW_TOKENS
from stkit.vlm import tiny

torch.set_num_threads(1)
CARDS = Path(__file__).parents[1] / "data_cards"
CLIPS = 12
SEED = 20_261_130  # of no card
BACKWARDS = "frames backwards told as they show, more often than not"
MISSED = {
    ("tiny-cold", BACKWARDS), ("tiny-r1", BACKWARDS), ("tiny-r1", "the mean of the six at least 80"),
    ("tiny-r1", "at least 15 above tiny-cold, by a paired test over walks"),
}  # fmt: skip


@pytest.fixture(scope="module")
def scores():
    return read_json(CARDS / "tiny_scores.json")


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    out = tmp_path_factory.mktemp("fresh") / "walks"
    build_benchmark(out, CLIPS, SEED, split="test", progress=False)
    return out


def test_the_committed_scores_are_of_the_weights_that_ship(scores):
    assert (scores["clips"], list(scores["models"])) == (200, list(tiny.SHIPPED))
    for name in tiny.SHIPPED:
        assert scores["weights"][name] == read_json(tiny.folder(name) / "manifest.json")["sha256"]
        assert list(scores["models"][name]) == ["in", "ood", "blind", "shuffled", "reversed"]
        for way in scores["models"][name].values():
            assert way["clusters"] == 200 and way["failed"] == 0 and way["low"] < way["accuracy"] < way["high"]


def test_the_goals_are_met_but_for_those_that_the_cards_call_missed(scores):
    missed = {(name, goal) for name in tiny.SHIPPED for goal, _, met in cards.goals(name, scores) if not met}
    assert missed == MISSED


def test_cards_are_written_from_what_is_committed(scores):
    for name in tiny.SHIPPED:
        text = cards.card(name, read_json(tiny.folder(name) / "manifest.json"), scores)
        assert (tiny.folder(name) / "README.md").read_text() == text
        if name != "tiny-cold":
            assert (CARDS / f"{name.replace('-', '_')}.md").read_text() == text


@pytest.mark.parametrize("name", tiny.SHIPPED)
def test_on_fresh_walks_it_is_as_right_as_its_card_says(name, scores, walks, tmp_path):
    """Within four standard errors, of so few walks, of the committed accuracy; and blind, by letter, of chance."""
    asked = {"mode": "generate", "max_new_tokens": MAX_NEW_TOKENS, "blind": name == "tiny"}
    found = evaluate(walks, model=name, out=tmp_path / "run", progress=False, **asked).scores
    told = scores["models"][name]["in"]
    error = (told["high"] - told["low"]) / (2 * 1.96) * math.sqrt(scores["clips"] / CLIPS)
    assert found["failed"] == 0 and found["clusters"] == CLIPS
    assert told["accuracy"] - 4 * error <= found["accuracy"] <= told["accuracy"] + 4 * error
    if name == "tiny":
        assert found["accuracy"] > found["blind"] + 0.4
        assert abs(found["blind"] - 0.25) <= 4 * math.sqrt(0.25 * 0.75 / found["n"])
