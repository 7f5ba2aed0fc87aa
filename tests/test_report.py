"""The report: complete, self-contained, safe against what stands in files, and honest in its first line."""

import csv
import errno
import html.parser as html_parser
import json
import random
import re
from pathlib import Path

import av
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from stkit.bench.schema import Prediction, Question, row_of
from stkit.reporting import html, judge, plots, tables
from stkit.runs import write_json, write_jsonl
from stkit.runtime import BadUse, StkitError

EVIL = "<script>alert(1)</script> \"'><img src=x onerror=alert(2)> \x00\x07 \u202egnp.exe \u2028 & {{ 7*7 }} \\ $x$"
MOVES = ("go straight", "turn left", "turn right", "pass the brick wall on your left", "look up")


def write_video(path: Path, seed: int, frames: int = 12):
    """A corridor that slides by: H.264 by PyAV, 160x120, 4 frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(random.Random(seed).randrange(60, 200) for _ in range(3))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for t in range(frames):
            image = Image.new("RGB", (160, 120), (70, 74, 80))
            draw = ImageDraw.Draw(image)
            draw.polygon([(0, 120), (60, 70), (100, 70), (160, 120)], fill=(112, 104, 92))
            draw.rectangle([10 + 9 * t, 30, 40 + 9 * t, 90], fill=colour)
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


def make_questions(clips: int, per_kind: int = 1, evil: bool = False) -> list[Question]:
    """All eight categories on every clip; forward and reverse share a group."""
    found = []
    for clip in range(clips):
        for kind in judge.KINDS:
            task, order = kind.split("/")
            for i in range(per_kind):
                rng = random.Random(f"{clip}{kind}{i}")
                options = tuple(", ".join(rng.choices(MOVES, k=3)) + f" ({letter})" for letter in "wxyz")
                text = f"Which {task} is it on the way {'back' if order == 'reverse' else 'there'}? Choose one."
                found.append(
                    Question(
                        id=f"c{clip}-{kind.replace('/', '-')}-{i}", clip_id=f"c{clip}", video=f"c{clip}.mp4",
                        group=f"g{clip}", task=task, order=order, question=EVIL if evil else text,
                        options=() if task == "route" else (EVIL if evil else options[0], *options[1:]),
                        answer="go straight, turn left" if task == "route" else rng.randrange(4), split="test",
                    )
                )  # fmt: skip
    return found


def answer(question: Question, seed: int, skill: float, mode: str, said: str = "") -> Prediction:
    """A made-up answer that is right with probability ``skill``, else a guess."""
    rng = random.Random(f"{seed}{question.id}")
    if question.is_open:
        right = rng.random() < skill / 2
        text = said or f"<think>First I walk on.</think><answer>{question.answer if right else 'go straight'}</answer>"
        return Prediction(question.id, mode, "none", text, "go straight", right, edit_distance=0.0 if right else 1.0)
    choice = question.answer if rng.random() < skill else rng.randrange(4)
    logs = np.log(np.full(4, 0.2) + 0.2 * (np.arange(4) == choice))
    unread = rng.random() < 0.05
    text = said or ("I can't tell" if unread else f"<think>I see it turn.</think><answer>{'ABCD'[choice]}</answer>")
    return Prediction(
        question.id, mode, "none", text, None if unread else choice, not unread and choice == question.answer,
        log_probs=tuple(logs), seconds=0.2, timestamps_s=(0.0, 1.0), extra={"reader": "pyav"},
    )  # fmt: skip


def make_bench(folder: Path, questions: list[Question], videos: int = 4) -> Path:
    """A benchmark folder; only the first clips have a video."""
    write_jsonl(folder / "questions.jsonl", map(row_of, questions))
    write_json(folder / "benchmark.json", {"format_version": 1})
    for clip in range(videos):
        write_video(folder / "videos" / f"c{clip}.mp4", clip)
    return folder


def make_run(
    folder: Path, bench: Path, questions: list[Question], seed=0, skill=0.5, mode="generate", said="", **settings
) -> Path:
    """A run folder as ``stkit eval`` leaves it."""
    asked = [q for q in questions if mode == "generate" or not q.is_open]
    write_jsonl(folder / "predictions.jsonl", [row_of(answer(q, seed, skill, mode, said)) for q in asked])
    choice = [q for q in questions if not q.is_open]
    write_jsonl(folder / "blind.jsonl", [row_of(answer(q, seed + 100, 0.0, "letter")) for q in choice])
    settings = {
        "bench": str(bench),
        "model": "tiny",
        "mode": mode,
        "control": "none",
        "seed": seed,
        "sampling": "uniform",
        "frames": 8,
    } | settings
    model = {"name": "tiny", "untrained": True, "device": "cpu", "dtype": "float32", "attention": "sdpa"}
    write_json(
        folder / "config.json",
        {
            "settings": settings,
            "model": model,
            "versions": {"torch": "2.14.1"},
            "command": "stkit eval walks --model tiny --out first",
        },
    )
    return folder


class Page(html_parser.HTMLParser):
    """What a browser would make of the page: every tag with its attributes, and the text."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        """The attributes of every such tag."""
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A benchmark of 12 walks, 10 of them with a video, and two runs on it."""
    folder = tmp_path_factory.mktemp("report")
    questions = make_questions(12)
    bench = make_bench(folder / "walks", questions, videos=10)
    make_run(folder / "first", bench, questions, skill=0.3)
    make_run(folder / "second", bench, questions, seed=1, skill=0.7, model="Qwen/Qwen2.5-VL-3B-Instruct")
    return folder


