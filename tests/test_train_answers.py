"""What a model is taught to write: every form is read back as the right answer, and says what follows from what."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from walkmaker import make_walks, sampled

from stkit.bench import routes
from stkit.bench.egost_rows import questions_of_source, read_source
from stkit.bench.schema import LETTERS, Question
from stkit.bench.timeline import Moment, load_truth, parse, timeline
from stkit.runtime import BadUse, StkitError
from stkit.train.answers import answer_text, cold_start, narrowed, plain_question
from stkit.train.settings import FORMS
from stkit.vlm import answers

DATA = Path(os.environ.get("STKIT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
RELEASED = DATA / "ego_st_r1_mcq_504.jsonl"
needs_released = pytest.mark.skipif(not RELEASED.exists(), reason=f"{RELEASED} is not there: set STKIT_DATA")
TREE = Question(
    "q", "a", "a.mp4", "a", "direction", "reverse", "Based on this first-person video, which moves?",
    ("turn left, turn left", "turn right, turn left", "turn left, turn right", "turn right, turn right"), 2, "train",
)  # fmt: skip
SEEN = (Moment("straight", "tree", "left"), Moment("left"), Moment("right"))


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """Questions of real walks, each with its opposite and its clip's moments."""
    bench = make_walks(tmp_path_factory.mktemp("walks"), clips=12, seed=4)
    by_kind = {(q.clip_id, q.task, q.order): q for q in bench.questions}
    other = {"forward": "reverse", "reverse": "forward"}
    truths = {clip.id: load_truth(bench, clip.id) for clip in bench.clips}
    found = []
    for q in bench.questions:
        moments = timeline(truths[q.clip_id], sampled(truths[q.clip_id]))
        found.append((q, by_kind[q.clip_id, q.task, other[q.order]], moments))
    return found


def wrong_way(question: Question, text: str) -> bool:
    """Whether a text is read as anything else than the right answer."""
    if question.is_open:
        return answers.parse_route(text) != routes.parse(question.answer)
    return answers.parse(text, question.options) != question.answer


@pytest.mark.parametrize("form", [form for form in FORMS if form != "solution"])
def test_every_text_is_read_as_the_right_answer(walks, form):
    assert len(walks) > 80 and {q.task for q, _, _ in walks} == {"route", "direction", "landmark", "action"}
    for question, opposite, moments in walks:
        assert not wrong_way(question, answer_text(question, form, opposite, moments)), question.id


def test_the_checked_form_reads_each_option_as_far_as_it_agrees():
    assert answer_text(TREE, "checked", moments=SEEN) == (
        "<think>Timeline: straight tree left left none none right none none. Route: left, right. Reversed: left, right. "
        "A: left, left. B: right. C: left, right. So the answer is C.</think> <answer>C</answer>"
    )
    longer = replace(TREE, options=("turn left", "turn left, turn right, turn left", "turn left, turn right"))
    assert " A: left. B: left, right, left. C: left, right. So" in answer_text(longer, "checked", moments=SEEN)


def test_the_text_of_another_answer_is_read_as_another(walks):
    """That the check above can fail."""
    for question, opposite, moments in walks:
        if not question.is_open:
            other = replace(question, answer=(question.answer + 1) % 4)
            assert wrong_way(question, answer_text(other, "timeline", opposite, moments))


def test_the_time_line_in_it_is_the_clips(walks):
    for question, _, moments in walks:
        assert parse(answer_text(question, "timeline", moments=moments)) == moments


def test_the_derivation_reads_as_sentences():
    assert answer_text(TREE, "timeline", moments=SEEN) == (
        "<think>Timeline: straight tree left, left, right. Route: left, right. Reversed: left, right. "
        "left: A, C; right: C. So the answer is C.</think> <answer>C</answer>"
    )
    forward = replace(TREE, order="forward", answer=1)
    text = answer_text(forward, "timeline", moments=SEEN)
    assert "Route: right, left. right: B, D; left: B. So the answer is B." in text


def test_actions_and_landmarks_are_told_in_short_words_and_undone_on_the_way_back():
    options = ("close the door; pass the tree on your left", "put down an item; pass the tree on your left")
    text = answer_text(replace(TREE, task="action", options=options, answer=1), "timeline", moments=SEEN)
    assert "Route: tree right, pick. Reversed: put, tree left. put: B; tree left: B. So the answer is B." in text


def test_an_open_question_is_answered_by_its_route():
    told = "turn around, go straight, turn left, go straight, pass the tree on your left"
    question = replace(TREE, task="route", options=(), answer=told)
    text = answer_text(question, "timeline", moments=SEEN)
    assert text.endswith(f"Reversed: straight, left, straight, tree left.</think> <answer>{told}</answer>")
    assert "Route: straight, tree right, right, straight." in text


def test_the_route_is_the_forward_questions_and_its_reverse_the_reverse_ones(walks):
    """The two questions of a pair have to tell one route, each from its own options."""
    for question, opposite, moments in walks:
        told, other = (answer_text(q, "timeline", moments=moments) for q in (question, opposite))
        assert told.partition("Route: ")[2].partition(".")[0] == other.partition("Route: ")[2].partition(".")[0]


def test_the_letters_alive_only_ever_become_fewer_and_end_with_the_right_one(walks):
    for question, _, _ in walks:
        if not question.is_open:
            left = [set(LETTERS[:4]), *(set(alive) for _, alive in narrowed(question))]
            assert all(later <= before for before, later in zip(left, left[1:])), question.id
            assert left[-1] == {LETTERS[question.answer]}


