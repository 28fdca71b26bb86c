"""Products of few rows with a large matrix: the time is that of reading the matrix.

Shapes: R rows (at most 64), N outputs, K inputs, M = 64 rows of a tile, C outputs of a program
(some programs have E more), B inputs read at a time.

A program owns C + E outputs and streams its part of the matrix through shared memory. What it
gains over cuBLAS comes from the edges: the first 192 KiB of the matrix are on their way before the
kernel that makes the rows has ended, GELU is applied on the way out, and parts are added up without
another kernel. Every multiprocessor gets about one program: 96 for 132 were slower, the more so
where they started beside the kernel before and took whatever room was left (docs/log.md).
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import EARLY, has_hopper, workspace

MAX_ROWS = 64
# Newer versions of Triton renamed both; compiled with 3.6, 3.7 and 3.9.
_start_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_PARTS_FROM_INPUTS = 1 << 14  # adding up parts costs microseconds, which only long inputs win back


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tiling:
    columns: int  # C
    more: int = 0  # E; tiles are powers of two, and two of them make 192 outputs
    inputs: int  # B
    stages: int
    parts: int = 1  # of K; one program each, the last to end adds them up


_TILINGS = (  # the widest first: they read the rows less often
    _Tiling(columns=128, more=64, inputs=128, stages=3),
    _Tiling(columns=128, inputs=128, stages=4),
    _Tiling(columns=128, inputs=128, stages=4, parts=2),
    _Tiling(columns=64, inputs=256, stages=3),
)


def skinny_linear(x_RK: Tensor, weight_NK: Tensor, *, gelu: bool = False) -> Tensor:
    """Return x times the matrix, [R, N], as `torch.nn.functional.linear` does.

    Args:
        x_RK: at most 64 rows.
        weight_NK: contiguous, as `serves` demands.
        gelu: apply GELU (erf) to the outputs.
    """
    (rows, num_inputs), num_outputs = x_RK.shape, weight_NK.shape[0]
    out_RN = x_RK.new_empty(rows, num_outputs)
    processors = torch.cuda.get_device_properties(x_RK.device).multi_processor_count
    tiling = _tiling(num_outputs, num_inputs, processors)
    programs = _programs(tiling, num_outputs)
    room = programs * MAX_ROWS * tiling.columns if tiling.parts > 1 else 1
    sums, arrived = workspace(x_RK.device, room)
    _linear[(programs,)](
        _tiles(x_RK, MAX_ROWS, tiling.inputs),
        _tiles(weight_NK, tiling.columns, tiling.inputs),
        _tiles(weight_NK, tiling.more or tiling.columns, tiling.inputs),
        out_RN,
        sums,
        arrived,
        rows,
        num_outputs,
        num_inputs,
        M=MAX_ROWS,
        C=tiling.columns,
        E=tiling.more,
        B=tiling.inputs,
        STAGES=tiling.stages,
        PARTS=tiling.parts,
        GELU=gelu,
        num_warps=4,
        **EARLY,
    )
    return out_RN


def serves(x_RK: Tensor, weight_NK: Tensor) -> bool:
    """Return whether `skinny_linear` can take these."""
    return (
        1 <= x_RK.shape[0] <= MAX_ROWS
        and x_RK.dtype == weight_NK.dtype
        and x_RK.dtype in (torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()
        and has_hopper(x_RK.device)
        and x_RK.is_contiguous()
        and weight_NK.is_contiguous()
        and weight_NK.shape[0] % 128 == 0
        and weight_NK.shape[1] % 256 == 0
    )


def _tiling(num_outputs: int, num_inputs: int, processors: int) -> _Tiling:
    """Return the tiling whose programs fill the multiprocessors best; of equals the widest."""

    def share_busy(tiling: _Tiling) -> float:
        if num_outputs % (tiling.columns + tiling.more):
            return 0.0
        if num_inputs % (tiling.inputs * tiling.parts):
            return 0.0
        if tiling.parts > 1 and num_inputs < _PARTS_FROM_INPUTS:
            return 0.0
        programs = _programs(tiling, num_outputs)
        return round(programs / (ceil(programs / processors) * processors), 2)

    return max(_TILINGS, key=share_busy)  # the first of equals


def _programs(tiling: _Tiling, num_outputs: int) -> int:
    return num_outputs // (tiling.columns + tiling.more) * tiling.parts


def _tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Return what copies rows x columns at a time."""
    dtype = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return TensorDescriptor.from_tensor(x, [rows, columns], layout)


