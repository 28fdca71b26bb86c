"""Are the ranks where the plan puts them? The comparison, and what to do if not.

Rank order is lost in many ways that nothing else notices: a rendezvous sorts hosts as text, a
scheduler sorts the node list, CUDA counts GPUs by speed, a container renumbers them, a host was
replaced. The model would run all the same, slower than planned and with no error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from epplan.planner.plan import Plan, Rank

from .host_map import same_host

HOST_VARIABLE = "EPPLAN_HOST"  # a scheduler's name for the machine; else its host name counts
MAX_ROWS = 64
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a rank says of itself.

    Args:
        host: the machine's name.
        gpu_uuid: of its GPU; None on a CPU, or where CUDA does not tell.
        pci_bus_id: the same.
        plan: hash of the plan it was started with.
        version: of epplan.
    """

    host: str
    gpu_uuid: str | None
    pci_bus_id: str | None
    plan: str
    version: str


def identity_report(
    plan: Plan, version: str, host_map: Mapping[str, str], found: Sequence[Identity]
) -> str | None:
    """Return the table planned/actual and the remedies; None if every rank is where it belongs.

    Args:
        plan: rank 0's.
        version: rank 0's.
        host_map: real names of renamed hosts.
        found: every rank's identity, in rank order.
    """
    digest = plan.sha256()
    rows = []
    for rank, own in zip(plan.ranks, found, strict=True):
        host = host_map.get(rank.host, rank.host)
        pairs = [
            (f"host {host}", f"host {own.host}", same_host(host, own.host)),
            _gpu_pair(rank, own),
            (f"plan {digest[:12]}", f"plan {own.plan[:12]}", digest == own.plan),
            (f"epplan {version}", f"epplan {own.version}", version == own.version),
        ]
        wrong = [(planned, actual) for planned, actual, is_same in pairs if not is_same]
        if wrong:
            planned, actual = (", ".join(side) for side in zip(*wrong, strict=True))
            rows.append((str(rank.rank), planned, actual))
    if not rows:
        return None
    return "\n".join(
        [
            f"error: {len(rows)} of {len(found)} ranks are not what the plan says; no rank starts",
            *_table([("rank", "planned", "actual"), *rows[:MAX_ROWS]]),
            *([f"... and {len(rows) - MAX_ROWS} more"] if len(rows) > MAX_ROWS else []),
            *_remedies(plan, host_map, found),
        ]
    )


def compares_gpus(plan: Plan) -> bool:
    """Tell whether the plan says which GPUs it means: one for a cluster in a line does not."""
    return all(rank.gpu_uuid or rank.pci_bus_id for rank in plan.ranks)


def _gpu_pair(rank: Rank, own: Identity) -> tuple[str, str, bool]:
    """Return planned and actual GPU, and whether they agree as far as both are known."""
    if rank.gpu_uuid and own.gpu_uuid:
        is_same = _uuid(rank.gpu_uuid) == _uuid(own.gpu_uuid)
        return f"GPU {rank.gpu_uuid}", f"GPU {own.gpu_uuid}", is_same
    if rank.pci_bus_id and own.pci_bus_id:
        is_same = _bus_id(rank.pci_bus_id) == _bus_id(own.pci_bus_id)
        return f"GPU {rank.pci_bus_id}", f"GPU {own.pci_bus_id}", is_same
    return f"GPU {rank.gpu_index}", UNKNOWN, True


def _uuid(text: str) -> str:
    return text.lower().removeprefix("gpu-")


def _bus_id(text: str) -> tuple[int, ...]:
    """Return domain, bus, device and function: NVML writes the domain with eight digits."""
    return tuple(int(part, 16) for part in text.replace(".", ":").split(":"))


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _remedies(plan: Plan, host_map: Mapping[str, str], found: Sequence[Identity]) -> list[str]:
    remedies = []
    hosts = {
        planned: {found[rank.rank].host for rank in ranks}
        for planned, ranks in groupby(plan.ranks, key=lambda rank: rank.host)
    }
    moved = {
        planned: next(iter(actual))
        for planned, actual in hosts.items()
        if len(actual) == 1 and not same_host(host_map.get(planned, planned), next(iter(actual)))
    }
    strangers = [real for real in moved.values() if not any(same_host(real, x) for x in hosts)]
    if moved and len(set(strangers)) == len(moved):
        lines = ", ".join(f"`{planned}: {real}`" for planned, real in moved.items())
        remedies.append(f"if hosts were renamed: --host-map FILE with the lines {lines}")
    if {own.plan for own in found} != {plan.sha256()}:
        remedies.append("give all ranks the same plan file")
    if len({own.version for own in found}) > 1:
        remedies.append("install the same epplan on all hosts")
    remedies += [
        "start the ranks with the files of `epplan launch PLAN --to ...`, which keep their order",
        "or plan for the machines as they are: `epplan topo discover`, `epplan solve`",
        "--no-identity runs all the same, and not as planned",
    ]
    return ["remedies:", *(f"  {number}. {text}" for number, text in enumerate(remedies, 1))]
