"""Products of few rows with a large matrix: the time is that of reading the matrix.

Shapes: R rows (at most 64), N outputs, K inputs, M = 64 rows of a tile, C outputs of a program, B
inputs read at a time.

cuBLAS reads an [8192, 8192] matrix at 3.5 TB/s on an H200, whose copy reaches 4.25. A program here
owns C outputs and streams its part of the matrix through several buffers. What it gains over
cuBLAS comes from the edges: GELU on the way out, sums of parts without another kernel, and the
first lines of every program brought into L2 while the kernel before is still running.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import EARLY, fetch, has_hopper, workspace

MAX_ROWS = 64
_LINE_BYTES = 128  # fetched into L2 at a time
_IN_FLIGHT = {64: (128, 6), 128: (128, 4), 256: (64, 4)}  # by C: B and stages
_ROTATION = 0
_FETCHED_LINES = 1024  # of a program, before the kernel before it has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tiling:
    columns: int  # C
    inputs: int  # B
    stages: int
    warps: int = 4
    parts: int  # of K; one program each, the last to end adds them up


def skinny_linear(
    x_RK: Tensor, weight_NK: Tensor, out_RN: Tensor | None = None, *, gelu: bool = False
) -> Tensor:
    """Return x times the matrix, [R, N], as `torch.nn.functional.linear` does.

    Args:
        x_RK: at most 64 rows.
        weight_NK: contiguous, as `serves` demands.
        out_RN: where to put it, contiguous.
        gelu: apply GELU (erf) to the outputs.
    """
    (rows, num_inputs), num_outputs = x_RK.shape, weight_NK.shape[0]
    if out_RN is None:
        out_RN = x_RK.new_empty(rows, num_outputs)
    processors = torch.cuda.get_device_properties(x_RK.device).multi_processor_count
    tiling = _tiling(num_outputs, num_inputs, processors)
    num_tiles = num_outputs // tiling.columns
    room = num_tiles * tiling.parts * MAX_ROWS * tiling.columns if tiling.parts > 1 else 1
    sums, arrived = workspace(x_RK.device, room)
    _linear[(num_tiles * tiling.parts,)](
        TensorDescriptor.from_tensor(x_RK, [MAX_ROWS, tiling.inputs]),
        TensorDescriptor.from_tensor(weight_NK, [tiling.columns, tiling.inputs]),
        weight_NK,
        out_RN,
        sums,
        arrived,
        rows,
        num_outputs,
        num_inputs,
        M=MAX_ROWS,
        C=tiling.columns,
        B=tiling.inputs,
        STAGES=tiling.stages,
        PARTS=tiling.parts,
        LINES=_FETCHED_LINES // tiling.columns,
        LINE=_LINE_BYTES // weight_NK.itemsize,
        ROTATION=_ROTATION,
        GELU=gelu,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **EARLY,
    )
    return out_RN


def serves(x_RK: Tensor, weight_NK: Tensor) -> bool:
    """Return whether `skinny_linear` can take these, and was measured faster than cuBLAS."""
    return (
        1 <= x_RK.shape[0] <= MAX_ROWS
        and x_RK.dtype == weight_NK.dtype
        and x_RK.dtype in (torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()
        and has_hopper(x_RK.device)
        and x_RK.is_contiguous()
        and weight_NK.is_contiguous()
        and weight_NK.shape[0] % 256 == 0
        and weight_NK.shape[1] % 256 == 0
        and weight_NK.numel() >= 1 << 25  # smaller ones may stay in L2, and were not measured
    )


def _tiling(num_outputs: int, num_inputs: int, num_processors: int) -> _Tiling:
    """Return the tiling whose programs, all running at once, fill the GPU best.

    Of many measured (docs/log.md) the best ones had this in common, with 96 KiB or more of the
    matrix in flight in every program; of equals the wider tile reads x less often.
    """
    fitting = [
        (num_outputs // columns * parts, columns, parts)
        for columns in _IN_FLIGHT
        for parts in (1, 2)
        if not (columns == 256 and parts == 2)  # spills registers
        and num_outputs % columns == 0
        and num_inputs % (parts * _IN_FLIGHT[columns][0]) == 0
        and num_outputs // columns * parts <= num_processors
    ]
    _, columns, parts = max(fitting, default=(0, max(_IN_FLIGHT), 1))
    inputs, stages = _IN_FLIGHT[columns]
    return _Tiling(columns=columns, inputs=inputs, stages=stages, parts=parts)


@triton.jit
def _linear(
    x_tiles,
    weight_tiles,
    weight,
    out,
    sums,
    arrived,
    rows,
    N,
    K,
    M: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    ROTATION: tl.constexpr,
    GELU: tl.constexpr,
):
    tile = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    tl.extra.cuda.gdc_launch_dependents()
    steps = K // B // PARTS
    first_input = part * steps * B
    column_C = tile * C + tl.arange(0, C)
    if LINES > 0:
      line_L = tl.arange(0, LINES) * LINE
      fetch(weight + column_C[:, None].to(tl.int64) * K + first_input + line_L[None, :])
    tl.extra.cuda.gdc_wait()
    sum_MC = tl.zeros([M, C], tl.float32)
    if ROTATION == 1:
        rotation = tile * steps // (N // C)
    elif ROTATION == 2:
        rotation = tile * 5 % steps
    else:
        rotation = 0
    for number in tl.range(0, steps, num_stages=STAGES):
        step = number + rotation
        step = tl.where(step >= steps, step - steps, step)
        x_MB = x_tiles.load([0, first_input + step * B])
        weight_CB = weight_tiles.load([tile * C, first_input + step * B])
        sum_MC = tl.dot(x_MB, weight_CB.T, sum_MC)
    row_M = tl.arange(0, M)
    is_last = True
    if PARTS > 1:
        offset_MC = row_M[:, None] * C + tl.arange(0, C)[None, :]
        tl.store(sums + (tile * PARTS + part) * M * C + offset_MC, sum_MC)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == PARTS - 1
        if is_last:
            # In the order of parts, whichever came last, so that sums are always the same.
            sum_MC = tl.zeros([M, C], tl.float32)
            for other in tl.static_range(PARTS):
                sum_MC += tl.load(
                    sums + (tile * PARTS + other) * M * C + offset_MC, cache_modifier=".cg"
                )
            tl.store(arrived + tile, 0)
    if is_last:
        if GELU:
            # Rounded first, as a product that is stored would be.
            sum_MC = sum_MC.to(out.dtype.element_ty).to(tl.float32)
            sum_MC = 0.5 * sum_MC * (1 + tl.erf(sum_MC * 0.7071067811865476))
        tl.store(
            out + row_M[:, None] * N + column_C[None, :],
            sum_MC.to(out.dtype.element_ty),
            mask=(row_M < rows)[:, None],
        )
