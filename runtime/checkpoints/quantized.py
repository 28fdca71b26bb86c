"""Weights stored in eight and four bits, multiplied out.

Shapes: O outputs, I inputs, G groups of 32 inputs.
"""

import torch
from torch import Tensor

# OCP MXFP4 (E2M1): sign, two bits of exponent, one of mantissa.
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_BIAS = 127  # of E8M0, an exponent alone


def dequantize_fp8(weight_OI: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Return float32 weights of block-scaled fp8 (DeepSeek V3).

    Args:
        weight_OI: float8.
        scale: float32, one per block; blocks at the end may be partly filled.
        block: outputs and inputs of a block.
    """
    outputs, inputs = weight_OI.shape
    by_row = scale.repeat_interleave(block[0], dim=0)[:outputs]
    return weight_OI.float() * by_row.repeat_interleave(block[1], dim=1)[:, :inputs]


def dequantize_mxfp4(blocks_OGb: Tensor, scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights_OI of MXFP4 (gpt-oss): 32 numbers of four bits share a power of two.

    Args:
        blocks_OGb: uint8 [O, G, 16], two numbers each, the low half first.
        scales_OG: uint8 exponents.
        dtype: of the result; bfloat16 holds every value exactly.
    """
    values = torch.tensor(
        [*_FP4_VALUES, *(-value for value in _FP4_VALUES)], dtype=dtype, device=blocks_OGb.device
    )
    halves = torch.stack([blocks_OGb & 0x0F, blocks_OGb >> 4], dim=-1).flatten(-2)
    exponents = scales_OG.to(torch.int32) - _SCALE_BIAS
    return torch.ldexp(values[halves.int()], exponents.unsqueeze(-1)).to(dtype).flatten(1)
