"""Orders and counts of rows, all on the device and without waiting for it.

Shapes: N rows, S slots, T tokens, K choices per token, H hidden size, R rows received, B blocks of
them that have one source and slot.
"""

import torch
from torch import Tensor

from epplan.runtime.layer.own_kernels import can_run_short_step_kernels


def count(key_N: Tensor, num_keys: int) -> Tensor:
    """Return how many rows have each key, int64 [num_keys].

    By scatter_add_ and not bincount, which waits for the device.
    """
    counts = torch.zeros(num_keys, dtype=torch.int64, device=key_N.device)
    return counts.scatter_add_(0, key_N, torch.ones_like(key_N))


def stable_order(key_N: Tensor) -> Tensor:
    """Return the order that sorts rows by key, and equal ones by number, int64 [N].

    As 32-bit keys, which take half the passes of 64 and are wide enough for slots.
    """
    return key_N.int().argsort(stable=True)


def inverse(order_N: Tensor) -> Tensor:
    """Return the permutation that undoes `order_N`."""
    numbers_N = torch.arange(len(order_N), device=order_N.device)
    return torch.empty_like(order_N).scatter_(0, order_N, numbers_N)


def number_within(key_N: Tensor, counts: Tensor) -> Tensor:
    """Return each row's number among the rows of the same key, in their order: 0, 1, ...

    Args:
        key_N: of each row.
        counts: rows of each key.
    """
    order_N = stable_order(key_N)
    first_N = (counts.cumsum(0) - counts).index_select(0, key_N.index_select(0, order_N))
    numbers_N = torch.arange(len(key_N), device=key_N.device) - first_N
    return torch.empty_like(key_N).scatter_(0, order_N, numbers_N)


def repeat_each(values: Tensor, times: Tensor, device: torch.device) -> Tensor:
    """Return each of `values` the given number of times, on `device`; both come from the CPU."""
    pinned = [x.pin_memory() if device.type == "cuda" else x for x in (values, times)]
    on_device = [x.to(device, non_blocking=True) for x in pinned]
    # Without output_size the host would wait for the device.
    return on_device[0].repeat_interleave(on_device[1], output_size=int(times.sum()))


def slot_major(arriving_WP: Tensor, device: torch.device) -> Tensor | None:
    """Return the order that gathers the rows of each slot, on `device`; None: they are in it.

    Received rows are rank-major:   (r0,s0), (r0,s1), (r1,s0), (r1,s1), ...
    experts want them slot-major:   (r0,s0), (r1,s0), ..., (r0,s1), (r1,s1), ...
    """
    num_ranks, slots_per_rank = arriving_WP.shape
    if slots_per_rank == 1 or num_ranks == 1:
        return None
    # By block, not by sorting rows: where it begins as received, and where it is wanted.
    rows_B = arriving_WP.flatten()
    received_PW = (rows_B.cumsum(0) - rows_B).view_as(arriving_WP).T
    rows_B = arriving_WP.T.flatten()
    shift_B = received_PW.flatten() - (rows_B.cumsum(0) - rows_B)
    number_R = torch.arange(int(rows_B.sum()), device=device)
    return number_R + repeat_each(shift_B, rows_B, device)


def look_up(table: Tensor, index_TK: Tensor) -> Tensor:
    """Return table[index_TK]; all int64."""
    if can_run_short_step_kernels(index_TK):
        from epplan.runtime.kernels.decode_rows import look_up as look_up_kernel

        return look_up_kernel(table, index_TK)
    return table[index_TK]


def weighted_sum(rows_NH: Tensor, row_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the sum of each token's rows by weight, [T, H] in the rows' dtype.

    Summed in float32 from a token's first choice to its last, whatever the order of the rows.

    Args:
        rows_NH: outputs of experts.
        row_TK: the row of each choice.
        weights_TK: float32.
    """
    if can_run_short_step_kernels(rows_NH):
        from epplan.runtime.kernels.decode_rows import add_up_rows

        return add_up_rows(rows_NH, row_TK, weights_TK)
    sum_TH = torch.zeros(len(row_TK), rows_NH.shape[1], dtype=torch.float32, device=rows_NH.device)
    for row_T, weight_T in zip(row_TK.unbind(1), weights_TK.unbind(1), strict=True):
        sum_TH += rows_NH.index_select(0, row_T) * weight_T[:, None]
    return sum_TH.to(rows_NH.dtype)
