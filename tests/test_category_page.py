"""The page takes a run apart: its figures are those of the analysis, and what cannot be told says why."""

import re
from dataclasses import replace

import pandas as pd
import pytest
from test_categories import one, predictions, texts_of, write_run
from test_egost import MCQ, OPEN, R1
from test_report import EVIL, Page
from walkmaker import make_walks

from stkit.bench.egost import import_egost
from stkit.bench.schema import LETTERS, Prediction, load_benchmark
from stkit.reporting import html
from stkit.reporting.categories import analyse, category_tables
from stkit.reporting.chains import OUTCOMES, STEPS
from stkit.reporting.judge import load_run

CLIPS = 12
SURE = (-0.2, -2.5, -2.6, -2.7)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return make_walks(tmp_path_factory.mktemp("pages") / "walks", CLIPS, 4)


@pytest.fixture(scope="module")
def said(bench):
    return predictions(bench, texts_of(bench, "timeline"))


def reported(folder, name: str, said, blind=(), bench=None, **settings):
    """A run, what is found in it, and its page."""
    run = write_run(folder, name, said, blind, bench, **settings)
    html.report(run, folder / f"{name}.html")
    return run, analyse(run), (folder / f"{name}.html").read_text()


@pytest.fixture(scope="module")
def told(bench, said):
    return reported(bench.path.parent, "told", *said)


def in_letters(questions):
    choice = [q for q in questions if not q.is_open]
    chosen = [(q, q.answer if k % 3 else (q.answer + 1) % 4) for k, q in enumerate(choice)]
    return [
        Prediction(
            q.id, "letter", "none", LETTERS[k], k, k == q.answer, log_probs=(*SURE[1 : k + 1], SURE[0], *SURE[k + 1 :])
        )
        for q, k in chosen
    ]


@pytest.fixture(scope="module")
def letters(bench):
    return reported(bench.path.parent, "letters", in_letters(bench.questions), mode="letter")


def section(page: str) -> str:
    return page.split("<h3>Category by category</h3>")[1].split("<h3>Misses</h3>")[0]


def table(page: str, label: str, name: str = "told") -> dict[str, list[str]]:
    """The words of each row's cells after its name, of the table with this label."""
    source = page.split(f'<table aria-label="{label}, {name}"')[1].split("</table>")[0].split("<tbody>")[1]
    rows = [re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL) for row in source.split("<tr")[1:]]
    cells = [
        [re.sub(r"<[^>]+>", " ", re.sub('<span class="narrow">.*?</span>', "", cell)).split() for cell in row]
        for row in rows
    ]
    return {" ".join(row[0]): [word for cell in row[1:] for word in cell] for row in cells}


def shown(part: dict, *more) -> list[str]:
    """The cells of a row with an accuracy, as this test writes them."""
    figures = [
        "–" if part[name] is None else f"{100 * part[name]:.1f}"
        for name in ("accuracy", "low", "high", "chance", "blind")
    ]
    return [figures[0], figures[1], "to", *figures[2:], *map(str, more), str(part["n"]), str(part["clusters"])]


def test_every_accuracy_of_every_category_stands_on_the_page(told):
    _, found, page = told
    labels = {
        "turns": "turns on the walk",
        "steps": "steps of the route",
        "landmark": "landmark asked",
        "action": "action asked",
    }
    for key, label in (labels | {"position": "right option"}).items():
        rows = {}
        for value, scopes in found["by"][key].items():
            for scope, part in scopes.items():
                name = value if len(scopes) == 1 else f"{value}, {'multiple choice' if scope == 'choice' else scope}"
                rows[name] = shown(part, *([part["chosen"]] if key == "position" else []))
        assert len(rows) >= 4 and table(page, f"accuracy by {label}") == rows


def test_forward_against_reverse_has_both_accuracies_with_their_blind_scores(told):
    _, found, page = told
    rows = table(page, "forward against reverse")
    assert list(rows) == ["all multiple choice", "route", "direction", "landmark", "action"]
    part, cells = found["orders"]["direction"], rows["direction"]
    figures = [
        f"{100 * part[name]:+.1f}".replace("-", "−").replace("+0.0", "0.0") for name in ("difference", "low", "high")
    ]
    assert [cells[0], cells[1], cells[3]] == figures
    both = (part[name] for name in ("forward", "forward_blind", "reverse", "reverse_blind"))
    assert cells[4:8] == [f"{100 * share:.1f}" for share in both]
    assert cells[-2:] == [str(part["n"]), str(part["clusters"])]


