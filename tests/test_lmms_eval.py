"""The exported task is what lmms-eval reads, asks what stkit asks, scores as stkit scores, and needs no stkit."""

import ast
import importlib.util
import random
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from benchmaker import CLIPS, lines, make_questions, write_bench

from stkit.bench.lmms_eval import export_lmms_eval, parse
from stkit.bench.schema import LETTERS, Prediction, Question
from stkit.reporting.scores import score
from stkit.runtime import StkitError
from stkit.vlm import answers
from stkit.vlm.prompts import user_text

OPTIONS = ("left, right", "right, left", "left, left", "right, right")
PLAIN = {  # what a model that was asked for a letter says, with the option meant
    "B": 1, "b": 1, "(B)": 1, "B.": 1, "B)": 1, " [C] ": 2, "**B**": 1, "A": 0, "a": 0, "D\n": 3, '"B"': 1,
    "Answer: C": 2, "The answer is C.": 2, "The correct answer is: (D)": 3, "the final answer is d": 3,
    "Option B": 1, "option (C)": 2, "The answer is option B.": 1, "So the answer is B": 1, "\\boxed{B}": 1,
    "B. right, left": 1, "C: left, left": 2, "D. (right, right)": 3, "right, left": 1, "Right, left.": 1,
    "B<|im_end|>": 1, "<think>A</think><answer>B</answer>": 1, "<think>A</think> B": 1,
    "A</think>\n<answer>D</answer>": 3,
    "<think>A <answer>C</answer>": 2, "<answer>B": 1,
    "E": None, "": None, "I do not know": None, "A or B": None, "A, B": None, "not B": None, "A dog": None, "i": None,
    "B. left, left": None, "The answer is B or C": None, "The answer is not B": None, "left": None, "A.B": None,
    "<think>so A": None, "<answer>A</answer><answer>B</answer>": None, "A: no. B: yes.": None, "C++": None,
    "The answer is A.\n\nB": None, "A) left, right\nB) right, left": None, "<answer></answer>": None, "U.S.": None,
}  # fmt: skip
WORDY = (
    "Based on the video, D", "a left, right turn", "I think B", "B?", "A. B.", "C-", "It could be A, but I say C",
    "A lot of turns", "If it is A then no", "Neither A nor B", "I see a wall. B", "Is it A? No: C.",
    "The answer isn't A", "As a model I cannot say", "First A, then B", "Option A is wrong, option B is right",
    "left, right is wrong", "I", "answer", "A and B are both right", "The walker turns left, right",
    "Both", "D is right", "B seems wrong", "turn A",
    "x", "Z.", "A/B", "the answer: A? B",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("lmms") / "My Wälks 1")


@pytest.fixture(scope="module")
def task(bench, tmp_path_factory):
    out = tmp_path_factory.mktemp("task") / "out"
    return out, export_lmms_eval(bench, out)


