"""The models that ship: names, folders, checksums, and that none of them has learned from a map of the demo.

What holds for a folder that ships is also tested on one that is exported here, so that it is tested without any.
"""

import copy
import hashlib
import json
import re
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2_5_VLForConditionalGeneration

from stkit import load_model
from stkit.bench.chunk import clip_plan
from stkit.bench.plans import Landmark, Plan, PlannedAction, make_plan
from stkit.bench.presets import preset
from stkit.runs import write_yaml
from stkit.runtime import BadUse, StkitError, child_seed
from stkit.tiny.walks import Walk, planned_walks
from stkit.train.plan import plan
from stkit.train.reading import load_settings
from stkit.vlm import tiny
from stkit.vlm.load import find
from stkit.vlm.sight import claim_run

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
SHIPPED_HERE = [name for name in tiny.SHIPPED if (tiny.folder(name) / tiny.WEIGHTS).exists()]
MANIFEST = {
    "name": "tiny", "command": "stkit tiny train --out runs/tiny", "commit": "4cf5de2", "seed": 3, "recipe": "quick",
    "benchmark": {"name": "walks", "seed": 3, "clips": 12, "split": "train", "preset": "tiny", "hash": "0" * 64},
    "told": {"seed": 3, "walks": 12, "split": "train"}, "stages": {"answer": {"commit": "4cf5de2", "minutes": 12.5}},
}  # fmt: skip
FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
    "processor_config.json", "tokenizer.json", "tokenizer_config.json", "words.txt",
}  # fmt: skip


@pytest.fixture(scope="module")
def untrained():
    return load_model("tiny-untrained", device="cpu")


@pytest.fixture(scope="module")
def learned(untrained):
    """A stand-in for what training makes: other weights than the untrained ones."""
    return tiny.seeded_model(untrained.model.config, seed=1)


