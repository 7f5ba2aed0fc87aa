"""The model card says what the files say: data, every setting, scores with blind beside them, the command, no more."""

import re

import pytest
import yaml

from stkit.runs import write_json, write_jsonl
from stkit.runtime import StkitError
from stkit.train.card import cell, fenced, model_card, read_scores, table
from stkit.train.reading import all_keys, load_settings

MERGED = {
    "method": "lora", "base": "Qwen/Qwen2.5-VL-3B-Instruct", "family": "qwen2_5_vl", "dtype": "bfloat16",
    "four_bit": True, "adapter": {"rank": 16, "alpha": 32.0, "rslora": False, "targets": ["q_proj"], "saved_whole": []},
    "layers": 144,
    "difference": {"max": 0.00321, "mean": 0.00045, "tokens": 71},
    "original_difference": {"max": 0.777, "mean": 0.0888, "tokens": 71},
    "versions": {}, "command": "stkit merge runs/grpo --out runs/m",
}  # fmt: skip
FULL = MERGED | dict.fromkeys(("four_bit", "adapter", "layers", "difference", "original_difference"))
FULL |= {"method": "full"}
PART = {
    "accuracy": 0.625, "chance": 0.25, "blind": 0.3125, "low": 0.5, "high": 0.75, "n": 64, "clusters": 12,
    "unparsed_rate": 0.0,
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder)
    return folder


def write_config(folder, **changes):
    config = {
        "stage": "grpo", "settings": load_settings("tiny", "grpo").to_dict(), "bench": "/data/walks",
        "model": {"name": MERGED["base"], "untrained": False}, "versions": {"torch": "2.14.1", "peft": "0.21.0"},
        "benchmark": {"questions": 480, "videos": 40, "sha256": "ab" * 32},
        "command": "stkit grpo /data/walks --out run",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(clean_tuples(config | changes)))


def clean_tuples(value):
    if isinstance(value, dict):
        return {k: clean_tuples(v) for k, v in value.items()}
    return [clean_tuples(v) for v in value] if isinstance(value, (list, tuple)) else value


def write_scores(folder, changes=None, **scores):
    blind_less = PART | {"blind": None, "low": None, "high": None, "n": 5, "clusters": 1}
    found = PART | {"by_task": {"direction/forward": PART | {"accuracy": 0.71875}, "landmark/reverse": blind_less}}
    found["by_task"]["route/forward"] = PART | {"accuracy": None, "n": 0}  # by letter it is not asked
    write_json(folder / "scores.json", found | {"notices": ["exploratory: fewer than 10 clusters"]} | scores)
    settings = {"split": "test", "mode": "letter", "control": "none"}
    config = {"settings": settings, "model": {"name": "/runs/m", "adapter": None}}
    write_json(folder / "config.json", config | (changes or {}))
    return folder