def test_where_the_error_came_in_is_counted_by_task_and_by_step(told):
    _, found, page = told
    chain = found["chain"]
    rows = table(page, "outcomes by task and order, counts")
    for kind, part in chain.items():
        name = "all multiple choice" if kind == "overall" else kind.replace("/", ", ")
        assert rows[name] == [str(part["outcomes"][o]["count"]) for o in OUTCOMES] + [
            str(part["n"]),
            str(part["clusters"]),
        ]
    whole = table(page, "outcomes")
    assert list(whole) == list(OUTCOMES)
    luck = chain["overall"]["outcomes"]["right by luck"]
    assert (
        whole["right by luck"][0] == f"{100 * luck['share']:.1f}"
        and whole["right by luck"][-2] == str(luck["count"]) != "0"
    )
    steps = table(page, "steps that follow from the one before")
    wanted = [(f"{100 * part['mean']:.1f}", str(part["n"])) for part in (chain["overall"]["steps"][s] for s in STEPS)]
    assert [(cells[0], cells[-2]) for cells in steps.values()] == wanted


def test_words_are_confused_in_a_table_whose_shade_grows_with_the_share(told):
    _, found, page = told
    part = found["confusion"]["motion"]
    whole = part["overall"]
    label = f"motion words: {100 * whole['mean']:.1f} % of {whole['n']} places right, {whole['clusters']} clusters"
    rows = table(page, label)
    for word, counts in zip(part["words"], part["counts"]):
        if sum(counts):
            assert rows[word][4:] == [
                str(sum(counts)),
                str(part["recall"][word]["clusters"]),
                *(str(n) for n in counts if n),
            ]
    left = page.split(label)[-1].split('<th scope="row">left</th>')[1].split("</tr>")[0]
    counts = sorted((n for n in part["counts"][part["words"].index("left")] if n), reverse=True)
    assert 0.75 < counts[0] / sum(counts) and f'<td class="s4">{counts[0]}</td>' in left
    assert 0 < counts[1] / sum(counts) <= 0.25 and f'<td class="s1">{counts[1]}</td>' in left


def test_length_of_thought_and_calibration_stand_where_they_are_known(told, letters):
    _, found, page = told
    rows = table(page, "accuracy by tokens of the answer")
    assert list(rows.values()) == [shown(part) for part in found["thought"]["bins"]]
    _, found, page = letters
    rows = table(page, "accuracy by probability of the chosen letter", "letters")
    assert list(rows.values()) == [shown(b, f"{100 * b['confidence']:.1f}") for b in found["calibration"]["bins"]]
    assert f"expected calibration error {100 * found['calibration']['error']:.1f} points" in page


def test_a_run_in_letter_mode_shows_what_can_be_told_and_says_why_the_rest_is_not(letters):
    _, found, page = letters
    text = Page(section(page)).text
    for key in ("chain", "confusion", "thought"):
        assert found["left_out"][key] == "no text was decoded: use mode='generate'"
    assert text.count("no text was decoded: use mode='generate'") == 1  # one line for the three
    assert "Where the error came in · Words of the time line · Length of the thought: no text" in text
    assert len(table(page, "accuracy by turns on the walk", "letters")) == 4 * len(found["by"]["turns"])
    assert table(page, "forward against reverse", "letters")["action"][5] == "–"  # no blind control was run


def test_pictures_speak_the_figures_and_have_ids_of_their_own(told, letters):
    (run, found, page), folder = told, told[0].path.parent
    html.report([run, letters[0]], folder / "both.html")
    both = Page((folder / "both.html").read_text())
    ids = [attributes["id"] for _, attributes in both.tags if "id" in attributes]
    assert (
        len(ids) == len(set(ids))
        and len(both.all("svg")) == len(Page(page).all("svg")) + len(Page(letters[2]).all("svg")) + 1
    )
    spoken = {
        svg["aria-label"].split(":")[0]: svg["aria-label"]
        for svg in Page(section(page)).all("svg")
        if svg["role"] == "img"
    }
    assert len(spoken) == 8 == len(Page(section(page)).all("svg"))
    part = found["by"]["turns"]["2"]["choice"]
    figures = tuple(100 * part[name] for name in ("accuracy", "low", "high"))
    assert (
        "Turns on the walk: 2, multiple choice {:.1f} ({:.1f} to {:.1f}); 3".format(*figures)
        in spoken["Turns on the walk"]
    )
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert referred and referred <= {attributes.get("id") for _, attributes in Page(page).tags}


