"""Accuracies are computed in one place; the expected numbers are counted by hand."""

import hashlib
import json
import math
import shutil
from dataclasses import replace

import pytest

from stkit import stats
from stkit.bench.schema import Prediction, Question, row_of
from stkit.reporting import judge, tables
from stkit.runs import to_json, write_json, write_jsonl
from stkit.runtime import StkitError


def question(name: str, task="direction", order="forward", group="g", options=4, answer=0) -> Question:
    texts = tuple(f"option {i}" for i in range(options))
    return Question(
        name,
        group,
        f"{group}.mp4",
        group,
        task,
        order,
        "Which way?",
        texts,
        answer if options else "go straight",
        "test",
    )


def said(name: str, parsed=0, correct: bool | None = True, failed="", **more) -> Prediction:
    return Prediction(name, "letter", "none", "A", parsed, correct, failed=failed, **more)


def test_accuracy_is_right_answers_over_answered_ones():
    questions = [question(f"q{i}", group=f"g{i % 3}") for i in range(6)]
    scores = judge.score([said(f"q{i}", correct=i < 4) for i in range(6)], [], questions)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert (scores["n"], scores["clusters"], scores["failed"], scores["not_asked"]) == (6, 3, 0, 0)
    assert scores["low"] < 4 / 6 < scores["high"]


def test_chance_is_the_mean_over_questions_of_one_in_so_many_options():
    questions = [question("a", options=4), question("b", options=4), question("c", options=2), question("d", options=5)]
    scores = judge.score([said(q.id) for q in questions], [], questions)
    assert scores["chance"] == pytest.approx((0.25 + 0.25 + 0.5 + 0.2) / 4)


def test_an_unresolved_answer_is_wrong_and_the_resolved_accuracy_stands_beside():
    questions = [question(f"q{i}", group=f"g{i}") for i in range(4)]
    answers = [said("q0"), said("q1"), said("q2", parsed=1, correct=False), said("q3", parsed=None, correct=False)]
    scores = judge.score(answers, [], questions)
    assert scores["accuracy"] == 0.5
    assert scores["resolved_accuracy"] == pytest.approx(2 / 3)
    assert (scores["unparsed"], scores["unparsed_rate"]) == (1, 0.25)


def test_a_failed_question_stays_out_and_the_accuracy_with_failures_as_wrong_stands_beside():
    questions = [question(f"q{i}", group=f"g{i}") for i in range(4)]
    answers = [said("q0"), said("q1"), said("q2", correct=False), said("q3", None, None, failed="g3.mp4: no frames")]
    scores = judge.score(answers, [], questions)
    assert scores["accuracy"] == pytest.approx(2 / 3) and scores["n"] == 3
    assert scores["accuracy_failed_wrong"] == 0.5
    assert scores["failed"] == scores["by_task"]["direction/forward"]["failed"] == 1
    assert scores["not_asked"] == 0


@pytest.mark.parametrize("failed, warned", [(1, False), (2, True)])
def test_more_than_one_percent_of_failures_is_said_first(failed, warned):
    questions = [question(f"q{i}", group=f"g{i % 20}") for i in range(100)]
    answers = [said(q.id, None, None, failed="gone") if i < failed else said(q.id) for i, q in enumerate(questions)]
    notices = judge.score(answers, answers, questions)["notices"]
    assert bool(notices and "failed" in notices[0]) is warned
    assert not warned or notices[0].startswith("2 of 100 questions failed (2.0 %)")


def test_routes_stand_in_rows_of_their_own_and_not_in_the_overall_accuracy():
    questions = [question("c"), question("r1", "route", options=0), question("r2", "route", options=0, group="h")]
    answers = [
        said("c", correct=False),
        said("r1", "go straight", edit_distance=0.0),
        said("r2", "turn left", False, edit_distance=3.0),
    ]
    scores = judge.score(answers, [], questions)
    assert (scores["accuracy"], scores["n"]) == (0.0, 1)
    assert scores["by_task"]["route/forward"]["accuracy"] == 0.5
    assert scores["by_task"]["route/forward"]["chance"] is None
    assert scores["route"] == {"exact": 0.5, "edit_distance": 1.5, "n": 2, "read": 2}


def test_a_route_that_could_not_be_read_is_wrong_and_has_no_edit_distance():
    questions = [question("r1", "route", options=0), question("r2", "route", options=0)]
    scores = judge.score([said("r1", "go straight", edit_distance=2.0), said("r2", None, False)], [], questions)
    assert scores["route"] == {"exact": 0.5, "edit_distance": 2.0, "n": 2, "read": 1}


