"""The recipe of the tiny models: lessons teach what they say, each stage learns, a stopped stage goes on, and maps of split
"train" only are learned from."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stkit.bench.build import build_benchmark
from stkit.bench.plans import PRESETS, make_plan, plan_row
from stkit.bench.schema import load_benchmark
from stkit.bench.timeline import load_truth, render, timeline
from stkit.runtime import BadUse
from stkit.sampling import sample_indices
from stkit.tiny import glance
from stkit.tiny.lessons import LESSONS, Reader, lesson, parts
from stkit.tiny.recipe import Lessons, Stage, Told, run_stage
from stkit.tiny.walks import Films, plan_of, planned, planned_walks
from stkit.train.forest import plant
from stkit.train.run import read_rows
from stkit.vlm.load import load_model
from stkit.vlm.tiny import UNTRAINED
from stkit.vlm.video import prepare, read_video, video_spec
from stkit.vlm.vision import encode_video, encode_videos

torch.set_num_threads(1)
PRESET = PRESETS["tiny"]
CHOICE = ("direction", "landmark", "action")


@pytest.fixture(scope="module")
def loaded():
    return load_model(UNTRAINED, device="cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    out = tmp_path_factory.mktemp("recipe") / "walks"
    build_benchmark(out, 2, seed=5, split="train", progress=False)
    return out


@pytest.fixture(scope="module")
def films(bench, loaded):
    return Films(bench, bench.parent / "films", loaded.processor, progress=False)


def question_of(walk, task="landmark", order="reverse"):
    return next(q for q in walk.questions(PRESET, 3) if (q.task, q.order) == (task, order))


def learned(line, tokenizer):
    """The texts of a line's given and learned parts."""
    ids = {bool(w): [i for i, v in zip(line.ids, line.weight) if bool(v) is bool(w)] for w in (0, 1)}
    return tokenizer.decode(ids[False]), tokenizer.decode(ids[True])


def test_a_told_walk_has_the_time_line_of_its_film(bench, films):
    benchmark = load_benchmark(bench)
    for walk, clip in zip(films.walks, benchmark.clips):
        truth = load_truth(benchmark, clip.id)
        plan = make_plan(5, int(clip.id[-5:]), PRESET, "train")
        assert plan_row(plan_of(truth["plan"])) == plan_row(plan)
        assert planned("x", plan, PRESET).moments == walk.moments
        assert walk.moments == timeline(truth, sample_indices(clip.frames, clip.fps, "uniform", n=32))


def test_a_mirrored_walk_is_seen_and_told_with_left_and_right_exchanged(bench, films, loaded):
    walk, spec = films.walks[0], video_spec(loaded.processor)
    mirrored = walk.mirrored()
    swap = str.maketrans({"L": "R", "R": "L"})
    words = render(walk.moments).replace("left", "L").replace("right", "R").translate(swap)
    assert render(mirrored.moments) == words.replace("L", "left").replace("R", "right")
    assert mirrored.plan.map_hash() == walk.plan.map_hash() and mirrored.mirrored() == walk
    frames = read_video(load_benchmark(bench).video_path(f"{walk.name}.mp4"), n=32)
    size = loaded.processor.video_processor.size
    bounds = size["shortest_edge"], size["longest_edge"]
    asked = prepare(frames, spec, *bounds)
    assert torch.equal(films.video(walk).pixel_values, asked.pixel_values)
    assert films.video(walk).second_per_grid_s == asked.second_per_grid_s
    flipped = prepare(replace(frames, pixels=np.ascontiguousarray(frames.pixels[:, :, ::-1])), spec, *bounds)
    assert torch.allclose(films.video(mirrored).pixel_values, flipped.pixel_values, atol=0.02)


def test_films_of_another_split_are_refused(tmp_path, loaded):
    out = tmp_path / "test-walks"
    build_benchmark(out, 1, seed=0, split="test", progress=False)
    with pytest.raises(BadUse, match="is of another split: only maps of split 'train'"):
        Films(out, tmp_path / "films", loaded.processor, progress=False)


