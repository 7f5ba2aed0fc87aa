"""The page on a training run: its first line says how it went, what changes has a curve, and nothing breaks it."""

import csv
import hashlib
import json
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import pandas as pd
import pytest
from benchmaker import make_questions, write_bench
from matplotlib.figure import Figure
from test_report import EVIL, Page, make_bench, make_run
from test_report import make_questions as asked_questions

from stkit import cli, grpo
from stkit.bench.schema import load_benchmark, row_of
from stkit.reporting.curves import caption, named, panels
from stkit.reporting.html import report
from stkit.reporting.training import pick_groups, training_plot
from stkit.runs import read_yaml, to_json, write_json, write_jsonl, write_yaml
from stkit.runtime import BadUse, StkitError
from stkit.train.run import Run, open_run

KEYS = ("loss", "reward", "kl", "entropy", "lr", "grad_norm", "clip_fraction", "length", "finished", "reward_correct")
NONE: dict = {"reward": None, "kl": None, "clip_fraction": None}


def row(step: int, **changes) -> dict:
    """A row of GRPO's metrics.jsonl in which every curve changes from step to step."""
    found = {"step": step} | {name: (k + 1) * step / 100 for k, name in enumerate(KEYS)}
    found |= {"reward_format": 1.0, "reward_std": step / 7, "tokens": 100, "learned_tokens": 10, "seconds": 2.0}
    found |= {"groups": 4, "skipped_groups": 1, "rollouts": 16, "update": 0, "epoch": step / 8}
    return found | {"finished": 0.6 + step / 100} | changes


def rollout(step: int, name: str, reward: float, text: str = "", advantage: float = 0.0) -> dict:
    parts = {"correct": reward, "format": None}
    return {"step": step, "id": name, "text": text or f"said {reward:g} at {step}", "rewards": parts, "reward": reward,
            "advantage": advantage, "tokens": 9, "finished": True, "ids": [1] * 9, "log_probs": [-1.0] * 9}  # fmt: skip


def score(step: int, accuracy: float | None, low: float | None = 0.30, **changes) -> dict:
    found = {"step": step, "accuracy": accuracy, "low": low, "high": 0.75, "blind": 0.27, "chance": 0.25}
    return found | {"n": 64, "clusters": 12, "unparsed": 0.0} | changes


def make(folder: Path, rows=(), scores=(), rollouts=(), stage="grpo", done=True, bench="gone", steps=4, **train):
    """A training run's folder as ``stkit grpo`` leaves it."""
    settings = {"train": {"steps": steps, "epochs": 1.0, "lr": 1e-4} | train, "grpo": {"max_new_tokens": 24}}
    write_yaml(folder / "config.yaml", {
        "stage": stage, "settings": settings, "bench": str(bench), "functions": {}, "model": {"name": "runs/sft/model"},
        "versions": {"torch": "2.14.1"}, "benchmark": {"questions": 18, "sha256": "0f3a"},
        "command": f"stkit {stage} walks --out x",
    })  # fmt: skip
    for name, found in (("metrics", rows), ("scores", scores), ("rollouts", rollouts)):
        if found:
            write_jsonl(folder / f"{name}.jsonl", found)
    if Path(bench).is_dir():
        texts = {question.id: to_json(row_of(question)) for question in load_benchmark(bench).questions}
        hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        write_json(folder / "files.json", {"questions": hashes, "videos": {}})
    if done:
        (folder / "model").mkdir()
    return folder


def run_of(metrics, scores=(), rollouts=()) -> Run:
    """A run from tables that are on no disk."""
    return Run(Path("run"), {"stage": "grpo"}, pd.DataFrame(metrics), pd.DataFrame(rollouts), pd.DataFrame(scores))


def page_of(*runs, out: Path) -> tuple[dict, str]:
    found = report(list(runs), out)
    return found, out.read_text()


def first_line(source: str) -> str:
    return Page(source.split("<main>")[1].split("</p>")[0]).text.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def one(folder):
    """Four steps, the last after a resumption; two scores; groups of two questions at the first and the last step."""
    rows = [row(1), row(2, skipped_groups=4), row(3, resumed_from_step=2), row(4)]
    rollouts = []
    for step in (1, 4):
        for name, gain in (("a-direction-forward", 0.0), ("b-direction-forward", 0.5)):
            rollouts += [rollout(step, name, 0.0, advantage=-gain), rollout(step, name, 1.0, advantage=gain)]
    bench = write_bench(folder / "bench")
    run = make(folder / "one", rows, [score(2, 0.5), score(4, 0.4)], rollouts, bench=bench)
    return page_of(run, out=folder / "one.html")


