"""A host from the labels of `nvidia-smi topo -m`: NVLink fabric first, then the PCIe tree.

The tree is the smallest that reproduces the labels: PIX devices share a switch, PXB devices a
switch above their switches, PHB and NODE devices a NUMA node, SYS devices do not. NCCL has no type
for NODE (another host bridge of the same NUMA node): such paths are PHB here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING

from epplan.topologies.graph import ClusterBuilder, Gpu, Link, Nic, Numa, PcieSwitch, Plane
from epplan.topologies.hardware import GpuProfile, hardware
from epplan.topologies.host import numa_link, nvlink, pcie_link

from .pci import DEFAULT_LANE_GT
from .smi_links import Links, find_links

if TYPE_CHECKING:
    from .smi_topo import Matrix

HOST = "host0"
_TYPE_OF = {"PIX": "PIX", "PXB": "PXB", "PHB": "PHB", "NODE": "PHB", "SYS": "SYS"}


def build_host(matrix: Matrix, what: str, profile: GpuProfile | None) -> ClusterBuilder:
    """Return the host with GPUs named by the matrix.

    Args:
        matrix: labels and affinities.
        what: names the source.
        profile: the model of all GPUs, or None.
    """
    builder = ClusterBuilder(what)
    builder.warnings += matrix.remarks
    links = find_links(matrix, profile)
    builder.assumed += links.assumed
    builder.warnings += links.warnings
    host = _HostBuilder(builder, matrix, links)
    host.add_numa_nodes()
    host.add_devices()
    host.add_nvlinks()
    builder.warnings += host.contradictions()
    return builder


class _HostBuilder:
    """Holds, for every device, the groups it belongs to, from near to far."""

    def __init__(self, builder: ClusterBuilder, matrix: Matrix, links: Links) -> None:
        self.builder = builder
        self.matrix = matrix
        self.links = links
        self.devices = matrix.gpus + matrix.nics
        self.pix = self._joined(("PIX",), self._alone())
        self.pxb = self._joined(("PXB",), self.pix)
        self.numa = self._joined(("PHB", "NODE"), self.pxb)
        self.rate_gt = self._lane_speed()
        self._join_by_affinity()

    # --- groups ---------------------------------------------------------------------------------

    def _alone(self) -> dict[str, int]:
        return {device: number for number, device in enumerate(self.devices)}

    def _joined(self, labels: Sequence[str], groups: dict[str, int]) -> dict[str, int]:
        """Return the groups after joining those with a pair that has one of the labels."""
        joined = dict(groups)
        for one, other in combinations(self.devices, 2):
            if self._label(one, other) in labels:
                _merge(joined, joined[one], joined[other])
        return joined

    def _label(self, one: str, other: str) -> str | None:
        return self.matrix.labels.get((one, other)) or self.matrix.labels.get((other, one))

    def _join_by_affinity(self) -> None:
        """Put GPUs of one NUMA affinity together unless some label between them says SYS.

        NICs whose labels place them nowhere (their rows are cut off) are kept together likewise.
        """
        apart: dict[int | str | None, list[str]] = {}
        separate: set[frozenset[int]] = set()  # groups only grow: apart once is apart for good
        lost = [nic for nic in self.matrix.nics if self._members(self.numa[nic]) == [nic]]
        for one, other in [*combinations(self.matrix.gpus, 2), *combinations(lost, 2)]:
            affinity = self._affinity(one)
            if affinity != self._affinity(other) or self.numa[one] == self.numa[other]:
                continue
            groups = frozenset((self.numa[one], self.numa[other]))
            if groups not in separate and self._are_apart(*groups):
                separate.add(groups)
            if groups not in separate:
                _merge(self.numa, self.numa[one], self.numa[other])
            elif affinity is not None:
                apart.setdefault(affinity, []).extend([one, other])
        for affinity, gpus in apart.items():
            self.builder.warnings.append(
                f"{HOST}: {', '.join(dict.fromkeys(gpus))} share NUMA or CPU affinity {affinity}, "
                "and SYS labels lie between them or their NICs; the labels are followed"
            )

    def _are_apart(self, one: int, other: int) -> bool:
        pairs = product(self._members(one), self._members(other))
        return any(self._label(*pair) == "SYS" for pair in pairs)

    def _members(self, group: int) -> list[str]:
        return [device for device, number in self.numa.items() if number == group]

    def _affinity(self, gpu: str) -> int | str | None:
        return self.matrix.numa.get(gpu, self.matrix.cpus.get(gpu))

    # --- nodes ----------------------------------------------------------------------------------

    def add_numa_nodes(self) -> None:
        """Add a NUMA node per group, with the number its GPUs state."""
        self.numa_index: dict[int, int] = {}
        taken = set(self.matrix.numa.values())
        for group in dict.fromkeys(self.numa.values()):
            stated = [self.matrix.numa[x] for x in self._members(group) if x in self.matrix.numa]
            free = next(number for number in range(len(self.devices) + 1) if number not in taken)
            self.numa_index[group] = stated[0] if stated else free
            taken.add(self.numa_index[group])
        if not self.matrix.numa:
            self.builder.assumed.append(
                f"{HOST}: the matrix gives no NUMA node; its labels and CPU affinities make "
                f"{len(self.numa_index)}"
            )
        rate = hardware().numa_bytes_per_s("default", 0)
        names = [self._numa_id(group) for group in self.numa_index]
        for group, name in zip(self.numa_index, names, strict=True):
            self.builder.add(Numa(id=name, host=HOST, index=self.numa_index[group]))
        for one, other in combinations(names, 2):
            self.builder.connect(one, other, numa_link(rate))

    def _numa_id(self, group: int) -> str:
        """Return the id of a group's NUMA node; groups may state the same number."""
        index = self.numa_index[group]
        twins = [x for x, number in self.numa_index.items() if number == index]
        place = twins.index(group)
        return f"{HOST}/numa{index}" + (f".{place}" if place else "")

    def add_devices(self) -> None:
        """Add GPUs and NICs below the switches of their groups."""
        self.builder.assumed.append(
            f"{HOST}: PCIe links are taken as {self.rate_gt:g} GT/s x16 and the link between NUMA "
            "nodes as NCCL's default; the matrix tells only distances"
        )
        for index, name in enumerate(self.matrix.gpus):
            self._add_gpu(index, name)
        for name in self.matrix.nics:
            self._add_nic(name)

    def _add_gpu(self, index: int, name: str) -> None:
        profile = self.links.profile
        node = Gpu(
            id=f"{HOST}/{name.lower()}",
            host=HOST,
            index=index,
            profile=profile,
            memory_bytes=profile.memory if profile else 0,
            links=self.links.of_gpu[name],
            numa=self.numa_index[self.numa[name]],
        )
        self.builder.add(node)
        self.builder.connect(node.id, self._parent(name), pcie_link(self.rate_gt))

    def _add_nic(self, name: str) -> None:
        node = Nic(
            id=f"{HOST}/{name.lower()}",
            host=HOST,
            name=self.matrix.nic_names.get(name, name),
            rated_bytes_per_s=None,
            numa=self.numa_index[self.numa[name]],
        )
        self.builder.add(node)
        self.builder.connect(node.id, self._parent(name), pcie_link(self.rate_gt))

    def _parent(self, device: str) -> str:
        """Return the node above a device, adding switches on the way."""
        numa = self._numa_id(self.numa[device])
        near = [x for x in self.devices if self.pix[x] == self.pix[device]]
        far = [x for x in self.devices if self.pxb[x] == self.pxb[device]]
        above = self._switch(f"pxb{self.pxb[device]}", numa) if len(far) > len(near) else numa
        if len(near) > 1 or above != numa:
            return self._switch(f"pix{self.pix[device]}", above)
        return numa

    def _switch(self, name: str, above: str) -> str:
        switch = f"{HOST}/{name}"
        if switch not in self.builder.graph:
            self.builder.add(PcieSwitch(id=switch, host=HOST))
            self.builder.connect(switch, above, pcie_link(self.rate_gt))
        return switch

    def _lane_speed(self) -> float:
        profile = self.links.profile
        return profile.pcie if profile and profile.pcie else DEFAULT_LANE_GT

    # --- NVLink ---------------------------------------------------------------------------------

    def add_nvlinks(self) -> None:
        """Join GPUs by a plane, or pair by pair in a mesh."""
        if self.links.switched:
            plane = self.builder.add(Plane(id=f"{HOST}/nvswitch", host=HOST)).id
            for gpu, count in self.links.of_gpu.items():
                if count:
                    self.builder.connect(f"{HOST}/{gpu.lower()}", plane, self._nvlink(count))
            return
        for (one, other), count in self.links.of_pair.items():
            tail, head = f"{HOST}/{one.lower()}", f"{HOST}/{other.lower()}"
            self.builder.connect(tail, head, self._nvlink(count))

    def _nvlink(self, count: int) -> Link:
        assert self.links.model is not None  # set wherever there are links
        return nvlink(self.links.model, min(count, self.links.cap))

    # --- proof ----------------------------------------------------------------------------------

    def contradictions(self) -> Iterable[str]:
        """Return a remark when the tree gives other path types than some labels."""
        wrong = [
            f"{one} to {other} is {label}, here {self._tree_type(one, other)}"
            for one, other in combinations(self.devices, 2)
            for label in [self._label(one, other)]
            if label in _TYPE_OF and self._tree_type(one, other) != _TYPE_OF[label]
        ]
        if not wrong:
            return []
        return [f"{HOST}: no PCIe tree gives all labels; {len(wrong)} differ, first {wrong[0]}"]

    def _tree_type(self, one: str, other: str) -> str:
        for name, groups in (("PIX", self.pix), ("PXB", self.pxb), ("PHB", self.numa)):
            if groups[one] == groups[other]:
                return name
        return "SYS"


def _merge(groups: dict[str, int], one: int, other: int) -> None:
    keep, drop = min(one, other), max(one, other)
    for device, group in groups.items():
        if group == drop:
            groups[device] = keep