def as_lmms_eval_reads(path: Path) -> dict:
    """As lmms-eval does: "!function file.name" is imported from beside the task, an included file lies under it."""

    class Loader(yaml.SafeLoader):
        pass

    def function(loader, node):
        file, name = loader.construct_scalar(node).split(".")
        spec = importlib.util.spec_from_file_location("task_" + file, path.parent / f"{file}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    Loader.add_constructor("!function", function)
    found = yaml.load(path.read_text(), Loader)  # noqa: S506
    below = as_lmms_eval_reads(path.parent / found.pop("include")) if "include" in found else {}
    return below | found


def asked_and_rows(out: Path) -> list[tuple[Question, dict]]:
    by_id = {q.id: q for q in make_questions()}
    return [(by_id[row["id"]], row) for row in lines(out / "questions.jsonl")]


def test_each_task_file_names_functions_and_rows_that_are_there(task):
    out, facts = task
    assert facts["tasks"] == ["stkit_my_walks_1", "stkit_my_walks_1_think", "stkit_my_walks_1_blind"]
    assert sorted(p.stem for p in out.glob("*.yaml")) == sorted(facts["tasks"])
    for name in facts["tasks"]:
        read = as_lmms_eval_reads(out / f"{name}.yaml")
        assert read["task"] == name and read["dataset_path"] == "json" and read["output_type"] == "generate_until"
        assert read["dataset_kwargs"]["data_files"] == {read["test_split"]: str(out / "questions.jsonl")}
        used = [read[k] for k in ("doc_to_visual", "doc_to_text", "doc_to_target", "process_results")]
        assert all(map(callable, used)) and all(callable(m["aggregation"]) for m in read["metric_list"])
        assert read["generation_kwargs"]["temperature"] == 0 and read["generation_kwargs"]["until"] == ["<|im_end|>"]


def test_every_multiple_choice_question_is_a_row_and_the_routes_are_counted(task):
    out, facts = task
    asked = [q for q in make_questions() if q.options]
    assert [row["id"] for row in lines(out / "questions.jsonl")] == [q.id for q in asked]
    assert (facts["questions"], facts["left_out"], facts["videos"]) == (12, 6, 3)
    assert facts["splits"] == {"test": 4, "train": 8}
    assert "6 open-ended questions are left out" in (out / "README.md").read_text()
    kinds = [{k: type(v) for k, v in row.items()} for _, row in asked_and_rows(out)]
    assert all(kind == kinds[0] for kind in kinds)  # a column of two types is what datasets' loader stumbles over


def test_prompts_are_those_that_stkit_gives_a_model(task):
    out, facts = task
    for name, think in zip(facts["tasks"], (False, True, False)):
        text = as_lmms_eval_reads(out / f"{name}.yaml")["doc_to_text"]
        for question, row in asked_and_rows(out):
            assert text(row) == "".join(user_text(question, think=think)) == text(row, {"pre_prompt": "x"})


def test_the_video_is_shown_from_where_it_lies_and_never_left_out(task, bench):
    out, facts = task
    by_letter, _, blind = (as_lmms_eval_reads(out / f"{name}.yaml")["doc_to_visual"] for name in facts["tasks"])
    for question, row in asked_and_rows(out):
        assert by_letter(row) == [str(bench / "videos" / question.video)] and blind(row) == []
    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        by_letter(row | {"video": str(out / "gone.mp4")})


def test_metrics_are_stkits_figures_on_the_same_answers(task):
    out, facts = task
    read = as_lmms_eval_reads(out / f"{facts['tasks'][0]}.yaml")
    texts = ["A", "The answer is B.", "A or B", "(C)", "left, left", "dunno", "a tree", "C. a torch", "B", "D", "", "A"]
    collected, said = {m["metric"]: [] for m in read["metric_list"]}, []
    for (question, row), text in zip(asked_and_rows(out), texts, strict=True):
        for metric, value in read["process_results"](row, [text]).items():
            collected[metric].append(value)
        parsed = answers.parse(text, question.options)
        said.append(Prediction(question.id, "generate", "none", text, parsed, parsed == question.answer))
    ours = score(said, [], [q for q, _ in asked_and_rows(out)])
    means = {m["metric"]: m["aggregation"](collected[m["metric"]]) for m in read["metric_list"]}
    expected = {"accuracy": ours["accuracy"], "chance": ours["chance"], "unresolved": ours["unparsed_rate"]}
    expected |= {kind.replace("/", "_"): part["accuracy"] for kind, part in ours["by_task"].items()}
    assert 0 < ours["accuracy"] < 1 and 0 < ours["unparsed_rate"] < 1 and len(set(expected.values())) > 3
    assert means == pytest.approx(expected)
    items = collected["accuracy"]
    assert {item[read["cluster_key"]] for item in items} == set(CLIPS)
    assert {item[read["score_key"]] for item in items} == {0, 1}


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_answer_is_read_as_stkit_reads_it(text):
    assert parse(text, OPTIONS) == PLAIN[text] == answers.parse(text, OPTIONS)


@pytest.mark.parametrize("text", WORDY)
def test_what_is_not_plain_is_unresolved_never_wrong(text):
    assert parse(text, OPTIONS) in (None, answers.parse(text, OPTIONS))


@pytest.mark.parametrize("options", [OPTIONS, tuple("bacd"), ("a tree", "a torch"), ("left", "no"), ("1", "2")])
def test_no_text_of_loose_words_is_read_as_another_option_than_stkit_reads(options):
    words = ["A", "B", "b", "(A)", "B.", "the answer is", "option", "is", "not", "and", ",", ".", "?", "\n", "<think>"]
    words += ["</think>", "<answer>", "</answer>", "**", "\\boxed{A}", "I", "wrong", "right", "-", *options]
    chance, read, wrong = random.Random(0), 0, []
    for _ in range(2000):
        text = chance.choice(["", " "]).join(chance.choices(words, k=chance.randint(1, 4)))
        ours = answers.parse(text, options)
        if (found := parse(text, options)) is not None:
            read += 1
            wrong += [text] * (ours not in (None, found))
    assert not wrong and read > 50


def test_words_that_are_one_option_and_name_another_are_unresolved():
    assert parse("A. tree", ("tree", "a tree")) is parse("Option B", ("option b", "no")) is None
    assert parse("tree", ("tree", "a tree")) == parse("A.", ("tree", "a tree")) == 0


def test_every_letter_can_be_the_answer_where_there_are_many_options():
    many = tuple(f"thing {k}" for k in range(26))
    assert [parse(f"{letter}.", many) for letter in LETTERS] == list(range(26))


def test_the_functions_import_nothing_but_python(task):
    out, _ = task
    tree = ast.parse((out / "utils.py").read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names and names <= set(sys.stdlib_module_names)


def test_only_the_split_asked_for_is_written(bench, tmp_path):
    assert export_lmms_eval(bench, tmp_path / "t", split="test")["splits"] == {"test": 4}
    assert {row["split"] for row in lines(tmp_path / "t" / "questions.jsonl")} == {"test"}
    with pytest.raises(StkitError, match="no multiple-choice question of split 'dev'.*test, train"):
        export_lmms_eval(bench, tmp_path / "u", split="dev")


def test_the_same_export_may_be_written_again_and_no_other_folder_is_touched(bench, tmp_path):
    out = tmp_path / "t"
    export_lmms_eval(bench, out)
    (out / "utils.py").write_text("")
    export_lmms_eval(bench, out)
    assert "def process_results" in (out / "utils.py").read_text()
    with pytest.raises(StkitError, match="other settings"):
        export_lmms_eval(bench, out, split="test")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(StkitError, match="not empty"):
        export_lmms_eval(bench, tmp_path / "mine")


def test_a_video_that_is_not_there_is_named_before_anything_is_written(bench, tmp_path):
    copy = Path(shutil.copytree(bench, tmp_path / "copy"))
    (copy / "videos" / "b.mp4").unlink()
    with pytest.raises(StkitError, match="b.mp4 not in videos/"):
        export_lmms_eval(copy, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_path_that_yaml_or_a_shell_would_misread_is_quoted(bench, tmp_path):
    out = tmp_path / 'a: "b" #c $d ö\N{PEDESTRIAN}'
    facts = export_lmms_eval(bench, out)
    files = as_lmms_eval_reads(out / f"{facts['tasks'][0]}.yaml")["dataset_kwargs"]["data_files"]
    assert files == {"test": str(out / "questions.jsonl")} and str(out) in shlex.split(facts["command"])
