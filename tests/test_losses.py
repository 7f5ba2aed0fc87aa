"""GRPO's arithmetic against a reference written from the papers, rollout by rollout and token by token."""

import math

import pytest
import torch

from stkit.runtime import BadUse
from stkit.train.losses import group_advantages, kl_penalty, normaliser, overlong_penalty, policy_loss, reduced

LENGTHS, LIMIT, G = (3, 5, 1, 4), 6, 4
VARIANTS = ("grpo", "dr_grpo", "dapo", "gspo")


def reference_loss(new, old, ref, lengths, rewards, variant, low, high, beta, limit):
    """One group: the papers' sums as loops. new, old, ref: lists of 1-D tensors; returns the loss to be minimised."""
    mean = sum(rewards) / len(rewards)
    spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    total = 0.0
    for i, length in enumerate(lengths):
        advantage = (rewards[i] - mean) / (1 if variant == "dr_grpo" else spread)
        whole = torch.exp(sum(new[i][t] - old[i][t] for t in range(length)) / length)
        terms = []
        for t in range(length):
            ratio = whole if variant == "gspo" else torch.exp(new[i][t] - old[i][t])
            clipped = min(max(ratio.item(), 1 - low), 1 + high)
            inside = ratio * advantage <= clipped * advantage
            surrogate = ratio * advantage if inside else torch.tensor(clipped * advantage, dtype=ratio.dtype)
            kl = torch.exp(ref[i][t] - new[i][t]) - (ref[i][t] - new[i][t]) - 1
            terms.append(surrogate - beta * kl)
        share = {"grpo": 1 / (length * len(lengths)), "gspo": 1 / (length * len(lengths))}
        share |= {"dapo": 1 / sum(lengths), "dr_grpo": 1 / (len(lengths) * limit)}
        total = total - sum(terms) * share[variant]
    return total


def a_group(seed, spread):
    draw = torch.Generator().manual_seed(seed)
    old = [-torch.rand(n, generator=draw, dtype=torch.float64) - 0.2 for n in LENGTHS]
    new = [(o + spread * torch.randn(len(o), generator=draw, dtype=torch.float64)).requires_grad_() for o in old]
    ref = [o + 0.3 * torch.randn(len(o), generator=draw, dtype=torch.float64) for o in old]
    return new, old, ref


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_loss_and_gradient_are_the_papers(variant, spread):
    new, old, ref = a_group(1, spread)
    rewards, beta, low, high = [1.0, 0.0, 0.25, 1.0], 0.1, 0.2, 0.28
    wanted = reference_loss(new, old, ref, LENGTHS, rewards, variant, low, high, beta, LIMIT)
    wanted_grads = torch.autograd.grad(wanted, new)

    mask = padded([torch.ones(n) for n in LENGTHS]).bool()
    advantages = group_advantages(torch.tensor([rewards], dtype=torch.float64), variant)[0]
    rows = padded(new)
    found = policy_loss(rows, padded(old), mask, advantages, variant, low, high)
    held = mask.double()
    kl = reduced(kl_penalty(rows, padded(ref), "k3"), held, held.sum(1), variant)
    loss = (found.total + beta * kl) / normaliser(variant, LENGTHS, LIMIT)
    grads = torch.autograd.grad(loss, new)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for a, b in zip(grads, wanted_grads):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_clipping_ends_the_gradient_where_the_ratio_left_the_bounds():
    old = torch.zeros(1, 3, dtype=torch.float64)
    new = torch.tensor([[math.log(1.5), math.log(1.1), math.log(0.5)]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    found = policy_loss(new, old, mask, torch.tensor([1.0], dtype=torch.float64), "dapo", 0.2, 0.2)
    found.total.backward()
    assert found.clipped == 1  # 1.5 is cut to 1.2; 0.5 with a positive advantage is the smaller and stays
    assert found.total.item() == pytest.approx(-(1.2 + 1.1 + 0.5))
    assert new.grad[0].tolist() == pytest.approx([0.0, -1.1, -0.5])


def test_the_upper_bound_can_be_wider_than_the_lower():
    new = torch.tensor([[math.log(1.25)]], requires_grad=True)
    one, mask = torch.ones(1), torch.ones(1, 1, dtype=torch.bool)
    assert policy_loss(new, torch.zeros(1, 1), mask, one, "dapo", 0.2, 0.28).clipped == 0
    assert policy_loss(new, torch.zeros(1, 1), mask, one, "dapo", 0.2, 0.2).clipped == 1


def test_advantages_of_a_group_by_hand():
    found = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]]))
    spread = math.sqrt(4 * 0.25 / 3)
    assert found[0].tolist() == pytest.approx([0.5 / spread, -0.5 / spread, -0.5 / spread, 0.5 / spread])
    assert found[1].tolist() == [0, 0, 0, 0]
    assert group_advantages(torch.tensor([[1.0, 0.0]]), "dr_grpo").tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_has_a_gradient_however_far_the_policy_is(estimator):
    """A clamp in the published code ended the gradient of KL where it was needed most."""
    new = torch.tensor([[-20.0]], dtype=torch.float64, requires_grad=True)
    kl_penalty(new, torch.tensor([[-1.0]], dtype=torch.float64), estimator).sum().backward()
    slope = {"k1": 1.0, "k2": -19.0, "k3": 1 - math.exp(19)}
    assert new.grad.item() == pytest.approx(slope[estimator])


def test_estimators_of_kl_agree_with_the_sum_over_the_vocabulary():
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.log_softmax(torch.randn(50, generator=draw, dtype=torch.float64) * s, -1) for s in (0.6, 0.6))
    exact = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):  # unbiased: their mean under p is KL
        assert (p.exp() * kl_penalty(p, q, estimator)).sum().item() == pytest.approx(exact.item(), rel=1e-9)
    assert (kl_penalty(p, q, "k3") >= 0).all()


def test_overlong_answers_cost_more_the_longer_they_are():
    assert [overlong_penalty(n, 100, 20) for n in (50, 80, 90, 100)] == [0.0, 0.0, -0.5, -1.0]
    assert overlong_penalty(100, 100, 0) == 0.0


def test_unknown_names_are_refused():
    one = torch.zeros(1, 1)
    with pytest.raises(BadUse, match="k4"):
        kl_penalty(one, one, "k4")
    with pytest.raises(BadUse, match="ppo"):
        policy_loss(one, one, one.bool(), one[0], "ppo", 0.2, 0.2)
