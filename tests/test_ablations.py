"""The paper's questions in miniature: what thoughts say, what is computed from marks, what the page concludes, and a
whole study on noise in seconds, stopped and resumed."""

import itertools
import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from benchmaker import lines, write_video
from transformers import Qwen2_5_VLConfig
from walkmaker import make_walks

from stkit.bench.routes import parse as parse_route
from stkit.bench.schema import Benchmark, Question, load_benchmark, row_of
from stkit.bench.timeline import Moment, render
from stkit.bench.timeline import parse as parse_timeline
from stkit.runs import claim, read_json, write_json, write_jsonl
from stkit.runtime import BadUse, StkitError
from stkit.stats import Interval
from stkit.tiny import ablations, paper
from stkit.tiny.ablation_page import page, verdict
from stkit.tiny.ablations import Clock, main, run_study
from stkit.tiny.findings import clusters, contrast, judged, summarise, summary, widened
from stkit.tiny.study import Arm, load_study
from stkit.tiny.thoughts import both_orders, chain, thought, write_lessons
from stkit.train.answers import answer_text
from stkit.train.rewards import Answered
from stkit.train.sft import opposite
from stkit.vlm import tiny
from stkit.vlm.answers import parse

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
MOMENTS = (Moment("left"), Moment("straight", "tree", "left"), Moment("left"), Moment("right"))


def asked(order: str, options: tuple[str, ...], answer: int) -> Question:
    return Question(f"w-{order}", "w", "w.mp4", "w", "direction", order, "Which?", options, answer, "train")


FORWARD = asked("forward", ("turn left, turn left, turn right", "turn right, turn left, turn right"), 0)
BACK = asked("reverse", ("turn right, turn right, turn right", "turn left, turn right, turn right"), 1)


# --- thoughts -------------------------------------------------------------------------------------------------------


def test_a_thought_with_reverse_thinking_tells_both_orders_and_then_looks_at_the_options():
    line = render(MOMENTS, dense=True)
    assert thought(FORWARD, "reverse", BACK, MOMENTS) == (
        f"<think>{line} Route: left, left, right. Reversed: left, right, right. A: left, left, right. "
        "So the answer is A.</think> <answer>A</answer>"
    )
    assert thought(BACK, "reverse", FORWARD, MOMENTS) == (
        f"<think>{line} Route: left, left, right. Reversed: left, right, right. A: right. B: left, right, right. "
        "So the answer is B.</think> <answer>B</answer>"
    )


def test_a_thought_without_it_tells_the_asked_order_only():
    line = render(MOMENTS, dense=True)
    forward, back = thought(FORWARD, "direct", BACK, MOMENTS), thought(BACK, "direct", FORWARD, MOMENTS)
    assert forward.startswith(f"<think>{line} Route: left, left, right. A: left, left, right. So")
    assert back.startswith(f"<think>{line} Reversed: left, right, right. A: right. B: left, right, right. So")


def test_thoughts_of_built_walks_differ_in_the_other_order_alone_and_are_read_as_right(tmp_path):
    bench = make_walks(tmp_path / "walks", clips=6)
    for question in bench.questions:
        other = opposite(bench, question)
        both, direct = (thought(question, how, other, MOMENTS) for how in ("reverse", "direct"))
        kits = answer_text(question, "checked", moments=MOMENTS)
        assert (direct if question.order == "forward" else both) == kits
        assert both.count("Route:") == both.count("Reversed:") == 1
        assert direct.count("Route:") + direct.count("Reversed:") == 1
        heard = both.split(" Reversed:")[0], both.split("Reversed:")[1].split(".")[0]
        told = thought(other, "reverse", question, MOMENTS)
        assert (told.split(" Reversed:")[0], told.split("Reversed:")[1].split(".")[0]) == heard
        for text in (both, direct):
            if question.options:
                assert parse(text, question.options) == question.answer
            else:
                answer = text.partition("<answer>")[2].partition("</answer>")[0]
                assert parse_route(answer) == parse_route(question.answer)


def test_a_question_without_its_opposite_and_an_unknown_thinking_are_refused():
    with pytest.raises(StkitError, match="no direction question of the other order"):
        thought(FORWARD, "reverse", None, MOMENTS)
    with pytest.raises(BadUse, match="'backwards' is unknown: use reverse or direct"):
        thought(FORWARD, "backwards", BACK, MOMENTS)


