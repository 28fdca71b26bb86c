"""The MLP of an expert, of the shared experts and of a dense layer; all experts of a rank.

Shapes: R rows, H hidden size, F width of the MLP, P slots of this rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .adjacent import adjacent
from .linear import linear, linear_gelu

# Rows of an expert from which one grouped product beats a product for each expert, by elements of
# one of its matrices; bfloat16, two matrices. One H200, torch 2.11, milliseconds by matrix /
# grouped (docs/log.md; with *: expert by expert / grouped):
#   rows each                64           128          256          512          1024
#   16 of 7168 x 2048    0.65 / 0.41  0.68 / 0.39  0.58 / 0.46  0.86 / 0.79  1.68 / 1.52
#   8 of 4096 x 14336    0.63 / 0.66* 0.68 / 0.65  0.85 / 0.81  1.54 / 1.50  3.01 / 3.07
#   16 of 8192 x 32768   4.53 / 6.12* 5.25 / 5.35  7.57 / 7.30  14.7 / 14.3  28.4 / 26.7
# Experts of a few rows are read from memory and no more: the grouped product reads them slower.
_GROUPED_FROM_ROWS = ((1 << 25, 0), (1 << 27, 100), (1 << 62, 200))
# While a transfer is under way NCCL holds 32 of an H200's 132 multiprocessors, and a grouped
# product, which is one block for each of them, ends when they have been given back. Products one
# by one lose less: a step of narrow experts with 4096 rows each took two H200 78.8 ms with grouped
# ones and 75.6 without (docs/log.md; fewer rows were not measured).
_ALONE_FROM_ROWS_BESIDE_TRANSFERS = 2048


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
    if weights.gate_FH is None:
        inner_RF = linear_gelu(x_RH, weights.up_FH, weights.up_bias_F)
    else:
        up_RF = linear(x_RH, weights.up_FH, weights.up_bias_F)
        gate_RF = linear(x_RH, weights.gate_FH, weights.gate_bias_F)
        inner_RF = _activate(up_RF, gate_RF, weights)
    return linear(inner_RF, weights.down_HF, weights.down_bias_H)


def _activate(up_RF: Tensor, gate_RF: Tensor | None, weights: MlpWeights) -> Tensor:
    """Return what goes into the last matrix."""
    if gate_RF is None:
        return F.gelu(up_RF)
    if weights.limit is None:
        return F.silu(gate_RF) * up_RF
    gate_RF = gate_RF.clamp(max=weights.limit)
    up_RF = up_RF.clamp(-weights.limit, weights.limit)
    return (up_RF + 1) * gate_RF * torch.sigmoid(weights.alpha * gate_RF)


def shared_mlp(x_RH: Tensor, weights: MlpWeights, gate_1H: Tensor | None) -> Tensor:
    """Return the shared experts' output, [R, H], weighed by their gate where they have one."""
    out_RH = mlp(x_RH, weights)
    return out_RH if gate_1H is None else out_RH * F.linear(x_RH, gate_1H).sigmoid()


def run_experts(
    rows_RH: Tensor,
    rows_of_slot: Sequence[int],
    experts: Sequence[MlpWeights | None],
    *,
    beside_transfers: bool = False,
) -> Tensor:
    """Return the output of each row, [R, H].

    Args:
        rows_RH: the rows of the first slot, then those of the second, ...
        rows_of_slot: how many they are, [P].
        experts: by slot, [P]; None is an empty slot, which has no rows.
        beside_transfers: another micro-batch's rows may be under way meanwhile.
    """
    if len(experts) == 1 and experts[0] is not None:
        return mlp(rows_RH, experts[0])
    present = [expert for expert in experts if expert is not None]
    if len(present) > 1 and _groups_are_faster(rows_RH, present, beside_transfers):
        rows_of_expert = [
            rows for rows, expert in zip(rows_of_slot, experts, strict=True) if expert is not None
        ]
        grouped = _as_group(present)
        # A padded dispatcher's empty slots have rows too.
        if grouped is not None and sum(rows_of_expert) == len(rows_RH):
            return _run_grouped(rows_RH, rows_of_expert, grouped)
    if present and rows_RH.is_cuda and not torch.is_grad_enabled():
        return _run_by_matrix(rows_RH, rows_of_slot, experts, present[0])
    parts = torch.split(rows_RH, list(rows_of_slot))
    outputs = [
        rows if expert is None else mlp(rows, expert)
        for rows, expert in zip(parts, experts, strict=True)
    ]
    return torch.cat(outputs)


def _run_by_matrix(
    rows_RH: Tensor,
    rows_of_slot: Sequence[int],
    experts: Sequence[MlpWeights | None],
    alike: MlpWeights,
) -> Tensor:
    """Return the output of each row: the first matrix of every expert, then the second of every.

    Faster than expert by expert at nearly every size measured (docs/log.md): all rows are activated
    at once, and the host is sooner ahead of the device. By torch's products also for few rows: ours
    take the host longer to start.
    """

    def products(
        x_RX: Tensor, matrix: Callable[[MlpWeights], tuple[Tensor, Tensor | None]], width: int
    ) -> Tensor:
        out_RY = x_RX.new_empty(len(x_RX), width)
        counts = list(rows_of_slot)
        parts = zip(torch.split(x_RX, counts), torch.split(out_RY, counts), experts, strict=True)
        for x, out, expert in parts:
            if expert is None or not len(x):
                continue
            weight, bias = matrix(expert)
            if bias is None:
                torch.mm(x, weight.T, out=out)
            else:
                torch.addmm(bias, x, weight.T, out=out)
        return out_RY

    width, hidden = alike.up_FH.shape
    up_RF = products(rows_RH, lambda expert: (expert.up_FH, expert.up_bias_F), width)
    gate_RF = None
    if alike.gate_FH is not None:
        gate_RF = products(rows_RH, _gate, width)
    inner_RF = _activate(up_RF, gate_RF, alike)
    return products(inner_RF, lambda expert: (expert.down_HF, expert.down_bias_H), hidden)


