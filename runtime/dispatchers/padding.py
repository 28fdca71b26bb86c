"""Rows at places of equal room for every slot; by one kernel where steps are short.

Shapes: T tokens, K experts per token, N = T x K rows, S slots, C capacity of a slot, H hidden size.
"""

import torch
from torch import Tensor

from epplan.runtime.layer.own_kernels import can_run_short_step_kernels

from .order import count, number_within

_MAX_ROWS = 4096  # every program looks at all rows


def pad(
    x_TH: Tensor, slot_TK: Tensor, weights_TK: Tensor, num_slots: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put every choice's row at a place of its slot; rows above the capacity are lost.

    Returns:
        rows by slot and number, zeros where there is none, [S x C, H]; the place of each choice,
        [T, K] (of a lost one, some place); its weight, 0 for a lost one; rows of each slot with
        the lost ones, int64 [S].
    """
    if slot_TK.numel() <= _MAX_ROWS and can_run_short_step_kernels(x_TH):
        from epplan.runtime.kernels.decode_rows import pad_rows

        return pad_rows(x_TH, slot_TK, weights_TK, num_slots, capacity)
    slot_N = slot_TK.flatten()
    counts_S = count(slot_N, num_slots)
    number_N = number_within(slot_N, counts_S)
    fits_N = number_N < capacity
    num_places = num_slots * capacity
    # Rows that do not fit share a place behind the last, which is not sent.
    place_N = torch.where(fits_N, slot_N * capacity + number_N, num_places)
    x_NH = x_TH.repeat_interleave(slot_TK.shape[1], dim=0)
    # Zeros, not garbage: experts compute all rows, and gradients add them up.
    padded = x_NH.new_zeros(num_places + 1, x_NH.shape[1]).index_copy_(0, place_N, x_NH)
    place_TK = place_N.clamp(max=num_places - 1).view_as(slot_TK)
    return padded[:num_places], place_TK, weights_TK * fits_N.view_as(slot_TK), counts_S
