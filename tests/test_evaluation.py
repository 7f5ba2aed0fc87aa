"""Evaluation: what is asked, how it is scored, and what stands beside an accuracy."""

import json
import math

import numpy as np
import pytest
from benchmaker import lines, make_questions, write_bench

from stkit import cli
from stkit.evaluation import evaluate
from stkit.reporting.judge import load_run
from stkit.runs import read_json
from stkit.runtime import BadUse, StkitError
from stkit.vlm import interview as interview_module
from stkit.vlm.ask import Said
from stkit.vlm.load import load_model


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-untrained", device="cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("bench") / "walks")


@pytest.fixture(scope="module")
def first(bench, tiny, tmp_path_factory):
    """One plain run in letter mode, for the tests that only look at it."""
    return evaluate(bench, tiny, tmp_path_factory.mktemp("runs") / "first", progress=False)


def every_value(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] + [v for item in inner for v in every_value(item)]


def test_every_question_has_a_line_with_all_that_decided_it(first):
    rows = lines(first.out / "predictions.jsonl")
    assert [r["id"] for r in rows] == [q.id for q in make_questions() if q.options]
    for row, question in zip(rows, [q for q in make_questions() if q.options]):
        assert row["text"] == "ABCD"[row["parsed"]] and row["correct"] == (row["parsed"] == question.answer)
        assert len(row["log_probs"]) == len(question.options) and all(p < 0 for p in row["log_probs"])
        assert row["parsed"] == int(np.argmax(row["log_probs"])) and len(row["prompt_sha256"]) == 64
        assert (
            row["timestamps_s"] == [0.0, 1.0, 1.75, 2.75]
            and row["seconds"] > 0
            and row["extra"]["reader"] in ("decord", "pyav")
        )
    assert len({r["prompt_sha256"] for r in rows}) == 4 and len({tuple(r["log_probs"]) for r in rows}) == len(rows)


def test_scores_are_one_json_object_with_integers_for_counts_and_null_for_the_undefined(first):
    scores = json.loads((first.out / "scores.json").read_text(), parse_constant=pytest.fail)
    assert scores == first.scores and not any(isinstance(v, float) and math.isnan(v) for v in every_value(scores))
    assert {"accuracy", "chance", "by_task", "unparsed_rate", "failed"} <= set(scores)
    part = scores["by_task"]["direction/forward"]
    assert {"accuracy", "chance", "blind", "low", "high", "n", "clusters"} <= set(part) and part["chance"] == 0.25
    for name in ("failed", "n", "not_asked", "skipped", "clusters"):
        assert type(scores[name]) is int, name
    assert scores["n"] == 12 and scores["not_asked"] == 6 and scores["unparsed_rate"] == 0.0 and scores["failed"] == 0
    assert scores["by_task"]["route/forward"]["accuracy"] is None
    assert scores["accuracy"] == np.mean([r["correct"] for r in lines(first.out / "predictions.jsonl")])


def test_untrained_weights_are_said_in_the_first_line(first):
    assert first.text().splitlines()[0].startswith("untrained weights: expect chance")


def test_the_blind_control_runs_along_and_sees_nothing(first):
    seen, blind = (lines(first.out / f"{name}.jsonl") for name in ("predictions", "blind"))
    assert [r["id"] for r in blind] == [r["id"] for r in seen]
    assert all(r["control"] == "blind" and r["timestamps_s"] == [] and r["parsed"] is not None for r in blind)
    same = {}
    for row in blind:  # the same question on another clip is the same prompt: no frame can tell them apart
        same.setdefault(row["prompt_sha256"], []).append(row["log_probs"])
    assert len(same) == 4 and all(len(rows) == 3 and np.ptp(rows, axis=0).max() < 1e-5 for rows in same.values())
    assert all(np.abs(np.subtract(a["log_probs"], b["log_probs"])).max() > 1e-3 for a, b in zip(seen, blind))
    assert first.scores["by_task"]["landmark/forward"]["blind"] == np.mean(
        [r["correct"] for r in blind if "landmark-forward" in r["id"]]
    )


def test_without_the_blind_control_the_scores_say_so(bench, tiny, tmp_path):
    result = evaluate(bench, tiny, tmp_path / "r", blind=False, limit=4, progress=False)
    assert not (tmp_path / "r" / "blind.jsonl").exists() and result.scores["blind"] is None
    assert any("no blind control" in notice for notice in result.scores["notices"])


def test_the_config_holds_all_that_decides_a_result(first, bench):
    config = read_json(first.out / "config.json")
    assert config["settings"] | {"min_pixels": 0, "max_pixels": 0} == {
        "bench": str(bench.resolve()), "model": "tiny-untrained", "split": None, "limit": None, "blind": True,
        "skip_bad": False,
        "mode": "letter", "control": "none", "seed": 0,
        "sampling": "uniform", "frames": 4, "fps": None, "min_pixels": 0, "max_pixels": 0, "reader": "auto",
        "prompt": "stkit", "max_new_tokens": 512,
    }  # fmt: skip
    assert (
        config["model"]["untrained"] is True and config["model"]["dtype"] == "float32" and "torch" in config["versions"]
    )
    assert (
        config["benchmark"]["questions"] == 18
        and config["benchmark"]["videos"] == 3
        and len(config["benchmark"]["sha256"]) == 64
    )
    assert config["command"] and config["why"]["device"]