@pytest.mark.parametrize(
    "said, reward",
    [
        ("Route: left, tree left. Reversed: tree right, right. left: A.", 1.0),
        ("Route: right. Reversed: left. So", 1.0),
        ("Route: left, tree left. Reversed: tree left, right. left: A.", 0.0),
        ("Route: left, right. Reversed: right, left.", 0.0),
        ("Route: left, tree left. left: A.", 0.0),
        ("Reversed: left. left: A.", 0.0),
        ("Route: left. Reversed: right. Reversed: right.", 0.0),
        ("Route: left. Reversed: righ.", 0.0),
        ("Route: left. Reversed: rig", 0.0),
    ],
)
def test_both_orders_are_rewarded_when_one_is_the_others_reverse_right_or_wrong(said, reward):
    text = f"<think>Timeline: left tree left. {said}</think> <answer>A</answer>"
    assert both_orders([Answered(FORWARD, text, 9, True, 99)] * 2) == [reward] * 2


@pytest.mark.parametrize(
    "question, said, letter, reward",
    [
        (FORWARD, "Route: left, left, right. A: left, left, right. So the answer is A.", "A", 1.0),
        (BACK, "Route: left, left, right. Reversed: left, right, right. A: right. B: left, right, right. So the answer is B.", "B", 1.0),
        (BACK, "Route: left, left, right. Reversed: left, right, right. A: right. So the answer is B.", "B", 2 / 3),
        (BACK, "Route: left, left, right. Reversed: right, right, right. A: right, right, right. So the answer is A.", "A", 2 / 3),
        (FORWARD, "Route: left, right. A: left, left. So the answer is A.", "A", 0.0),  # no option says so
        (FORWARD, "Route: right, left, right. A: left. B: right, left, right. So the answer is B.", "B", 1 / 2),  # not what was seen
        (FORWARD, "Route: left, left, right. A: left, left, right. So the answer is A.", "B", 1 / 2),
        (FORWARD, "So the answer is A.", "A", 0.0),
    ],
)
def test_what_follows_from_what_was_written_before_is_rewarded(question, said, letter, reward):
    text = f"<think>{render(MOMENTS, dense=True)} {said}</think> <answer>{letter}</answer>"
    rollout = Answered(question, text, 9, True, 99)
    assert chain([rollout, replace(rollout, text="A")]) == [pytest.approx(reward), 0.0]
    free = replace(question, options=(), answer="turn left", task="route")
    assert math.isnan(chain([replace(rollout, question=free)])[0])


def test_lessons_are_of_the_first_clips_with_the_time_line_of_the_frames_that_are_shown(tmp_path):
    bench = make_walks(tmp_path / "walks", clips=3)
    published = write_lessons(bench, "direct", 2, {"sampling": "published", "frames": None, "fps": None})
    uniform = write_lessons(bench, "reverse", 3, {"sampling": "uniform", "frames": 32, "fps": None})
    assert published.name == "direct-published-2.jsonl" and uniform.parent == bench.path
    for path, count, patches in ((published, 2, 4), (uniform, 3, 16)):
        rows = load_benchmark(path).questions
        assert list(dict.fromkeys(q.clip_id for q in rows)) == [clip.id for clip in bench.clips[:count]]
        assert {len(parse_timeline(q.solution)) for q in rows} == {patches}
    with pytest.raises(BadUse, match="clips=4: .* has 3"):
        write_lessons(bench, "direct", 4, {"sampling": "uniform", "frames": 32})


# --- studies --------------------------------------------------------------------------------------------------------


def test_the_study_that_ships_asks_what_the_issue_asks():
    study = load_study("paper")
    assert len(study.seeds) == 3
    ways = {
        tuple(a.stage for a in study.chain(name)) + (arm.thinking,) for name, arm in study.arms.items() if arm.stage
    }
    assert {
        (*how, thinking) for how in (("sft",), ("grpo",), ("sft", "grpo")) for thinking in ("reverse", "direct")
    } <= ways
    assert all({a.thinking for a in study.chain(n)} == {arm.thinking} for n, arm in study.arms.items())
    by_name = {one.name: (study.arms[one.first], study.arms[one.second]) for one in study.contrasts}
    plain, consistent = by_name["consistency"]
    assert replace(consistent, name="", settings={}) == replace(plain, name="")
    assert consistent.settings == {"rewards.reverse_consistency": 0.5}
    assert [a.sampling for a in by_name["sampling"]] == ["published", None]
    assert [
        by_name[f"examples-{pair}"][k].clips for pair, k in (("50-to-200", 0), ("50-to-200", 1), ("200-to-800", 1))
    ] == [50, 200, None]
    assert study.walks["train"]["clips"] == 800 and len({how["seed"] for how in study.walks.values()}) == 3
    assert {name for one in study.contrasts for name in (one.first, one.second)} == set(study.arms)


