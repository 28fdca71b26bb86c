"""Names the first place where numbers stop being finite: rank, layer and expert.

NaN spreads: one bad row of an expert is in all tokens of its sequence a layer later, and on other
ranks after that. So every rank keeps the largest magnitude of each row, which is not finite where
one of its numbers is not, and after a step all ranks agree on the earliest bad place of any.

Shapes: R rows of this rank's experts, T tokens of this rank, H hidden size, P slots per rank,
W ranks.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from epplan.errors import EpplanError, PeerError
from epplan.planner.plan import Plan

_NOWHERE = torch.iinfo(torch.int64).max


class FiniteCheck:
    """Magnitudes of one rank's rows in a step, read after it; nothing waits inside a step.

    Args:
        rank: this process.
        slots_per_rank: P.
    """

    def __init__(self, rank: int, slots_per_rank: int) -> None:
        self._rank = rank
        self._slots_per_rank = slots_per_rank
        self._noted: list[tuple[int, Sequence[int] | None, Tensor]] = []

    def start(self) -> None:
        """Forget the last step."""
        self._noted.clear()

    def home(self, layer: int, rows: Tensor) -> None:
        """Note this rank's own tokens as a layer's router sees them, [..., H]."""
        self._noted.append((layer, None, _magnitudes(rows)))

    def experts(self, layer: int, rows_RH: Tensor, rows_of_slot: Sequence[int]) -> None:
        """Note what this rank's experts made of their rows, slot by slot.

        Args:
            layer: absolute.
            rows_RH: outputs.
            rows_of_slot: how many rows each slot has, [P].
        """
        self._noted.append((layer, rows_of_slot, _magnitudes(rows_RH)))

    def agree(self, plan: Plan, gather: Callable[[Tensor], Tensor]) -> None:
        """Check the step on all ranks; a collective.

        Args:
            plan: whose slots the step used.
            gather: returns this tensor of all ranks, [W, n] from [n], on the CPU.

        Raises:
            EpplanError: names the earliest place that is not finite, on the rank it is on.
            PeerError: says the same on all others.
        """
        own = self._first_bad()
        device = self._noted[0][2].device if self._noted else torch.device("cpu")
        places_W = gather(torch.tensor([own], device=device))[:, 0]
        place = int(places_W.min())
        if place == _NOWHERE:
            return
        rank = int(places_W.argmin())
        # The others stop because of that one.
        kind = EpplanError if rank == self._rank else PeerError
        layer, slot = divmod(place, self._slots_per_rank + 1)
        if not slot:
            raise kind(
                f"rank {rank}: hidden states after attention of layer {layer} are not finite",
                hints=["its weights or the inputs hold NaN or infinity, or overflow the dtype"],
            )
        ordinal = plan.model.moe_layers.index(layer)
        expert = plan.expert_of_slot[ordinal][rank * self._slots_per_rank + slot - 1]
        raise kind(
            f"rank {rank}: outputs of expert {expert} of layer {layer} are not finite",
            hints=["its weights hold NaN or infinity, or its rows overflow the dtype"],
        )

    def _first_bad(self) -> int:
        """Return layer * (P + 1) + (0 for the home rank's rows, else slot + 1) of the first."""
        if not self._noted:
            return _NOWHERE
        good = torch.stack([rows.isfinite().all() for _, _, rows in self._noted]).tolist()
        bad = [noted for noted, finite in zip(self._noted, good, strict=True) if not finite]
        return min((self._place(*noted) for noted in bad), default=_NOWHERE)

    def _place(self, layer: int, rows_of_slot: Sequence[int] | None, magnitudes: Tensor) -> int:
        slot = 0
        if rows_of_slot is not None:
            row = int((~magnitudes.isfinite()).nonzero()[0])
            slot = 1 + sum(end <= row for end in accumulate(rows_of_slot))
        return layer * (self._slots_per_rank + 1) + slot


def _magnitudes(rows: Tensor) -> Tensor:
    """Return the largest magnitude of every row; NaN or infinity if it has one."""
    largest: Tensor = torch.linalg.vector_norm(rows.detach().flatten(0, -2), float("inf"), dim=-1)
    return largest
