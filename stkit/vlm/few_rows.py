"""Linear layers at a handful of rows on a CPU, where decoding spends its time: the same products in a faster order.

A step of decoding multiplies a few rows by every weight. ``weight @ rows.T`` is computed twice as fast there as
``rows @ weight.T``, and a LoRA on it takes two products more instead of eight calls::

    language = with_few_rows(language)      # a view: the model itself is as it was
"""

import sys

import torch
from torch import nn

from .views import view


def product(weight: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``rows @ weight.T + bias`` of weight ``(N, K)`` and rows ``(M, K)``, as ``(N, M)``."""
    rows = rows.contiguous().T  # seen as columns: columns that lie so in memory are slow again
    return weight @ rows if bias is None else torch.addmm(bias[:, None], weight, rows)


def with_few_rows(module: nn.Module) -> nn.Module:
    """A view of a module on a CPU whose plain linear layers, with a LoRA or without, are computed in the faster order.

    Anything else (4 bits, several adapters, a merged one) stays as it is.
    """
    if type(module) is nn.Linear:
        return view(module, _linear)
    if _is_lora(module) and _is_plain(module):
        return view(module, _lora, module.active_adapters[0])
    changed = {n: with_few_rows(c) for n, c in module._modules.items() if c is not None}
    changed = {n: c for n, c in changed.items() if c is not module._modules[n]}
    return view(module, **changed) if changed else module


def _is_lora(module: nn.Module) -> bool:
    """Asked without importing peft, which brings bitsandbytes: where there is a LoRA, it has been imported."""
    peft = sys.modules.get("peft.tuners.lora")
    return peft is not None and type(module) is peft.Linear


def _is_plain(lora) -> bool:
    name = lora.active_adapters[0] if len(lora.active_adapters) == 1 else None
    usual = not lora.merged and not lora.disable_adapters and name in lora.lora_A
    return usual and type(lora.base_layer) is nn.Linear and not lora.use_dora.get(name) and not lora.lora_bias.get(name)


def _linear(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    out = product(linear.weight, x.flatten(0, -2), linear.bias)
    return out.T.unflatten(0, x.shape[:-1])


def _lora(lora, name: str, x: torch.Tensor) -> torch.Tensor:
    rows, a, b = x.flatten(0, -2), lora.lora_A[name].weight, lora.lora_B[name].weight
    out = product(lora.base_layer.weight, rows, lora.base_layer.bias)
    out.addmm_(b.to(out.dtype), product(a, rows.to(a.dtype)).to(out.dtype), alpha=lora.scaling[name])
    return out.T.unflatten(0, x.shape[:-1])
