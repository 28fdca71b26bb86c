"""How rows are written on the way to the experts.

Shapes: N rows, H hidden size.

Plainly in their own dtype, or each as H numbers of 8 bits (e4m3) and one scale, which halves the
bytes of half precision and rounds every element to 3 bits of mantissa: outputs change. Outputs
come back in their own dtype either way.
"""

from typing import Protocol

import torch
from torch import Tensor

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max
_SCALE_BYTES = 4  # float32


class Wire(Protocol):
    """Writes rows before they travel and reads them where they arrive."""

    def write(self, rows_NH: Tensor) -> Tensor:
        """Return what travels, a row for each row."""

    def read(self, written: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows that were written, [N, H]."""


class PlainWire:
    """Rows as they are."""

    def write(self, rows_NH: Tensor) -> Tensor:
        """Return the rows."""
        return rows_NH

    def read(self, written: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows."""
        return written


class Float8Wire:
    """Rows of 8-bit numbers with a float32 scale each; as bytes, because gloo knows no float8."""

    def write(self, rows_NH: Tensor) -> Tensor:
        """Return bytes [N, H + 4]: elements, then the scale."""
        rows_NH = rows_NH.float()
        largest_N1 = rows_NH.abs().amax(-1, keepdim=True)
        scale_N1 = torch.where(largest_N1 > 0, largest_N1 / _LARGEST, 1.0)  # rows of zeros
        elements_NH = (rows_NH / scale_N1).to(_FLOAT8)
        return torch.cat([elements_NH.view(torch.uint8), scale_N1.view(torch.uint8)], dim=1)

    def read(self, written: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows, rounded."""
        elements_NH = written[:, :-_SCALE_BYTES].contiguous().view(_FLOAT8)
        scale_N1 = written[:, -_SCALE_BYTES:].contiguous().view(torch.float32)
        return (elements_NH.float() * scale_N1).to(dtype)