def test_the_first_line_says_how_it_went(one):
    assert first_line(one[1]) == (
        "grpo: steps 4 of 4; finished; loss 0.01 → 0.04; reward 0.02 → 0.08; best score 50.0 % at step 2 (30.0 to 75.0"
        "; blind 27.0, chance 25.0; n 64, 12 clusters; the best of 2)"
    )


def test_what_was_run_stands_there_with_command_settings_model_versions_and_benchmark(one):
    text = Page(one[1].split("<h3>Record</h3>")[1]).text
    for word in ("runs/sft/model", "2.14.1", "0f3a", "train", "0.0001", "stkit grpo walks --out x"):
        assert word in text
    assert "stkit grpo walks --out x" in one[1].split("<h3>Told as numbers</h3>")[0]


def test_the_page_is_one_file_without_script_or_network_that_looks_as_the_evaluations(one, folder):
    page, source = Page(one[1]), one[1]
    assert not any(page.all(tag) for tag in ("script", "link", "iframe", "img"))
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    assert not re.search(r"https?://(?!www\.w3\.org)|@import", source)
    template = (Path(cli.__file__).parent / "reporting" / "report.html").read_text()
    assert ".notices li.calm" in template and ".notices li.calm" in source and "{{" not in source and "{%" not in source
    pictures = [svg for svg in page.all("svg") if svg["role"] == "img"]
    assert len(pictures) == len(page.all("svg")) == one[0]["plots"] and "loss over steps: " in pictures[0]["aria-label"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for svg in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL):
        xml.fromstring(svg.replace("xlink:href", "href"))


def test_each_curve_has_axes_with_names_and_the_reward_has_its_parts():
    run = run_of([row(1), row(2), row(3, reward_format=0.5)], [score(1, 0.3), score(3, 0.5)])
    figure = training_plot(run, Figure())
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert labels == ["loss", "reward", "KL, nats a token", "entropy, nats a token", "length, tokens",
                      "rollouts ended, %", "clipped tokens, %", "gradient norm", "learning rate", "accuracy, %"]  # fmt: skip
    assert {ax.get_xlabel() for ax in figure.axes} == {"step"}
    legends = {ax.get_ylabel(): ax.get_legend().get_texts() for ax in figure.axes if ax.get_legend()}
    told = {label: [text.get_text() for text in texts] for label, texts in legends.items()}
    assert told == {"reward": ["reward", "correct", "format"], "accuracy, %": ["accuracy", "blind", "chance"]}
    finished = figure.axes[5].lines[0]
    assert finished.get_ydata() == pytest.approx([61, 62, 63]) and list(finished.get_xdata()) == [1, 2, 3]
    (whiskers,) = figure.axes[-1].collections
    assert [list(end) for end in whiskers.get_segments()[0][:, 1:].T] == [[30.0, 75.0]]


def test_lines_are_told_apart_without_colour(folder):
    runs = [make(folder / f"grey{k}", [row(s, loss=s * k) for s in (1, 2, 3)]) for k in range(1, 6)]
    lines = training_plot(runs, Figure()).axes[0].lines
    looks = {(line.get_linestyle(), str(line._unscaled_dash_pattern), line.get_marker()) for line in lines}
    assert len(lines) == len(looks) == 5


def test_what_stays_the_same_or_is_absent_is_told_as_a_number_and_has_no_curve(folder):
    rows = [row(s, lr=5e-6, kl=None, reward_format=None) for s in (1, 2, 3)]
    found, source = page_of(make(folder / "constant", rows), out=folder / "constant.html")
    told = Page(source.split("<h3>Told as numbers</h3>")[1].split("<h3>")[0]).text
    assert "learning rate5e−06 at all 3 steps that have one" in told
    assert "not recorded" in told and told.index("KL, nats a token") > told.index("not recorded")
    labels = [svg["aria-label"].split(" over")[0] for svg in Page(source).all("svg")]
    assert "learning rate" not in labels and "KL, nats a token" not in labels and "reward" in labels
    assert found["plots"] == len(labels)
    assert "6 s in all, 2 s a step" in told and "48 in 12 groups, 3 of them skipped" in told


