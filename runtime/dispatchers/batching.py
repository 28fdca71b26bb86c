"""Rows sorted by slot; by one kernel where steps are short.

Shapes: T tokens, K experts per token, N = T x K rows, H hidden size.
"""

from torch import Tensor

from epplan.runtime.layer.own_kernels import can_run_short_step_kernels

from .order import inverse, stable_order

_MAX_ROWS = 1024  # every program compares its row with all others


def batch(x_TH: Tensor, slot_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows_NH sorted by slot, then by token; and which of them each choice is, [T, K]."""
    slot_N = slot_TK.flatten()
    top_k = slot_TK.shape[1]
    if len(slot_N) <= _MAX_ROWS and can_run_short_step_kernels(x_TH):
        from epplan.runtime.kernels.decode_rows import batch_rows

        rows_NH, place_N = batch_rows(x_TH, slot_N, top_k)
        return rows_NH, place_N.view_as(slot_TK)
    sort_N = stable_order(slot_N)
    return x_TH.index_select(0, sort_N // top_k), inverse(sort_N).view_as(slot_TK)