MICRO = {
    "seeds": [0, 1],
    "walks": {name: {"clips": 2, "seed": seed} for seed, name in enumerate(("train", "test", "ood"))},
    "max_new_tokens": 4, "both_orders": 0.2,
    "sft": {"train.steps": 1, "train.batch": 1, "data.per_clip": 2},
    "grpo": {"train.steps": 1, "train.batch": 1, "data.per_clip": 2, "grpo.group": 2, "grpo.max_new_tokens": 4},
    "arms": {
        "start": None,
        "sft": {"stage": "sft", "sampling": "published", "clips": 1},
        "both": {"stage": "grpo", "after": "sft"},
    },
    "contrasts": {
        "cold": {"question": "Does it help?", "first": "start", "second": "sft", "paper": ["Qwen2-VL-7B", "CoT-SFT"]},
        "more": {"question": "Does more help?", "first": "sft", "second": "both"},
    },
}  # fmt: skip


def written(path: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump(MICRO | changes, sort_keys=False))
    return path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arms": MICRO["arms"] | {"x": {"stage": "dpo"}}}, "arms.x.stage='dpo' is unknown: use sft, grpo"),
        ({"arms": MICRO["arms"] | {"x": {"stage": "sft", "thinking": "no"}}}, "arms.x.thinking='no' is unknown"),
        ({"arms": MICRO["arms"] | {"x": {"stage": "sft", "sampling": "all"}}}, "arms.x.sampling='all' is unknown"),
        ({"arms": MICRO["arms"] | {"x": {"stage": "sft", "after": "y"}}}, "arms.x.after='y': name an arm"),
        ({"arms": MICRO["arms"] | {"x": {"stage": "sft", "after": "start"}}}, "after='start' trains nothing"),
        ({"arms": MICRO["arms"] | {"x": {"stage": "sft", "clips": 3}}}, "arms.x.clips=3: give 1 to 2"),
        ({"arms": MICRO["arms"] | {"x": {"stage": "grpo", "clips": 1}}}, "clips=1 has no meaning for stage 'grpo'"),
        ({"arms": MICRO["arms"] | {"x": {"stag": "sft"}}}, "arms.x: 'stag' is unknown: use stage"),
        ({"arms": MICRO["arms"] | {"x": {"stage": "sft", "settings": {"train.lrr": 1}}}}, "train.lrr"),
        ({"contrasts": {"c": {"question": "?", "first": "start", "second": "z"}}}, "contrasts.c: arm 'z' is unknown"),
        ({"contrasts": {"c": {"question": "?", "first": "start"}}}, "contrasts.c: 'second' is missing"),
        ({"contrasts": {"c": {"question": 3, "first": "start", "second": "sft"}}}, "c.question=3: give a text"),
        ({"contrasts": {"c": {"question": "?", "first": "sft", "second": "sft"}}}, "'sft' is compared with itself"),
        ({"contrasts": {"c": {"question": "?", "first": "start", "second": "sft", "paper": "A"}}}, "paper='A': give a list"),
        ({"contrasts": {}}, "contrasts: none: give at least one"),
        ({"contrasts": ["c"]}, "contrasts=.'c'.: give names with values"),
        ({"contrasts": {"c": "start"}}, "contrasts.c: keys with values were expected, not 'start'"),
        ({"contrasts": {"c": {"question": "?", "first": "start", "second": "sft", "paper": ["GPT"]}}}, "paper=.*GPT"),
        ({"arms": MICRO["arms"] | {"x": {"stage": "sft", "clips": "few"}}}, "x.clips='few': give a whole number"),
        ({"arms": MICRO["arms"] | {"x": {"stage": "sft", "settings": [1]}}}, r"x.settings=\[1\]: give names with values"),
        (
            {"arms": MICRO["arms"] | {"x": {"stage": "grpo", "settings": {"rewards.corect": 1}}}},
            "arms.x: reward 'corect' is unknown: did you mean 'correct'",
        ),
        (
            {"arms": MICRO["arms"] | {"x": {"stage": "sft", "settings": {"train.seed": 1}}}},
            "arms.x: train.seed is set: leave it out, seeds decides it",
        ),
        ({"arms": MICRO["arms"] | {"../x": {"stage": "sft"}}}, "arms.../x: give a name of small letters"),
        ({"arms": {"start": None}}, "arms: start: give a stage to at least one"),
        ({"arms": ["start"]}, "arms=.'start'.: give names with values"),
        ({"arms": MICRO["arms"] | {7: {"stage": "sft"}}}, "arms={.*: give names with values"),
        ({"grpo": {"train.steps": 0}}, "arms.both: train.steps=0: give a number above 0"),
        ({"sft": 3}, "sft=3: give names with values"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]"),
        ({"seeds": [-1]}, r"seeds=\[-1\]"),
        ({"seeds": 3}, "seeds=3: give a list"),
        ({"seeds": ["a"]}, "seeds='a': give a whole number"),
        ({"walks": {"train": {"clips": 2, "seed": 0}}}, "walks: train: give clips and seed of train, test, ood"),
        ({"walks": MICRO["walks"] | {"ood": {"clips": 2}}}, "walks.ood=.*: give clips and seed"),
        ({"walks": MICRO["walks"] | {"ood": {"clips": "2", "seed": 0}}}, "ood.clips='2': give a whole number of at least 1"),
        ({"walks": MICRO["walks"] | {"ood": {"clips": 2, "seed": True}}}, "walks.ood.seed=True"),
        ({"more": 1}, "'more' is unknown: use seeds, walks"),
        ({"both_orders": "much"}, "both_orders='much'"),
        ({"both_orders": -1}, "both_orders=-1.0: give 0 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: give a whole number of at least 1"),
    ],
)  # fmt: skip
def test_a_study_that_makes_no_sense_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(BadUse, match=f"bad.yaml: .*{message}"):
        load_study(written(tmp_path / "bad.yaml", **changes))


