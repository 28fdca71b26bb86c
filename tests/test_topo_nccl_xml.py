"""NCCL topology XML: an own example, odd cases, and a corpus of real files where there is one."""

import os
import re
from pathlib import Path

import pytest

from epplan.errors import InputError
from epplan.topologies.graph import Cluster, Nic, Numa, PcieSwitch, Plane
from epplan.topologies.host_paths import PATH_TYPES
from epplan.topologies.routes import find_routes
from epplan.topologies.show import summary
from epplan.topologies.sources import load_cluster

EXAMPLE = Path(__file__).parent / "data" / "nccl-2gpu.xml"
CORPUS = Path(os.environ.get("EPPLAN_CORPUS", Path(__file__).parents[2] / "shared" / "corpus"))


def test_example() -> None:
    cluster = load_cluster(str(EXAMPLE))
    first, second = cluster.gpus()
    assert (first.links, second.links) == (18, 18)
    assert first.profile is not None
    assert first.profile.name == "h100-sxm"
    assert (first.pci_bus_id, second.pci_bus_id) == ("0000:11:00.0", "0000:91:00.0")
    assert (first.numa, second.numa) == (0, 1)
    assert [nic.name for nic in cluster.nodes(Nic)] == ["mlx5_0"]
    assert cluster.nodes(Nic)[0].rated_bytes_per_s == 50e9
    assert len(cluster.nodes(Plane)) == 1
    assert (cluster.assumed, cluster.warnings) == ((), ())
    pcie = cluster.link(first.id, cluster.nodes(PcieSwitch)[0].id)
    assert pcie.rated_bytes_per_s == pytest.approx(63e9, rel=1e-3)
    assert pcie.provenance == "read"


def changed(tmp_path: Path, *changes: tuple[str, str], gpu: str | None = None) -> Cluster:
    text = EXAMPLE.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file = tmp_path / "topology"
    file.write_text(text)
    return load_cluster(str(file), gpu)


def test_two_gpus_without_nvlink_take_the_numa_link(tmp_path: Path) -> None:
    cluster = changed(
        tmp_path,
        ('<nvlink target="0000:03:00.0" count="9" tclass="0x068000"/>', ""),
        ('<nvlink target="0000:04:00.0" count="9" tclass="0x068000"/>', ""),
        ('<nvlink target="0000:03:00.0" count="18" tclass="0x068000"/>', ""),
        ("0x2330", "0x2331"),  # the PCIe model: no NVLink to assume
    )
    routes = find_routes(cluster)
    assert PATH_TYPES[routes.path_type[0, 1]] == "SYS"
    slowest = min(routes.resources, key=lambda resource: resource.link.capacity_bytes_per_s)
    assert slowest.name == "numa host0/numa0 -> host0/numa1"


def test_missing_links_come_from_the_profile_and_are_said(tmp_path: Path) -> None:
    cluster = changed(
        tmp_path, ('<nvlink target="0000:03:00.0" count="18" tclass="0x068000"/>', "")
    )
    assert summary(cluster)["counts"]["nvlinks"] == 18  # only what the file states
    assert cluster.assumed == (
        "host0: the file has no NVLinks; 18 links a GPU to NVSwitches assumed from the profile "
        "h100-sxm",
    )
    assert cluster.link("host0/gpu1", "host0/nvswitch").count == 18


def test_hidden_nvswitch_is_a_switch(tmp_path: Path) -> None:
    cluster = changed(tmp_path, ('target="0000:03:00.0"', 'target="fffffff:ffff:ff"'))
    assert len(cluster.nodes(Plane)) == 1
    assert cluster.warnings == ()


def test_too_many_links_are_capped_and_reported(tmp_path: Path) -> None:
    cluster = changed(tmp_path, ('count="18"', 'count="126"'))
    assert cluster.link("host0/gpu1", "host0/nvswitch").count == 18
    assert "GPU 1 lists 126 NVLinks, a h100-sxm has 18" in cluster.warnings[0]


def test_links_to_itself_join_nothing(tmp_path: Path) -> None:
    row = '<nvlink target="0000:03:00.0" count="18" tclass="0x068000"/>'
    loop = '<nvlink target="0000:91:00.0" count="18" tclass="0x030200"/>'
    cluster = changed(tmp_path, (row, loop))
    assert "GPU 1 has 18 NVLinks to itself, which joins nothing; ignored" in cluster.warnings[0]


def test_unknown_model_needs_the_option(tmp_path: Path) -> None:
    cluster = changed(tmp_path, ('device="0x2330"', 'device="0xffff"'))
    assert "give it with --gpu MODEL" in cluster.warnings[-1]
    cluster = changed(tmp_path, ('device="0x2330"', 'device="0xffff"'), gpu="h200-sxm")
    assert all(gpu.profile and gpu.profile.name == "h200-sxm" for gpu in cluster.gpus())
    assert "GPU 0 is taken as h200-sxm, as given" in cluster.assumed[0]
    with pytest.raises(InputError, match="unknown GPU model: h300"):
        changed(tmp_path, gpu="h300")


def test_virtual_bridges_do_not_slow_their_devices(tmp_path: Path) -> None:
    slow = 'device="0xc030" link_speed="2.5 GT/s PCIe" link_width="1"'
    fast = 'device="0xc030" link_speed="32.0 GT/s PCIe" link_width="16"'
    cluster = changed(tmp_path, (fast, slow))
    bridge = cluster.nodes(PcieSwitch)[0].id
    assert cluster.link("host0/numa0", bridge).rated_bytes_per_s > 60e9
    assert "taken as a virtual bridge" in cluster.warnings[0]


def corpus_rows() -> list[tuple[str, str]]:
    sources = CORPUS / "SOURCES.md"
    if not sources.is_file():
        return []
    cells = [line.split(" | ") for line in sources.read_text().splitlines()]
    return [(row[0][2:], row[-1]) for row in cells if row[0].startswith("| nccl-xml/")]


@pytest.mark.skipif(not corpus_rows(), reason="no corpus of real topology files beside the project")
@pytest.mark.parametrize(("name", "stated"), corpus_rows())
def test_real_files_have_the_counts_a_plain_count_gives(name: str, stated: str) -> None:
    cluster = load_cluster(str(CORPUS / name))

    def number(pattern: str) -> int:
        match = re.search(pattern, stated)
        return int(match[1]) if match else 0

    counts = summary(cluster)["counts"]
    assert len(cluster.nodes(Numa)) == number(r"cpu=(\d+)")
    assert counts["gpus"] == number(r"GPU-class pci=(\d+)")
    assert counts["nics"] == (number(r"\((\d+) distinct") or number(r"NIC-class pci=(\d+)"))
    assert counts["nvlinks"] == number(r"total=(\d+)")
    if counts["gpus"] > 1:
        find_routes(cluster)  # every pair has a path