def test_an_option_that_goes_on_is_out_at_the_end():
    options = ("turn left, turn right, turn left", "turn left, turn right", "turn right")
    question = replace(TREE, options=options, answer=1)
    assert [alive for _, alive in narrowed(question)] == [["A", "B"], ["B"]]


def parts(solution: str) -> tuple[str, ...]:
    """A released row's text cut at the phrases that all of them have."""
    order, rest = solution.removeprefix("<think>Let's start by thinking ").split(" ", 1)
    first, rest = rest.split(" And then think about ")
    asked, rest = rest.split("? Hence, the correct answer is ")
    return order, *first.split("?"), asked, rest.split("</think>")[0]


@pytest.mark.parametrize("text", [
    "<think>Let's start by thinking reverse which landmarks (objects or scenery changes) did you pass by to return to "
    "the starting point?['toy birdhouse'] And then think about which landmarks (objects or scenery changes) did you "
    "pass by to reach your destination? Hence, the correct answer is A</think> <answer>A</answer>",
    "<think>Let's start by thinking forward what directions do you need to go through to get to your destination? Turn "
    "right, go straight, turn right, go straight And then think about what directions do you need to go through to get "
    "to starting point ? Hence, the correct answer is B</think> <answer>B</answer>",
])  # fmt: skip
def test_the_papers_form_is_the_released_one(text):
    assert cold_start(*parts(text)) == text


@needs_released
def test_all_released_texts_are_rebuilt_from_their_parts():
    texts = [json.loads(line)["solution"] for line in RELEASED.read_text().splitlines()]
    assert len(texts) == 504 and [cold_start(*parts(text)) for text in texts] == texts


@needs_released
def test_questions_stand_in_the_papers_form_as_in_the_released_rows():
    """Where they speak of their own question: many speak of landmarks where directions are asked, and so on."""
    items, _, _ = questions_of_source(read_source(RELEASED))
    word = {"direction": " directions ", "landmark": " landmarks ", "action": " actions "}
    own = [i.question for i in items if word[i.question.task] in i.question.solution.partition("think about")[2]]
    assert len(own) > 300 and {q.kind for q in own} >= {"direction/reverse", "landmark/forward", "action/reverse"}
    for question in own:
        assert f"think about {plain_question(question)}? Hence" in question.solution


@pytest.mark.parametrize("text, plain", [
    ("Please take a egocentric view to understand the following questions.Based on this video, which way?",
     "which way"),
    ("Please take an egocentric view to understand the following question. Based on this video, how ?", "how "),
    ("Give the whole route: moves, in order.", "give the whole route: moves, in order"),
    ("What is A. Is it?", "what is A. Is it"),
])  # fmt: skip
def test_a_question_loses_its_lead_its_capital_and_its_last_mark(text, plain):
    assert plain_question(replace(TREE, question=text)) == plain


def test_the_papers_form_answers_the_opposite_question_first():
    ahead = replace(TREE, id="p", order="forward", question="Which turns, in order?", answer=0)
    assert answer_text(TREE, "paper", ahead) == (
        "<think>Let's start by thinking forward which turns, in order? turn left, turn left And then think about which "
        "moves? Hence, the correct answer is C</think> <answer>C</answer>"
    )
    assert "start by thinking reverse which moves? turn left, turn right And" in answer_text(ahead, "paper", TREE)


@pytest.mark.parametrize("change", [
    None, {}, {"order": "forward", "clip_id": "b"}, {"order": "forward", "task": "action"},
])  # fmt: skip
def test_the_papers_form_needs_the_opposite_question(change):
    opposite = None if change is None else replace(TREE, **change)
    with pytest.raises(StkitError, match="question q: .*other order.*sft.form"):
        answer_text(TREE, "paper", opposite)


def test_a_rows_own_solution_is_taken_as_it_stands():
    assert answer_text(replace(TREE, solution=" <think>I see.</think> C\n"), "solution") == " <think>I see.</think> C\n"
    with pytest.raises(StkitError, match="question q: .*no solution.*sft.form"):
        answer_text(replace(TREE, solution=" "), "solution")


def test_the_answer_alone_is_a_letter_or_a_route():
    """As the prompt without tags asks for it, and as letter mode weighs it."""
    assert answer_text(TREE, "answer") == "C"
    assert answer_text(replace(TREE, options=(), answer="turn left"), "answer") == "turn left"


@pytest.mark.parametrize("moments", [None, ()])
def test_without_truth_there_is_no_time_line_to_learn(moments):
    with pytest.raises(StkitError, match="clip a has no truth.*sft.form=solution.*sft.form=answer"):
        answer_text(TREE, "timeline", moments=moments)


def test_options_that_are_no_routes_are_told_by_the_question():
    with pytest.raises(StkitError, match="question q: no route.*a birdhouse.*sft.form=answer"):
        answer_text(replace(TREE, options=("a birdhouse", "turn left", "turn right")), "timeline", moments=SEEN)


def test_options_that_tell_one_route_cannot_be_told_apart():
    same = ("turn left", "make a left", "turn right")
    with pytest.raises(StkitError, match="question q: 2 of its options tell one route"):
        answer_text(replace(TREE, options=same, answer=1), "timeline", moments=SEEN)


def test_an_unknown_form_is_refused():
    with pytest.raises(BadUse, match="'poem' is unknown: use timeline, checked, paper, solution, answer"):
        answer_text(TREE, "poem")
