"""Whether a Triton kernel of this package can run on a device, and what stands in the way."""

import torch


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """What stands in the way of this package's Triton kernels on a device ("" if nothing does)."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if dtype == torch.float64:
        return "it sums in float32, the tensors are float64"
    if device.type == "cpu":
        if not triton.knobs.runtime.interpret:
            return "on a CPU it needs TRITON_INTERPRET=1 before triton is imported (slow, for proofs)"
        return "the interpreter gets bfloat16 wrong: give float16 or float32" if dtype == torch.bfloat16 else ""
    if device.type != "cuda":
        return f"it needs a CUDA GPU, the tensors are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability[0] >= 8 else f"it needs compute capability 8, this GPU has {capability[0]}.{capability[1]}"
