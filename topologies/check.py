"""What is wrong with a cluster, line by line: pass, warn or fail, each with its remedy.

Works on the graph, so on any source. A check that the source has no facts for is not passed but
listed as not checked. check_hosts.py looks inside hosts, check_network.py between them, this file
at the source as a whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .check_hosts import (
    find_fabric_faults,
    find_far_nics,
    find_lost_links,
    find_mig,
    find_shared_nics,
    find_slow_slots,
)
from .check_network import compare_leafs, find_cut_leafs, find_rail_faults
from .check_report import Line, Problem, Report, report_lines
from .graph import Cluster, Gpu, NetworkSwitch, Nic


@dataclass(frozen=True, slots=True, kw_only=True)
class _Check:
    name: str
    passed: str
    applies: Callable[[Cluster], bool]
    find: Callable[[Cluster], Iterator[Problem]]


def check_cluster(cluster: Cluster) -> Report:
    """Return the report on one cluster."""
    lines: list[Line] = []
    not_checked: list[str] = []
    for check in _CHECKS:
        if not check.applies(cluster):
            not_checked.append(check.name)
            continue
        lines += report_lines(check.name, cluster.name, check.passed, check.find(cluster))
    return Report(lines=tuple(lines), not_checked=tuple(not_checked))


def check_against(cluster: Cluster, other: Cluster) -> Report:
    """Return the report on what two sources say differently about the same hosts."""
    subject = f"{cluster.name} and {other.name}"
    compared = (
        ("same hosts", "both name the same hosts", _missing(cluster, other)),
        ("same GPUs", "hosts have the same GPUs", _gpu_counts(cluster, other)),
        ("same leafs", "hosts share leafs alike", compare_leafs(cluster, other)),
    )
    lines = [
        line
        for name, passed, problems in compared
        for line in report_lines(name, subject, passed, problems)
    ]
    return Report(lines=tuple(lines), not_checked=())


def _find_skeletons(cluster: Cluster) -> Iterator[Problem]:
    remedy = "take a source that tells it: `epplan topo discover`, `ibnetdiscover`"
    if not cluster.gpus() and not _has_switches(cluster):
        yield "warn", cluster.name, "names no GPU", remedy
    unknown = [gpu.id for gpu in cluster.gpus() if gpu.profile is None]
    if unknown:
        message = f"does not tell the model of {len(unknown)} GPUs, first {unknown[0]}"
        yield "warn", cluster.name, message, "give --gpu MODEL"
    for text in cluster.assumed:
        yield "warn", cluster.name, f"assumed: {text}", remedy


def _find_contradictions(cluster: Cluster) -> Iterator[Problem]:
    for text in cluster.warnings:
        yield "warn", cluster.name, text, "look at the source there"


def _missing(cluster: Cluster, other: Cluster) -> Iterator[Problem]:
    here, there = cluster.by_host(), other.by_host()
    for hosts, lacking in (
        ([x for x in here if x not in there], other),
        ([x for x in there if x not in here], cluster),
    ):
        if hosts:
            remedy = "take them out of the plan, or bring the other source up to date"
            yield "fail", ", ".join(hosts), f"missing in {lacking.name}", remedy


def _gpu_counts(cluster: Cluster, other: Cluster) -> Iterator[Problem]:
    here, there = cluster.by_host(), other.by_host()
    for host in [host for host in here if host in there]:
        counts = [sum(isinstance(x, Gpu) for x in nodes) for nodes in (here[host], there[host])]
        if all(counts) and counts[0] != counts[1]:
            message = f"{counts[0]} GPUs in {cluster.name}, {counts[1]} in {other.name}"
            yield "fail", host, message, "run `epplan topo discover` there: a GPU may be lost"


def _has_nics_and_gpus(cluster: Cluster) -> bool:
    return bool(cluster.nodes(Nic) and cluster.gpus())


def _has_switches(cluster: Cluster) -> bool:
    return bool(cluster.nodes(NetworkSwitch))


_CHECKS = (
    _Check(
        name="NVLinks",
        passed="all GPUs of a model have the same NVLinks",
        applies=lambda cluster: any(gpu.links for gpu in cluster.gpus()),
        find=find_lost_links,
    ),
    _Check(
        name="MIG",
        passed="MIG is off",
        applies=lambda cluster: any(gpu.mig is not None for gpu in cluster.gpus()),
        find=find_mig,
    ),
    _Check(
        name="fabric health",
        passed="the fabric manager reports no fault",
        applies=lambda cluster: any(gpu.faults is not None for gpu in cluster.gpus()),
        find=find_fabric_faults,
    ),
    _Check(
        name="near NIC",
        passed="every GPU has a NIC behind its PCIe switch",
        applies=_has_nics_and_gpus,
        find=find_far_nics,
    ),
    _Check(
        name="shared NICs",
        passed="no NIC is shared by GPUs",
        applies=_has_nics_and_gpus,
        find=find_shared_nics,
    ),
    _Check(
        name="PCIe",
        passed="no slot or bridge is slower than its device",
        applies=lambda cluster: any(link.kind == "pcie" for _, _, link in cluster.links()),
        find=find_slow_slots,
    ),
    _Check(
        name="leafs",
        passed="all leafs reach each other",
        applies=_has_switches,
        find=find_cut_leafs,
    ),
    _Check(
        name="rails",
        passed="every host has all its rails",
        applies=lambda cluster: _has_switches(cluster) and bool(cluster.nodes(Nic)),
        find=find_rail_faults,
    ),
    _Check(
        name="completeness",
        passed="nothing had to be assumed",
        applies=lambda cluster: True,
        find=_find_skeletons,
    ),
    _Check(
        name="consistency",
        passed="the source does not contradict itself",
        applies=lambda cluster: True,
        find=_find_contradictions,
    ),
)
