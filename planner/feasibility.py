"""Whether any placement keeps all constraints, and if not, which few of them rule all out.

    L layers . E experts . R replicas a layer . k = --experts-per-gpu
    s[g] slots that GPU g's memory has for all layers
    u[g] = min(L min(k, E), s[g]), the places on GPU g . U[h] those on host h

A placement exists if and only if

    (1) sum of u >= L (E + R)                                       and, to survive a host's loss,
    (2) R >= E    (3) sum over hosts of min(L E, U[h]) >= 2 L E

Necessary: a GPU holds at most min(k, E) copies of a layer, because it never holds two of an expert;
(3) counts pairs (expert, host), of which every expert needs two and a host offers one each at most.
Sufficient: layers are alike, so giving each 1/L of every GPU's places is a fractional solution of a
flow problem (layers -> hosts, with room for E pairs -> GPUs), and flows with whole capacities have
whole solutions. Within a layer, copies are dealt to GPUs host by host, experts in a circle: no GPU
has more than E places, so none gets an expert twice, and the first 2 E pairs are on two hosts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epplan.topologies.units import format_bytes

from .plan import RankMemory

Ints = npt.NDArray[np.int64]

_NAMES = 3  # of GPUs of a kind
SINGLE, PER_GPU, SURVIVE, REPLICAS = "single", "experts per GPU", "survive", "replicas"
Constraint = str | int  # one of the names above, or the memory of a kind of GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What is to be placed, and the room for it.

    Attributes:
        layers: layers.
        experts: of a layer.
        replicas: of a layer.
        survive: whether every expert is on two hosts at least.
        experts_per_gpu: most copies of a layer on a GPU.
        slots: copies of all layers that fit in every GPU's memory, [gpus].
        host: number of every GPU's host, [gpus].
    """

    layers: int
    experts: int
    replicas: int
    survive: bool
    experts_per_gpu: int
    slots: Ints
    host: Ints

    @property
    def wanted(self) -> int:
        """Copies of all layers."""
        return self.layers * (self.experts + self.replicas)

    def kinds(self) -> list[Ints]:
        """Return GPUs with as many slots each, fewest slots first."""
        return [np.flatnonzero(self.slots == slots) for slots in np.unique(self.slots)]

    def fits(self, without: frozenset[Constraint] = frozenset()) -> bool:
        """Tell whether a placement keeps all constraints but those in `without`."""
        survive = self.survive and SURVIVE not in without
        replicas = self.replicas
        if REPLICAS in without:
            replicas = self.experts if survive else 0
        if survive and replicas < self.experts:
            return False
        places = self._places(without)
        if places.sum() < self.layers * (self.experts + replicas):
            return False
        return not survive or self.pairs(places).sum() >= 2 * self.layers * self.experts

    def pairs(self, places: Ints) -> Ints:
        """Return the pairs (expert, host) that every host offers over all layers, [hosts]."""
        on_host = np.bincount(self.host, weights=places).astype(np.int64)
        return np.minimum(on_host, self.layers * self.experts)

    def _places(self, without: frozenset[Constraint]) -> Ints:
        """Return the places for copies on every GPU, [gpus]."""
        copies = self.experts + self.replicas
        most = copies if PER_GPU in without else self.experts_per_gpu
        if SINGLE not in without:
            most = min(most, self.experts)
        places = np.full(len(self.slots), self.layers * most)
        for number, gpus in enumerate(self.kinds()):
            if number not in without:
                places[gpus] = np.minimum(places[gpus], self.slots[gpus])
        return places

    def places(self) -> Ints:
        """Return the places for copies on every GPU, [gpus]."""
        return self._places(frozenset())

    def conflict(self) -> list[Constraint]:
        """Return constraints that together rule out every placement, and any fewer do not.

        By deletion: a constraint without which there is still no placement is left out for good
        (Chinneck and Dravnieks, "Locating minimal infeasible constraint sets", 1991). What says
        least to the user is tried first. Empty where there is a placement.
        """
        if self.fits():
            return []
        kinds = reversed(range(len(self.kinds())))
        kept: list[Constraint] = [SINGLE, *kinds, SURVIVE, PER_GPU, REPLICAS]
        out: frozenset[Constraint] = frozenset()
        for constraint in list(kept):
            if not self.fits(out | {constraint}):
                out |= {constraint}
                kept.remove(constraint)
        return kept


