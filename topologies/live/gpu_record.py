"""One GPU's NVML replies put into words: model, links, fabric, what is wrong with it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from epplan.topologies.hardware import GpuProfile, gpu_profile_by_device
from epplan.topologies.readers.pci import nearest_generation, normalise_bus_id

from .host_file import GpuRecord, PciRecord, Reading

ACTIVE = 1
REMOTE_GPU = 0  # NVML_NVLINK_DEVICE_TYPE_GPU
FABRIC_COMPLETED = 3
FABRIC_STATES = {1: "not started", 2: "in progress"}
_NVSWITCH_CLASS = "0x068000"
_NO_SUCH_LINK = "Invalid Argument"
_HIDDEN_BUS = "ffff:"  # FFFFFFFF:FF:FF.0: the remote is hidden from a virtual machine
# NVML_GPU_FABRIC_HEALTH_MASK: shift and value that means trouble.
_HEALTH_BITS = {
    "degraded bandwidth": (0, 1),
    "route recovery under way": (2, 1),
    "a route is unhealthy": (4, 1),
    "recovery from an access timeout under way": (6, 1),
    "no partition is assigned": (12, 2),
    "the fabric manager is disconnected": (14, 2),
}
_CONFIGURATION_SHIFT = 8
_CONFIGURATION_FAULTS = {
    2: "incorrect system GUID",
    3: "incorrect chassis serial number",
    4: "no partition",
    5: "insufficient NVLinks",
    6: "incompatible GPU firmware",
    7: "invalid location",
    8: "invalid GPU state",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """The active NVLinks of a GPU.

    Attributes:
        to_switch: how many lead to NVSwitches.
        to_gpus: how many lead to each GPU, by bus id.
        hidden: how many of `to_switch` are so by assumption, because the remote is hidden.
        down: how many answer and are not active.
    """

    to_switch: int
    to_gpus: Mapping[str, int]
    hidden: int
    down: int


def find_profile(gpu: GpuRecord, pci: PciRecord | None) -> GpuProfile | None:
    """Return the profile for the PCI device id NVML or sysfs tells."""
    number = gpu.replies.get("pci_device_id")
    if isinstance(number, int):
        return gpu_profile_by_device(f"0x{number & 0xFFFF:04x}:0x{number >> 16:04x}")
    if pci is None:
        return None
    return gpu_profile_by_device(f"{pci.readings.get('vendor')}:{pci.readings.get('device')}")


def model_name(gpu: GpuRecord) -> str:
    """Return what NVML calls the GPU."""
    name = gpu.replies.get("name")
    return name if isinstance(name, str) else "GPU"


def why_no_links(gpu: GpuRecord) -> str:
    """Return why nothing is known about the NVLinks, in words."""
    if gpu.nvml_index is None:
        return "without NVML its NVLinks are unknown"
    reasons = " and ".join(sorted(gpu.links_refused.keys() - {_NO_SUCH_LINK}) or [_NO_SUCH_LINK])
    if is_mig(gpu):
        return f"it is in MIG mode and NVML answers {reasons} for its NVLinks"
    if gpu.replies.get("virtualization_mode") == 2:
        return f"it is a virtual GPU and NVML answers {reasons} for its NVLinks"
    return f"NVML answers {reasons} for its NVLinks, as in many virtual machines"


def count_links(gpu: GpuRecord, pci: Mapping[str, PciRecord], peers: set[str]) -> Links:
    """Return where the active links lead.

    Args:
        gpu: the record.
        pci: what sysfs tells about devices, by bus id.
        peers: bus ids of the host's GPUs.
    """
    to_gpus: Counter[str] = Counter()
    to_switch = hidden = down = 0
    for link in gpu.links:
        if ACTIVE not in (link.get("state_field"), link.get("state")):
            down += 1
            continue
        remote = _bus_id(link.get("remote_bus_id"))
        if link.get("remote_type") == REMOTE_GPU or remote in peers:
            to_gpus[remote or "unknown"] += 1
            continue
        to_switch += 1
        known = link.get("remote_type") == 2 or _class_of(pci, remote) == _NVSWITCH_CLASS
        hidden += not known
    return Links(to_switch=to_switch, to_gpus=to_gpus, hidden=hidden, down=down)


def nearest_model(gpu: GpuRecord) -> GpuProfile | None:
    """Return a profile of the GPU's generation, for the links of a GPU of no known model."""
    capability = gpu.replies.get("compute_capability")
    if not isinstance(capability, str):
        return None
    major, _, minor = capability.partition(".")
    return nearest_generation(int(major) * 10 + int(minor), amd=False)


def domain(gpu: GpuRecord) -> str | None:
    """Return cluster UUID and clique of a multi-node NVLink domain the GPU has joined."""
    uuid, clique = gpu.replies.get("fabric_cluster_uuid"), gpu.replies.get("fabric_clique")
    if gpu.replies.get("fabric_state") != FABRIC_COMPLETED or not isinstance(uuid, str):
        return None
    if not uuid.strip("0-"):
        return None  # all zero: a fabric inside one host
    return f"{uuid}.{clique}"


def is_mig(gpu: GpuRecord) -> bool | None:
    """Tell whether MIG is on; None where nothing is said."""
    mode = gpu.replies.get("mig_mode")
    if isinstance(mode, int):
        return mode == 1
    return None if mode is None else False


def faults(gpu: GpuRecord) -> tuple[str, ...] | None:
    """Return what fabric state and health say is wrong; None where there is no fabric manager."""
    state = gpu.replies.get("fabric_state")
    return tuple(_faults(gpu, state)) if isinstance(state, int) and state else None


def _faults(gpu: GpuRecord, state: int) -> Iterator[str]:
    if state in FABRIC_STATES:
        yield f"the fabric manager has not finished with it: {FABRIC_STATES[state]}"
    mask = gpu.replies.get("fabric_health_mask")
    if state != FABRIC_COMPLETED or not isinstance(mask, int):
        return
    status = gpu.replies.get("fabric_status")
    if isinstance(status, int) and status:
        yield f"joining the fabric ended with NVML status {status}"
    for fault, (shift, trouble) in _HEALTH_BITS.items():
        if mask >> shift & 3 == trouble:
            yield fault
    configuration = mask >> _CONFIGURATION_SHIFT & 15
    if configuration > 1:
        known = _CONFIGURATION_FAULTS.get(configuration, f"code {configuration}")
        yield f"incorrect configuration: {known}"


def _bus_id(reading: Reading | None) -> str | None:
    """Return the remote's bus id; None where it is hidden or refused."""
    if not isinstance(reading, str) or not reading:
        return None
    bus_id = normalise_bus_id(reading)
    return None if bus_id.startswith(_HIDDEN_BUS) else bus_id


def _class_of(pci: Mapping[str, PciRecord], bus_id: str | None) -> Reading | None:
    device = pci.get(bus_id) if bus_id else None
    return device.readings.get("class") if device else None