@pytest.fixture(scope="module")
def one(place):
    found = html.report(place / "first", place / "one.html")
    return found, (place / "one.html").read_text()


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A run in which every text that can come from outside is an attack."""
    folder = tmp_path_factory.mktemp("evil")
    questions = make_questions(3, evil=True)
    bench = make_bench(folder / "walks", questions, videos=1)
    run = make_run(folder / "<b onclick=x>\"'&amp;", bench, questions, said=EVIL, model=EVIL, note=EVIL)
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().split("\n")[:-1]]
    rows[0] |= {"failed": EVIL, "correct": None}
    lines = [json.dumps(row).replace("alert(1)", "alert(1)\\ud800") for row in rows]
    (run / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    html.report(run, folder / "report.html")
    return (folder / "report.html").read_bytes().decode()


def test_the_first_line_says_that_the_weights_are_untrained(one):
    assert Page(one[1].split("<main>")[1]).text.strip().split("\n")[0] == "untrained weights: expect chance"


def test_every_category_stands_with_n_clusters_interval_blind_score_and_chance(one, place):
    scores = judge.load_run(place / "first").scores
    page = Page(one[1])
    table = one[1].split('aria-label="accuracy by category, first"')[1].split("</table>")[0]
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in table.split("<tr")[2:]]
    assert len(rows) == 9 and "95 % interval" in page.text
    for kind, cells in zip(judge.KINDS, rows):
        part, words = scores["by_task"][kind], " ".join(cells)
        assert kind.replace("/", ", ") in words
        figures = [part["accuracy"], part["low"], part["high"], part["chance"], part["blind"]]
        assert all(tables.percent(f) in cells for f in figures)
        assert cells.count(str(part["n"])) >= 1 and cells.count(str(part["clusters"])) >= 1
    assert all(task in one[1].split("Forward minus reverse")[1] for task in plots.TASKS)


def test_the_record_names_model_versions_seed_sampling_dtype_attention_and_command(one):
    text = Page(one[1].split("<h3>Record</h3>")[1]).text
    for word in (
        "tiny",
        "2.14.1",
        "seed",
        "uniform",
        "float32",
        "sdpa",
        "stkit eval walks --model tiny --out first",
        "pyav",
    ):
        assert word in text


def test_the_page_needs_no_network_and_no_script(one):
    page = Page(one[1])
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    policy = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy and "default-src 'none'" in policy[0] and "script-src" not in policy[0]
    assert page.all("img") and all(i["src"].startswith("data:image/jpeg;base64,") for i in page.all("img"))
    outside = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[^"]*"', "", one[1])
    assert (
        "http://" not in outside
        and "https://" not in outside
        and "@import" not in outside
        and "url(http" not in outside
    )
    assert len(one[1]) < 1_000_000


def test_every_picture_has_a_text_alternative(one):
    page = Page(one[1])
    assert all(i["alt"].startswith("frame ") for i in page.all("img"))
    plots_found = [s for s in page.all("svg") if s.get("role") == "img"]
    assert len(plots_found) == len(page.all("svg")) > 1 and all(svg["aria-label"] for svg in plots_found)
    assert "direction, forward" in plots_found[0]["aria-label"]


def test_phone_dark_mode_and_print_are_provided_for(one):
    metas = {m.get("name"): m.get("content") for m in Page(one[1]).all("meta")}
    assert metas["viewport"] == "width=device-width, initial-scale=1" and metas["color-scheme"] == "light dark"
    assert "prefers-color-scheme: dark" in one[1] and "@media print" in one[1] and "max-width: 40rem" in one[1]
    assert "currentColor" in one[1].split("<svg")[1].split("</svg>")[0]
    assert plots.INK not in one[1]


def test_hits_and_misses_show_frames_question_options_and_the_models_text(one):
    text = Page(one[1]).text
    assert "Misses" in text and "Hits" in text and "✓ right answer" in text and "● chosen" in text
    assert "<think>I see it turn.</think>" in text
    assert 6 <= one[1].count("<article>") <= 12
    assert text.count("8 of the") == 0 and len(Page(one[1]).all("img")) >= 8


def test_a_video_that_is_gone_is_a_note_and_not_the_end(place):
    questions = make_questions(12)
    bench = make_bench(place / "no-videos", questions, videos=0)
    make_run(place / "blindfold", bench, questions)
    html.report(place / "blindfold", place / "gone.html")
    page = (place / "gone.html").read_text()
    assert "frames not shown: " in page and not Page(page).all("img")


def test_no_text_from_outside_reaches_the_page_unescaped(evil):
    page = Page(evil)
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "section",
        "ul",
        "ol",
        "li",
        "h1",
        "h2",
        "h3",
        "h4",
        "p",
        "dl",
        "dt",
        "dd",
    }
    allowed |= {
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "b",
        "i",
        "br",
        "span",
        "small",
        "figure",
        "figcaption",
        "article",
        "header",
        "pre",
        "img",
    }
    allowed |= {"details", "summary", "svg", "g", "path", "use", "defs", "text", "clippath", "rect", "pattern"}
    assert {name for name, _ in page.tags} <= allowed
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert all(i["src"].startswith("data:image/") for i in page.all("img"))
    assert "<script>alert(1)</script>" in page.text and "{{ 7*7 }}" in page.text and "onclick" in page.text


def test_control_characters_overrides_and_surrogates_become_visible(evil):
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\ud800-\udfff]", evil)
    assert "⟨U+202E⟩gnp.exe" in evil and "␀␇" in evil and "⟨U+D800⟩" in evil


def test_a_long_text_is_cut_and_the_cut_is_said(place):
    questions = make_questions(2)
    make_run(place / "chatty", place / "walks", questions, said="word " * 2000)
    html.report(place / "chatty", place / "chatty.html")
    page = (place / "chatty.html").read_text()
    assert "8500 more characters are in predictions.jsonl" in page and "word " * 301 not in page


def test_two_runs_stand_side_by_side_with_p_values_corrected(place):
    found = html.report([place / "first", place / "second"], place / "two.html")
    page = Page((place / "two.html").read_text())
    (pair,) = found["comparison"]
    assert (pair["first"], pair["second"]) == ("first", "second") and set(pair["by_task"]) == set(judge.KINDS)
    for part in pair["by_task"].values():
        assert part["p"] <= part["p_holm"] <= 1
    assert (
        "second against first" in page.text
        and "p, Holm" in page.text
        and "tiny → Qwen/Qwen2.5-VL-3B-Instruct" in page.text
    )
    assert [r["name"] for r in found["runs"]] == ["first", "second"]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(page.all("svg")) >= 3 and len(ids) == len(set(ids))


def test_what_report_returns_is_json_and_names_files_that_are_there(one):
    found = one[0]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(Path(p).stat().st_size for p in (found["report"], *found["tables"]))
    with open(found["tables"][0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["category"] for r in rows] == [*judge.KINDS, "overall"]
    assert float(rows[-1]["accuracy"]) == pytest.approx(found["runs"][0]["accuracy"])


def test_the_same_runs_give_the_same_page(one, place):
    html.report([str(place / "first")], place / "again.html")
    assert (place / "again.html").read_text() == one[1]


def test_examples_are_bounded_mixed_over_categories_and_fixed_by_the_seed(place):
    rows = [r for r in judge.load_run(place / "first").rows if r.scored]
    picked = html.pick_examples(rows, 8, seed=3)
    assert {r.question.kind for r in picked} == set(judge.KINDS)
    assert picked == html.pick_examples(rows[::-1], 8, seed=3) != html.pick_examples(rows, 8, seed=4)
    assert html.pick_examples(rows[:2], 8) != [] and html.pick_examples([], 8) == []


def test_bad_use_of_report_gets_one_line(place):
    with pytest.raises(BadUse, match="ends in .html"):
        html.report(place / "first", place / "report.csv")
    with pytest.raises(BadUse, match="no run given"):
        html.report([], place / "report.html")
    with pytest.raises(StkitError, match="no such run folder"):
        html.report(place / "nowhere", place / "report.html")


def test_plots_print_n_and_clusters_and_keep_each_tasks_colour(place):
    scores = judge.load_run(place / "first").scores
    ax = plots.accuracy_plot(scores, Figure().add_subplot())
    words = [t.get_text() for t in ax.texts] + [t.get_text() for t in ax.get_yticklabels()]
    assert words.count("12 / 12") == 8 and "direction, reverse" in words
    assert len(set(plots.TASK_COLOURS.values())) == 4
    figure = plots.runs_plot({"video": scores, "$shuffled_": scores}, Figure())
    assert [panel.get_title() for panel in figure.axes] == list(plots.TASKS)
    assert figure.axes[0].get_yticklabels()[1].get_text() == "$shuffled_"


def test_a_notebook_shows_the_figures_after_the_first_one():
    """The first figure is what turns a notebook's backend on."""
    with matplotlib.rc_context():
        matplotlib.interactive(False)
        with plots.plot_style():
            matplotlib.interactive(True)
        assert matplotlib.is_interactive()


