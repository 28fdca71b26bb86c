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
    """Weights of one MLP; without a gate it is the two-matrix GELU form.

    With `limit` the gate is gpt-oss's: `(up + 1) * gate * sigmoid(alpha * gate)` of gates cut off
    above the limit and ups cut off on both sides.
    """

    gate_FH: Tensor | None
    up_FH: Tensor
    down_HF: Tensor
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_H: Tensor | None = None
    limit: float | None = None
    alpha: float = 1.702

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors there are."""
        every = (
            self.up_FH,
            self.down_HF,
            self.gate_FH,
            self.gate_bias_F,
            self.up_bias_F,
            self.down_bias_H,
        )
        return [tensor for tensor in every if tensor is not None]


def mlp(x_RH: Tensor, weights: MlpWeights) -> Tensor:
    """Return the MLP's output, [R, H]."""
    up_RF = F.linear(x_RH, weights.up_FH, weights.up_bias_F)
    if weights.gate_FH is None:
        inner_RF = F.gelu(up_RF)
    else:
        gate_RF = F.linear(x_RH, weights.gate_FH, weights.gate_bias_F)
        if weights.limit is None:
            inner_RF = F.silu(gate_RF) * up_RF
        else:
            gate_RF = gate_RF.clamp(max=weights.limit)
            up_RF = up_RF.clamp(-weights.limit, weights.limit)
            inner_RF = (up_RF + 1) * gate_RF * torch.sigmoid(weights.alpha * gate_RF)
    return F.linear(inner_RF, weights.down_HF, weights.down_bias_H)


def shared_mlp(x_RH: Tensor, weights: MlpWeights, gate_1H: Tensor | None) -> Tensor:
    """Return the shared experts' output, [R, H], weighed by their gate where they have one."""
    out_RH = mlp(x_RH, weights)
    return out_RH if gate_1H is None else out_RH * F.linear(x_RH, gate_1H).sigmoid()


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
    words = torch.int32 if weights.up_FH.itemsize == 4 else torch.int16
    sums = [tensor.detach().view(words).sum(dtype=torch.int64) for tensor in weights.tensors]
    return torch.stack(sums).sum()
