"""Products with weight matrices: torch's, and for few rows a kernel that streams the matrix.

Shapes: R rows, N outputs, K inputs.
"""

import torch.nn.functional as F
from torch import Tensor

from .own_kernels import can_run_short_step_kernels

_MOST_ROWS = 64
_LEAST_ELEMENTS = 1 << 25  # smaller matrices may stay in L2, and were not measured


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return x [..., K] times the matrix, [..., N]."""
    if bias_N is None and _is_short(x, weight_NK) and can_run_short_step_kernels(x):
        from epplan.runtime.kernels.skinny_linear import serves, skinny_linear

        x_RK = x.reshape(-1, x.shape[-1])
        if serves(x_RK, weight_NK):
            return skinny_linear(x_RK, weight_NK).view(*x.shape[:-1], -1)
    return F.linear(x, weight_NK, bias_N)


def linear_gelu(x_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return GELU of the product, [R, N]."""
    if bias_N is None and _is_short(x_RK, weight_NK) and can_run_short_step_kernels(x_RK):
        from epplan.runtime.kernels.skinny_linear import serves, skinny_linear

        if serves(x_RK, weight_NK):
            return skinny_linear(x_RK, weight_NK, gelu=True)
    return F.gelu(F.linear(x_RK, weight_NK, bias_N))


def _is_short(x: Tensor, weight_NK: Tensor) -> bool:
    """Return whether asking further is worth the host's time: few rows, and a large matrix."""
    return x.numel() <= _MOST_ROWS * x.shape[-1] and weight_NK.numel() >= _LEAST_ELEMENTS