def test_means_over_learned_tokens_have_no_number_where_nothing_was_learned(folder):
    rows = [row(1), row(2, learned_tokens=0, kl=0.0, entropy=0.0, clip_fraction=0.0, skipped_groups=4), row(3)]
    found, _ = page_of(make(folder / "flat", rows), out=folder / "flat.html")
    (notice,) = found["notices"]
    assert notice.startswith("all rewards equal in every group at 1 of 3 batches (steps 2): nothing was learned")
    kl = next(panel for panel in panels(named(folder / "flat")) if panel.label.startswith("KL"))
    assert list(kl.lines["flat"].isna()) == [False, True, False]


def test_several_updates_of_one_batch_count_its_groups_once(folder):
    rows = [row(s, update=(s - 1) % 2, skipped_groups=4 * (s > 2)) for s in (1, 2, 3, 4)]
    found, source = page_of(make(folder / "updates", rows), out=folder / "updates.html")
    assert "32 in 8 groups, 4 of them skipped" in source
    assert "at 1 of 2 batches (steps 3)" in found["notices"][0]


def test_a_resumption_is_told_and_marked(one, folder):
    assert "from step 2, at step 3" in one[1] and "Dotted uprights: the run was resumed there." in one[1]
    loss = training_plot(folder / "one", Figure()).axes[0]
    assert [list(line.get_xdata()) for line in loss.lines if len(line.get_xdata()) == 2] == [[2.5, 2.5]]


def test_groups_are_read_side_by_side_with_question_reward_by_part_and_advantage_sorted(one):
    assert len(re.findall(r"<h4>Step [14]</h4>", one[1])) == 2
    early = one[1].split("<h4>Step 1</h4>")[1].split("<h4>Step 4</h4>")[0]
    text = Page(early).text
    assert text.index("b-direction-forward") < text.index("a-direction-forward")  # the one with an advantage first
    assert early.index("said 1 at 1") < early.index("said 0 at 1")
    assert "reward 1 (correct 1, format –) · advantage +0.5 · 9 tokens, ended by itself" in text
    assert "Which direction forward?" in text and "✓ right answer" in text and "right, left" in text


def test_questions_asked_at_both_steps_come_first_whatever_order_they_were_drawn_in():
    early = [rollout(1, name, 0.0) for name in "abcd"]
    late = [rollout(9, name, 1.0, advantage=1.0) for name in "efgd"]
    picked = pick_groups(run_of([row(1)], rollouts=early + late), 2)
    assert [(groups[0][0]["id"], total) for groups, total in picked.values()] == [("d", 4), ("d", 4)]


def test_a_question_that_was_edited_since_or_a_benchmark_that_is_gone_is_said_and_not_shown(folder):
    bench, name = folder / "bench", "a-direction-forward"
    run = make(folder / "edited", [row(1)], rollouts=[rollout(1, name, 1.0)], bench=bench)
    write_json(run / "files.json", {"questions": {name: "another"}})
    _, source = page_of(run, out=folder / "edited.html")
    assert "edited since are shown by their ids alone" in source and "Which direction forward?" not in source
    run = make(folder / "alone", [row(1)], rollouts=[rollout(1, name, 1.0)], bench=folder / "nowhere")
    assert "texts are not shown: " in page_of(run, out=folder / "alone.html")[1]


def test_text_of_rollouts_questions_and_names_is_escaped(folder):
    long = EVIL + "word " * 400
    run = make(folder / "<b onclick=x>_$x$", [row(1), row(2)], rollouts=[rollout(1, EVIL, 1.0, text=long)], bench=EVIL)
    second = make(folder / "_b", [row(1), row(2)], note=EVIL)
    found, source = page_of(run, second, out=folder / "evil.html")
    page = Page(source)
    assert not page.all("script") and not page.all("img")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text and "{{ 7*7 }}" in page.text and "\x00" not in source
    assert "more characters are in rollouts.jsonl" in source and "⟨U+202E⟩" in source
    assert [r["name"] for r in found["runs"]] == ["<b onclick=x>_$x$", "_b"]
    assert re.findall(r"<text[^>]*>(?:&lt;b onclick=x&gt;_\$x\$|_b)</text>", source)


