"""Discovery: recorded and invented NVML replies and /sys trees, to records, to the graph."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from epplan.errors import EpplanError, InputError
from epplan.topologies.graph import Cluster, Gpu, Nic, PcieSwitch, Plane
from epplan.topologies.host_paths import PATH_TYPES, host_paths
from epplan.topologies.live import discover, gather, nvml
from epplan.topologies.live.host_file import (
    GpuRecord,
    HostRecord,
    Refusal,
    hosts_text,
    is_host_file,
)
from epplan.topologies.live.host_graph import hosts_graph, read_host_file
from epplan.topologies.live.sysfs import Sysfs
from epplan.topologies.routes import find_routes
from tests.fork_ranks import fork_ranks
from tests.nvml_replies import FakeSys, Replies, hgx
from tests.nvml_replies import record as record_replies

ROOT = Path(__file__).parent.parent


def record(name: str, root: Path, host: str = "node01") -> HostRecord:
    return discover.read_host(host, Replies(name), Sysfs(root, "x86_64"))


def graph(name: str, root: Path) -> Cluster:
    """Return the graph after a round through the file's text."""
    text = hosts_text(discover.hosts_file([record(name, root)]))
    return read_host_file(json.loads(text), "host.json").build("")


def pair(tmp_path: Path) -> FakeSys:
    """Return /sys of two GPUs, each under its own root port."""
    sys = FakeSys(tmp_path)
    for index in range(2):
        gpu = f"0000:{index + 1}3:00.0"
        sys.pci(f"0000:{index + 1}0:01.0", gpu, device="0x2330", numa=index)
    return sys


def test_full_hgx(tmp_path: Path) -> None:
    hgx(tmp_path)
    cluster = graph("hgx-h100", tmp_path)
    assert (cluster.assumed, cluster.warnings) == ((), ())
    gpus = cluster.gpus()
    assert [gpu.links for gpu in gpus] == [18] * 8
    assert [gpu.numa for gpu in gpus] == [0] * 4 + [1] * 4
    assert gpus[2].pci_bus_id == "0000:33:00.0"
    assert gpus[2].uuid == "GPU-10000002-0000-0000-0000-000000000000"
    assert gpus[2].memory_bytes == 85520809984
    assert gpus[2].profile is not None
    assert gpus[2].profile.name == "h100-sxm"
    assert (gpus[2].mig, gpus[2].faults) == (False, ())
    assert cluster.link("node01/gpu2", "node01/nvswitch").count == 18
    assert len(cluster.nodes(PcieSwitch)) == 8
    nic = cluster.nodes(Nic)[3]
    assert (nic.name, nic.guid, nic.rated_bytes_per_s) == ("mlx5_3", "b8cef60300000003", 50e9)
    slot = cluster.link(nic.id, "node01/0000:41:00.0")
    assert slot.provenance == "read"
    assert slot.rated_bytes_per_s == pytest.approx(63e9, rel=1e-3)
    routes = find_routes(cluster)
    assert PATH_TYPES[routes.path_type[0, 7]] == "NVL"


def test_a_nic_is_near_the_gpu_on_its_switch(tmp_path: Path) -> None:
    hgx(tmp_path)
    builder = hosts_graph("x", record("hgx-h100", tmp_path))
    cluster = builder.build("")
    for gpu, nic in zip(cluster.gpus(), cluster.nodes(Nic), strict=True):
        switches = [x for x in cluster.graph[gpu.id] if isinstance(cluster.node(x), PcieSwitch)]
        assert cluster.graph.has_edge(switches[0], nic.id)
    assert host_paths(cluster, cluster.by_host()["node01"]).gpu_to_nic["node01/gpu0"] == []


def test_join_is_by_bus_id_whatever_the_index(tmp_path: Path) -> None:
    """NVML lists the GPUs in another order than sysfs and writes the ids in another form."""
    hgx(tmp_path)
    replies = Replies("hgx-h100")
    replies._document["gpus"].reverse()
    host = discover.read_host("node01", replies, Sysfs(tmp_path, "x86_64"))
    assert [gpu.nvml_index for gpu in host.gpus] == [7, 6, 5, 4, 3, 2, 1, 0]
    gpus = hosts_graph("x", host).build("").gpus()
    assert [(gpu.index, gpu.pci_bus_id) for gpu in gpus[:2]] == [
        (0, "0000:13:00.0"),
        (1, "0000:23:00.0"),
    ]
    assert gpus[0].uuid == "GPU-10000000-0000-0000-0000-000000000000"
    assert gpus[0].numa == 0


