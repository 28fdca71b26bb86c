"""Normalisation by the root mean square, with a gain where the model has one."""

import torch.nn.functional as F
from torch import Tensor

# Of the latents of DeepSeek's attention, whatever the model's own epsilon is: the published models
# build these two norms with the default.
LATENT_EPSILON = 1e-6


def rms_norm(x: Tensor, gain: Tensor | None = None, epsilon: float = 1e-6) -> Tensor:
    """Return x scaled to unit RMS over its last dimension, times `gain` (None is 1)."""
    return F.rms_norm(x, x.shape[-1:], gain, epsilon)
