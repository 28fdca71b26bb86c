"""From one slot table to another: which expert travels from which rank to which.

Pure Python without other modules: the planner prints the list, and every rank derives the same.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Slots = Sequence[int | None]  # expert of every slot of one layer, in rank order


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One expert of one layer, from a rank that holds it to one that shall."""

    layer: int  # ordinal of the MoE layer
    expert: int
    source_slot: int  # global slot numbers
    target_slot: int


def layer_transfers(
    layer: int, old: Slots, new: Slots, slots_per_rank: int, hosts: Sequence[str]
) -> list[Transfer]:
    """Return the transfers of one layer, by target slot.

    An expert that only changes its slot within a rank is no transfer. It comes from its own host if
    a copy is there, and from the rank that sends least so far.

    Args:
        layer: ordinal of the MoE layer.
        old: present slots.
        new: slots to be.
        slots_per_rank: slots of a rank.
        hosts: of every rank.
    """
    holders: dict[int, list[int]] = {}
    for slot, expert in enumerate(old):
        if expert is not None:
            holders.setdefault(expert, []).append(slot)
    sent: Counter[int] = Counter()
    transfers = []
    for target, expert in enumerate(new):
        rank = target // slots_per_rank
        if expert is None or local_slot(old, expert, rank, slots_per_rank) is not None:
            continue

        def cost(slot: int, host: str = hosts[rank]) -> tuple[bool, int, int]:
            source = slot // slots_per_rank
            return hosts[source] != host, sent[source], slot

        source = min(holders[expert], key=cost)
        sent[source // slots_per_rank] += 1
        transfers.append(
            Transfer(layer=layer, expert=expert, source_slot=source, target_slot=target)
        )
    return transfers


def local_slot(slots: Slots, expert: int, rank: int, slots_per_rank: int) -> int | None:
    """Return the global slot in which `rank` holds `expert`, if it does."""
    first = rank * slots_per_rank
    own = list(slots[first : first + slots_per_rank])
    return first + own.index(expert) if expert in own else None