def test_recorded_virtual_machine_takes_its_links_from_the_profile(tmp_path: Path) -> None:
    sys = FakeSys(tmp_path, numa_nodes=1)
    sys.pci("0000:00:06.0", device="0x2335", numa=-1)
    host = record("h200-vm", tmp_path)
    assert host.gpus[0].links == ()
    assert host.gpus[0].links_refused == {"Not Supported": 36}
    cluster = graph("h200-vm", tmp_path)
    gpu = cluster.gpus()[0]
    assert gpu.profile is not None
    assert gpu.profile.name == "h200-sxm"
    assert (gpu.links, gpu.memory_bytes) == (0, 143771 * 2**20)  # the source states no links
    assert cluster.link("node01/gpu0", "node01/nvswitch").count == 18
    assert cluster.assumed == (
        "node01: GPU 0: NVML answers Not Supported for its NVLinks, as in many virtual machines; "
        "18 links to NVSwitches assumed from the profile h200-sxm",
    )
    assert cluster.warnings == ()


def test_recorded_virtual_machine_of_two_gpus_tells_its_links(tmp_path: Path) -> None:
    replies = Replies("2xh200-vm")
    assert record_replies(replies) == {
        name: value for name, value in replies._document.items() if name != "about"
    }
    sys = FakeSys(tmp_path, numa_nodes=1)
    for bus_id in ("0000:00:06.0", "0000:00:07.0"):
        sys.pci(bus_id, device="0x2335", numa=0)
    cluster = graph("2xh200-vm", tmp_path)
    assert [gpu.links for gpu in cluster.gpus()] == [18, 18]
    for gpu in cluster.gpus():
        link = cluster.link(gpu.id, "node01/nvswitch")
        # NVML's 26562 MB/s a link are with the line code; 25 GB/s are for data.
        assert (link.count, link.rated_bytes_per_s) == (18, 18 * 25e9)
    assert cluster.assumed == cluster.warnings == ()


def test_real_output_is_read(tmp_path: Path) -> None:
    """`epplan topo discover` on a machine with one H200, 2026-11-23."""
    document = json.loads((ROOT / "tests/data/host-h200-vm.json").read_text())
    assert is_host_file(document)
    cluster = read_host_file(document, "host.json").build("")
    assert cluster.gpus()[0].pci_bus_id == "0000:00:06.0"
    assert [nic.name for nic in cluster.nodes(Nic)] == ["eth0"]
    slot = cluster.link("vm/gpu0", "vm/numa0")
    assert (slot.provenance, round(slot.rated_bytes_per_s / 1e9)) == ("read", 63)


def test_degraded_gpu_and_fabric_health(tmp_path: Path) -> None:
    hgx(tmp_path)
    cluster = graph("hgx-degraded", tmp_path)
    assert [gpu.links for gpu in cluster.gpus()] == [18, 18, 18, 16, 18, 18, 18, 18]
    assert cluster.warnings == ("node01: GPU 3: 2 NVLinks are not active",)
    assert cluster.gpus()[5].faults == (
        "degraded bandwidth",
        "incorrect configuration: insufficient NVLinks",
    )


def test_mig_is_said_and_its_links_assumed(tmp_path: Path) -> None:
    pair(tmp_path)
    cluster = graph("mig", tmp_path)
    assert [gpu.mig for gpu in cluster.gpus()] == [True, False]
    assert cluster.assumed == (
        "node01: GPU 0: it is in MIG mode and NVML answers Not Supported for its NVLinks; 18 links "
        "to NVSwitches assumed from the profile h100-sxm",
    )


def test_denied_answers_come_from_sysfs_and_the_profile(tmp_path: Path) -> None:
    pair(tmp_path)
    cluster = graph("denied", tmp_path)
    gpu = cluster.gpus()[0]
    assert gpu.profile is not None  # by sysfs's device id
    assert gpu.memory_bytes == gpu.profile.memory
    assert cluster.assumed == (
        "node01: GPU 0 does not tell its memory; the profile's h100-sxm assumed",
        "node01: GPU 0: NVML answers Insufficient Permissions for its NVLinks, as in many virtual "
        "machines; 18 links to NVSwitches assumed from the profile h100-sxm",
    )
    assert cluster.warnings == (
        "node01: GPU 1 of NVML is left out: it does not tell its bus id (Insufficient Permissions)",
        "node01: 1 GPUs that sysfs shows and NVML does not (0000:23:00.0) are left out: this "
        "process may not use them",
    )


def test_hidden_remotes_are_switches(tmp_path: Path) -> None:
    pair(tmp_path)
    cluster = graph("hidden-remote", tmp_path)
    assert len(cluster.nodes(Plane)) == 1
    assert cluster.assumed[0] == (
        "node01: GPU 0: the other end of 18 NVLinks is hidden; taken as NVSwitches"
    )