@pytest.fixture(scope="module")
def shelf(learned, untrained, tmp_path_factory):
    """A data folder with "tiny" and "tiny-cold" in it, but no "tiny-r1"."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("tiny", "tiny-cold"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        (folder / name / "README.md").write_text(f"# {name}\n")
        tiny.export(learned, untrained.processor, folder / name, MANIFEST | {"name": name})
    return folder


def on_shelf(monkeypatch, folder: Path) -> Path:
    """Let the names that ship be looked up in another data folder."""
    monkeypatch.setattr(tiny, "folder", lambda name="tiny": folder / ("tiny" if name == tiny.UNTRAINED else name))
    return folder


@pytest.fixture
def own_shelf(shelf, tmp_path, monkeypatch):
    """A shelf that a test may damage."""
    return on_shelf(monkeypatch, Path(shutil.copytree(shelf, tmp_path / "data")))


@pytest.fixture(scope="module", params=[*SHIPPED_HERE, "exported here"])
def place(request, shelf):
    return shelf / "tiny-cold" if request.param == "exported here" else tiny.folder(request.param)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def logits(model, processor):
    """Of a prompt with a video of noise."""
    video = np.random.default_rng(0).integers(0, 256, (4, 84, 112, 3), dtype=np.uint8)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which way did you turn?"}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    facts = [{"total_num_frames": 4, "fps": 4.0, "frames_indices": [0, 1, 2, 3]}]
    with torch.no_grad():
        return model(**processor(text=[text], videos=[video], video_metadata=facts, return_tensors="pt")).logits


def same_weights(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# ---- names


def test_the_untrained_model_has_the_files_of_tiny_and_the_weights_of_the_seed(untrained):
    assert tiny.folder("tiny-untrained") == tiny.folder("tiny") == tiny.folder()
    record = untrained.record
    assert (record["name"], record["untrained"], record["weights"], record["manifest"]) == (
        "tiny-untrained", True, "seed 0", None,
    )  # fmt: skip
    assert same_weights(untrained.model, tiny.seeded_model(untrained.model.config, 0))
    assert untrained.model.name_or_path == "tiny-untrained"


def test_the_untrained_model_stays_what_it_is_when_weights_ship(untrained, shelf, monkeypatch):
    on_shelf(monkeypatch, shelf)
    again = load_model("tiny-untrained", device="cpu")
    assert again.record["untrained"] is True and same_weights(again.model, untrained.model)
    assert load_model("tiny", device="cpu").record["untrained"] is False


def test_four_names_are_ours_and_no_folder_or_other_object_is():
    assert [name for name in ("tiny", "tiny-cold", "tiny-r1", "tiny-untrained") if tiny.is_own(name)] == [
        *tiny.SHIPPED, tiny.UNTRAINED,
    ]  # fmt: skip
    others = ("Tiny", "tiny-", "./tiny", "Qwen/tiny", tiny.folder(), str(tiny.folder()), None, tiny)
    assert not any(map(tiny.is_own, others))
    with pytest.raises(BadUse, match="'tiny-hot' does not ship: use tiny, tiny-cold, tiny-r1, tiny-untrained"):
        tiny.folder("tiny-hot")


@pytest.mark.parametrize("name", tiny.SHIPPED)
def test_a_name_whose_weights_are_not_there_says_what_to_run(own_shelf, name):
    for there in ("tiny", "tiny-cold"):
        (own_shelf / there / tiny.WEIGHTS).unlink()
    for ask in (load_model, lambda name: plan(name, load_settings("tiny", "sft"), "sft")):
        with pytest.raises(StkitError, match=rf"'{name}': no .*{name}/model.safetensors: .*run 'stkit tiny train'"):
            ask(name)


def test_the_planner_knows_a_shipped_name_and_plans_it_as_tiny(shelf, monkeypatch):
    on_shelf(monkeypatch, shelf)
    settings = load_settings("tiny", "grpo")
    found, known = (plan(name, settings, "grpo") for name in ("tiny-cold", "tiny-untrained"))
    assert found.model == "tiny-cold" and found.source.endswith("tiny-cold/config.json")
    assert found.phases == known.phases
    assert found.request.max_pixels == known.request.max_pixels == tiny.MAX_PIXELS


# ---- a folder that ships


def test_what_ships_is_complete():
    assert SHIPPED_HERE == list(tiny.SHIPPED)


def test_a_folder_that_ships_is_small_whole_and_says_how_it_was_made(place):
    assert {file.name for file in place.iterdir()} == FILES
    assert sum(file.stat().st_size for file in place.iterdir()) <= 8_000_000
    manifest = read(place / "manifest.json")
    assert manifest["name"] == place.name and manifest["sha256"] == sha256(place / "model.safetensors")
    assert {"command", "commit", "seed", "recipe", "benchmark", "told", "stages"} <= set(manifest)
    assert {"name", "seed", "clips", "split", "preset", "hash"} <= set(manifest["benchmark"])
    assert {"seed", "walks", "split"} <= set(manifest["told"])
    words = (tiny.folder() / "words.txt").read_text()
    assert (place / "words.txt").read_text() == words and (place / "README.md").read_text().strip()


def test_what_is_beside_the_weights_is_the_same_in_every_folder(place, tmp_path):
    tiny.write_folder(tmp_path / "made")
    for file in (tmp_path / "made").iterdir():
        assert (place / file.name).read_bytes() == file.read_bytes(), file.name


def test_plain_transformers_loads_it_in_float32_and_computes_the_same(place, tmp_path):
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(place)
    assert plain.dtype == torch.float32 and {p.dtype for p in plain.parameters()} == {torch.float32}
    loaded = load_model(place, device="cpu")
    assert same_weights(plain, loaded.model) and loaded.record["untrained"] is False
    assert torch.equal(logits(plain.eval(), loaded.processor), logits(loaded.model, loaded.processor))
    half = Path(shutil.copytree(place, tmp_path / "half"))  # it is config.json that says so: on disk they are float16
    config = read(half / "config.json")
    for part in (config, config["text_config"], config["vision_config"]):
        assert part.pop("dtype") == "float32"
    (half / "config.json").write_text(json.dumps(config))
    assert Qwen2_5_VLForConditionalGeneration.from_pretrained(half).dtype == torch.float16


def test_its_record_keeps_commit_seed_and_checksum(place):
    manifest = read(place / "manifest.json")
    record = json.loads(json.dumps(load_model(place, device="cpu").record))
    assert record["manifest"] == {key: manifest[key] for key in ("commit", "seed", "sha256")}
    assert record["weights"] == "safetensors"


# ---- maps


@lru_cache(maxsize=4)
def filmed(seed: int, clips: int, split: str | None, name: str) -> tuple[Plan, ...]:
    """The walks of a benchmark. One that was blocked has a spare of the same split in its place, which isn't told."""
    return tuple(clip_plan(seed, k, preset(name), split, 0) for k in range(clips))


@lru_cache(maxsize=4)
def told(seed: int, walks: int, split: str | None) -> tuple[Plan, ...]:
    own = child_seed(seed, "told")
    return tuple(make_plan(own, k, preset("tiny"), split) for k in range(walks))


def learned_from(manifest: dict) -> tuple[Plan, ...]:
    """The walks that a manifest names: filmed ones and those only told."""
    films, words = manifest["benchmark"], manifest["told"]
    seen = filmed(films["seed"], films["clips"], films["split"], films["preset"])
    return seen + told(words["seed"], words["walks"], words["split"])


