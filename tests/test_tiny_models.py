"""From a recipe of a few steps to three folders that load, their scores and their cards: the whole path, small."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from teammaker import run_team

from stkit import cli
from stkit.bench.schema import load_benchmark
from stkit.evaluation import UNTAUGHT, evaluate
from stkit.runs import read_json, write_yaml
from stkit.runtime import BadUse, StkitError, commit
from stkit.tiny import cards, scores, ship
from stkit.tiny.recipe import train_tiny
from stkit.tiny.stages import load_recipe
from stkit.train.run import read_rows
from stkit.vlm import tiny
from stkit.vlm.load import load_model

torch.set_num_threads(1)
SHORT = 12  # tokens of an answer here
CHOICE = ["direction", "landmark", "action"]
STAGE = {"steps": 2, "walks": 2, "per_walk": 1, "lr": 1e-3, "tasks": CHOICE}
RECIPE = {
    "films": 2, "shifts": [0, 2], "told": 2, "dev": 1,
    "stages": {"recall": {"lesson": "recall", **STAGE}, "answer": {"lesson": "answer", **STAGE, "told": 1, "keep_every": 1},
               "polish": {"lesson": "answer", **STAGE, "steps": 1}},
    "grpo": {"train.steps": 1, "grpo.group": 2, "grpo.max_new_tokens": SHORT, "data.tasks": CHOICE, "data.per_clip": 1,
             "train.batch": 2, "lora.rank": 2, "rewards.chain": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "micro.yaml"
    write_yaml(path, RECIPE)
    return path


def train_together(out, recipe):
    """One of the processes that share the training; the rest of the command is for one alone."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    ship.MAX_NEW_TOKENS = SHORT
    with pytest.raises(BadUse, match="2 processes share the training only: give until='grpo'"):
        train_tiny(out, recipe, seed=3)
    found = train_tiny(out, recipe, seed=3, until="grpo", progress=False)
    assert list(found) == ["stages"] and found["stages"]["grpo"] == out / "grpo"


def learn_something(adapter: Path) -> None:
    """Other weights for an adapter that no reward has moved."""
    torch.manual_seed(0)
    save_file({name: 0.1 * torch.randn_like(value) for name, value in load_file(adapter).items()}, adapter)


