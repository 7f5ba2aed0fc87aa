"""Whether the small Triton kernels (log-probabilities, patches) can run on a device, and what stands in the way."""

import torch


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """What stands in the way of Triton ("" if nothing does).

    Args:
        device: of the tensors.
        dtype: of the factors of products, or of what is written.
    """
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if dtype == torch.float64:
        return "it computes in float32, the tensors are float64"
    if device.type == "cpu":
        if not triton.knobs.runtime.interpret:
            return "on a CPU it needs TRITON_INTERPRET=1 before triton is imported (slow, for proofs)"
        return "its interpreter gets bfloat16 wrong: give float16 or float32" if dtype == torch.bfloat16 else ""
    if device.type != "cuda":
        return f"it needs a CUDA GPU, the tensors are on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"it needs compute capability 8, this GPU has {major}.{minor} (a T4 has 7.5)"
