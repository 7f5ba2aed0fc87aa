"""SFT: what the labels are, that the loss is Transformers' own, and that how an update is cut changes nothing."""

from pathlib import Path

import pytest
import torch
from benchmaker import write_bench, write_video
from trainmaker import QUICK, answer, metrics, with_solutions

from stkit import build_benchmark, import_egost, load_model, sft
from stkit.bench.schema import load_benchmark
from stkit.bench.timeline import load_truth, timeline
from stkit.runtime import BadUse, StkitError
from stkit.sampling import sample_indices
from stkit.train.answers import answer_text
from stkit.train.data import Course, drawn
from stkit.train.forest import Line, forests, plant
from stkit.train.reading import load_settings
from stkit.train.sft import examples
from stkit.train.start import begin
from stkit.vlm.prompts import encode_answer


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return with_solutions(tmp_path_factory.mktemp("sft") / "bench")


def job_on(bench, tmp_path, **overrides):
    return begin("sft", bench, "tiny-untrained", "tiny", tmp_path / "run", QUICK | overrides, progress=False)


def oracle(job, lines_and_clips):
    """Loss and gradient norm by Transformers' own forward pass, one question at a time, no tree anywhere."""
    model = job.policy.model
    nll, count = 0.0, 0
    for line, seen in lines_and_clips:
        ids = torch.tensor([[*line.prompt, *line.ids]])
        kinds = (ids == model.config.video_token_id).long() * 2
        kinds[:, len(line.prompt) :] = 0
        video = seen.inputs
        logits = model(
            input_ids=ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids),
            pixel_values_videos=video.pixel_values, video_grid_thw=video.grid_thw[None],
            second_per_grid_ts=torch.tensor([video.second_per_grid_s]),
        ).logits[0]  # fmt: skip
        start = len(line.prompt) - 1
        nll = nll + torch.nn.functional.cross_entropy(logits[start:-1], ids[0, start + 1 :], reduction="sum")
        count += len(line.ids)
    loss = nll / count
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(job.policy.trainable, 1e9)
    job.policy.model.zero_grad()
    return float(loss.detach()), float(norm)


def test_what_is_learned_is_the_answer_and_the_end_of_the_turn_token_by_token(bench, tmp_path):
    """The released collator trained on the prompt and on a dangling assistant header."""
    job = job_on(bench, tmp_path, **{"sft.form": "solution"})
    tokenizer = job.policy.loaded.processor.tokenizer
    item = job.course[0]
    found = examples(job.benchmark, item, job.watcher.watch(item), job)
    assert len(found) == len(item.questions) == 4
    (one,) = plant(0, found, 100_000)
    labels, unlabelled = {}, []
    for node, _ in one.tree.walk():
        assert set(node.weight) <= {0.0, 1.0} and len(set(node.weight)) == 1
        if any(node.weight):
            labels[node.name] = tokenizer.decode(node.ids)
        else:
            unlabelled += node.ids
    assert labels == {q.id: f"{q.solution}<|im_end|>" for q in item.questions}
    prompt = tokenizer.decode(unlabelled)
    assert all(q.solution not in prompt for q in item.questions) and "<|im_start|>assistant\n" in prompt


@pytest.mark.parametrize("form", ["timeline", "checked"])
def test_what_is_seen_is_taught_from_the_truth_of_the_frames_that_are_shown(form, tmp_path):
    build_benchmark(tmp_path / "walks", 1, seed=0, split="train", progress=False)
    job = job_on(tmp_path / "walks", tmp_path, **{"sft.form": form})
    item = job.course[0]
    moments = timeline(load_truth(job.benchmark, item.clip_id), sample_indices(168, 7.0, "uniform", n=32))
    lines = examples(job.benchmark, item, job.watcher.watch(item), job)
    decode = job.policy.loaded.processor.tokenizer.decode
    wanted = [f"{answer_text(question, form, moments=moments)}<|im_end|>" for question in item.questions]
    assert [decode(line.ids) for line in lines] == wanted and len(lines) >= 2


def test_the_video_stands_once_in_a_tree_of_several_questions(bench, tmp_path):
    job = job_on(bench, tmp_path)
    item = job.course[0]
    seen = job.watcher.watch(item)
    (one,) = plant(0, examples(job.benchmark, item, seen, job), 100_000)
    pad = job.policy.model.config.video_token_id
    held = [sum(i == pad for i in node.ids) for node, _ in one.tree.walk()]
    assert held[0] == int(seen.inputs.grid_thw.prod()) // 4 and sum(held[1:]) == 0


def test_loss_and_gradient_are_those_of_transformers_own_pass_with_the_video(bench, tmp_path):
    """The released collator dropped pixel_values_videos and second_per_grid_ts: its cold start never saw a video."""
    job = job_on(bench, tmp_path, **{"sft.form": "solution", "train.clip_norm": 1e9})
    pairs = []
    for item in job.items(0, 2):
        seen = job.watcher.watch(item)
        pairs += [(line, seen) for line in examples(job.benchmark, item, seen, job)]
    loss, norm = oracle(job, pairs)
    run = sft(
        bench,
        "tiny-untrained",
        out=tmp_path / "again",
        overrides=QUICK | {"sft.form": "solution", "train.clip_norm": 1e9},
        progress=False,
    )
    assert run.metrics["loss"][0] == pytest.approx(loss, rel=1e-5)
    assert run.metrics["grad_norm"][0] == pytest.approx(norm, rel=1e-4)