def test_the_predictions_come_as_a_frame_with_their_questions(first):
    frame = first.predictions
    assert len(frame) == 18 and list(frame["id"]) == [q.id for q in make_questions()]
    assert {"task", "order", "group", "options", "answer", "parsed", "correct", "log_probs", "seconds"} <= set(frame)
    assert frame.loc[frame.task == "route", "parsed"].isna().all()


def test_a_report_reads_the_run_with_the_same_figures(bench, tiny, tmp_path):
    result = evaluate(bench, tiny, tmp_path / "r", split="train", limit=7, progress=False)
    run = load_run(tmp_path / "r")
    assert run.scores["accuracy"] == result.scores["accuracy"] and run.scores["by_task"] == result.scores["by_task"]
    assert set(run.notices) >= {"untrained weights: expect chance"} and len(run.questions) == 7


def test_split_and_limit_choose_the_questions(bench, tiny, tmp_path):
    result = evaluate(bench, tiny, tmp_path / "r", split="test", progress=False)
    assert {row["id"][0] for row in lines(tmp_path / "r" / "predictions.jsonl")} == {"c"} and result.scores["n"] == 4
    with pytest.raises(StkitError, match="no question of split 'dev' .*test, train"):
        evaluate(bench, tiny, tmp_path / "d", split="dev", progress=False)


def test_results_do_not_depend_on_batch_size_or_order(bench, tiny, first, tmp_path):
    write_bench(tmp_path / "turned", make_questions()[::-1])
    runs = [
        evaluate(b, tiny, tmp_path / f"r{n}", batch_size=n, progress=False)
        for b, n in ((bench, 1), (tmp_path / "turned", 3))
    ]
    expected = {row["id"]: row for row in lines(first.out / "predictions.jsonl")}
    for run in runs:
        for row in lines(run.out / "predictions.jsonl"):
            before = expected[row["id"]]["log_probs"]
            assert np.abs(np.subtract(row["log_probs"], before)).max() < 1e-5
            assert row["parsed"] == expected[row["id"]]["parsed"] or np.diff(np.sort(before))[-1] < 1e-4


def test_generate_asks_routes_too_and_an_unresolved_answer_is_wrong(bench, tiny, tmp_path, monkeypatch):
    said = {
        "direction": "<think>hm</think><answer>A</answer>",
        "landmark": "A or B",
        "route": "<answer>go straight, turn left</answer>",
    }

    def canned(loaded, prompts, *_):
        return [Said(next(text for task, text in said.items() if f"Which {task} " in p.text), 5, True) for p in prompts]

    monkeypatch.setattr(interview_module, "decode", canned)
    result = evaluate(bench, tiny, tmp_path / "r", mode="generate", max_new_tokens=16, progress=False)
    scores = result.scores
    assert scores["not_asked"] == 0 and scores["by_task"]["route/forward"]["accuracy"] == 1.0
    assert (
        scores["by_task"]["landmark/forward"]["accuracy"] == 0.0
        and scores["by_task"]["landmark/forward"]["unparsed_rate"] == 1.0
    )
    assert (
        scores["unparsed_rate"] == 0.5
        and scores["accuracy"] == pytest.approx(2 / 12)
        and scores["resolved_accuracy"] == pytest.approx(2 / 6)
    )
    assert scores["route"]["exact"] == 1.0 and scores["route"]["edit_distance"] == 0.0
    rows = {row["id"]: row for row in lines(tmp_path / "r" / "predictions.jsonl")}
    assert (
        len(rows) == 18
        and rows["a-route-forward"]["edit_distance"] == 0.0
        and rows["a-landmark-forward"]["parsed"] is None
    )
    blind = lines(tmp_path / "r" / "blind.jsonl")
    assert len(blind) == 12 and all(row["mode"] == "letter" for row in blind)


def test_generate_really_decodes_and_a_batch_says_what_each_says_alone(bench, tiny, tmp_path):
    runs = [
        evaluate(
            bench,
            tiny,
            tmp_path / f"r{n}",
            mode="generate",
            max_new_tokens=5,
            limit=6,
            batch_size=n,
            blind=False,
            progress=False,
        )
        for n in (1, 4)
    ]
    texts = [[row["text"] for row in lines(run.out / "predictions.jsonl")] for run in runs]
    assert texts[0] == texts[1] and len(texts[0]) == 6 and len(set(texts[0])) > 1