def demo_maps() -> set[str]:
    """Maps of the benchmark that ``make demo`` builds, as the Makefile says."""
    text = (ROOT / "Makefile").read_text()
    clips = int(re.search(r"^DEMO_CLIPS \?= (\d+)$", text, re.M)[1])
    line = re.search(r"^demo:.*\n(?:\t.*\n)*?\t(.*stkit build .*)$", text, re.M)[1]
    assert "--clips $(DEMO_CLIPS)" in line and "--preset" not in line and "--ood" not in line
    seed, split = re.search(r"--seed (\d+)", line)[1], re.search(r"--split (\w+)", line)[1]
    assert (clips, split) == (40, "test")
    return {one.map_hash() for one in filmed(int(seed), clips, split, "tiny")}


def test_it_has_learned_from_no_map_of_the_demo_and_from_maps_of_split_train_only(place):
    manifest = read(place / "manifest.json")
    walks = learned_from(manifest)
    assert len(walks) == manifest["benchmark"]["clips"] + manifest["told"]["walks"] > 0
    assert "ood" not in manifest["benchmark"]["name"]
    assert {one.split() for one in walks} == {"train"}
    assert manifest["benchmark"]["split"] == manifest["told"]["split"] == "train"
    assert demo_maps().isdisjoint(one.map_hash() for one in walks)


def test_a_manifest_that_shares_a_map_with_the_demo_would_be_found():
    leak = MANIFEST | {"benchmark": MANIFEST["benchmark"] | {"seed": 0, "clips": 2, "split": "test"}}
    walks = learned_from(leak)
    assert len(demo_maps() & {one.map_hash() for one in walks}) == 2 and "test" in {one.split() for one in walks}


def test_told_walks_are_planned_as_the_recipe_plans_them():
    assert tuple(walk.plan for walk in planned_walks(4, 3)) == told(3, 4, "train")


def by_hand(turns: list, marks: list, lengths: tuple, acts: list) -> str:
    """A map's split, from its structure written down: the lesser of the walk and its mirror image counts."""
    text = repr([[turns, marks], [lengths, acts]])
    number = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10
    return "train" if number < 8 else "dev" if number == 8 else "test"


def test_the_split_is_a_function_of_the_map_alone_and_the_same_for_a_mirror_image():
    found = set()
    for first in range(2, 32):
        lengths = (first, 3, 2)
        marks, acts = (Landmark(1, "brick", "right"),), (PlannedAction(4, "pause"),)
        one = Plan(0, 0, ("left", "right"), lengths, marks, acts, 160, "panel")
        twin = Plan(7, 99, ("left", "right"), lengths, marks, acts, 90, "rust")  # another seed, light and dressing
        mirrored = Plan(0, 0, ("right", "left"), lengths, (Landmark(1, "brick", "left"),), acts, 160, "panel")
        split = by_hand(["left", "right"], [(1, "brick", "right")], lengths, [(4, "pause")])
        assert one.split() == twin.split() == mirrored.split() == Walk("w", one, ()).mirrored().plan.split() == split
        assert one.map_hash() != Plan(0, 0, ("left", "left"), lengths, marks, acts, 160, "panel").map_hash()
        found.add(split)
    assert found == {"train", "dev", "test"}


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_whatever_the_seed_a_walk_of_a_split_has_a_map_of_it(split):
    plans = [make_plan(seed, k, preset("tiny"), split) for seed in (0, 1, 2**40) for k in range(4)]
    assert {one.split() for one in plans} == {split} and len({one.map_hash() for one in plans}) == 12


# ---- checksums


def test_shipped_names_load_what_was_exported(learned, shelf, monkeypatch):
    on_shelf(monkeypatch, shelf)
    for name in ("tiny", "tiny-cold"):
        model, _, record = load_model(name, device="cpu")
        assert (record["name"], record["untrained"], record["weights"]) == (name, False, "safetensors")
        assert record["manifest"]["sha256"] == sha256(shelf / name / "model.safetensors")
        assert model.dtype == torch.float32
        rounded = [p.half().float() for p in learned.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), rounded, strict=True))
        assert find(name).folder == shelf / name
        assert model.generation_config.eos_token_id == [model.config.text_config.eos_token_id, 1364]