@pytest.fixture(scope="module")
def made(recipe):
    """Trained by two processes, and made whole by the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ship, "MAX_NEW_TOKENS", SHORT)
        out = recipe.parent / "made"
        team = run_team(recipe.parent / "team", train_together, out, recipe)
        assert [code for code, _ in team] == [0, 0], team
        assert len(read_rows(out / "grpo" / "metrics.jsonl")) == 1 and not (out / "tiny").exists()
        learn_something(out / "grpo" / "adapter" / "adapter_model.safetensors")
        assert cli.run(["tiny", "train", "--out", str(out), "--recipe", str(recipe), "--seed", "3"]) == 0
        return train_tiny(out, recipe, seed=3, progress=False)  # all is there already


def test_three_folders_come_out_that_load_with_how_they_were_made(made, recipe):
    assert set(made["models"]) == set(tiny.SHIPPED) and list(made["stages"]) == ["recall", "answer", "polish"]
    for name, folder in made["models"].items():
        record = load_model(folder, device="cpu").record
        manifest = read_json(folder / "manifest.json")
        assert record["manifest"] == {k: manifest[k] for k in ("commit", "seed", "sha256")} and not record["untrained"]
        assert (manifest["name"], manifest["seed"], manifest["told"]["walks"]) == (name, 3, 2)
        bench = load_benchmark(recipe.parent / "made" / "walks")
        assert manifest["benchmark"]["hash"] == bench.info["hash"] and {c.split for c in bench.clips} == {"train"}
        assert made["scores"][name]["n"] > 0 and name in ship.told(made)
        assert list(manifest["stages"]) == ["recall", "answer", "polish", "grpo"]
        assert manifest["cold"] in ({"stage": "answer", "update": 1}, {"stage": "answer", "update": 2})
        for stage, told in manifest["stages"].items():
            rows = read_rows(recipe.parent / "made" / stage / "metrics.jsonl")
            assert told == {"commit": commit(), "minutes": round(sum(row["seconds"] for row in rows) / 60, 1)}


def test_json_of_the_command_tells_the_command_and_the_scores(made, recipe, monkeypatch, capsys):
    monkeypatch.setattr(ship, "MAX_NEW_TOKENS", SHORT)
    command = ["tiny", "train", "--out", str(recipe.parent / "made"), "--recipe", str(recipe), "--seed", "3", "--json"]
    monkeypatch.setattr("sys.argv", ["stkit", *command])
    assert cli.run(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == shlex.join(["stkit", *command]) and found["commit"] == commit()
    assert found["scores"] == json.loads(json.dumps(made["scores"])) and set(found["models"]) == set(tiny.SHIPPED)


def test_cold_is_one_of_the_copies_kept_on_the_way_and_tiny_the_end_of_the_last_stage(made):
    def weights(folder):
        return {name: value.half() for name, value in load_model(folder, device="cpu").model.state_dict().items()}

    def same(one, two):
        return all(torch.equal(value, two[name]) for name, value in one.items())

    stage = made["stages"]["answer"]
    kept = sorted((stage / "kept").iterdir())
    shipped = {name: weights(folder) for name, folder in made["models"].items()}
    assert [path.name for path in kept] == ["00001", "00002"]
    assert sum(same(shipped["tiny-cold"], weights(path)) for path in kept) == 1
    assert same(shipped["tiny"], weights(made["stages"]["polish"] / "model")) and same(weights(stage / "model"), weights(kept[1]))
    assert not any(same(shipped["tiny"], weights(path)) for path in kept)
    cold = next(path for path in kept if same(shipped["tiny-cold"], weights(path)))
    by_peft = PeftModel.from_pretrained(load_model(cold, device="cpu").model, stage.parent / "grpo" / "adapter").merge_and_unload()
    assert all(torch.allclose(shipped["tiny-r1"][k], v.half(), atol=1e-3) for k, v in by_peft.state_dict().items())
    assert not same(shipped["tiny-cold"], shipped["tiny-r1"])


def test_cold_is_the_first_copy_in_the_range_or_the_nearest(monkeypatch, tmp_path):
    told = {"a": 0.35, "b": 0.57, "c": 0.9}
    monkeypatch.setattr(ship, "accuracy", lambda model, *_: {"accuracy": told[model.name]})
    assert ship.pick_cold([Path("a"), Path("b"), Path("c")], tmp_path, tmp_path) == (Path("b"), 0.57)
    assert ship.pick_cold([Path("a"), Path("c")], tmp_path, tmp_path) == (Path("a"), 0.35)  # 0.25 off, 0.3 off
    with pytest.raises(StkitError, match="set keep_every"):
        ship.pick_cold([], tmp_path, tmp_path)


@pytest.fixture(scope="module")
def scored(made):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "MAX_NEW_TOKENS", SHORT)
        out = made["stages"]["answer"].parents[1] / "scored"
        models = [str(made["models"][name]) for name in ("tiny", "tiny-r1")]
        return scores.score_tiny(out, clips=1, seed=8, models=models, progress=False), out


def test_scores_have_blind_and_interval_beside_and_each_way_of_asking(scored, made):
    found, out = scored
    assert found == read_json(out / "scores.json")
    for name, ways in found["models"].items():
        assert list(ways) == ["in", "ood", "blind", "shuffled", "reversed"]
        assert ways["in"]["blind"] is not None and ways["in"]["n"] == ways["shuffled"]["n"] > 0
        assert {"low", "high", "clusters", "by_task", "route"} <= set(ways["in"])
        assert found["weights"][name] == read_json(Path(name) / "manifest.json")["sha256"]
    assert [pair["models"] for pair in found["comparisons"]] == [list(found["models"])]
    assert found["comparisons"][0]["overall"]["clusters"] == 1
    assert len(scores.text(found).splitlines()) == 1 + 2 * 5
    assert any("a small model that ships" in said for said in read_json(out / "tiny" / "in" / "scores.json")["notices"])
    splits = {clip.split for name in ("in", "ood") for clip in load_benchmark(out / name).clips}
    assert splits == {"test"}


def test_letters_alone_come_with_the_notice_that_they_were_never_taught(scored, made):
    _, out = scored
    found = evaluate(out / "in", made["models"]["tiny"], out / "letters", limit=1, progress=False)
    assert UNTAUGHT in found.scores["notices"]
    assert UNTAUGHT not in read_json(out / "tiny" / "in" / "scores.json")["notices"]


def test_what_cannot_be_scored_is_refused_before_anything_is_filmed(tmp_path):
    with pytest.raises(BadUse, match="each of another name"):
        scores.score_tiny(tmp_path / "x", models=["a/model", "b/model"])
    with pytest.raises(StkitError, match="nowhere.*no such folder"):
        scores.score_tiny(tmp_path / "x", models=["nowhere"])
    assert not (tmp_path / "x").exists()


def test_a_card_says_what_the_scores_say(scored, made, monkeypatch, tmp_path):
    found = json.loads(json.dumps(scored[0]).replace(f'{made["models"]["tiny"]}"', 'tiny"').replace(
        f'{made["models"]["tiny-r1"]}"', 'tiny-r1"'))  # fmt: skip
    data = tmp_path / "data"
    for name in ("tiny", "tiny-r1"):
        shutil.copytree(made["models"][name], data / name)
    monkeypatch.setattr(tiny, "folder", lambda name: data / name)
    (tmp_path / "scores.json").write_text(json.dumps(found))
    written = cards.write_cards(tmp_path / "scores.json", tmp_path / "cards")
    assert {path.name for path in written} == {"README.md", "tiny.md", "tiny_r1.md"}
    text = (tmp_path / "cards" / "tiny_r1.md").read_text()
    accuracy = f"{100 * found['models']['tiny-r1']['in']['accuracy']:.1f}"
    assert f"| in distribution | {accuracy} |" in text and "Then GRPO" in text and found["weights"]["tiny-r1"] in text
    assert "| no frames, thinking |" in text and 'the row "no frames, thinking" is with one' in text
    manifest = read_json(data / "tiny" / "manifest.json")
    assert "\n\nIn two sittings.\n" in cards.card("tiny", manifest | {"note": "In two sittings."}, found)
    (worst,) = [said for goal, said, met in cards.goals("tiny", found) if goal == "each of the six at least 90"]
    assert f"| each of the six at least 90 | {worst} | **missed** |" in (tmp_path / "cards" / "tiny.md").read_text()
    plain = found | {"models": {"tiny": {"in": found["models"]["tiny"]["in"]}}}
    assert "is with one" not in cards.card("tiny", manifest, plain)
    assert "Then GRPO" not in (tmp_path / "cards" / "tiny.md").read_text()
    found["weights"]["tiny"] = "0" * 64
    (tmp_path / "scores.json").write_text(json.dumps(found))
    with pytest.raises(StkitError, match="score them anew"):
        cards.write_cards(tmp_path / "scores.json", tmp_path / "cards")


def test_a_goal_is_met_where_the_scores_say_so():
    def ways(accuracy, low, exact, turns):
        kinds = {f"{task}/{order}": {"accuracy": accuracy} for task in CHOICE for order in ("forward", "reverse")}
        by_task = kinds | {"landmark/reverse": {"accuracy": low}, "route/forward": {"accuracy": 0.1}}
        blind = {"accuracy": 0.26, "low": 0.2, "high": 0.3, "chance": 0.25, "unparsed_rate": 0.1}
        backwards = {"turn_order": {"mean": turns, "low": turns - 0.1, "high": turns + 0.1}}
        inside = {"accuracy": accuracy, "by_task": by_task, "route": {"exact": exact}, "blind": 0.25}
        return {"in": inside, "blind": blind, "reversed": backwards}

    def met(name, found):
        return [met for _, _, met in cards.goals(name, found)]

    pair = {"models": ["tiny-cold", "tiny-r1"], "overall": {"difference": 0.2, "low": 0.1, "high": 0.3, "p": 0.001}}
    found = {"comparisons": [pair], "models": {"tiny": ways(0.97, 0.9, 0.7, 0.6), "tiny-cold": ways(0.6, 0.5, 0.1, 0.4),
                                               "tiny-r1": ways(0.8, 0.7, 0.3, 0.51)}}  # fmt: skip
    assert met("tiny", found) == [True] * 4 and met("tiny-r1", found) == [True] * 4
    assert met("tiny-cold", found) == [True, True, False]
    found["models"] |= {"tiny": ways(0.97, 0.89, 0.69, 0.6), "tiny-r1": ways(0.79, 0.7, 0.3, 0.51)}
    found["models"]["tiny"]["blind"]["low"], pair["overall"]["p"] = 0.255, 0.06
    assert met("tiny", found) == [False, False, False, True] and met("tiny-r1", found) == [False, False, True, True]
    pair["overall"] |= {"difference": 0.149, "p": 0.001}
    assert met("tiny-r1", found)[1] is False


@pytest.mark.parametrize("name", ["full", "quick"])
def test_the_recipes_that_ship_are_whole(name):
    found = load_recipe(name)
    names = ["recall", "spell", "match", "glance", "read", "see", "tell", "answer"]
    names += ["sharpen", "polish", "settle"] * (name == "full")
    assert [stage.name for stage in found.stages] == names and any(stage.keep_every for stage in found.stages)
    assert all(stage.told <= found.told for stage in found.stages)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"films": 0}, "films=0: give a number above 0"),
        ({"shifts": [2, 0]}, r"shifts=\[2, 0\]: give whole numbers, 0 the first"),
        ({"told": "many"}, "told='many': give a whole number"),
        ({"stages": {}}, "stages and grpo hold names with values"),
        ({"stages": {"a": {"lesson": "sing", **STAGE}}}, "stages.a.lesson='sing' is unknown: use recall"),
        ({"stages": {"a": STAGE}}, "stages.a=.*: give lesson, steps"),
        ({"stages": {"a": {"lesson": "see", **STAGE, "speed": 1}}}, "stages.a=.*: give lesson"),
        ({"stages": {"a": {"lesson": "see", **STAGE, "steps": 0}}}, "stages.a.steps=0: give a number above 0"),
        ({"stages": {"a": {"lesson": "see", **STAGE, "tasks": ["sing"]}}}, "stages.a.tasks=.*: give some of route"),
        ({"stages": {"a": {"lesson": "see", **STAGE, "told_tasks": ["sing"]}}}, "stages.a.told_tasks=.*: give some of route"),
        ({"stages": {"a": {"lesson": "see", **STAGE, "backwards": 1.5}}}, "stages.a.backwards=1.5: give a share from 0 to 1"),
        ({"grpo": {"train.rate": 1}}, "unknown key 'train.rate'"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_by_name(tmp_path, change, said):
    write_yaml(tmp_path / "bad.yaml", RECIPE | change)
    with pytest.raises(BadUse, match=said):
        load_recipe(tmp_path / "bad.yaml")


def test_bad_uses_of_the_command(tmp_path, capsys):
    out = str(tmp_path / "x")
    assert cli.run(["tiny", "train", "--out", out, "--quick", "--recipe", "full"]) == 2
    assert cli.run(["tiny", "train", "--out", out, "--recipe", "none"]) == 2
    assert cli.run(["tiny", "train", "--out", out, "--until", "never"]) == 2
    said = capsys.readouterr().err
    assert "both choose a recipe" in said and "'none' is unknown: use full, quick" in said and "until='never'" in said
    assert not (tmp_path / "x").exists()