def test_mesh_links_join_pairs(tmp_path: Path) -> None:
    pair(tmp_path)
    cluster = graph("v100-mesh", tmp_path)
    assert cluster.nodes(Plane) == []
    assert cluster.link("node01/gpu0", "node01/gpu1").count == 2
    assert cluster.gpus()[0].links == 3
    assert cluster.warnings == (
        "node01: GPU 0: 1 NVLinks to 0000:33:00.0, which is no other GPU here; ignored",
    )


def test_unknown_virtual_gpu_needs_the_option(tmp_path: Path) -> None:
    pair(tmp_path)
    host = record("unknown-vgpu", tmp_path)
    cluster = hosts_graph("x", host).build("")
    assert cluster.gpus()[0].profile is None
    assert (
        "GPU 0 (NVIDIA X1-8C) has no hardware profile; give one with --gpu MODEL"
        in (cluster.warnings[1])
    )
    cluster = hosts_graph("x", host, gpu_model="l40s").build("")
    assert cluster.assumed == ("node01: GPU 0 (NVIDIA X1-8C) is taken as l40s, as given",)


def test_trays_of_one_domain_share_a_plane(tmp_path: Path) -> None:
    sys = FakeSys(tmp_path)
    for domain in ("0008", "0009", "0018", "0019"):
        sys.pci(f"{domain}:00:00.0", f"{domain}:01:00.0", device="0x2941", numa=int(domain[2]))
    trays = [record("nvl72-tray", tmp_path, name) for name in ("tray01", "tray02")]
    cluster = hosts_graph("rack", *trays).build("")
    (plane,) = cluster.nodes(Plane)
    assert plane.id == "nvlink-domain 6f1c2a3e-9b1d-4a57-8f62-0d5c4be7a901.32766"
    assert plane.host == ""
    assert cluster.gpus()[0].pci_bus_id == "0008:01:00.0"
    routes = find_routes(cluster)
    assert PATH_TYPES[routes.path_type[0, 7]] == "NVL"  # across trays


def test_no_nvml_falls_back_to_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    host = discover.discover_host(tmp_path, "node01")
    cluster = hosts_graph("x", host).build("")
    assert cluster.warnings == (
        "node01: NVML cannot be used: the package nvidia-ml-py is not installed",
    )
    assert [gpu.pci_bus_id for gpu in cluster.gpus()] == ["0000:13:00.0", "0000:23:00.0"]
    assert "GPU 1: without NVML its NVLinks are unknown; 18 links" in cluster.assumed[-1]


def test_nothing_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    cluster = hosts_graph("x", discover.discover_host(tmp_path, "bare")).build("")
    assert cluster.gpus() == []
    assert cluster.warnings[-1] == "bare: no GPU was found, by NVML or in sysfs"