def test_questions_that_were_not_asked_are_counted_and_score_nothing():
    questions = [question("c"), question("r", "route", options=0), question("s", "route", "reverse", options=0)]
    scores = judge.score([said("c"), said("s", None, None)], [], questions)
    assert scores["not_asked"] == 2
    route = scores["by_task"]["route/forward"]
    assert (route["accuracy"], route["low"], route["n"], route["clusters"], route["not_asked"]) == (None, None, 0, 0, 1)
    assert scores["route"] is None and not any("unfinished" in n for n in scores["notices"])


def test_the_blind_score_is_over_the_questions_that_were_scored_with_the_video():
    questions = [question(f"q{i}", group=f"g{i}") for i in range(4)]
    answers = [said("q0"), said("q1"), said("q2", correct=False), said("q3", None, None, failed="gone")]
    blind = [said("q0"), said("q1", correct=False), said("q2", correct=False), said("q3")]
    part = judge.score(answers, blind, questions)["by_task"]["direction/forward"]
    assert part["blind"] == pytest.approx(1 / 3)
    assert part["minus_blind"]["mean"] == pytest.approx(1 / 3) and part["minus_blind"]["n"] == 3


def test_without_a_blind_control_the_blind_score_is_null_and_a_notice_says_so():
    scores = judge.score([said("q")], [], [question("q")])
    assert scores["blind"] is None and scores["by_task"]["direction/forward"]["blind"] is None
    assert any(n.startswith("no blind control") for n in scores["notices"])


