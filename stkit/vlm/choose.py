"""What to compute with: device, dtype, attention and 4 bits, each with the reason, decided in one place.

``attention`` is that of Transformers' own layers (the vision tower here), ``tree_attention`` that of the language model
on prefix trees (see :mod:`stkit_kernels.backends`).

:func:`stkit.load_model` does what is chosen here and ``stkit doctor`` prints it, so the two cannot disagree.

    >>> choose(device="cpu").why["device"]
    'asked for'
"""

import os
from dataclasses import dataclass

import torch
from stkit_kernels.backends import choose_backend

from ..runtime import BadUse, StkitError, pick_device, pick_dtype

ATTENTION = ("auto", "sdpa", "flash_attention_2", "eager")
# Under this a model fits any GPU in 16 bits, and 4 bits would only make it slower and less exact.
FOUR_BIT_FROM = 1_500_000_000


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why: one sentence each in ``why``."""

    device: str
    dtype: torch.dtype
    attention: str
    tree_attention: str
    four_bit: bool
    why: dict[str, str]


def nf4_usable(device: str) -> tuple[bool, str]:
    """Whether bitsandbytes can compute in NF4 on this device, found out by doing it, and what stands in the way."""
    if device == "mps":
        return False, "bitsandbytes has no NF4 for Apple GPUs"
    try:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
        functional.dequantize_4bit(packed, state)
    except Exception as error:  # whatever a broken installation raises is the reason to print
        return False, f"bitsandbytes does not work here ({one_line(error)})"
    return True, "bitsandbytes works on this device"


def flash_usable(device: str, dtype: torch.dtype | None = None) -> tuple[bool, str]:
    """Whether flash-attn can be used on this device in this dtype, and what stands in the way."""
    from transformers.utils import is_flash_attn_2_available

    if not device.startswith("cuda"):
        return False, f"flash-attn needs a CUDA GPU, this is {device}"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return False, "flash-attn needs a GPU of compute capability 8 or more (a T4 has 7.5)"
    if dtype == torch.float32:
        return False, "flash-attn computes in 16 bits only, the dtype is float32"
    if not is_flash_attn_2_available():
        return False, "flash-attn is not installed: pip install 'stkit[gpu]'"
    try:
        import flash_attn  # noqa: F401  built for another torch, it is there and cannot be imported
    except Exception as error:
        return (
            False,
            f"flash-attn is installed but broken ({one_line(error)}): pip install --force-reinstall flash-attn",
        )
    return True, "flash-attn is installed and this GPU can run it"


def pick_attention(attention: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The attention backend, and why: flash-attn where it can be used, else torch's own.

    Raises:
        BadUse: an unknown name.
        StkitError: flash-attn was asked for and cannot be used here (never another in its place).
    """
    if attention not in ATTENTION:
        raise BadUse(f"attention {attention!r} is unknown: use {', '.join(ATTENTION)}")
    usable, reason = flash_usable(device, dtype)
    if attention == "auto":
        return ("flash_attention_2" if usable else "sdpa"), reason
    if attention == "flash_attention_2" and not usable:
        raise StkitError(f"attention='flash_attention_2' cannot be used: {reason}; use attention='sdpa' or 'auto'")
    return attention, "asked for"


def pick_four_bit(four_bit: bool | None, device: str, parameters: int) -> tuple[bool, str]:
    """Whether to load in NF4, and why.

    Args:
        four_bit: True, False, or None for "where it helps": big models on a CUDA GPU.
        device: as returned by :func:`stkit.runtime.pick_device`.
        parameters: number of weights in the checkpoint.

    Raises:
        StkitError: 4 bits were asked for and bitsandbytes cannot do it here.
    """
    if four_bit is False:
        return False, "asked for"
    if four_bit is None and not device.startswith("cuda"):
        return False, f"on {device} 4 bits save memory but cost time: four_bit=True asks for them"
    if four_bit is None and parameters < FOUR_BIT_FROM:
        return (
            False,
            f"{parameters / 1e9:.1f} billion parameters fit without (4 bits from {FOUR_BIT_FROM / 1e9:.1f} on)",
        )
    usable, reason = nf4_usable(device)
    if four_bit and not usable:
        raise StkitError(f"four_bit=True cannot be used: {reason}; use four_bit=False, or device='cpu' or 'cuda'")
    if four_bit:
        return True, "asked for"
    return usable, f"{parameters / 1e9:.1f} billion parameters on a GPU: NF4 leaves room" if usable else reason


def choose(
    parameters: int = 0,
    four_bit: bool | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    head_size: int = 128,
) -> Choice:
    """Decide what a model of so many parameters is loaded with on this machine.

    Args:
        parameters: number of weights in the checkpoint.
        four_bit, device, dtype, attention: as in :func:`stkit.load_model`.
        head_size: of the language model.

    Raises:
        StkitError: something was asked for that cannot be done here.
    """
    device, why_device = pick_device(device)
    in_four_bits, why_bits = pick_four_bit(four_bit, device, parameters)
    chosen, why_dtype = pick_dtype(dtype, device)
    if in_four_bits and dtype == "auto" and device == "cpu":
        chosen, why_dtype = torch.bfloat16, "NF4 computes in bfloat16"
    backend, why_attention = pick_attention(attention, device, chosen)
    tree = choose_backend(torch.device(device), chosen, head_size)
    why = {"device": why_device, "dtype": why_dtype, "attention": why_attention, "tree_attention": tree.why}
    return Choice(device, chosen, backend, tree.name, in_four_bits, why | {"four_bit": why_bits})


def memory_gb(device: str) -> float:
    """Memory for weights on a device: what is free on a CUDA GPU, else what the machine has."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def one_line(error: Exception) -> str:
    """An exception of somebody else's, short enough to stand within a line of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
