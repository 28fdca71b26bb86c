"""Normalisation by the root mean square, with a gain where the model has one."""

import torch.nn.functional as F
from torch import Tensor

from .own_kernels import can_run_short_step_kernels

# Of the latents of DeepSeek's attention, whatever the model's own epsilon is: the published models
# build these two norms with the default.
LATENT_EPSILON = 1e-6


_WIDEST = 16384  # a row is in the registers of one program


def add_rms_norm(
    x: Tensor, delta: Tensor | None, gain: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return x + delta (None is nothing), and that as `rms_norm` scales it."""
    if can_run_short_step_kernels(x) and x.shape[-1] <= _WIDEST:
        from epplan.runtime.kernels.decode_rows import add_rms_norm as add_rms_norm_kernel

        return add_rms_norm_kernel(x, delta, gain, epsilon)
    if delta is not None:
        x = x + delta
    return x, rms_norm(x, gain, epsilon)


def rms_norm(x: Tensor, gain: Tensor | None = None, epsilon: float = 1e-6) -> Tensor:
    """Return x scaled to unit RMS over its last dimension, times `gain` (None is 1)."""
    return F.rms_norm(x, x.shape[-1:], gain, epsilon)
