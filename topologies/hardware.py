"""Hardware profiles: what a GPU or NIC can do when nothing better is known than its name."""

from functools import cache
from importlib import resources
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict

from epplan.errors import InputError

from .units import parse_bandwidth, parse_flops, parse_memory, parse_time

Bandwidth = Annotated[float, BeforeValidator(parse_bandwidth)]
Memory = Annotated[int, BeforeValidator(parse_memory)]
Flops = Annotated[float, BeforeValidator(parse_flops)]
Seconds = Annotated[float, BeforeValidator(parse_time)]


class _Profile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GpuProfile(_Profile):
    """Rated figures of one GPU model; bandwidths in bytes/s and one direction."""

    name: str = ""
    memory: Memory
    hbm: Bandwidth
    flops: Flops  # dense fp16
    links: int  # NVLink or xGMI links of one GPU
    link: Bandwidth  # of one link
    fabric: Literal["switch", "mesh", "memory", "none"]
    pcie: float  # GT/s a lane; 0: no PCIe
    device: tuple[str, ...]  # PCI vendor:device
    sm: int | None = None
    source: str


class NicProfile(_Profile):
    """Rated figures of one NIC port."""

    name: str = ""
    rate: Bandwidth
    pcie: float
    source: str


class Hardware(_Profile):
    """All profiles and constants of `hardware.yaml`."""

    efficiency: dict[str, float]
    latency: dict[str, Seconds]
    pcie_lane_gb_per_s: dict[float, float]
    numa_gb_per_s: dict[str, float | dict[int, float]]
    gpus: dict[str, GpuProfile]
    nics: dict[str, NicProfile]

    def pcie_bytes_per_s(self, gigatransfers: float, width: int = 16) -> float:
        """Return the rated bandwidth of a PCIe link of `width` lanes."""
        return self.pcie_lane_gb_per_s[gigatransfers] * width * 1e9

    def numa_bytes_per_s(self, vendor: str, model_number: int, arch: str = "x86_64") -> float:
        """Return NCCL's inter-NUMA bandwidth; Intel's by the largest known model not above."""
        figure = self.numa_gb_per_s.get(arch) or self.numa_gb_per_s.get(vendor)
        if figure is None:
            figure = self.numa_gb_per_s["default"]
        if isinstance(figure, dict):
            known = [number for number in figure if number <= model_number]
            figure = figure[max(known, default=min(figure))]
        return figure * 1e9


@cache
def hardware() -> Hardware:
    """Return the bundled profiles, read once."""
    text = (resources.files("epplan.topologies") / "hardware.yaml").read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    for table in ("gpus", "nics"):
        for name, row in document[table].items():
            row["name"] = name
    return Hardware.model_validate(document)


def gpu_profile(name: str) -> GpuProfile:
    """Return the profile of a GPU model.

    Raises:
        InputError: unknown name, with the known ones.
    """
    profile = hardware().gpus.get(name)
    if profile is None:
        known = ", ".join(sorted(hardware().gpus))
        raise InputError(f"unknown GPU model: {name}", hints=[f"known models: {known}"])
    return profile


def gpu_profile_by_device(vendor_device: str) -> GpuProfile | None:
    """Return the profile for a PCI `vendor:device` such as `0x10de:0x2330`, if it is known."""
    for profile in hardware().gpus.values():
        if vendor_device.lower() in profile.device:
            return profile
    return None
