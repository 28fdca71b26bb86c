"""How long every rank waits for the others at each all-to-all, and who makes them wait.

No rank can end an all-to-all before the last one has begun it. The rank that came last pays the
transfer alone, every other one its wait on top, so that

    wait of a rank = its seconds in the all-to-all - the fewest seconds of any rank in it

without comparing clocks of different machines. A rank that never waits is the straggler.

Shapes: C all-to-alls in the order of the run, W ranks.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

STAGES = ("dispatch", "combine")
_MIN_OFTEN = 0.5  # a straggler is last this often at least, and this much more often than by chance
_MIN_OVER_CHANCE = 1.5

_Stamp = float | torch.Event


class WaitClock:
    """Stamps around every all-to-all of this rank.

    On a GPU the stamps are events on the current stream, so that the seconds are the device's;
    reading them is the only wait. On the CPU, where gloo's collectives block, they are wall clock.

    Args:
        device: where the rank computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stamps: list[tuple[int, str, _Stamp, _Stamp]] = []

    def ready(self) -> _Stamp:
        """Return the stamp of having nothing left to do but to wait."""
        return self._now()

    def done(self, ready: _Stamp, ordinal: int, stage: str) -> None:
        """Note that what was waited for since `ready` has come.

        Args:
            ready: stamp of the local end of work.
            ordinal: of the MoE layer.
            stage: one of `STAGES`.
        """
        self._stamps.append((ordinal, stage, ready, self._now()))

    def take(self) -> tuple[list[tuple[int, str]], Tensor]:
        """Return layer and stage of each all-to-all since the last call, and seconds_C."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        stamps, self._stamps = self._stamps, []
        seconds = [_between(ready, done) for _, _, ready, done in stamps]
        keys = [(ordinal, stage) for ordinal, stage, _, _ in stamps]
        return keys, torch.tensor(seconds, dtype=torch.float64)

    def _now(self) -> _Stamp:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """Seconds waited, over a window of steps."""

    seconds: dict[str, list[list[float]]]  # stage -> [MoE layers][ranks]
    last_share: list[float]  # [ranks]: of the all-to-alls, those to which the rank came last
    straggler: int | None


def gather_waits(clock: WaitClock, num_layers: int, world_size: int) -> Waits:
    """Return the waits of all ranks since the last call; a collective.

    Args:
        clock: this rank's stamps; all ranks have run the same all-to-alls.
        num_layers: number of MoE layers.
        world_size: number of ranks.
    """
    keys, seconds_C = clock.take()
    gathered: list[list[float]] = [[]] * world_size
    dist.all_gather_object(gathered, seconds_C.tolist())
    return find_waits(keys, torch.tensor(gathered, dtype=torch.float64).T, num_layers)


def find_waits(keys: list[tuple[int, str]], seconds_CW: Tensor, num_layers: int) -> Waits:
    """Return who waited where.

    Args:
        keys: MoE layer (ordinal) and stage of each all-to-all, [C].
        seconds_CW: time of each rank in it.
        num_layers: number of MoE layers.
    """
    num_ranks = seconds_CW.shape[1]
    wait_CW = seconds_CW - seconds_CW.amin(1, keepdim=True)
    sums = {stage: torch.zeros(num_layers, num_ranks, dtype=torch.float64) for stage in STAGES}
    for (ordinal, stage), wait_W in zip(keys, wait_CW, strict=True):
        sums[stage][ordinal] += wait_W
    last_W = torch.bincount(seconds_CW.argmin(1), minlength=num_ranks).double()
    share_W = last_W / max(1, len(keys))
    worst = int(share_W.argmax())
    often = max(_MIN_OFTEN, _MIN_OVER_CHANCE / num_ranks)
    return Waits(
        seconds={stage: waited.tolist() for stage, waited in sums.items()},
        last_share=share_W.tolist(),
        straggler=worst if keys and share_W[worst] > often else None,
    )


def _between(begin: _Stamp, end: _Stamp) -> float:
    if isinstance(begin, torch.Event) and isinstance(end, torch.Event):
        return begin.elapsed_time(end) / 1e3
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