class Lib:
    """As much of pynvml as one question needs, with real error classes."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, fault: bool = False) -> None:
        self.fault = fault
        self.open = 0

    def nvmlInit(self) -> None:
        if self.fault:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        raise self.NVMLError("GPU is lost")


def test_library_errors_are_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    lib = Lib()
    monkeypatch.setitem(sys.modules, "pynvml", lib)
    with nvml.open_nvml() as opened:
        reading = opened.driver_version()
        assert lib.open == 1
    assert reading == Refusal(refused="GPU is lost")
    assert lib.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", Lib(fault=True))
    with pytest.raises(nvml.NvmlUnavailableError, match="Driver Not Loaded"), nvml.open_nvml():
        pass


def test_nics(tmp_path: Path) -> None:
    sys = pair(tmp_path)
    sys.pci("0000:30:00.0", device="0x1021", vendor="0x15b3", kind="0x020700", numa=-1)
    sys.rdma("mlx5_0", "0000:30:00.0", "b8ce:0000:0000:0001", state="1: DOWN", rate="10 Gb/sec")
    sys.rdma("mlx5_0", "0000:30:00.0", "b8ce:0000:0000:0002", port=2, layer="Ethernet")
    sys.interface("eth0", "0000:30:00.0", "25000")
    cluster = hosts_graph("x", record("mig", tmp_path)).build("")
    nics = {nic.name: nic for nic in cluster.nodes(Nic)}
    assert list(nics) == ["mlx5_0:1", "mlx5_0:2", "eth0"]
    assert nics["mlx5_0:1"].guid == "b8ce000000000001"
    assert nics["mlx5_0:2"].guid is None  # RoCE has no port GUID in an InfiniBand fabric
    assert nics["eth0"].rated_bytes_per_s == 25e9 / 8
    assert "node01: NIC mlx5_0:1 is not active: 1: DOWN" in cluster.warnings
    said = [line for line in cluster.assumed if "NUMA" in line]
    assert said[0] == "node01: sysfs does not tell the NUMA node of NIC mlx5_0:1; node 0 assumed"


def test_emulated_bridges_do_not_slow_their_devices(tmp_path: Path) -> None:
    sys = FakeSys(tmp_path)
    sys.pci("0000:10:01.0", device="0x1", kind="0x060400", speed="2.5 GT/s PCIe", width="1")
    sys.pci("0000:10:01.0", "0000:13:00.0", device="0x2330")
    sys.pci("0000:23:00.0", device="0x2330", speed="Unknown", width="255")
    cluster = graph("mig", tmp_path)
    assert cluster.link("node01/gpu0", "node01/numa0").rated_bytes_per_s > 60e9
    assert "taken as a virtual bridge" in cluster.warnings[0]
    # sysfs is silent about GPU 1; NVML says generation 5 x16
    assert cluster.link("node01/gpu1", "node01/numa0").rated_bytes_per_s > 60e9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hosts": []}, "hosts: Tuple should have at least 1 item"),
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"hosts": [{"name": "a"}, {"name": "a"}]}, "host a is described 2 times"),
        (
            {"hosts": [{"name": "a", "gpus": [{"pci_bus_id": "x"}, {"pci_bus_id": "x"}]}]},
            "host a: two GPUs at x",
        ),
    ],
)
def test_bad_files(change: dict[str, Any], message: str) -> None:
    document = {"schema_version": 1, "kind": "epplan-hosts", "hosts": [{"name": "a"}], **change}
    with pytest.raises(InputError, match=r"^host.json is not valid") as caught:
        read_host_file(document, "host.json")
    assert message in str(caught.value)


# --- the hosts of a job ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}, (2, 3)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, (0, 1)),  # a batch script, not srun
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, (0, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2)),
    ],
)
def test_place(variables: dict[str, str], place: tuple[int, int]) -> None:
    assert gather.find_place(variables) == gather.Place(*place)


def meet(rank: int, output: Path) -> Any:
    own = HostRecord(name=f"node{rank // 2}")  # two ranks a host
    hosts = gather.gather(own, gather.Place(rank, 6), output, timeout_s=20)
    return None if hosts is None else [host.name for host in hosts]


def test_rank_0_gathers_every_host_once(tmp_path: Path) -> None:
    stale = tmp_path / "hosts.json.parts"
    stale.mkdir()
    (stale / "word").write_text("old")
    (stale / "5").write_text('{"word": "old", "host": {"name": "gone"}}')
    results = fork_ranks(meet, 6, tmp_path / "hosts.json")
    assert results == [["node0", "node1", "node2"], *[None] * 5]
    assert not stale.exists()


def test_ranks_that_see_parts_of_a_host_and_hosts_of_one_name() -> None:
    few = HostRecord(name="a", boot_id="1", gpus=(GpuRecord(pci_bus_id="x"),))
    many = few.model_copy(update={"gpus": (*few.gpus, GpuRecord(pci_bus_id="y"))})
    assert gather._one_of_each([few, many, few]) == [many]
    with pytest.raises(InputError, match="two machines are called a"):
        gather._one_of_each([few, few.model_copy(update={"boot_id": "2"})])


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ranks \[1\] of 2 left no host in .*within 0 s"):
        gather.gather(HostRecord(name="a"), gather.Place(0, 2), tmp_path / "h.json", timeout_s=0.1)
    with pytest.raises(EpplanError, match=r"rank 1 waited 0 s for rank 0: .* did not appear"):
        gather.gather(HostRecord(name="a"), gather.Place(1, 2), tmp_path / "x.json", timeout_s=0.1)


def epplan(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "epplan", "topo", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_discover_command(tmp_path: Path) -> None:
    done = epplan("discover", "-o", "host.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "wrote host.json: 1 hosts" in done.stderr
    document = json.loads((tmp_path / "host.json").read_text())
    assert document["sources"]["gpu.link.state"] == "nvmlDeviceGetNvLinkState"
    assert document["hosts"][0]["name"]
    refused = epplan("discover", cwd=tmp_path, RANK="0", WORLD_SIZE="2")
    assert refused.returncode == 2
    assert refused.stderr == "error: 2 ranks need -o FILE, in a folder that all hosts share\n"


def test_every_gpu_has_an_index_of_its_own(tmp_path: Path) -> None:
    hgx(tmp_path)
    cluster = hosts_graph("x", *(record("hgx-h100", tmp_path, name) for name in "ab")).build("")
    assert len(cluster.gpus()) == 16
    assert [gpu.index for gpu in cluster.nodes(Gpu)] == [*range(8), *range(8)]
