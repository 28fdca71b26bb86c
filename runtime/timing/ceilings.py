"""What this rank's device reaches on the two things a model is made of: products and copies.

Measured in the run they are compared with: a board that is hot or shared is slower in both.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from epplan.runtime.clock import synchronize

# Large enough to fill a GPU for milliseconds; small enough for a core of a CPU.
_MATRIX = {"cuda": 8192, "cpu": 512}
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 25}
_SECONDS = {"cuda": 0.5, "cpu": 0.1}  # of each: a GPU needs time to reach its power limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Medians on this rank."""

    flop_per_s: float  # square matrix product in the run's dtype
    bytes_per_s: float  # copy, read and written bytes


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Time a matrix product and a copy until the device has warmed up."""
    size = _MATRIX[device.type]
    # Random numbers: products of zeros draw less power and run faster.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_s = _median_seconds(lambda: a @ b, device)
    source = torch.randn(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copy_s = _median_seconds(lambda: target.copy_(source), device)
    return Ceilings(
        flop_per_s=2 * size**3 / product_s,
        bytes_per_s=2 * source.numel() * source.itemsize / copy_s,
    )


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    times: list[float] = []
    work()
    synchronize(device)
    end = time.perf_counter() + _SECONDS[device.type]
    while time.perf_counter() < end or len(times) < 5:
        times.append(device_seconds(work, device))
    return statistics.median(times)


def device_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call: on a GPU the device's, by events."""
    if device.type == "cuda":
        begin, end = (torch.Event(device=device, enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