@gluon.jit
def _linear(
    x_tiles,
    weight_tiles,
    more_tiles,
    out,
    sums,
    arrived,
    rows,
    N,
    K,
    M: gl.constexpr,
    C: gl.constexpr,
    E: gl.constexpr,
    B: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    GELU: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    more_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, max(E, 8), 16])
    dtype: gl.constexpr = x_tiles.dtype
    tile = gl.program_id(0) // PARTS
    part = gl.program_id(0) % PARTS
    steps = K // B // PARTS
    first_input = part * steps * B
    first_output = tile * (C + E)

    x = gl.allocate_shared_memory(dtype, [STAGES, M, B], x_tiles.layout)
    weight = gl.allocate_shared_memory(dtype, [STAGES, C, B], weight_tiles.layout)
    more = weight
    if E > 0:
        more = gl.allocate_shared_memory(dtype, [STAGES, E, B], more_tiles.layout)
    here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(here.index(stage), count=1)
    fence_async_shared()
    _barrier()
    for stage in gl.static_range(STAGES):
        _start_weights(
            weight_tiles,
            more_tiles,
            first_output,
            first_input + stage * B,
            weight.index(stage),
            more.index(stage),
            here.index(stage),
            stage < steps,
            (M + C + E) * B * 2,
            C,
            E,
        )
    _launch_dependents()
    _wait_for_rows()
    for stage in gl.static_range(STAGES):
        column = first_input + stage * B
        _start_copy(x_tiles, [0, column], here.index(stage), x.index(stage), pred=stage < steps)

    sum_MC = gl.zeros([M, C], gl.float32, layout)
    sum_ME = sum_MC
    if E > 0:
        sum_ME = gl.zeros([M, E], gl.float32, more_layout)
    stage = 0
    phase = 0
    for step in range(0, steps):
        mbarrier.wait(here.index(stage), phase)
        x_MB = x.index(stage)
        sum_MC = warpgroup_mma(x_MB, weight.index(stage).permute((1, 0)), sum_MC, is_async=True)
        if E > 0:
            sum_ME = warpgroup_mma(x_MB, more.index(stage).permute((1, 0)), sum_ME, is_async=True)
            sum_MC, sum_ME = warpgroup_mma_wait(0, deps=[sum_MC, sum_ME])
        else:
            sum_MC = warpgroup_mma_wait(0, deps=[sum_MC])
        _barrier()  # all warps have read the stage
        column = first_input + (step + STAGES) * B
        wanted = step + STAGES < steps
        _start_weights(
            weight_tiles,
            more_tiles,
            first_output,
            column,
            weight.index(stage),
            more.index(stage),
            here.index(stage),
            wanted,
            (M + C + E) * B * 2,
            C,
            E,
        )
        _start_copy(x_tiles, [0, column], here.index(stage), x.index(stage), pred=wanted)
        stage += 1
        is_round = stage == STAGES
        stage = gl.where(is_round, 0, stage)
        phase = gl.where(is_round, phase ^ 1, phase)

    is_last = True
    if PARTS > 1:
        row_M = gl.arange(0, M, gl.SliceLayout(1, layout))
        offset_MC = row_M[:, None] * C + gl.arange(0, C, gl.SliceLayout(0, layout))[None, :]
        gl.store(sums + gl.program_id(0) * M * C + offset_MC, sum_MC)
        _barrier()
        is_last = gl.atomic_add(arrived + tile, 1, sem="acq_rel") == PARTS - 1
        if is_last:
            # In the order of parts, whichever came last, so that sums are always the same.
            sum_MC = gl.zeros([M, C], gl.float32, layout)
            for other in gl.static_range(PARTS):
                of_part = sums + (tile * PARTS + other) * M * C
                sum_MC += gl.load(of_part + offset_MC, cache_modifier=".cg")
            gl.store(arrived + tile, 0)
    if is_last:
        _store(sum_MC, out, first_output, rows, N, layout, M, C, GELU)
        if E > 0:
            _store(sum_ME, out, first_output + C, rows, N, more_layout, M, E, GELU)


@gluon.jit
def _start_weights(
    weight_tiles,
    more_tiles,
    row,
    column,
    weight,
    more,
    here,
    wanted,
    STAGE_BYTES: gl.constexpr,
    C: gl.constexpr,
    E: gl.constexpr,
):
    """Start to copy a stage of the matrix; `here` completes when the rows have arrived as well."""
    mbarrier.expect(here, STAGE_BYTES, pred=wanted)
    _start_copy(weight_tiles, [row, column], here, weight, pred=wanted)
    if E > 0:
        _start_copy(more_tiles, [row + C, column], here, more, pred=wanted)


@gluon.jit
def _store(
    sum_MC,
    out,
    first_output,
    rows,
    N,
    layout: gl.constexpr,
    M: gl.constexpr,
    C: gl.constexpr,
    GELU: gl.constexpr,
):
    if GELU:
        # Rounded first, as a product that is stored would be.
        sum_MC = sum_MC.to(out.dtype.element_ty).to(gl.float32)
        sum_MC = 0.5 * sum_MC * (1 + gl.erf(sum_MC * 0.7071067811865476))
    row_M = gl.arange(0, M, gl.SliceLayout(1, layout))
    column_C = first_output + gl.arange(0, C, gl.SliceLayout(0, layout))
    gl.store(
        out + row_M[:, None] * N + column_C[None, :],
        sum_MC.to(out.dtype.element_ty),
        mask=(row_M < rows)[:, None],
    )


@gluon.jit
def _launch_dependents():
    _run("griddepcontrol.launch_dependents; // $0")


@gluon.jit
def _wait_for_rows():
    _run("griddepcontrol.wait; // $0")


@gluon.jit
def _run(instruction: gl.constexpr):
    gl.inline_asm_elementwise(instruction, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