def test_a_study_that_lacks_something_is_refused(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in MICRO.items() if key != "grpo"}))
    with pytest.raises(BadUse, match="short.yaml: the study: 'grpo' is missing: give seeds, walks"):
        load_study(path)
    path.write_text("")
    with pytest.raises(BadUse, match="short.yaml: the study: keys with values were expected, not None"):
        load_study(path)


def test_an_unknown_study_names_those_that_there_are():
    with pytest.raises(BadUse, match="study 'papr' is unknown: use paper"):
        load_study("papr")


# --- statistics -----------------------------------------------------------------------------------------------------


def said(blind: float = 0.25, **by_kind: str) -> dict:
    """What marks() gives, from marks by kind ("direction_forward")."""
    by_task = {}
    for name, line in by_kind.items():
        known = [mark == "1" for mark in line if mark != "-"]
        by_task[name.replace("_", "/")] = {
            "accuracy": sum(known) / len(known),
            "blind": blind,
            "n": len(known),
            "marks": line,
        }
    choice = [mark == "1" for name, line in by_kind.items() if "route" not in name for mark in line if mark != "-"]
    return {
        "accuracy": sum(choice) / len(choice), "chance": 0.25, "blind": blind, "unparsed_rate": 0.0, "failed": 0,
        "by_task": by_task,
    }  # fmt: skip


def test_an_arms_accuracy_is_over_multiple_choice_and_its_seeds():
    runs = [
        said(direction_forward="110-", action_reverse="1010", route_forward="1111"),
        said(direction_forward="100-", action_reverse="0000", route_forward="0000", blind=0.35),
    ]
    found = summary(runs, [0, 1, 2, 2])
    assert found["n"] == 7 and found["clusters"] == 3
    assert found["by_seed"] == pytest.approx([4 / 7, 1 / 7]) and found["accuracy"] == pytest.approx(5 / 14)
    assert found["blind"] == pytest.approx(0.3)
    assert found["by_task"]["route/forward"]["accuracy"] == pytest.approx(0.5)
    assert found["by_task"]["direction/forward"]["by_seed"] == pytest.approx([2 / 3, 1 / 3])
    assert (
        found["low"] < found["accuracy"] < found["high"] and found["wide_low"] < found["accuracy"] < found["wide_high"]
    )