def test_weights_that_were_tampered_with_are_refused_by_name_and_by_path(own_shelf):
    file = own_shelf / "tiny" / "model.safetensors"
    said = sha256(file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for name in ("tiny", own_shelf / "tiny"):
        with pytest.raises(StkitError) as error:
            load_model(name, device="cpu")
        message = str(error.value)
        assert all(word in message for word in (str(file), sha256(file), said, "git checkout", "install stkit anew"))
    data[-1] ^= 1
    file.write_bytes(data)
    assert load_model("tiny", device="cpu").record["manifest"]["sha256"] == said


def test_a_shipped_name_needs_its_manifest_and_a_folder_of_another_kind_does_not(own_shelf):
    path = own_shelf / "tiny" / "manifest.json"
    for content in ('{"name": "tiny"}', "[]", None):
        path.write_text(content) if content else path.unlink()
        with pytest.raises(StkitError, match="manifest.json: no sha256 of model.safetensors there"):
            load_model("tiny", device="cpu")
        assert load_model(own_shelf / "tiny", device="cpu").record["manifest"] is None


def test_an_adapter_is_loaded_onto_the_weights_that_it_was_trained_on_and_no_others(own_shelf, untrained, tmp_path):
    loaded = load_model("tiny", device="cpu")
    get_peft_model(loaded.model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "run" / "adapter")
    write_yaml(tmp_path / "run" / "config.yaml", {"model": loaded.record})
    for ask in ({"name_or_path": tmp_path / "run"}, {"name_or_path": "tiny", "adapter": tmp_path / "run" / "adapter"}):
        assert load_model(device="cpu", **ask).record["manifest"] == loaded.record["manifest"]
    tiny.export(tiny.seeded_model(untrained.model.config, seed=2), untrained.processor, own_shelf / "tiny", MANIFEST)
    now = read(own_shelf / "tiny" / "manifest.json")["sha256"]
    with pytest.raises(StkitError, match=rf"of tiny with sha256 {loaded.record['manifest']['sha256']}, here they have {now}"):
        load_model(tmp_path / "run", device="cpu")


def test_a_run_goes_on_with_the_same_weights_and_with_no_others(untrained, tmp_path):
    def claim(name, **changes):
        record = untrained.record | changes
        return claim_run(tmp_path / name, {"settings": {"bench": "b"}}, record, {"questions": {}, "videos": {}}, {})

    one, other = ({"commit": "a", "seed": 0, "sha256": digit * 64} for digit in "12")
    assert claim("r", manifest=one) is False and claim("r", manifest=one) is True
    with pytest.raises(StkitError, match=r"model\.manifest\.sha256: '111.* -> '222"):
        claim("r", manifest=other)
    assert claim("old") is False
    config = read(tmp_path / "old" / "config.json")
    del config["model"]["manifest"]  # as runs were before models had one
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert claim("old") is True


# ---- export


def test_a_manifest_that_lacks_something_is_refused(untrained, learned, tmp_path):
    for key in MANIFEST:
        with pytest.raises(BadUse, match=f"manifest {key}=None"):
            tiny.export(learned, untrained.processor, tmp_path / "m", {k: v for k, v in MANIFEST.items() if k != key})
    for key, value in (("benchmark", {"name": "walks"}), ("told", "6000 walks")):
        with pytest.raises(BadUse, match=f"manifest {key}=.* give {key} with .*seed"):
            tiny.export(learned, untrained.processor, tmp_path / "m", MANIFEST | {key: value})
    assert not (tmp_path / "m").exists()


def with_infinity(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = 1e5
    return model


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda model: copy.deepcopy(model).bfloat16(), "in torch.bfloat16: .* load with dtype='float32'"),
        (lambda model: get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"])), "merge adapters"),
        (with_infinity, "language_model.norm.weight: values that float16 cannot hold"),
    ],
)
def test_weights_that_cannot_ship_are_refused(untrained, learned, tmp_path, change, said):
    with pytest.raises(StkitError, match=said):
        tiny.export(change(learned), untrained.processor, tmp_path / "m", MANIFEST)
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_of_other_words_is_refused(learned, tmp_path):
    with pytest.raises(StkitError, match="learnt from other words than .*words.txt"):
        tiny.export(learned, tiny.make_processor(["turn left"]), tmp_path / "m", MANIFEST)


def test_a_folder_over_8_mb_is_refused_and_what_was_there_stays(untrained, shelf, tmp_path):
    config = copy.deepcopy(untrained.model.config)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 8, ["full_attention"] * 8
    large = tiny.seeded_model(config)
    out = Path(shutil.copytree(shelf / "tiny", tmp_path / "tiny"))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(StkitError, match=r"tiny: \d,\d+,\d+ bytes, a model that ships has at most 8,000,000"):
        tiny.export(large, untrained.processor, out, MANIFEST)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["tiny"]


def test_a_folder_of_something_else_is_left_alone(untrained, learned, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(StkitError, match="holds something else than a model: choose another folder"):
            tiny.export(learned, untrained.processor, out, MANIFEST)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
