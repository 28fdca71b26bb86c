"""How long every rank waits for the others at each all-to-all, and who makes them wait.

No rank can end an all-to-all before the last one has begun it. The rank that came last pays the
transfer alone, every other one its wait on top, so that

    wait of a rank = its seconds in the all-to-all - the fewest seconds of any rank in it

without comparing clocks of different machines. A rank that never waits is the straggler. The
seconds are those of the phases "dispatch" and "combine" of the step's clock: what the computation
waited, by device events on a GPU and by wall clock on a CPU.

Shapes: C all-to-alls in the order of their names, W ranks.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from epplan.runtime.clock import Span

STAGES = ("dispatch", "combine")
_MIN_OFTEN = 0.5  # a straggler is last this often at least, and this much more often than by chance
_MIN_OVER_CHANCE = 1.5

Key = tuple[int, int, int, str]  # step, micro-batch, layer (absolute), stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """Seconds waited, over a window of steps."""

    seconds: dict[str, list[list[float]]]  # stage -> [MoE layers][ranks]
    last_share: list[float]  # [ranks]: of the all-to-alls, those to which the rank came last
    straggler: int | None


class WaitLog:
    """This rank's seconds in the all-to-alls of a window.

    Args:
        layers: the MoE layers, absolute.
        world_size: number of ranks.
    """

    def __init__(self, layers: tuple[int, ...], world_size: int) -> None:
        self._layers, self._world_size = layers, world_size
        self._seconds: dict[Key, float] = defaultdict(float)
        self._steps = 0

    def after_step(self, spans: Iterable[Span]) -> None:
        """Add what the step's clock has seen."""
        for span in spans:
            if span.track == "compute" and span.name in STAGES:
                key = (self._steps, span.place.micro_batch, span.place.layer, span.name)
                self._seconds[key] += span.end_s - span.begin_s
        self._steps += 1

    def gather(self) -> Waits:
        """Return the waits of all ranks, and begin anew; a collective.

        All ranks have run the same all-to-alls.
        """
        keys = sorted(self._seconds)
        own = [self._seconds[key] for key in keys]
        self._seconds.clear()
        self._steps = 0
        gathered: list[list[float]] = [[]] * self._world_size
        dist.all_gather_object(gathered, own)
        seconds_CW = torch.tensor(gathered, dtype=torch.float64).T
        return find_waits(keys, seconds_CW, self._layers)


def find_waits(keys: list[Key], seconds_CW: Tensor, layers: tuple[int, ...]) -> Waits:
    """Return who waited where.

    Args:
        keys: which all-to-all each is, [C].
        seconds_CW: time of each rank in it.
        layers: the MoE layers, absolute.
    """
    num_ranks = seconds_CW.shape[1]
    wait_CW = seconds_CW - seconds_CW.amin(1, keepdim=True)
    sums = {stage: torch.zeros(len(layers), num_ranks, dtype=torch.float64) for stage in STAGES}
    for (_, _, layer, stage), wait_W in zip(keys, wait_CW, strict=True):
        sums[stage][layers.index(layer)] += wait_W
    last_W = torch.bincount(seconds_CW.argmin(1), minlength=num_ranks).double()
    share_W = last_W / max(1, len(keys))
    worst = int(share_W.argmax())
    often = max(_MIN_OFTEN, _MIN_OVER_CHANCE / num_ranks)
    return Waits(
        seconds={stage: waited.tolist() for stage, waited in sums.items()},
        last_share=share_W.tolist(),
        straggler=worst if keys and share_W[worst] > often else None,
    )
