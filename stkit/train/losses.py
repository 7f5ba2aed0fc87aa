"""The arithmetic of GRPO and its variants on plain tensors: advantages, ratios, clipping, KL, and what is summed up.

Everything works on one row a rollout: log-probs ``(R, C)`` with a mask, so that it can be read beside the papers and
checked by hand; a tree's log-probs are put into rows first (:func:`rows_of`)::

    advantages = group_advantages(rewards.view(-1, G), variant="grpo")
    found = policy_loss(new, old, mask, advantages.flatten(), variant="grpo", clip_low=0.2, clip_high=0.2)
    loss = found.total / normaliser("grpo", mask.sum(1).tolist(), limit=256)

Sources: grpo arXiv 2402.03300 eq. 3 and 4, dr_grpo arXiv 2503.20783, dapo arXiv 2503.14476, gspo arXiv 2507.18071;
k1, k2, k3 after http://joschu.net/blog/kl-approx.html.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..runtime import BadUse

EPSILON = 1e-6  # a group's spread below it is no spread: such a group has no advantage


class PolicyLoss(NamedTuple):
    """What :func:`policy_loss` returns.

    total: what this piece adds to the loss of the update, scalar. clipped: tokens (of gspo: tokens of rollouts) whose
    ratio was clipped. tokens: that were learned from. log_ratio: ``(R, C)``, detached, 0 outside of the mask.
    """

    total: torch.Tensor
    clipped: int
    tokens: int
    log_ratio: torch.Tensor


def group_advantages(rewards: torch.Tensor, variant: str = "grpo") -> torch.Tensor:
    """How much better than its group each rollout was.

    Args:
        rewards: ``(groups, G)``.
        variant: "dr_grpo" leaves the division by the group's standard deviation out.

    Returns:
        ``(groups, G)``; 0 for a group of equal rewards.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, keepdim=True)  # with G - 1, as in the published code
    flat = spread <= EPSILON
    if variant != "dr_grpo":
        centred = centred / spread.clamp(min=EPSILON)
    return centred.masked_fill(flat, 0.0)


def normaliser(variant: str, lengths: Sequence[int], limit: int) -> float:
    """What the sum over an update's rollouts is divided by, so that pieces of the update add up to its mean.

    Args:
        lengths: learned tokens of each rollout of the update, of skipped groups too (they would have added 0).
        limit: max_new_tokens, the constant length of dr_grpo.
    """
    if variant == "dapo":
        return float(max(1, sum(lengths)))
    return float(max(1, len(lengths))) * (limit if variant == "dr_grpo" else 1)


def policy_loss(
    new: torch.Tensor,
    old: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    variant: str,
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """The clipped surrogate of some rollouts, to be divided by the update's :func:`normaliser`.

    Args:
        new: log-probs under the policy, ``(R, C)``, with a graph. old: those sampled from, ``(R, C)``.
        mask: bool ``(R, C)``, the tokens that were sampled.
        advantages: ``(R,)``.
        variant: grpo averages over each rollout's tokens, dapo over all tokens, dr_grpo over a constant length, gspo
            takes one ratio a rollout (the geometric mean of its tokens').
    """
    held = mask.to(new.dtype)
    counts = held.sum(1).clamp(min=1)
    log_ratio = (new - old).masked_fill(~mask, 0.0)
    if variant == "gspo":
        mean = (log_ratio * held).sum(1) / counts
        log_ratio_used = mean[:, None].expand_as(log_ratio)
    elif variant in ("grpo", "dr_grpo", "dapo"):
        log_ratio_used = log_ratio
    else:
        raise BadUse(f"variant {variant!r} is unknown: use grpo, dr_grpo, dapo or gspo")
    ratio, gain = log_ratio_used.exp(), advantages[:, None]
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * gain, bounded * gain)
    outside = (ratio * gain > bounded * gain) & mask & (gain != 0)
    return PolicyLoss(
        -reduced(surrogate, held, counts, variant), int(outside.sum()), int(mask.sum()), log_ratio.detach()
    )


def reduced(values: torch.Tensor, held: torch.Tensor, counts: torch.Tensor, variant: str) -> torch.Tensor:
    """The sum over rollouts of what a variant takes of each: the mean over its tokens, or their sum."""
    rows = (values * held).sum(1)
    return (rows if variant in ("dapo", "dr_grpo") else rows / counts).sum()


def kl_penalty(new: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """KL of the policy to the reference at each token ``(R, C)``, estimated from the token that was sampled.

    The gradient flows through ``new`` (nothing is clamped: a clamp would end it).

    Args:
        estimator: "k1" log(p/q), whose gradient is that of the sampled token's log-prob and has mean 0 on policy; "k2"
            its square halved, whose gradient is that of KL; "k3" q/p - 1 - log(q/p), unbiased and never negative.
    """
    difference = reference - new
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return difference.exp() - 1 - difference
    raise BadUse(f"KL estimator {estimator!r} is unknown: use k1, k2 or k3")


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """DAPO's soft punishment of length: 0 up to ``limit - buffer`` tokens, then falling to -1 at the limit.

    Source: arXiv 2503.14476 eq. 13.
    """
    if not buffer or length <= limit - buffer:
        return 0.0
    return max(-1.0, (limit - buffer - length) / buffer)


def rows_of(values: torch.Tensor, pieces: Sequence[slice]) -> torch.Tensor:
    """Values of a packed tree ``(T,)`` as one row for each of R nodes ``(R, C)``, filled up with 0."""
    return torch.nn.utils.rnn.pad_sequence([values[piece] for piece in pieces], batch_first=True)