def _gate(expert: MlpWeights) -> tuple[Tensor, Tensor | None]:
    assert expert.gate_FH is not None
    return expert.gate_FH, expert.gate_bias_F


def stack_experts(experts: Sequence[MlpWeights | None]) -> tuple[MlpWeights | None, ...]:
    """Return the same experts one after the other in memory, as one grouped product needs them.

    Experts that a grouped product would not be chosen for stay where they are.
    """
    present = [expert for expert in experts if expert is not None]
    if len(present) < 2 or not _can_be_grouped(present[0]):
        return tuple(experts)
    group = MlpWeights(
        gate_FH=(
            None
            if present[0].gate_FH is None
            else torch.stack([e.gate_FH for e in present if e.gate_FH is not None])
        ),
        up_FH=torch.stack([expert.up_FH for expert in present]),
        down_HF=torch.stack([expert.down_HF for expert in present]),
    )
    stacked = iter(range(len(present)))
    return tuple(None if e is None else _member(group, next(stacked)) for e in experts)


def _member(group: MlpWeights, number: int) -> MlpWeights:
    return MlpWeights(
        gate_FH=None if group.gate_FH is None else group.gate_FH[number],
        up_FH=group.up_FH[number],
        down_HF=group.down_HF[number],
    )


def _can_be_grouped(weights: MlpWeights) -> bool:
    """Return whether one grouped product can take the place of a product for each expert.

    Only bfloat16 has a kernel: in float16 torch reads the group sizes back from the device and
    loops, which is our loop with a wait.
    """
    return (
        hasattr(torch, "_grouped_mm")
        and weights.up_FH.dtype == torch.bfloat16
        and not (weights.up_FH.shape[0] % 8 or weights.up_FH.shape[1] % 8)  # 16-byte rows
        and weights.up_bias_F is None
        and weights.limit is None
    )


def _groups_are_faster(
    rows_RH: Tensor, experts: Sequence[MlpWeights], beside_transfers: bool
) -> bool:
    """Return what was measured for experts of this size and as many rows each (docs/log.md)."""
    elements, rows = experts[0].up_FH.numel(), len(rows_RH) / len(experts)
    if beside_transfers and rows >= _ALONE_FROM_ROWS_BESIDE_TRANSFERS:
        return False
    return rows_RH.is_cuda and rows >= next(
        from_rows for size, from_rows in _GROUPED_FROM_ROWS if elements < size
    )


def _as_group(experts: Sequence[MlpWeights]) -> MlpWeights | None:
    """Return all experts as one set of [P, out, in] tensors; None where they lie apart."""
    if not _can_be_grouped(experts[0]):
        return None
    up = _stacked([expert.up_FH for expert in experts])
    down = _stacked([expert.down_HF for expert in experts])
    gates = [expert.gate_FH for expert in experts if expert.gate_FH is not None]
    gate = _stacked(gates) if gates else None
    if up is None or down is None or (gates and gate is None):
        return None
    return MlpWeights(gate_FH=gate, up_FH=up, down_HF=down)


def _stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    joined = adjacent(tensors)
    return None if joined is None else joined.view(len(tensors), *tensors[0].shape)


def _run_grouped(rows_RH: Tensor, rows_of_expert: Sequence[int], group: MlpWeights) -> Tensor:
    """Return the output of each row with one product for all experts at a time."""
    ends_P = _ends(rows_of_expert, rows_RH.device)

    def product(x_RX: Tensor, weights_PYX: Tensor) -> Tensor:
        out: Tensor = torch._grouped_mm(x_RX, weights_PYX.transpose(1, 2), offs=ends_P)
        return out

    gate_RF = None if group.gate_FH is None else product(rows_RH, group.gate_FH)
    inner_RF = _activate(product(rows_RH, group.up_FH), gate_RF, group)
    return product(inner_RF, group.down_HF)


def _ends(rows_of_expert: Sequence[int], device: torch.device) -> Tensor:
    """Return where each expert's rows end, int32 [P].

    Padded rows, all as many, without a copy from the host: a CUDA graph would hold the address of
    host memory that is used for something else by the time it is replayed.
    """
    rows, experts = rows_of_expert[0], len(rows_of_expert)
    if all(each == rows for each in rows_of_expert):
        return torch.arange(1, experts + 1, dtype=torch.int32, device=device) * rows
    ends_P = torch.tensor(rows_of_expert, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends_P.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends_P


def fingerprint(weights: MlpWeights) -> Tensor:
    """Return an int64 scalar that tells an expert's weights from another's: their bits, added up.

    Integers add up exactly, so that it is the same on every device.
    """
    words = torch.int32 if weights.up_FH.itemsize == 4 else torch.int16
    sums = [tensor.detach().view(words).sum(dtype=torch.int64) for tensor in weights.tensors]
    return torch.stack(sums).sum()
