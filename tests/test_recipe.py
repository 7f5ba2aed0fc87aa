"""The recipe of the tiny models: lessons teach what they say, each stage learns, a stopped stage goes on, and maps of split
"train" only are learned from."""

import random
from collections import Counter
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stkit.bench.build import build_benchmark
from stkit.bench.plans import PRESETS, make_plan, plan_row
from stkit.bench.routes import Route, reverse
from stkit.bench.schema import load_benchmark
from stkit.bench.timeline import load_truth, render, timeline
from stkit.reporting.chains import items_told, read_chain
from stkit.runtime import BadUse
from stkit.sampling import sample_indices
from stkit.tiny.glance import glance_loss, glance_on, word_tokens
from stkit.tiny.lessons import LESSONS, Reader, lesson, parts
from stkit.tiny.recipe import Lessons, loss_on, plants_of, run_stage
from stkit.tiny.stages import Stage
from stkit.tiny.walks import Films, plan_of, planned, planned_walks
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


def test_a_walk_backwards_is_seen_from_its_end_and_told_with_turns_exchanged(bench, films, loaded):
    walk, spec = films.walks[0], video_spec(loaded.processor)
    turned = walk.run_backwards()
    assert turned.run_backwards() == walk and turned.plan == walk.plan
    swap = {"left": "right", "right": "left"}
    seen = [(swap.get(m.motion, m.motion), m.landmark, m.side) for m in walk.frames][::-1]
    assert [(m.motion, m.landmark, m.side) for m in turned.frames] == seen
    turns = [key for key, _ in groupby(motion for motion, _, _ in seen) if key in swap]
    assert turns == [swap[turn] for turn in reversed(walk.plan.turns)]  # as the control "reversed" wants them
    frames = read_video(load_benchmark(bench).video_path(f"{walk.name}.mp4"), n=32)
    size = loaded.processor.video_processor.size
    back = replace(frames, pixels=np.ascontiguousarray(frames.pixels[::-1]))
    asked = prepare(back, spec, size["shortest_edge"], size["longest_edge"])
    assert torch.equal(films.video(turned).pixel_values, asked.pixel_values)


def test_of_a_walk_backwards_the_route_that_it_shows_is_learned_and_no_option(films, loaded):
    tokenizer, reader = loaded.processor.tokenizer, Reader(loaded.processor, "qwen2_5_vl")
    walk, turned = films.walks[0], films.walks[0].run_backwards()
    for question in walk.questions(PRESET, 3):
        given, taught = learned(lesson([question], turned, "read", reader)[0], tokenizer)
        assert learned(lesson([question], turned, "answer", reader)[0], tokenizer) == ("", given + taught)
        assert given == f"<think>{render(turned.moments, dense=True)}" and taught.startswith(" Route: ")
        assert taught.count(".") == (2 if question.order == "reverse" else 1)  # no option, no answer
        chain = read_chain(given + taught)
        route = [step for step in chain.route if step.value != "straight"]
        for task in CHOICE:
            if question.task in (task, "route"):
                shown, kind = items_told(turned.moments, task), {"direction": "move"}.get(task, task)
                assert tuple(step for step in route if step.kind == kind) == shown
        assert chain.reversed == (reverse(Route(chain.route)).steps if question.order == "reverse" else None)


def test_a_share_of_the_films_and_of_the_told_walks_runs_backwards(films, loaded):
    stage = Stage("answer", "answer", 4, 40, 1, 1e-3, told=40, backwards=0.3)
    told = Lessons(stage, films, planned_walks(4, 0), 0, SimpleNamespace(loaded=loaded)).of(0)
    for part in (told[:40], told[40:]):
        texts = [loaded.processor.tokenizer.decode(one.lines[0].ids) for one in part]
        assert all("Route: " in text for text in texts)
        assert 4 <= sum("answer" not in text for text in texts) <= 22  # 12 are expected


def test_a_shifted_walk_is_what_the_frames_beside_the_sampled_ones_show(bench, loaded, tmp_path):
    shifts, benchmark, spec = (0, -2, 3), load_benchmark(bench), video_spec(loaded.processor)
    films = Films(bench, tmp_path / "films", loaded.processor, shifts, progress=False)
    size = loaded.processor.video_processor.size
    for walk, clip in zip(films.walks, benchmark.clips):
        found = [films.shifted(walk, random.Random(seed)) for seed in range(12)]
        assert {one.shift for one in found} == {0, 1, 2} and all(one.plan == walk.plan for one in found)
        whole = read_video(benchmark.video_path(clip.video), n=clip.frames + clip.frames % 2)
        for one in found:
            places = sample_indices(clip.frames, clip.fps, "uniform", n=32) + shifts[one.shift]
            places = np.minimum(np.maximum(places, 0), clip.frames - 1)
            assert one.moments == timeline(load_truth(benchmark, clip.id), places)
            taken = replace(whole, pixels=whole.pixels[places], timestamps_s=whole.timestamps_s[places])
            asked = prepare(taken, spec, size["shortest_edge"], size["longest_edge"])
            assert torch.equal(films.video(one).pixel_values, asked.pixel_values)