def rows_of(card: str, heading: str) -> list[list[str]]:
    """The cells of the rows under a heading's table, its header first."""
    part = card.split(f"\n{heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if "---" not in line]


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_the_front_matter_is_the_hubs_and_claims_no_licence(run):
    found = front(model_card(run, MERGED))
    assert found["base_model"] == MERGED["base"] and found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "video-text-to-text" and "grpo" in found["tags"]
    assert "license" not in found and "That of the base" in model_card(run, MERGED)
    assert "base_model" not in front(model_card(run, MERGED | {"base": "/models/mine"}))


def test_the_data_stand_with_their_hash_split_and_counts(run):
    rows = dict(rows_of(model_card(run, MERGED), "## Data")[1:])
    assert rows["benchmark"] == "/data/walks" and rows["SHA-256"] == "ab" * 32 and rows["split"] == "train"
    assert rows["questions"] == "480" and rows["videos"] == "40"
    write_config(run, settings={}, benchmark={})
    rows = dict(rows_of(model_card(run, MERGED), "## Data")[1:])
    assert rows == {"benchmark": "/data/walks", "SHA-256": "not recorded", "split": "not recorded"}


def test_counts_in_groups_the_bases_revision_and_the_frames_shown_are_told(run):
    revision = "66285546d2b821cf421d4f5eb2576359d3770cd3"
    write_config(run, benchmark={"counts": {"direction": 4}}, model={"name": MERGED["base"], "revision": revision})
    card = model_card(run, MERGED)
    assert ["counts.direction", "4"] in rows_of(card, "## Data") and f"(revision {revision})" in card
    write_config(run, shown={"frames": 16}, processes=2)
    card = model_card(run, MERGED)
    assert "revision" not in card and rows_of(card, "## Method")[-2:] == [["shown.frames", "16"], ["processes", "2"]]


def test_every_setting_and_version_and_both_commands_are_there(run):
    card = model_card(run, MERGED)
    named = {row[0].replace("\\", "") for row in rows_of(card, "## Method")[1:]}
    settings = {key for key in all_keys() if key != "rewards"} | {f"rewards.{name}" for name in ("correct", "format", "timeline")}
    assert named == settings
    assert ["data.limit", "null"] in rows_of(card, "## Method")
    assert ["data.split", "train"] in rows_of(card, "## Method")
    assert ["grpo.group", "8"] in rows_of(card, "## Method") and "Versions: peft 0.21.0, torch 2.14.1." in card
    assert "```text\nstkit grpo /data/walks --out run\nstkit merge runs/grpo --out runs/m\n```" in card


def test_what_a_merge_loses_is_said_beside_what_the_other_way_would(run):
    rows = rows_of(model_card(run, MERGED), "## Weights")
    assert rows[1] == ["this model", "0.0032", "0.00045", "71"]
    assert rows[2] == ["the adapter on the original 16-bit base (not this model)", "0.78", "0.089", "71"]
    plain = rows_of(model_card(run, MERGED | {"four_bit": False, "original_difference": None}), "## Weights")
    assert len(plain) == 2 and "NF4" not in str(plain)
    assert "nothing is lost" in model_card(run, FULL)


def test_an_accuracy_has_its_blind_score_interval_n_and_clusters_beside_it(run, tmp_path):
    folder = tmp_path / "eval"
    folder.mkdir()
    card = model_card(run, MERGED, read_scores([write_scores(folder)]))
    header, total, direction, landmark = rows_of(card, "## Scores")
    assert header[3:9] == ["accuracy", "95 % interval", "blind", "chance", "n", "clusters"]
    assert total[:3] == ["/runs/m (eval)", "test, letter, control none", "all multiple choice"]
    assert total[3:] == ["62.5 %", "50.0 % to 75.0 %", "31.2 %", "25.0 %", "64", "12", "0.0 %"]
    assert direction[2:4] == ["direction/forward", "71.9 %"]
    assert landmark[4:9] == ["undefined", "not run", "25.0 %", "5", "1"]
    assert "eval: exploratory: fewer than 10 clusters" in card


def test_two_evaluations_stand_under_each_other_by_model(run, tmp_path):
    for name, model in (("base", {"name": MERGED["base"]}), ("ours", {"name": MERGED["base"], "adapter": "/runs/a"})):
        (tmp_path / name).mkdir()
        write_scores(tmp_path / name, {"model": model})
    card = model_card(run, MERGED, read_scores([tmp_path / "base", tmp_path / "ours"]))
    names = {row[0] for row in rows_of(card, "## Scores")[1:]}
    assert names == {f"{MERGED['base']} (base)", f"{MERGED['base']} + adapter /runs/a (ours)"}


def test_what_was_not_evaluated_is_called_so(run):
    card = model_card(run, MERGED)
    assert "Not evaluated" in card and "taken while training" not in card and "Last update" not in card


def test_figures_of_the_run_are_its_last_update_and_its_best_score(run):
    last = {"step": 2, "reward": 0.75, "loss": 0.123456, "kl": None}
    write_jsonl(run / "metrics.jsonl", [{"step": 1, "reward": 0.1}, last])
    told = {"blind": 0.3125, "chance": 0.25, "n": 64, "clusters": 12, "unparsed": 0.5}
    scores = [(5, 0.5, 0.4, 0.6), (10, 0.7, 0.6, 0.8), (15, 0.65, 0.5, 0.8)]
    write_jsonl(run / "scores.jsonl", [dict(zip(("step", "accuracy", "low", "high"), s)) | told for s in scores])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')  # a run under way is being read: its file stays as it is
    before = (run / "metrics.jsonl").read_bytes()
    card = model_card(run, MERGED)
    assert "Last update recorded: step 2, loss 0.1235, reward 0.75." in card
    assert "| best, step 10 | 70.0 % | 60.0 % to 80.0 % | 31.2 % | 25.0 % | 64 | 12 | 50.0 % |" in card
    assert "| last, step 15 | 65.0 % | 50.0 % to 80.0 % | 31.2 % |" in card
    assert (run / "metrics.jsonl").read_bytes() == before


def test_untrained_weights_of_the_base_are_told_first(run):
    assert "untrained" not in model_card(run, MERGED).split("## Data")[0]
    write_config(run, model={"name": "tiny", "untrained": True})
    assert "untrained weights" in model_card(run, MERGED | {"base": "tiny"}).split("## Data")[0]


def test_text_from_files_cannot_break_out_of_its_place(run):
    nasty = "a | b\n## Not a heading <script>x</script> [l](http://x) `c` *d*"
    write_config(run, bench=nasty, command="stkit ``` x\n```\n# y")
    card = model_card(run, MERGED)
    value = dict(rows_of(card, "## Data")[1:])["benchmark"]
    assert r"a \| b \#\# Not a heading &lt;script&gt;" in value and r"\[l\](http" in value
    assert "````text\nstkit ``` x\n```\n# y\n" in card and "<script>" not in card
    assert len(rows_of(card, "## Data")) == 6 and "\n## Not" not in card


def test_tables_and_fences_keep_their_shape():
    assert table(("a", "b"), [(1, "x|y")]) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"
    assert fenced("a````b").startswith("`````text") and cell(" a\n b ") == "a b"


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda folder: None, "no scores.json"),
        (lambda folder: write_json(folder / "scores.json", PART), "no config.json"),
        (lambda folder: [write_json(folder / f"{n}.json", {}) for n in ("scores", "config")], "not the scores of"),
    ],
)  # fmt: skip
def test_a_folder_without_finished_scores_is_refused(tmp_path, write, words):
    write(tmp_path)
    with pytest.raises(StkitError, match=words):
        read_scores([tmp_path])