def test_several_runs_share_their_axes_with_a_legend_and_their_differences_are_listed(folder):
    runs = [make(folder / "slow", [row(1), row(2)], [score(1, 0.3), score(2, 0.4)]),
            make(folder / "_fast", [row(s, loss=-s) for s in (1, 2, 3)], lr=3e-4, done=False)]  # fmt: skip
    found, source = page_of(*runs, out=folder / "both.html")
    assert found["differs"] == [["settings.train.lr", ["0.0001", "0.0003"]]]
    assert "In this order: slow → _fast." in source and "0.0001 → 0.0003" in source
    loss = training_plot(runs, Figure()).axes[0]
    assert [list(line.get_ydata()) for line in loss.lines] == [[0.01, 0.02], [-1, -2, -3]]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["slow", "_fast"]
    assert first_line(source).startswith("slow: grpo: steps 2 of 4; finished")
    assert "_fast: grpo: steps 3 of 4; not finished: under way or stopped" in source
    with open(found["tables"][0], newline="") as file:
        table = list(csv.DictReader(file))
    assert [(r["run"], r["step"], r["loss"]) for r in table[::4]] == [("slow", "1", "0.01"), ("_fast", "3", "-3.0")]


def test_an_evaluation_and_a_training_run_share_a_page(folder):
    trained = make(folder / "learner", [row(1), row(2, loss=0.5)], rollouts=[rollout(1, "a", 1.0)])
    questions = asked_questions(2)
    evaluated = make_run(folder / "asked", make_bench(folder / "asked-walks", questions, videos=0), questions)
    found = report([trained, evaluated], folder / "mixed.html")
    source = Path(found["report"]).read_text()
    assert [run["name"] for run in found["runs"]] == ["asked"] and found["comparison"] == []
    before, after = source.split("<h2>Training</h2>")
    drawn = report(trained, folder / "learner.html")["plots"]
    assert "grpo: steps 2 of 4" in after and "<h3>Rollouts</h3>" in after and after.count("<figure><svg") == drawn > 0
    assert "<h3>Rollouts</h3>" not in before and questions[0].question in before
    assert "<h2>Training</h2>" not in Path(report(evaluated, folder / "asked.html")["report"]).read_text()


def test_training_runs_of_two_stages_are_refused_with_what_to_do(folder):
    trained = make(folder / "grpo-run", [row(1)])
    taught = make(folder / "sft-run", [row(1, **NONE)], stage="sft")
    with pytest.raises(BadUse, match="grpo-run is of grpo and sft-run is of sft: .* report them apart"):
        report([trained, taught], folder / "mixed.html")


@pytest.mark.parametrize(
    ("rows", "said", "drawn"),
    [
        ([], "steps 0 of 4; not finished: under way or stopped; no score was taken", 0),
        ([row(1)], "steps 1 of 4; not finished: under way or stopped; loss 0.01 → 0.01; reward 0.02 → 0.02", 0),
        ([row(1, loss=None), row(2, loss=0.5)], "loss 0.5 → 0.5", 8),
        ([row(1) | dict.fromkeys(KEYS), row(2) | dict.fromkeys(KEYS)], "steps 2 of 4", 0),
        ([{"step": 1}, {"step": 4}], "steps 4 of 4; all steps are done, no result is in its folder; no score", 0),
    ],
)
def test_a_run_under_way_or_with_next_to_nothing_is_told_as_what_it_is(tmp_path, rows, said, drawn, recwarn):
    run = make(tmp_path / "run", rows, done=False)
    if rows:
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 9, "lo')
    found, source = page_of(run, out=tmp_path / "run.html")
    assert said in first_line(source) and found["plots"] == drawn
    assert training_plot(run, Figure()) and not recwarn.list
    assert ("no step is done yet: nothing here is a result" in found["notices"]) is (not rows)
    if rows:  # the half-written line is left for the process that writes it
        assert (run / "metrics.jsonl").read_text().endswith('{"step": 9, "lo')


def test_numbers_that_are_missing_are_said_and_break_the_line(tmp_path):
    run = make(tmp_path / "run", [row(s) for s in range(1, 7)])
    text = (run / "metrics.jsonl").read_text().splitlines()
    for k, value in ((1, "NaN"), (2, "Infinity"), (4, "null")):
        text[k] = re.sub(r'"loss": [\d.]+', f'"loss": {value}', text[k])
    del text[5 - 2]
    (run / "metrics.jsonl").write_text("\n".join(text) + "\n")
    found, _ = page_of(run, out=tmp_path / "run.html")
    told = ["metrics.jsonl has no row of steps 4", "loss: no number at 3 of 5 steps (2 to 3, 5)"]
    assert found["notices"] == told
    assert json.loads(json.dumps(found, allow_nan=False))["runs"][0]["loss"] == {"first": 0.01, "last": 0.06}


