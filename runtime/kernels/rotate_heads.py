"""Query or key heads normalised and rotated in one pass over them.

Shapes: B sequences, Q heads, S positions, D width of a head, P rotated pairs, R = D - 2P elements
that pass, N heads of a program.

In torch these are ten kernels, half of them in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import EARLY

_ELEMENTS = 4096  # of a program


def rotate_heads(
    x_BQSD: Tensor,
    cos_SP: Tensor,
    sin_SP: Tensor,
    gain_D: Tensor | None,
    epsilon: float | None,
) -> Tensor:
    """Return the heads, contiguous: scaled to unit RMS, times the gain, and rotated.

    Args:
        x_BQSD: half precision, the last dimension contiguous.
        cos_SP: float32, contiguous, as `Rotation` has it.
        sin_SP: likewise.
        gain_D: None is 1.
        epsilon: of the norm; None rotates alone.
    """
    (sequences, heads, positions, width), pairs = x_BQSD.shape, cos_SP.shape[1]
    out_BQSD = torch.empty(x_BQSD.shape, dtype=x_BQSD.dtype, device=x_BQSD.device)
    rest = width - 2 * pairs
    together = min(triton.next_power_of_2(heads), max(1, _ELEMENTS // width))
    _rotate_heads[(sequences * positions, triton.cdiv(heads, together))](
        x_BQSD,
        cos_SP,
        sin_SP,
        cos_SP if gain_D is None else gain_D,
        out_BQSD,
        heads,
        positions,
        *x_BQSD.stride()[:3],
        pairs,
        rest,
        epsilon or 0.0,
        NORM=epsilon is not None,
        GAIN=gain_D is not None,
        N=together,
        P=triton.next_power_of_2(pairs),
        R=triton.next_power_of_2(rest) if rest else 0,
        num_warps=4,
        **EARLY,
    )
    return out_BQSD


@triton.jit
def _rotate_heads(
    x,
    cos,
    sin,
    gain,
    out,
    heads,
    positions,
    x_b,
    x_q,
    x_s,
    pairs,
    rest,
    epsilon,
    NORM: tl.constexpr,
    GAIN: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
):
    sequence = (tl.program_id(0) // positions).to(tl.int64)
    position = (tl.program_id(0) % positions).to(tl.int64)
    head_N = tl.program_id(1) * N + tl.arange(0, N)
    pair_P = tl.arange(0, P)
    width = 2 * pairs + rest
    from_N = x + sequence * x_b + position * x_s + head_N.to(tl.int64) * x_q
    to_N = out + ((sequence * heads + head_N) * positions + position) * width
    inside_NP = (head_N < heads)[:, None] & (pair_P < pairs)[None, :]
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    first_NP = tl.load(from_N[:, None] + pair_P[None, :], mask=inside_NP, other=0.0)
    second_NP = tl.load(from_N[:, None] + pairs + pair_P[None, :], mask=inside_NP, other=0.0)
    first_NP, second_NP = first_NP.to(tl.float32), second_NP.to(tl.float32)
    if R > 0:
        rest_R = 2 * pairs + tl.arange(0, R)
        inside_NR = (head_N < heads)[:, None] & (rest_R < width)[None, :]
        rest_NR = tl.load(from_N[:, None] + rest_R[None, :], mask=inside_NR, other=0.0)
        rest_NR = rest_NR.to(tl.float32)
    if NORM:
        squares_N = tl.sum(first_NP * first_NP, 1) + tl.sum(second_NP * second_NP, 1)
        if R > 0:
            squares_N += tl.sum(rest_NR * rest_NR, 1)
        scale_N1 = tl.rsqrt(squares_N / width + epsilon)[:, None]
        first_NP, second_NP = first_NP * scale_N1, second_NP * scale_N1
        if R > 0:
            rest_NR *= scale_N1
        if GAIN:
            first_NP *= tl.load(gain + pair_P, mask=pair_P < pairs)[None, :].to(tl.float32)
            second_NP *= tl.load(gain + pairs + pair_P, mask=pair_P < pairs)[None, :].to(tl.float32)
            if R > 0:
                rest_NR *= tl.load(gain + rest_R, mask=rest_R < width)[None, :].to(tl.float32)
        # Rounded, as a norm that is stored would be.
        first_NP = first_NP.to(out.dtype.element_ty).to(tl.float32)
        second_NP = second_NP.to(out.dtype.element_ty).to(tl.float32)
    cos_1P = tl.load(cos + position * pairs + pair_P, mask=pair_P < pairs)[None, :]
    sin_1P = tl.load(sin + position * pairs + pair_P, mask=pair_P < pairs)[None, :]
    turned_NP = first_NP * cos_1P - second_NP * sin_1P
    tl.store(to_N[:, None] + pair_P[None, :], turned_NP.to(out.dtype.element_ty), mask=inside_NP)
    turned_NP = second_NP * cos_1P + first_NP * sin_1P
    place_NP = to_N[:, None] + pairs + pair_P[None, :]
    tl.store(place_NP, turned_NP.to(out.dtype.element_ty), mask=inside_NP)
    if R > 0:
        rest_NR = rest_NR.to(out.dtype.element_ty)
        tl.store(to_N[:, None] + rest_R[None, :], rest_NR, mask=inside_NR)