@pytest.mark.parametrize("count", [1, 2, 5, 167, 168, 169, 411])
def test_a_film_that_is_read_whole_has_each_of_its_frames_where_it_is_looked_up(count):
    read = sample_indices(count, 7.0, "uniform", n=count + count % 2)
    assert read[np.searchsorted(read, np.arange(count))].tolist() == list(range(count))


def test_frames_that_miss_what_happens_are_not_learned_from(bench, loaded, tmp_path):
    films = Films(bench, tmp_path / "films", loaded.processor, (0, 80), progress=False)  # half of the walk is over
    assert [len(found) for found in films.others] == [1, 1]
    assert films.shifted(films.walks[1], random.Random(0)) == films.walks[1]


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
    assert texts["see"] == texts["tell"] == ("", time_line)
    frames = "".join(f" {render([m], dense=True).removeprefix('Timeline: ').rstrip('.')}" for m in walk.frames)
    assert texts["glance"] == ("", frames) and len(frames.split()) == 32 * 3
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
    assert question_of(walk).question in prompts["read"] and prompts["tell"] == prompts["answer"] != prompts["see"]


def test_a_glance_reads_six_words_off_the_mean_of_a_patch(films):
    """Features in whose channels the words stand, each 32 further on than the one before, are read without an error."""
    said = [(m.motion, m.landmark or "none", m.side or "none") for m in films.walks[0].frames]
    sets = [list(dict.fromkeys(words)) for words in zip(*said)]
    words = [*dict.fromkeys(word for of_place in sets for word in of_place)]
    places = torch.randperm(32, generator=torch.Generator().manual_seed(0))[: len(words)]  # a word, a channel
    table = torch.eye(192)[places].requires_grad_()
    features = torch.zeros(16, 12, 192)
    for frame, three in enumerate(said):
        for k, word in enumerate(three):
            channel = int(places[words.index(word)]) + 32 * (frame % 2 * 3 + k)
            features[frame // 2, 3, channel % 192] += 12 * 40.0
    features = features.flatten(0, 1).requires_grad_()
    wanted, tokens = [[words.index(w) for three in said for w in three]], [[words.index(w) for w in own] for own in sets]
    loss, right = glance_loss(table, [features], wanted, [0.5], tokens)
    assert len(said) == 32 and right.shape == (1, 16, 6) and right.all() and loss.item() < 1e-6
    loss, _ = glance_loss(table, [features * 0], wanted, [0.5], tokens)
    assert loss.item() == pytest.approx(0.5 * np.mean([np.log(len(own)) for own in sets]), rel=1e-5)
    loss.backward()
    assert table.grad is None and features.grad is not None  # words stay as they are


def test_a_glance_beside_another_lesson_counts_as_much_as_it_is_told_to(films, loaded):
    stage = Stage("see", "see", 4, 2, 1, 1e-3, told=1)
    told = Lessons(stage, films, planned_walks(2, 0), 0, SimpleNamespace(loaded=loaded)).of(0)
    forest, words = plants_of(told, 10**6), word_tokens(loaded.processor.tokenizer)
    with torch.no_grad():
        plain, numbers = loss_on(loaded.model, forest, told)
        both, same = loss_on(loaded.model, forest, told, glance=0.7, words=words)
        alone, _ = glance_on(loaded.model, forest[:2], told, words)
    assert [one.video is None for one in told] == [False, False, True] and told[2].words == ()
    assert float(both - plain) == pytest.approx(0.7 * float(alone), rel=1e-4) and numbers == same


def test_what_is_told_beside_films_may_be_of_other_tasks(films, loaded):
    stage = Stage("answer", "answer", 4, 2, 1, 1e-3, tasks=("action",), told=6, told_tasks=("route",))
    told = Lessons(stage, films, planned_walks(6, 0), 0, SimpleNamespace(loaded=loaded)).of(0)
    texts = [loaded.processor.tokenizer.decode(one.lines[0].prompt) for one in told]
    assert ["Options:" in text for text in texts] == [True] * 2 + [False] * 6  # a route is asked for without options


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
    "glance": Stage("glance", "glance", 60, 2, 1, 3e-3, warmup=0.2),
    "see": Stage("see", "see", 20, 2, 1, 3e-3, warmup=0.2),
    "tell": Stage("tell", "tell", 20, 2, 2, 3e-3, CHOICE, warmup=0.2),
    "answer": Stage("answer", "answer", 20, 2, 1, 3e-3, CHOICE, told=1, warmup=0.2),
}


def usual(films):
    """The share of words that are right when the commonest motion, landmark and side are said of every frame."""
    said = [(m.motion, m.landmark, m.side) for walk in films.walks for m in walk.frames]
    return np.mean([Counter(words).most_common(1)[0][1] / len(said) for words in zip(*said)])


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
    chance = usual(films) if name == "glance" else 0.1
    assert rows[0]["words"] < chance and rows[-1]["words"] > chance + 0.05