def test_the_interval_by_clip_and_seed_adds_the_seeds_margin_in_quadrature():
    by_clip = Interval(0.5, 0.46, 0.53, 100, 50, "")
    found = widened(by_clip, [0.49, 0.5, 0.51])
    margin = 4.302653 * 0.01 / 3**0.5  # t of 2 degrees of freedom, from a table
    assert found["wide_low"] == pytest.approx(0.5 - (0.04**2 + margin**2) ** 0.5, abs=1e-6)
    assert found["wide_high"] == pytest.approx(0.5 + (0.03**2 + margin**2) ** 0.5, abs=1e-6)
    assert widened(by_clip, [0.5, 0.5]) == pytest.approx({"wide_low": 0.46, "wide_high": 0.53})
    assert widened(by_clip, [0.5]) == {"wide_low": None, "wide_high": None}
    assert widened(by_clip, [0.0, 1.0]) == {"wide_low": 0.0, "wide_high": 1.0}
    assert widened(by_clip, [0.0, 1.0], -1.0) == {"wide_low": -1.0, "wide_high": 1.0}


def test_a_contrast_is_the_paired_difference_of_means_over_seeds_tested_by_exchanging_maps():
    first = {
        0: said(direction_forward="100000", landmark_forward="010000"),
        1: said(direction_forward="000000", landmark_forward="110000"),
    }
    second = {
        0: said(direction_forward="111101", landmark_forward="110110"),
        1: said(direction_forward="111010", landmark_forward="011100"),
    }
    codes = [0, 1, 2, 3, 4, 4]
    found = contrast(first, second, codes)
    by_map = np.zeros(5)
    for seed in (0, 1):
        for kind in ("direction/forward", "landmark/forward"):
            for k, code in enumerate(codes):
                by_map[code] += (
                    int(second[seed]["by_task"][kind]["marks"][k]) - int(first[seed]["by_task"][kind]["marks"][k])
                ) / 2
    assert found["difference"] == pytest.approx(by_map.sum() / 12)
    assert found["by_seed"] == pytest.approx([(9 - 2) / 12, (7 - 2) / 12])
    flipped = [abs((np.array(signs) * by_map).sum()) for signs in itertools.product((1, -1), repeat=5)]
    assert found["p"] == pytest.approx(np.mean([value >= abs(by_map.sum()) - 1e-9 for value in flipped]))
    assert found["low"] < found["difference"] < found["high"]


def test_an_arm_that_ran_once_stands_for_every_seed_and_unequal_questions_are_refused():
    once, twice = {0: said(direction_forward="10")}, {0: said(direction_forward="11"), 1: said(direction_forward="01")}
    assert contrast(once, twice, [0, 1])["by_seed"] == [0.5, 0.0]
    assert contrast(twice, once, [0, 1])["by_seed"] == [-0.5, 0.0]
    with pytest.raises(StkitError, match="not scored on the same questions"):
        contrast(once, {0: said(direction_forward="1-")}, [0, 1])
    with pytest.raises(StkitError, match="the same seeds"):
        contrast(twice, {2: twice[0], 3: twice[1]}, [0, 1])


def test_outcomes_follow_holm_over_all_contrasts_and_the_seeds_signs():
    def one(p, difference, by_seed):
        return {"p": p, "difference": difference, "by_seed": by_seed}

    found = judged([
        one(0.001, 0.2, [0.1, 0.3]), one(0.002, -0.2, [-0.1, -0.3]), one(0.003, 0.1, [0.3, -0.1]), one(0.03, 0.1, [0.1, 0.1]),
        one(float("nan"), 0.5, [0.5, 0.5]),
    ])  # fmt: skip
    assert [row["outcome"] for row in found] == ["higher", "lower", "seeds disagree", "higher", "none shown"]
    assert [row["p_holm"] for row in found[:4]] == pytest.approx([0.004, 0.006, 0.006, 0.03])
    found = judged([one(0.03, 0.1, [0.1, 0.1]), one(0.04, 0.1, [0.1, 0.1])])
    assert [row["outcome"] for row in found] == ["none shown"] * 2 and found[0]["p_holm"] == pytest.approx(0.06)


def test_clips_on_one_map_are_one_cluster(tmp_path):
    bench = make_walks(tmp_path / "walks", clips=3)
    assert clusters(bench) == [0, 1, 2]
    group = {clip.id: clip.group for clip in bench.clips} | {bench.clips[2].id: bench.clips[0].group}
    shared = replace(bench, questions=tuple(replace(q, group=group[q.clip_id]) for q in bench.questions))
    assert clusters(shared) == [0, 1, 0]


# --- the page -------------------------------------------------------------------------------------------------------

