"""PCI facts that NCCL and hwloc XML share: bus ids, link speeds, links of unknown models."""

import re

from epplan.topologies.graph import Link
from epplan.topologies.hardware import GpuProfile, gpu_profile, hardware

DEFAULT_LANE_GT = 8.0  # NCCL's choice for a link speed it does not know


def normalise_bus_id(bus_id: str) -> str:
    """Return a bus id as sysfs writes it: lower case, a domain of four digits."""
    text = bus_id.lower()
    domain, separator, rest = text.partition(":")
    return f"{domain[-4:].zfill(4)}{separator}{rest}" if text.count(":") == 2 else text


def pcie_rate(speed_text: str, width: int) -> float:
    """Return the rated bytes/s of `32.0 GT/s PCIe` and a width: NCCL's defaults for no answer."""
    match = re.match(r"([0-9]{1,3}(?:\.[0-9]+)?)\s*GT/s", speed_text)
    lanes = hardware().pcie_lane_gb_per_s
    speed = float(match[1]) if match else DEFAULT_LANE_GT
    return hardware().pcie_bytes_per_s(
        speed if speed in lanes else DEFAULT_LANE_GT, width if width > 0 else 16
    )


def pcie_link(rate: float) -> Link:
    """Return a PCIe link whose speed the source states."""
    return Link(
        kind="pcie",
        rated_bytes_per_s=rate,
        efficiency=hardware().efficiency["pcie"],
        provenance="read",
    )


def nearest_generation(sm: int, *, amd: bool) -> GpuProfile:
    """Return a profile of an unknown GPU's generation: AMD's, or by NVIDIA's `sm`."""
    if amd:
        return gpu_profile("mi300x")
    known = [profile for profile in hardware().gpus.values() if profile.sm and profile.links]
    return min(known, key=lambda profile: abs((profile.sm or 0) - sm))