def test_told_walks_are_of_split_train_whatever_the_seed():
    for seed in (0, 1, 77):
        assert {walk.plan.split() for walk in planned_walks(5, seed)} == {"train"}


def test_what_each_lesson_gives_and_teaches(loaded):
    walk = planned_walks(1, 3)[0]
    question, tokenizer = question_of(walk), loaded.processor.tokenizer
    reader = Reader(loaded.processor, "qwen2_5_vl")
    time_line = f"<think>{render(walk.moments, dense=True)}"
    texts = {kind: learned(lesson([question], walk, kind, reader)[0], tokenizer) for kind in LESSONS}
    end = "</think> <answer>{}</answer><|im_end|>".format("ABCD"[question.answer])
    route = ", ".join(f"{mark.kind} {mark.side}" for mark in walk.plan.landmarks)
    back = ", ".join(f"{m.kind} {'left' if m.side == 'right' else 'right'}" for m in reversed(walk.plan.landmarks))
    assert texts["see"] == ("", time_line)
    assert texts["glance"] == ("", time_line.removeprefix("<think>Timeline:").replace(",", "").rstrip("."))
    assert texts["recall"] == (f"<think>Route: {route}.", f" Reversed: {back}. {back.replace(',', ';')}.")
    given, taught = texts["match"]
    assert given == f"<think>Route: {route}." and taught.startswith(f" Reversed: {back}. A: ") and taught.endswith(end)
    assert texts["read"] == (time_line, f" Route: {route}.{taught}")
    assert texts["answer"] == ("", f"{time_line} Route: {route}.{taught}")
    spelled = texts["spell"][1].removeprefix("<think>").rstrip(".").split(". ")
    assert sorted(part[0] for part in spelled) == list("ABCD") and texts["spell"][0] == ""
    assert f"{'ABCD'[question.answer]}: {back}" in spelled


def test_a_lesson_without_a_question_has_none_in_its_prompt(loaded):
    walk = planned_walks(1, 3)[0]
    reader, tokenizer = Reader(loaded.processor, "qwen2_5_vl"), loaded.processor.tokenizer
    prompts = {k: tokenizer.decode(lesson([question_of(walk)], walk, k, reader)[0].prompt) for k in LESSONS}
    assert prompts["recall"] == "<|im_start|>assistant\n"
    assert prompts["match"] == prompts["spell"] and prompts["match"].startswith("A. ")
    assert question_of(walk).question in prompts["read"]


def test_a_glance_reads_three_words_off_the_mean_of_a_patch(films, loaded, monkeypatch):
    """Features in whose channels the words stand, 0, 32 and 64 further on, are read without an error; others are not."""
    walk, tokenizer = films.walks[0], loaded.processor.tokenizer
    lines = lesson([question_of(walk)], walk, "glance", Reader(loaded.processor, "qwen2_5_vl"), films.video(walk))
    told = [Told(lines, films.video(walk), 0.5)]
    forest = plant(0, lines, 10**6)
    table = torch.eye(192)[torch.randperm(192, generator=torch.Generator().manual_seed(0))]  # a word, a channel
    said = [(m.motion, m.landmark or "none", m.side or "none") for m in walk.moments]
    tokens = [list(dict.fromkeys(words)) for words in zip(*said)]
    words = [*dict.fromkeys(word for of_role in tokens for word in of_role)]
    assert len(said) == 16 and len(words) < 192

    class model:
        get_input_embeddings = staticmethod(lambda: SimpleNamespace(weight=table))

    features = torch.zeros(16, 12, 192)
    for k, patch in enumerate(said):
        for role, word in enumerate(patch):
            channel = int(table[words.index(word)].argmax())
            features[k, 3, (channel + 32 * role) % 192] += 12 * 20.0
    monkeypatch.setattr(glance, "encode_videos", lambda *_: [SimpleNamespace(pooler_output=(features.flatten(0, 1),))])
    ids = tuple(words.index(word) for patch in said for word in patch)
    told = [told[0]._replace(lines=[lines[0]._replace(ids=ids)])]
    roles = [[words.index(word) for word in of_role] for of_role in tokens]
    loss, numbers = glance.glance_on(roles, model, forest, told)
    assert float(loss) < 1e-6 and numbers == {"lines": 1, "exact": 1, "learned_tokens": 48, "words": 48}
    features.zero_()
    loss, numbers = glance.glance_on(roles, model, forest, told)
    assert float(loss) == pytest.approx(0.5 * np.mean([np.log(len(words)) for words in roles]), rel=1e-5)
    assert numbers["exact"] == 0


