"""Launching one kernel while the one before it still runs (programmatic dependent launch).

A decode step is some fifty kernels of microseconds, and between two of them the memory would idle
while one drains and the next starts. Every kernel here is therefore started early, does what does
not depend on the one before (the first of a matrix can be copied into shared memory), and then
waits for it with `gdc_wait`; nothing another kernel here writes may be read before that, only
brought into L2. Weights are written by torch's kernels, which let nothing start before they ended.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

EARLY = {"launch_pdl": True}
_COUNTERS = 4096
_LEAST_SUMS = 1 << 21
_workspaces: dict[torch.device, tuple[Tensor, Tensor]] = {}
_outgrown: list[tuple[Tensor, Tensor] | None] = []


@cache
def has_hopper(device: torch.device) -> bool:
    """Return whether a device is a Hopper GPU: later ones do not know its matrix instructions."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def workspace(device: torch.device, sums: int) -> tuple[Tensor, Tensor]:
    """Return room for `sums` float32 numbers, and counters of parts that have arrived, all zero.

    One for each device: kernels that use it run one after the other, and leave zeros behind. One
    that has become too small is kept all the same: CUDA graphs hold its address.
    """
    if device not in _workspaces or _workspaces[device][0].numel() < sums:
        _outgrown.append(_workspaces.get(device))
        counters = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        room = torch.empty(max(sums, _LEAST_SUMS), dtype=torch.float32, device=device)
        _workspaces[device] = room, counters
    return _workspaces[device]


@triton.jit
def fetch(pointers):
    """Bring the lines behind the pointers into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