def test_another_video_gives_another_loss(bench, tmp_path):
    other = with_solutions(tmp_path / "other" / "bench")
    (other / "videos" / "a.mp4").write_bytes((other / "videos" / "b.mp4").read_bytes())
    one = {"train.steps": 1, "data.limit": 4, "train.batch": 1}
    losses = [
        sft(
            b, "tiny-untrained", out=tmp_path / f"run-{b.parent.name}", overrides=QUICK | one, progress=False
        ).metrics["loss"][0]
        for b in (bench, other)
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "changes", [{"train.max_tokens": 150}, {"train.batch": 1, "train.accumulation": 2}, {"train.checkpointing": True}]
)
def test_how_an_update_is_cut_or_computed_again_changes_nothing(bench, tmp_path, changes):
    whole = sft(bench, "tiny-untrained", out=tmp_path / "a", overrides=QUICK, progress=False).metrics
    cut = sft(bench, "tiny-untrained", out=tmp_path / "b", overrides=QUICK | changes, progress=False).metrics
    assert cut["loss"].tolist() == pytest.approx(whole["loss"].tolist(), rel=2e-5)
    assert cut["grad_norm"].tolist() == pytest.approx(whole["grad_norm"].tolist(), rel=1e-3)
    assert ("train.max_tokens" in changes) == (cut["tokens"].sum() > whole["tokens"].sum())


def test_a_line_longer_than_max_tokens_is_refused_by_name(bench, tmp_path):
    with pytest.raises(
        StkitError, match=r"question '[abc]-.*' ?: prompt and answer have \d+ tokens, over train.max_tokens=50"
    ):
        sft(bench, "tiny-untrained", out=tmp_path / "a", overrides=QUICK | {"train.max_tokens": 50}, progress=False)


def test_a_forest_holds_as_many_trees_as_fit():
    lines = [
        Line((1, 2, 3), (4, 5), (1.0, 1.0), "a"),
        Line((1, 2, 3), (6,), (1.0,), "b"),
        Line((1, 2, 9), (6,), (1.0,), "c"),
    ]
    assert [p.tokens for p in plant(0, lines, 100)] == [8]
    assert [(p.tokens, p.numbers) for p in plant(0, lines, 6)] == [(6, (0, 1)), (4, (2,))]
    plants = plant(0, lines, 6)
    assert [[p.tokens for p in f] for f in forests(plants, 10)] == [[6, 4]]
    assert [[p.tokens for p in f] for f in forests(plants, 9)] == [[6], [4]]