def test_task_colours_are_told_apart_on_paper_and_screen():
    def light(colour: str) -> float:
        linear = [
            (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
            for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in plots.TASK_COLOURS.values():  # WCAG asks 3:1 of graphics, on the light and on the dark page
        for page in ("#fbfaf8", "#14171a"):
            high, low = sorted((light(colour), light(page)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3


def test_a_run_without_an_answer_yet_is_reported_as_no_result(place, recwarn):
    run = make_run(place / "started", place / "walks", make_questions(12))
    (run / "predictions.jsonl").write_text("")
    found = html.report(run, place / "started.html")
    assert found["notices"][1] == "no question was scored: nothing here is a result"
    assert found["runs"][0]["accuracy"] is None and not recwarn.list
    html.report([run, place / "first"], place / "started.html")
    assert "share no scored question" in (place / "started.html").read_text()


def test_a_report_that_cannot_be_written_says_why_in_one_line(place, monkeypatch):
    (place / "file").write_text("x")
    with pytest.raises(StkitError, match="file"):
        html.report(place / "first", place / "file" / "report.html")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "report.html")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StkitError, match="the disk is full") as error:
        html.report(place / "first", place / "full.html")
    assert "\n" not in str(error.value) and not list(place.glob("*full*"))


def test_a_miss_of_the_circular_control_tells_under_how_many_rotations_it_was_right(place):
    questions = [q for q in make_questions(12) if not q.is_open]
    run = make_run(place / "circular", place / "walks", make_questions(12), mode="letter", control="circular")
    rows = []
    for q in questions:
        rotations = [{"parsed": q.answer, "log_probs": []}] * 3 + [{"parsed": (q.answer + 1) % 4, "log_probs": []}]
        said = Prediction(q.id, "letter", "circular", "A", q.answer, False, extra={"rotations": rotations})
        rows.append(row_of(said))
    write_jsonl(run / "predictions.jsonl", rows)
    html.report(run, place / "circular.html")
    assert "✗ miss, right under 3 of 4 rotations of the options" in (place / "circular.html").read_text()
