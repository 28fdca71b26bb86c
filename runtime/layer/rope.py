"""Rotary position encoding: pairs of elements turn by an angle that grows with the position.

Shapes: S positions, D rotated elements of a head, P = D / 2 pairs.

Element i is paired with i + D / 2. Checkpoints that pair neighbours, 2i with 2i + 1, are the same
model with the rows of its projections in another order, and are read in this one
(`half_split_order`). Angles are float32: half precision cannot count positions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from epplan.planner.model import AttentionSpec, RopeScaling

from .norm import rms_norm
from .own_kernels import can_run_kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Cosine and sine of every position's angles, times the scaling's magnitude; float32."""

    cos_SP: Tensor
    sin_SP: Tensor


def make_rotation(spec: AttentionSpec, position_S: Tensor) -> Rotation | None:
    """Return the rotation of some positions; None for a model without position encoding.

    Args:
        spec: base, scaling and rotated width.
        position_S: absolute positions, on the device of the step.
    """
    if spec.rope_theta is None:
        return None
    frequency_P = _frequencies(spec, position_S.device)
    angle_SP = torch.outer(position_S.float(), frequency_P)
    magnitude = 1.0 if spec.rope_scaling is None else spec.rope_scaling.magnitude
    return Rotation(cos_SP=angle_SP.cos() * magnitude, sin_SP=angle_SP.sin() * magnitude)


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Return heads [..., S, width] with their first D elements rotated; the others pass."""
    if rotation is None:
        return x
    half = rotation.cos_SP.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    cos, sin = rotation.cos_SP, rotation.sin_SP
    rotated = [
        (first * cos - second * sin).to(x.dtype),
        (second * cos + first * sin).to(x.dtype),
    ]
    return torch.cat([*rotated, x[..., 2 * half :]], dim=-1)


def normalise_and_rotate(
    x_BQSD: Tensor, gain_D: Tensor | None, epsilon: float | None, rotation: Rotation | None
) -> Tensor:
    """Return heads scaled to unit RMS, times the gain (None is 1), and rotated.

    Args:
        x_BQSD: Q heads of B sequences, each of width D.
        gain_D: of the norm.
        epsilon: of the norm; None is a model without one.
        rotation: None is a model without position encoding.
    """
    if rotation is not None and can_run_kernels(x_BQSD):
        from epplan.runtime.kernels.rotate_heads import rotate_heads

        return rotate_heads(x_BQSD, rotation.cos_SP, rotation.sin_SP, gain_D, epsilon)
    if epsilon is not None:
        x_BQSD = rms_norm(x_BQSD, gain_D, epsilon)
    return rotate(x_BQSD, rotation)


def half_split_order(rotated_dim: int) -> list[int]:
    """Return which element of interleaved pairs stands where: 0, 2, 4, ..., 1, 3, 5, ..."""
    return [*range(0, rotated_dim, 2), *range(1, rotated_dim, 2)]


def _frequencies(spec: AttentionSpec, device: torch.device) -> Tensor:
    """Return the angle per position of each pair, float32."""
    assert spec.rope_theta is not None
    dim = spec.rotated_dim
    exponent_P = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequency_P = 1.0 / spec.rope_theta**exponent_P
    scaling = spec.rope_scaling
    if scaling is None:
        return frequency_P
    if scaling.kind == "linear":
        return frequency_P / scaling.factor
    if scaling.kind == "yarn":
        kept_P = _yarn_kept(scaling, dim, spec.rope_theta, device)
    else:
        kept_P = _llama3_kept(scaling, frequency_P)
    return frequency_P * (kept_P + (1 - kept_P) / scaling.factor)


def _yarn_kept(scaling: RopeScaling, dim: int, theta: float, device: torch.device) -> Tensor:
    """Return which part of each frequency stays unscaled: 1 for fast pairs, 0 for slow ones.

    YaRN's ramp is linear in the pair's number, between the numbers of the pairs that turn
    `beta_fast` and `beta_slow` times in the original context.
    """

    def pair_that_turns(times: float) -> float:
        positions_per_turn = scaling.original_positions / (times * 2 * math.pi)
        return dim * math.log(positions_per_turn) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # as in the published implementation: a step, not a division by zero
    pair_P = torch.arange(dim // 2, dtype=torch.float32, device=device)
    return 1 - ((pair_P - first) / (last - first)).clamp(0, 1)


def _llama3_kept(scaling: RopeScaling, frequency_P: Tensor) -> Tensor:
    """Return which part of each frequency stays unscaled: linear in turns per original context."""
    turns_P = scaling.original_positions * frequency_P / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    return ((turns_P - scaling.low_freq_factor) / span).clamp(0, 1)