def test_notices_say_why_a_score_or_a_run_may_say_little(tmp_path):
    rows = [row(1, finished=0.4), row(2, finished=0.25, max_tokens=4096)]
    run = make(tmp_path / "run", rows, [score(1, 0.3, low=0.2, clusters=3), score(2, None, low=None)])
    found, source = page_of(run, out=tmp_path / "run.html")
    assert found["notices"] == [
        "memory ran out: from step 2 on train.max_tokens was 4096",
        "only 25 % of the last step’s rollouts ended within grpo.max_new_tokens=24",
        "the best score’s interval reaches the blind score: it does not show that the video is used",
        "only 3 clusters were scored: the interval is rough",
    ]
    assert all(notice in Page(source).text for notice in found["notices"])


@pytest.mark.parametrize("stage, epoch, told", [("grpo", 20.0, True), ("grpo", 4.9, False), ("sft", 20.0, False)])
def test_rewards_on_the_same_clips_again_and_again_come_with_a_notice(tmp_path, stage, epoch, told):
    run = make(tmp_path / "run", [row(1), row(2, epoch=epoch)])
    config = read_yaml(run / "config.yaml")
    write_yaml(run / "config.yaml", config | {"stage": stage})
    found, _ = page_of(run, out=tmp_path / "run.html")
    assert [notice for notice in found["notices"] if "every clip was learned from 20 times" in notice] == found["notices"]
    assert bool(found["notices"]) is told


def test_many_points_get_a_mean_over_them_and_the_caption_says_so(tmp_path):
    run = make(tmp_path / "run", [row(s, loss=float(s % 2)) for s in range(1, 201)])
    thin, mean = training_plot(run, Figure()).axes[0].lines[:2]
    assert set(thin.get_ydata()) == {0.0, 1.0} and abs(mean.get_ydata()[100] - 0.5) <= 0.1
    assert "the mean over 10 steps" in caption(named(run))


def test_steps_by_epochs_are_told_with_the_epoch(tmp_path):
    _, source = page_of(make(tmp_path / "run", [row(1), row(2)], steps=None, done=False), out=tmp_path / "run.html")
    assert first_line(source).startswith("grpo: steps 2, epoch 0.25 of 1.0; not finished")


def test_a_line_that_is_no_row_and_a_folder_that_is_no_run_are_refused_by_name(tmp_path):
    run = make(tmp_path / "run", [row(1)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"loss": 1}\n')
    with pytest.raises(StkitError, match=r"metrics.jsonl:2: not a row with a step"):
        report(run, tmp_path / "run.html")
    (run / "config.yaml").write_text("- a list\n")
    with pytest.raises(StkitError, match="no stage in it: give the folder that"):
        report(run, tmp_path / "run.html")


def test_a_real_run_is_reported_from_the_command_line(tmp_path, capsys):
    def wordy(rollouts):
        return [len(r.text) % 3 for r in rollouts]

    bench = write_bench(tmp_path / "bench", [q for q in make_questions() if q.task == "direction"])
    small = {"data.split": "train", "data.tasks": ["direction"], "grpo.group": 3, "grpo.max_new_tokens": 5}
    small |= {"train.batch": 1}
    scored = {"train.steps": 2, "train.eval_every": 1, "train.eval_split": "test", "train.eval_tokens": 4}
    run = grpo(
        bench, "tiny-untrained", out=tmp_path / "run", progress=False,
        overrides=small | scored, rewards={"wordy": wordy},
    )  # fmt: skip
    assert cli.run(["report", str(run.out), "--out", str(tmp_path / "run.html"), "--json"]) == 0
    found, source = json.loads(capsys.readouterr().out), (tmp_path / "run.html").read_text()
    assert set(found) >= {"report", "tables", "plots"} and found["plots"] == source.count("<svg") > 0
    told = found["runs"][0]
    assert (told["steps"], told["asked"], told["result"]) == (2, 2, str(run.model)) and told["best"]["n"] == 2
    assert told["reward"]["last"] == pytest.approx(open_run(run.out).metrics["reward"].iloc[-1])
    assert "wordy" in source and "Which direction" in source and "return [len(r.text)" in source