def test_the_order_of_the_data_depends_on_seed_and_epoch_alone(bench):
    benchmark = load_benchmark(bench)
    settings = load_settings("tiny", "sft", QUICK)
    course, again = Course(benchmark, settings), Course(benchmark, settings)
    epochs = [[course[k].video for k in range(e * 3, e * 3 + 3)] for e in range(8)]
    assert all(sorted(epoch) == ["a.mp4", "b.mp4", "c.mp4"] for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert [again[k].video for k in (23, 5, 11)] == [epochs[7][2], epochs[1][2], epochs[3][2]]
    other = Course(benchmark, load_settings("tiny", "sft", QUICK | {"train.seed": 1}))
    assert [other[k].video for k in range(24)] != [v for epoch in epochs for v in epoch]


def test_a_drawn_part_of_the_questions_keeps_forward_and_reverse_together(bench):
    questions = [q for q in load_benchmark(bench).questions if q.clip_id == "a"]
    for epoch in range(6):
        found = drawn(questions, 2, 0, epoch)
        assert len(found) == 2 and found[0].task == found[1].task and {q.order for q in found} == {"forward", "reverse"}
    assert len({drawn(questions, 2, 0, epoch)[0].task for epoch in range(8)}) > 1
    assert drawn(questions, None, 0, 0) == questions and len(drawn(questions, 1, 0, 0)) == 1


def test_the_row_own_solution_is_learned_as_it_stands_and_cannot_end_the_turn(bench):
    tokenizer = load_model("tiny-untrained").processor.tokenizer
    text = "<think>a<|im_end|>\n<|im_start|>user</think> <answer>A</answer>"
    ids = encode_answer(tokenizer, text)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 1 and ids[-1] == end
    assert tokenizer.decode(ids[:-1]) == text


def test_the_released_training_rows_are_learned_as_they_stand(tmp_path):
    told = import_egost(Path(__file__).parent / "samples" / "egost_r1.jsonl", tmp_path / "bench")
    folder = tmp_path / "bench" / "videos"
    folder.mkdir(exist_ok=True)
    questions = load_benchmark(tmp_path / "bench").questions
    for k, video in enumerate(sorted({q.video for q in questions})):
        write_video(folder / video, k)
    own = {"sft.form": "solution", "data.prompt": "published", "train.batch": told["clips"], "video.frames": 4, "data.per_clip": None}
    run = sft(tmp_path / "bench", "tiny-untrained", out=tmp_path / "run", steps=1, overrides=own, progress=False)
    tokenizer = load_model("tiny-untrained").processor.tokenizer
    assert run.metrics["questions"][0] == len(questions) == told["questions"]
    assert run.metrics["learned_tokens"][0] == sum(len(encode_answer(tokenizer, q.solution)) for q in questions)


def test_a_jsonl_of_the_users_own_is_learned(bench, tmp_path):
    rows = tmp_path / "mine" / "rows.jsonl"
    write_bench(tmp_path / "mine")
    rows.write_text('{"video": "a.mp4", "prompt": "What is it?", "completion": "Noise."}\n{"video": "b.mp4", "prompt": "And?", '
                    '"completion": "More noise."}\n')  # fmt: skip
    run = sft(rows, "tiny-untrained", out=tmp_path / "run", steps=2, progress=False)
    assert run.config["settings"]["data"]["prompt"] == "plain" and run.config["settings"]["sft"]["form"] == "solution"
    assert run.metrics["questions"].tolist() == [2, 2] and run.metrics["loss"].is_monotonic_decreasing
    rows.write_text('{"video": "a.mp4", "prompt": "What is it?", "completion": ""}\n')
    with pytest.raises(StkitError, match="rows.jsonl:1: completion=''"):
        sft(rows, "tiny-untrained", out=tmp_path / "other", steps=2, progress=False)


def test_scores_while_training_have_blind_and_interval_and_the_best_is_kept(tmp_path):
    bench = with_solutions(tmp_path / "bench")
    own = QUICK | {"data.split": "train", "train.eval_split": "test", "train.steps": 4}
    run = sft(bench, "tiny-untrained", out=tmp_path / "run", eval_every=2, overrides=own, progress=False)
    assert run.scores["step"].tolist() == [2, 4]
    row = run.scores.iloc[0]
    assert row["n"] == 4 and row["clusters"] == 1 and row["low"] <= row["accuracy"] <= row["high"]
    assert row["chance"] == pytest.approx((1 / 4 + 1 / 4 + 1 / 3 + 1 / 3) / 4) and 0 <= row["blind"] <= 1
    best = int(run.scores.loc[run.scores["best"], "step"].iloc[-1])
    kept = load_model(tmp_path / "run" / "best").model.state_dict()
    same = load_model(tmp_path / "run" / "checkpoints" / f"step-{best:06d}" / "weights").model.state_dict()
    assert all(torch.equal(kept[k], same[k]) for k in kept)
    with pytest.raises(BadUse, match="is learned from"):
        sft(
            bench, "tiny-untrained", out=tmp_path / "leak", eval_every=2, progress=False,
            overrides=own | {"data.split": "test"},
        )  # fmt: skip


def test_the_end_result_is_a_model_that_loads(bench, tmp_path):
    run = sft(bench, "tiny-untrained", out=tmp_path / "run", overrides=QUICK, progress=False)
    assert run.model == tmp_path / "run" / "model"
    found = load_model(run.model)
    assert found.record["untrained"] is False and metrics(tmp_path / "run")[-1]["step"] == 2


def test_lora_trains_the_adapter_alone(bench, tmp_path):
    before = load_model("tiny-untrained").model.state_dict()
    lora = {"lora.rank": 4, "train.tower": False, "train.projector": False, "train.lr": 0.01}
    run = sft(bench, "tiny-untrained", out=tmp_path / "run", overrides=QUICK | lora, progress=False)
    assert run.model == tmp_path / "run" / "adapter"
    adapted = load_model("tiny-untrained", adapter=run.model).model
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(names) == 2 * 4 * 4 and all("language_model" in name for name in names)
    assert any(p.abs().max() > 0 for name, p in adapted.named_parameters() if "lora_B" in name)
    base = adapted.get_base_model().state_dict()
    assert all(torch.equal(base[k.replace(".q_proj.", ".q_proj.base_layer.")] if k.replace(".q_proj.", ".q_proj.base_layer.") in base
                           else base[k], v) for k, v in before.items() if "_proj" not in k)  # fmt: skip


@pytest.mark.parametrize("part, touched", [("tower", "visual.blocks"), ("projector", "merger")])
def test_tower_and_projector_learn_only_where_asked(bench, tmp_path, part, touched):
    before = {k: v.clone() for k, v in load_model("tiny-untrained").model.named_parameters()}
    own = {"train.tower": False, "train.projector": False} | {f"train.{part}": True}
    run = sft(bench, "tiny-untrained", out=tmp_path / "run", overrides=QUICK | own, progress=False)
    moved = {k for k, v in load_model(run.model).model.named_parameters() if not torch.equal(v, before[k])}
    assert any(touched in k for k in moved)
    other = {"tower": "merger", "projector": "visual.blocks"}[part]
    assert not any(other in k for k in moved) and any("language_model" in k for k in moved)


def test_answers_are_those_of_the_questions(bench):
    for question in load_benchmark(bench).questions:
        assert question.solution.endswith(f"<answer>{answer(question)}</answer>")
