"""NVML played from a file of replies, and a /sys tree made by hand.

    python -m tests.nvml_replies > replies.json     # record this machine's, without its UUIDs

A file holds what every GPU answers (`every_gpu`), what single ones answer instead (`gpus`), and
links by range: {"0-17": {...}}. A question it does not name is refused as `Not Supported`.
"""

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from epplan.topologies.live.host_file import Reading, Refusal
from epplan.topologies.live.nvml import GPU_SOURCES, LINK_SOURCES, MAX_LINKS, Nvml, open_nvml

DATA = Path(__file__).parent / "data"


class Replies:
    """NVML as a file tells it."""

    def __init__(self, name: str) -> None:
        self._document = json.loads((DATA / f"nvml-{name}.json").read_text())

    def driver_version(self) -> Reading:
        return _reading(self._document["driver_version"])

    def gpu_count(self) -> int:
        return len(self._document["gpus"])

    def ask_gpu(self, gpu: int, question: str) -> Reading:
        common = self._document.get("every_gpu", {}).get("replies", {})
        replies = {**common, **self._document["gpus"][gpu].get("replies", {})}
        return _reading(replies.get(question, {"refused": "Not Supported"}))

    def ask_link(self, gpu: int, link: int, question: str) -> Reading:
        common = self._document.get("every_gpu", {}).get("links", {})
        for ranges in (self._document["gpus"][gpu].get("links", {}), common):
            for links, replies in ranges.items():
                first, _, last = links.partition("-")
                if int(first) <= link <= int(last or first):
                    return _reading(replies.get(question, {"refused": "Not Supported"}))
        return Refusal(refused="Invalid Argument")


def record(nvml: Nvml) -> dict[str, Any]:
    """Return this machine's replies as such a file's document, with made-up UUIDs."""
    gpus = [_gpu(nvml, gpu) for gpu in range(nvml.gpu_count())]
    common = {
        part: {
            key: x for key, x in gpus[0][part].items() if all(gpu[part][key] == x for gpu in gpus)
        }
        for part in ("replies", "links")
    }
    own = [
        {part: {key: x for key, x in gpu[part].items() if key not in common[part]} for part in gpu}
        for gpu in gpus
    ]
    return {"driver_version": _value(nvml.driver_version()), "every_gpu": common, "gpus": own}


def _gpu(nvml: Nvml, gpu: int) -> dict[str, dict[str, Any]]:
    """Return one GPU's replies, and its links' by range of links that answer alike."""
    replies = {question: _value(nvml.ask_gpu(gpu, question)) for question in GPU_SOURCES}
    replies["uuid"] = f"GPU-00000000-0000-0000-0000-{gpu:012}"
    links = [
        {question: _value(nvml.ask_link(gpu, link, question)) for question in LINK_SOURCES}
        for link in range(MAX_LINKS)
    ]
    ranges = {}
    for _, alike in groupby(range(MAX_LINKS), key=lambda link: json.dumps(links[link])):
        numbers = list(alike)
        ranges[f"{numbers[0]}-{numbers[-1]}"] = links[numbers[0]]
    return {"replies": replies, "links": ranges}


def _value(reading: Reading) -> Any:
    return reading.model_dump() if isinstance(reading, Refusal) else reading


def _reading(value: Any) -> Reading:
    return Refusal(refused=value["refused"]) if isinstance(value, dict) else value


@dataclass
class FakeSys:
    """Builds a /sys and /proc tree under `root`."""

    root: Path
    numa_nodes: int = 2
    ports: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._write("proc/cpuinfo", "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n")
        for index in range(self.numa_nodes):
            self._write(
                f"sys/devices/system/node/node{index}/cpulist", f"{index * 8}-{index * 8 + 7}"
            )

    def pci(
        self,
        *path: str,
        device: str,
        numa: int = 0,
        kind: str = "0x030200",
        vendor: str = "0x10de",
        speed: str = "32.0 GT/s PCIe",
        width: str = "16",
    ) -> None:
        """Add a device, and what is above it as bridges of the same speed."""
        folder = f"sys/devices/pci{path[0][:7]}"
        for bus_id in path:
            folder += f"/{bus_id}"
            is_device = bus_id == path[-1]
            if (self.root / folder).exists():
                continue
            values = {
                "class": kind if is_device else "0x060400",
                "vendor": vendor if is_device else "0x1000",
                "device": device if is_device else "0xc030",
                "numa_node": str(numa),
                "max_link_speed": speed,
                "max_link_width": width,
                "current_link_speed": "2.5 GT/s PCIe",
                "current_link_width": width,
            }
            for name, value in values.items():
                self._write(f"{folder}/{name}", value + "\n")
            link = self.root / "sys/bus/pci/devices" / bus_id
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(self.root / folder)

    def rdma(
        self,
        name: str,
        bus_id: str,
        guid: str,
        *,
        port: int = 1,
        state: str = "4: ACTIVE",
        rate: str = "400 Gb/sec (4X NDR)",
        layer: str = "InfiniBand",
    ) -> None:
        """Add a port; `guid` is the port's, four groups of four digits."""
        base = f"sys/class/infiniband/{name}"
        self._write(f"{base}/node_guid", "0000:0000:0000:0000\n")
        values = {
            "state": state,
            "phys_state": "5: LinkUp",
            "rate": rate,
            "link_layer": layer,
            "gids/0": f"fe80:0000:0000:0000:{guid}",
        }
        for file, value in values.items():
            self._write(f"{base}/ports/{port}/{file}", value + "\n")
        link = self.root / base / "device"
        if not link.exists():
            link.symlink_to(self.root / "sys/bus/pci/devices" / bus_id)
        self.ports[name] = self.root / base / "ports" / str(port)

    def interface(self, name: str, bus_id: str, speed: str) -> None:
        """Add a network interface without RDMA."""
        self._write(f"sys/class/net/{name}/operstate", "up\n")
        self._write(f"sys/class/net/{name}/speed", f"{speed}\n")
        (self.root / f"sys/class/net/{name}/device").symlink_to(
            self.root / "sys/bus/pci/devices" / bus_id
        )

    def _write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def hgx(root: Path, host: int = 0) -> FakeSys:
    """Return an HGX host: 8 PCIe switches with a GPU and a NIC each, 4 on each of 2 NUMA nodes.

    0000:10:01.0 (root port) - 11:00.0 (upstream) - 12:00.0 - 13:00.0 GPU
                                                 \\ 12:01.0 - 14:00.0 NIC
    """
    sys = FakeSys(root)
    for index in range(8):
        top = f"0000:{index + 1}0:01.0", f"0000:{index + 1}1:00.0"
        gpu, nic = f"0000:{index + 1}3:00.0", f"0000:{index + 1}4:00.0"
        numa = index // 4
        sys.pci(*top, f"0000:{index + 1}2:00.0", gpu, device="0x2330", numa=numa)
        sys.pci(
            *(*top, f"0000:{index + 1}2:01.0", nic),
            device="0x1021",
            vendor="0x15b3",
            kind="0x020700",
            numa=numa,
        )
        sys.rdma(f"mlx5_{index}", nic, f"b8ce:f603:{host:04x}:000{index}")
    return sys


def main() -> None:
    """Print this machine's replies."""
    with open_nvml() as nvml:
        print(json.dumps(record(nvml), indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
