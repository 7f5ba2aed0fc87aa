"""The fifteen faults of the code published with ST-R1 (and of its siblings): each has a test here that would catch it."""

import math

import pytest
import torch
from benchmaker import lines, write_bench
from test_grpo import parity, plain_log_probs
from test_grpo import train as run_grpo
from trainmaker import with_solutions

from stkit import load_model, merge, sft
from stkit.runtime import StkitError
from stkit.train import sft as sft_module
from stkit.train.forest import plant
from stkit.train.grpo import draw
from stkit.train.losses import kl_penalty
from stkit.train.rewards import Answered, correct, well_formed
from stkit.train.sft import examples
from stkit.train.start import begin
from stkit.vlm.logps import tree_logps
from stkit.vlm.tree import Tree

OWN = {"data.split": None, "data.tasks": ["direction"], "sft.form": "solution", "train.steps": 1, "train.batch": 2}
GROUPS = OWN | {
    "grpo.group": 4,
    "grpo.max_new_tokens": 6,
    "rewards.parity": 1.0,
    "rewards.correct": 0,
    "rewards.format": 0,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return with_solutions(tmp_path_factory.mktemp("faults") / "bench")


@pytest.fixture(scope="module")
def job(bench, tmp_path_factory):
    return begin("sft", bench, "tiny-untrained", "tiny", tmp_path_factory.mktemp("job") / "run", OWN, progress=False)


@pytest.fixture(scope="module")
def batch(bench, tmp_path_factory):
    own = begin(
        "grpo", bench, "tiny-untrained", "tiny", tmp_path_factory.mktemp("batch") / "run", GROUPS, progress=False
    )
    return own, draw(own, {"parity": parity})


def loss_with(job, inputs=None):
    """The update's loss on the first clip, with other video inputs in place of its own."""
    item = job.course[0]
    seen = job.watcher.watch(item)
    (one,) = plant(0, examples(job.benchmark, item, seen, job), 100_000)
    found = tree_logps(
        job.policy.model, [one.tree], [seen.inputs if inputs is None else inputs(seen.inputs)], tokens="weighted"
    )
    return float(-(found.log_probs * found.packed.weight).sum().detach())


def test_01_the_cold_start_sees_the_video(job):
    """Its collator dropped pixel_values_videos."""
    assert loss_with(job) != loss_with(
        job, lambda video: video._replace(pixel_values=torch.zeros_like(video.pixel_values))
    )


def test_02_the_prompt_is_no_label_and_no_assistant_header_is(job):
    item = job.course[0]
    (one,) = plant(0, examples(job.benchmark, item, job.watcher.watch(item), job), 100_000)
    tokenizer = job.policy.loaded.processor.tokenizer
    learned = [tokenizer.decode([i for i, w in zip(node.ids, node.weight) if w]) for node, _ in one.tree.walk()]
    assert [text for text in learned if text] == [f"{q.solution}<|im_end|>" for q in item.questions]


def test_03_a_video_is_encoded_once_and_goes_with_its_own_clip(bench, tmp_path, monkeypatch):
    """Pixel values were repeated G times, and mixed up for batches above 1."""
    calls = []
    real = sft_module.tree_logps
    monkeypatch.setattr(
        sft_module,
        "tree_logps",
        lambda model, trees, videos, *a, **k: calls.append((trees, videos)) or real(model, trees, videos, *a, **k),
    )
    sft(bench, "tiny-untrained", out=tmp_path / "run", overrides=OWN, progress=False)
    ((trees, videos),) = calls
    assert len(trees) == len(videos) == 2 and not torch.equal(videos[0].pixel_values, videos[1].pixel_values)
    job = begin("sft", bench, "tiny-untrained", "tiny", tmp_path / "other", OWN, progress=False)
    for k, item in enumerate(job.items(0, 2)):
        assert torch.equal(job.watcher.watch(item).inputs.pixel_values, videos[k].pixel_values)
        names = {node.name for node, _ in trees[k].walk() if node.name}
        assert names == {q.id for q in item.questions}


def test_04_the_log_prob_pass_masks_what_a_rollout_must_not_see(batch):
    """The attention mask was dropped: each rollout's log-probs are those of a pass over prompt and rollout alone."""
    job, found = batch
    group = next(g for own in found.learned for g in own)
    shot = next(s for s in found.shots if group in s.groups)
    for rollout in group.rollouts:
        alone = plain_log_probs(job.policy.model, group, rollout, shot.seen.inputs, 1.0).detach().float()
        torch.testing.assert_close(alone, rollout.log_probs, rtol=0, atol=1e-5)


def test_05_the_seconds_between_patches_reach_the_model(job):
    assert loss_with(job) != loss_with(
        job, lambda video: video._replace(second_per_grid_s=video.second_per_grid_s * 40)
    )


def test_06_nothing_is_cut_off_a_prompt(bench, tmp_path, monkeypatch):
    """Truncation from the left could cut video tokens."""
    with pytest.raises(StkitError, match="over train.max_tokens=60: raise it to .*nothing is ever cut off"):
        sft(bench, "tiny-untrained", out=tmp_path / "a", overrides=OWN | {"train.max_tokens": 60}, progress=False)
    loaded = load_model("tiny-untrained")
    short = loaded._replace(record=loaded.record | {"context": 80})
    with pytest.raises(StkitError, match="the model's context is 80.*a prompt is never cut"):
        sft(bench, model=short, out=tmp_path / "b", overrides=OWN, progress=False)


def test_07_log_softmax_is_in_float32_whatever_the_model_is_in():
    model = load_model("tiny-untrained", dtype="bfloat16").model
    tree = Tree(range(5, 25))
    for token in range(200, 264):
        tree.branch([token])
    found = tree_logps(model, tree)
    assert found.log_probs.dtype == torch.float32
    wide = model.float()
    hidden = (
        load_model("tiny-untrained", dtype="bfloat16")
        .model.model.language_model(torch.arange(5, 25)[None])
        .last_hidden_state[0, -1]
    )
    exact = (hidden.float() @ wide.lm_head.weight.T).log_softmax(-1)[200:264]
    torch.testing.assert_close(found.log_probs[20:].detach(), exact.detach(), rtol=0, atol=0.02)
    rounded = exact.to(torch.bfloat16).float()
    assert (found.log_probs[20:] - exact).abs().mean() < (rounded - exact).abs().mean()


def test_08_the_kl_has_its_gradient_however_far_the_policy_is():
    for estimator in ("k1", "k2", "k3"):
        new = torch.tensor([-30.0, -1.0, -0.1], requires_grad=True)
        kl_penalty(new, torch.tensor([-0.1, -1.5, -30.0]), estimator).sum().backward()
        assert (new.grad != 0).all()


def test_09_the_ratio_leaves_1_and_is_clipped(bench, tmp_path):
    own = {"grpo.updates": 2, "train.steps": 2, "train.lr": 0.01, "train.warmup": 0}
    rows = lines(run_grpo(bench, tmp_path / "run", **own).out / "metrics.jsonl")
    assert rows[0]["clip_fraction"] == 0 < rows[1]["clip_fraction"] and abs(rows[1]["ratio"] - 1) > 1e-3


def rollouts(job, *texts):
    question = next(q for q in job.benchmark.questions if q.task == "direction" and q.answer == 2)
    return [Answered(question, text, 9, True, 64) for text in texts]


def test_10_the_answer_is_not_the_first_capital(job):
    said = rollouts(job, "Answer: C", "Based on the video, D", "<answer>C</answer>", "A or C", "A B C D")
    assert correct(said) == [1, 0, 1, 0, 0]


def test_11_the_form_is_that_of_the_whole_text(job):
    good = "<think>I turned left twice.</think> <answer>C</answer>"
    assert well_formed(
        rollouts(job, good, f"Well: {good}", f"{good} Or D?", f"{good}{good}", "<answer>C</answer>")
    ) == [1, 0, 0, 0, 0]


def test_12_what_fails_is_an_error_and_never_a_reward(bench, tmp_path):
    """Exceptions were stored as predictions, and scored."""

    def broken(rollouts):
        raise RuntimeError("no judge")

    with pytest.raises(StkitError, match="broken.*no judge"):
        run_grpo(bench, tmp_path / "run", broken)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_13_an_nf4_adapter_is_merged_into_what_it_was_trained_on_and_the_difference_said(bench, tmp_path):
    own = OWN | {
        "model.four_bit": True,
        "lora.rank": 4,
        "train.tower": False,
        "train.projector": False,
        "train.lr": 0.02,
    }
    run = sft(bench, "tiny-untrained", out=tmp_path / "run", overrides=own, progress=False)
    told = merge(run.out, tmp_path / "merged")
    assert told["difference"]["mean"] < told["original_difference"]["mean"]
    assert {
        "processor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    } <= {p.name for p in (tmp_path / "merged").iterdir()}


def test_14_the_time_of_a_patch_is_that_of_the_frames_that_were_sampled(tmp_path):
    """Cut down to 8 frames, a clip was still said to have 2 s a temporal patch."""
    bench = write_bench(tmp_path / "bench")
    for sampling in ("published", "uniform"):
        job = begin(
            "sft",
            bench,
            "tiny-untrained",
            "tiny",
            tmp_path / sampling,
            {**OWN, "sft.form": "answer", "video.sampling": sampling},
            progress=False,
        )
        inputs = job.watcher.watch(job.course[0]).inputs
        times = inputs.timestamps_s
        assert math.isclose(inputs.second_per_grid_s, (times[-1] - times[0]) / (len(times) - 1), rel_tol=0.1)
        assert job.watcher.chosen["sampling"] == sampling


def test_15_nothing_is_learned_without_the_frames(tmp_path):
    """An exception in the trainer led to a second try without the video."""
    bench = with_solutions(tmp_path / "bench")
    (bench / "videos" / "a.mp4").write_bytes(b"cut off")
    with pytest.raises(StkitError, match="a.mp4"):
        sft(bench, "tiny-untrained", out=tmp_path / "run", overrides=OWN | {"train.steps": 2}, progress=False)
    rows = lines(tmp_path / "run" / "metrics.jsonl") if (tmp_path / "run" / "metrics.jsonl").exists() else []
    assert len(rows) < 2