def test_forward_minus_reverse_is_paired_within_clusters():
    # walks differ much (0 to 8 of 8 right), forward and reverse on one walk only a little: by 1 on average
    questions, answers = [], []
    for g in range(18):
        for order in ("forward", "reverse"):
            for i in range(8):
                name = f"{g}{order}{i}"
                questions.append(question(name, order=order, group=f"g{g}"))
                answers.append(said(name, correct=i < g % 6 + (order == "forward") * (g // 6)))
    scores = judge.score(answers, [], questions)
    gap = scores["forward_minus_reverse"]["direction"]
    assert gap["mean"] == pytest.approx(1 / 8) and (gap["n"], gap["clusters"]) == (288, 18)
    forward = scores["by_task"]["direction/forward"]
    assert gap["high"] - gap["low"] < 0.6 * (forward["high"] - forward["low"])
    assert scores["forward_minus_reverse"]["landmark"] is None


def test_intervals_are_those_of_stats_clustered_by_group():
    questions = [question(f"q{i}", group=f"g{i // 4}") for i in range(48)]
    correct = [i % 5 < 3 for i in range(48)]
    part = judge.score([said(q.id, correct=c) for q, c in zip(questions, correct)], [], questions)["by_task"][
        "direction/forward"
    ]
    expected = stats.clustered_interval([float(c) for c in correct], [q.group for q in questions])
    assert (part["low"], part["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_under_ten_clusters_it_is_called_exploratory():
    for clusters, told in ((9, True), (10, False)):
        questions = [question(f"q{i}", group=f"g{i % clusters}") for i in range(40)]
        answers = [said(q.id, correct=i % 2 == 0) for i, q in enumerate(questions)]
        assert any(n.startswith("exploratory") for n in judge.score(answers, answers, questions)["notices"]) is told


def test_scores_are_clean_json_with_integer_counts():
    questions = [question("q0"), question("r", "route", options=0)]
    for answers in ([], [said("q0")], [said("q0", None, None, failed="gone")]):
        scores = judge.score(answers, [], questions)
        again = json.loads(json.dumps(scores, allow_nan=False))
        assert again == scores
        for part in (scores, *scores["by_task"].values()):
            assert all(type(part[name]) is int for name in ("n", "clusters", "failed", "not_asked", "unparsed"))
            assert part["accuracy"] is None or math.isfinite(part["accuracy"])


def test_nothing_asked_gives_nulls_and_says_that_nothing_is_a_result():
    scores = judge.score([], [], [question("q")])
    assert scores["accuracy"] is None and scores["accuracy_failed_wrong"] is None and scores["unparsed_rate"] is None
    assert "nothing here is a result" in scores["notices"][0]


def test_a_question_asked_again_is_scored_by_its_last_answer():
    scores = judge.score([said("q", None, None, failed="gone"), said("q")], [], [question("q")])
    assert (scores["accuracy"], scores["failed"]) == (1.0, 0)


def folder_of(tmp_path, name: str, correct, questions, **settings):
    """A benchmark and a run on it."""
    bench, run = tmp_path / "walks", tmp_path / name
    write_jsonl(bench / "questions.jsonl", map(row_of, questions))
    write_json(bench / "benchmark.json", {"format_version": 1})
    rows = [row_of(said(q.id, 0 if c else 1, c)) for q, c in zip(questions, correct)]
    write_jsonl(run / "predictions.jsonl", rows)
    write_jsonl(run / "blind.jsonl", rows)
    write_json(
        run / "config.json",
        {"settings": {"bench": str(bench), "mode": "letter", "control": "none"} | settings, "model": {}},
    )
    return run


@pytest.fixture
def walks():
    return [question(f"q{g}-{i}", group=f"g{g}") for g in range(16) for i in range(4)]


def test_a_run_is_read_back_and_scored_from_its_predictions(tmp_path, walks):
    run = judge.load_run(folder_of(tmp_path, "first", [i % 2 == 0 for i in range(64)], walks))
    assert run.name == "first" and run.scores["accuracy"] == 0.5 and run.scores["n"] == 64
    assert run.notices == []
    frame = tables.table(run)
    assert list(frame["category"]) == ["direction/forward", "overall"] and frame["accuracy"].tolist() == [0.5, 0.5]


def test_two_equal_runs_do_not_differ(tmp_path, walks):
    correct = [i % 2 == 0 for i in range(64)]
    first, second = (judge.load_run(folder_of(tmp_path, name, correct, walks)) for name in ("first", "second"))
    (pair,) = judge.compare(first, second)
    part = pair["by_task"]["direction/forward"]
    assert part["difference"] == 0 and part["p"] == 1 and part["p_holm"] == 1
    assert part["low"] < 0 < part["high"]


def test_runs_on_one_walk_are_compared_without_a_test(tmp_path, walks):
    one = [q for q in walks if q.group == "g0"]
    first, second = (judge.load_run(folder_of(tmp_path, n, c, one)) for n, c in (("a", [True] * 4), ("b", [False] * 4)))
    (pair,) = judge.compare(first, second)
    part = pair["by_task"]["direction/forward"]
    assert (part["difference"], part["clusters"], part["p"], part["p_holm"]) == (-1, 1, None, None)
    assert pair["overall"]["p"] is None


def test_a_run_that_is_better_on_every_walk_differs(tmp_path, walks):
    first = judge.load_run(folder_of(tmp_path, "first", [i % 4 == 0 for i in range(64)], walks))
    second = judge.load_run(folder_of(tmp_path, "second", [i % 4 < 3 for i in range(64)], walks, seed=1))
    (pair,) = judge.compare(first, second)
    part = pair["by_task"]["direction/forward"]
    assert (part["first"], part["second"], part["difference"]) == (0.25, 0.75, 0.5)
    assert part["p"] < 0.001 and part["low"] > 0.1
    assert pair["differs"] == [["seed", None, 1]]


def test_p_values_are_corrected_over_all_categories_by_holm(tmp_path):
    questions = [
        question(f"{task}{g}{i}", task, group=f"g{g}")
        for task in ("direction", "action")
        for g in range(12)
        for i in range(4)
    ]
    better = [q.task == "direction" or i % 2 == 0 for i, q in enumerate(questions)]
    first = judge.load_run(folder_of(tmp_path, "first", [i % 2 == 0 for i in range(96)], questions))
    (pair,) = judge.compare(first, judge.load_run(folder_of(tmp_path, "second", better, questions)))
    direction, action = pair["by_task"]["direction/forward"], pair["by_task"]["action/forward"]
    assert direction["p_holm"] == pytest.approx(2 * direction["p"])  # the smaller of two p-values counts twice
    assert action["p"] == action["p_holm"] == 1


def test_runs_are_compared_on_the_questions_that_both_have_scored(tmp_path, walks):
    first = judge.load_run(folder_of(tmp_path, "first", [True] * 64, walks))
    second = judge.load_run(folder_of(tmp_path, "second", [True] * 40, walks))
    (pair,) = judge.compare(first, second)
    assert pair["overall"]["n"] == 40
    assert pair["notices"] == [
        "24 questions were scored in one of the runs only (or differ): the comparison leaves them out"
    ]


def test_what_is_not_a_run_gets_one_line(tmp_path, walks):
    good = folder_of(tmp_path, "first", [True] * 64, walks)
    with pytest.raises(StkitError, match="no such run folder"):
        judge.load_run(tmp_path / "nowhere")
    with pytest.raises(StkitError, match="is not a run folder"):
        judge.load_run(tmp_path / "walks")
    with pytest.raises(StkitError, match="is a file"):
        judge.load_run(good / "config.json")
    lines = (good / "predictions.jsonl").read_text().splitlines()
    for bad, named in (('{"id": 1', "not JSON"), ("[]", "not a JSON object"), ('{"id": "q0-0"}', "mode is missing"),
                       (lines[2].replace('"extra": {}', '"extra": []'), "extra=")):  # fmt: skip
        (good / "predictions.jsonl").write_text("\n".join([*lines[:2], bad, *lines[3:]]) + "\n")
        with pytest.raises(StkitError, match=f"predictions.jsonl:3: {named}") as error:
            judge.load_run(good)
        assert "\n" not in str(error.value)


def test_a_half_written_last_line_is_left_as_it_is_and_called_unfinished(tmp_path, walks):
    run = folder_of(tmp_path, "first", [True] * 64, walks)
    path = run / "predictions.jsonl"
    data = path.read_bytes()[:-30]
    path.write_bytes(data)
    assert any(n.startswith("unfinished: 1 question") for n in judge.load_run(run).notices)
    assert path.read_bytes() == data


def test_untrained_weights_are_the_first_thing_that_is_said(tmp_path, walks):
    run = folder_of(tmp_path, "first", [True] * 2, walks, control="shuffled")
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", config | {"model": {"untrained": True}})
    notices = judge.load_run(run).notices
    assert notices[0] == "untrained weights: expect chance"
    assert notices[1].startswith("shuffled control")
    lines = (run / "predictions.jsonl").read_text().splitlines()
    failed = json.loads(lines[0]) | {"failed": "gone", "correct": None, "parsed": None}
    (run / "predictions.jsonl").write_text("\n".join([json.dumps(failed), *lines[1:]]) + "\n")
    first, second, *_ = judge.load_run(run).notices
    assert first.startswith("untrained weights: expect chance; 1 of 2 questions failed (50.0 %)")
    assert second.startswith("shuffled control")


def test_questions_edited_since_the_run_are_told(tmp_path, walks):
    run = folder_of(tmp_path, "first", [True] * 64, walks)
    hashes = {q.id: hashlib.sha256(to_json(row_of(q)).encode()).hexdigest() for q in walks}
    write_json(run / "files.json", {"questions": hashes, "videos": {}})
    assert judge.load_run(run).notices == []
    write_json(run / "files.json", {"questions": hashes | {"q0-0": "other"}, "videos": {}})
    assert judge.load_run(run).notices[0].startswith("1 questions were edited since the run")


def test_a_run_whose_benchmark_is_gone_or_another_gets_one_line(tmp_path, walks):
    run = folder_of(tmp_path, "first", [True] * 64, walks)
    write_jsonl(tmp_path / "walks" / "questions.jsonl", map(row_of, walks[1:]))
    with pytest.raises(StkitError, match="'q0-0' is answered there but not in"):
        judge.load_run(run)
    shutil.rmtree(tmp_path / "walks")
    with pytest.raises(StkitError, match="walks: the benchmark that the run .* is not there"):
        judge.load_run(run)


def test_a_run_that_was_copied_with_its_benchmark_beside_it_is_read(tmp_path, walks):
    folder_of(tmp_path / "there", "first", [i % 2 == 0 for i in range(64)], walks)
    (tmp_path / "there").rename(tmp_path / "here")
    run = judge.load_run(tmp_path / "here" / "first")
    assert run.scores["accuracy"] == 0.5 and run.benchmark.path == tmp_path / "here" / "walks"


def test_a_run_on_one_split_is_scored_on_that_split(tmp_path, walks):
    walks = [replace(q, split="dev") if q.group == "g3" else q for q in walks]
    run = folder_of(tmp_path, "first", [True] * 64, walks, split="dev")
    rows = [line for line in (run / "predictions.jsonl").read_text().splitlines() if '"q3-' in line]
    for name in ("predictions.jsonl", "blind.jsonl"):
        (run / name).write_text("\n".join(rows) + "\n")
    scores = judge.load_run(run).scores
    assert (scores["n"], scores["clusters"], scores["not_asked"]) == (4, 1, 0)


def test_turn_order_of_reversed_frames_is_reported_beside():
    questions = [question(f"r{i}", "route", options=0, group=f"g{i}") for i in range(4)]
    answers = [said(q.id, "x", False, extra={"turn_order_match": i < 3}) for i, q in enumerate(questions)]
    found = judge.score(answers, [], questions)["turn_order"]
    assert (found["mean"], found["n"], found["clusters"]) == (0.75, 4, 4)


def test_tables_are_written_as_csv_and_as_latex_that_typesets_any_name(tmp_path, walks):
    run = judge.load_run(folder_of(tmp_path, "50%_of_{a}&b", [i % 2 == 0 for i in range(64)], walks))
    csv, tex = tables.write_tables([run], tmp_path / "report.html")
    assert csv.read_text().splitlines()[0].startswith("run,category,accuracy,low,high,chance,blind,n,clusters")
    line = tex.read_text().splitlines()[4]
    assert line.startswith(r"50\%\_of\_\{a\}\&b & direction, forward & 50.0 & ") and line.endswith(
        r" & 25.0 & 50.0 & 64 & 16 \\"
    )
    assert (
        tables.latex_text("a\\b~c^d$e#f\x00\n<g>")
        == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\$e\#f␀ \textless{}g\textgreater{}"
    )
