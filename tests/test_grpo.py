"""GRPO on trees: the loss and gradient of plain passes, ratios of 1, skipped groups, refills, recorded rollouts."""

import math

import pytest
import torch
from benchmaker import lines, write_bench
from test_losses import reference_loss
from trainmaker import metrics

from stkit import grpo
from stkit.runs import write_jsonl
from stkit.runtime import StkitError, StkitWarning
from stkit.train.forest import plant
from stkit.train.grpo import draw, lines_of, loss_on
from stkit.train.start import begin

SMALL = {
    "data.split": None, "data.tasks": ["direction"], "grpo.group": 4, "grpo.max_new_tokens": 6, "train.batch": 2,
    "train.steps": 2, "rewards.correct": 0, "rewards.format": 0,
}  # fmt: skip


def parity(rollouts):
    return [len(r.text) % 3 for r in rollouts]


def flat(rollouts):
    return [1.0 for _ in rollouts]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("grpo") / "bench")


def train(bench, out, rewards=parity, **overrides):
    return grpo(
        bench, "tiny-untrained", out=out, progress=False,
        overrides=SMALL | overrides, rewards={rewards.__name__: rewards},
    )  # fmt: skip


def job_on(bench, out, **overrides):
    return begin(
        "grpo", bench, "tiny-untrained", "tiny", out, SMALL | {"rewards.parity": 1.0} | overrides, progress=False
    )


def plain_log_probs(model, group, rollout, video, temperature):
    """By Transformers' own forward pass on prompt and rollout, with the video, nothing shared."""
    ids = torch.tensor([[*group.prompt.ids, *rollout.ids]])
    kinds = (ids == model.config.video_token_id).long() * 2
    kinds[:, len(group.prompt.ids) :] = 0
    logits = model(
        input_ids=ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids),
        pixel_values_videos=video.pixel_values, video_grid_thw=video.grid_thw[None],
        second_per_grid_ts=torch.tensor([video.second_per_grid_s]),
    ).logits[0]  # fmt: skip
    start = len(group.prompt.ids) - 1
    rows = (logits[start:-1] / temperature).log_softmax(-1)
    return rows.gather(1, ids[0, start + 1 :, None])[:, 0].double()  # the reference compares products exactly


def on_tree(job, batch):
    """The loss of a batch by the library, its sums and the gradient's norm."""
    lined = [lines_of(groups) for groups in batch.learned]
    plants = [one for k, (own, _) in enumerate(lined) for one in plant(k, own, 100_000)]
    loss, sums = loss_on(job, batch, lined, plants)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(job.policy.trainable, 1e9)
    job.policy.model.zero_grad()
    return float(loss.detach()), sums, float(norm)


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "gspo"])
@pytest.mark.parametrize("moved", [False, True])
def test_loss_and_gradient_are_the_papers_on_plain_passes(bench, tmp_path, variant, moved):
    """Ratios were always 1 and never clipped in the released code, and its KL clamp had no gradient."""
    job = job_on(
        bench,
        tmp_path / "run",
        **{"grpo.variant": variant, "grpo.beta": 0.3, "grpo.temperature": 0.8, "grpo.refills": 0},
    )
    batch = draw(job, {"parity": parity})
    if moved:  # as after an update
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in job.policy.trainable:
                parameter += 0.004 * torch.randn(parameter.shape, generator=draws)
    loss, sums, norm = on_tree(job, batch)
    groups = [(shot, group) for shot, own in zip(batch.shots, batch.learned) for group in own]
    assert groups and (sums["clipped"] > 0) == moved
    total = 0.0
    counted = sum(len(r.ids) for _, g in groups for r in g.rollouts)
    every = len([g for shot in batch.shots for g in shot.groups])
    for shot, group in groups:
        new = [plain_log_probs(job.policy.model, group, r, shot.seen.inputs, 0.8) for r in group.rollouts]
        with torch.no_grad():
            ref = [plain_log_probs(job.policy.frozen, group, r, shot.seen.inputs, 0.8) for r in group.rollouts]
        old, lengths = [r.log_probs.double() for r in group.rollouts], [len(r.ids) for r in group.rollouts]
        share = sum(lengths) / counted if variant == "dapo" else 1 / every
        total = total + share * reference_loss(new, old, ref, lengths, group.rewards, variant, 0.2, 0.2, 0.3, 6)
    total.backward()
    wanted = torch.nn.utils.clip_grad_norm_(job.policy.trainable, 1e9)
    assert loss == pytest.approx(float(total.detach()), rel=2e-4, abs=1e-6)
    assert norm == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_is_1_at_the_first_update(bench, tmp_path, temperature):
    """Log-probs are those of the distribution that was sampled from, in float32, with the attention mask in force."""
    job = job_on(bench, tmp_path / "run", **{"grpo.temperature": temperature})
    batch = draw(job, {"parity": parity})
    for shot, own in zip(batch.shots, batch.learned):
        for group in own:
            for rollout in group.rollouts:
                now = plain_log_probs(job.policy.model, group, rollout, shot.seen.inputs, temperature).detach()
                assert (now - rollout.log_probs).exp().sub(1).abs().max() < 1e-5
    _, sums, _ = on_tree(job, batch)
    assert sums["ratio"] / sums["learned"] == pytest.approx(1, abs=1e-6) and sums["clipped"] == 0
    assert sums["kl"] == pytest.approx(0, abs=1e-5)