def test_only_chains_that_were_read_are_unfolded_and_the_page_stays_small(told, letters):
    details = Page(section(told[2])).all("details")
    assert len(details) == 9 and ["open" in d for d in details] == [True] + [False] * 8
    assert not any("open" in d for d in Page(section(letters[2])).all("details"))
    assert len(section(told[2])) < 200_000


@pytest.mark.parametrize("rows", [R1, MCQ, OPEN], ids=lambda path: path.stem)
def test_rows_of_the_released_benchmark_have_no_truth_and_are_taken_apart_all_the_same(rows, tmp_path):
    import_egost(rows, tmp_path / "rows")
    questions = load_benchmark(tmp_path / "rows").questions
    said = [
        Prediction(q.id, "generate", "none", "<answer>A</answer>", 0 if q.options else "", q.answer == 0)
        for q in questions
    ]
    _, found, page = reported(tmp_path, "real", said, bench=tmp_path / "rows")
    text = Page(page).text
    assert all(why in text for why in found["left_out"].values())
    assert "Turns on the walk · Steps of the route: no clip has its truth beside it" in text
    assert ("Accuracy by right option" in text) == any(q.options for q in questions)


def test_a_single_question_is_a_table_of_one_row(bench):
    path = one(bench)
    said = in_letters(load_benchmark(path).questions)
    _, found, page = reported(bench.path.parent, "single", said, bench=path, mode="letter")
    part = found["by"]["position"]["A"]["direction"]
    assert (part["n"], part["accuracy"], part["chosen"]) == (1, 0, 0)
    assert table(page, "accuracy by right option", "single") == {"A": shown(part, 0)}


def test_one_walk_is_one_cluster(bench, said):
    few = [p for p in said[0] if p.id.startswith("walk-4-00000")]
    _, found, page = reported(bench.path.parent, "few", few, said[1])
    rows = table(page, "forward against reverse", "few")
    assert found["orders"]["overall"]["clusters"] == 1 and {cells[-1] for cells in rows.values()} == {"1"}


def test_without_an_answer_there_is_nothing_to_take_apart(bench):
    assert "Category by category" not in reported(bench.path.parent, "unasked", [])[2]


def test_a_truth_that_is_gone_is_told_and_hostile_names_stay_text(tmp_path):
    folder = tmp_path / "<script>alert(1)</script> \u202e {{ 7*7 }}".replace("/", "∕")
    bench = make_walks(folder / "walks", 4)
    said, blind = predictions(bench, texts_of(bench, "timeline"))
    (folder / "walks" / bench.clips[0].truth).unlink()
    run = write_run(folder, "<b onclick=x>'\"&amp;", [replace(p, text=EVIL + p.text) for p in said], blind)
    html.report(run, folder / "report.html")
    source = (folder / "report.html").read_text()
    page, text = Page(section(source)), Page(section(source)).text
    assert "the clips’ truth was not read: " in text and "<script>alert(1)<∕script> ⟨U+202E⟩ {{ 7*7 }}" in text
    assert "Turns on the walk · Steps of the route: truth=False: the clips' truth was not read" in text
    assert not page.all("script") and page.all("b") and "\u202e" not in source
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]


def test_all_tables_of_the_analysis_are_written_beside_the_page(told):
    run, found, _ = told
    written = pd.read_csv(run.path.parent / "told.categories.csv")
    tables = category_tables(found)
    assert set(written["part"]) == set(tables) and set(written["run"]) == {"told"}
    turns = written[written["part"] == "turns"]
    assert list(zip(turns["value"].astype(float).astype(int).astype(str), turns["scope"], turns["n"])) == [
        (value, scope, part["n"]) for value, scopes in found["by"]["turns"].items() for scope, part in scopes.items()
    ]  # fmt: skip
    words = written[(written["part"] == "motion") & (written["true"] == "left") & (written["written"] == "stand")]
    assert words["count"].item() == tables["motion"].loc["left", "stand"] > 0
    assert len(written[written["part"] == "landmark_words"]) == tables["landmark_words"].size


def test_the_page_can_be_made_of_a_run_read_again(told):
    run, _, page = told
    html.report(load_run(run.path), run.path.parent / "again.html")
    assert (run.path.parent / "again.html").read_text() == page