def test_a_glance_leaves_the_words_as_they_are(films, loaded):
    walk = films.walks[0]
    lines = lesson([question_of(walk)], walk, "glance", Reader(loaded.processor, "qwen2_5_vl"), films.video(walk))
    roles = glance.role_tokens(loaded.processor.tokenizer)
    loss, _ = glance.glance_on(roles, loaded.model, plant(0, lines, 10**6), [Told(lines, films.video(walk), 1.0)])
    loss.backward()
    assert loaded.model.get_input_embeddings().weight.grad is None
    assert all(p.grad.abs().sum() > 0 for p in loaded.model.model.visual.merger.parameters())
    loaded.model.zero_grad()


def test_an_unknown_lesson_is_refused():
    walk = planned_walks(1, 3)[0]
    with pytest.raises(BadUse, match="lesson 'sing' is unknown: use recall"):
        parts(question_of(walk), walk, "sing")


def test_several_videos_in_one_pass_are_those_of_each(films, loaded):
    videos = [films.video(walk) for walk in films.walks]
    for one, video in zip(encode_videos(loaded.model, videos), videos):
        alone = encode_video(loaded.model, video)
        assert torch.allclose(one.pooler_output[0], alone.pooler_output[0], atol=1e-5) and len(one.pooler_output) == 1


def test_lessons_depend_on_the_seed_and_the_step_alone(films, loaded):
    stage = Stage("answer", "answer", 4, 2, 2, 1e-3, told=3)

    class policy:
        pass

    policy.loaded = loaded
    told = planned_walks(4, 0)
    one, two = Lessons(stage, films, told, 0, policy), Lessons(stage, films, told, 0, policy)
    two.of(0), two.of(1)
    first, second = one.of(2), two.of(2)
    assert [t.lines for t in first] == [t.lines for t in second]
    assert [t.video is None for t in first] == [False, False, True, True, True]
    assert sum(t.share * len(t.lines) for t in first) == pytest.approx(1 + stage.told_share)
    assert [t.lines for t in Lessons(stage, films, told, 1, policy).of(2)] != [t.lines for t in first]


MICRO = {
    "recall": Stage("recall", "recall", 40, 2, 2, 3e-3, CHOICE, warmup=0.2),
    "spell": Stage("spell", "spell", 24, 2, 2, 3e-3, CHOICE, warmup=0.2),
    "match": Stage("match", "match", 24, 2, 2, 3e-3, CHOICE, warmup=0.2),
    "read": Stage("read", "read", 24, 2, 2, 3e-3, CHOICE, warmup=0.2),
    "glance": Stage("glance", "glance", 40, 2, 1, 3e-3, warmup=0.2),
    "see": Stage("see", "see", 20, 2, 1, 3e-3, warmup=0.2),
    "answer": Stage("answer", "answer", 20, 2, 1, 3e-3, CHOICE, told=1, warmup=0.2),
}


@pytest.mark.parametrize("name", MICRO)
def test_each_stage_learns_in_seconds(name, tmp_path, films):
    start = tmp_path / "start"
    loaded = load_model(UNTRAINED, device="cpu")
    loaded.model.save_pretrained(start)
    loaded.processor.save_pretrained(start)
    model = run_stage(MICRO[name], tmp_path / name, start, films, 2, 0, progress=False)
    rows = read_rows(tmp_path / name / "metrics.jsonl")
    assert len(rows) == MICRO[name].steps and (model / "model.safetensors").is_file()
    assert rows[-1]["loss"] < 0.4 * rows[0]["loss"]
    assert rows[0]["words"] < 0.1 and rows[-1]["words"] > 0.15