def test_with_lora_the_reference_is_the_base_without_the_adapter(bench, tmp_path):
    job = job_on(bench, tmp_path / "run", **{"lora.rank": 4, "train.tower": False, "train.projector": False})
    batch = draw(job, {"parity": parity})
    with torch.no_grad():
        for name, parameter in job.policy.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05
    assert job.policy.frozen is None
    _, sums, _ = on_tree(job, batch)
    wanted = 0.0
    for shot, own in zip(batch.shots, batch.learned):
        for group in own:
            for rollout in group.rollouts:
                with torch.no_grad():
                    new = plain_log_probs(job.policy.model.get_base_model(), group, rollout, shot.seen.inputs, 1.0)
                    with job.policy.model.disable_adapter():
                        ref = plain_log_probs(job.policy.model.get_base_model(), group, rollout, shot.seen.inputs, 1.0)
                wanted += float(((ref - new).exp() - 1 - (ref - new)).sum())
    assert wanted > 1e-3 and sums["kl"] == pytest.approx(wanted, rel=1e-3)


def test_a_run_writes_what_it_did(bench, tmp_path):
    run = train(bench, tmp_path / "run")
    row = metrics(run.out)[0]
    assert {"step", "loss", "reward", "kl", "entropy", "lr", "grad_norm", "clip_fraction", "tokens"} <= row.keys()
    assert row["groups"] == 4 and row["rollouts"] == 16 and row["reward_parity"] == pytest.approx(row["reward"])
    first = run.rollouts[run.rollouts["step"] == 1]
    assert len(first) == 16 and first["reward"].mean() == pytest.approx(row["reward"])
    assert first["log_prob"][0] == pytest.approx(sum(first["log_probs"][0]), rel=1e-6)
    for _, group in first.groupby("id"):
        values = group["reward"]
        if values.std() > 0:
            assert group["advantage"].tolist() == pytest.approx(((values - values.mean()) / values.std()).tolist())


def test_groups_of_equal_reward_are_skipped_and_counted_and_said_after_a_while(bench, tmp_path):
    with pytest.warns(StkitWarning, match=r"equal \(mean 1\) in the last 2 batches.*all are rewarded alike"):
        run = train(bench, tmp_path / "run", flat, **{"grpo.patience": 2})
    rows = metrics(run.out)
    assert [r["skipped_groups"] for r in rows] == [4, 4] and [r["tokens"] for r in rows] == [0, 0]
    before, after = job_on(bench, tmp_path / "other").policy.model.state_dict(), run_weights(run)
    assert all(torch.equal(before[k], after[k]) for k in before)


def run_weights(run):
    from stkit import load_model

    return load_model(run.model).model.state_dict()


def test_dapo_draws_again_for_groups_of_equal_reward(bench, tmp_path):
    run = train(bench, tmp_path / "run", flat, **{"grpo.variant": "dapo", "grpo.refills": 2, "train.steps": 1})
    row = metrics(run.out)[0]
    assert (
        row["refills"] == 2 and row["groups"] == 12 and row["skipped_groups"] == 12 and row["epoch"] == pytest.approx(2)
    )
    run = train(bench, tmp_path / "other", parity, **{"grpo.variant": "dapo", "grpo.refills": 3, "train.steps": 1})
    row = metrics(run.out)[0]
    assert row["groups"] - row["skipped_groups"] >= 4 or row["refills"] == 3


