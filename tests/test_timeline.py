"""The time line of a clip: what is told for each patch of time, how it is written and read, how two are compared."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from walkmaker import make_plans, make_walks, sampled, truth_of

from stkit.bench.routes import ACTIONS, LANDMARKS
from stkit.bench.schema import Benchmark, Clip
from stkit.bench.timeline import MOTIONS, WORDS, Moment, load_truth, overlap, parse, render, timeline
from stkit.runs import read_json, write_json
from stkit.runtime import BadUse, StkitError
from stkit.vlm.tiny import folder

PLANS = make_plans(60, seed=7)
MARKS = st.one_of(st.just(("", "")), st.tuples(st.sampled_from(LANDMARKS), st.sampled_from(("left", "right"))))
MOMENTS = st.lists(st.builds(lambda m, k: Moment(m, *k), st.sampled_from(MOTIONS), MARKS), min_size=1, max_size=24)


def of(events, marks=None, kinds=(("tree", "left"), ("fire", "right"))) -> dict:
    """A truth with a frame for each event."""
    columns = {"event": events, "landmark": marks or [""] * len(events)}
    plan = {"landmarks": [{"kind": kind, "side": side} for kind, side in kinds]}
    return {"clip_id": "a", "frame_ticks": [*range(len(events))], "ticks": columns, "plan": plan}


def runs(words) -> list:
    return [word for word, _ in itertools.groupby(words)]


def test_the_runs_of_turn_words_are_the_turns_of_the_route():
    for name, plan in PLANS.items():
        truth = truth_of(name, plan)
        told = runs(moment.motion for moment in timeline(truth, sampled(truth)))
        assert [word for word in told if word in ("left", "right")] == list(plan.turns), name


def test_actions_and_landmarks_stand_in_it_once_each_and_in_order():
    for name, plan in PLANS.items():
        truth = truth_of(name, plan)
        moments = timeline(truth, sampled(truth))
        assert [w for w in runs(m.motion for m in moments) if w in ACTIONS] == [a.kind for a in plan.actions]
        marks = runs((m.landmark, m.side) for m in moments)
        assert [m for m in marks if m[0]] == [(m.kind, m.side) for m in plan.landmarks], name


def test_it_has_a_moment_for_every_two_frames():
    truth = truth_of(*next(iter(PLANS.items())))
    assert [len(timeline(truth, sampled(truth, n))) for n in (2, 8, 32)] == [1, 4, 16]
    assert len(timeline(truth, [0, 1, 2])) == 2 and len(timeline(truth, [5])) == 1


def test_a_turn_that_begins_in_the_second_frame_of_two_is_told_and_a_straight_between_turns_too():
    """Without a straight between them two turns to the left would be told as one."""
    moments = timeline(of(["straight", "left", "left", "straight", "left", "left", "pause", "pause"]), range(8))
    assert [m.motion for m in moments] == ["left", "straight", "left", "pause"]
    begins = timeline(of(["straight", "left", "left", "left", "straight", "straight"]), range(6))
    assert [m.motion for m in begins] == ["left", "left", "straight"]
    told = timeline(of(["left", "left", "left", "straight", "left", "left"]), range(6))
    assert [m.motion for m in told] == ["left", "straight", "left"]


EVENTS = st.sampled_from(["left", "right", "pause"])


def told_of(walk, before: int) -> list:
    """The events told of some, each with its frames and those of the straight after it, from a frame on."""
    frames = ["straight"] * before + [m for event, own, after in walk for m in [event] * own + ["straight"] * after]
    return [word for word in runs(m.motion for m in timeline(of(frames), range(len(frames)))) if word != "straight"]


@given(st.lists(st.tuples(EVENTS, st.integers(2, 4), st.integers(2, 4)), min_size=1), st.integers(1, 2))
def test_every_event_is_told_and_equal_ones_apart(walk, before):
    assert told_of(walk, before) == [event for event, *_ in walk]


@given(EVENTS, EVENTS, st.integers(2, 4), st.integers(2, 4), st.integers(1, 2))
def test_two_events_are_told_apart_by_a_straight_of_one_frame(one, two, own, others, before):
    assert told_of([(one, own, 1), (two, others, 2)], before) == [one, two]


def test_a_landmark_comes_with_its_side_and_goes_when_it_is_passed():
    truth = of(["straight"] * 6, ["tree", "tree", "tree", "", "", "fire"])
    assert timeline(truth, range(6)) == (
        Moment("straight", "tree", "left"), Moment("straight"), Moment("straight", "fire", "right"),
    )  # fmt: skip


def test_only_the_sampled_frames_are_told():
    truth = of(["stand", "left", "pause", "right"])
    assert [m.motion for m in timeline(truth, [1, 1, 3, 3])] == ["left", "right"]


def test_it_reads_as_a_sentence():
    moments = (Moment("stand"), Moment("straight", "brick", "left"), Moment("open a door"), Moment("look up"))
    assert render(moments) == "Timeline: stand, straight brick left, open, up."
    dense = "Timeline: stand none none straight brick left open none none up none none."
    assert render(moments, dense=True) == dense and parse(dense) == tuple(moments)


@given(MOMENTS)
def test_reading_undoes_writing(moments):
    text = render(moments)
    assert parse(text) == parse(render(moments, dense=True)) == tuple(moments)
    assert parse(f"<think>First.\n{text.upper().replace(',', ' ,  ')} Route: left.</think>") == tuple(moments)


def test_it_may_be_cut_by_a_tag_a_line_or_the_end_of_the_text():
    cut = ("Timeline: left, straight none</think>", "timeline :left,straight\nRoute: up", "Time line: left, straight")
    for text in cut:
        assert parse(text) == (Moment("left"), Moment("straight"))


@pytest.mark.parametrize("text", [
    "", "left, straight", "Timeline:", "Timeline: .", "Timeline: left,, up.", "Timeline: left, fly.",
    "Timeline: tree left.", "Timeline: straight tree.", "Timeline: straight left tree.", "Timeline: left right.",
    "Timeline: left. Timeline: left.", "Timeline: left none none up.", "Timeline: left none none none up none.",
])  # fmt: skip
def test_what_is_no_time_line_or_more_than_one_is_none(text):
    assert parse(text) is None


def test_every_word_of_it_is_one_token_of_the_tiny_model():
    tokenizer = AutoTokenizer.from_pretrained(folder())
    for word in [*WORDS.values(), *LANDMARKS, "left", "right"]:
        assert len(tokenizer.encode(f" {word}")) == 1, word


def test_overlap_counts_motions_and_landmarks_each():
    truth = (Moment("left"), Moment("straight", "tree", "left"))
    assert overlap(truth, truth) == 1
    assert overlap((Moment("left"), Moment("straight", "tree", "right")), truth) == 3 / 4
    assert overlap((Moment("left"), Moment("right", "fire", "left")), truth) == 2 / 4
    assert overlap((), truth) == 0 and math.isnan(overlap((), ()))


@given(MOMENTS, MOMENTS)
def test_saying_more_never_pays(truth, more):
    assert overlap(truth, truth) == 1
    assert overlap([*truth, *more], truth) == pytest.approx(len(truth) / (len(truth) + len(more)))
    assert overlap(truth[:-1], truth) == pytest.approx((len(truth) - 1) / len(truth))
    assert overlap(more, truth) == overlap(truth, more)


@pytest.mark.parametrize("frames", [[], [-1], [0, 4]])
def test_frames_that_the_clip_has_not_are_refused(frames):
    with pytest.raises(BadUse, match="from 0 to 3"):
        timeline(of(["stand"] * 4), frames)


@pytest.mark.parametrize("change", [
    {"ticks": {}}, {"frame_ticks": None}, {"frame_ticks": [0, 99]}, {"plan": {}}, {"plan": None},
    {"ticks": {"event": ["fly"] * 2, "landmark": ["", ""]}},
    {"ticks": {"event": ["left"] * 2, "landmark": ["cow", "cow"]}},
    {"ticks": {"event": [3, 3], "landmark": ["", ""]}},
])  # fmt: skip
def test_a_malformed_truth_is_told_with_the_fix(change):
    with pytest.raises(StkitError, match="truth of a clip.*build the benchmark anew"):
        timeline(of(["stand", "left"]) | change, range(2))


def test_the_truth_of_a_clip_is_found_by_its_id(tmp_path):
    bench = make_walks(tmp_path, clips=2)
    assert load_truth(bench, bench.clips[1].id) == read_json(tmp_path / bench.clips[1].truth)
    assert load_truth(bench, "another") is None


def test_a_clip_without_truth_has_none(tmp_path):
    clip = Clip("a", "a.mp4", "a", "train", 1, 1.0, 1, 1, 1.0)
    assert load_truth(Benchmark(tmp_path, (), (clip,)), "a") is None


@pytest.mark.parametrize("where", ["../a.json", "/etc/hostname", "link.json", "a\0.json", 5])
def test_a_truth_outside_of_the_folder_is_not_read(tmp_path, where):
    write_json(tmp_path / "a.json", of(["left"]))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "link.json").symlink_to(tmp_path / "a.json")
    clip = Clip("a", "a.mp4", "a", "train", 1, 1.0, 1, 1, 1.0, truth=where)
    with pytest.raises(StkitError, match="leaves"):
        load_truth(Benchmark(tmp_path / "bench", (), (clip,)), "a")


@pytest.mark.parametrize("text, problem", [
    (None, "no such file"), ("{", "not JSON"), ("[]", "truth of clip 'a' was expected"),
    ('{"clip_id": "b"}', "truth of clip 'a' was expected"), ('{"clip_id": "a", "ticks": {}}', "frame_ticks"),
])  # fmt: skip
def test_a_truth_file_that_is_gone_or_broken_is_told(tmp_path, text, problem):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    clip = Clip("a", "a.mp4", "a", "train", 1, 1.0, 1, 1, 1.0, truth="a.json")
    with pytest.raises(StkitError, match=problem):
        load_truth(Benchmark(tmp_path, (), (clip,)), "a")
