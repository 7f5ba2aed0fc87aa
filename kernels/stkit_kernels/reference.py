"""The oracle: attention over a packed tree with a dense mask, in plain torch. Slow and large; tests compare with it."""

import torch


def visible_mask(end: torch.Tensor) -> torch.Tensor:
    """Who sees whom, bool ``(T, T)`` (query, key): query q sees key k iff k <= q < end[k].

    Args:
        end: int64 ``(T,)``, one past the last token of each token's subtree.
    """
    token = torch.arange(len(end), device=end.device)
    return (token[None] <= token[:, None]) & (token[:, None] < end[None])


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None = None):
    """Masked attention by torch's own ``scaled_dot_product_attention``.

    Args:
        q: ``(1, H, T, D)``. k, v: ``(1, KV, T, D)`` with H a multiple of KV.
        mask: bool ``(T, T)``.

    Returns:
        ``(1, H, T, D)``.
    """
    gqa = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