def test_dapo_punishes_overlong_rollouts(bench, tmp_path):
    run = train(
        bench,
        tmp_path / "run",
        flat,
        **{"grpo.variant": "dapo", "grpo.refills": 0, "grpo.overlong": 2, "train.steps": 1},
    )
    for row in lines(run.out / "rollouts.jsonl"):
        assert row["rewards"]["overlong"] == min(0, max(-1, (4 - row["tokens"]) / 2))
        assert row["reward"] == 1 + row["rewards"]["overlong"]


def test_several_updates_learn_from_one_batch_and_their_ratios_leave_1(bench, tmp_path):
    run = train(bench, tmp_path / "run", **{"grpo.updates": 2, "train.steps": 4, "train.lr": 0.01, "train.warmup": 0})
    rows = metrics(run.out)
    assert [r["update"] for r in rows] == [0, 1, 0, 1] and sorted(set(run.rollouts["step"])) == [1, 3]
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-6) and abs(rows[1]["ratio"] - 1) > 1e-3
    assert rows[0]["clip_fraction"] == 0 and rows[1]["clip_fraction"] > 0


@pytest.mark.parametrize("variant", ["grpo", "dapo"])
def test_recorded_rollouts_give_the_run_that_they_were_recorded_in(bench, tmp_path, variant):
    own = {"grpo.variant": variant, "grpo.refills": 0}
    first = train(bench, tmp_path / "a", **own)
    again = train(bench, tmp_path / "b", **own | {"grpo.recorded": str(first.out / "rollouts.jsonl")})
    for a, b in zip(metrics(first.out), metrics(again.out), strict=True):
        for name in ("loss", "reward", "kl", "entropy", "grad_norm", "ratio"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-7), name


def test_recorded_texts_without_log_probs_are_taken_for_the_policys_own(bench, tmp_path):
    """What a server's rollouts are: texts."""
    first = train(bench, tmp_path / "a", **{"train.steps": 1})
    rows = [{k: row[k] for k in ("step", "id", "text", "finished")} for row in lines(first.out / "rollouts.jsonl")]
    write_jsonl(tmp_path / "served.jsonl", rows)
    own = {"grpo.recorded": str(tmp_path / "served.jsonl"), "train.steps": 1}
    row = metrics(train(bench, tmp_path / "b", **own).out)[0]
    assert row["ratio"] == pytest.approx(1, abs=1e-6) and row["grad_norm"] > 0
    with pytest.raises(StkitError, match="no rollouts of step 2"):
        train(bench, tmp_path / "c", **own | {"train.steps": 2})


def test_forced_tokens_are_not_learned_from(bench, tmp_path):
    run = train(bench, tmp_path / "run", **{"grpo.think_budget": 2, "grpo.max_new_tokens": 16, "train.steps": 1})
    rows = lines(run.out / "rollouts.jsonl")
    forced = sum(len(row["forced"]) for row in rows)
    assert forced > 0
    learned = sum(row["tokens"] - len(row["forced"]) for row in rows if row["advantage"])
    flat_groups = {row["id"] for row in rows} - {row["id"] for row in rows if row["advantage"]}
    learned += sum(
        row["tokens"] - len(row["forced"]) for row in rows if not row["advantage"] and row["id"] not in flat_groups
    )
    assert metrics(run.out)[0]["learned_tokens"] == learned


def test_a_kl_over_the_bound_stops_the_run_and_keeps_the_checkpoint(bench, tmp_path):
    own = {"grpo.max_kl": 1e-4, "train.lr": 0.02, "train.warmup": 0, "train.steps": 6, "train.save_every": 1}
    with pytest.raises(
        StkitError, match=r"the KL to the reference is [\d.]+, over grpo.max_kl=0.0001.*last checkpoint is"
    ):
        train(bench, tmp_path / "run", **own)
    assert 1 <= len(metrics(tmp_path / "run")) < 6 and not (tmp_path / "run" / "model").exists()


def test_a_run_is_not_resumed_with_another_reward_function(bench, tmp_path):
    train(bench, tmp_path / "run", **{"train.steps": 1})
    with pytest.raises(StkitError, match="functions"):
        grpo(bench, "tiny-untrained", out=tmp_path / "run", overrides=SMALL | {"train.steps": 1}, progress=False,
             rewards={"parity": lambda rollouts: [math.pi for _ in rollouts]})  # fmt: skip


def test_an_unknown_reward_is_refused_before_anything_is_loaded(bench, tmp_path):
    with pytest.raises(StkitError, match="corect"):
        grpo(bench, model="no/such", out=tmp_path / "run", overrides={"rewards.corect": 1.0}, progress=False)
    assert not (tmp_path / "run").exists()
