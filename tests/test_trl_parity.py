"""The loss of GRPO and its variants equals that of TRL's GRPOTrainer on the same rollouts, and so does its gradient.

TRL's own trainer computes its loss on the tiny model: its log-probs, its surrogate, its KL, its mean. Ours are read from
one prefix tree. Given are what both take from elsewhere: rollouts, advantages, the log-probs that were sampled from and
the reference's. Prompts are text, since TRL takes no video.

Where TRL computes something else, and what therefore is not compared:

- The KL: by default TRL multiplies it by the ratio (``use_bias_correction_kl``, after DeepSeek-V3.2); the papers of the four
  variants don't, nor does stkit. The comparison turns it off, and a test shows that it is all that this default changes.
- TRL knows the k3 estimator of KL only.
- Advantages: TRL divides by the group's standard deviation + 1e-4, stkit by the standard deviation itself.
- Of dr_grpo and gspo TRL leaves parts to the caller: no division by the deviation (``scale_rewards="none"``), and
  ``importance_sampling_level="sequence"``. Its dapo has no filling up of groups of equal reward.
- Groups of equal reward stay in TRL's batch, where the KL still pulls on them; stkit skips them.
- At the first update on rollouts TRL takes the policy's present log-probs for the old ones, stkit those sampled from.
"""

import pytest
import torch

from stkit.runtime import child_seed
from stkit.train.losses import kl_penalty, normaliser, policy_loss, reduced, rows_of
from stkit.vlm.load import load_model
from stkit.vlm.logps import tree_logps
from stkit.vlm.tree import Tree
from stkit.vlm.views import base_model

trl = pytest.importorskip("trl", reason="bench-only: pip install -e '.[bench]'")

LIMIT, BETA, LOW, HIGH = 9, 0.3, 0.2, 0.28
LENGTHS = (9, 4, 1, 7, 3, 6)  # two groups of three rollouts
ADVANTAGES = (1.1, -0.2, -0.9, 0.5, 0.7, -1.2)
VARIANTS = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}


def draws(*names) -> torch.Generator:
    return torch.Generator().manual_seed(child_seed(0, *names))


def a_batch(vocabulary: int) -> dict:
    """Prompts of two questions (one shorter than the other) and the rollouts of each, with what is known of them."""
    ids = [torch.randint(5, vocabulary, (n,), generator=draws("rollout", k)) for k, n in enumerate(LENGTHS)]
    prompts = [torch.randint(5, vocabulary, (n,), generator=draws("prompt", n)) for n in (11, 8)]
    return {"prompts": prompts, "rollouts": ids, "owner": [0, 0, 0, 1, 1, 1], "gains": torch.tensor(ADVANTAGES)}


def padded(rows, left: bool = False, fill: float = 0) -> torch.Tensor:
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill, padding_side=side)


def tree_rows(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the rollouts ``(6, 9)`` by one forest, and the mask of their tokens."""
    trees = [Tree(prompt.tolist()) for prompt in batch["prompts"]]
    leaves = [trees[o].branch(r.tolist(), weight=1.0) for o, r in zip(batch["owner"], batch["rollouts"])]
    found = tree_logps(model, trees, [None, None], tokens="weighted")
    place = {id(node): piece for node, piece in zip(found.packed.nodes, found.packed.slices)}
    pieces = [place[id(leaf)] for leaf in leaves]
    return rows_of(found.log_probs, pieces), rows_of(found.packed.weight, pieces) > 0


@pytest.fixture(scope="module")
def tiny():
    loaded = load_model("tiny-untrained")
    batch = a_batch(loaded.record["vocabulary"] - 20)
    with torch.no_grad():
        now, mask = tree_rows(loaded.model, batch)
    noise = torch.randn(2, *now.shape, generator=draws("noise"))
    apart = torch.tensor([-0.5, 0, 0, 0, 0, 0])[:, None]  # so that a whole rollout leaves gspo's bounds
    batch |= {"old": now + apart + 0.4 * noise[0], "reference": now + 0.3 * noise[1], "mask": mask}
    return loaded, batch


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in base_model(model).named_parameters() if p.grad is not None}


def ours(loaded, batch: dict, variant: str, weigh=torch.ones_like) -> torch.Tensor:
    """Loss of the batch; ``weigh``: of the log-ratios, what the KL is multiplied by."""
    new, mask = tree_rows(loaded.model, batch)
    held = mask.to(new.dtype)
    surrogate = policy_loss(new, batch["old"], mask, batch["gains"], variant, LOW, HIGH)
    assert 0 < surrogate.clipped < surrogate.tokens  # both sides of the minimum are taken
    kl = kl_penalty(new, batch["reference"], "k3") * weigh(new - batch["old"])
    penalty = reduced(kl, held, held.sum(1), variant)
    return (surrogate.total + BETA * penalty) / normaliser(variant, LENGTHS, LIMIT)


def theirs(loaded, batch: dict, variant: str, folder, **settings) -> torch.Tensor:
    """TRL's trainer, made as its users make it (without a reference model: those log-probs are handed over)."""
    from datasets import Dataset

    how = trl.GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, per_device_train_batch_size=6, num_generations=3, report_to=[],
        max_completion_length=LIMIT, epsilon=LOW, epsilon_high=HIGH, gradient_checkpointing=False, **VARIANTS[variant],
        **settings,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": "left or right?"}]] * 2})
    trainer = trl.GRPOTrainer(
        loaded.model, lambda completions, **_: [0.0] * len(completions), how, data, processing_class=loaded.processor
    )
    trainer.beta, trainer.current_gradient_accumulation_steps = BETA, 1
    prompts = [batch["prompts"][owner] for owner in batch["owner"]]
    inputs = {
        "prompt_ids": padded(prompts, left=True), "prompt_mask": padded(map(torch.ones_like, prompts), left=True),
        "completion_ids": padded(batch["rollouts"]), "completion_mask": batch["mask"].long(), "advantages": batch["gains"],
        "old_per_token_logps": batch["old"], "ref_per_token_logps": batch["reference"],
        "num_items_in_batch": torch.tensor(sum(LENGTHS)),
    }  # fmt: skip
    return trainer.compute_loss(trainer.model, inputs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_are_those_of_trl(tiny, tmp_path, variant):
    loaded, batch = tiny
    loaded.model.train()
    mine = ours(loaded, batch, variant)
    my_gradients = gradients(loaded.model, mine)
    its = theirs(loaded, batch, variant, tmp_path, use_bias_correction_kl=False)
    its_gradients = gradients(loaded.model, its)
    assert mine.item() == pytest.approx(its.item(), abs=1e-4)
    assert abs(mine.item()) > 1e-2 and my_gradients.keys() == its_gradients.keys()
    for name, gradient in my_gradients.items():
        torch.testing.assert_close(gradient, its_gradients[name], rtol=1e-3, atol=1e-4, msg=name)


def test_what_trl_adds_by_default_is_the_ratio_on_the_kl(tiny, tmp_path):
    loaded, batch = tiny
    with torch.no_grad():
        its = theirs(loaded, batch, "grpo", tmp_path).item()
        assert ours(loaded, batch, "grpo", torch.exp).item() == pytest.approx(its, abs=1e-4)
        assert ours(loaded, batch, "grpo").item() != pytest.approx(its, abs=1e-3)


def test_the_variants_are_told_apart(tiny):
    """Or else equality to TRL would show nothing."""
    loaded, batch = tiny
    with torch.no_grad():
        values = [ours(loaded, batch, variant).item() for variant in VARIANTS]
    assert min(abs(a - b) for k, a in enumerate(values) for b in values[:k]) > 1e-3