def conflict_in_words(
    room: Room,
    names: Sequence[str],
    fixed: Sequence[RankMemory],
    expert_bytes: int,
) -> list[str]:
    """Return what rules out every placement, a line for each constraint of a minimal set.

    Args:
        room: which has no placement.
        names: of all GPUs.
        fixed: memory of every GPU without experts.
        expert_bytes: of one expert.
    """
    conflict = room.conflict()
    lines = [_total(room), *(_line(room, c, names, fixed, expert_bytes) for c in conflict)]
    if len(conflict) > 1:
        lines.append("without any one of these constraints there would be a placement")
    return lines


def _total(room: Room) -> str:
    places = int(room.places().sum())
    layers = f"{room.layers} layer{'s' * (room.layers > 1)} x "
    copies = f"({room.experts} experts + {room.replicas} replicas)"
    wanted = f"{layers}{copies if room.replicas else f'{room.experts} experts'}"
    return f"{wanted} need {room.wanted} places; all {len(room.slots)} GPUs have {places}" + (
        f": {room.wanted - places} too few" if places < room.wanted else ""
    )


def _line(
    room: Room,
    constraint: Constraint,
    names: Sequence[str],
    fixed: Sequence[RankMemory],
    expert_bytes: int,
) -> str:
    if isinstance(constraint, int):
        gpus = room.kinds()[constraint]
        return _memory_line(room, gpus, names, fixed[gpus[0]], expert_bytes)
    num_gpus, k, experts = len(room.slots), room.experts_per_gpu, room.experts
    if constraint == PER_GPU:
        return (
            f"--experts-per-gpu {k}: {num_gpus} GPUs have {num_gpus * min(k, experts)} places a "
            f"layer for {experts + room.replicas} copies"
        )
    if constraint == REPLICAS:
        return f"--replicas {room.replicas}: {experts + room.replicas} copies a layer" + (
            f", where two of each of {experts} experts are {2 * experts}"
            if room.survive and room.replicas < experts
            else ""
        )
    if constraint == SURVIVE:
        return f"--survive 1-host: every expert on two hosts; {_pairs_in_words(room)}"
    return (
        f"a GPU never holds two copies of an expert: {num_gpus} GPUs have "
        f"{num_gpus * experts} places a layer for {experts + room.replicas} copies"
    )


def _pairs_in_words(room: Room) -> str:
    """Say how many of the pairs (expert, host) that survival needs the hosts offer."""
    offered = room.pairs(room.places())
    wanted = 2 * room.layers * room.experts
    if len(offered) == 1:
        return "all GPUs are on one"
    least = int(offered.argmin())
    return (
        f"{wanted} pairs of expert and host are needed, the {len(offered)} hosts have room for "
        f"{int(offered.sum())}, host number {least} for {int(offered[least])}"
    )


def _memory_line(
    room: Room, gpus: Ints, names: Sequence[str], use: RankMemory, expert_bytes: int
) -> str:
    parts = {
        "replicated weights": use.replicated,
        "dispatch buffers": use.buffers,
        "KV cache": use.kv_cache,
    }
    slots, count = int(room.slots[gpus[0]]), len(gpus)
    most = room.layers * min(room.experts_per_gpu, room.experts)
    left = use.capacity - sum(parts.values())
    room_for = (
        f"{format_bytes(left)} left for {slots} experts of {format_bytes(expert_bytes)}"
        if left >= 0
        else f"{format_bytes(-left)} too little for any expert"
    )
    shown = ", ".join(names[gpu] for gpu in gpus[:_NAMES]) + ", ..." * (count > _NAMES)
    return (
        f"memory of {count} GPU{'s' * (count > 1)} ({shown}): each may use "
        f"{format_bytes(use.capacity)}: "
        f"{', '.join(f'{name} {format_bytes(x)}' for name, x in parts.items())}, {room_for}, where "
        f"{room.layers} layers x {min(room.experts_per_gpu, room.experts)} are {most}"
    )
