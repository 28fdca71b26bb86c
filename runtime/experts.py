"""The MLP of an expert, of the shared experts and of a dense layer; all experts of a rank.

Shapes: R rows, H hidden size, F width of the MLP, P slots of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """Weights of one MLP; without a gate it is the two-matrix GELU form."""

    gate_FH: Tensor | None
    up_FH: Tensor
    down_HF: Tensor


def mlp(x_RH: Tensor, weights: MlpWeights) -> Tensor:
    """Return the MLP's output, [R, H]."""
    up_RF = F.linear(x_RH, weights.up_FH)
    if weights.gate_FH is None:
        inner_RF = F.gelu(up_RF)
    else:
        inner_RF = F.silu(F.linear(x_RH, weights.gate_FH)) * up_RF
    return F.linear(inner_RF, weights.down_HF)


def run_experts(
    rows_RH: Tensor, rows_of_slot: Sequence[int], experts: Sequence[MlpWeights | None]
) -> Tensor:
    """Return the output of each row, [R, H].

    Args:
        rows_RH: the rows of the first slot, then those of the second, ...
        rows_of_slot: how many they are, [P].
        experts: by slot, [P]; None is an empty slot, which has no rows.
    """
    outputs = [
        rows if expert is None else mlp(rows, expert)
        for rows, expert in zip(torch.split(rows_RH, list(rows_of_slot)), experts, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def fingerprint(weights: MlpWeights) -> Tensor:
    """Return an int64 scalar that tells an expert's weights from another's: their bits, added up.

    Integers add up exactly, so that it is the same on every device.
    """
    matrices = [weights.up_FH, weights.down_HF]
    if weights.gate_FH is not None:
        matrices.append(weights.gate_FH)
    words = torch.int32 if weights.up_FH.itemsize == 4 else torch.int16
    return torch.stack([matrix.view(words).sum(dtype=torch.int64) for matrix in matrices]).sum()
