"""Whether this project's GPU kernels can run; whoever has one asks here and else takes torch."""

import torch
from torch import Tensor


def can_run_kernels(x: Tensor) -> bool:
    """Return whether the kernels take x: half precision, on Hopper, without gradients."""
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16) or torch.is_grad_enabled():
        return False
    try:
        from .kernels import wide_attention  # noqa: F401 (the one that needs the newest Triton)
        from .kernels.launch import has_hopper
    except (ImportError, AttributeError):  # no Triton, or one older than 3.6
        return False
    return has_hopper(x.device)
