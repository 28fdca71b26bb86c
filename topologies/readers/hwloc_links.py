"""NVLink and xGMI from hwloc's distances: MB/s of one direction between GPUs, or to NVSwitches.

<distances2hetero nbobjs="28" name="NVLinkBandwidth">
  <indexes length="100">OSDev:802 OSDev:803 ... PCIDev:449 </indexes>
  <u64values length="20">0 0 25000 25000 ... </u64values>
"""

import re

from epplan.errors import InputError
from epplan.topologies.graph import ClusterBuilder, Gpu, Link, Plane
from epplan.topologies.hardware import GpuProfile, hardware
from epplan.topologies.host import nvlink

from .documents import Element

_NAMES = ("NVLinkBandwidth", "XGMIBandwidth")
_LINK_MB = (25000, 20000, 64000, 48000)  # NVLink 2 to 4, NVLink 1, xGMI
_MAX_OBJECTS = 1024

Row = dict[str, int]  # MB/s by gp_index of the other end


def read_rows(root: Element, what: str) -> dict[str, Row]:
    """Return each object's MB/s to the others, by index; zeros and itself left out.

    Raises:
        InputError: values that do not fit the objects, or are no numbers.
    """
    rows: dict[str, Row] = {}
    for element in [*root.findall("distances2hetero"), *root.findall("distances2")]:
        if element.get("name") not in _NAMES:
            continue
        names = [name.rpartition(":")[2] for name in _words(element, "indexes")]
        values = _values(element, len(names), what)
        for number, name in enumerate(names):
            row = values[number * len(names) : (number + 1) * len(names)]
            pairs = zip(names, row, strict=True)
            rows[name] = {other: value for other, value in pairs if value and other != name}
    return rows


def link_count(rows: dict[str, Row], pci: Element, profile: GpuProfile | None) -> int:
    """Return how many links the distances give a PCI device.

    Args:
        rows: of `read_rows`.
        pci: the device; its own index or that of its driver's device counts.
        profile: its model, which tells the speed of a link.
    """
    return sum(value // _per_link(value, profile) for value in _row(rows, pci).values())


def add_links(
    builder: ClusterBuilder, root: Element, gpus: dict[Gpu, Element], rows: dict[str, Row]
) -> None:
    """Join GPUs by the distances, or say that their links had to be assumed or are unknown.

    Args:
        builder: receives plane and links.
        root: the document.
        gpus: GPUs with their PCI devices.
        rows: of `read_rows`.
    """
    by_index = {index: gpu for gpu, pci in gpus.items() for index in _indexes(pci)}
    switches = _switch_indexes(root)
    for gpu, pci in gpus.items():
        row = _row(rows, pci)
        to_switch = sum(value for index, value in row.items() if index in switches)
        if to_switch:
            builder.connect(gpu.id, _plane(builder, gpu.host), _link(gpu, to_switch))
        for index, value in row.items():
            peer = by_index.get(index)
            if peer is not None and peer != gpu:
                builder.graph.add_edge(gpu.id, peer.id, link=_link(gpu, value))
            elif index not in switches and peer is None:
                builder.warnings.append(f"GPU {gpu.index} has NVLinks to object {index}; ignored")
        if not row:
            _assume(builder, gpu)


def _assume(builder: ClusterBuilder, gpu: Gpu) -> None:
    profile = gpu.profile
    if profile is None or not profile.links:
        return
    if profile.fabric != "switch":
        builder.warnings.append(f"the file has no NVLinks; those of {profile.name} are not known")
        return
    builder.assumed.append(
        f"{gpu.host}: the file has no NVLinks; {profile.links} links a GPU to NVSwitches assumed "
        f"from the profile {profile.name}"
    )
    builder.connect(gpu.id, _plane(builder, gpu.host), nvlink(profile, profile.links))


def _plane(builder: ClusterBuilder, host: str) -> str:
    name = f"{host}/nvswitch"
    if name not in builder.graph:
        builder.add(Plane(id=name, host=host))
    return name


def _link(gpu: Gpu, megabytes: int) -> Link:
    amd = gpu.profile is not None and any(x.startswith("0x1002") for x in gpu.profile.device)
    return Link(
        kind="nvlink",
        rated_bytes_per_s=megabytes * 1e6,
        efficiency=hardware().efficiency["xgmi" if amd else "nvlink"],
        provenance="read",
        count=megabytes // _per_link(megabytes, gpu.profile),
    )


def _per_link(megabytes: int, profile: GpuProfile | None) -> int:
    """Return MB/s of one link: the model's, else what divides the sum, else all is one link."""
    if profile is not None and profile.links:
        return min(round(profile.link / 1e6), megabytes)
    return next((size for size in _LINK_MB if megabytes % size == 0), megabytes)


def _indexes(pci: Element) -> list[str]:
    devices = [pci, *(x for x in pci.iter("object") if x.get("type") == "OSDev")]
    return [index for x in devices if (index := x.get("gp_index"))]


def _switch_indexes(root: Element) -> set[str]:
    """Return the indexes of NVSwitches: NVIDIA's bridges of PCI class 0680."""
    return {
        index
        for x in root.iter("object")
        if x.get("type") == "PCIDev" and (index := x.get("gp_index"))
        if x.get("subtype") == "NVSwitch" or x.get("pci_type", "").startswith("0680 [10de:")
    }


def _row(rows: dict[str, Row], pci: Element) -> Row:
    return next((rows[index] for index in _indexes(pci) if index in rows), {})


def _values(element: Element, count: int, what: str) -> list[int]:
    words = _words(element, "u64values")
    if count > _MAX_OBJECTS or len(words) != count * count:
        raise InputError(
            f"{what}: {element.get('name')} has {len(words)} values for {count} objects"
        )
    if not all(re.fullmatch("[0-9]{1,9}", word) for word in words):
        raise InputError(f"{what}: {element.get('name')} has a value that is no number")
    return [int(word) for word in words]


def _words(element: Element, tag: str) -> list[str]:
    return [word for part in element.findall(tag) for word in (part.text or "").split()]