@pytest.mark.parametrize("control", ["blind", "shuffled", "reversed", "single-frame", "circular"])
def test_every_control_runs_and_is_named_first(bench, tiny, first, tmp_path, control):
    result = evaluate(bench, tiny, tmp_path / "r", control=control, limit=6, progress=False)
    assert any(notice.startswith(f"{control} control") for notice in result.scores["notices"][:2])
    rows, plain = lines(tmp_path / "r" / "predictions.jsonl"), lines(first.out / "predictions.jsonl")
    assert all(row["control"] == control and row["parsed"] is not None for row in rows) and len(rows) == 4
    moved = [np.abs(np.subtract(a["log_probs"], b["log_probs"])).max() for a, b in zip(rows, plain)]
    assert max(moved) < 1e-5 if control == "circular" else min(moved) > 1e-4
    times = {"blind": [], "single-frame": [1.75, 1.75]}.get(control, plain[0]["timestamps_s"])
    assert all(row["timestamps_s"] == times for row in rows)
    if control == "circular":
        assert all(
            len(row["extra"]["rotations"]) == len(row["log_probs"])
            for row in rows + lines(tmp_path / "r" / "blind.jsonl")
        )


def test_reversed_frames_are_scored_on_turn_order(bench, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        interview_module, "decode", lambda _, prompts, *__: [Said("go straight, turn right", 5, True)] * len(prompts)
    )
    result = evaluate(bench, tiny, tmp_path / "r", mode="generate", control="reversed", progress=False)
    assert result.scores["turn_order"]["mean"] == 1.0 and result.scores["turn_order"]["n"] == 6
    assert result.scores["by_task"]["route/forward"]["accuracy"] == 0.0


def test_the_blind_score_does_not_hang_on_what_is_done_to_the_frames(bench, tiny, first, tmp_path):
    evaluate(bench, tiny, tmp_path / "r", control="shuffled", progress=False)
    for a, b in zip(lines(tmp_path / "r" / "blind.jsonl"), lines(first.out / "blind.jsonl"), strict=True):
        assert a["prompt_sha256"] == b["prompt_sha256"] and np.allclose(a["log_probs"], b["log_probs"], atol=1e-5)


def test_a_prompt_longer_than_the_context_stops_the_run_with_both_lengths(bench, tiny, tmp_path):
    with pytest.raises(
        StkitError, match=r"the prompt has \d{4} tokens, the model's context is 4096: lower frames or max_pixels"
    ):
        evaluate(bench, tiny, tmp_path / "r", frames=800, progress=False)
    assert (tmp_path / "r" / "predictions.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"mode": "guess"}, "letter, generate"), ({"control": "sideways"}, "single-frame"),
        ({"split": "all"}, "train, dev, test"), ({"prompt": "mine"}, "stkit, published"), ({"limit": 0}, "limit=0"),
        ({"limit": -1}, "limit=-1"), ({"batch_size": 0}, "batch_size=0"), ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"frames": 3}, "even"), ({"frames": 0}, "even"), ({"sampling": "all"}, "uniform"),
        ({"sampling": "published", "frames": 8}, "frames=8 has no meaning"), ({"fps": 2.0}, "fps=2.0 has no meaning"),
        ({"sampling": "fps", "fps": 0.0}, "positive"), ({"max_pixels": 0}, "max_pixels=0"),
        ({"control": "circular", "mode": "generate"}, "mode 'letter'"), ({"reader": "vlc"}, "decord"),
        ({"dtype": "float16"}, "too late"), ({"seed": "x"}, "seed"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_bad_use_before_anything_is_written(bench, tiny, tmp_path, wrong, word):
    with pytest.raises(BadUse, match=word):
        evaluate(bench, tiny, tmp_path / "r", progress=False, **wrong)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "sampling, extra, count", [("published", {}, 8), ("fps", {"fps": 2.0}, 6), ("uniform", {"frames": 6}, 6)]
)
def test_sampling_is_chosen_recorded_and_used(bench, tiny, tmp_path, sampling, extra, count):
    evaluate(bench, tiny, tmp_path / "r", limit=1, sampling=sampling, blind=False, progress=False, **extra)
    assert read_json(tmp_path / "r" / "config.json")["settings"]["sampling"] == sampling
    assert len(lines(tmp_path / "r" / "predictions.jsonl")[0]["timestamps_s"]) == count


def test_an_estimate_of_the_time_comes_from_the_first_clip(bench, tiny, tmp_path, capsys):
    evaluate(bench, tiny, tmp_path / "r")
    told = capsys.readouterr()
    assert "for 8 more questions" in told.err and "measured on the first clip" in told.err and told.out == ""


def test_the_command_line_prints_one_object_and_nothing_else(bench, tmp_path, capsys):
    assert cli.run(["eval", str(bench), "--out", str(tmp_path / "r"), "--limit", "2", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == read_json(tmp_path / "r" / "scores.json") and "model tiny (" in told.err
    assert cli.run(["eval", str(bench), "--out", str(tmp_path / "r"), "--limit", "3"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("choose another --out or delete it")


def test_without_an_out_folder_the_run_lies_in_a_temporary_one(bench, tiny):
    result = evaluate(str(bench), tuple(tiny), limit=1, progress=False)
    assert (result.out / "scores.json").exists() and result.scores["n"] == 1
