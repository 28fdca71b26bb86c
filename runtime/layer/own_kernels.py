"""Whether this project's GPU kernels can run; whoever has one asks here and else takes torch.

EPPLAN_SHORT_STEP_KERNELS=0 takes torch's kernels for short steps, to compare with.
"""

import os

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.int64)


def can_run_kernels(x: Tensor) -> bool:
    """Return whether the kernels take x: half precision or indices, on Hopper, no gradients.

    Not without elements: a micro-batch may have no tokens, for which no kernel can be launched.
    """
    if not x.is_cuda or x.dtype not in _DTYPES or torch.is_grad_enabled() or not x.numel():
        return False
    try:
        from epplan.runtime.kernels import wide_attention  # noqa: F401 (the one that needs the newest Triton)
        from epplan.runtime.kernels.launch import has_hopper
    except (ImportError, AttributeError):  # no Triton, or one older than 3.6
        return False
    return has_hopper(x.device)


def can_run_short_step_kernels(x: Tensor) -> bool:
    """Return whether the kernels of decode and its products take x, and are wanted."""
    return can_run_kernels(x) and os.environ.get("EPPLAN_SHORT_STEP_KERNELS") != "0"