KINDS = [kind.replace("/", "_") for kind in paper.KINDS]
FACTS = {
    "commands": [f"python -m stkit.tiny.ablations --out runs/paper --seeds {seed}" for seed in (0, 1)],
    "machine": {"cores": 2, "processor": "x86_64", "torch": "2.9"}, "start": {"model": "see", "sha256": "f" * 64},
    "walks": {"train": {"clips": 8}} | {on: {"clips": 30, "clusters": list(range(30))} for on in ("test", "ood")},
}  # fmt: skip


def row(right: int, commit: str = "abc123") -> dict:
    """An arm's run with so many of 30 clips right, in every kind."""
    one = said(**{kind: "1" * right + "0" * (30 - right) for kind in KINDS})
    made = {"command": FACTS["commands"][0], "commit": commit}
    return {"seconds": 90.0, "updates": 7, "test": one, "ood": one} | made


def made_up(tmp_path, start: int, cold: int, both: int) -> dict:
    study = load_study(written(tmp_path / "micro.yaml", contrasts=MICRO["contrasts"] | {
        "more": MICRO["contrasts"]["more"] | {"paper": ["CoT-SFT", "ST-R1"]},
        "own": {"question": "Is it ours?", "first": "start", "second": "both"},
    }))  # fmt: skip
    rows = {"start": {0: row(start)}, "sft": {0: row(cold), 1: row(cold)}, "both": {0: row(both), 1: row(both + 1)}}
    return summarise(FACTS, study, rows)


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}")[2].partition("\n## ")[0]


def test_the_page_says_what_transfers_and_what_goes_the_other_way(tmp_path):
    found = made_up(tmp_path, start=5, cold=12, both=24)
    assert {one["name"]: verdict(one) for one in found["contrasts"]} == {
        "cold": "opposite",
        "more": "same",
        "own": "own",
    }
    text = page(found)
    assert "Does more help?" in section(text, "What transfers") and "Does it help?" not in section(
        text, "What transfers"
    )
    assert "Does it help?" in section(text, "What does not") and "the other way round" in section(text, "What does not")
    assert "Is it ours?" in section(text, "What only the miniature") and "paper's difference" not in section(
        text, "What only"
    )
    assert "+32" in section(text, "Beside the paper") and "-13 points [D]" in section(text, "What does not")
    assert "`both` is higher than `sft` (+41.7 points" in section(text, "What transfers")  # 24.5 of 30 against 12


def test_null_results_stand_with_whether_the_papers_difference_is_left_out(tmp_path):
    found = made_up(tmp_path, start=12, cold=12, both=12)
    assert {verdict(one) for one in found["contrasts"]} == {"not shown", "own"}
    text = page(found)
    assert section(text, "What transfers").rstrip().endswith("- Nothing.")
    lacking = section(text, "What does not")
    assert "no difference is shown between `start` and `sft` (+0.0 points" in lacking
    assert "The paper's difference is +32 points [D]; our interval by clip leaves it out." in lacking


