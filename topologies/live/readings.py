"""Single readings as numbers: what a file of sysfs or an answer of NVML says, or None."""

import re

from epplan.topologies.hardware import hardware
from epplan.topologies.readers.pci import DEFAULT_LANE_GT

from .host_file import PciRecord, Readings, Refusal, normalise_guid

_LANE_OF_GENERATION = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}


def number(readings: Readings, name: str) -> int | None:
    """Return a reading as a number, if it is one."""
    value = readings.get(name)
    if isinstance(value, Refusal) or value is None:
        return None
    try:
        return int(str(value), 0)
    except ValueError:
        return None


def max_pcie_speed(device: PciRecord) -> float | None:
    """Return the rated bytes/s a device can reach; None where it does not say."""
    match = re.match(r"([0-9.]+)\s*GT/s", str(device.readings.get("max_link_speed", "")))
    width = number(device.readings, "max_link_width")
    lanes = hardware().pcie_lane_gb_per_s
    if not match or not width or width > 32 or float(match[1]) not in lanes:
        return None  # virtual bridges say "Unknown" and a width of 0 or 255
    return hardware().pcie_bytes_per_s(float(match[1]), width)


def nvml_pcie_rate(replies: Readings) -> float | None:
    """Return the rated bytes/s of a GPU's slot by NVML, which answers where sysfs does not."""
    generation, width = replies.get("pcie_max_generation"), replies.get("pcie_max_width")
    if isinstance(generation, int) and isinstance(width, int) and width:
        lane = _LANE_OF_GENERATION.get(generation, DEFAULT_LANE_GT)
        return hardware().pcie_bytes_per_s(lane, width)
    return None


def nic_rate(readings: Readings) -> float | None:
    """Return bytes/s of `400 Gb/sec (4X NDR)`, or of an interface's Mb/s; -1 is unknown."""
    match = re.match(r"([0-9.]+) Gb/sec", str(readings.get("rate", "")))
    if match:
        return float(match[1]) * 1e9 / 8
    megabits = number(readings, "speed")
    return megabits * 1e6 / 8 if megabits and megabits > 0 else None


def port_guid(readings: Readings) -> str | None:
    """Return the port's GUID: the second half of GID 0, if it is set."""
    gid = readings.get("gid")
    if not isinstance(gid, str) or readings.get("link_layer") != "InfiniBand":
        return None
    guid = normalise_guid("".join(gid.split(":")[-4:]))
    return guid if guid.strip("0") else None
