"""What a GPU has to do, and how long it takes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a GPU has to do, and how long it takes; arrays over ranks.

    Attributes:
        arithmetic_s: seconds of parts that FLOP/s limit.
        memory_s: seconds of parts that HBM limits.
        launch_s: seconds of launching.
        flops: floating-point operations.
        hbm_bytes: bytes read and written in the GPU's memory.
    """

    arithmetic_s: Floats
    memory_s: Floats
    launch_s: Floats
    flops: Floats
    hbm_bytes: Floats

    @property
    def seconds(self) -> Floats:
        """How long all of it takes."""
        return self.arithmetic_s + self.memory_s + self.launch_s

    def __add__(self, other: "Work") -> "Work":
        """Return both, one after the other."""
        return self._each(lambda name: getattr(self, name) + getattr(other, name))

    def __mul__(self, factor: float) -> "Work":
        """Return the work several times over."""
        return self._each(lambda name: getattr(self, name) * factor)

    def on(self, ranks: Ints, num_ranks: int) -> "Work":
        """Return the work on some of all ranks, and none on the others.

        Pieces of work on one rank add up; a single piece is done on all of `ranks`.
        """

        def spread(name: str) -> Floats:
            values = np.broadcast_to(getattr(self, name), ranks.shape)
            return np.bincount(ranks, values, minlength=num_ranks).astype(np.float64)

        return self._each(spread)

    @staticmethod
    def nothing(num_ranks: int) -> "Work":
        """Return no work at all."""
        return Work(**dict.fromkeys(_WORK, np.zeros(num_ranks)))

    @staticmethod
    def _each(make: Callable[[str], Floats]) -> "Work":
        return Work(**{name: make(name) for name in _WORK})


_WORK = ("arithmetic_s", "memory_s", "launch_s", "flops", "hbm_bytes")


def roofline_work(
    flops: Floats, moved: Floats, best: tuple[Floats, Floats], share: Floats | float
) -> Work:
    """Return work from its two roofline times and the share of the roofline reached."""
    arithmetic, memory = best
    seconds = np.maximum(arithmetic, memory) / share
    return Work(
        arithmetic_s=np.where(arithmetic >= memory, seconds, 0.0),
        memory_s=np.where(arithmetic >= memory, 0.0, seconds),
        launch_s=np.zeros_like(seconds),
        flops=flops,
        hbm_bytes=moved,
    )