def test_figures_of_the_page_are_those_of_the_json(tmp_path):
    text = page(made_up(tmp_path, start=5, cold=12, both=24))
    line = next(line for line in section(text, "Accuracy in distribution").splitlines() if line.startswith("| both |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == "**81.7**" and cells[4] == "80.0, 83.3" and cells[5] == "25.0" and cells[6] == "0.0"
    assert "n = 180 questions, 30 clusters, chance 25.0" in text and "abc123" in text
    assert "| sft | SFT | with | start | 1 | published | 7 | 1.5 |" in text
    beside = section(text, "Beside the paper")
    assert "| 67 → 54 (-13) | start → sft | 16.7 → 40.0 (+23.3) | 16.7 → 40.0 (+23.3) |" in beside
    assert "| Qwen2-VL-7B [D] | 67 | 52 | 62 | 69 | 67 | 75 | 77 |" in beside
    assert "| start, out of distribution |" + " 16.7 |" * 7 in beside


def test_the_page_names_every_command_and_the_commit_of_every_run_and_marks_what_no_commit_holds(tmp_path):
    found = made_up(tmp_path, start=5, cold=12, both=24)
    text = page(found)
    assert "\n".join(FACTS["commands"]) in text and "All were made at commit `abc123`." in text
    assert "Not reproducible" not in text and "left out" not in text
    found["unfinished"] = [2, 3]
    found["arms"]["both"]["seeds"]["1"]["commit"] = "abc123 to def456-dirty"
    found["arms"]["sft"]["seeds"]["1"]["commit"] = "def456"
    text = page(found)
    assert "> **Not reproducible: code that no commit holds made 1 of 5 runs** (`abc123 to def456-dirty`)." in text
    for line in ("- `abc123`: start (0), sft (0), both (0)", "- `def456`: sft (1)", "- `abc123 to def456-dirty`: both (1)"):
        assert line in text.splitlines()
    assert "left out: seed 2, 3." in text


def test_another_json_is_refused():
    with pytest.raises(StkitError, match="no 'contrasts' in it"):
        page({"arms": {}})


def test_the_committed_page_is_what_the_committed_results_give():
    results, card = ROOT / "data_cards" / "ablations.json", ROOT / "data_cards" / "ablations.md"
    if not results.exists() and not card.exists():
        pytest.skip("data_cards/ablations.json is not there yet: the study was not run")
    assert card.read_text() == page(read_json(results))


# --- a whole study ---------------------------------------------------------------------------------------------------


def film(out, clips, seed, ood=False, split=None, progress=True):
    """In place of the renderer: walks with their truth, and videos of noise."""
    if (Path(out) / "benchmark.json").exists():
        return
    bench = make_walks(Path(out), clips, seed)
    (bench.path / "videos").mkdir()
    for k, clip in enumerate(bench.clips):
        write_video(bench.path / "videos" / clip.video, k, clip.frames)
    write_jsonl(bench.path / "questions.jsonl", (row_of(replace(q, split=split)) for q in bench.questions))
    write_json(bench.path / "benchmark.json", bench.info | {"n_frames": 4, "hash": None})


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    tiny.write_folder(folder)
    tiny.seeded_model(Qwen2_5_VLConfig.from_pretrained(folder), 0).save_pretrained(folder)
    return folder


def test_a_study_runs_from_end_to_end_stops_and_goes_on(tmp_path, start, monkeypatch):
    monkeypatch.setattr(ablations, "build_benchmark", film)
    study, out = written(tmp_path / "micro.yaml"), tmp_path / "out"
    real, asked_of = ablations.evaluate, []

    def until_the_fourth(bench, **how):
        asked_of.append(how["out"].relative_to(out / "arms"))
        if len(asked_of) == 4:
            raise KeyboardInterrupt
        return real(bench, cache=False, **how)

    monkeypatch.setattr(ablations, "evaluate", until_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run_study(out, start, study, seeds=[0], progress=False)
    assert list(map(str, asked_of)) == ["start/once/test", "start/once/ood", "sft/seed-0/test", "sft/seed-0/ood"]
    found = run_study(out, start, study, seeds=[0], cards=tmp_path / "cards", progress=False)
    assert list(map(str, asked_of[4:])) == ["sft/seed-0/test", "sft/seed-0/ood", "both/seed-0/test", "both/seed-0/ood"]
    seconds = {name: arm["seeds"]["0"]["seconds"] for name, arm in found["arms"].items()}
    assert seconds["sft"] is None and seconds["start"] > 0 and seconds["both"] > 0
    assert {name: arm["seeds"]["0"]["updates"] for name, arm in found["arms"].items()} == {
        "start": 0,
        "sft": 1,
        "both": 1,
    }
    assert found == read_json(tmp_path / "cards" / "ablations.json") == read_json(out / "ablations.json")
    assert (tmp_path / "cards" / "ablations.md").read_text() == page(found)

    runs = out / "arms"
    learned = yaml.safe_load((runs / "sft" / "seed-0" / "run" / "config.yaml").read_text())
    assert learned["shown"]["sampling"] == "published" and learned["bench"].endswith("reverse-published-1.jsonl")
    assert lines(runs / "both" / "seed-0" / "run" / "rollouts.jsonl")[0]["rewards"].keys() >= {"both_orders", "correct"}
    answered = lines(runs / "sft" / "seed-0" / "test" / "predictions.jsonl")
    questions = [q for q in load_benchmark(out / "test").questions if not q.is_open]
    for part in found["arms"]["sft"]["seeds"]["0"]["test"]["by_task"].values():
        assert len(part["marks"]) == 2 and sum(mark != "-" for mark in part["marks"]) == part["n"]
    assert {a["id"] for a in answered} == {q.id for q in questions}

    monkeypatch.setattr(ablations, "evaluate", None)  # all is done: nothing is run again
    monkeypatch.setattr(ablations, "sft", None)
    assert run_study(out, start, study, seeds=[0], progress=False)["arms"] == found["arms"]
    with pytest.raises(StkitError, match="train.steps: 1 -> 2"):
        run_study(out, start, written(study, sft=MICRO["sft"] | {"train.steps": 2}), seeds=[0], progress=False)


def begun(tmp_path, seeds=(0, 1), commit="abc123") -> ablations.Bench:
    """What arms share, without benchmarks."""
    study = replace(load_study(written(tmp_path / "micro.yaml")), seeds=seeds)
    return ablations.Bench(tmp_path / "out", study, tmp_path, "f" * 64, {}, {"command": "c", "commit": commit}, False)


def done(shared, arm, seed) -> dict:
    """In place of training and scoring."""
    claim(shared.folder(arm, seed), shared.told(arm, seed), name="arm.json", beside={"made": shared.made})
    write_json(shared.folder(arm, seed) / "result.json", row(5))
    return row(5)


def test_a_process_leaves_alone_what_another_is_at_and_waits_for_it(tmp_path, monkeypatch):
    shared, ran, waits = begun(tmp_path), [], threading.Event()
    monkeypatch.setattr(ablations, "PAUSE_S", 0.01)
    monkeypatch.setattr(ablations, "run_arm", lambda *job: (ran.append((job[1].name, job[2])), done(*job))[1])
    say = lambda text: waits.set() if text == "waiting for sft, seed 0, both, seed 0: another process is at it" else None
    with ablations._locked(shared.folder(shared.study.arms["sft"], 0)):
        other = threading.Thread(target=ablations._run_all, args=(shared, say))
        other.start()
        assert waits.wait(20) and ran == [("start", 0), ("sft", 1), ("both", 1)]
    other.join(20)
    assert ran[3:] == [("sft", 0), ("both", 0)]


def test_what_is_written_down_is_of_every_seed_that_all_arms_have_whoever_ran_it(tmp_path):
    shared = begun(tmp_path, seeds=(4,))
    for seed in (0, 4):
        for arm in shared.study.arms.values():
            done(shared, arm, seed)
    done(shared, shared.study.arms["sft"], 7)
    rows, left = ablations.finished(shared)
    assert {name: list(seeds) for name, seeds in rows.items()} == {"start": [0], "sft": [0, 4], "both": [0, 4]}
    assert left == [7]
    assert sorted(p.parent.name for p in shared.out.glob("arms/start/*/result.json")) == ["once"]
    with pytest.raises(StkitError, match="train.steps: 1 -> 2"):
        study = replace(shared.study, sft=shared.study.sft | {"train.steps": 2})
        ablations.finished(shared._replace(study=study))


def test_a_run_tells_both_commits_where_it_went_on_at_another_and_no_result_stands_where_a_question_failed(
    tmp_path, monkeypatch
):
    shared, failed = begun(tmp_path), [2, 0, 0]
    arm = shared.study.arms["start"]
    shared = shared._replace(walks={on: Benchmark(tmp_path / on, (), info={}) for on in ("test", "ood")})
    monkeypatch.setattr(ablations, "evaluate", lambda *given, **how: None)
    monkeypatch.setattr(ablations, "load_run", lambda folder: None)
    monkeypatch.setattr(ablations, "marks", lambda run: {"failed": failed.pop(0)})
    with pytest.raises(StkitError, match="once/test: 2 questions could not be asked"):
        ablations.run_arm(shared, arm, 0)
    assert not (shared.folder(arm, 0) / "result.json").exists()
    other = shared._replace(made=shared.made | {"commit": "def456-dirty"})
    found = ablations.run_arm(other, arm, 0)
    assert found["commit"] == "abc123 to def456-dirty" and found["seconds"] is None and found["command"] == "c"
    assert ablations.run_arm(shared, arm, 0) == found


def test_time_left_is_that_of_the_same_arm_else_of_the_same_stage():
    clock, a, b, c = Clock(), Arm("a", "sft"), Arm("b", "sft"), Arm("c", "grpo")
    assert clock.left([(a, 0)]) == "1 left, the first one tells how long they take"
    clock.took(a, 120.0)
    clock.took(a, 240.0)
    clock.took(c, 600.0)
    clock.took(c, None)
    assert clock.left([(a, 2), (b, 0), (c, 1)]) == "about 16 minutes left"  # 3 + 3 + 10
    assert clock.left([(c, 1)] * 12) == "about 2.0 hours left"


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--model", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "no model.safetensors" in str(end.value.code)
    with pytest.raises(SystemExit) as end:
        main(["--model", str(tmp_path), "--out", str(tmp_path / "out"), "--seeds", "1", "1"])
    assert "seeds=[1, 1]" in str(end.value.code)
